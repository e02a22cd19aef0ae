"""User-mode emulation on this host: which program runs foreign ones, and how the kernel is told of it.

The kernel's table is binfmt_misc. Since Linux 6.7 a user namespace has one of its own, so that nothing of the host
needs to be changed, and no privilege is needed (Documentation/admin-guide/binfmt-misc.rst).
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path

from vmbuild import process
from vmbuild.deadline import Deadline
from vmbuild.errors import HostError

TABLE = Path("/proc/sys/fs/binfmt_misc")
NAMESPACED_SINCE = (6, 7)
VERSION_S = 20.0


@dataclass(frozen=True)
class Emulator:
    """A user-mode emulator: its program, its name in binfmt_misc, the CPU it is to be, and the first bytes it takes.

    The bytes are those of QEMU's scripts/qemu-binfmt-conf.sh. `cpu_model` is the machine's; a program for 32 bits does
    not know that one, and is what a 32-bit machine is.
    """

    program: str
    name: str
    cpu_model: str
    magic: str
    mask: str


_HEAD = r"\x7f\x45\x4c\x46{bits}\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00{machine}\x00"
_MASK = r"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"
_AARCH64 = _HEAD.format(bits=r"\x02", machine=r"\xb7")
_ARM = _HEAD.format(bits=r"\x01", machine=r"\x28")

EMULATORS = {
    "linux/arm64": Emulator("qemu-aarch64-static", "qemu-aarch64", "cortex-a76", _AARCH64, _MASK),
    "linux/arm/v7": Emulator("qemu-arm-static", "qemu-arm", "cortex-a15", _ARM, _MASK),
    "linux/arm/v6": Emulator("qemu-arm-static", "qemu-arm", "arm1176", _ARM, _MASK),
}

NATIVE = {"linux/arm64": ("aarch64", "arm64"), "linux/arm/v7": ("aarch64", "armv7l"), "linux/arm/v6": ("armv7l",)}
"""What a host calls itself that runs a platform's programs on its own CPU."""


def is_native(platform_name: str) -> bool:
    """Tell whether this host runs a platform's programs itself."""
    return platform.machine() in NATIVE[platform_name]


def row_for(emulator: Emulator, program: str) -> str:
    """Return the row that registers an emulator.

    P keeps argv[0]; O passes the open file; F opens the emulator now, so that it works in any root file system.
    """
    return f":{emulator.name}:M::{emulator.magic}:{emulator.mask}:{program}:POF"


def find_registered(emulator: Emulator, table: Path = TABLE) -> str | None:
    """Return the program that the host's kernel runs for these binaries in any root file system, None for none."""
    try:
        text = (table / emulator.name).read_text()
    except OSError:
        return None
    found = dict(line.partition(" ")[::2] for line in text.splitlines())
    if "enabled" not in found or "F" not in found.get("flags:", ""):
        return None
    return found.get("interpreter")


def why_not_registered(emulator: Emulator, table: Path = TABLE) -> str:
    """Return why the host's kernel does not run an emulator for these binaries."""
    if not table.is_dir():
        return "the kernel has no binfmt_misc"
    if not (table / "status").exists():
        return f"binfmt_misc is not mounted at {table}"
    if (table / "status").read_text().strip() != "enabled":
        return "binfmt_misc is switched off"
    if not (table / emulator.name).exists():
        return f"no handler {emulator.name} is registered"
    return f"the handler {emulator.name} is switched off, or has no flag F, which a container needs"


def check_registered(platform_name: str, resolution: str) -> Emulator:
    """Return the emulator that the host's kernel runs for a platform. Raises HostError, with the reason, for none."""
    emulator = EMULATORS[platform_name]
    if find_registered(emulator) is None:
        raise HostError(
            f"this host runs no programs for {platform_name} through {emulator.name}",
            details=f"The reason: {why_not_registered(emulator)}.",
            resolution=resolution,
        )
    return emulator


def check_namespaces(release: str | None = None) -> None:
    """See that a user namespace can have a binfmt_misc of its own. Raises HostError."""
    release = release or platform.release()
    found = re.match(r"(\d+)\.(\d+)", release)
    if found is None or (int(found[1]), int(found[2])) < NAMESPACED_SINCE:
        raise HostError(
            f"Linux {release} has one binfmt_misc for all: a user namespace gets its own since 6.7",
            resolution="Register the handler on the host (Debian: apt install qemu-user-static) and use "
            "--user-runner host.",
        )


def version_of(program: str) -> str:
    """Return a QEMU program's version, such as `10.0.2 (Debian 1:10.0.2+ds-2)`. Raises HostError."""
    text = process.run([program, "--version"], deadline=Deadline.after(VERSION_S)).decode(errors="replace")
    found = re.search(r"version (\S+(?: \([^)]*\))?)", text)
    return found[1] if found else text.strip().splitlines()[0]


def short_version(version: str) -> str:
    """Return the numbers of a version alone: distributions number what they change."""
    return version.split()[0]
