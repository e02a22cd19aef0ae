"""A board, as far as ssh goes: OpenSSH's server on loopback, with a `docker` that only keeps what it loads."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
DOCKER = """#!/bin/sh
case $1 in load) cat >{folder}/loaded.tar ;; version) echo 26.1 ;; esac
"""
CONFIG = """\
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host
AuthorizedKeysFile {folder}/client.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
SetEnv PATH={folder}/board:/usr/bin:/bin HOME={folder}/home
"""


@dataclass
class Board:
    """A board that can be reached at `url`; `breaks` says after how many bytes each next connection is cut."""

    folder: Path
    port: int
    breaks: list[int] = field(default_factory=list)

    @property
    def url(self) -> str:
        user = os.environ.get("USER") or subprocess.check_output(["id", "-un"], text=True).strip()
        return f"ssh://{user}@127.0.0.1:{self.port}"

    @property
    def path(self) -> str:
        """A PATH on which `ssh` knows the keys of this test and no others."""
        return f"{self.folder / 'host-bin'}:{os.environ['PATH']}"

    @property
    def loaded(self) -> Path:
        """What its Docker was given last."""
        return self.folder / "loaded.tar"


@contextmanager
def running(folder: Path, machine: str) -> Iterator[Board]:
    """Run a board whose `uname -m` says `machine`, until the block is left."""
    assert SSHD, "the tests need Debian's package openssh-server"
    folder.mkdir()
    (folder / "home").mkdir()
    for name in ("host", "client"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    _write_program(folder / "board" / "docker", DOCKER.format(folder=folder))
    _write_program(folder / "board" / "uname", f"#!/bin/sh\necho {machine}\n")
    options = f"-F none -i {folder}/client -o UserKnownHostsFile={folder}/known -o StrictHostKeyChecking=accept-new"
    _write_program(folder / "host-bin" / "ssh", f'#!/bin/sh\nexec {shutil.which("ssh")} {options} "$@"\n')
    inner = _free_port()
    (folder / "sshd_config").write_text(CONFIG.format(folder=folder, port=inner))
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    server = subprocess.Popen([SSHD, "-D", "-e", "-f", folder / "sshd_config"], stderr=(folder / "log").open("wb"))
    try:
        _wait_for(inner)
        with socket.create_server(("127.0.0.1", 0)) as front:
            board = Board(folder, front.getsockname()[1])
            threading.Thread(target=_forward_all, args=(front, inner, board), daemon=True).start()
            yield board
    finally:
        server.terminate()
        server.wait(10)


def _write_program(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _wait_for(port: int) -> None:
    for _ in range(100):
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise AssertionError("sshd does not listen")


def _forward_all(front: socket.socket, port: int, board: Board) -> None:
    with suppress(OSError):
        while True:
            client, _ = front.accept()
            server = socket.create_connection(("127.0.0.1", port))
            most = board.breaks.pop(0) if board.breaks else 1 << 40
            threading.Thread(target=_copy, args=(client, server, most), daemon=True).start()
            threading.Thread(target=_copy, args=(server, client, 1 << 40), daemon=True).start()


def _copy(source: socket.socket, target: socket.socket, most: int) -> None:
    with suppress(OSError):
        while most > 0 and (data := source.recv(min(65536, most))):
            target.sendall(data)
            most -= len(data)
    for each in (source, target):
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
