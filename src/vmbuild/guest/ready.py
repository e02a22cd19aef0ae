"""The table of readiness checks: when every row passes, the guest is ready to build."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from vmbuild.deadline import Deadline
from vmbuild.errors import GuestError
from vmbuild.guest import clock
from vmbuild.guest.session import Session, WrongHostKeyError
from vmbuild.report import Reporter

PING = (
    "test -S /run/docker.sock && "
    "printf 'GET /_ping HTTP/1.0\\r\\n\\r\\n' | socat -t 10 - UNIX-CONNECT:/run/docker.sock | grep -q '^OK'"
)
"""Asks the socket, not the client: starting the emulated client costs seconds (see docs/design.md).

Docker makes it early in its start, and answers at its end: until it is there nothing else is started beside it.
"""


WAIT = 'n=10; until eval "$1"; do n=$((n - 1)); [ $n -gt 0 ] || exit 1; sleep 0.1; done'
"""Tries a probe for a second, in the guest: to ask anew over SSH takes as much of it as what is waited for does."""

RETRY_S = 0.2
"""How long is waited before another log-in is tried; less at first, as a guest that was restored is there at once."""


@dataclass(frozen=True)
class ReadyCheck:
    """One thing that must be true: in words, as a shell command in the guest, and what to look at when it is not."""

    description: str
    probe: str
    hint: str
    log: str
    may_take_time: bool = True


CHECKS = (
    ReadyCheck(
        "the guest has booted",
        "test -e /run/vmbuild/booted",
        "The boot script did not come to its end.",
        "dmesg | tail -n 20",
    ),
    ReadyCheck(
        "the guest's disk and keys are in place",
        "test ! -s /run/vmbuild/failed",
        "What failed during the boot stands above; `vmbuild destroy` makes a new disk, losing what is on this one.",
        "cat /run/vmbuild/failed",
        may_take_time=False,
    ),
    ReadyCheck(
        "Docker answers",
        PING,
        "A larger --timeout helps on a busy host; the log of Docker is in the guest: /var/log/docker.log.",
        "tail -n 20 /var/log/containerd.log /var/log/docker.log",
    ),
)


def wait_ready(
    connect: Callable[[Deadline], Session], check_alive: Callable[[], None], deadline: Deadline, report: Reporter
) -> Session:
    """Wait until SSH answers, set the clock, wait until every check passes; return the session.

    `check_alive` raises when the machine is gone. Raises GuestError with the hint of the check that failed.
    """
    report.step("Waiting for the guest")
    session = connect_when_up(connect, check_alive, deadline)
    try:
        *first, docker = CHECKS
        at_once = clock.setting_to(time.time(), then=" && ".join(check.probe for check in first))
        has_long_been_up = _succeeds(at_once, session, check_alive, deadline)
        report.step("Waiting for Docker")
        for check in () if has_long_been_up else first:
            _wait_for(check, session, check_alive, deadline)
        _wait_for(docker, session, check_alive, deadline)
    except BaseException:
        session.close()
        raise
    return session


def connect_when_up(
    connect: Callable[[Deadline], Session], check_alive: Callable[[], None], deadline: Deadline
) -> Session:
    """Return a session as soon as the guest lets us in. Raises GuestError when it does not before the deadline."""
    pause_s = RETRY_S / 20
    while True:
        check_alive()
        try:
            return connect(deadline)
        except WrongHostKeyError:
            raise
        except GuestError:
            if deadline.passed:
                raise
        deadline.sleep(pause_s)
        pause_s = min(RETRY_S, pause_s * 1.5)


def _wait_for(check: ReadyCheck, session: Session, check_alive: Callable[[], None], deadline: Deadline) -> None:
    argv = ["sh", "-c", *((WAIT, "ready") if check.may_take_time else ()), check.probe]
    while not _succeeds(argv, session, check_alive, deadline):
        check_alive()
        if deadline.passed or not check.may_take_time:
            raise GuestError(f"not ready: {check.description}: no", details=_log(session, check), resolution=check.hint)
        deadline.sleep(0.1)


def _succeeds(argv: Sequence[str], session: Session, check_alive: Callable[[], None], deadline: Deadline) -> bool:
    try:
        return session.run(argv, deadline=deadline) == 0
    except GuestError:
        check_alive()  # a machine that is gone says more than the connection that broke with it
        if deadline.passed:
            return False
        raise


def _log(session: Session, check: ReadyCheck) -> str:
    out = bytearray()
    with suppress(GuestError):
        session.run(["sh", "-c", check.log], on_stdout=out.extend, on_stderr=out.extend, deadline=Deadline.after(20))
    return out.decode(errors="replace")
