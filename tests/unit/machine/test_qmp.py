"""The monitor: what it answers, what it refuses, and waiting for it."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.unit.machine.conftest import make_qemu, make_spec, soon
from vmbuild.deadline import Deadline
from vmbuild.errors import MachineError
from vmbuild.machine import lifetime
from vmbuild.machine.files import MachineFiles
from vmbuild.machine.qmp import MAX_LINE, Qmp


def test_commands_and_the_human_monitor(running: MachineFiles) -> None:
    with Qmp(running.qmp, soon()) as qmp:
        assert qmp.execute("query-status")["status"] == "running"
        assert "HOST_FORWARD" in qmp.hmp("info usernet")
        with pytest.raises(MachineError, match="QEMU refused no-such") as caught:
            qmp.execute("no-such")
        assert "has not been found" in caught.value.details
        assert qmp.execute("query-status")["running"]  # a refusal ends nothing


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="does not answer"):
        Qmp(tmp_path / "qmp.sock", soon())


def test_the_next_client_waits_for_its_turn(running: MachineFiles) -> None:
    first = Qmp(running.qmp, soon())
    first.__enter__()
    leave = threading.Timer(0.5, lambda: None)
    leave.start()
    with pytest.raises(MachineError, match="does not answer"):
        Qmp(running.qmp, Deadline.after(0.2))
    leave.join()
    first.__exit__(None, None, None)
    with Qmp(running.qmp, soon()) as qmp:
        assert qmp.execute("query-status")["running"]


def test_a_monitor_whose_queue_is_full_costs_no_more_than_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "qmp.sock"
    begun = time.monotonic()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen(0)
        waiting = [socket.socket(socket.AF_UNIX) for _ in range(3)]
        for client in waiting:
            client.setblocking(False)
            client.connect_ex(str(path))
        with pytest.raises(MachineError, match="does not answer"):
            Qmp(path, Deadline.after(0.3))
        for client in waiting:
            client.close()
    assert time.monotonic() - begun < 2


@contextmanager
def monitor(path: Path, *pieces: bytes) -> Iterator[None]:
    """A monitor that greets, takes the negotiation, and then says these pieces whatever it is asked."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()

        def serve() -> None:
            client, _ = server.accept()
            with client, suppress(OSError):  # who has heard enough hangs up
                client.sendall(b'{"QMP": {}}\n')
                client.recv(4096)
                client.sendall(b'{"return": {}, "id": 1}\n')
                client.recv(4096)
                for piece in pieces:
                    client.sendall(piece)
                    time.sleep(0.05)

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join()


def test_an_answer_comes_in_pieces_among_events_and_answers_that_were_late(tmp_path: Path) -> None:
    events = b'{"event": "STOP", "data": {"return": 1}}\n{"return": "of another", "id": 1}\n'
    with (
        monitor(tmp_path / "m", events + b'{"retu', b'rn": {"a": 1}, "i', b'd": 2}\n{"event": "RESUME"}\n'),
        Qmp(tmp_path / "m", soon()) as qmp,
    ):
        assert qmp.execute("query-a") == {"a": 1}


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b"", "has closed the connection"),
        (b"half a line", "has closed the connection"),
        (b"no JSON\n", "Expecting value"),
        (b"[1]\n", "not an object"),
        (b"x" * (MAX_LINE + 65536), "a line without an end"),
    ],
)
def test_what_is_no_answer_is_an_error(tmp_path: Path, said: bytes, why: str) -> None:
    with (
        monitor(tmp_path / "m", said),
        Qmp(tmp_path / "m", soon()) as qmp,
        pytest.raises(MachineError, match="QEMU did not answer query-a") as caught,
    ):
        qmp.execute("query-a")
    assert why in caught.value.details


def test_a_deep_state_folder(tmp_path: Path, programs: Path) -> None:
    files = MachineFiles.at(tmp_path / ("d" * 60) / ("e" * 60), "box")
    lifetime.prepare(make_spec(tmp_path), files, explicit_disk=False)
    lifetime.start(make_spec(tmp_path), files, make_qemu())
    assert len(str(files.qmp)) > 120
    with Qmp(files.qmp, soon()) as qmp:
        assert qmp.execute("query-status")["running"]
    lifetime.stop(files, soon())


def test_a_qemu_that_stands_still_or_dies_is_said(running: MachineFiles) -> None:
    pid = lifetime.status(running).pid
    assert pid is not None
    with Qmp(running.qmp, Deadline.after(1.0)) as qmp:
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(MachineError, match="QEMU did not answer query-status"):
            qmp.execute("query-status")
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(MachineError):
        Qmp(running.qmp, soon())
