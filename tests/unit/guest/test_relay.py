"""Connections to a socket of the host, each carried by a program in the guest: here over a real SSH server."""

from __future__ import annotations

import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.guest.server import serve
from vmbuild.deadline import Deadline
from vmbuild.guest import forward, relay
from vmbuild.guest.ssh import SshSession
from vmbuild.model import MIB

relay_argv = relay.CARRY


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A socket that is carried to `cat` in the guest."""
    monkeypatch.setattr(relay, "CARRY", ("cat",))
    monkeypatch.setattr(relay, "LOOK_EVERY_S", 0.05)
    wanted = threading.Event()
    wanted.set()
    with serve(tmp_path) as guest:
        session = SshSession.connect(guest.endpoint, Deadline.after(20))
        path = tmp_path / "docker.sock"
        thread = threading.Thread(target=relay.serve, args=(session, path, wanted.is_set))
        thread.start()
        limit = Deadline.after(10)
        while not path.exists() and not limit.passed:
            limit.sleep(0.01)
        yield path
        wanted.clear()
        thread.join(10)
        assert not thread.is_alive()
        session.close()


def open_client(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(20)
    client.connect(str(path))
    return client


def read_all(client: socket.socket) -> bytes:
    heard = bytearray()
    while data := client.recv(65536):
        heard += data
    return bytes(heard)


def test_only_this_user_can_open_it(path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_ISSOCK(path.stat().st_mode)


def test_who_has_said_all_still_hears_the_answer(path: Path) -> None:
    with open_client(path) as client:
        client.sendall(b"ping")
        assert client.recv(4) == b"ping"
        client.sendall(b" and the end")
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == b" and the end"


def test_many_at_once_do_not_mix(path: Path) -> None:
    words = [os.urandom(MIB) for _ in range(4)]
    heard: dict[int, bytes] = {}

    def say(client: socket.socket, number: int) -> None:
        client.sendall(words[number])
        client.shutdown(socket.SHUT_WR)

    def talk(number: int) -> None:
        with open_client(path) as client:
            sender = threading.Thread(target=say, args=(client, number))
            sender.start()
            heard[number] = read_all(client)
            sender.join()

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [heard[number] for number in range(4)] == words


def test_one_that_leaves_costs_the_others_nothing(path: Path) -> None:
    with open_client(path) as first:
        first.sendall(b"x" * 1000)
    with open_client(path) as client:
        client.sendall(b"still")
        assert client.recv(5) == b"still"


@pytest.mark.parametrize("is_patient", [True, False])
def test_who_hears_the_end_need_not_say_all(path: Path, monkeypatch: pytest.MonkeyPatch, is_patient: bool) -> None:
    """As Docker's clients do: one waits for the end of an answer, the other for one after its own end."""
    docker = path.with_name("guest.sock")
    monkeypatch.setattr(relay, "CARRY", (*relay_argv[:-1], str(docker)))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(docker))
        listener.listen()

        def answer() -> None:
            served, _ = listener.accept()
            with served:
                asked = read_all(served) if is_patient else served.recv(100)
                served.sendall(b"heard " + asked)

        thread = threading.Thread(target=answer)
        thread.start()
        with open_client(path) as client:
            client.sendall(b"ping")
            if is_patient:
                client.shutdown(socket.SHUT_WR)
            assert read_all(client) == b"heard ping"
        thread.join(10)


def test_a_docker_that_is_not_there_ends_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "CARRY", (*relay_argv[:-1], "/nothing"))
    with open_client(path) as client:
        assert read_all(client) == b""


def test_a_program_that_ends_ends_its_connection(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "CARRY", ("echo", "over"))
    with open_client(path) as client:
        assert read_all(client) == b"over\n"


@pytest.mark.parametrize(
    ("answer", "is_docker"),
    [
        (b"HTTP/1.0 200 OK\r\n\r\nOK", True),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nOK", True),
        (b"HTTP/1.0 500 Internal Server Error\r\n\r\nno", False),
        (b"", False),
        (b"SSH-2.0-OK", False),
    ],
)
def test_a_ping_is_answered_by_docker_alone(tmp_path: Path, answer: bytes, is_docker: bool) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def reply() -> None:
            client, _ = listener.accept()
            with client:
                client.recv(100)
                client.sendall(answer)

        thread = threading.Thread(target=reply)
        thread.start()
        assert forward.answers(path, Deadline.after(5)) is is_docker
        thread.join(5)


def test_nobody_there_is_no_answer(tmp_path: Path) -> None:
    assert not forward.answers(tmp_path / "nothing", Deadline.after(1))
