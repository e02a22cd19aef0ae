"""One at a time: a lock that processes share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from vmbuild.report import Reporter
from vmbuild.whole import writing_in


@contextmanager
def hold(path: Path, report: Reporter, work: str) -> Iterator[None]:
    """Hold a lock file, saying so when another vmbuild has it; `work` is what that one does.

    Raises HostError where the file cannot be made.
    """
    lock = FileLock(path)
    with writing_in(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            lock.acquire(blocking=False)
        except TimeoutError:
            report.step(f"Waiting for another vmbuild that {work}")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def attempt(path: Path) -> Iterator[bool]:
    """Hold a lock file if nobody else does; yield whether it is held now. Raises HostError."""
    lock = FileLock(path)
    with writing_in(path.parent), suppress(TimeoutError):
        lock.acquire(blocking=False)
    try:
        yield lock.is_locked
    finally:
        lock.release()


def is_free(path: Path) -> bool:
    """Tell whether nobody holds a lock file at this moment."""
    with attempt(path) as is_held:
        return is_held
