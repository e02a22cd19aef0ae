"""What `vmbuild doctor` says of a host that lacks something."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmbuild import doctor, process
from vmbuild.errors import HostError
from vmbuild.machine.firmware import Firmware
from vmbuild.model import Arch, Home


def test_a_qemu_for_32_bit_machines_is_told_of_but_not_demanded(
    tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(name: str) -> str:
        if name == "qemu-system-arm":
            raise HostError("the program qemu-system-arm is not installed")
        return str(programs / "qemu-system-aarch64")

    monkeypatch.setattr(process, "find_program", find)
    checks = {check.name: check for check in doctor.check_host(Home(tmp_path, tmp_path))}
    assert checks["qemu-system-arm"].ok
    assert checks["qemu-system-arm"].found == "not installed: needed for --arch arm alone"
    assert checks["qemu-system-aarch64"].found.endswith("qemu-system-aarch64")


@pytest.mark.parametrize("is_there", [True, False])
def test_firmware_is_told_of_but_not_demanded(
    tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    def find(arch: Arch, binary: Path) -> Firmware:
        assert (arch, binary.name) == (Arch.ARM64, "qemu-system-aarch64")
        if not is_there:
            raise HostError("no UEFI firmware", resolution="Install it.")
        return Firmware(Path("/usr/share/code.fd"), Path("/usr/share/vars.fd"))

    monkeypatch.setattr(doctor, "find_firmware", find)
    check = {check.name: check for check in doctor.check_host(Home(tmp_path, tmp_path))}["UEFI firmware for arm64"]
    assert check.ok
    said = (check.found, check.hint)
    wanted = "not installed: needed for guest images that are disks from elsewhere"
    assert said == (("/usr/share/code.fd", "") if is_there else (wanted, "Install it."))
