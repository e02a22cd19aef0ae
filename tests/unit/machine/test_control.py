"""What a guest tells on its port while it is provisioned."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.machine.conftest import soon
from vmbuild.errors import HostError, MachineError
from vmbuild.machine import control
from vmbuild.machine.files import MachineFiles


@pytest.fixture
def files(tmp_path: Path) -> MachineFiles:
    files = MachineFiles.at(tmp_path, "box")
    files.folder.mkdir(parents=True)
    control.make_pipes(files)
    return files


@pytest.fixture
def port(files: MachineFiles) -> Iterator[int]:
    handle = os.open(files.control_out, os.O_RDWR)
    yield handle
    os.close(handle)


def test_lines_are_passed_on_as_they_come_up_to_the_last(files: MachineFiles, port: int) -> None:
    lines = control.listen(files, "provisioned", soon())
    os.write(port, b"phase One\n")
    assert next(lines) == "phase One"
    os.write(port, b"phase T")
    os.write(port, b"wo\nprovisioned\nmore\n")
    assert list(lines) == ["phase Two", "provisioned"]


def test_a_failure_is_told_with_its_reason_and_without_what_a_terminal_would_obey(
    files: MachineFiles, port: int
) -> None:
    os.write(port, b"phase One\nfailed no \x1b[31mroom\x07\n")
    with pytest.raises(MachineError, match="could not become `provisioned`") as failed:
        list(control.listen(files, "provisioned", soon()))
    assert failed.value.details == "no room"


def test_who_listens_looks_after_the_machine(files: MachineFiles, port: int) -> None:
    def check() -> None:
        raise HostError("the disk is full")

    with pytest.raises(HostError, match="the disk is full"):
        list(control.listen(files, "provisioned", soon(), check_alive=check))
