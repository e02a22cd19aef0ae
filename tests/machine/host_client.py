"""This host's docker client, and who asks on this host's loopback what a container serves."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path


def run_docker(
    env: Mapping[str, str], *args: str, stdin: bytes = b"", cwd: Path | None = None, timeout_s: float = 120
) -> bytes:
    """Run this host's docker client and return its output."""
    done = subprocess.run(
        ["docker", *args], env=env, cwd=cwd, input=stdin, capture_output=True, check=False, timeout=timeout_s
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def fetch(port: int) -> bytes:
    """Return what a server of the guest says on this host's loopback, nothing when nobody answers."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 5) as client:
        client.settimeout(5)
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        return b"".join(iter(lambda: client.recv(4096), b""))
    return b""
