"""The serial console: its log, and a terminal on it."""

from __future__ import annotations

import os
import re
import select
import socket
import sys
import termios
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vmbuild.deadline import Deadline
from vmbuild.errors import MachineError
from vmbuild.machine.qmp import Qmp, connect_unix

DETACH = b"\x1d"
"""Ctrl-], as telnet and virsh have it."""

CONNECT_S = 5.0
QUIET_S = 3.0
"""How long the console must be silent after the end of piped input: an answer may still come."""

CHUNK_BYTES = 64 * 1024
TAIL_BYTES = 1024 * 1024
"""A guest may write without end; its last lines are in the last mebibyte."""

_CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b\n]*(\x07|\x1b\\)|\x1b.|[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""CSI and OSC sequences and control characters, C1 included: what an untrusted guest could do to a terminal."""


def read_lines(data: bytes) -> list[str]:
    """Return console output as clean lines: no colours, no cursor movements."""
    return _CONTROL.sub("", data.decode(errors="replace")).splitlines()


def tail(log: Path, lines: int = 20) -> str:
    """Return the last lines of a console log, empty when there is none."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        if lines:
            file.seek(max(0, log.stat().st_size - TAIL_BYTES))
        found = [line for line in read_lines(file.read()) if line.strip()]
    return "\n".join(found[-lines:] if lines else found)


def follow(log: Path, lines: int, wait: bool) -> Iterator[str]:
    """Yield the last lines of a console log and, with `wait`, each new one, for ever."""
    position = log.stat().st_size if log.exists() else 0
    yield from tail(log, lines).splitlines()
    rest = b""
    while wait:
        size = log.stat().st_size if log.exists() else 0
        if size < position:  # the machine was started again
            position, rest = 0, b""
        if size == position:
            time.sleep(0.2)
            continue
        with log.open("rb") as file:
            file.seek(position)
            rest += file.read(size - position)
        position = size
        whole, newline, rest = rest.rpartition(b"\n")
        yield from read_lines(whole + newline)


def is_attached(qmp: Qmp) -> bool:
    """Tell whether somebody has connected to the console. Source: QEMU, qapi/char.json, ChardevInfo."""
    found = {each["label"]: each["filename"] for each in qmp.execute("query-chardev")}
    return not found.get("console", "disconnected:").startswith("disconnected:")


def attach_console(path: Path) -> None:
    """Connect standard input and output to the console until Ctrl-], the end of the input, or of the machine.

    Raises MachineError when nobody listens.
    """
    try:
        console = connect_unix(path, Deadline.after(CONNECT_S))
    except OSError as error:
        raise MachineError("the serial console does not answer", details=f"{path}: {error}") from error
    with console, _raw_terminal():
        console.sendall(b"\r")  # the shell shows its prompt
        _bridge(console)


def _bridge(console: socket.socket) -> None:
    """Carry bytes both ways until one side ends; after the end of the input, until the console falls silent."""
    typing = True
    while True:
        handles = [console, sys.stdin] if typing else [console]
        ready, _, _ = select.select(handles, [], [], None if typing else QUIET_S)
        if console in ready:
            data = console.recv(CHUNK_BYTES)
            if not data:
                return
            os.write(sys.stdout.fileno(), data)
        if sys.stdin in ready:
            keys, detach, _ = os.read(sys.stdin.fileno(), CHUNK_BYTES).partition(DETACH)
            console.sendall(keys)
            if detach:
                return
            typing = bool(keys)
        if not ready:
            return


@contextmanager
def _raw_terminal() -> Iterator[None]:
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin.fileno())
    tty.setraw(sys.stdin.fileno())
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, before)
