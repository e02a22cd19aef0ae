"""The host's SSH agent: the one that the environment names, or a private one with keys while a build needs it."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vmbuild import process
from vmbuild.errors import UsageError
from vmbuild.guest.agent import FAILURE, MOST_BYTES, Ask
from vmbuild.inputs import AGENT, SshSource

LASTING = ["sh", "-c", 'echo "$SSH_AGENT_PID"; exec cat >/dev/null']
"""What ssh-agent is started for: it ends with our end of a pipe, and the agent with it, even when we are killed."""


@contextmanager
def opened(source: SshSource) -> Iterator[Ask]:
    """Yield who answers for a source of keys. Raises UsageError for a key that is none, HostError without ssh-agent."""
    first = source.paths[0] if source.paths else os.environ[AGENT]
    if Path(first).is_socket():
        yield _asking(first)
        return
    with _private_agent(source) as path:
        yield _asking(path)


@contextmanager
def _private_agent(source: SshSource) -> Iterator[str]:
    """Yield the socket of an agent that has a source's keys and nothing else."""
    with tempfile.TemporaryDirectory(prefix="vmbuild-") as folder:
        path = f"{folder}/agent"
        with process.attached(["ssh-agent", "-a", path, *LASTING]) as pid:
            try:
                for key in source.paths:
                    _add_key(key, path)
                yield path
            finally:
                with suppress(ValueError):
                    process.stop(int(pid))


def _add_key(key: str, path: str) -> None:
    """Add a key, which is asked for its passphrase on the terminal if it has one and there is one."""
    try:
        content = Path(key).read_bytes()
        process.run(["ssh-add", "-q", "-"], stdin=content, env={**os.environ, AGENT: path})
    except OSError as error:
        raise UsageError(f"cannot read the key {key}: {error.strerror or error}") from error
    except process.CommandError as error:
        raise UsageError(
            f"{key} is no private key that ssh-add takes",
            details=error.output.strip(),
            resolution="A key with a passphrase is best added to your own agent; then --ssh default is enough.",
        ) from error


def _asking(path: str) -> Ask:
    def ask(request: bytes) -> bytes:
        try:
            return _exchange(path, request)
        except OSError:
            return FAILURE

    return ask


def _exchange(path: str, request: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as agent:
        agent.connect(path)
        agent.sendall(len(request).to_bytes(4) + request)
        size = int.from_bytes(_receive(agent, 4))
        if not 0 < size <= MOST_BYTES:
            raise OSError(f"an answer of {size} bytes")
        return _receive(agent, size)


def _receive(agent: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = agent.recv(size - len(data))
        if not more:
            raise OSError("the agent hung up")
        data += more
    return data
