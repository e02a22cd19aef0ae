"""What the host can do in a guest: run a program, push a file, pull a file. Nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from vmbuild.deadline import NEVER, Deadline
from vmbuild.errors import GuestError

CHUNK_BYTES = 256 * 1024

Output = Callable[[bytes], None]


class WrongHostKeyError(GuestError):
    """The server on the forwarded port is not this machine's guest. Waiting will not help."""


class ConnectionLostError(GuestError):
    """The connection broke under a program. Whether the program goes on in the guest is not known from here."""


class Sink(Protocol):
    """Where bytes for a program's standard input go."""

    def write(self, data: bytes, /) -> object:
        """Take all of the bytes, waiting for the other side when it is slow."""


Tick = Callable[[], None]
"""Called again and again while a program runs, at least twice a second; ends the program by raising."""

Feed = Callable[[Sink], None]
"""Writes a program's whole standard input; runs beside the reading of its output."""


class Session(Protocol):
    """An authenticated connection to a guest."""

    def run(
        self,
        argv: Sequence[str],
        *,
        feed: Feed | None = None,
        on_stdout: Output | None = None,
        on_stderr: Output | None = None,
        terminal: tuple[int, int] | None = None,
        deadline: Deadline = NEVER,
        on_tick: Tick | None = None,
    ) -> int:
        """Run a program and return its exit code.

        Both outputs are read at the same time and passed on as they come. `terminal` is the columns and rows of a
        terminal to give it (both outputs then come on `on_stdout`). The program is ended in the guest when this is
        left by an exception, Ctrl-C included. Raises GuestError when the deadline passes, ConnectionLostError (one
        too) when the connection breaks.
        """

    def reopen(self, deadline: Deadline) -> None:
        """Connect anew after a ConnectionLostError. Raises GuestError when the guest does not let us in."""

    def close(self) -> None:
        """End the connection. Twice is harmless."""


def send(data: bytes) -> Feed:
    """Return a feed of these bytes."""

    def feed(sink: Sink) -> None:
        sink.write(data)

    return feed


def capture(session: Session, argv: Sequence[str], *, feed: Feed | None = None, deadline: Deadline = NEVER) -> str:
    """Run a program in the guest and return its standard output. Raises GuestError when it fails."""
    out, err = bytearray(), bytearray()
    code = session.run(argv, feed=feed, on_stdout=out.extend, on_stderr=err.extend, deadline=deadline)
    if code != 0:
        raise GuestError(
            f"{argv[0]} failed in the guest with exit code {code}",
            details=f"$ {' '.join(argv)}\n{(out + err).decode(errors='replace').strip()}",
        )
    return out.decode(errors="replace")
