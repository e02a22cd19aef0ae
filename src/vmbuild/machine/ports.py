"""Ports of the host's loopback that lead to ports of the guest, for as long as the machine runs."""

from __future__ import annotations

from dataclasses import dataclass

from vmbuild.deadline import Deadline
from vmbuild.errors import HostError, MachineError
from vmbuild.machine.files import MachineFiles
from vmbuild.machine.qmp import Qmp

ANSWER_S = 10.0
GUEST = "10.0.2.15"
"""The guest's address in QEMU's user-mode network, whose first DHCP lease it is."""

SSH = 22
"""The port of the guest that vmbuild itself needs; nobody else changes it."""


@dataclass(frozen=True, order=True)
class Forward:
    """A TCP port of 127.0.0.1 on this host that leads to one of the guest."""

    host_port: int
    guest_port: int


def parse_forwards(usernet: str) -> list[Forward]:
    """Return what is forwarded but for SSH, from the table of QEMU's `info usernet`."""
    rows = (line.split() for line in usernet.splitlines())
    found = [Forward(int(row[3]), int(row[5])) for row in rows if len(row) > 5 and row[0] == "TCP[HOST_FORWARD]"]
    return sorted(each for each in found if each.guest_port != SSH)


def list_forwards(files: MachineFiles) -> list[Forward]:
    """Return what is forwarded to a machine's guest. Raises MachineError when it does not answer."""
    with Qmp(files.qmp, Deadline.after(ANSWER_S)) as qmp:
        return parse_forwards(qmp.hmp("info usernet"))


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
