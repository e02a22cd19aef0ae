"""This terminal, or pipe, as the terminal of a program in the guest."""

from __future__ import annotations

import os
import shutil
import sys
import termios
import tty
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from vmbuild.guest.session import CHUNK_BYTES, Session, Sink

SHELL = ("/bin/sh", "-l")


def attach(session: Session, argv: Sequence[str]) -> int:
    """Run a program, a shell by default, on this process's standard input and output; return its exit code."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        with _raw(sys.stdin.fileno()):
            size = shutil.get_terminal_size()
            return session.run(
                argv or SHELL, feed=_copy_stdin, on_stdout=_write_stdout, terminal=(size.columns, size.lines)
            )
    return session.run(argv or SHELL, feed=_copy_stdin, on_stdout=_write_stdout, on_stderr=_write_stderr)


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
