"""The recipe of ports: what of the guest is reached on this host's loopback, by choice or as containers publish it."""

from __future__ import annotations

from contextlib import suppress

from vmbuild import dockerhost
from vmbuild.errors import HostError, MachineError, UsageError
from vmbuild.guest import published
from vmbuild.machine import lifetime, ports
from vmbuild.machine.files import MachineFiles
from vmbuild.machine.ports import SSH, Forward
from vmbuild.model import Home
from vmbuild.reach import at_rest
from vmbuild.report import Reporter

MAX_PORT = 65535


def parse_forward(text: str) -> Forward:
    """Return the forward that `GUEST` or `HOST:GUEST` means. Raises UsageError."""
    host, colon, guest = text.rpartition(":")
    try:
        found = Forward(int(host if colon else guest), int(guest))
    except ValueError as error:
        raise UsageError(f"{text!r} is no port", resolution="Write GUEST_PORT, or HOST_PORT:GUEST_PORT.") from error
    if not all(0 < port <= MAX_PORT for port in (found.host_port, found.guest_port)):
        raise UsageError(f"{text!r} is no port", resolution=f"Ports are 1 to {MAX_PORT}.")
    if found.guest_port == SSH:
        raise UsageError("the guest's SSH port is forwarded as it is", resolution="`vmbuild status` tells its number.")
    return found


def list_forwards(name: str, home: Home) -> list[Forward]:
    """Return what is forwarded to a machine's guest. Raises MachineError when it does not run."""
    return ports.list_forwards(_running(name, home))


def forward(name: str, home: Home, wanted: list[Forward]) -> None:
    """Forward ports until the machine ends; one that is forwarded that way already stays. Raises HostError."""
    files = _running(name, home)
    has = ports.list_forwards(files)
    for each in wanted:
        if each not in has:
            ports.add_forward(files, each)


def remove(name: str, home: Home, wanted: list[Forward]) -> None:
    """Forward ports no more, by their numbers on the host. Raises UsageError for one that is not forwarded."""
    files = _running(name, home)
    has = {each.host_port for each in ports.list_forwards(files)}
    for each in wanted:
        if each.host_port not in has:
            raise UsageError(f"the port {each.host_port} is not forwarded to the machine {name}")
        ports.remove_forward(files, each.host_port)


def follow_containers(name: str, home: Home, report: Reporter) -> None:
    """Forward what containers publish under the same numbers, as they come and go, until the machine ends.

    A number that this host has no use for costs a warning. What was forwarded here is not when this is left.
    """
    files = _running(name, home)
    socket = dockerhost.open_socket(name, home, report).socket
    ours: set[int] = set()
    try:
        for now in published.watch_published(socket):
            for port in ours - now:
                ports.remove_forward(files, port)
                report.step(f"127.0.0.1:{port} is closed")
            taken = {each.host_port for each in ports.list_forwards(files)}
            ours = (ours & now) | {port for port in sorted(now - taken) if _open(files, port, report)}
    finally:
        with suppress(MachineError):  # it is down, and they with it
            for port in ours:
                ports.remove_forward(files, port)


def _open(files: MachineFiles, port: int, report: Reporter) -> bool:
    try:
        ports.add_forward(files, Forward(port, port))
    except HostError as error:
        report.warn(f"{error.brief}: {error.details}")
        return False
    report.step(f"127.0.0.1:{port} leads to the port that a container publishes")
    return True


def _running(name: str, home: Home) -> MachineFiles:
    files = at_rest(name, home)
    lifetime.check_running(files)
    return files
