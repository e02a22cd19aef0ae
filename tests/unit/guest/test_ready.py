from __future__ import annotations

from collections.abc import Sequence

import pytest

from vmbuild.deadline import NEVER, Deadline
from vmbuild.errors import GuestError, MachineError
from vmbuild.guest.ready import CHECKS, wait_ready
from vmbuild.guest.session import Feed, Output, Session, WrongHostKeyError
from vmbuild.report import SilentReporter


class FakeSession:
    """Answers each probe with the next of its exit codes; the last one stays."""

    def __init__(self, **codes: list[int]) -> None:
        self.codes = codes
        self.asked: list[str] = []
        self.closed = False

    def run(
        self,
        argv: Sequence[str],
        *,
        feed: Feed | None = None,
        on_stdout: Output | None = None,
        on_stderr: Output | None = None,
        terminal: tuple[int, int] | None = None,
        deadline: Deadline = NEVER,
    ) -> int:
        for number, check in enumerate(CHECKS):
            if argv[-1] == check.probe:
                self.asked.append(check.description)
                codes = self.codes.get(f"check{number}", [0])
                return codes.pop(0) if len(codes) > 1 else codes[0]
        if on_stdout is not None:
            on_stdout(b"the log says why")
        return 0

    def close(self) -> None:
        self.closed = True


def alive() -> None:
    pass


def wait(session: FakeSession, seconds: float = 5) -> Session:
    return wait_ready(lambda _: session, alive, Deadline.after(seconds), SilentReporter())


def test_every_check_passes_in_order() -> None:
    session = FakeSession(check0=[1, 1, 0], check2=[1, 0])
    assert wait(session) is session
    assert list(dict.fromkeys(session.asked)) == [check.description for check in CHECKS]
    assert len(session.asked) == 6


def test_what_waiting_does_not_mend_fails_at_once() -> None:
    session = FakeSession(check1=[1])
    with pytest.raises(GuestError, match=CHECKS[1].description) as caught:
        wait(session, seconds=60)
    assert caught.value.details == "the log says why"
    assert caught.value.resolution == CHECKS[1].hint
    assert session.closed


def test_a_time_limit_names_the_check() -> None:
    with pytest.raises(GuestError, match="Docker answers") as caught:
        wait(FakeSession(check2=[1]), seconds=0.5)
    assert caught.value.resolution == CHECKS[2].hint


def test_it_tries_until_ssh_answers() -> None:
    tries = []
    session = FakeSession()

    def connect(_: Deadline) -> Session:
        tries.append(1)
        if len(tries) < 3:
            raise GuestError("not yet")
        return session

    assert wait_ready(connect, alive, Deadline.after(10), SilentReporter()) is session


def test_a_stranger_ends_it_at_once() -> None:
    def connect(_: Deadline) -> Session:
        raise WrongHostKeyError("a stranger")

    with pytest.raises(WrongHostKeyError):
        wait_ready(connect, alive, Deadline.after(60), SilentReporter())


def test_a_machine_that_is_gone_ends_it_at_once() -> None:
    def connect(_: Deadline) -> Session:
        raise GuestError("no answer")

    def gone() -> None:
        raise MachineError("QEMU ended")

    with pytest.raises(MachineError, match="QEMU ended"):
        wait_ready(connect, gone, Deadline.after(60), SilentReporter())
