"""A machine that is suspended: how it goes on, what it then is asked, and what all the commands make of it."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.listener import Listener
from tests.unit.machine.conftest import make_qemu, make_spec
from vmbuild import build, operate, process, start
from vmbuild.cli import program
from vmbuild.deadline import Deadline
from vmbuild.errors import GuestError, MachineError, SuspendedError, UsageError
from vmbuild.guest import ready
from vmbuild.guest.bases import Tagged
from vmbuild.machine import lifetime, migration, snapshot, suspension
from vmbuild.machine.files import MachineFiles
from vmbuild.machine.suspension import Suspension
from vmbuild.model import BaseResult, Home, MachineRequest
from vmbuild.report import SilentReporter

REQUEST = MachineRequest("box", 2, 2048, 1 << 30, "debian-13-arm64", timeout_s=20.0)


@pytest.fixture
def files(home: Home) -> MachineFiles:
    """The files of a machine that is suspended."""
    up(home)
    operate.suspend("box", home, SilentReporter())
    return MachineFiles.at(home.state, "box")


def up(home: Home, **changes: Any) -> list[str]:
    """Bring the machine up; return what was said."""
    report = Listener()
    with start.open_session(replace(REQUEST, **changes), home, report):
        pass
    assert operate.status("box", home).state == "running"
    return report.heard


def kept(files: MachineFiles) -> Suspension:
    found = suspension.find(files)
    assert found is not None
    return found


def seed_keys(files: MachineFiles) -> bytes:
    """Return the public key of the host that the guest is told."""
    text = files.client_key.with_name(files.client_key.name + ".pub").read_bytes()
    assert text in files.seed.read_bytes()
    return text


def test_up_goes_on_with_it(home: Home, files: MachineFiles) -> None:
    assert operate.status("box", home).state == "suspended"
    assert up(home) == ["Going on with the suspended machine box"]
    assert not files.suspension.exists()
    assert not files.memory.exists()
    assert up(home) == []  # it runs


def test_the_guest_has_its_order_before_it_runs(
    home: Home, files: MachineFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start.time, "time", lambda: 1234.6)  # type: ignore[attr-defined]
    up(home)
    # The fake QEMU keeps what lay in the pipe at the moment it was told `cont`.
    assert (files.folder / "orders").read_text() == "go_on 1235\n"
    assert "cont" in (files.folder / "talk").read_text().splitlines()


def test_the_guest_is_told_keys_that_are_there(home: Home, files: MachineFiles) -> None:
    """As on another host, whereto no key travels: new ones are made, and the seed has them."""
    before = seed_keys(files)
    for key in (files.client_key, files.host_key):
        key.unlink()
        key.with_name(key.name + ".pub").unlink()
    up(home)
    assert seed_keys(files) != before


def test_it_is_loaded_the_way_it_was_saved(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    files = MachineFiles.at(home.state, "box")
    with monkeypatch.context() as patch:
        patch.setenv("FAKE_QEMU_OLD", "1")
        up(home)
        operate.suspend("box", home, SilentReporter())
    up(home)  # with a newer QEMU by now
    assert "mapped-ram" not in (files.folder / "settings").read_text()


def test_a_snapshot_is_not_asked_for_it(home: Home, files: MachineFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    def find(*_: object) -> None:
        raise AssertionError("what runs in it would be lost")

    monkeypatch.setattr(snapshot, "find", find)
    up(home)


@pytest.mark.parametrize("fault", ["changed", "unfit", "gone", "fails to load"])
def test_it_is_never_booted_instead(
    home: Home, files: MachineFiles, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    before = kept(files)
    if fault == "changed":
        files.memory.write_text("something else")
    if fault == "gone":
        files.memory.unlink()
    if fault == "fails to load":
        monkeypatch.setenv("FAKE_QEMU_MIGRATION", "failed")
    if fault == "unfit":
        monkeypatch.setattr(start, "probe_for", lambda *_: make_qemu(accel="kvm"))
    report = Listener()
    with pytest.raises(MachineError), start.open_session(REQUEST, home, report):
        pass
    assert not any(line.startswith(("Starting", "Restoring", "warning")) for line in report.heard)
    assert operate.status("box", home).state == "suspended"
    assert kept(files) == before


def test_ctrl_c_while_it_is_loaded_leaves_it_suspended(
    home: Home, files: MachineFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(migration, "load", interrupt)
        up(home)
    assert operate.status("box", home).state == "suspended"
    up(home)


def test_one_that_was_loaded_and_left_begins_again(
    home: Home, files: MachineFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the loading and the note: the QEMU that has the memory is paused, and the note still there."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(suspension, "discard", killed)
        up(home)
    assert operate.status("box", home).state == "paused"
    assert files.suspension.exists()
    assert up(home) == ["Going on with the suspended machine box"]
    assert not files.suspension.exists()
    assert not files.memory.exists()


def test_one_that_was_left_while_it_loads_begins_again(
    home: Home, files: MachineFiles, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FAKE_QEMU_STATUS", "inmigrate")
    lifetime.start(make_spec(tmp_path), files, make_qemu())
    monkeypatch.delenv("FAKE_QEMU_STATUS")
    before = lifetime.status(files)
    assert (before.state, files.suspension.exists()) == ("restoring", True)
    assert up(home) == ["Going on with the suspended machine box"]
    assert before.pid is not None and not process.is_alive(before.pid)


@pytest.mark.parametrize("answer", ["asleep", "not ready"])
def test_a_guest_that_does_not_answer_keeps_running(
    home: Home, files: MachineFiles, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    def give_up(*_: object) -> None:
        raise GuestError("not ready")

    if answer == "asleep":
        monkeypatch.setenv("FAKE_QEMU_ASLEEP", "1")
    monkeypatch.setattr(ready, "wait_ready", give_up)
    with (
        pytest.raises((MachineError, GuestError)),
        start.open_session(replace(REQUEST, timeout_s=0.3), home, Listener()),
    ):
        pass
    assert lifetime.status(files).state == "running"


def test_another_machine_is_not_made_of_it(home: Home, files: MachineFiles) -> None:
    before = kept(files)
    up_with = replace(REQUEST, memory_mib=4096, demanded=frozenset({"memory"}))
    with pytest.raises(UsageError, match="suspended with memory 2048"), start.open_session(up_with, home, Listener()):
        pass
    assert kept(files) == before
    up(home, memory_mib=4096, cpus=7, given=frozenset({"memory", "cpus"}))  # a file that is newer than the machine
    assert operate.status("box", home).memory_mib == 2048


def test_what_it_cannot_become_by_going_on_is_said(home: Home, files: MachineFiles) -> None:
    disk = frozenset({"disk"})
    warning, step = up(home, disk_bytes=9 << 30, given=disk, demanded=disk)
    assert "with disk 1.0 GiB; 9.0 GiB takes effect after `vmbuild down box`" in warning
    assert step == "Going on with the suspended machine box"


def test_a_note_that_cannot_be_read_is_told_and_given_up_with_down(home: Home, files: MachineFiles) -> None:
    files.suspension.write_text("{")
    for ask in (lambda: up(home), lambda: operate.suspend("box", home, SilentReporter())):
        with pytest.raises(MachineError, match="saved memory of the machine box"):
            ask()
    assert operate.down("box", home, SilentReporter())
    assert up(home) == ["Starting the machine box"]


def test_suspended_twice_it_is_what_it_was(home: Home, files: MachineFiles) -> None:
    before = kept(files)
    report = Listener()
    assert operate.suspend("box", home, report) == before
    assert report.heard == []


def test_a_suspending_that_was_cut_short_behind_its_note_is_ended_by_the_next(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    up(home)
    files = MachineFiles.at(home.state, "box")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(lifetime, "stop", killed)
        operate.suspend("box", home, SilentReporter())
    before = lifetime.status(files)
    assert before.state == "paused"
    assert operate.suspend("box", home, SilentReporter()) == kept(files)
    assert operate.status("box", home).state == "suspended"
    assert before.pid is not None and not process.is_alive(before.pid)
    up(home)


def test_down_gives_it_up_and_keeps_the_disk(home: Home, files: MachineFiles) -> None:
    disk = files.disk.read_bytes()
    report = Listener()
    assert operate.down("box", home, report)
    assert report.heard == ["Giving up what ran in the suspended machine box"]
    assert operate.status("box", home).state == "stopped"
    assert not files.memory.exists()
    assert files.disk.read_bytes() == disk
    assert not operate.down("box", home, SilentReporter())
    assert up(home) == ["Starting the machine box"]


def test_down_forgets_a_memory_of_a_suspending_that_was_cut_short(
    home: Home, files: MachineFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    up(home)
    files.suspension.write_text("{}")
    files.memory.write_text("old")
    monkeypatch.setattr(operate, "_power_off", lambda *_: None)
    monkeypatch.setattr(operate, "POWER_OFF_S", 0.1)
    assert operate.down("box", home, SilentReporter())
    assert operate.status("box", home).state == "stopped"
    assert not files.memory.exists()


def test_destroy_takes_all_of_it(home: Home, files: MachineFiles) -> None:
    assert operate.destroy("box", home, SilentReporter())
    assert not files.folder.exists()
    assert operate.list_machines(home) == []


def test_it_is_listed_as_suspended_and_asked_nothing(home: Home, files: MachineFiles) -> None:
    (now,) = operate.list_machines(home)
    assert (now.state, now.pid, now.ssh_port, now.cpus) == ("suspended", None, None, 2)
    assert operate.usage("box", home) is None


# The edge: every command that wants a guest says the same of it.


@pytest.fixture
def edge(home: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The settings of a command line that work on this home."""
    monkeypatch.setenv("VMBUILD_CACHE_DIR", str(home.cache))
    monkeypatch.setenv("VMBUILD_STATE_DIR", str(home.state))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("VMBUILD_NAME", "box")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "argv",
    [["ssh", "true"], ["console"], ["trim"], ["resize", "--cpus", "1"], ["attach"], ["top", "box", "-n", "1"]],
    ids=lambda argv: argv[0],
)
def test_who_wants_its_guest_is_told_how_to_get_it(
    files: MachineFiles, edge: None, argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = kept(files)
    assert program.run(argv) == SuspendedError.exit_code == 75
    err = " ".join(capsys.readouterr().err.split())
    assert "the machine box is suspended" in err
    assert "vmbuild up --name box" in err
    assert kept(files) == before


def test_status_and_list_show_it(files: MachineFiles, edge: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.run(["status", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["state"], found["guest"], found["pid"]) == ("suspended", None, None)
    assert program.run(["list", "--json"]) == 0
    assert [each["state"] for each in json.loads(capsys.readouterr().out)] == ["suspended"]


def test_suspend_up_and_down_at_the_edge(files: MachineFiles, edge: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.run(["suspend", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["digest"] == kept(files).digest
    assert program.run(["up", "--timeout", "20s"]) == 0
    assert program.run(["suspend"]) == 0
    assert "is suspended" in " ".join(capsys.readouterr().err.split())
    assert program.run(["down"]) == 0
    assert "is down" in " ".join(capsys.readouterr().err.split())


def test_a_base_image_is_made_in_one_that_goes_on(
    home: Home, files: MachineFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = Tagged("sha256:there", {"linux/arm64": {}})
    monkeypatch.setattr(build.bases, "find", lambda *_: there)  # type: ignore[attr-defined]
    report = Listener()
    made = build.base(REQUEST, "debian:trixie-slim", home, report, platforms=(), force=False)
    assert made == BaseResult("debian:trixie-slim", ("linux/arm64",), "sha256:there")
    assert report.steps == ["Going on with the suspended machine box"]


def test_a_killed_qemu_of_one_that_went_on_is_down_and_boots(home: Home, files: MachineFiles) -> None:
    """What was suspended ended with it: a memory from before must not meet the disk that was written since."""
    up(home)
    pid = lifetime.status(files).pid
    assert pid is not None
    os.kill(pid, 9)
    assert process.wait_gone(pid, Deadline.after(5))
    assert operate.status("box", home).state == "stopped"
    assert up(home) == ["Starting the machine box"]
