from __future__ import annotations

import itertools
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from vmbuild.deadline import NEVER, Deadline
from vmbuild.errors import GuestError, MachineError
from vmbuild.guest import clock
from vmbuild.guest.ready import CHECKS, WAIT, wait_ready
from vmbuild.guest.session import Feed, Output, Session, Tick, WrongHostKeyError
from vmbuild.report import SilentReporter


class FakeSession:
    """Answers each probe with the next of its exit codes; the last one stays."""

    def __init__(self, **codes: list[int]) -> None:
        self.codes = codes
        self.asked: list[str] = []
        self.clock = 0
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
        on_tick: Tick | None = None,
    ) -> int:
        if argv[2].startswith(clock.SCRIPT):
            self.clock = int(argv[-1])
            assert all(check.probe in argv[2] for check in CHECKS[:2])
            return max(self.codes.get(f"check{number}", [0])[0] for number in (0, 1))
        for number, check in enumerate(CHECKS):
            if argv[-1] == check.probe:
                self.asked.append(check.description)
                codes = self.codes.get(f"check{number}", [0])
                return codes.pop(0) if len(codes) > 1 else codes[0]
        if on_stdout is not None:
            on_stdout(b"the log says why")
        return 0

    def reopen(self, deadline: Deadline) -> None:
        raise AssertionError("nobody connects again here")

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


def test_a_guest_that_has_long_been_up_is_asked_for_nothing_but_docker_again() -> None:
    session = FakeSession()
    wait(session)
    assert session.asked == [CHECKS[2].description]


def test_the_clock_is_set_first() -> None:
    session = FakeSession(check1=[1])
    with pytest.raises(GuestError, match="not ready"):
        wait(session)
    assert abs(session.clock - time.time()) < 5


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


class Refusing(FakeSession):
    """Raises this error for the program whose last word is `at`."""

    def __init__(self, at: str, error: Exception, **codes: list[int]) -> None:
        super().__init__(**codes)
        self.at = at
        self.error = error

    def run(
        self,
        argv: Sequence[str],
        *,
        feed: Feed | None = None,
        on_stdout: Output | None = None,
        on_stderr: Output | None = None,
        terminal: tuple[int, int] | None = None,
        deadline: Deadline = NEVER,
        on_tick: Tick | None = None,
    ) -> int:
        if argv[-1] == self.at:
            deadline.sleep(0.3)
            raise self.error
        return super().run(argv, on_stdout=on_stdout, on_stderr=on_stderr, deadline=deadline)


def test_every_row_says_what_to_do_and_no_two_are_the_same() -> None:
    assert len({check.description for check in CHECKS}) == len({check.probe for check in CHECKS}) == len(CHECKS) > 0
    for check in CHECKS:
        assert check.hint and check.log


def test_a_probe_that_hangs_until_the_time_limit_still_names_its_check() -> None:
    """The ping waits for Docker's answer: most often the limit passes within a probe, not between two."""
    session = Refusing(CHECKS[2].probe, GuestError("a command in the guest did not end in time"))
    with pytest.raises(GuestError, match="Docker answers") as caught:
        wait(session, seconds=0.2)
    assert caught.value.resolution == CHECKS[2].hint
    assert session.closed


def test_a_log_that_cannot_be_read_does_not_hide_the_check() -> None:
    session = Refusing(CHECKS[1].log, GuestError("the connection to the guest broke"), check1=[1])
    with pytest.raises(GuestError, match=CHECKS[1].description) as caught:
        wait(session)
    assert caught.value.resolution == CHECKS[1].hint


def test_a_machine_that_dies_during_a_probe_is_told_rather_than_the_broken_connection() -> None:
    session = Refusing(CHECKS[0].probe, GuestError("the connection to the guest broke"), check0=[1])
    asked = []

    def dies() -> None:
        asked.append(1)
        if len(asked) > 1:
            raise MachineError("QEMU ended")

    with pytest.raises(MachineError, match="QEMU ended"):
        wait_ready(lambda _: session, dies, Deadline.after(20), SilentReporter())
    assert session.closed


def test_a_machine_that_dies_between_two_probes_is_told() -> None:
    session = FakeSession(check0=[1])
    asked = []

    def dies() -> None:
        asked.append(1)
        if len(asked) > 2:
            raise MachineError("QEMU ended")

    with pytest.raises(MachineError, match="QEMU ended"):
        wait_ready(lambda _: session, dies, Deadline.after(20), SilentReporter())
    assert session.closed


def test_ssh_that_never_answers_ends_at_the_time_limit() -> None:
    def connect(_: Deadline) -> Session:
        raise GuestError("no answer")

    with pytest.raises(GuestError, match="no answer"):
        wait_ready(connect, alive, Deadline.after(0.5), SilentReporter())


def test_the_time_limit_is_handed_to_the_connection_and_to_each_probe() -> None:
    limit = Deadline.after(5)
    seen: list[Deadline] = []

    class Noting(FakeSession):
        def run(self, argv: Sequence[str], *, deadline: Deadline = NEVER, **rest: object) -> int:
            seen.append(deadline)
            return 1 if len(seen) == 2 else 0  # the guest is new: each check is asked by itself

    def connect(given: Deadline) -> Session:
        seen.append(given)
        return Noting()

    wait_ready(connect, alive, limit, SilentReporter())
    assert seen == [limit] * (2 + len(CHECKS))


@pytest.mark.parametrize(("seconds", "code"), [(0.3, 0), (30, 1)])
def test_the_guest_itself_tries_a_probe_for_a_second(tmp_path: Path, seconds: float, code: int) -> None:
    later = subprocess.Popen(["sh", "-c", f"sleep {seconds}; : >{tmp_path}/there"])
    begun = time.monotonic()
    done = subprocess.run(["sh", "-c", WAIT, "ready", f"test -e {tmp_path}/there"], check=False)
    later.kill()
    later.wait()
    assert done.returncode == code
    assert 0.2 < time.monotonic() - begun < 5


def test_a_guest_that_was_restored_is_asked_again_soon() -> None:
    """Of a guest that boots for seconds a log-in is not tried all the time."""
    tries = list[float]()

    def connect(_: Deadline) -> Session:
        tries.append(time.monotonic())
        raise GuestError("not yet")

    with pytest.raises(GuestError):
        wait_ready(connect, alive, Deadline.after(2), SilentReporter())
    pauses = [after - before for before, after in itertools.pairwise(tries)]
    assert pauses[0] < 0.15 < pauses[-2]
    assert len(tries) < 25


def test_ctrl_c_while_waiting_closes_the_session() -> None:
    class Interrupted(FakeSession):
        def run(self, argv: Sequence[str], **rest: object) -> int:
            raise KeyboardInterrupt

    session = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        wait(session)
    assert session.closed


def test_a_shell_can_read_every_probe_and_log() -> None:
    for check in CHECKS:
        for script in (check.probe, check.log):
            subprocess.run(["/bin/sh", "-n", "-c", script], check=True)
