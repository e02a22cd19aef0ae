"""Whether the guest's kernel killed a process for want of memory: the usual end of `make -j` on a small machine."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vmbuild.deadline import Deadline
from vmbuild.guest.session import Session, capture
from vmbuild.model import KIB, MIB

ANSWER_S = 20.0

# The line of the kernel's mm/oom_kill.c, __oom_kill_process(), in dmesg's form. "Memory cgroup out of memory" is a
# limit that the build set itself, no want of the machine's.
_KILLED = re.compile(
    r"^\[\s*(?P<at>[\d.]+)\] Out of memory: Killed process \d+ \((?P<name>.*)\) total-vm:.*anon-rss:(?P<rss>\d+)kB",
    re.M,
)


@dataclass(frozen=True)
class Victim:
    """A process that was killed for want of memory, and the memory that it had then."""

    process: str
    memory_mib: int


def read_clock(session: Session) -> float:
    """Return the seconds since the guest's boot, as its kernel's log counts them. Raises GuestError."""
    return float(capture(session, ["cut", "-d", " ", "-f", "1", "/proc/uptime"], deadline=Deadline.after(ANSWER_S)))


def find_victims(session: Session, since_s: float) -> list[Victim]:
    """Return the processes that were killed since then, the oldest first. Raises GuestError."""
    log = capture(session, ["dmesg"], deadline=Deadline.after(ANSWER_S))
    found = (match for match in _KILLED.finditer(log) if float(match["at"]) >= since_s)
    return [Victim(match["name"], int(match["rss"]) * KIB // MIB) for match in found]
