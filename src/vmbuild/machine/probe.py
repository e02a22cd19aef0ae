"""What a QEMU binary can do, found out by asking it, never by its version string."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vmbuild import process
from vmbuild.deadline import Deadline
from vmbuild.errors import HostError
from vmbuild.machine.firmware import Firmware, find_firmware
from vmbuild.model import Arch, DiskBoot, GuestImage
from vmbuild.whole import write_whole

BINARIES = {Arch.ARM64: "qemu-system-aarch64", Arch.ARMHF: "qemu-system-arm"}
HOST_MACHINES = {Arch.ARM64: ("aarch64", "arm64"), Arch.ARMHF: ("armv7l",)}
PROBE_S = 30.0

_VERSIONED = re.compile(r"-\d+\.\d+$")

KERNEL_RULES = (Path("/proc/sys/kernel/io_uring_disabled"), Path("/proc/self/status"))
"""Where Linux says whether io_uring and system calls are restricted (sysctl io_uring_disabled, line Seccomp)."""


@dataclass(frozen=True)
class Qemu:
    """A QEMU binary: its path, its machine types, and what of it works on this host.

    `accel` is `tcg`, `kvm` or `hvf`; `aio` is `io_uring` or `threads`. `firmware` is there when a guest image wants it.
    """

    binary: str
    machine_types: tuple[str, ...]
    cpu_models: tuple[str, ...]
    accel: str
    aio: str
    sandbox: bool
    firmware: Firmware | None = None

    def newest(self, family: str) -> str:
        """Return the newest versioned machine type of a family, such as `virt-10.0` of `virt`.

        A versioned type restores across QEMU versions, the bare family does not promise to (QEMU's documentation).
        A versioned type is its own newest. Raises HostError when the binary has none.
        """
        if family in self.machine_types and _VERSIONED.search(family):
            return family
        pattern = re.compile(re.escape(family) + r"-(\d+)\.(\d+)")
        found = [(tuple(map(int, m.groups())), name) for name in self.machine_types if (m := pattern.fullmatch(name))]
        if not found:
            raise HostError(f"{self.binary} has no machine type {family}-N.M", resolution="Install QEMU 7.2 or newer.")
        return max(found)[1]


def probe_for(image: GuestImage, cache: Path) -> Qemu:
    """Return what this host's QEMU for a guest image can do, with the firmware that a disk needs. Raises HostError."""
    qemu = probe(image.arch, cache)
    if isinstance(image.boot, DiskBoot):
        return replace(qemu, firmware=find_firmware(image.arch, Path(qemu.binary)))
    return qemu


def probe(arch: Arch, cache: Path) -> Qemu:
    """Return what this host's QEMU for an architecture can do. Raises HostError when it is not installed.

    The answers are kept in the cache for as long as binary, kernel and the container's rules stay what they are.
    Raises HostError too when QEMU was built without what a machine needs.
    """
    binary = Path(process.find_program(BINARIES[arch])).resolve()
    facts = binary.stat()
    host = f"{platform.release()}-{_kernel_rules()}{int(_can_open_kvm())}"
    key = f"{binary.name}-{facts.st_size}-{facts.st_mtime_ns}-{host}"
    note = cache / "qemu" / f"{key}.json"
    try:
        kept: dict[str, Any] = json.loads(note.read_text())
        if kept["binary"] == str(binary):
            kept.update({name: tuple(kept[name]) for name in ("machine_types", "cpu_models")})
            return Qemu(**kept)
    except (OSError, ValueError, TypeError, KeyError):
        pass  # never asked, or asked by another vmbuild: ask
    qemu = _ask(str(binary), arch)
    with suppress(OSError, HostError):  # a cache that cannot be written is said where it is needed
        note.parent.mkdir(parents=True, exist_ok=True)
        write_whole(note, json.dumps(asdict(qemu)).encode())
    return qemu


def _ask(binary: str, arch: Arch) -> Qemu:
    if "user" not in _help(binary, "-machine", "none", "-netdev", "help").split():
        raise HostError(
            f"{binary} has no user-mode network",
            resolution="Install your distribution's QEMU, or build QEMU with libslirp (--enable-slirp).",
        )
    return Qemu(
        binary,
        machine_types=_first_words(_help(binary, "-machine", "help")),
        cpu_models=_first_words(_help(binary, "-machine", "virt", "-cpu", "help")),
        accel=_accel(arch, _help(binary, "-accel", "help").split()),
        aio="io_uring" if _io_uring_works(binary) else "threads",
        sandbox="-sandbox on" in _help(binary, "-help"),
    )


def _help(binary: str, *args: str) -> str:
    return process.run([binary, *args], deadline=Deadline.after(PROBE_S)).decode(errors="replace")


def _first_words(text: str) -> tuple[str, ...]:
    return tuple(line.split()[0] for line in text.splitlines() if line.strip())


def _accel(arch: Arch, accelerators: list[str]) -> str:
    if platform.machine() in HOST_MACHINES[arch]:
        if "kvm" in accelerators and _can_open_kvm():
            return "kvm"
        if "hvf" in accelerators and sys.platform == "darwin":
            return "hvf"
    return "tcg"


def _can_open_kvm() -> bool:
    """Try: a container may see the device, with the right mode, and not be allowed to open it."""
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _kernel_rules() -> str:
    """Return what decides, beside the kernel, whether io_uring works: a cache may be shared with a container."""
    text = "".join(path.read_text() for path in KERNEL_RULES if path.exists())
    return "".join(re.findall(r"^(?:Seccomp:\s*)?(\d+)$", text, re.MULTILINE))


def _io_uring_works(binary: str) -> bool:
    """Try: io_uring may be compiled out, or forbidden by a container's seccomp filter."""
    with tempfile.NamedTemporaryFile(prefix="vmbuild-") as disk:
        disk.truncate(64 * 1024)
        argv = [binary, "-machine", "none", "-nodefaults", "-display", "none", "-qmp", "stdio"]
        argv += ["-blockdev", f"driver=file,node-name=probe,aio=io_uring,filename={disk.name}"]
        talk = b'{"execute":"qmp_capabilities"}{"execute":"quit"}'
        try:
            process.run(argv, stdin=talk, deadline=Deadline.after(PROBE_S))
        except HostError:
            return False
        return True
