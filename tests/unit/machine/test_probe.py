"""A QEMU is asked what it can do, once."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

import pytest

from tests.unit.machine.conftest import make_qemu
from vmbuild.errors import HostError
from vmbuild.machine import probe as module
from vmbuild.machine.probe import probe
from vmbuild.model import Arch


def test_what_the_binary_says(programs: Path, tmp_path: Path) -> None:
    qemu = probe(Arch.ARM64, tmp_path)
    assert qemu.binary == str(programs / "qemu-system-aarch64")
    assert qemu.newest("virt") == "virt-10.0"
    assert "cortex-a76" in qemu.cpu_models
    assert (qemu.aio, qemu.sandbox) == ("io_uring", True)


def test_what_does_not_work_is_not_used(programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_QEMU_NO_IO_URING", "1")
    monkeypatch.setenv("FAKE_QEMU_NO_SANDBOX", "1")
    qemu = probe(Arch.ARM64, tmp_path)
    assert (qemu.aio, qemu.sandbox) == ("threads", False)


def test_a_second_time_nobody_is_asked(programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = probe(Arch.ARM64, tmp_path)
    monkeypatch.setenv("FAKE_QEMU_FAIL", "asked again")
    assert probe(Arch.ARM64, tmp_path) == first


def test_another_binary_is_asked_anew(programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "qemu-system-aarch64"
    shutil.copy(programs / "qemu-system-aarch64", own)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert probe(Arch.ARM64, tmp_path / "cache").sandbox
    os.utime(own, (1, 1))
    monkeypatch.setenv("FAKE_QEMU_NO_SANDBOX", "1")
    assert not probe(Arch.ARM64, tmp_path / "cache").sandbox


def test_a_damaged_answer_is_asked_for_again(programs: Path, tmp_path: Path) -> None:
    first = probe(Arch.ARM64, tmp_path)
    for note in tmp_path.rglob("*.json"):
        note.write_text('{"binary":')
    assert probe(Arch.ARM64, tmp_path) == first


def test_a_missing_program_names_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="qemu-system-aarch64 is not installed") as caught:
        probe(Arch.ARM64, tmp_path)
    assert "qemu-system-arm" in caught.value.resolution


def test_a_qemu_without_user_networking_is_refused(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_QEMU_NO_USER_NET", "1")
    with pytest.raises(HostError, match="user-mode network"):
        probe(Arch.ARM64, tmp_path)


@pytest.mark.parametrize(
    ("host", "kvm", "accel"), [("x86_64", True, "tcg"), ("aarch64", True, "kvm"), ("aarch64", False, "tcg")]
)
def test_kvm_needs_the_same_architecture_and_an_open_door(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, kvm: bool, accel: str
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: host)
    monkeypatch.setattr(module, "_can_open_kvm", lambda: kvm)
    assert probe(Arch.ARM64, tmp_path).accel == accel


def test_a_family_without_versions_is_refused() -> None:
    with pytest.raises(HostError, match="no machine type raspi-N"):
        make_qemu().newest("raspi")
