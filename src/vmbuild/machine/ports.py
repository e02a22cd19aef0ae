"""Ports of the host's loopback that lead to ports of the guest, for as long as the machine runs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from vmbuild.deadline import Deadline
from vmbuild.errors import HostError, MachineError
from vmbuild.machine.files import MachineFiles
from vmbuild.machine.qmp import Qmp

ANSWER_S = 10.0
GUEST = "10.0.2.15"
"""The guest's address in QEMU's user-mode network, whose first DHCP lease it is."""

FORWARD, OVER = "TCP[HOST_FORWARD]", ("TCP[CLOSED]", "TCP[TIME_WAIT]")
"""A row that is no connection but waits for some, and those of connections that have ended."""

SSH = 22
"""The port of the guest that vmbuild itself needs; nobody else changes it."""

ANY = 0
"""Any port of the host that is free."""


@dataclass(frozen=True, order=True)
class Forward:
    """A TCP port of 127.0.0.1 on this host that leads to one of the guest."""

    host_port: int
    guest_port: int


def parse_forwards(usernet: str) -> list[Forward]:
    """Return what is forwarded, from the table of QEMU's `info usernet`.

    Its rows: protocol and state, file descriptor, source address and port, destination address and port, two queues.
    """
    rows = (line.split() for line in usernet.splitlines())
    return sorted(Forward(int(row[3]), int(row[5])) for row in rows if len(row) > 5 and row[0] == FORWARD)


def count_connections(usernet: str) -> int:
    """Return how many TCP connections there are into the guest and out of it, from the same table."""
    states = (line.split()[0] for line in usernet.splitlines() if line.split())
    return sum(state.startswith("TCP[") and state not in (FORWARD, *OVER) for state in states)


def list_forwards(files: MachineFiles) -> list[Forward]:
    """Return what is forwarded to a machine's guest but for SSH. Raises MachineError when it does not answer."""
    with Qmp(files.qmp, Deadline.after(ANSWER_S)) as qmp:
        return [each for each in parse_forwards(qmp.hmp("info usernet")) if each.guest_port != SSH]


def add_forward(files: MachineFiles, wanted: Forward) -> None:
    """Forward a port. Raises HostError where the host's port is taken or not ours to open."""
    with Qmp(files.qmp, Deadline.after(ANSWER_S)) as qmp:
        said = qmp.hmp(f"hostfwd_add net tcp:127.0.0.1:{wanted.host_port}-{GUEST}:{wanted.guest_port}")
    if said.strip():
        raise HostError(
            f"the port {wanted.host_port} of this host cannot be opened",
            details=said.strip(),
            resolution="Another program may have it, and ports below 1024 are root's: choose another, as HOST:GUEST.",
        )


def remove_forward(files: MachineFiles, host_port: int) -> None:
    """Forward a port no more; what is connected stays. Raises MachineError where it was not forwarded."""
    with Qmp(files.qmp, Deadline.after(ANSWER_S)) as qmp:
        said = qmp.hmp(f"hostfwd_remove net tcp:127.0.0.1:{host_port}")
    if "removed" not in said:
        raise MachineError(f"the port {host_port} could not be closed", details=said.strip())


def open_for_awake(files: MachineFiles, wanted: Sequence[Forward] = ()) -> None:
    """Forward to a guest that has just woken up what led to it before, and SSH in any case.

    Not sooner: its SSH server starts anew while it wakes up, and would cut off who came before. Raises MachineError, or
    HostError where this host has no port at all.
    """
    for each in wanted:
        with suppress(HostError):  # another program has taken the port meanwhile
            add_forward(files, each)
    with Qmp(files.qmp, Deadline.after(ANSWER_S)) as qmp:
        is_reached = any(each.guest_port == SSH for each in parse_forwards(qmp.hmp("info usernet")))
    if not is_reached:
        add_forward(files, Forward(ANY, SSH))
