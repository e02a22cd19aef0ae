"""The live view goes on, whoever is silent, stops or comes."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.guest.fakes import FakeSession, Reply
from tests.unit.guest.test_resources import ANSWER
from tests.unit.machine.conftest import make_qemu, make_spec
from vmbuild import operate, process, watch
from vmbuild.deadline import Deadline
from vmbuild.errors import GuestError, MachineError, UsageError
from vmbuild.guest.session import Session
from vmbuild.machine import lifetime
from vmbuild.machine.files import MachineFiles
from vmbuild.model import Home
from vmbuild.report import SilentReporter

DELAY_S = 0.3
WELL = Reply(stdout=ANSWER)


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SETTLE_S", 0.05)
    monkeypatch.setattr(watch, "PATIENCE", 100.0)  # on a busy host too, all answers come in time


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """For who waits in vain."""
    monkeypatch.setattr(watch, "PATIENCE", 0.5)
    monkeypatch.setattr(watch, "PATIENCE_S", 1.0)


@pytest.fixture
def home(tmp_path: Path, programs: Path) -> Home:
    return Home(tmp_path / "cache", tmp_path / "state")


@pytest.fixture
def start(home: Home) -> Iterator[Callable[[str], MachineFiles]]:
    """Start a machine of the fake QEMU; all are gone at the end."""
    started: list[str] = []

    def start(name: str) -> MachineFiles:
        files = MachineFiles.at(home.state, name)
        spec = make_spec(home.state)
        lifetime.prepare(spec, files, explicit_disk=False)
        files.seed.write_bytes(bytes(512))
        lifetime.start(spec, files, make_qemu())
        started.append(name)
        return files

    yield start
    for name in started:
        operate.destroy(name, home, SilentReporter())


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[FakeSession]:
    """The sessions that were opened; each guest does well."""
    opened: list[FakeSession] = []

    def connect(files: MachineFiles, limit: Deadline) -> Session:
        opened.append(FakeSession((("sh",), WELL)))
        return opened[-1]

    monkeypatch.setattr(watch, "connect", connect)
    return opened


def test_a_round_tells_all_over_one_connection(
    home: Home, start: Callable[[str], MachineFiles], sessions: list[FakeSession]
) -> None:
    start("box")
    view = watch.watch("box", home, DELAY_S)
    for _ in range(3):
        shown = next(view)
        (reading,) = shown.machines
        assert abs(shown.at - time.time()) < 1
        assert (reading.machine.name, reading.machine.ssh_port) == ("box", 40222)
        assert reading.guest is not None and reading.guest.cpus_online == 2
        assert reading.cpu_percent is not None and 0 <= reading.cpu_percent < 200
        assert reading.uptime_s is not None and 0 < reading.uptime_s < 60
    assert [session.closed for session in sessions] == [0]
    view.close()
    assert [session.closed for session in sessions] == [1]


def test_cpu_use_is_counted_from_round_to_round(
    home: Home, start: Callable[[str], MachineFiles], sessions: list[FakeSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    start("box")
    begun = time.monotonic()
    monkeypatch.setattr(process, "cpu_seconds", lambda _: 1.5 * (time.monotonic() - begun))
    view = watch.watch("box", home, DELAY_S)
    for _ in range(2):
        assert next(view).machines[0].cpu_percent == pytest.approx(150, abs=5)


def test_another_qemu_of_the_same_name_begins_anew(
    home: Home, start: Callable[[str], MachineFiles], sessions: list[FakeSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = start("box")
    view = watch.watch("box", home, DELAY_S)
    next(view)
    lifetime.stop(files, Deadline.after(0))
    start("box")
    before, after = next(view).machines[0], next(view).machines[0]
    assert before.cpu_percent is None
    assert after.cpu_percent is not None


def test_machines_come_and_go(
    home: Home, start: Callable[[str], MachineFiles], sessions: list[FakeSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    view = watch.watch(None, home, DELAY_S)
    seen = [[each.machine.name for each in next(view).machines]]
    for step in (lambda: start("b"), lambda: start("a"), lambda: operate.destroy("b", home, SilentReporter())):
        step()
        seen.append([each.machine.name for each in next(view).machines])
    assert seen == [[], ["b"], ["a", "b"], ["a"]]
    assert [session.closed for session in sessions] == [1, 0]


def test_one_machine_alone_is_shown_by_its_name(
    home: Home, start: Callable[[str], MachineFiles], sessions: list[FakeSession]
) -> None:
    start("a")
    start("b")
    assert [each.machine.name for each in next(watch.watch("b", home, DELAY_S)).machines] == ["b"]


def test_a_broken_connection_is_made_anew(
    home: Home, start: Callable[[str], MachineFiles], sessions: list[FakeSession]
) -> None:
    start("box")
    view = watch.watch("box", home, DELAY_S)
    assert next(view).machines[0].guest is not None
    sessions[0].table = ((("sh",), Reply(error=GuestError("the connection broke"))),)
    assert next(view).machines[0].guest is None
    assert next(view).machines[0].guest is not None
    assert [session.closed for session in sessions] == [1, 0]


class HungSession(FakeSession):
    """Answers when it is closed, in vain."""

    def __init__(self) -> None:
        super().__init__()
        self.released = threading.Event()

    def run(self, *args: object, **options: object) -> int:
        self.released.wait(30)
        raise GuestError("the connection to the guest broke")

    def close(self) -> None:
        self.released.set()


@pytest.mark.usefixtures("impatient")
def test_a_guest_that_hangs_holds_up_nobody(
    home: Home, start: Callable[[str], MachineFiles], monkeypatch: pytest.MonkeyPatch
) -> None:
    start("hangs")
    start("well")
    opened: list[str] = []

    def connect(files: MachineFiles, limit: Deadline) -> Session:
        opened.append(files.name)
        return HungSession() if files.name == "hangs" else FakeSession((("sh",), WELL))

    monkeypatch.setattr(watch, "connect", connect)
    view = watch.watch(None, home, DELAY_S)
    next(view)
    begun = time.monotonic()
    for _ in range(2):
        hung, well = next(view).machines
        assert (hung.machine.state, hung.guest) == ("running", None)
        assert hung.cpu_percent is not None
        assert well.guest is not None
    assert time.monotonic() - begun < 10
    assert sorted(opened) == ["hangs", "well"]
    view.close()


@pytest.mark.usefixtures("impatient")
def test_a_qemu_that_stands_still_is_silent_and_holds_up_nobody(
    home: Home, start: Callable[[str], MachineFiles], sessions: list[FakeSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = lifetime.status(start("still")).pid
    assert pid is not None
    start("well")
    monkeypatch.setattr(lifetime, "ANSWER_S", 2.0)
    monkeypatch.setattr(lifetime, "QUIT_S", 0.2)
    os.kill(pid, signal.SIGSTOP)
    view = watch.watch(None, home, DELAY_S)
    still, well = next(view).machines
    assert (still.machine.state, still.machine.pid, still.guest) == ("silent", pid, None)
    assert still.machine.rss_bytes and still.cpu_percent == 0
    assert well.guest is not None
    assert len(sessions) == 1


def test_a_paused_guest_is_not_asked(
    home: Home, start: Callable[[str], MachineFiles], sessions: list[FakeSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_QEMU_STATUS", "io-error")
    start("box")
    (reading,) = next(watch.watch(None, home, DELAY_S)).machines
    assert (reading.machine.state, reading.guest) == ("paused", None)
    assert sessions == []


def test_only_a_machine_that_runs_can_be_watched(home: Home, start: Callable[[str], MachineFiles]) -> None:
    with pytest.raises(UsageError, match="no machine named nobody"):
        next(watch.watch("nobody", home, DELAY_S))
    lifetime.stop(start("box"), Deadline.after(0))
    with pytest.raises(MachineError, match="not running"):
        next(watch.watch("box", home, DELAY_S))


def test_an_answer_grows_old(monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Semaphore(1)
    asked: list[int] = []

    def question() -> int:
        asked.append(1)
        go.acquire()
        return len(asked)

    latest = watch.Latest(question)
    assert latest.get(Deadline.after(5)) is None
    latest.ask()
    assert latest.get(Deadline.after(5)) == 1
    latest.ask()
    latest.ask()  # it is being asked
    assert latest.get(Deadline.after(0.05)) == 1
    monkeypatch.setattr(watch, "STALE_S", 0.0)
    assert latest.get(Deadline.after(0.05)) is None
    monkeypatch.setattr(watch, "STALE_S", 10.0)
    go.release()
    assert latest.get(Deadline.after(5)) == 2
