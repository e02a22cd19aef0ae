"""Log in on a guest's serial console, as a person would."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from vmbuild.deadline import Deadline
from vmbuild.errors import MachineError
from vmbuild.machine import serial
from vmbuild.machine.qmp import connect_unix
from vmbuild.model import ConsoleLogin

if TYPE_CHECKING:
    import pexpect.fdpexpect

CONNECT_S = 5.0
NUDGE_S = 10.0
"""After so long without a prompt Enter is pressed: what was shown before we listened is gone."""

ANSWER_S = 120.0
"""How long a guest may take from a name to a password prompt, and from that to a shell, under emulation."""


def run_on_console(console: Path, login: ConsoleLogin, command: str, deadline: Deadline) -> None:
    """Log in on the console and type a command, whose end is not waited for.

    Raises MachineError when no prompt comes before the deadline, or the guest does not let us in.
    """
    import pexpect  # two of a thousand commands need it
    import pexpect.fdpexpect

    with connect_unix(console, Deadline.after(CONNECT_S)) as socket:
        terminal: pexpect.fdpexpect.fdspawn[bytes] = pexpect.fdpexpect.fdspawn(socket.fileno(), timeout=NUDGE_S)
        try:
            _wait_for_login(terminal, login, deadline)
            terminal.send(f"{login.user}\r")
            limit = min(ANSWER_S, deadline.remaining_s(ANSWER_S))
            if terminal.expect([_pattern(login.password_prompt), _pattern(login.shell_prompt)], timeout=limit) == 0:
                terminal.send(f"{login.password}\r")
                if terminal.expect([_pattern(login.shell_prompt), rb"(?i)login incorrect"], timeout=limit) == 1:
                    raise MachineError(f"the guest does not let {login.user} in on its serial console")
            terminal.send(f"{command}\r")
            terminal.expect(_echo_of(command), timeout=limit)  # what is not read yet would be lost with the connection
        except (pexpect.TIMEOUT, pexpect.EOF) as error:
            words = serial.read_lines(terminal.before if isinstance(terminal.before, bytes) else b"")
            raise MachineError("nobody could log in on the serial console", details="\n".join(words[-20:])) from error


def _wait_for_login(terminal: pexpect.fdpexpect.fdspawn[bytes], login: ConsoleLogin, deadline: Deadline) -> None:
    import pexpect

    while terminal.expect([_pattern(login.login_prompt), pexpect.TIMEOUT]) == 1:
        if deadline.passed:
            raise MachineError("no log-in prompt came on the serial console")
        terminal.send("\r")


def _echo_of(command: str) -> re.Pattern[bytes]:
    """Return what the end of a command looks like on the terminal, which may have folded its line anywhere."""
    return re.compile(rb"\s*".join(re.escape(letter.encode()) for letter in command[-12:] if letter != " "))


def _pattern(text: str) -> re.Pattern[bytes]:
    return re.compile(text.encode())
