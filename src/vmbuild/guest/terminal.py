"""This terminal, or pipe, as the terminal of a program in the guest."""

from __future__ import annotations

import os
import shutil
import sys
import termios
import tty
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress

from vmbuild.guest.session import CHUNK_BYTES, Session, Sink

SHELL = ("/bin/sh", "-l")


ENTER = """
cd -- "$1" || exit 125
shift
while [ "$1" != - ]; do export "$1"; shift; done
shift
command -v "$1" >/dev/null || { echo "vmbuild: there is no program $1 in the guest" >&2; exit 127; }
exec "$@"
"""
"""Its arguments: a folder, variables up to a dash, a program and what that is told."""


def place_command(argv: Sequence[str], folder: str, variables: Sequence[str]) -> list[str]:
    """Return an argv that runs another in a folder of the guest, with variables (KEY=VALUE) set."""
    return ["sh", "-c", ENTER, "exec", folder, *variables, "-", *argv]


def attach(session: Session, argv: Sequence[str], *, interactive: bool = True, has_terminal: bool | None = None) -> int:
    """Run a program, a shell by default, on this process's standard output; return its exit code.

    `interactive` passes standard input on. `has_terminal` gives it a terminal, None: where this process has one.
    """
    is_on_one = sys.stdin.isatty() and sys.stdout.isatty()
    feed = _copy_stdin if interactive else None
    if is_on_one if has_terminal is None else has_terminal:
        size = _terminal_size()
        with _raw(sys.stdin.fileno()) if interactive and is_on_one else nullcontext():
            return session.run(argv or SHELL, feed=feed, on_stdout=_write_stdout, terminal=(size.columns, size.lines))
    return session.run(argv or SHELL, feed=feed, on_stdout=_write_stdout, on_stderr=_write_stderr)


def _terminal_size() -> os.terminal_size:
    """Return the size of the terminal itself where there is one: LINES and COLUMNS may be those of another."""
    with suppress(OSError, ValueError):
        size = os.get_terminal_size(sys.stdout.fileno())
        if size.columns and size.lines:
            return size
    return shutil.get_terminal_size()


@contextmanager
def _raw(handle: int) -> Iterator[None]:
    """Give every key to the guest, Ctrl-C included, and the terminal its manners back at the end."""
    before = termios.tcgetattr(handle)
    tty.setraw(handle)
    try:
        yield
    finally:
        termios.tcsetattr(handle, termios.TCSADRAIN, before)


def _copy_stdin(sink: Sink) -> None:
    while data := os.read(sys.stdin.fileno(), CHUNK_BYTES):
        sink.write(data)


def _write_stdout(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def _write_stderr(data: bytes) -> None:
    sys.stderr.buffer.write(data)
    sys.stderr.buffer.flush()
