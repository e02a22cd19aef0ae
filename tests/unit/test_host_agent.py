"""The host's SSH agent: a real ssh-agent, and keys that it takes or does not."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from vmbuild import host_agent, process
from vmbuild.deadline import Deadline
from vmbuild.errors import UsageError
from vmbuild.guest.agent import FAILURE, REQUEST_IDENTITIES
from vmbuild.inputs import AGENT, SshSource

LIST = bytes([REQUEST_IDENTITIES])
pytestmark = pytest.mark.skipif(shutil.which("ssh-agent") is None, reason="needs OpenSSH's client")


def make_key(path: Path, passphrase: str = "") -> bytes:
    """Make a key and return its public half as agents name it."""
    argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-C", path.name, "-f", str(path)]
    subprocess.run(argv, check=True)
    return path.with_suffix(".pub").read_bytes().split()[1]


def test_keys_get_an_agent_of_their_own_that_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(AGENT, raising=False)
    for name in ("one", "two"):
        make_key(tmp_path / name)
    (tmp_path / "one").chmod(0o644)  # docker does not mind either
    seen: list[str] = []
    attached = process.attached

    def watch(argv: list[str]) -> object:
        seen.append(argv[2])
        return attached(argv)

    monkeypatch.setattr(process, "attached", watch)
    with host_agent.opened(SshSource("default", (str(tmp_path / "one"), str(tmp_path / "two")))) as ask:
        answer = ask(LIST)
        assert answer[:5] == b"\x0c\0\0\0\2"
        assert Path(seen[0]).parent.stat().st_mode & 0o777 == 0o700
    assert ask(LIST) == FAILURE
    assert not Path(seen[0]).exists()


def test_the_agent_that_the_environment_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "sock")
    monkeypatch.setenv(AGENT, path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def answer(reply: bytes) -> None:
            client, _ = listener.accept()
            with client:
                assert client.recv(5, socket.MSG_WAITALL) == b"\0\0\0\1" + LIST
                client.sendall(reply)

        for reply, heard in ((b"\0\0\0\2ok", b"ok"), (b"\0\0\0\2o", FAILURE), (b"\xff\xff\xff\xff", FAILURE)):
            thread = threading.Thread(target=answer, args=(reply,))
            thread.start()
            with host_agent.opened(SshSource("default")) as ask:
                assert ask(LIST) == heard
            thread.join()
    with host_agent.opened(SshSource("x", (path,))) as ask:  # nobody listens any more
        assert ask(LIST) == FAILURE


@pytest.mark.parametrize("content", [b"no key\n", None])
def test_what_is_no_key_is_told(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match="key"), host_agent.opened(SshSource("x", (str(path),))):
        raise AssertionError("it was opened")


def test_a_key_with_a_passphrase_that_nobody_can_be_asked_for(tmp_path: Path) -> None:
    make_key(tmp_path / "key", "sesame")
    script = (
        "import sys; from vmbuild import host_agent; from vmbuild.inputs import SshSource\n"
        "with host_agent.opened(SshSource('x', (sys.argv[1],))): pass\n"
    )
    env = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "SSH_ASKPASS")}
    argv = ["setsid", "-w", sys.executable, "-c", script, str(tmp_path / "key")]
    done = subprocess.run(argv, env=env, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=30)
    assert b"UsageError" in done.stderr
    assert b"no private key that ssh-add takes" in done.stderr


def test_an_agent_ends_with_who_started_it(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    with process.attached(["ssh-agent", "-a", str(path), *host_agent.LASTING]) as pid:
        assert process.is_alive(int(pid))
        process.stop(int(pid))
    assert process.wait_gone(int(pid), Deadline.after(5))
