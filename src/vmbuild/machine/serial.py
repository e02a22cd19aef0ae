"""The serial console: its log, and a terminal on it."""

from __future__ import annotations

import os
import re
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vmbuild.errors import MachineError
from vmbuild.machine.qmp import connect_unix

DETACH = b"\x1d"
"""Ctrl-], as telnet and virsh have it."""

CHUNK_BYTES = 64 * 1024
_CONTROL = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]|\x1b.|[\x00-\x08\x0b-\x1f\x7f]")


def read_lines(data: bytes) -> list[str]:
    """Return console output as clean lines: no colours, no cursor movements."""
    return _CONTROL.sub(b"", data.replace(b"\r", b"")).decode(errors="replace").splitlines()


def tail(log: Path, lines: int = 20) -> str:
    """Return the last lines of a console log, empty when there is none."""
    if not log.exists():
        return ""
    found = [line for line in read_lines(log.read_bytes()) if line.strip()]
    return "\n".join(found[-lines:] if lines else found)


def follow(log: Path, lines: int, wait: bool) -> Iterator[str]:
    """Yield the last lines of a console log and, with `wait`, each new one, for ever."""
    position = log.stat().st_size if log.exists() else 0
    yield from tail(log, lines).splitlines()
    rest = b""
    while wait:
        size = log.stat().st_size if log.exists() else 0
        if size < position:  # the machine was started again
            position = 0
        if size == position:
            time.sleep(0.2)
            continue
        with log.open("rb") as file:
            file.seek(position)
            rest += file.read(size - position)
        position = size
        whole, newline, rest = rest.rpartition(b"\n")
        yield from read_lines(whole + newline)


def attach_console(path: Path) -> None:
    """Connect standard input and output to the console until Ctrl-], the end of the input, or of the machine.

    Raises MachineError when nobody listens.
    """
    try:
        console = connect_unix(path)
    except OSError as error:
        raise MachineError("the serial console does not answer", details=f"{path}: {error}") from error
    with console, _raw_terminal():
        console.sendall(b"\r")  # the shell shows its prompt
        handles = [console.fileno(), sys.stdin.fileno()]
        while True:
            ready, _, _ = select.select(handles, [], [])
            if console.fileno() in ready:
                data = console.recv(CHUNK_BYTES)
                if not data:
                    return
                os.write(sys.stdout.fileno(), data)
            if sys.stdin.fileno() in ready:
                keys = os.read(sys.stdin.fileno(), CHUNK_BYTES)
                if not keys or DETACH in keys:
                    return
                console.sendall(keys)


@contextmanager
def _raw_terminal() -> Iterator[None]:
    if not sys.stdin.isatty():
        yield
        return
    print("Connected to the serial console; Ctrl-] detaches.\r", file=sys.stderr)  # noqa: T201
    before = termios.tcgetattr(sys.stdin.fileno())
    tty.setraw(sys.stdin.fileno())
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, before)
