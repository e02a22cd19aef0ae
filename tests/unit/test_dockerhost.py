"""The guest's Docker on a socket of the host: opened, kept, opened again, and whom it lets in."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.guest.fakes import FakeSession
from tests.unit.listener import Listener
from tests.unit.machine.conftest import make_qemu, make_spec
from vmbuild import dockerhost, operate, process
from vmbuild.deadline import Deadline
from vmbuild.errors import GuestError, HostError, MachineError, UsageError
from vmbuild.guest import forward, relay
from vmbuild.guest.keys import ensure_key
from vmbuild.machine import lifetime
from vmbuild.machine.files import MachineFiles
from vmbuild.model import Endpoint, Home
from vmbuild.report import SilentReporter


@pytest.fixture
def home(tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    """A home with a machine of the fake QEMU in it, and the fake ssh on PATH."""
    monkeypatch.setattr(dockerhost, "ANSWER_S", 5.0)
    short = Path(tempfile.mkdtemp())  # a socket's path has 107 bytes, and a test's own folder may take them all
    monkeypatch.setattr(tempfile, "tempdir", str(short))
    home = Home(tmp_path / "cache", tmp_path / "state")
    files = MachineFiles.at(home.state, "box")
    lifetime.prepare(make_spec(tmp_path), files, explicit_disk=False)
    files.seed.write_bytes(bytes(512))
    for key in (files.client_key, files.host_key):
        ensure_key(key, "test")
    lifetime.start(make_spec(tmp_path), files, make_qemu())
    yield home
    stop(files)
    operate.destroy("box", home, SilentReporter())
    shutil.rmtree(short)


@pytest.fixture
def files(home: Home) -> MachineFiles:
    return MachineFiles.at(home.state, "box")


def stop(files: MachineFiles) -> None:
    """End the program behind the socket: the real one ends with its connection to QEMU."""
    if files.docker_pid.exists():
        process.stop(int(files.docker_pid.read_text()))


def restart(files: MachineFiles, tmp_path: Path) -> None:
    stop(files)
    lifetime.stop(files, Deadline.after(0))
    lifetime.start(make_spec(tmp_path), files, make_qemu())


def open_socket(home: Home) -> dockerhost.DockerHost:
    return dockerhost.open_socket("box", home, SilentReporter())


def pid_of(files: MachineFiles) -> int:
    return int(files.docker_pid.read_text())


def test_it_answers_and_is_opened_once(home: Home, files: MachineFiles) -> None:
    first = open_socket(home)
    pid = pid_of(files)
    assert forward.answers(first.socket, Deadline.after(5))
    assert (open_socket(home), pid_of(files)) == (first, pid)


def test_the_real_client_is_told_to_trust_this_guest_alone(home: Home, files: MachineFiles) -> None:
    open_socket(home)
    line = process.command_line(pid_of(files))
    mark = dockerhost._mark(files)
    for word in ("-F none", f"HostKeyAlias={mark}", "StrictHostKeyChecking=yes", "BatchMode=yes", "-p 40222"):
        assert word in line
    assert "StreamLocalBindMask=0177" in line
    key = files.host_public_key.read_text().split()[1]
    assert files.known_hosts.read_text() == f"{mark} ssh-ed25519 {key}\n"


def test_argv() -> None:
    endpoint = Endpoint("127.0.0.1", 1234, "root", Path("/m/id"), Path("/m/host.pub"))
    argv = forward.ssh_argv(endpoint, "vmbuild-x", Path("/m/known_hosts"), Path("/m/docker.sock"))
    assert argv[:5] == ["ssh", "-F", "none", "-N", "-T"]
    assert argv[-11:] == [
        *("-o", "UserKnownHostsFile=./known_hosts", "-o", "HostKeyAlias=vmbuild-x", "-i", "./id", "-p", "1234"),
        *("-L", "./docker.sock:/run/docker.sock", "root@127.0.0.1"),
    ]


def test_a_path_that_is_too_long_has_a_short_one_for_this_user_alone(
    home: Home, files: MachineFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dockerhost, "MAX_PATH", 1)
    found = open_socket(home)
    assert found.socket.parent.readlink() == files.folder
    assert stat.S_IMODE(found.socket.parent.parent.stat().st_mode) == 0o700
    assert forward.answers(found.socket, Deadline.after(5))
    alias = found.socket.parent
    stop(files)
    operate.destroy("box", home, SilentReporter())
    assert not alias.is_symlink()


@pytest.mark.parametrize("kind", ["open", "link", "file"])
def test_a_folder_that_others_could_have_made_is_not_used(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(dockerhost, "MAX_PATH", 1)
    folder = Path(tempfile.gettempdir()) / f"vmbuild-{os.getuid()}"
    if kind == "open":
        folder.mkdir()
        folder.chmod(0o755)
    elif kind == "link":
        (tmp_path / "theirs").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "theirs")
    else:
        folder.touch()
    with pytest.raises(HostError):
        open_socket(home)


def test_one_that_was_wanted_comes_back_with_the_machine(home: Home, files: MachineFiles, tmp_path: Path) -> None:
    path = open_socket(home).socket
    restart(files, tmp_path)
    assert not path.exists()
    report = Listener()
    dockerhost.reopen(files, report)
    assert forward.answers(path, Deadline.after(5)) and report.warnings == []


def test_one_that_was_not_wanted_does_not(files: MachineFiles) -> None:
    dockerhost.reopen(files, SilentReporter())
    assert not files.docker_socket.exists()


def test_one_that_does_not_come_back_costs_a_warning(
    home: Home, files: MachineFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_socket(home)
    restart(files, tmp_path)
    monkeypatch.setenv("FAKE_SSH_FAIL", "no")
    report = Listener()
    dockerhost.reopen(files, report)
    assert len(report.warnings) == 1


def test_one_that_was_killed_is_opened_again(home: Home, files: MachineFiles) -> None:
    open_socket(home)
    pid = pid_of(files)
    process.stop(pid)
    path = open_socket(home).socket
    assert pid_of(files) != pid and forward.answers(path, Deadline.after(5))


def test_one_that_hangs_is_ended_and_opened_again(
    home: Home, files: MachineFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dockerhost, "ANSWER_S", 0.5)
    monkeypatch.setenv("FAKE_SSH_SILENT", "1")
    with pytest.raises(GuestError):
        open_socket(home)
    failed = pid_of(files)
    assert not process.is_alive(failed)
    monkeypatch.delenv("FAKE_SSH_SILENT")
    monkeypatch.setattr(dockerhost, "ANSWER_S", 5.0)
    open_socket(home)
    assert pid_of(files) != failed


def test_its_own_words_are_told_when_it_fails(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SSH_FAIL", "Host key verification failed.")
    with pytest.raises(GuestError) as caught:
        open_socket(home)
    assert "Host key verification failed." in caught.value.details


def test_another_process_with_its_id_is_left_alone(home: Home, files: MachineFiles) -> None:
    files.docker_pid.write_text(f"{os.getpid()}\n")
    open_socket(home)
    assert pid_of(files) != os.getpid()


def test_a_machine_that_does_not_run_has_none(home: Home, files: MachineFiles) -> None:
    lifetime.stop(files, Deadline.after(0))
    with pytest.raises(MachineError):
        open_socket(home)
    with pytest.raises(UsageError):
        dockerhost.open_socket("nobody", home, SilentReporter())


def test_without_openssh_vmbuild_carries_it_itself(
    home: Home, files: MachineFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "has_program", lambda _: False)
    argv = dockerhost._argv(files)
    assert argv[1:] == ["-m", "vmbuild", "env", "--name", "box", "--serve", dockerhost._mark(files)]


@pytest.mark.parametrize(
    ("greeting", "expected"),
    [
        (b"SSH-2.0-dropbear_2022.83\r\n", False),
        (b"SSH-2.0-dropbear_2019.78\r\n", False),
        (b"SSH-2.0-dropbear_2024.84\r\n", True),
        (b"SSH-2.0-dropbear_2025.89\r\n", True),
        (b"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u10\r\n", True),
        (b"", True),
    ],
)
def test_an_old_dropbear_opens_no_sockets_for_ssh(greeting: bytes, expected: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = Endpoint("127.0.0.1", server.getsockname()[1], "root", Path("/m/id"), Path("/m/host.pub"))

        def greet() -> None:
            client, _ = server.accept()
            with client:
                client.sendall(greeting)

        thread = threading.Thread(target=greet)
        thread.start()
        assert forward.can_carry(endpoint, Deadline.after(5)) is expected
        thread.join()
    assert forward.can_carry(endpoint, Deadline.after(5)), "nobody is there: ssh shall say so"


def test_where_the_guest_opens_no_sockets_vmbuild_carries_it_itself(
    home: Home, files: MachineFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "can_carry", lambda *_: False)
    assert "--serve" in dockerhost._argv(files)


def test_that_ends_with_the_machine(home: Home, files: MachineFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def serve(session: FakeSession, path: Path, is_wanted: relay.Wanted) -> None:
        asked.append(is_wanted())
        lifetime.stop(files, Deadline.after(0))
        asked.append(is_wanted())

    session = FakeSession()
    monkeypatch.setattr(relay, "serve", serve)
    monkeypatch.setattr(dockerhost, "connect", lambda *_: session)
    dockerhost.serve("box", home, dockerhost._mark(files))
    assert (asked, session.closed) == ([True, False], 1)
