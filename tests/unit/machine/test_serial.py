"""The console: its log, cleaned of what a guest may write, and a terminal on it."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pexpect
import pytest

from vmbuild.errors import MachineError
from vmbuild.machine import serial

ATTACH = "import sys; from pathlib import Path; from vmbuild.machine import serial; serial.attach_console(Path({!r}))"


class Console:
    """A console that repeats what is typed, each piece in brackets."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.typed = b""
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(path))
        self._server.listen(1)
        self.thread = threading.Thread(target=self._repeat, daemon=True)
        self.thread.start()

    def _repeat(self) -> None:
        client, _ = self._server.accept()
        with client, suppress(ConnectionError):
            while data := client.recv(4096):
                self.typed += data
                client.sendall(b"<" + data.strip() + b">")

    @property
    def argv(self) -> list[str]:
        return [sys.executable, "-c", ATTACH.format(str(self.path))]


@pytest.fixture
def console(tmp_path: Path) -> Iterator[Console]:
    yield Console(tmp_path / "console.sock")


def test_lines_are_free_of_control_sequences() -> None:
    data = b"\x1b[1;32mok\x1b[0m\r\n\x1b]0;title\x07two\x07\n\xc2\x9b31mthree\xff\x00\n\ttab"
    assert serial.read_lines(data) == ["ok", "two", "31mthree\ufffd", "\ttab"]


def test_the_tail_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "console.log"
    assert serial.tail(log) == ""
    log.write_text("".join(f"line {number}\n\n" for number in range(100)))
    assert serial.tail(log, 2) == "line 98\nline 99"


def test_the_tail_of_a_huge_log_reads_only_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serial, "TAIL_BYTES", 100)
    log = tmp_path / "console.log"
    log.write_text("".join(f"line {number}\n" for number in range(1000)))
    assert serial.tail(log, 500).splitlines()[-1] == "line 999"
    assert len(serial.tail(log, 500)) <= 100


def test_following_shows_whole_lines_as_they_come(tmp_path: Path) -> None:
    log = tmp_path / "console.log"
    log.write_text("old\n")
    lines = serial.follow(log, 1, wait=True)
    assert next(lines) == "old"
    with log.open("a", buffering=1) as file:
        file.write("new")
        writer = threading.Timer(0.3, file.write, [" line\n"])
        writer.start()
        assert next(lines) == "new line"
        writer.join()


def test_following_goes_on_when_the_machine_starts_again(tmp_path: Path) -> None:
    log = tmp_path / "console.log"
    log.write_text("a long first life\n")
    lines = serial.follow(log, 1, wait=True)
    assert next(lines) == "a long first life"
    log.unlink()
    log.write_text("second\n")
    assert next(lines) == "second"


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="console does not answer"):
        serial.attach_console(tmp_path / "console.sock")


def test_a_pipe_is_typed_and_the_answer_awaited(console: Console) -> None:
    done = subprocess.run(console.argv, input=b"uname\n", capture_output=True, check=True, timeout=20)
    assert b"uname" in done.stdout
    assert done.stderr == b""


def test_the_detach_key_leaves_the_terminal_as_it_was(console: Console) -> None:
    program = pexpect.spawn("/bin/sh", ["-c", '"$0" "$@"; stty -a', *console.argv], timeout=20)
    program.expect("<>")  # the answer to the first line end: connected, and the terminal is raw
    program.send("ls")
    program.expect("<ls>")
    program.send("x\x1dy")
    program.expect(r"[^-]icanon")
    program.expect(pexpect.EOF)
    console.thread.join(5)
    assert console.typed.strip() == b"lsx"
