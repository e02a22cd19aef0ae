"""A machine that goes on in a new QEMU: when that is done, when not, and what stays as it was."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from threading import Timer
from typing import Any

import pytest

from tests.unit.guest.fakes import FakeSession, Reply
from tests.unit.listener import Listener
from vmbuild import operate, process, record, renew, start
from vmbuild.cli import program
from vmbuild.deadline import Deadline
from vmbuild.errors import MachineError
from vmbuild.image import store
from vmbuild.lock import hold
from vmbuild.machine import lifetime, ports
from vmbuild.machine.files import MachineFiles
from vmbuild.machine.ports import Forward
from vmbuild.model import MIB, Freed, Home, MachineRequest
from vmbuild.record import BuildRecord
from vmbuild.report import SilentReporter

REQUEST = MachineRequest("box", 2, 2048, 1 << 30, "debian-13-arm64", timeout_s=20.0)
MUCH = str(renew.WORTH_BYTES)
BUILD = BuildRecord("/disk/w", (), (), None, None, False, "/", 0, 0.0, 0.0)
CONNECTION = "  TCP[ESTABLISHED]   15       127.0.0.1 40222       10.0.2.15    22     0     0\n"


@pytest.fixture
def files(home: Home, monkeypatch: pytest.MonkeyPatch) -> MachineFiles:
    """The files of a machine whose QEMU has held and translated much."""
    monkeypatch.setattr(renew, "LOOK_S", 0.05)
    monkeypatch.setattr(renew, "LEAVE_S", 0.3)
    monkeypatch.setattr(renew, "LARGE_BYTES", 1)
    with monkeypatch.context() as patch:
        patch.setenv("FAKE_QEMU_JIT", MUCH)
        with start.open_session(REQUEST, home, SilentReporter()):
            pass
    return MachineFiles.at(home.state, "box")


@pytest.fixture(autouse=True)
def guest(monkeypatch: pytest.MonkeyPatch) -> FakeSession:
    session = FakeSession((("sh",), Reply()))

    @contextmanager
    def running_session(*_: object) -> Iterator[FakeSession]:
        yield session

    monkeypatch.setattr(renew, "running_session", running_session)
    return session


def pid_of(files: MachineFiles) -> int:
    found = lifetime.find_pid(files)
    assert found is not None
    return found


def is_running(files: MachineFiles) -> bool:
    return lifetime.status(files).state == "running"


def use(files: MachineFiles, user: str) -> None:
    """Have somebody use a machine."""
    if user == "a terminal on its console":
        (files.folder / "attached").touch()
    else:
        (files.folder / "connections").write_text(CONNECTION * int(user.partition(" ")[0]))


USERS = ("a terminal on its console", "1 network connection", "2 network connections")


def test_an_idle_machine_goes_on_in_another_qemu(home: Home, files: MachineFiles) -> None:
    before, disk = pid_of(files), files.disk.read_bytes()
    assert renew.renew_when_idle("box", home)
    assert pid_of(files) != before
    assert is_running(files)
    assert (files.folder / "orders").read_text().startswith("go_on ")
    assert not process.is_alive(before)
    assert not files.suspension.exists()
    assert not files.memory.exists()
    assert files.disk.read_bytes() == disk


def test_what_has_translated_little_is_left_alone(home: Home, files: MachineFiles) -> None:
    assert renew.renew_when_idle("box", home)
    before = pid_of(files)  # this one has translated nothing
    assert not renew.renew_when_idle("box", home)
    assert pid_of(files) == before


def test_what_never_held_much_is_left_alone(home: Home, files: MachineFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next small build begins sooner with what this one translated."""
    monkeypatch.setattr(renew, "LARGE_BYTES", 1 << 40)
    before = pid_of(files)
    assert not renew.renew_when_idle("box", home)
    assert pid_of(files) == before


def test_the_cache_goes_first(home: Home, files: MachineFiles, guest: FakeSession) -> None:
    assert renew.renew_when_idle("box", home)
    assert "drop_caches" in str(guest.calls[0])


def test_a_build_that_nobody_follows_is_kept_and_in_no_way(home: Home, files: MachineFiles) -> None:
    """It may have ended long ago, and waits for an `attach` that never comes; one that waits for something goes on."""
    record.save(files.builds, BUILD)
    before = pid_of(files)
    assert renew.renew_when_idle("box", home)
    assert pid_of(files) != before
    assert record.load_all(files.builds) == [BUILD]
    renew.trim_memory("box", home, SilentReporter())
    assert record.load_all(files.builds) == [BUILD]


@pytest.mark.parametrize("user", USERS)
def test_nobody_is_cut_off(home: Home, files: MachineFiles, user: str) -> None:
    use(files, user)
    before = pid_of(files)
    assert renew.renew(files, home) == user
    assert pid_of(files) == before
    assert is_running(files)
    assert (files.folder / "talk").read_text().splitlines()[-1] != "stop"


def test_a_question_that_fails_does_not_leave_it_paused(
    home: Home, files: MachineFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def count_connections(_: str) -> int:
        raise MachineError("it said something else")

    monkeypatch.setattr(ports, "count_connections", count_connections)
    with pytest.raises(MachineError, match="something else"):
        renew.renew(files, home)
    assert is_running(files)


def test_connections_that_have_ended_are_nobody(home: Home, files: MachineFiles) -> None:
    (files.folder / "connections").write_text(CONNECTION.replace("ESTABLISHED", "TIME_WAIT") + "  UDP[8 sec] 1 2 3 4\n")
    assert renew.renew_when_idle("box", home)


def test_who_does_not_leave_is_not_waited_for_without_end_and_keeps_the_cache(
    home: Home, files: MachineFiles, guest: FakeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(renew, "PATIENCE_S", 0.3)
    use(files, "1 network connection")
    before = pid_of(files)
    assert not renew.renew_when_idle("box", home)
    assert pid_of(files) == before
    assert guest.calls == []


def test_a_guest_that_computes_is_not_idle(home: Home, files: MachineFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renew, "PATIENCE_S", 0.3)
    used = iter(range(1000))
    monkeypatch.setattr(process, "cpu_seconds", lambda _: float(next(used)))
    before = pid_of(files)
    assert not renew.renew_when_idle("box", home)
    assert pid_of(files) == before


def test_a_machine_that_another_command_works_on_is_left_to_it(
    home: Home, files: MachineFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(renew, "PATIENCE_S", 0.3)
    before = pid_of(files)
    with hold(files.lock, SilentReporter(), "tests"):
        assert not renew.renew_when_idle("box", home)
    assert pid_of(files) == before


def test_a_machine_that_went_down_meanwhile_stays_down(home: Home, files: MachineFiles) -> None:
    lifetime.stop(files, Deadline.after(0))
    assert not renew.renew_when_idle("box", home)
    assert lifetime.status(files).state == "stopped"


def test_a_machine_that_goes_down_while_it_is_watched_stays_down_and_is_watched_no_more(
    home: Home, files: MachineFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(renew, "LOOK_S", 600.0)
    Timer(0.3, lifetime.stop, (files, Deadline.after(0))).start()
    with pytest.raises(MachineError, match="not running"):
        renew.renew_when_idle("box", home)
    assert lifetime.status(files).state == "stopped"


def test_ports_stay_as_they_were(home: Home, files: MachineFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    ports.add_forward(files, Forward(8080, 80))
    monkeypatch.setenv("FAKE_QEMU_SSH_PORT", "40333")  # what the new one would choose
    renew.renew(files, home)
    assert lifetime.status(files).ssh_port == 40222
    assert ports.list_forwards(files) == [Forward(8080, 80)]


def test_a_port_that_another_program_took_is_given_up(
    home: Home, files: MachineFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    ports.add_forward(files, Forward(8080, 80))
    ports.add_forward(files, Forward(8081, 81))
    monkeypatch.setenv("FAKE_QEMU_TAKEN_PORT", "8080")
    renew.renew(files, home)
    assert ports.list_forwards(files) == [Forward(8081, 81)]
    monkeypatch.setenv("FAKE_QEMU_SSH_PORT", "40333")
    monkeypatch.setenv("FAKE_QEMU_TAKEN_PORT", "40222")
    renew.renew(files, home)
    assert lifetime.status(files).ssh_port == 40333


def test_what_could_not_go_on_is_not_stopped(home: Home, files: MachineFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "find_digest", lambda *_: None)
    before = pid_of(files)
    with pytest.raises(MachineError, match="not in the cache any more"):
        renew.renew(files, home)
    assert pid_of(files) == before
    assert "stop" not in (files.folder / "talk").read_text().split()


def test_a_saving_that_fails_lets_it_run_on(home: Home, files: MachineFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(*_: object) -> None:
        raise MachineError("no room", details="No space left on device")

    monkeypatch.setattr(lifetime, "save", save)
    before = pid_of(files)
    with pytest.raises(Exception, match="has no room"):
        renew.renew(files, home)
    assert pid_of(files) == before
    assert is_running(files)


def test_a_guest_that_does_not_wake_is_suspended(
    home: Home, files: MachineFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its memory is there, and `up` goes on with it."""
    with monkeypatch.context() as patch:
        patch.setenv("FAKE_QEMU_FAIL", "Cannot allocate memory")
        with pytest.raises(MachineError, match="QEMU did not start"):
            renew.renew(files, home)
    assert operate.status("box", home).state == "suspended"
    assert operate.up(REQUEST, home, SilentReporter()).state == "running"


def test_memory_is_given_back_on_demand(home: Home, files: MachineFiles, guest: FakeSession) -> None:
    report, before = Listener(), pid_of(files)
    freed = renew.trim_memory("box", home, report)
    assert (freed.what, freed.name) == ("memory", "box")
    assert freed.size_bytes >= 0
    assert "drop_caches" in str(guest.ran("sh"))
    assert pid_of(files) != before
    assert [line.partition(" ")[0] for line in report.heard] == ["Looking", "Giving", "Going"]


def test_who_is_leaving_is_waited_for(home: Home, files: MachineFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection is seen for a moment after its end, the longer the more the host has to do."""
    monkeypatch.setattr(renew, "LEAVE_S", 20.0)
    users = iter(["1 network connection", "1 network connection"])
    monkeypatch.setattr(renew, "_user", lambda *_: next(users, ""))
    before = pid_of(files)
    renew.trim_memory("box", home, SilentReporter())
    assert pid_of(files) != before


@pytest.mark.parametrize("user", USERS)
def test_on_demand_nobody_is_cut_off_either(home: Home, files: MachineFiles, guest: FakeSession, user: str) -> None:
    use(files, user)
    with pytest.raises(MachineError, match=f"used by {user}, which would be cut off"):
        renew.trim_memory("box", home, SilentReporter())
    assert not guest.ran("sh")
    assert is_running(files)


@pytest.mark.parametrize("flag", ["--memory", "--json"])
def test_the_command_says_what_it_gave_back(
    flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    freed = Freed("memory", "box", 300 * MIB)
    monkeypatch.setattr(renew, "trim_memory", lambda *_: freed)
    assert program.run(["trim", "box", "--memory", flag]) == 0
    said = capsys.readouterr()
    if flag == "--json":
        assert json.loads(said.out) == {"what": "memory", "name": "box", "size_bytes": 300 * MIB}
    else:
        assert said.err == "The memory of the machine box takes 300.0 MiB less.\n"


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What was begun in the background, and not in truth."""
    found: list[dict[str, Any]] = []

    @contextmanager
    def starting(argv: list[str], **options: Any) -> Iterator[Any]:
        found.append({"argv": argv[1:], **options})
        yield lambda: None

    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(process, "starting", starting)
    return found


def test_it_is_begun_in_the_background(home: Home, files: MachineFiles, begun: list[dict[str, Any]]) -> None:
    renew.start_later(files, home)
    assert begun[0]["argv"] == ["-m", "vmbuild", "trim", "box", "--memory", "--when-idle"]
    assert begun[0]["env"]["VMBUILD_STATE_DIR"] == str(home.state)
    assert begun[0]["env"]["VMBUILD_CACHE_DIR"] == str(home.cache)


def test_it_is_not_begun_where_the_guest_may_remember_secrets(
    home: Home, files: MachineFiles, begun: list[dict[str, Any]]
) -> None:
    """For a moment a renewal has the guest's memory on the host's disk."""
    secret = replace(BUILD, has_secrets=True)
    record.save(files.builds, secret)
    record.forget(files.builds, secret)
    renew.start_later(files, home)
    assert begun == []
    assert not renew.renew_when_idle("box", home)  # it had none yet when this was begun


def test_it_is_not_begun_where_little_comes_back(
    home: Home, files: MachineFiles, begun: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(renew, "WORTH_BYTES", renew.WORTH_BYTES + 1)
    renew.start_later(files, home)
    monkeypatch.setattr(renew, "WORTH_BYTES", 1)
    monkeypatch.setenv("CI", "true")
    renew.start_later(files, home)
    lifetime.stop(files, Deadline.after(0))
    monkeypatch.delenv("CI")
    renew.start_later(files, home)
    assert begun == []
