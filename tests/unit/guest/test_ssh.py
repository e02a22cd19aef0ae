"""The session, against a real SSH server."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.guest.server import Guest, serve
from vmbuild.deadline import Deadline
from vmbuild.errors import GuestError, HostError
from vmbuild.guest import ssh
from vmbuild.guest.session import Sink, WrongHostKeyError, capture, send
from vmbuild.guest.ssh import SshSession


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    with serve(tmp_path) as found:
        yield found


@pytest.fixture
def session(guest: Guest) -> Iterator[SshSession]:
    found = SshSession.connect(guest.endpoint(), Deadline.after(20))
    yield found
    found.close()
    found.close()


def is_gone(pid: int) -> bool:
    end = Deadline.after(10)
    while not end.passed:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        end.sleep(0.05)
    return False


def test_output_and_exit_code(session: SshSession) -> None:
    out, err = bytearray(), bytearray()
    code = session.run(["sh", "-c", "echo out; echo err >&2; exit 5"], on_stdout=out.extend, on_stderr=err.extend)
    assert (code, bytes(out), bytes(err)) == (5, b"out\n", b"err\n")


def test_arguments_arrive_as_they_are(session: SshSession) -> None:
    words = ["a b", "$HOME", "'quote'", "*", "new\nline", ""]
    assert capture(session, ["printf", "%s|", *words]) == "".join(f"{word}|" for word in words)


def test_both_outputs_at_once_and_large(session: SshSession) -> None:
    out, err = bytearray(), bytearray()
    script = "head -c 10000000 /dev/zero; head -c 10000000 /dev/zero >&2; head -c 10000000 /dev/zero"
    assert session.run(["sh", "-c", script], on_stdout=out.extend, on_stderr=err.extend) == 0
    assert (len(out), len(err)) == (20_000_000, 10_000_000)


def test_input_is_fed_and_ended(session: SshSession) -> None:
    data = os.urandom(5_000_000)
    out = bytearray()
    assert session.run(["cat"], feed=send(data), on_stdout=out.extend) == 0
    assert bytes(out) == data


def test_a_program_that_stops_reading_is_no_error(session: SshSession) -> None:
    assert session.run(["sh", "-c", "exec <&-; exit 3"], feed=send(b"x" * 5_000_000)) == 3


def test_a_feed_that_fails_ends_the_program(session: SshSession, tmp_path: Path) -> None:
    def feed(sink: Sink) -> None:
        sink.write(b"x")
        time.sleep(0.5)
        raise HostError("no more")

    with pytest.raises(HostError, match="no more"):
        session.run(["sh", "-c", f"echo $$ >{tmp_path}/pid; exec sleep 60"], feed=feed)
    assert is_gone(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize("trap", ["", "trap '' INT; "])
def test_ctrl_c_ends_the_whole_group(
    session: SshSession, tmp_path: Path, trap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh, "STAIRCASE", (("INT", 1.0), ("TERM", 1.0), ("KILL", 5.0)))

    def interrupt(data: bytes) -> None:
        raise KeyboardInterrupt

    script = f"{trap}sleep 60 & echo $! >{tmp_path}/child; echo $$ >{tmp_path}/pid; echo up; wait; sleep 60"
    with pytest.raises(KeyboardInterrupt):
        session.run(["sh", "-c", script], on_stdout=interrupt)
    assert is_gone(int((tmp_path / "pid").read_text()))
    assert is_gone(int((tmp_path / "child").read_text()))
    assert capture(session, ["echo", "still here"]) == "still here\n"


def test_a_deadline_ends_the_program(session: SshSession, tmp_path: Path) -> None:
    with pytest.raises(GuestError, match="did not end in time"):
        session.run(["sh", "-c", f"echo $$ >{tmp_path}/pid; exec sleep 60"], deadline=Deadline.after(1))
    assert is_gone(int((tmp_path / "pid").read_text()))


def test_a_cut_connection_is_said(guest: Guest, session: SshSession) -> None:
    threading.Timer(0.5, guest.cut).start()
    with pytest.raises(GuestError, match="connection to the guest broke"):
        session.run(["sleep", "30"])


def test_silence_asks_the_watch(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "WATCH_EVERY_S", 0.2)

    def watch() -> None:
        raise HostError("the disk is full")

    session = SshSession.connect(guest.endpoint(), Deadline.after(20), watch)
    begun = time.monotonic()
    with pytest.raises(HostError, match="the disk is full"):
        session.run(["sleep", "30"])
    assert time.monotonic() - begun < 10
    session.close()


def test_another_host_key_is_refused_before_the_log_in(guest: Guest) -> None:
    with pytest.raises(WrongHostKeyError):
        SshSession.connect(guest.endpoint(host="stranger"), Deadline.after(20))
    assert guest.server.log_ins == 0


def test_another_client_key_is_refused(guest: Guest) -> None:
    with pytest.raises(GuestError, match="refused the log-in"):
        SshSession.connect(guest.endpoint(client="stranger"), Deadline.after(20))


@pytest.mark.parametrize("answer", [socket.socket.fileno, socket.socket.close], ids=["silent", "closing"])
def test_a_server_that_does_not_speak(guest: Guest, answer: Callable[[socket.socket], object]) -> None:
    kept = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            kept.append(listener.accept()[0])
            answer(kept[0])

        threading.Thread(target=accept, daemon=True).start()
        silent = guest.endpoint()
        endpoint = type(silent)(
            "127.0.0.1", listener.getsockname()[1], "root", silent.client_key, silent.host_public_key
        )
        begun = time.monotonic()
        with pytest.raises(GuestError, match="does not answer"):
            SshSession.connect(endpoint, Deadline.after(1))
        assert time.monotonic() - begun < 10
    for sock in kept:
        sock.close()


def test_a_terminal_is_asked_for_with_its_size(guest: Guest, session: SshSession) -> None:
    out = bytearray()
    assert session.run(["echo", "hi"], on_stdout=out.extend, terminal=(100, 30)) == 0
    assert guest.server.terminals == [(100, 30)]
    assert bytes(out) == b"hi\n"


def test_capture_tells_what_failed(session: SshSession) -> None:
    with pytest.raises(GuestError, match="exit code 2") as caught:
        capture(session, ["sh", "-c", "echo words >&2; exit 2"])
    assert "words" in caught.value.details
