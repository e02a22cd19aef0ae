"""What this host has and lacks, as a table of checks."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from vmbuild import process
from vmbuild.errors import VmbuildError
from vmbuild.image.debian import host_mirrors
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
        _check_other_qemu(),
        _check_qemu(home),
        _check_space("cache", home.cache),
        _check_space("state", home.state),
        _check_mirror(),
    ]


def _check_program(name: str) -> HostCheck:
    return _guard(name, lambda: process.find_program(name))


def _check_other_qemu() -> HostCheck:
    """See whether there is a QEMU for 32-bit machines: who wants none needs none."""
    found = _check_program(BINARIES[Arch.ARMHF])
    return found if found.ok else replace(found, ok=True, found="not installed: needed for --arch arm alone")


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
