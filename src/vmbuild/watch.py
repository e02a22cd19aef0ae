"""The recipe of a live view: what the running machines do, again and again, nobody's silence holding up the rest."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from threading import Thread
from typing import Generic, TypeVar

from vmbuild import process
from vmbuild.deadline import Deadline
from vmbuild.errors import VmbuildError
from vmbuild.guest.resources import Usage, read_usage
from vmbuild.guest.session import Session
from vmbuild.machine import lifetime
from vmbuild.machine.files import MachineFiles
from vmbuild.model import Home, MachineStatus
from vmbuild.reach import connect, existing

T = TypeVar("T")

SETTLE_S = 1.0
"""What lies between the log-ins, which are work of their own, and the first round."""

LOG_IN_S = 20.0
"""How long a busy guest may take to let us in; nobody waits for it."""

PATIENCE_S = 5.0
"""The longest that a round waits for answers."""

PATIENCE = 0.5
"""The part of the time between two rounds that is spent on waiting for answers, if it comes to that."""

STALE_S = 15.0
"""An answer that is older is none. A QEMU that stands still needs ten seconds to be found so (`lifetime.ANSWER_S`)."""


@dataclass(frozen=True)
class Reading:
    """What one machine does now; `guest` is None when it does not answer.

    Until its QEMU has answered, the machine's state is `silent`, and only what the host knows of it is told.
    `uptime_s` is QEMU's, `cpu_percent` its CPU use on the host since the round before: 100 is one core.
    """

    machine: MachineStatus
    uptime_s: float | None
    cpu_percent: float | None
    guest: Usage | None


@dataclass(frozen=True)
class Round:
    """What the running machines did at one moment, in POSIX seconds."""

    at: float
    machines: tuple[Reading, ...]


def watch(name: str | None, home: Home, delay_s: float) -> Generator[Round, None, None]:
    """Yield what every running machine does, or the one of this name, now and whenever `delay_s` have passed.

    Raises UsageError when there is none by this name, MachineError when it does not run.
    """
    if name is not None:
        lifetime.check_alive(existing(name, home))
    watched: dict[str, _Watched] = {}
    try:
        _look(watched, name, home, PATIENCE_S)  # logs in, and begins to count CPU time
        pause = Deadline.after(min(delay_s, SETTLE_S))
        while True:
            pause.sleep(delay_s)
            pause = Deadline.after(delay_s)
            yield _look(watched, name, home, min(delay_s * PATIENCE, PATIENCE_S))
    finally:
        for each in watched.values():
            each.close()


def _look(watched: dict[str, _Watched], name: str | None, home: Home, patience_s: float) -> Round:
    """Ask everybody at once, wait for the answers as long as patience lasts, and tell them in the order of names."""
    found = {files.name: files for files in lifetime.find_machines(home.state) if name in (None, files.name)}
    pids = {key: lifetime.find_pid(files) for key, files in found.items()}
    running = {key: pid for key, pid in pids.items() if pid is not None}
    for gone in watched.keys() - running.keys():
        watched.pop(gone).close()
    for key in running:
        watched.setdefault(key, _Watched(found[key])).ask_qemu()
    limit = Deadline.after(patience_s)
    for key in running:
        watched[key].ask_guest(limit)
    readings = [watched[key].read(pid, limit) for key, pid in running.items()]
    return Round(time.time(), tuple(each for each in readings if each.machine.state != "stopped"))


class Latest(Generic[T]):
    """The latest answer to a question that is asked beside who waits for it, once at a time; None when it failed."""

    def __init__(self, question: Callable[[], T]) -> None:
        self._question = question
        self._thread: Thread | None = None
        self._answer: tuple[float, T | None] = (0.0, None)

    def ask(self) -> None:
        """Ask, unless the last time is not answered yet."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = Thread(target=self._run, daemon=True)  # who hangs must not keep the program from ending
            self._thread.start()

    def get(self, limit: Deadline) -> T | None:
        """Return the answer, waiting for it no longer than the limit; an older one where it is not too old."""
        if self._thread is not None:
            self._thread.join(limit.remaining_s())
        at, answer = self._answer
        return answer if time.monotonic() - at < STALE_S else None

    def _run(self) -> None:
        try:
            answer = self._question()
        except (VmbuildError, OSError):  # silent, or destroyed while it was asked
            self._answer = (time.monotonic(), None)
        else:
            self._answer = (time.monotonic(), answer)


class _Watched:
    """One machine in view, and the one connection to its guest: each log-in would cost it CPU time."""

    def __init__(self, files: MachineFiles) -> None:
        self._files = files
        self._session: Session | None = None
        self._cpu: tuple[int, float, float] | None = None
        self._status = Latest(lambda: lifetime.status(files))
        self._guest = Latest(self._read_usage)

    def ask_qemu(self) -> None:
        """Ask the machine what it is now."""
        self._status.ask()

    def ask_guest(self, limit: Deadline) -> None:
        """Ask the guest how it does, if it runs: one that is paused would not even let us in."""
        now = self._status.get(limit)
        if now is not None and now.state == "running":
            self._guest.ask()

    def read(self, pid: int, limit: Deadline) -> Reading:
        """Return what the machine does now, as far as the answers have come."""
        now = self._status.get(limit) or self._seen_from_outside(pid)
        uptime_s = time.time() - now.started_at if now.started_at is not None else None
        guest = self._guest.get(limit) if now.state == "running" else None
        return Reading(now, uptime_s, self._cpu_percent(pid), guest)

    def close(self) -> None:
        """End the connection to the guest."""
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def _seen_from_outside(self, pid: int) -> MachineStatus:
        rss_bytes = process.rss_bytes(pid)
        return MachineStatus(self._files.name, "silent", pid=pid, rss_bytes=rss_bytes, folder=self._files.folder)

    def _read_usage(self) -> Usage:
        try:
            self._session = self._session or connect(self._files, Deadline.after(LOG_IN_S))
            return read_usage(self._session)
        except BaseException:
            self.close()  # the next time over a new one
            raise

    def _cpu_percent(self, pid: int) -> float | None:
        seconds = process.cpu_seconds(pid)
        before, self._cpu = self._cpu, (pid, time.monotonic(), seconds) if seconds is not None else None
        if before is None or self._cpu is None or before[0] != self._cpu[0]:  # another QEMU began at zero again
            return None
        return 100 * (self._cpu[2] - before[2]) / max(self._cpu[1] - before[1], 0.001)
