"""What a run takes of the host: CPU time and memory of all its processes, and what others took. Linux only."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

from vmbuild.errors import HostError

INTERVAL_S = 0.5
DISTURBED = 0.1
"""The part of the host's CPU time that others may take before a run counts as disturbed."""

PROC = Path("/proc")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Sample:
    """A moment of a run: seconds since it began, CPU in use (100 is one CPU), memory in bytes."""

    at_s: float
    cpu_percent: float
    memory_bytes: int


@dataclass(frozen=True)
class Taken:
    """What a run took. `other_cpu_s` is what the host's other processes had, stolen time of a virtual host included."""

    seconds: float
    cpu_s: float
    peak_memory_bytes: int
    other_cpu_s: float
    host_cpus: int
    samples: tuple[Sample, ...]

    @property
    def is_disturbed(self) -> bool:
        """Tell whether other load took enough to doubt the run."""
        return self.other_cpu_s > DISTURBED * self.seconds * self.host_cpus


@dataclass(frozen=True)
class Process:
    """A process as proc_pid_stat(5) tells it; `cpu_s` has its own time and that of its children that have ended."""

    pid: int
    parent: int
    cpu_s: float


def list_processes(proc: Path = PROC) -> dict[int, Process]:
    """Return every process of the host."""
    found = {}
    for folder in proc.iterdir():
        if folder.name.isdigit():
            with suppress(OSError, ValueError, IndexError):
                fields = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
                ticks = sum(map(int, fields[11:15]))  # utime, stime, cutime, cstime: fields 14 to 17
                found[int(folder.name)] = Process(int(folder.name), int(fields[1]), ticks / TICKS)
    return found


def find_tree(roots: Iterable[int], processes: Mapping[int, Process]) -> set[int]:
    """Return these processes and all that they started, as far as they are there."""
    children: dict[int, list[int]] = {}
    for each in processes.values():
        children.setdefault(each.parent, []).append(each.pid)
    found: set[int] = set()
    waiting = [pid for pid in roots if pid in processes]
    while waiting:
        pid = waiting.pop()
        if pid not in found:
            found.add(pid)
            waiting += children.get(pid, ())
    return found


def own_memory_bytes(pid: int, proc: Path = PROC) -> int:
    """Return the resident memory that a process shares with no file: code that many processes run counts for none."""
    try:
        _, resident, shared, *_ = map(int, (proc / str(pid) / "statm").read_text().split())
    except (OSError, ValueError):
        return 0
    return (resident - shared) * PAGE_BYTES


def read_busy_s(proc: Path = PROC) -> float:
    """Return the CPU seconds that the host has spent since it began, on anything, or that were stolen from it."""
    try:
        words = (proc / "stat").read_text().splitlines()[0].split()
    except OSError as error:
        raise HostError("this host does not tell what runs on it", resolution="`vmbuild bench` needs Linux.") from error
    user, nice, system, _, _, irq, softirq, steal = map(int, words[1:9])
    return (user + nice + system + irq + softirq + steal) / TICKS


def wait_quiet(limit_s: float, *, share: float = DISTURBED, step_s: float = 1.0) -> bool:
    """Wait until the host is idle but for a share of its CPUs, two looks in a row; tell whether it became so."""
    end, quiet = time.monotonic() + limit_s, 0
    while quiet < 2:
        if time.monotonic() > end:
            return False
        before, since = read_busy_s(), time.monotonic()
        time.sleep(step_s)
        used = (read_busy_s() - before) / (time.monotonic() - since) / (os.cpu_count() or 1)
        quiet = quiet + 1 if used < share else 0
    return True


class Sampler:
    """Looks at a run from its beginning to its end, from a thread of its own.

    `apart` names processes that belong to the run and are not its children, such as a machine's QEMU; what they had
    used before does not count.
    """

    def __init__(self, apart: Callable[[], Iterable[int]] = tuple, *, interval_s: float = INTERVAL_S) -> None:
        self._apart = apart
        self._interval_s = interval_s
        self._roots: list[int] = []
        self._samples: list[Sample] = []
        self._stopped = Event()
        processes = list_processes()
        self._before = {pid: processes[pid].cpu_s for pid in find_tree(apart(), processes)}
        self._last = (0.0, 0.0)
        self._most_cpu_s = 0.0
        self._begun = time.monotonic()
        self._busy_s, self._reaped_s, self._own_s = read_busy_s(), _reaped_s(), time.process_time()
        self._thread = Thread(target=self._run, daemon=True)

    def start(self, pid: int) -> None:
        """Begin to look, at this process and all that it starts."""
        self._roots.append(pid)
        self._thread.start()

    def stop(self) -> Taken:
        """Look for the last time, after the run's process has been waited for, and return what it took."""
        seconds = time.monotonic() - self._begun
        self._stopped.set()
        self._thread.join()
        apart_s = self._look()
        # What was waited for is known exactly; the looks alone know what was not, such as a child of nobody.
        cpu_s = max(_reaped_s() - self._reaped_s + apart_s, self._most_cpu_s)
        others = read_busy_s() - self._busy_s - cpu_s - (time.process_time() - self._own_s)
        peak = max((each.memory_bytes for each in self._samples), default=0)
        return Taken(seconds, cpu_s, peak, max(0.0, others), os.cpu_count() or 1, tuple(self._samples))

    def _run(self) -> None:
        while not self._stopped.wait(self._interval_s):
            self._look()

    def _look(self) -> float:
        """Take a sample; return the CPU time that the processes apart have had since the beginning."""
        processes = list_processes()
        tree = find_tree(self._roots, processes)
        apart = find_tree(self._apart(), processes)
        apart_s = sum(processes[pid].cpu_s - self._before.get(pid, 0.0) for pid in apart)
        cpu_s = apart_s + sum(processes[pid].cpu_s for pid in tree - apart)
        now = time.monotonic() - self._begun
        at, before = self._last
        percent = 100 * max(0.0, cpu_s - before) / max(now - at, 0.001)
        if now - at >= self._interval_s / 2 and not self._stopped.is_set():
            self._samples.append(Sample(now, percent, sum(map(own_memory_bytes, tree | apart))))
            self._last = (now, cpu_s)
        self._most_cpu_s = max(self._most_cpu_s, cpu_s)
        return apart_s


def _reaped_s() -> float:
    """Return the CPU time of all children that have ended and been waited for, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
