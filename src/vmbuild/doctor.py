"""What this host has and lacks, as a table of checks."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from vmbuild import process
from vmbuild.errors import VmbuildError
from vmbuild.image.debian import host_mirrors
from vmbuild.machine.firmware import find_firmware
from vmbuild.machine.probe import BINARIES, probe
from vmbuild.model import GIB, Arch, Home, format_size

WANTED_FREE = 5 * GIB
"""Guest image and packages take about 0.5 GiB; the rest is for what builds leave on a machine's disk."""


@dataclass(frozen=True)
class HostCheck:
    """One check: what was looked for, what was found, and what to do when that is not enough."""

    name: str
    ok: bool
    found: str
    hint: str


def check_host(home: Home) -> list[HostCheck]:
    """Return every check of this host, in the order in which a build needs them."""
    return [
        *(_check_program(name) for name in ("gpgv", "sqfstar", "qemu-img", BINARIES[Arch.ARM64])),
        _optional(_check_program(BINARIES[Arch.ARMHF]), "--arch arm alone"),
        _optional(_check_firmware(Arch.ARM64), "guest images that are disks from elsewhere"),
        _check_qemu(home),
        _check_space("cache", home.cache),
        _check_space("state", home.state),
        _check_mirror(),
    ]


def _check_program(name: str) -> HostCheck:
    return _guard(name, lambda: process.find_program(name))


def _check_firmware(arch: Arch) -> HostCheck:
    def find() -> str:
        return str(find_firmware(arch, Path(process.find_program(BINARIES[arch]))).code)

    return _guard(f"UEFI firmware for {arch}", find)


def _optional(check: HostCheck, wanted_for: str) -> HostCheck:
    """Return a check that fails nobody: who does not want what it is for needs nothing."""
    return check if check.ok else replace(check, ok=True, found=f"not installed: needed for {wanted_for}")


def _check_qemu(home: Home) -> HostCheck:
    def ask() -> str:
        qemu = probe(Arch.ARM64, home.cache)
        return f"{qemu.newest('virt')}, {qemu.accel}, {qemu.aio}, sandbox {'on' if qemu.sandbox else 'not built in'}"

    return _guard("QEMU's abilities", ask)


def _guard(name: str, find: Callable[[], str]) -> HostCheck:
    try:
        return HostCheck(name, True, find(), "")
    except VmbuildError as error:
        return HostCheck(name, False, error.brief, error.resolution)


def _check_space(what: str, folder: Path) -> HostCheck:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    hint = "" if free >= WANTED_FREE else f"Make room, or set VMBUILD_{what.upper()}_DIR to another file system."
    return HostCheck(f"room in the {what} folder", free >= WANTED_FREE, f"{format_size(free)} free in {folder}", hint)


def _check_mirror() -> HostCheck:
    mirrors = host_mirrors()
    return HostCheck("Debian mirror", True, mirrors.get("debian", "the catalogue's public default"), "")
