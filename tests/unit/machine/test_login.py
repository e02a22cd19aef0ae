"""Logging in on a serial console, against a guest of sockets and threads."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.unit.machine.conftest import soon
from vmbuild.deadline import Deadline
from vmbuild.errors import MachineError
from vmbuild.machine import login
from vmbuild.model import ConsoleLogin

LOGIN = ConsoleLogin(r"login: ", "root", r"[Pp]assword: ", "secret", r"[#$] ")
COMMAND = "echo one; sh /run/vmbuild-first/provision"


class Terminal:
    """The guest's side: says things, and hears lines."""

    def __init__(self, client: socket.socket) -> None:
        self._client = client
        self._file = client.makefile("rb")
        self.heard: list[str] = []

    def say(self, text: str) -> None:
        self._client.sendall(text.encode())

    def hear(self) -> str:
        line = b""
        while not line.endswith(b"\r"):
            byte = self._file.read(1)
            if not byte:
                return ""
            line += byte
        self.heard.append(line.decode().rstrip("\r"))
        return self.heard[-1]


@contextmanager
def console(path: Path, play: Callable[[Terminal], None]) -> Iterator[list[Terminal]]:
    """Listen at a path; who connects gets the play."""
    met: list[Terminal] = []
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen(1)

    def serve() -> None:
        client, _ = server.accept()
        with client, suppress(OSError):
            met.append(Terminal(client))
            play(met[0])

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield met
    thread.join(5)
    server.close()


def let_in(terminal: Terminal) -> None:
    terminal.say("\x1b[0m\r\nDebian GNU/Linux 13 cloud ttyAMA0\r\n\r\ncloud login: ")
    terminal.hear()
    terminal.say("root\r\nPassword: ")
    terminal.hear()
    terminal.say("\r\nroot@cloud:~# ")
    terminal.say(terminal.hear())


def run(path: Path, limit: Deadline | None = None) -> None:
    login.run_on_console(path, LOGIN, COMMAND, limit or soon())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "console.sock"


def test_name_password_and_command_are_typed_each_at_its_prompt(path: Path) -> None:
    with console(path, let_in) as met:
        run(path)
    assert met[0].heard == ["root", "secret", COMMAND]


def test_enter_is_pressed_when_the_prompt_came_before_we_listened(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(login, "NUDGE_S", 0.1)

    def play(terminal: Terminal) -> None:
        assert terminal.hear() == ""
        let_in(terminal)

    with console(path, play) as met:
        run(path)
    assert [line for line in met[0].heard if line] == ["root", "secret", COMMAND]


def test_no_password_is_typed_where_none_is_asked(path: Path) -> None:
    def play(terminal: Terminal) -> None:
        terminal.say("localhost login: ")
        terminal.hear()
        terminal.say("root\r\nWelcome to Alpine!\r\nlocalhost:~# ")
        terminal.say(terminal.hear())

    with console(path, play) as met:
        run(path)
    assert met[0].heard == ["root", COMMAND]


def test_an_echo_that_the_terminal_folded_is_an_echo(path: Path) -> None:
    def play(terminal: Terminal) -> None:
        terminal.say("login: ")
        terminal.hear()
        terminal.say("# ")
        typed = terminal.hear()
        terminal.say(f"{typed[:-4]} \r\n{typed[-4:]}")

    with console(path, play):
        run(path)


def test_a_wrong_password_is_told(path: Path) -> None:
    def play(terminal: Terminal) -> None:
        terminal.say("login: ")
        terminal.hear()
        terminal.say("Password: ")
        terminal.hear()
        terminal.say("\r\n\r\nLogin incorrect\r\ncloud login: ")
        terminal.hear()

    with console(path, play), pytest.raises(MachineError, match="does not let root in"):
        run(path)


def test_a_console_without_a_prompt_is_not_waited_for_for_ever(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(login, "NUDGE_S", 0.1)

    def play(terminal: Terminal) -> None:
        while terminal.hear() == "":
            terminal.say("[    0.1] booting\r\n")

    with console(path, play), pytest.raises(MachineError, match="no log-in prompt"):
        run(path, Deadline.after(0.4))


def test_a_guest_that_goes_away_is_told_with_its_last_words(path: Path) -> None:
    def play(terminal: Terminal) -> None:
        terminal.say("login: ")
        terminal.hear()
        terminal.say("Kernel panic\r\n")

    with console(path, play), pytest.raises(MachineError, match="nobody could log in") as failed:
        run(path)
    assert "Kernel panic" in failed.value.details


def test_the_password_is_not_in_the_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(login, "ANSWER_S", 0.2)

    def play(terminal: Terminal) -> None:
        terminal.say("login: ")
        terminal.hear()
        terminal.say("Password: ")
        terminal.hear()
        terminal.hear()

    with console(path, play), pytest.raises(MachineError) as failed:
        run(path)
    assert not re.search(LOGIN.password, f"{failed.value} {failed.value.details}")
