"""A build that runs by itself: who follows it, over how many connections, and what ends it and what does not."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.building import IMAGE, METADATA, Guest
from tests.unit.guest.fakes import Reply
from tests.unit.listener import Listener
from vmbuild import follow, record, renew
from vmbuild.deadline import Deadline
from vmbuild.errors import (
    BuildError,
    GuestError,
    HostError,
    HungUp,
    MachineError,
    StalledError,
    SuspendedError,
    TimeIsUp,
    UsageError,
    VmbuildError,
)
from vmbuild.follow import Running, Watch
from vmbuild.guest import job
from vmbuild.guest.session import ConnectionLostError, WrongHostKeyError
from vmbuild.lock import hold, is_free
from vmbuild.machine.files import MachineFiles
from vmbuild.model import BuildResult, Home
from vmbuild.record import BuildRecord
from vmbuild.report import SilentReporter

OUTPUT = b"#1 [internal] load\n#2 RUN make\n#3 DONE 1.0s\n"
FAILED = b' > [2/2] RUN make:\nERROR: process "/bin/sh -c make" did not complete successfully: exit code: 2\n'


class Show(Listener):
    """Remembers what the build wrote, too."""

    def __init__(self) -> None:
        super().__init__()
        self.shown = bytearray()

    def output(self, data: bytes) -> None:
        self.shown.extend(data)


class Looker(Watch):
    """Counts, and raises at one of its looks."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.looks = self.words = 0
        self._error = error

    def heard(self) -> None:
        self.words += 1

    def tick(self) -> None:
        self.looks += 1
        if self._error is not None and self.looks == 3:
            raise self._error


@pytest.fixture
def home(tmp_path: Path) -> Home:
    MachineFiles.at(tmp_path / "state", "box").folder.mkdir(parents=True)
    return Home(tmp_path / "cache", tmp_path / "state")


@pytest.fixture
def files(home: Home) -> MachineFiles:
    return MachineFiles.at(home.state, "box")


@pytest.fixture
def first(files: MachineFiles, tmp_path: Path) -> BuildRecord:
    """A build that runs in the machine."""
    cwd = tmp_path / "where it was asked for"
    (cwd / "out").mkdir(parents=True)
    made = BuildRecord(
        "/w/first", ("a:1",), ("type=docker,dest=out/a.tar",), "iid", "out/meta", False, str(cwd), 12, 3.5, 100.0
    )
    record.save(files.builds, made)
    return made


@pytest.fixture
def second(files: MachineFiles, first: BuildRecord) -> BuildRecord:
    """Another one, that was started later."""
    made = replace(first, folder="/w/second", tags=("b:1", "b:2"), outputs=(), iidfile=None, started_at=200.0)
    record.save(files.builds, made)
    return made


@pytest.fixture
def guest(monkeypatch: pytest.MonkeyPatch) -> Guest:
    """The guest in which it runs."""
    found = Guest(output=OUTPUT)

    @contextmanager
    def running_session(name: str, home: Home) -> Iterator[Guest]:
        assert name == "box"
        yield found

    monkeypatch.setattr(follow, "running_session", running_session)
    monkeypatch.setattr(follow, "RECONNECT_S", 5.0)
    return found


Attach = Callable[..., BuildResult | None]


@pytest.fixture
def attach(home: Home, guest: Guest) -> Attach:
    def do(build_id: str | None = None, *, report: Listener | None = None, watch: Watch | None = None) -> Any:
        return follow.attach("box", build_id, home, report or Show(), stdout=io.BytesIO(), watch=watch or Watch())

    return do


def assert_left_running(guest: Guest, files: MachineFiles, build: BuildRecord) -> None:
    """See that a build was neither ended nor forgotten, and that another may follow it."""
    assert guest.removed() == []
    assert build in record.load_all(files.builds)
    assert is_free(record.lock_file(files.builds, build))
    assert list((Path(build.cwd) / "out").iterdir()) == []


# Which build.


def test_there_is_no_machine(home: Home) -> None:
    with pytest.raises(UsageError, match="no machine named other"):
        follow.attach("other", None, home, SilentReporter(), stdout=io.BytesIO(), watch=Watch())


def test_there_is_no_build(attach: Attach, files: MachineFiles) -> None:
    with pytest.raises(UsageError, match="the machine box has no build to attach to"):
        attach()


def test_the_one_that_runs_is_finished_as_its_command_would_have(
    attach: Attach, guest: Guest, files: MachineFiles, first: BuildRecord
) -> None:
    report, watch = Show(), Looker()
    result = attach(report=report, watch=watch)
    cwd = Path(first.cwd)
    assert result is not None
    assert (result.image_id, result.tags, result.output, result.context_bytes) == (IMAGE, ("a:1",), "out/a.tar", 12)
    assert result.output_bytes == (cwd / "out" / "a.tar").stat().st_size > 0
    assert (cwd / "iid").read_text() == IMAGE
    assert (cwd / "out" / "meta").read_text() == METADATA
    assert bytes(report.shown) == OUTPUT
    assert watch.words > 3
    assert watch.looks > 3
    assert guest.removed() == ["/w/first"]
    assert record.load_all(files.builds) == []
    assert list(files.builds.iterdir()) == []  # its lock is gone too


def test_one_of_several_has_to_be_chosen(
    attach: Attach, guest: Guest, files: MachineFiles, first: BuildRecord, second: BuildRecord
) -> None:
    with pytest.raises(UsageError, match="2 builds run in the machine box") as caught:
        attach()
    one, other = caught.value.details.splitlines()
    assert one.startswith("first  a:1, since ")
    assert other.startswith("second  b:1, b:2, since ")
    assert "--build ID" in caught.value.resolution
    with pytest.raises(UsageError, match="the machine box has no build third to attach to") as caught:
        attach("third")
    assert caught.value.details.splitlines() == [one, other]
    assert_left_running(guest, files, first)
    attach("second")
    assert guest.removed() == ["/w/second"]
    assert record.load_all(files.builds) == [first]


def test_one_that_went_down_with_its_machine_is_forgotten(
    attach: Attach, guest: Guest, files: MachineFiles, first: BuildRecord, second: BuildRecord
) -> None:
    guest.table = ((("test", "-e", "/w/first/log"), Reply(1)), *guest.table)
    assert attach() is not None  # one is left: nothing to choose
    assert guest.removed() == ["/w/second"]
    assert record.load_all(files.builds) == []
    record.save(files.builds, first)
    with pytest.raises(UsageError, match="no build to attach to"):
        attach()
    assert record.load_all(files.builds) == []


def test_a_guest_that_cannot_be_asked_forgets_no_build(
    attach: Attach, guest: Guest, files: MachineFiles, first: BuildRecord
) -> None:
    guest.gone = ConnectionLostError("the connection to the guest broke")
    with pytest.raises(GuestError):
        attach()
    assert record.load_all(files.builds) == [first]


def test_one_that_its_command_follows_is_only_shown(
    attach: Attach, guest: Guest, files: MachineFiles, first: BuildRecord
) -> None:
    report, watch = Show(), Looker()
    with hold(record.lock_file(files.builds, first), SilentReporter(), "follows this build"):
        assert attach(report=report, watch=watch) is None
    assert bytes(report.shown) == OUTPUT
    assert watch.looks > 3
    assert "The command that started this build follows it too" in report.steps[-1]
    assert_left_running(guest, files, first)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), HungUp(), TimeIsUp(), GuestError("no")], ids=repr)
def test_who_only_looks_on_ends_nothing(
    attach: Attach, guest: Guest, files: MachineFiles, first: BuildRecord, error: BaseException
) -> None:
    with (
        hold(record.lock_file(files.builds, first), SilentReporter(), "follows this build"),
        pytest.raises(type(error)),
    ):
        attach(watch=Looker(error))
    assert_left_running(guest, files, first)


def test_its_command_waits_for_another_that_follows_it(
    home: Home, guest: Guest, files: MachineFiles, first: BuildRecord
) -> None:
    report = Show()
    running = Running(first, files, guest)

    def to_the_end() -> None:
        follow.to_the_end(running, home, report, stdout=io.BytesIO(), watch=Watch())

    thread = threading.Thread(target=to_the_end, daemon=True)
    with hold(record.lock_file(files.builds, first), SilentReporter(), "follows this build"):
        thread.start()
        limit = Deadline.after(5)
        while not report.steps and not limit.passed:
            limit.sleep(0.01)
        assert report.steps == ["Waiting for another vmbuild that follows this build"]
        assert guest.calls == []
    thread.join(5)
    assert guest.removed() == ["/w/first"]


def test_quiet_is_as_its_command_wanted_it(
    attach: Attach, guest: Guest, files: MachineFiles, first: BuildRecord
) -> None:
    record.save(files.builds, replace(first, quiet=True))
    report = Show()
    attach(report=report)
    assert bytes(report.shown) == b""
    record.save(files.builds, replace(first, quiet=True))
    guest.code, guest.output = 1, FAILED
    with pytest.raises(BuildError, match="RUN make failed with exit code 2"):
        attach(report=report)
    assert bytes(report.shown) == FAILED


# Over how many connections.


def test_a_lost_connection_loses_and_repeats_nothing(
    attach: Attach, guest: Guest, files: MachineFiles, first: BuildRecord
) -> None:
    guest.endings = [10, 10, 0, 31]  # lost after so many bytes: at once again, and even before any
    report = Show()
    assert attach(report=report) is not None
    assert bytes(report.shown) == OUTPUT
    assert [call.argv[3] for call in guest.ran(job.PROGRAM, "follow")] == ["0", "10", "10", "10", "31"]
    assert guest.reopened == len(report.warnings) == 4
    assert "the build goes on" in report.warnings[0]
    assert guest.removed() == ["/w/first"]


def test_what_was_heard_counts_though_it_is_not_shown(
    attach: Attach, guest: Guest, files: MachineFiles, first: BuildRecord
) -> None:
    record.save(files.builds, replace(first, quiet=True))
    guest.endings = [10]
    assert attach() is not None
    assert [call.argv[3] for call in guest.ran(job.PROGRAM, "follow")] == ["0", "10"]


def test_a_guest_has_some_time_to_let_us_in_again(
    attach: Attach, guest: Guest, files: MachineFiles, first: BuildRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest.endings = [10]
    guest.reopenings = [GuestError("the guest's SSH server does not answer")] * 2
    report = Show()
    assert attach(report=report) is not None
    assert (guest.reopened, len(report.warnings)) == (3, 1)
    assert bytes(report.shown) == OUTPUT


def test_a_guest_that_does_not_let_us_in_is_given_up_and_keeps_the_build(
    attach: Attach, guest: Guest, files: MachineFiles, first: BuildRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "RECONNECT_S", 0.1)
    guest.endings = [10]

    def cut(*_: object) -> None:
        guest.gone = GuestError("the guest's SSH server does not answer")

    monkeypatch.setattr(Show, "warn", cut)
    with pytest.raises(GuestError, match="does not answer"):
        attach()
    assert guest.reopened >= 2
    assert_left_running(guest, files, first)


@pytest.mark.parametrize(
    "error",
    [MachineError("not running"), SuspendedError("suspended"), HostError("disk full"), WrongHostKeyError("another's")],
    ids=repr,
)
def test_nobody_waits_in_vain_for_a_machine_that_is_not_there(
    attach: Attach,
    guest: Guest,
    files: MachineFiles,
    first: BuildRecord,
    monkeypatch: pytest.MonkeyPatch,
    error: VmbuildError,
) -> None:
    def cut(*_: object) -> None:
        guest.gone = error

    guest.endings = [10]
    monkeypatch.setattr(Show, "warn", cut)
    with pytest.raises(type(error)):
        attach()
    assert guest.reopened == 1
    assert_left_running(guest, files, first)


# What ends it, and what does not.


@pytest.mark.parametrize("error", [HungUp(), SuspendedError("suspended"), TimeIsUp()], ids=repr)
def test_what_leaves_a_build_running(
    attach: Attach, home: Home, guest: Guest, files: MachineFiles, first: BuildRecord, error: BaseException
) -> None:
    with pytest.raises(type(error)):
        attach(watch=Looker(error))
    assert_left_running(guest, files, first)
    running = Running(first, files, guest)
    with pytest.raises(type(error)):
        follow.to_the_end(running, home, SilentReporter(), stdout=io.BytesIO(), watch=Looker(error))
    assert_left_running(guest, files, first)
    assert attach() is not None  # another finishes it


def test_hung_up_while_the_image_is_brought_back_it_can_be_fetched_again(
    attach: Attach, guest: Guest, files: MachineFiles, first: BuildRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang_up(*_: object) -> int:
        raise HungUp

    with monkeypatch.context() as patch, pytest.raises(HungUp):
        patch.setattr(follow.archive, "write_archive", hang_up)  # type: ignore[attr-defined]
        attach()
    assert_left_running(guest, files, first)
    assert attach() is not None


@pytest.mark.parametrize("error", [KeyboardInterrupt(), StalledError("stands still"), HostError("no"), ValueError()])
def test_what_ends_a_build(
    attach: Attach, home: Home, guest: Guest, files: MachineFiles, first: BuildRecord, error: BaseException
) -> None:
    guest.table = ((("ps",), Reply()), *guest.table)
    with pytest.raises(BuildError if isinstance(error, StalledError) else type(error)):
        attach(watch=Looker(error))
    assert guest.removed() == ["/w/first"]
    assert record.load_all(files.builds) == []
    assert list((Path(first.cwd) / "out").iterdir()) == []


def test_a_build_that_fails_is_over(attach: Attach, guest: Guest, files: MachineFiles, first: BuildRecord) -> None:
    guest.code, guest.output = 1, FAILED
    with pytest.raises(BuildError, match="RUN make failed with exit code 2"):
        attach()
    assert guest.removed() == ["/w/first"]
    assert record.load_all(files.builds) == []
    assert not (Path(first.cwd) / "iid").exists()


@pytest.mark.parametrize("error", [MachineError("the machine box is not running"), HostError("it waits for room")])
def test_a_guest_that_is_gone_keeps_the_build(
    attach: Attach, guest: Guest, files: MachineFiles, first: BuildRecord, error: VmbuildError
) -> None:
    class Gone(Watch):
        def tick(self) -> None:
            guest.gone = error
            raise error

    with pytest.raises(type(error)):
        attach(watch=Gone())
    assert_left_running(guest, files, first)


@pytest.mark.parametrize("error", [MachineError("gone"), SuspendedError("suspended"), GuestError("lost")], ids=repr)
def test_a_build_that_is_done_is_one_though_its_guest_goes_at_this_moment(
    attach: Attach,
    guest: Guest,
    files: MachineFiles,
    first: BuildRecord,
    monkeypatch: pytest.MonkeyPatch,
    error: VmbuildError,
) -> None:
    real = follow.archive.write_archive  # type: ignore[attr-defined]

    def write_and_go(*arguments: Any) -> Any:
        size = real(*arguments)
        guest.gone = error
        return size

    monkeypatch.setattr(follow.archive, "write_archive", write_and_go)  # type: ignore[attr-defined]
    result = attach()
    assert result is not None
    assert (Path(first.cwd) / "out" / "a.tar").stat().st_size == result.output_bytes


@pytest.mark.parametrize(
    "change",
    [
        {"outputs": ("type=docker,dest=none/a.tar",)},
        {"outputs": ("type=docker,dest=out",)},
        {"iidfile": "none/iid"},
        {"metadata_file": "none/meta"},
    ],
    ids=str,
)
def test_a_place_that_cannot_be_written_costs_no_build(
    attach: Attach, guest: Guest, files: MachineFiles, first: BuildRecord, change: dict[str, Any]
) -> None:
    """Its folder may have gone since it was started, or never have been on this host."""
    elsewhere = replace(first, **change)
    record.save(files.builds, elsewhere)
    with pytest.raises(UsageError, match="cannot write"):
        attach()
    assert_left_running(guest, files, elsewhere)
    assert guest.ran(job.PROGRAM) == []
    Path(first.cwd, "none").mkdir()
    if change != {"outputs": ("type=docker,dest=out",)}:
        assert attach() is not None


# What is said of one that stands still.


def test_one_that_stands_still_is_told_with_what_its_guest_does(
    attach: Attach, guest: Guest, files: MachineFiles, first: BuildRecord
) -> None:
    files.console_log.write_text("booted\nINFO: task blocked\n")
    guest.table = ((("ps",), Reply(stdout=b"PID STAT COMMAND\n 7 D cc1\n")), *guest.table)
    stalled = StalledError("the build has said nothing for 900 s", resolution="--stall-timeout sets it")
    with pytest.raises(BuildError, match="said nothing for 900 s") as caught:
        attach(watch=Looker(stalled))
    assert not isinstance(caught.value, StalledError)
    assert caught.value.details.splitlines() == ["PID STAT COMMAND", " 7 D cc1", "", "booted", "INFO: task blocked"]
    assert caught.value.resolution == stalled.resolution


def test_a_guest_that_stands_still_with_it_cannot_be_asked_and_keeps_it(
    attach: Attach, guest: Guest, files: MachineFiles, first: BuildRecord
) -> None:
    files.console_log.write_text("the last words\n")

    class Stalled(Watch):
        def tick(self) -> None:
            guest.gone = GuestError("a command in the guest did not end in time")
            raise StalledError("the build has said nothing")

    with pytest.raises(BuildError) as caught:
        attach(watch=Stalled())
    assert caught.value.details == "The guest cannot be asked what it does.\nthe last words"
    assert record.load_all(files.builds) == [first]


def test_results_are_json_that_can_be_read(attach: Attach, guest: Guest, first: BuildRecord) -> None:
    attach()
    assert json.loads((Path(first.cwd) / "out" / "meta").read_text())["containerimage.digest"] == IMAGE


def test_its_machine_may_be_renewed_after_it(
    attach: Attach, files: MachineFiles, first: BuildRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[BuildRecord]] = []
    monkeypatch.setattr(renew, "start_later", lambda *_: seen.append(record.load_all(files.builds)))
    attach()
    assert seen == [[]]  # when it is forgotten
