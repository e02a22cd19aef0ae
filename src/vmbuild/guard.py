"""What a build may cost: the time until it must be suspended, and how long it may stand still."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vmbuild import process
from vmbuild.errors import HostError, StalledError, TimeIsUp
from vmbuild.follow import Watch
from vmbuild.machine import bundle, lifetime
from vmbuild.machine.files import MachineFiles

LOOK_EVERY_S = 2.0

IDLE = 0.15
"""Of one CPU: a build that only waits uses half of that, for the progress that BuildKit shows."""

CAUTION = 2.0
"""How much longer than measured suspending may take: other work may come to the host, and the guest may grow."""


@dataclass(frozen=True)
class Limits:
    """What a build may cost; None: as much as it likes.

    `ends_at` is on the monotonic clock: until then the machine must be suspended, in its folder or as a bundle in
    `suspend_to`, `with_secrets` where it may hold a build's. `reserve_s` is kept for that beyond what is measured.
    """

    ends_at: float | None = None
    reserve_s: float = 60.0
    suspend_to: Path | None = None
    with_secrets: bool = False
    stall_timeout_s: float | None = None


class Guard(Watch):
    """Ends the following of a build when its time is up or nothing happens in it any more."""

    def __init__(self, limits: Limits, files: MachineFiles, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._files = files
        self._clock = clock
        self._next_look = 0.0
        self._rate: float | None = None
        self._heard_at = clock()
        self._used: deque[tuple[float, float]] = deque()

    def heard(self) -> None:
        """Take notice that the build wrote something."""
        self._heard_at = self._clock()

    def tick(self) -> None:
        """Look, but not too often. Raises TimeIsUp or StalledError."""
        now = self._clock()
        if now < self._next_look:
            return
        self._next_look = now + LOOK_EVERY_S
        pid = lifetime.find_pid(self._files)
        if pid is None:
            return  # who follows the build will find out, and say it
        if self._limits.stall_timeout_s is not None:
            self._look_for_stall(pid, now, self._limits.stall_timeout_s)
        if self._limits.ends_at is not None and self._next_look + self._needed_s(pid) >= self._limits.ends_at:
            raise TimeIsUp  # the next look would be too late

    def _look_for_stall(self, pid: int, now: float, timeout_s: float) -> None:
        used = process.cpu_seconds(pid)
        if used is None:
            return
        self._used.append((now, used))
        while len(self._used) > 1 and self._used[1][0] <= now - timeout_s:
            self._used.popleft()
        since, before = self._used[0]
        if now - max(self._heard_at, since) >= timeout_s and used - before < IDLE * (now - since):
            raise StalledError(
                f"the build has said nothing and done nothing for {timeout_s:.0f} s",
                resolution="`--stall-timeout` sets how long it may, `off` for as long as it likes.",
            )

    def _needed_s(self, pid: int) -> float:
        """Return the seconds that suspending takes: to write the memory, and to pack it with the disk."""
        memory = process.rss_bytes(pid) or 0
        amount = memory
        if self._limits.suspend_to is not None:
            amount += memory + bundle.data_bytes(self._files.disk)
        return self._limits.reserve_s + CAUTION * amount / self._packing_rate()

    def _packing_rate(self) -> float:
        """Return the bytes a second that packing makes here, measured once, with some of this very disk."""
        if self._rate is None:
            into = self._limits.suspend_to.parent if self._limits.suspend_to else self._files.folder
            try:
                self._rate = bundle.packing_rate(self._files.disk, into)
            except HostError:  # no reason to end a build that may be done in time
                self._rate = float("inf")
        return self._rate
