"""A small synchronous face on QMP. The only importer of qemu.qmp.

That, and asyncio, are loaded when it connects: QEMU, which has just been started, takes its time then too.
"""

from __future__ import annotations

import logging
import socket
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from vmbuild.deadline import Deadline
from vmbuild.errors import MachineError

MAX_SOCKET_PATH = 100
"""sockaddr_un holds 108 bytes on Linux and 104 on macOS, the closing zero included (unix(7))."""

logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL + 1)  # what fails here is raised, not logged


class Qmp:
    """A connection to one QEMU's monitor. Monitors serve one client at a time: connecting waits for its turn."""

    def __init__(self, path: Path, deadline: Deadline) -> None:
        """Connect and negotiate. Raises MachineError when nobody answers before the deadline."""
        import asyncio

        from qemu.qmp import ConnectError, QMPClient

        self._deadline = deadline
        self._loop = asyncio.new_event_loop()
        self._client = QMPClient("vmbuild")
        try:
            self._wait(self._client.connect(connect_unix(path, deadline)))
        except (OSError, ConnectError, TimeoutError) as error:
            self._loop.close()
            raise MachineError("QEMU's monitor does not answer", details=f"{path}: {error}") from error

    def __enter__(self) -> Qmp:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import asyncio

        from qemu.qmp import QMPError

        try:
            self._loop.run_until_complete(asyncio.wait_for(self._client.disconnect(), 2))
        except (QMPError, OSError, EOFError, TimeoutError):
            pass  # QEMU was quicker: it is gone
        finally:
            self._loop.close()

    def execute(self, command: str, **arguments: object) -> Any:
        """Run a QMP command and return what it returns. Raises MachineError when QEMU refuses or goes away."""
        from qemu.qmp import ExecuteError, QMPError

        try:
            return self._wait(self._client.execute(command, arguments or None))
        except ExecuteError as error:
            raise MachineError(f"QEMU refused {command}", details=str(error)) from error
        except (QMPError, OSError, EOFError, TimeoutError) as error:
            raise MachineError(f"QEMU did not answer {command}", details=str(error)) from error

    def hmp(self, line: str) -> str:
        """Run a command of the human monitor and return its text."""
        return str(self.execute("human-monitor-command", **{"command-line": line}))

    def send_file(self, name: str, handle: int) -> None:
        """Hand QEMU an open file, by a name for use in later commands. Raises MachineError."""
        from qemu.qmp import QMPError

        try:
            self._client.send_fd_scm(handle)
        except (QMPError, OSError) as error:
            raise MachineError("QEMU did not take a file", details=str(error)) from error
        self.execute("getfd", fdname=name)

    def _wait(self, work: Any) -> Any:
        import asyncio

        return self._loop.run_until_complete(asyncio.wait_for(work, self._deadline.remaining_s()))


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
