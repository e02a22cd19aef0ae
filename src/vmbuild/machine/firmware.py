"""The UEFI firmware of this host's QEMU: its code, and a template of the variables that each machine has of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from vmbuild.errors import HostError
from vmbuild.model import Arch

TARGETS = {Arch.ARM64: "aarch64", Arch.ARMHF: "arm"}
"""What QEMU calls the architectures."""

UNWANTED = frozenset({"enrolled-keys", "secure-boot"})
"""A disk that somebody trusts need not be signed by Microsoft."""

PACKAGES = {
    Arch.ARM64: "Debian, Ubuntu: apt install qemu-efi-aarch64; Fedora: edk2-aarch64; Arch: edk2-aarch64; "
    "openSUSE: qemu-uefi-aarch64; Homebrew: qemu has it",
    Arch.ARMHF: "Debian, Ubuntu: apt install qemu-efi-arm; Fedora: edk2-arm; Arch: edk2-arm; "
    "openSUSE: qemu-uefi-aarch32; Homebrew: qemu has it",
}

PLACES = {
    Arch.ARM64: (
        ("usr/share/AAVMF/AAVMF_CODE.no-secboot.fd", "usr/share/AAVMF/AAVMF_VARS.fd"),
        ("usr/share/AAVMF/AAVMF_CODE.fd", "usr/share/AAVMF/AAVMF_VARS.fd"),
        ("usr/share/edk2/aarch64/QEMU_EFI-silent-pflash.raw", "usr/share/edk2/aarch64/vars-template-pflash.raw"),
        ("usr/share/edk2/aarch64/QEMU_CODE.fd", "usr/share/edk2/aarch64/QEMU_VARS.fd"),
        ("usr/share/qemu/aavmf-aarch64-code.bin", "usr/share/qemu/aavmf-aarch64-vars.bin"),
        ("opt/homebrew/share/qemu/edk2-aarch64-code.fd", "opt/homebrew/share/qemu/edk2-arm-vars.fd"),
        ("usr/local/share/qemu/edk2-aarch64-code.fd", "usr/local/share/qemu/edk2-arm-vars.fd"),
        ("usr/share/qemu/edk2-aarch64-code.fd", "usr/share/qemu/edk2-arm-vars.fd"),
    ),
    Arch.ARMHF: (
        ("usr/share/AAVMF/AAVMF32_CODE.fd", "usr/share/AAVMF/AAVMF32_VARS.fd"),
        ("usr/share/edk2/arm/QEMU_EFI-pflash.raw", "usr/share/edk2/arm/vars-template-pflash.raw"),
        ("usr/share/edk2/arm/QEMU_CODE.fd", "usr/share/edk2/arm/QEMU_VARS.fd"),
        ("usr/share/qemu/aavmf-aarch32-code.bin", "usr/share/qemu/aavmf-aarch32-vars.bin"),
        ("opt/homebrew/share/qemu/edk2-arm-code.fd", "opt/homebrew/share/qemu/edk2-arm-vars.fd"),
        ("usr/local/share/qemu/edk2-arm-code.fd", "usr/local/share/qemu/edk2-arm-vars.fd"),
        ("usr/share/qemu/edk2-arm-code.fd", "usr/share/qemu/edk2-arm-vars.fd"),
    ),
}
"""Code and variables where there are no descriptors: Debian, Ubuntu, Fedora, Arch, openSUSE, Homebrew, QEMU."""


@dataclass(frozen=True)
class Firmware:
    """The two halves of a UEFI firmware, and the format of each (`raw` or `qcow2`)."""

    code: Path
    variables: Path
    code_format: str = "raw"
    variables_format: str = "raw"


def find_firmware(arch: Arch, binary: Path, *, root: Path = Path("/"), env: Mapping[str, str] = os.environ) -> Firmware:
    """Return the firmware for a QEMU binary of this host; `root` is where the host's files are.

    QEMU's own descriptors are read first. Raises HostError that names the package when there is none.
    """
    found = next(_described(arch, _descriptor_folders(binary, root, env), root), None) or next(
        _known(arch, root, binary), None
    )
    if found is None:
        raise HostError(
            f"no UEFI firmware for {arch} is installed, which a guest image that is a disk needs",
            resolution=f"Install it ({PACKAGES[arch]}).",
        )
    return found


def _descriptor_folders(binary: Path, root: Path, env: Mapping[str, str]) -> list[Path]:
    """Return where descriptors lie, who overrides first (QEMU, docs/interop/firmware.json)."""
    own = Path(env.get("XDG_CONFIG_HOME") or Path(env.get("HOME", "/nonexistent")) / ".config")
    beside = binary.parent.parent / "share/qemu/firmware"
    return [own / "qemu/firmware", root / "etc/qemu/firmware", root / "usr/share/qemu/firmware", beside]


def _described(arch: Arch, folders: list[Path], root: Path) -> Iterator[Firmware]:
    files: dict[str, Path] = {}
    for folder in folders:
        for path in folder.glob("*.json"):
            files.setdefault(path.name, path)
    for _, path in sorted(files.items()):
        try:
            firmware = _read_descriptor(json.loads(path.read_text(encoding="utf-8")), arch, root)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            continue  # empty (which masks one of that name) or of a form that we do not know
        if firmware is not None:
            yield firmware


def _read_descriptor(about: Mapping[str, Any], arch: Arch, root: Path) -> Firmware | None:
    """Return the firmware of a descriptor when it will do: UEFI in flash, for `virt`, without secure boot."""
    mapping = about["mapping"]
    fits = any(
        target["architecture"] == TARGETS[arch] and any(fnmatch("virt-10.0", name) for name in target["machines"])
        for target in about["targets"]
    )
    will_do = fits and "uefi" in about["interface-types"] and not UNWANTED & set(about["features"])
    if not will_do or mapping["device"] != "flash" or mapping.get("mode", "split") != "split":
        return None
    code, variables = mapping["executable"], mapping["nvram-template"]
    found = Firmware(
        _under(root, code["filename"]), _under(root, variables["filename"]), code["format"], variables["format"]
    )
    return found if found.code.exists() and found.variables.exists() else None


def _known(arch: Arch, root: Path, binary: Path) -> Iterator[Firmware]:
    share = binary.parent.parent / "share/qemu"
    names = {Arch.ARM64: "edk2-aarch64-code.fd", Arch.ARMHF: "edk2-arm-code.fd"}
    places = [(root / code, root / variables) for code, variables in PLACES[arch]]
    places.append((share / names[arch], share / "edk2-arm-vars.fd"))
    for code, variables in places:
        if code.exists() and variables.exists():
            yield Firmware(code, variables)


def _under(root: Path, name: str) -> Path:
    return root / name.lstrip("/")
