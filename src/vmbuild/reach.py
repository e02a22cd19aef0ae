"""How the host reaches a machine's guest: keys that both know, a session over SSH, the drives of bulk data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from vmbuild.deadline import Deadline
from vmbuild.errors import GuestError, MachineError, UsageError
from vmbuild.guest import ready, seed
from vmbuild.guest.channel import Channel
from vmbuild.guest.session import Session
from vmbuild.lock import is_free
from vmbuild.machine import lifetime
from vmbuild.machine.files import MachineFiles
from vmbuild.model import Endpoint, Home, MachineStatus
from vmbuild.report import Reporter

MOVING, MOVE_S = ("paused", "suspended", "restoring", "broken"), 20.0
"""What a machine may be while it goes on in another QEMU (`renew`), until SSH leads to it; how long that may take."""


def write_seed(files: MachineFiles, hostname: str, environment: Mapping[str, str]) -> None:
    """Write what the guest is told before it first listens. Raises HostError."""
    seed.write_seed(
        files.seed, hostname=hostname, client_key=files.client_key, host_key=files.host_key, environment=environment
    )


def wait_ready(files: MachineFiles, deadline: Deadline, report: Reporter) -> Session:
    """Return a session in a machine's guest when it is ready. Raises GuestError, or MachineError when QEMU is gone."""
    return ready.wait_ready(
        lambda limit: connect(files, limit), lambda: lifetime.check_running(files), deadline, report
    )


def load_ssh() -> None:
    """Load what connecting needs, now that there is something else to wait for: it takes as long as all the rest."""
    from vmbuild.guest import ssh  # noqa: F401


def connect(files: MachineFiles, limit: Deadline) -> Session:
    """Return a session in a machine's guest. Raises GuestError or MachineError."""
    from vmbuild.guest import ssh

    return ssh.SshSession.connect(lambda: endpoint_of(files), limit, lambda: lifetime.check_running(files))


def endpoint_of(files: MachineFiles) -> Endpoint:
    """Return where a machine's guest listens. Raises MachineError when it does not."""
    now = lifetime.status(files)
    if now.ssh_port is None:
        raise MachineError(
            f"no port leads to the SSH server of the machine {now.name}",
            resolution=f"`vmbuild up --name {now.name}` opens one.",
        )
    return Endpoint("127.0.0.1", now.ssh_port, "root", files.client_key, files.host_public_key)


def channel_of(files: MachineFiles) -> Channel:
    """Return the drives of a machine that carry bulk data."""
    return Channel(files.inbox, files.outbox, files.folder / ".boxes.lock")


def running(name: str, home: Home) -> MachineFiles:
    """Return the files of a machine that runs. Raises MachineError when it does not."""
    files = MachineFiles.at(home.state, name)
    check_state(files, _settle(files))
    return files


def _settle(files: MachineFiles) -> MachineStatus:
    """Wait, though not for ever, for a command that moves a machine to another QEMU; return what it is then."""
    limit = Deadline.after(MOVE_S)
    now = lifetime.status(files)
    while (now.state in MOVING or _is_waking(now)) and not limit.passed:
        nobody_moves_it = is_free(files.lock)
        now = lifetime.status(files)  # whoever did may have ended since it was asked
        if nobody_moves_it:
            break
        limit.sleep(0.1)
    return now


def _is_waking(now: MachineStatus) -> bool:
    return now.state == "running" and now.ssh_port is None


def check_state(files: MachineFiles, now: MachineStatus) -> None:
    """Raise MachineError when a machine that is like this does not run."""
    if now.state == "suspended":
        lifetime.check_alive(files)
    if now.state != "running":
        raise MachineError(
            f"the machine {now.name} is not running", resolution=f"Start it with `vmbuild up --name {now.name}`."
        )


@contextmanager
def running_session(name: str, home: Home, limit_s: float = 30.0) -> Iterator[Session]:
    """Yield a session in a machine that runs already. Raises MachineError when it does not."""
    session = _connect_running(name, home, Deadline.after(limit_s))
    try:
        yield session
    finally:
        session.close()


def _connect_running(name: str, home: Home, limit: Deadline) -> Session:
    while True:
        files = running(name, home)
        looked = _resting_pid(files)
        try:
            return connect(files, limit)
        except GuestError:
            was_moved = looked is None or looked != _resting_pid(files)
            if not was_moved or limit.passed:
                raise
        limit.sleep(0.1)


def _resting_pid(files: MachineFiles) -> int | None:
    """Return the process id of a machine's QEMU; None while some command may be moving the machine to another."""
    return lifetime.find_pid(files) if is_free(files.lock) else None


def at_rest(name: str, home: Home) -> MachineFiles:
    """Return the files of a machine that is not being moved to another QEMU at this moment; see `existing`."""
    files = existing(name, home)
    _settle(files)
    return files


def existing(name: str, home: Home) -> MachineFiles:
    """Return the files of a machine that there is. Raises UsageError when there is none by this name."""
    files = MachineFiles.at(home.state, name)
    if not files.folder.exists():
        raise UsageError(
            f"there is no machine named {name}",
            resolution=f"Make it with `vmbuild up --name {name}`, or see `vmbuild list`.",
        )
    return files
