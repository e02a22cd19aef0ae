"""Memory and disk of a running machine, changed by way of QEMU."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.machine.conftest import make_qemu, make_spec, soon
from vmbuild.deadline import Deadline
from vmbuild.errors import MachineError
from vmbuild.machine import lifetime, resources
from vmbuild.machine.files import MachineFiles
from vmbuild.model import MIB


def test_memory_is_taken_and_given_back(running: MachineFiles) -> None:
    assert lifetime.status(running).memory_now_mib == 2048
    for size in (512, 2048):
        assert resources.set_memory(running, size, soon()) == size
        assert lifetime.status(running).memory_now_mib == size
    assert lifetime.status(running).memory_mib == 2048


def test_a_guest_that_needs_its_memory_keeps_it(
    files: MachineFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_QEMU_LEAST_MEMORY", str(700 * MIB))
    lifetime.start(make_spec(tmp_path), files, make_qemu())
    assert resources.set_memory(files, 512, Deadline.after(0.5)) == 700


def test_what_qemu_refuses_is_said(running: MachineFiles) -> None:
    with pytest.raises(MachineError, match="block_resize"):
        resources.grow_disk(running, 1)
