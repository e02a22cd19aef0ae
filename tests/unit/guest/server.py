"""A real SSH server on loopback that runs what it is told on this host: a peer to prove the session against."""

from __future__ import annotations

import os
import pty
import select
import socket
import subprocess
import threading
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import paramiko
from paramiko.common import AUTH_FAILED, AUTH_SUCCESSFUL, MSG_CHANNEL_SUCCESS, OPEN_SUCCEEDED

from vmbuild.guest.keys import ensure_key
from vmbuild.model import Endpoint


class Server(paramiko.ServerInterface):
    """Accepts one key, runs any command."""

    def __init__(self, client: str) -> None:
        self._client = client
        self.log_ins = 0
        self.terminals: list[tuple[int, int]] = []
        self._with_terminal: set[int] = set()

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        self.log_ins += 1
        return AUTH_SUCCESSFUL if key.get_base64() == self._client else AUTH_FAILED

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return OPEN_SUCCEEDED

    def check_channel_pty_request(
        self, channel: paramiko.Channel, term: bytes, width: int, height: int, *pixels: object
    ) -> bool:
        self.terminals.append((width, height))
        self._with_terminal.add(channel.get_id())
        return True

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        run = run_on_terminal if channel.get_id() in self._with_terminal else run_command
        transport = channel.get_transport()
        assert isinstance(transport, Transport)
        transport.accepted.append(threading.Thread(target=run, args=(channel, command), daemon=True))
        return True


class Transport(paramiko.Transport):
    """Starts a program when the request for it has been answered: its end must not be told before its beginning."""

    def __init__(self, sock: socket.socket) -> None:
        self.accepted: list[threading.Thread] = []
        super().__init__(sock)

    def _send_user_message(self, data: paramiko.Message) -> None:
        super()._send_user_message(data)  # type: ignore[misc] # the one place that all answers go through
        while self.accepted and data.asbytes()[0] == MSG_CHANNEL_SUCCESS:
            self.accepted.pop().start()


def run_on_terminal(channel: paramiko.Channel, command: bytes) -> None:
    """Run a command as dropbear does on a terminal: one descriptor for both ways, closed when no more input comes."""
    master, slave = pty.openpty()
    tty.setraw(slave)
    program = subprocess.Popen(["setsid", "--ctty", "/bin/sh", "-c", command], stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)

    def feed() -> None:
        with suppress(OSError):
            while data := channel.recv(65536):
                os.write(master, data)
        os.close(master)

    threading.Thread(target=feed, daemon=True).start()
    with suppress(OSError, ValueError):
        while True:
            # Not a read that blocks: it would keep the descriptor open after its close.
            ready, _, _ = select.select([master], [], [], 0.05)
            if ready:
                channel.sendall(os.read(master, 65536))
    code = program.wait()
    if code >= 0:
        channel.send_exit_status(code)
    channel.close()


def run_command(channel: paramiko.Channel, command: bytes) -> None:
    pipe = subprocess.PIPE
    program = subprocess.Popen(["/bin/sh", "-c", command], stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0)
    assert program.stdin and program.stdout and program.stderr
    stdin, stdout, stderr = program.stdin, program.stdout, program.stderr

    def feed() -> None:
        with suppress(OSError):
            while data := channel.recv(65536):
                while data:
                    data = data[stdin.write(data) :]
        stdin.close()

    def errors() -> None:
        with suppress(OSError, EOFError):
            while data := stderr.read(65536):
                channel.sendall_stderr(data)

    threads = [threading.Thread(target=target, daemon=True) for target in (feed, errors)]
    for thread in threads:
        thread.start()
    with suppress(OSError, EOFError):
        while data := stdout.read(65536):
            channel.sendall(data)
        threads[1].join()
        code = program.wait()
        if code >= 0:
            channel.send_exit_status(code)
        channel.shutdown(2)
    with suppress(OSError, EOFError):
        channel.close()


class Guest:
    """The server as a test sees it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("client", "host", "stranger"):
            ensure_key(folder / name, name)
        self.transports: list[paramiko.Transport] = []
        self.server = Server((folder / "client.pub").read_text().split()[1])
        self.listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._serve, daemon=True).start()

    def endpoint(self, *, client: str = "client", host: str = "host") -> Endpoint:
        port = self.listener.getsockname()[1]
        return Endpoint("127.0.0.1", port, "root", self.folder / client, self.folder / f"{host}.pub")

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                sock, _ = self.listener.accept()
                transport = Transport(sock)
                transport.add_server_key(paramiko.Ed25519Key.from_private_key_file(str(self.folder / "host")))
                self.transports.append(transport)
                with suppress(paramiko.SSHException, EOFError):
                    transport.start_server(server=self.server)

    def cut(self) -> None:
        """Break every connection."""
        for transport in self.transports:
            transport.close()


@contextmanager
def serve(folder: Path) -> Iterator[Guest]:
    """Yield a running server."""
    guest = Guest(folder)
    try:
        yield guest
    finally:
        guest.listener.close()
        guest.cut()
