"""Who comes while a machine is moved to another QEMU: it is waited for, and nobody is told that it is suspended."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.unit.guest.fakes import FakeSession, Reply
from vmbuild import operate, reach, start
from vmbuild.deadline import Deadline
from vmbuild.errors import GuestError, MachineError, SuspendedError
from vmbuild.guest.session import Session
from vmbuild.machine import control, lifetime, ports
from vmbuild.machine.files import MachineFiles
from vmbuild.model import Home, MachineRequest
from vmbuild.report import SilentReporter

REQUEST = MachineRequest("box", 2, 2048, 1 << 30, "debian-13-arm64", timeout_s=20.0)


@pytest.fixture
def files(home: Home) -> MachineFiles:
    """The files of a machine that runs."""
    operate.up(REQUEST, home, SilentReporter())
    return MachineFiles.at(home.state, "box")


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> FakeSession:
    session = FakeSession((("sh",), Reply()))
    monkeypatch.setattr(reach, "connect", lambda *_: session)
    return session


def moved(files: MachineFiles, home: Home, held: threading.Event) -> None:
    """Suspend a machine and go on with it in another QEMU, as a renewal does."""
    with lifetime.lock(files, SilentReporter()):
        kept = lifetime.suspend(files, Deadline.after(20))
        held.set()
        time.sleep(0.3)
        spec, qemu = start.fit_again(files, home)
        start.wake(kept, spec, qemu, files, Deadline.after(20), SilentReporter()).close()


@pytest.fixture
def moving(home: Home, files: MachineFiles) -> Callable[[], threading.Thread]:
    def begin() -> threading.Thread:
        held = threading.Event()
        mover = threading.Thread(target=moved, args=(files, home, held))
        mover.start()
        assert held.wait(20)
        return mover

    return begin


def test_a_machine_that_is_moved_is_waited_for(
    home: Home, files: MachineFiles, session: FakeSession, moving: Callable[[], threading.Thread]
) -> None:
    mover = moving()
    with reach.running_session("box", home) as found:
        assert found is session
        assert lifetime.status(files).state == "running"
    mover.join()
    mover = moving()
    lifetime.check_running(reach.at_rest("box", home))
    mover.join()


@pytest.mark.parametrize("has_ended", [False, True])
def test_a_connection_that_a_move_has_cut_off_is_made_again(
    home: Home,
    files: MachineFiles,
    session: FakeSession,
    moving: Callable[[], threading.Thread],
    monkeypatch: pytest.MonkeyPatch,
    has_ended: bool,
) -> None:
    movers: list[threading.Thread] = []

    def connect(*_: object) -> Session:
        if not movers:
            movers.append(moving())
            if has_ended:
                movers[0].join()
            raise GuestError("it hung up")
        return session

    monkeypatch.setattr(reach, "connect", connect)
    with reach.running_session("box", home) as found:
        assert found is session
    movers[0].join()


def test_a_guest_that_wakes_up_is_not_reached_and_waited_for(
    home: Home, files: MachineFiles, session: FakeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs already, and is about to end the SSH server that it was saved with."""
    woken = threading.Event()

    def wait_for(*_: object) -> None:
        assert lifetime.status(files).state == "running"
        assert lifetime.status(files).ssh_port is None
        woken.set()
        time.sleep(0.5)

    monkeypatch.setattr(control, "wait_for", wait_for)
    mover = threading.Thread(target=moved, args=(files, home, threading.Event()))
    mover.start()
    assert woken.wait(20)
    with reach.running_session("box", home):
        assert lifetime.status(files).ssh_port is not None
    mover.join()


def test_a_guest_that_nobody_opened_a_port_to_is_opened_by_up(
    home: Home, files: MachineFiles, session: FakeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who woke it up was killed."""
    ports.remove_forward(files, lifetime.status(files).ssh_port or 0)
    with pytest.raises(MachineError, match="no port leads") as told:
        reach.endpoint_of(files)
    assert "`vmbuild up --name box`" in str(told.value.resolution)
    operate.up(REQUEST, home, SilentReporter())
    assert reach.endpoint_of(files).port == lifetime.status(files).ssh_port


def test_a_qemu_that_is_silent_while_it_is_worked_on_is_waited_for(
    home: Home, files: MachineFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has just been told to end, or has not opened its monitor yet."""
    real, answers = lifetime.status, ["broken", "broken", "running"]
    monkeypatch.setattr(lifetime, "status", lambda files: replace(real(files), state=answers.pop(0)))
    with lifetime.lock(files, SilentReporter()):
        assert reach.running("box", home) == files
    assert answers == []


def test_a_guest_that_never_answers_a_command_that_works_on_it_is_given_up(
    home: Home, files: MachineFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def connect(*_: object) -> Session:
        asked.append(1)
        raise GuestError("nobody answers")

    monkeypatch.setattr(reach, "connect", connect)
    with (
        lifetime.lock(files, SilentReporter()),
        pytest.raises(GuestError),
        reach.running_session("box", home, limit_s=0.5),
    ):
        pass
    assert len(asked) > 1


def test_nobody_is_waited_for_who_does_not_work_on_it(home: Home, files: MachineFiles, session: FakeSession) -> None:
    operate.suspend("box", home, SilentReporter())
    begun = time.monotonic()
    with pytest.raises(SuspendedError), reach.running_session("box", home):
        pass
    assert time.monotonic() - begun < reach.MOVE_S / 2


def test_a_guest_that_does_not_answer_is_asked_once(
    home: Home, files: MachineFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def connect(*_: object) -> Session:
        asked.append(1)
        raise GuestError("nobody answers")

    monkeypatch.setattr(reach, "connect", connect)
    with pytest.raises(GuestError), reach.running_session("box", home):
        pass
    assert len(asked) == 1
