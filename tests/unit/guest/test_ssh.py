"""The session, against a real SSH server."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import paramiko
import pytest
from paramiko.common import AUTH_SUCCESSFUL, MSG_CHANNEL_CLOSE, MSG_CHANNEL_DATA, MSG_CHANNEL_EOF

from tests.unit.guest import server
from tests.unit.guest.server import Guest, serve
from vmbuild.deadline import Deadline
from vmbuild.errors import GuestError, HostError, MachineError
from vmbuild.guest import ssh
from vmbuild.guest.session import ConnectionLostError, Sink, WrongHostKeyError, capture, send
from vmbuild.guest.ssh import SshSession
from vmbuild.model import MIB, Endpoint


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    with serve(tmp_path) as found:
        yield found


@pytest.fixture
def session(guest: Guest) -> Iterator[SshSession]:
    found = SshSession.connect(guest.endpoint, Deadline.after(20))
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


def test_a_shell_is_given_its_script_and_arguments(session: SshSession) -> None:
    """In a group of its own, which a signal goes to, and in no other shell than the one that tells it."""
    script = """printf '%s|' "$0" "$@"; read -r _ _ _ _ group _ </proc/self/stat; [ "$group" = $$ ]; exit $?"""
    assert capture(session, ["sh", "-c", script, "it's", "a b", "$x"]) == "it's|a b|$x|"
    assert "echo $$" in capture(session, ["sh", "-c", "ps -o args= -p $$"])


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

    session = SshSession.connect(guest.endpoint, Deadline.after(20), watch)
    begun = time.monotonic()
    with pytest.raises(HostError, match="the disk is full"):
        session.run(["sleep", "30"])
    assert time.monotonic() - begun < 10
    session.close()


def test_another_host_key_is_refused_before_the_log_in(guest: Guest) -> None:
    with pytest.raises(WrongHostKeyError):
        SshSession.connect(lambda: guest.endpoint(host="stranger"), Deadline.after(20))
    assert guest.server.log_ins == 0


def test_another_client_key_is_refused(guest: Guest) -> None:
    with pytest.raises(GuestError, match="refused the log-in"):
        SshSession.connect(lambda: guest.endpoint(client="stranger"), Deadline.after(20))


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
            SshSession.connect(lambda: endpoint, Deadline.after(1))
        assert time.monotonic() - begun < 10
    for sock in kept:
        sock.close()


def test_a_terminal_is_asked_for_with_its_size(guest: Guest, session: SshSession) -> None:
    out = bytearray()
    assert session.run(["echo", "hi"], on_stdout=out.extend, terminal=(100, 30)) == 0
    assert guest.server.terminals == [(100, 30)]
    assert bytes(out) == b"hi\n"


def test_a_terminal_is_not_hung_up_while_the_program_runs(session: SshSession) -> None:
    out = bytearray()
    argv = ["sh", "-c", "sleep 1; test -t 0 && echo still here"]
    assert session.run(argv, on_stdout=out.extend, terminal=(100, 30)) == 0
    assert bytes(out) == b"still here\n"


def test_a_terminal_carries_input(session: SshSession) -> None:
    out = bytearray()
    argv = ["sh", "-c", "read line; echo got $line; exit 3"]
    done = threading.Event()

    def feed(sink: Sink) -> None:
        sink.write(b"word\n")
        done.wait(10)

    def listen(data: bytes) -> None:
        out.extend(data)
        if b"got" in out:
            done.set()

    assert session.run(argv, feed=feed, on_stdout=listen, terminal=(100, 30)) == 3
    assert bytes(out) == b"got word\n"


def test_capture_tells_what_failed(session: SshSession) -> None:
    with pytest.raises(GuestError, match="exit code 2") as caught:
        capture(session, ["sh", "-c", "echo words >&2; exit 2"])
    assert "words" in caught.value.details


def test_twenty_megabytes_of_input_arrive_whole(session: SshSession) -> None:
    block = os.urandom(1_000_000)

    def feed(sink: Sink) -> None:
        for _ in range(20):
            sink.write(block)

    assert (
        capture(session, ["sh", "-c", "sha256sum | cut -c -64"], feed=feed).strip()
        == hashlib.sha256(block * 20).hexdigest()
    )


def test_input_and_output_flow_at_the_same_time(session: SshSession) -> None:
    """An echo of more than both windows hold: it would stand still if one were finished before the other began."""
    total = 0

    def count(data: bytes) -> None:
        nonlocal total
        total += len(data)

    def feed(sink: Sink) -> None:
        for _ in range(20):
            sink.write(b"x" * MIB)

    assert session.run(["cat"], feed=feed, on_stdout=count) == 0
    assert total == 20 * MIB


def test_outputs_taken_in_turns_keep_their_order(session: SshSession) -> None:
    out, err = bytearray(), bytearray()
    script = 'i=0; while [ $i -lt 300 ]; do echo "o$i"; echo "e$i" >&2; i=$((i+1)); done'
    assert session.run(["sh", "-c", script], on_stdout=out.extend, on_stderr=err.extend) == 0
    assert out.decode().split() == [f"o{i}" for i in range(300)]
    assert err.decode().split() == [f"e{i}" for i in range(300)]


@pytest.mark.parametrize("code", [0, 1, 127, 255])
def test_exit_codes_come_through(session: SshSession, code: int) -> None:
    assert session.run(["sh", "-c", f"exit {code}"]) == code


def test_a_program_killed_by_a_signal_is_no_success(session: SshSession) -> None:
    assert session.run(["sh", "-c", "kill -9 $$"]) == 255
    assert capture(session, ["echo", "on"]) == "on\n"


def test_a_program_that_is_not_there(session: SshSession) -> None:
    assert session.run(["vmbuild-no-such-program"]) == 127


def test_a_talkative_program_ends_at_its_deadline_too(session: SshSession) -> None:
    """A reader that is slower than the program always finds more to read; the time limit must count all the same."""
    begun = time.monotonic()
    with pytest.raises(GuestError, match="did not end in time"):
        session.run(["timeout", "12", "yes"], on_stdout=lambda _: time.sleep(0.05), deadline=Deadline.after(1))
    assert time.monotonic() - begun < 8


def test_a_feed_that_fails_at_once_ends_the_program_all_the_same(session: SshSession, tmp_path: Path) -> None:
    """Before the program's group is known: a file of the context that cannot be read fails this early."""

    def feed(sink: Sink) -> None:
        raise HostError("no more")

    with pytest.raises(HostError, match="no more"):
        session.run(["sh", "-c", f"echo $$ >{tmp_path}/pid; exec sleep 40"], feed=feed)
    assert ended(tmp_path / "pid")


def test_a_deadline_that_passes_before_the_program_spoke_ends_it(
    guest: Guest, session: SshSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = server.run_command

    def slow(channel: paramiko.Channel, command: bytes) -> None:
        time.sleep(0.6)
        real(channel, command)

    monkeypatch.setattr(server, "run_command", slow)
    with pytest.raises(GuestError, match="did not end in time"):
        session.run(["sh", "-c", f"echo $$ >{tmp_path}/pid; exec sleep 40"], deadline=Deadline.after(0.3))
    assert ended(tmp_path / "pid")


def ended(pid_file: Path) -> bool:
    """Tell whether the program that writes its id there is gone, or never began; end it where it is not."""
    limit = Deadline.after(3)
    while not pid_file.exists() and not limit.passed:
        limit.sleep(0.05)
    if not pid_file.exists():
        return True
    pid = int(pid_file.read_text())
    limit = Deadline.after(3)
    while not limit.passed:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        limit.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    return False


def test_a_cut_while_output_flows_is_said(guest: Guest, session: SshSession) -> None:
    heard = threading.Event()

    def cut() -> None:
        heard.wait(20)
        guest.cut()

    threading.Thread(target=cut, daemon=True).start()
    with pytest.raises(GuestError, match="connection to the guest broke"):
        session.run(["timeout", "20", "yes"], on_stdout=lambda _: heard.set())


def test_a_cut_while_input_flows_is_said(guest: Guest, session: SshSession) -> None:
    def feed(sink: Sink) -> None:
        sink.write(b"x" * MIB)
        guest.cut()
        for _ in range(100):
            sink.write(b"x" * MIB)

    with pytest.raises(GuestError, match="connection to the guest broke"):
        session.run(["sleep", "20"], feed=feed)


def test_a_cut_is_said_where_a_write_fails_before_the_channel_is_closed(
    guest: Guest, session: SshSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """paramiko closes the channels in a thread of its own, which is late on a busy host."""
    real: Callable[[paramiko.Channel], None] = paramiko.Channel._unlink  # type: ignore[attr-defined]
    seen, failed = threading.Event(), threading.Event()

    def unlink(channel: paramiko.Channel) -> None:
        if channel.get_transport() not in guest.transports:
            seen.set()
            assert failed.wait(20)
            time.sleep(1)  # longer than a look at what the feed says
        real(channel)

    def feed(sink: Sink) -> None:
        guest.cut()
        assert seen.wait(20)
        try:
            for _ in range(20):
                sink.write(b"x")
        finally:
            failed.set()

    monkeypatch.setattr(paramiko.Channel, "_unlink", unlink)
    with pytest.raises(GuestError, match="connection to the guest broke"):
        session.run(["sleep", "20"], feed=feed)


def test_a_cut_is_told_from_a_signal_whichever_thread_is_faster(
    guest: Guest, session: SshSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """paramiko wakes the readers of a channel before it says that the transport has ended."""
    real: Callable[[paramiko.Channel], None] = paramiko.Channel._unlink  # type: ignore[attr-defined]

    def unlink(channel: paramiko.Channel) -> None:
        real(channel)
        time.sleep(0.3)

    monkeypatch.setattr(paramiko.Channel, "_unlink", unlink)
    threading.Timer(0.5, guest.cut).start()
    with pytest.raises(GuestError, match="connection to the guest broke"):
        session.run(["sleep", "20"])


def test_after_a_cut_nothing_runs_any_more(guest: Guest, session: SshSession) -> None:
    guest.cut()
    with pytest.raises(GuestError):
        session.run(["true"], deadline=Deadline.after(5))


def test_a_server_that_never_answers_the_log_in_costs_no_more_than_the_deadline(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dawdle(self: server.Server, username: str, key: paramiko.PKey) -> int:
        time.sleep(8)
        return AUTH_SUCCESSFUL

    monkeypatch.setattr(server.Server, "check_auth_publickey", dawdle)
    begun = time.monotonic()
    with pytest.raises(GuestError):
        SshSession.connect(guest.endpoint, Deadline.after(1)).close()
    assert time.monotonic() - begun < 5


def test_a_server_that_never_starts_the_program_costs_no_more_than_the_deadline(
    session: SshSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dawdle(self: server.Server, channel: paramiko.Channel, command: bytes) -> bool:
        time.sleep(8)
        return True

    monkeypatch.setattr(server.Server, "check_channel_exec_request", dawdle)
    begun = time.monotonic()
    with pytest.raises(GuestError):
        session.run(["true"], deadline=Deadline.after(1))
    assert time.monotonic() - begun < 5


def test_a_connection_that_broke_before_its_channel_is_closed_is_no_matter(
    session: SshSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    def close(channel: paramiko.Channel) -> None:
        real(channel)
        raise EOFError  # as where the end of the connection cannot be told any more

    def dawdle(self: server.Server, channel: paramiko.Channel, command: bytes) -> bool:
        time.sleep(2)
        return True

    real, said = paramiko.Channel.close, list[threading.ExceptHookArgs]()
    monkeypatch.setattr(paramiko.Channel, "close", close)
    monkeypatch.setattr(threading, "excepthook", said.append)
    monkeypatch.setattr(server.Server, "check_channel_exec_request", dawdle)
    with pytest.raises(GuestError, match="did not end in time"):
        session.run(["true"], deadline=Deadline.after(0.5))
    for timer in threading.enumerate():
        if isinstance(timer, threading.Timer):
            timer.join(5)
    assert said == []


def test_nothing_is_sent_over_a_channel_that_was_closed(session: SshSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the thread that sends has made its message before, and another the one that closes: dropbear hangs up."""

    def dawdle(self: ssh.Transport, data: paramiko.Message) -> None:
        if not self.server_mode and data.asbytes()[0] in (MSG_CHANNEL_DATA, MSG_CHANNEL_EOF):
            time.sleep(0.3)
        late(self, data)

    def note(self: paramiko.Transport, data: paramiko.Message) -> None:
        kind, number = data.asbytes()[0], int.from_bytes(data.asbytes()[1:5], "big")
        if not self.server_mode and kind in (MSG_CHANNEL_DATA, MSG_CHANNEL_EOF, MSG_CHANNEL_CLOSE):
            sent.append((kind, number))
        real(self, data)

    sent = list[tuple[int, int]]()
    late, real = ssh.Transport._send_user_message, paramiko.Transport._send_user_message  # type: ignore[attr-defined]
    monkeypatch.setattr(ssh.Transport, "_send_user_message", dawdle)
    monkeypatch.setattr(paramiko.Transport, "_send_user_message", note)
    for _ in range(3):
        assert session.run(["sh", "-c", "exit 3"]) == 3
    assert capture(session, ["cat"], feed=send(b"all of it")) == "all of it"
    closed = [number for kind, number in sent if kind == MSG_CHANNEL_CLOSE]
    for number in closed:
        assert [kind for kind, of in sent if of == number][-1] == MSG_CHANNEL_CLOSE
    assert len(closed) == 4


def test_nobody_listens(guest: Guest) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(GuestError, match="does not answer"):
        SshSession.connect(lambda: dataclasses.replace(guest.endpoint(), port=port), Deadline.after(5))


def test_a_stranger_is_named_with_what_to_do(guest: Guest) -> None:
    with pytest.raises(WrongHostKeyError) as caught:
        SshSession.connect(lambda: guest.endpoint(host="stranger"), Deadline.after(20))
    assert "SHA256:" in caught.value.details
    assert "vmbuild down" in caught.value.resolution


def test_without_a_terminal_none_is_asked_for(guest: Guest, session: SshSession) -> None:
    assert session.run(["true"]) == 0
    assert guest.server.terminals == []


# A connection that is lost, and another one.


@pytest.mark.parametrize("when", ["before", "while it is silent", "while it writes"])
def test_a_lost_connection_is_told_from_other_failures(guest: Guest, session: SshSession, when: str) -> None:
    if when == "before":
        guest.cut()
    else:
        threading.Timer(0.3, guest.cut).start()
    argv = ["timeout", "20", "yes"] if when == "while it writes" else ["sleep", "20"]
    with pytest.raises(ConnectionLostError):
        session.run(argv, deadline=Deadline.after(15))


def test_a_deadline_is_no_lost_connection(session: SshSession) -> None:
    with pytest.raises(GuestError) as caught:
        session.run(["sleep", "20"], deadline=Deadline.after(0.3))
    assert not isinstance(caught.value, ConnectionLostError)


def test_after_a_lost_connection_another_one_does(guest: Guest, session: SshSession) -> None:
    for number in range(2):
        guest.cut()
        with pytest.raises(ConnectionLostError):
            session.run(["true"], deadline=Deadline.after(5))
        session.reopen(Deadline.after(20))
        assert capture(session, ["echo", "here", str(number)]) == f"here {number}\n"
    assert guest.server.log_ins == 3


def test_a_connection_that_still_is_there_is_closed_for_the_other(guest: Guest, session: SshSession) -> None:
    session.reopen(Deadline.after(20))
    assert capture(session, ["echo", "here"]) == "here\n"
    limit = Deadline.after(5)
    while guest.transports[0].is_active() and not limit.passed:
        limit.sleep(0.02)
    assert [transport.is_active() for transport in guest.transports] == [False, True]


def test_another_connection_is_to_the_same_guest(guest: Guest, session: SshSession) -> None:
    guest.cut()
    shutil.copyfile(guest.folder / "stranger.pub", guest.folder / "host.pub")
    with pytest.raises(WrongHostKeyError):
        session.reopen(Deadline.after(20))
    assert guest.server.log_ins == 1
    with pytest.raises(ConnectionLostError):
        session.run(["true"], deadline=Deadline.after(5))


def test_a_guest_that_is_not_there_again_costs_no_more_than_the_deadline(guest: Guest, session: SshSession) -> None:
    guest.listener.shutdown(socket.SHUT_RDWR)  # a close alone would leave the accept that waits
    guest.cut()
    begun = time.monotonic()
    with pytest.raises(GuestError):
        session.reopen(Deadline.after(1))
    assert time.monotonic() - begun < 5


def test_a_guest_that_went_on_elsewhere_is_found_there(guest: Guest, tmp_path: Path) -> None:
    places: list[Endpoint | MachineError] = [guest.endpoint()]

    def where() -> Endpoint:
        if isinstance(place := places[-1], MachineError):
            raise place
        return place

    session = SshSession.connect(where, Deadline.after(20))
    (tmp_path / "other").mkdir()
    with serve(tmp_path / "other") as other:
        places.append(MachineError("the machine forwards no SSH port"))
        with pytest.raises(GuestError, match="is not there yet"):  # so it is tried again
            session.reopen(Deadline.after(5))
        places.append(other.endpoint())
        session.reopen(Deadline.after(20))
        assert session.run(["true"]) == 0
        assert (guest.server.log_ins, other.server.log_ins) == (1, 1)
        session.close()


def test_nobody_connects_to_a_machine_that_is_gone(guest: Guest) -> None:
    gone = list[HostError]()

    def watch() -> None:
        if gone:
            raise gone[0]

    session = SshSession.connect(guest.endpoint, Deadline.after(20), watch)
    gone.append(HostError("the disk is full"))
    with pytest.raises(HostError, match="the disk is full"):
        session.reopen(Deadline.after(20))
    with pytest.raises(HostError, match="the disk is full"):  # and nothing in it can be cleaned up
        session.run(["true"])
    assert guest.server.log_ins == 1
    session.close()


# Someone who looks on.


@pytest.mark.parametrize("argv", [["sleep", "1.6"], ["timeout", "1.6", "yes"]], ids=["silent", "talkative"])
def test_who_looks_on_is_asked_at_least_twice_a_second(session: SshSession, argv: list[str]) -> None:
    looks = [time.monotonic()]
    session.run(argv, on_tick=lambda: looks.append(time.monotonic()))
    looks.append(time.monotonic())
    assert max(after - before for before, after in itertools.pairwise(looks)) < 1
    assert len(looks) >= 4


def test_who_looks_on_can_end_the_program(session: SshSession, tmp_path: Path) -> None:
    class Enough(Exception):
        pass

    def look() -> None:
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            raise Enough

    with pytest.raises(Enough):
        session.run(["sh", "-c", f"echo $$ >{tmp_path}/pid; exec sleep 60"], on_tick=look)
    assert is_gone(int((tmp_path / "pid").read_text()))
    assert capture(session, ["echo", "still here"]) == "still here\n"
