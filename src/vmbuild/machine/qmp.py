"""QMP, the protocol of QEMU's monitor: a line of JSON asks, a line answers, and events come in between.

Source: QEMU, docs/interop/qmp-spec.rst. The library `qemu.qmp` is asynchronous: to load it takes a third as long as to
bring a guest out of a snapshot.
"""

from __future__ import annotations

import json
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from vmbuild.deadline import Deadline
from vmbuild.errors import MachineError
from vmbuild.model import MIB

MAX_SOCKET_PATH = 100
"""sockaddr_un holds 108 bytes on Linux and 104 on macOS, the closing zero included (unix(7))."""

MAX_LINE = 16 * MIB
"""No answer is nearly as long: what is longer is none."""


class Qmp:
    """A connection to one QEMU's monitor. Monitors serve one client at a time: connecting waits for its turn."""

    def __init__(self, path: Path, deadline: Deadline) -> None:
        """Connect and negotiate. Raises MachineError when nobody answers before the deadline."""
        self._deadline = deadline
        self._heard = bytearray()
        self._asked = 0
        try:
            self._socket = connect_unix(path, deadline)
            try:
                self._read()  # its greeting
                self._ask("qmp_capabilities", {})
            except BaseException:
                self._socket.close()
                raise
        except (OSError, ValueError) as error:
            raise MachineError("QEMU's monitor does not answer", details=f"{path}: {error}") from error

    def __enter__(self) -> Qmp:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def execute(self, command: str, **arguments: object) -> Any:
        """Run a QMP command and return what it returns. Raises MachineError when QEMU refuses or goes away."""
        return self._execute(command, arguments)

    def hmp(self, line: str) -> str:
        """Run a command of the human monitor and return its text."""
        return str(self.execute("human-monitor-command", **{"command-line": line}))

    def send_file(self, name: str, handle: int) -> None:
        """Hand QEMU an open file, by a name for use in later commands. Raises MachineError."""
        self._execute("getfd", {"fdname": name}, [handle])

    def _execute(self, command: str, arguments: dict[str, object], handles: Sequence[int] = ()) -> Any:
        try:
            answer = self._ask(command, arguments, handles)
        except (OSError, ValueError) as error:
            raise MachineError(f"QEMU did not answer {command}", details=str(error)) from error
        if "error" in answer:
            raise MachineError(f"QEMU refused {command}", details=str(answer["error"].get("desc", answer["error"])))
        return answer["return"]

    def _ask(self, command: str, arguments: dict[str, object], handles: Sequence[int] = ()) -> dict[str, Any]:
        """Return the answer to a command, of a `return` or an `error`. Raises OSError or ValueError."""
        self._asked += 1
        line = json.dumps({"execute": command, "arguments": arguments, "id": self._asked}).encode() + b"\n"
        self._limit()
        if handles:
            socket.send_fds(self._socket, [line], handles)  # a line this short goes as one
        else:
            self._socket.sendall(line)
        while True:
            answer = self._read()
            if answer.get("id") == self._asked and ("return" in answer or "error" in answer):
                return answer

    def _read(self) -> dict[str, Any]:
        """Return the next thing that QEMU says. Raises OSError, as TimeoutError when it is late, or ValueError."""
        while (end := self._heard.find(b"\n")) < 0:
            if len(self._heard) > MAX_LINE:
                raise ValueError("a line without an end")
            self._limit()
            data = self._socket.recv(65536)
            if not data:
                raise ConnectionError("it has closed the connection")
            self._heard += data
        line = bytes(self._heard[:end])
        del self._heard[: end + 1]
        said = json.loads(line)
        if not isinstance(said, dict):
            raise ValueError(f"not an object: {line[:100]!r}")
        return said

    def _limit(self) -> None:
        self._socket.settimeout(max(self._deadline.remaining_s(), 0.001))  # zero would mean: do not block at all


def connect_unix(path: Path, deadline: Deadline) -> socket.socket:
    """Return a blocking socket connected to a Unix socket, however long its path. Raises OSError.

    The deadline counts here too: with others in the queue of a monitor, connecting itself blocks.
    """
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        client.settimeout(max(deadline.remaining_s(), 0.001))  # zero would mean: do not block at all
        if len(str(path).encode()) < MAX_SOCKET_PATH:
            client.connect(str(path))
        else:
            with tempfile.TemporaryDirectory(prefix="vmbuild-") as short:
                link = Path(short) / "m"
                link.symlink_to(path.parent)
                client.connect(str(link / path.name))
        client.settimeout(None)
    except BaseException:
        client.close()
        raise
    return client
