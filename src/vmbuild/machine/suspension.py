"""A suspended machine: its memory and devices in a file beside its disk, which must not change until it goes on.

The note is written last and removed first. So a memory without a note is a saving that was cut short, and a disk that
may have been written to since then is never given to a memory from before.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from vmbuild.errors import HostError, MachineError, UsageError
from vmbuild.machine.facts import Facts, hardware
from vmbuild.machine.files import MachineFiles
from vmbuild.machine.probe import Qemu
from vmbuild.machine.snapshot import is_unchanged, sparse_digest
from vmbuild.model import MachineRequest, MachineSpec
from vmbuild.plain import read_plain
from vmbuild.whole import write_whole, writing_in


@dataclass(frozen=True)
class Suspension:
    """What a suspended machine was, and what its memory must still be.

    `digest` is that of the saved memory, `size_bytes` as it lies on disk; `fast` tells whether QEMU's mapped-ram is
    needed to load it. `qemu` is the version that saved it, for people to read. Time in POSIX seconds.
    """

    facts: Facts
    qemu: str
    fast: bool
    digest: str
    size_bytes: int
    suspended_at: float


def find(files: MachineFiles) -> Suspension | None:
    """Return what a suspended machine goes on from, None when there is nothing. Raises MachineError for nonsense."""
    try:
        return read_plain(Suspension, json.loads(files.suspension.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise _unusable(files, f"{files.suspension} cannot be read: {error}") from error


def publish(files: MachineFiles, facts: Facts, qemu: str, *, fast: bool) -> Suspension:
    """Make a memory that was saved whole what the machine goes on from. Raises HostError."""
    with writing_in(files.folder):
        _sync(files.memory)
    size = files.memory.stat().st_blocks * 512
    made = Suspension(facts, qemu, fast, sparse_digest(files.memory), size, time.time())
    write_note(files, made)
    return made


def write_note(files: MachineFiles, suspension: Suspension) -> None:
    """Say that the machine is suspended. Raises HostError."""
    write_whole(files.suspension, json.dumps(asdict(suspension)).encode(), mode=0o600)


def discard(files: MachineFiles) -> None:
    """Forget what the machine would go on from: it goes on now, or never. Raises HostError."""
    with writing_in(files.folder):
        files.suspension.unlink(missing_ok=True)
        files.memory.unlink(missing_ok=True)


def check(files: MachineFiles, suspension: Suspension) -> None:
    """Raise MachineError when the saved memory is not what was saved."""
    try:
        is_same = is_whole(files, suspension)
    except OSError as error:
        raise _unusable(files, str(error)) from error
    if not is_same:
        raise _unusable(files, f"{files.memory} was changed since it was saved")


def is_whole(files: MachineFiles, suspension: Suspension) -> bool:
    """Tell whether the saved memory is what was saved. Raises OSError when it is not there."""
    return is_unchanged(files.memory, suspension.digest)


def refuse_differences(suspension: Suspension, request: MachineRequest) -> None:
    """Refuse to make another machine of a suspended one, whose guest knows what it had. Raises UsageError."""
    facts = suspension.facts
    asked = {"cpus": request.cpus, "memory": request.memory_mib, "image": request.image}
    has = {"cpus": facts.cpus, "memory": facts.memory_mib, "image": facts.image}
    for key in sorted(request.demanded & asked.keys()):
        if asked[key] != has[key]:
            raise UsageError(
                f"the machine {request.name} is suspended with {key} {has[key]} and cannot go on with {asked[key]}",
                resolution=f"Leave that out; or give up what runs in it with `vmbuild down {request.name}`.",
            )


def fit(facts: Facts, spec: MachineSpec, qemu: Qemu, made_by: str = "another version") -> MachineSpec:
    """Return the machine that can go on on this host as one with these facts; `made_by` is the version of its QEMU.

    Raises MachineError with the reason when none can: another QEMU, guest image or kind of machine.
    """
    if spec.image.digest != facts.image_digest:
        raise _cannot(f"it was made with the guest image {facts.image_digest[:12]}, here is {spec.image.digest[:12]}")
    if qemu.accel != facts.accel:
        raise _cannot(f"its guest ran under {facts.accel}, on this host it would under {qemu.accel}")
    whole = replace(
        spec,
        cpus=facts.cpus,
        memory_mib=facts.memory_mib,
        disk_bytes=facts.disk_bytes,
        image=replace(spec.image, machine_type=facts.machine_type),
    )
    try:
        same = hardware(whole, qemu) == facts.hardware
    except HostError as error:
        raise _cannot(f"QEMU {made_by} made it, and {error.brief}") from error
    if not same:
        raise _cannot("it was made by a vmbuild whose machines are built in another way")
    return whole


def _cannot(reason: str) -> MachineError:
    return MachineError(
        "this host cannot go on with the suspended machine",
        details=reason,
        resolution="Go on with it where it was suspended, or with the same versions of vmbuild, QEMU and guest image.",
    )


def _unusable(files: MachineFiles, reason: str) -> MachineError:
    return MachineError(
        f"the saved memory of the machine {files.name} cannot be used",
        details=reason,
        resolution=f"`vmbuild down {files.name}` gives it up and keeps the disk, as after a power cut.",
    )


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
