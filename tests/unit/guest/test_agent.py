"""An SSH agent in the guest that the host answers for: the guest's own script, run here on this host's perl."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.unit.guest.fakes import FakeSession
from vmbuild.errors import GuestError
from vmbuild.guest import agent
from vmbuild.guest.session import ConnectionLostError

SCRIPT = Path(__file__).parents[3] / "images/guest/root/usr/lib/vmbuild/agent"
pytestmark = pytest.mark.skipif(shutil.which("perl") is None, reason="needs perl, as the guest has it")


class Live(FakeSession):
    """Runs the guest's script here, input and output at the same time, as SSH does; can lose its connection."""

    def __init__(self) -> None:
        super().__init__()
        self.program: subprocess.Popen[bytes] | None = None
        self.is_lost = False

    def run(self, argv: Sequence[str], **options: Any) -> int:
        if self.is_lost:
            raise ConnectionLostError("the connection to the guest broke")
        pipe = subprocess.PIPE
        with subprocess.Popen(["perl", str(SCRIPT), *argv[1:]], stdin=pipe, stdout=pipe, bufsize=0) as program:
            self.program = program
            assert program.stdin is not None
            assert program.stdout is not None
            feeder = threading.Thread(target=self._feed, args=(options["feed"], program.stdin), daemon=True)
            feeder.start()
            while data := program.stdout.read(7):
                options["on_stdout"](data)
        if self.is_lost:
            raise ConnectionLostError("the connection to the guest broke")
        return program.returncode

    def _feed(self, feed: Any, stdin: Any) -> None:
        feed(stdin)
        stdin.close()

    def lose(self) -> None:
        self.is_lost = True
        assert self.program is not None
        self.program.kill()


def message(*data: bytes) -> bytes:
    return b"".join(len(each).to_bytes(4) + each for each in data)


def exchange(path: str, *requests: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(path)
        client.sendall(message(*requests))
        heard = b""
        for _ in requests:
            size = int.from_bytes(client.recv(4, socket.MSG_WAITALL))
            heard += client.recv(size, socket.MSG_WAITALL) + b"|"
        return heard


def echo(request: bytes) -> bytes:
    return b"<" + request + b">"


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "new" / "folder" / "agent.0")


def test_requests_are_answered_by_the_host(path: str) -> None:
    large = b"\x0d" + bytes(200_000)
    with agent.lent(Live(), path, echo):
        assert exchange(path, b"\x0b", b"\x0dsign") == b"<\x0b>|<\x0dsign>|"
        assert exchange(path, large) == b"<" + large + b">|"
    assert Path(path).parent.stat().st_mode & 0o777 == 0o700
    with pytest.raises(ConnectionRefusedError):
        exchange(path, b"\x0b")


def test_several_clients_at_once_each_get_their_own_answers(path: str) -> None:
    heard: dict[int, bytes] = {}

    def client(number: int) -> None:
        heard[number] = exchange(path, *([b"\x0b%d" % number] * 20))

    with agent.lent(Live(), path, echo):
        threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert heard == {number: b"<\x0b%d>|" % number * 20 for number in range(8)}


@pytest.mark.parametrize("request_", [b"\x11add", b"\x13", b"\x16lock", b"\x1bextension", b"\x01"])
def test_what_would_change_the_agent_does_not_reach_it(path: str, request_: bytes) -> None:
    def ask(request: bytes) -> bytes:
        raise AssertionError(request)

    with agent.lent(Live(), path, ask):
        assert exchange(path, request_) == agent.FAILURE + b"|"


@pytest.mark.parametrize("bytes_", [b"\0\0\0\0", b"\xff\xff\xff\xff", (300_000).to_bytes(4)])
def test_who_makes_no_sense_is_hung_up_on_and_the_others_are_served(path: str, bytes_: bytes) -> None:
    with agent.lent(Live(), path, echo):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            client.sendall(bytes_)
            client.settimeout(20)
            assert client.recv(1) == b""
        assert exchange(path, b"\x0b") == b"<\x0b>|"


def test_it_listens_again_after_the_connection_was_lost(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "AGAIN_S", 0.05)
    session = Live()
    with agent.lent(session, path, echo):
        session.lose()
        time.sleep(0.3)
        session.is_lost = False
        end = time.monotonic() + 20
        while True:
            try:
                assert exchange(path, b"\x0b") == b"<\x0b>|"
                break
            except OSError:
                assert time.monotonic() < end
                time.sleep(0.05)


def test_a_guest_without_it_is_told(path: str) -> None:
    class Old(FakeSession):
        def run(self, argv: Sequence[str], **options: Any) -> int:
            options["on_stderr"](b"sh: agent: not found")
            return 127

    with pytest.raises(GuestError) as caught, agent.lent(Old(), path, echo):
        raise AssertionError("it was lent")
    assert "not found" in caught.value.details
    assert "vmbuild down" in caught.value.resolution


def test_a_guest_that_sends_endless_requests_is_refused() -> None:
    link = agent._Link(echo, threading.Event())
    with pytest.raises(GuestError, match="something of"):
        link.take(b"\x7f\xff\xff\xff")
