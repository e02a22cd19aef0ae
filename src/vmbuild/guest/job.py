"""A program in the guest that outlives the connection over which it was started. The other side is usr/lib/vmbuild/job.

A job has a folder, which keeps all that it writes and the exit code that it ended with.
"""

from __future__ import annotations

from collections.abc import Sequence

from vmbuild.deadline import Deadline
from vmbuild.guest.session import Feed, Output, Session, Tick, capture

PROGRAM = "/usr/lib/vmbuild/job"
START_S = 60.0
STOP_S = 60.0
"""Longer than the three signals take that it sends, by its own limits."""


def start(
    session: Session,
    folder: str,
    argv: Sequence[str],
    terminal: tuple[int, int] | None,
    *,
    before: Sequence[str] = (),
    feed: Feed | None = None,
) -> None:
    """Start a program in a folder, on a terminal of so many columns and rows if there are. Raises GuestError.

    `before` are words of a program that becomes the one that starts it, when it has read what is fed.
    """
    columns, rows = terminal or (0, 0)
    words = [*before, PROGRAM, "start", folder, str(columns), str(rows), *argv]
    capture(session, words, feed=feed, deadline=Deadline.after(START_S))


def follow(session: Session, folder: str, offset: int, output: Output, on_tick: Tick) -> int:
    """Pass on what a job writes, from a byte of its output on, until it ends; return its exit code.

    Leaves the job alone however this ends. Raises GuestError, as ConnectionLostError when it may be followed anew.
    """
    argv = [PROGRAM, "follow", folder, str(offset)]
    return session.run(argv, on_stdout=output, on_stderr=output, on_tick=on_tick)


def stop(session: Session, folder: str) -> None:
    """End a job: ask, terminate, kill, each with a limit. Harmless when it has ended. Raises GuestError."""
    session.run([PROGRAM, "stop", folder], deadline=Deadline.after(STOP_S))


def exists(session: Session, folder: str) -> bool:
    """Tell whether the guest still has a job's folder. Raises GuestError."""
    return session.run(["test", "-e", f"{folder}/log"], deadline=Deadline.after(START_S)) == 0
