"""A running machine's memory and disk, changed live. CPUs are the guest's own affair: see guest.resources."""

from __future__ import annotations

import re

from vmbuild.deadline import Deadline
from vmbuild.machine.files import MachineFiles
from vmbuild.machine.qmp import Qmp
from vmbuild.model import MIB

LEAST_MEMORY_MIB = 256
"""With less a guest has no room for Docker."""

ANSWER_S = 10.0
CLOSE_ENOUGH_MIB = 16
"""A guest gives pages back in batches, and keeps the last few as long as it needs them."""


def set_memory(files: MachineFiles, memory_mib: int, deadline: Deadline) -> int:
    """Let the guest have this much of its memory; return how much it has when the deadline passes, in MiB.

    A guest that needs more than that gives back what it can. Raises MachineError.
    """
    now = _ask(files, memory_mib)
    while abs(now - memory_mib) > CLOSE_ENOUGH_MIB and not deadline.passed:
        deadline.sleep(0.03)
        now = _ask(files, memory_mib)
    return now


def _ask(files: MachineFiles, memory_mib: int) -> int:
    """Say how much is wanted, and return how much there is; the monitor is left to others in between."""
    with Qmp(files.qmp, Deadline.after(ANSWER_S)) as qmp:
        qmp.execute("balloon", value=memory_mib * MIB)
        return memory_now_mib(qmp)


def memory_now_mib(qmp: Qmp) -> int:
    """Return how much of its memory the guest has now, in MiB. Raises MachineError."""
    return int(qmp.execute("query-balloon")["actual"]) // MIB


def grow_disk(files: MachineFiles, size_bytes: int) -> None:
    """Make the disk this large, as the guest sees it. Raises MachineError."""
    with Qmp(files.qmp, Deadline.after(ANSWER_S)) as qmp:
        qmp.execute("block_resize", **{"node-name": "disk", "size": size_bytes})


def translated_bytes(qmp: Qmp) -> int:
    """Return how much code QEMU has translated for its guest; 0 where the host's CPU runs the guest itself.

    Source: QEMU's `info jit`, accel/tcg/monitor.c.
    """
    found = re.search(r"^gen code size +(\d+)/", qmp.hmp("info jit"), re.MULTILINE)
    return int(found[1]) if found else 0
