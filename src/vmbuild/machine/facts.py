"""What a machine was last started as."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from dataclasses import asdict, dataclass, fields
from typing import Any

from vmbuild.machine.argv import neutral_argv
from vmbuild.machine.files import MachineFiles
from vmbuild.machine.probe import Qemu
from vmbuild.model import Arch, MachineSpec
from vmbuild.plain import read_plain
from vmbuild.whole import write_whole

HARDWARE = 1
"""Raised when what the guest expects of a machine changes in another way than by QEMU's argv."""

OLDER = {"arch": str(Arch.ARM64), "machine_type": "", "accel": "", "hardware": ""}
"""What an older vmbuild did not note."""


@dataclass(frozen=True)
class Facts:
    """What a machine was last started as; sizes in their units, time in POSIX seconds.

    `machine_type` has QEMU's version in it; `hardware` is the same for machines that a guest cannot tell apart. They
    are empty for a machine that an older vmbuild started.
    """

    uuid: str
    cpus: int
    memory_mib: int
    disk_bytes: int
    image: str
    image_digest: str
    started_at: float
    machine_type: str
    accel: str
    hardware: str
    arch: str = str(Arch.ARM64)


def describe(spec: MachineSpec, qemu: Qemu, disk_bytes: int) -> Facts:
    """Return the facts of a machine that is started now."""
    return Facts(
        uuid=str(uuid.uuid4()),
        cpus=spec.cpus,
        memory_mib=spec.memory_mib,
        disk_bytes=disk_bytes,
        image=spec.image.name,
        image_digest=spec.image.digest,
        started_at=time.time(),
        machine_type=qemu.newest(spec.image.machine_type),
        accel=qemu.accel,
        hardware=hardware(spec, qemu),
        arch=str(spec.image.arch),
    )


def hardware(spec: MachineSpec, qemu: Qemu) -> str:
    """Return what is the same for machines that a guest cannot tell apart. Raises HostError."""
    text = json.dumps([HARDWARE, neutral_argv(spec, qemu)])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def write_facts(files: MachineFiles, facts: Facts) -> None:
    """Keep a machine's facts. Raises HostError."""
    write_whole(files.facts, json.dumps(asdict(facts)).encode())


def load_facts(files: MachineFiles) -> Facts | None:
    """Return what the machine was last started as, None when it never was.

    Another vmbuild may have started it, that knew more or less: its QEMU must be found all the same.
    """
    known = {field.name for field in fields(Facts)}
    try:
        found: dict[str, Any] = json.loads(files.facts.read_text())
        told = {name: value for name, value in found.items() if name in known}
        return read_plain(Facts, {**OLDER, **told})
    except (FileNotFoundError, ValueError, TypeError, AttributeError):
        return None
