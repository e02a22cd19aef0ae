"""Where the firmware of a host's QEMU is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vmbuild.errors import HostError
from vmbuild.machine.firmware import PLACES, Firmware, find_firmware
from vmbuild.model import Arch

QEMU = Path("/usr/bin/qemu-system-aarch64")


def find(root: Path, arch: Arch = Arch.ARM64, binary: Path = QEMU, **env: str) -> Firmware:
    return find_firmware(arch, binary, root=root, env={"HOME": str(root / "home"), **env})


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def descriptor(code: str, **changes: Any) -> dict[str, Any]:
    """Return a descriptor as Debian has them (qemu-efi-aarch64, 60-edk2-aarch64.json)."""
    about: dict[str, Any] = {
        "description": "UEFI firmware for aarch64",
        "interface-types": ["uefi"],
        "mapping": {
            "device": "flash",
            "executable": {"filename": f"/fw/{code}", "format": "raw"},
            "nvram-template": {"filename": "/fw/VARS.fd", "format": "raw"},
        },
        "targets": [{"architecture": "aarch64", "machines": ["virt-*"]}],
        "features": ["verbose-static"],
    }
    return {**about, **changes}


def describe(root: Path, name: str, about: dict[str, Any] | str, folder: str = "usr/share/qemu/firmware") -> None:
    path = root / folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(about if isinstance(about, str) else json.dumps(about))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    touch(tmp_path, "fw/A.fd", "fw/B.fd", "fw/VARS.fd")
    return tmp_path


def test_the_first_descriptor_that_fits_is_taken(root: Path) -> None:
    describe(root, "60-b.json", descriptor("B.fd"))
    describe(root, "50-a.json", descriptor("A.fd"))
    assert find(root) == Firmware(root / "fw/A.fd", root / "fw/VARS.fd")


@pytest.mark.parametrize(
    "unfit",
    [
        descriptor("A.fd", features=["enrolled-keys", "secure-boot"]),
        descriptor("A.fd", features=["secure-boot"]),
        descriptor("A.fd", targets=[{"architecture": "x86_64", "machines": ["pc-q35-*"]}]),
        descriptor("A.fd", targets=[{"architecture": "aarch64", "machines": ["sbsa-ref"]}]),
        descriptor("A.fd", mapping={"device": "memory", "filename": "/fw/A.fd"}),
        descriptor("A.fd", **{"interface-types": ["bios"]}),
        descriptor("missing.fd"),
        "",
        "[]",
        "{",
    ],
)
def test_others_are_passed_over(root: Path, unfit: dict[str, Any] | str) -> None:
    describe(root, "10-unfit.json", unfit)
    describe(root, "60-b.json", descriptor("B.fd"))
    assert find(root).code == root / "fw/B.fd"


def test_stateless_firmware_keeps_no_variables(root: Path) -> None:
    mapping = {**descriptor("A.fd")["mapping"], "mode": "stateless"}
    describe(root, "10-unfit.json", descriptor("A.fd", mapping=mapping))
    describe(root, "60-b.json", descriptor("B.fd"))
    assert find(root).code == root / "fw/B.fd"


def test_the_format_is_the_descriptors(root: Path) -> None:
    about = descriptor("A.fd")
    for part in ("executable", "nvram-template"):
        about["mapping"][part]["format"] = "qcow2"
    describe(root, "60-a.json", about)
    assert find(root) == Firmware(root / "fw/A.fd", root / "fw/VARS.fd", "qcow2", "qcow2")


@pytest.mark.parametrize("folder", ["etc/qemu/firmware", "home/.config/qemu/firmware"])
def test_the_administrator_and_the_user_override_a_descriptor_of_the_same_name(root: Path, folder: str) -> None:
    describe(root, "60-edk2.json", descriptor("A.fd"))
    describe(root, "60-edk2.json", descriptor("B.fd"), folder)
    assert find(root).code == root / "fw/B.fd"


def test_descriptors_beside_a_qemu_that_is_installed_elsewhere_are_read(root: Path) -> None:
    describe(root, "60-edk2.json", descriptor("A.fd"), "opt/qemu/share/qemu/firmware")
    assert find(root, binary=root / "opt/qemu/bin/qemu-system-aarch64").code == root / "fw/A.fd"


@pytest.mark.parametrize(("arch", "place"), [(arch, place) for arch, places in PLACES.items() for place in places])
def test_every_known_place_is_looked_at(tmp_path: Path, arch: Arch, place: tuple[str, str]) -> None:
    touch(tmp_path, *place)
    assert find(tmp_path, arch) == Firmware(tmp_path / place[0], tmp_path / place[1])


def test_code_without_variables_will_not_do(tmp_path: Path) -> None:
    touch(tmp_path, "usr/share/AAVMF/AAVMF_CODE.fd")
    with pytest.raises(HostError):
        find(tmp_path)


@pytest.mark.parametrize(("arch", "package"), [(Arch.ARM64, "qemu-efi-aarch64"), (Arch.ARMHF, "qemu-efi-arm")])
def test_the_package_is_named_when_there_is_none(tmp_path: Path, arch: Arch, package: str) -> None:
    with pytest.raises(HostError) as failed:
        find(tmp_path, arch)
    assert f"apt install {package}" in failed.value.resolution
