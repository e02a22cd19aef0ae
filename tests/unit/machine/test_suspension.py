"""A suspended machine: what it goes on from is whole or nothing, and never outlives the moment it goes on."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.unit.machine.conftest import OTHER_BOOT, kernel_boot, make_qemu, make_spec, soon
from vmbuild import process
from vmbuild.deadline import Deadline
from vmbuild.errors import HostError, MachineError, SuspendedError, UsageError
from vmbuild.machine import lifetime, migration, suspension
from vmbuild.machine.facts import describe, load_facts
from vmbuild.machine.files import MachineFiles
from vmbuild.machine.lifetime import Restore
from vmbuild.machine.qmp import Qmp
from vmbuild.machine.suspension import Suspension
from vmbuild.model import GIB, MachineRequest


def go_on(files: MachineFiles, kept: Suspension) -> None:
    """Let the machine go on from what was kept, as the recipe does."""
    restore = Restore(
        files.memory,
        "go_on 12",
        partial(suspension.check, files, kept),
        at_last=partial(suspension.discard, files),
        fast=kept.fast,
        is_own=True,
    )
    lifetime.start(make_spec(files.folder.parents[2]), files, make_qemu(), restore=restore)


def talk(files: MachineFiles) -> list[str]:
    """Return what QEMU was told, `noted` behind what it heard while the machine was said to be suspended."""
    return (files.folder / "talk").read_text().splitlines()


def start(files: MachineFiles) -> int:
    lifetime.start(make_spec(files.folder.parents[2]), files, make_qemu())
    pid = lifetime.status(files).pid
    assert pid is not None
    return pid


def assert_goes_on(files: MachineFiles) -> None:
    """See that the machine runs, and that nothing is left of a suspending."""
    assert lifetime.status(files).state == "running"
    assert not files.suspension.exists()
    assert not files.memory.exists()


def test_a_machine_is_suspended_and_goes_on(running: MachineFiles) -> None:
    before = lifetime.status(running)
    kept = lifetime.suspend(running, soon())
    assert suspension.find(running) == kept
    assert (kept.qemu, kept.fast, kept.size_bytes) == ("10.0.2", True, running.memory.stat().st_blocks * 512)
    assert kept.facts == load_facts(running)
    now = lifetime.status(running)
    assert (now.state, now.pid, now.cpus, now.memory_mib) == ("suspended", None, before.cpus, before.memory_mib)
    assert before.pid is not None and not process.is_alive(before.pid)
    assert not any(path.exists() for path in running.runtime)
    assert running.memory.stat().st_mode & 0o077 == 0
    assert running.suspension.stat().st_mode & 0o077 == 0
    go_on(running, kept)
    assert_goes_on(running)
    assert (running.folder / "orders").read_text() == "go_on 12\n"
    assert running.console_log.read_text() == "booting\n" * 2  # of one guest, one log


def test_the_note_is_written_last_and_gone_before_the_guest_goes_on(running: MachineFiles) -> None:
    kept = lifetime.suspend(running, soon())
    heard = talk(running)
    assert "migrate" in heard
    assert [line for line in heard if line.endswith("noted")] == ["qmp_capabilities noted", "quit noted"]
    go_on(running, kept)
    heard = talk(running)[len(heard) :]
    assert "migrate-incoming noted" in heard  # until it is loaded, the memory could be needed again
    assert "cont" in heard


def test_a_machine_that_is_suspended_says_so(running: MachineFiles) -> None:
    lifetime.suspend(running, soon())
    for check in (lifetime.check_alive, lifetime.check_running):
        with pytest.raises(SuspendedError, match="is suspended") as caught:
            check(running)
        assert "vmbuild up --name box" in caught.value.resolution
    with pytest.raises(SuspendedError):
        lifetime.suspend(running, soon())


def test_a_machine_that_is_down_cannot_be_suspended(files: MachineFiles) -> None:
    with pytest.raises(MachineError, match="not running"):
        lifetime.suspend(files, soon())
    assert not files.suspension.exists()
    assert not files.memory.exists()


@pytest.mark.parametrize("ending", ["failed", "cancelled"])
def test_a_saving_that_fails_lets_the_machine_go_on(
    files: MachineFiles, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.setenv("FAKE_QEMU_MIGRATION", ending)
    start(files)
    with pytest.raises(MachineError, match="could not be saved"):
        lifetime.suspend(files, soon())
    assert_goes_on(files)
    assert not any(line.endswith("noted") for line in talk(files))


def test_a_saving_that_takes_too_long_is_cancelled_before_the_machine_goes_on(
    files: MachineFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifetime, "END_SAVING_S", 0.5)
    monkeypatch.setenv("FAKE_QEMU_MIGRATION", "active")
    start(files)
    with pytest.raises(MachineError):
        lifetime.suspend(files, Deadline.after(0.5))
    assert_goes_on(files)
    heard = talk(files)
    assert heard.index("migrate_cancel") < heard.index("cont")


def test_a_saving_that_ends_by_itself_is_not_cancelled() -> None:
    """QEMU 10.0 dies of that now and then."""

    class Saving(Qmp):
        def __init__(self) -> None:
            self.asked: list[str] = []

        def execute(self, command: str, **arguments: object) -> dict[str, str]:
            self.asked.append(command)
            return {"status": "active" if len(self.asked) < 4 else "completed"}

    saving = Saving()
    migration.give_up(saving, soon(), soon())
    assert saving.asked == ["query-migrate"] * 4


def test_a_saving_that_takes_too_long_is_said() -> None:
    class Busy(Qmp):
        def __init__(self) -> None:
            self.asked = 0

        def execute(self, command: str, **arguments: object) -> Any:
            self.asked += 1
            return {"status": "active"}

    busy = Busy()
    with pytest.raises(MachineError, match="not saved in time"):
        migration._wait(busy, Deadline.after(0.05), "saved")
    assert busy.asked >= 1


def test_ctrl_c_while_saving_lets_the_machine_go_on(files: MachineFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lifetime, "END_SAVING_S", 0.5)
    monkeypatch.setenv("FAKE_QEMU_MIGRATION", "active")
    monkeypatch.setattr(migration, "_wait", interrupt)
    start(files)
    with pytest.raises(KeyboardInterrupt):
        lifetime.suspend(files, soon())
    assert_goes_on(files)


@pytest.mark.parametrize("step", ["write_note", "sparse_digest", "_sync"])
def test_a_memory_that_is_not_published_lets_the_machine_go_on(
    running: MachineFiles, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def refuse(*_: object) -> None:
        raise HostError("the disk is full")

    monkeypatch.setattr(suspension, step, refuse)
    with pytest.raises(HostError, match="disk is full"):
        lifetime.suspend(running, soon())
    assert_goes_on(running)


def test_a_place_that_cannot_be_written_is_the_hosts_fault(running: MachineFiles) -> None:
    running.memory.mkdir()
    with pytest.raises(HostError, match="cannot open"):
        lifetime.suspend(running, soon())
    running.memory.rmdir()
    lifetime.resume(running)
    assert_goes_on(running)


def cut_short(files: MachineFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Suspend the machine, and be killed between the note and QEMU's end."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(lifetime, "stop", killed)
        lifetime.suspend(files, soon())
    assert lifetime.status(files).state == "paused"
    assert suspension.find(files) is not None


def test_killed_between_note_and_end_it_goes_on_from_its_own_memory(
    running: MachineFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_short(running, monkeypatch)
    before = lifetime.status(running).pid
    lifetime.resume(running)
    assert_goes_on(running)
    assert lifetime.status(running).pid == before
    assert talk(running).count("cont") == 1  # and not `cont noted`: a memory from before must not outlive it


def test_killed_between_note_and_end_with_its_qemu_it_is_suspended(
    running: MachineFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_short(running, monkeypatch)
    pid = lifetime.status(running).pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert process.wait_gone(pid, soon())
    assert lifetime.status(running).state == "suspended"
    kept = suspension.find(running)
    assert kept is not None
    go_on(running, kept)
    assert_goes_on(running)


def test_suspended_again_where_it_was_cut_short_it_goes_on(
    running: MachineFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_short(running, monkeypatch)
    with pytest.raises(MachineError, match="refused migrate"):  # QEMU saves a machine only once
        lifetime.suspend(running, soon())
    assert_goes_on(running)


@pytest.mark.parametrize("damage", ["changed", "longer", "gone"])
def test_a_damaged_memory_is_refused_and_stays_for_whoever_can_mend_it(running: MachineFiles, damage: str) -> None:
    kept = lifetime.suspend(running, soon())
    whole = running.memory.read_bytes()
    if damage == "gone":
        running.memory.unlink()
    else:
        running.memory.write_bytes(b"another state" if damage == "changed" else whole + b"\0")
    with pytest.raises(MachineError, match="saved memory of the machine box") as caught:
        suspension.check(running, kept)
    assert "vmbuild down box" in caught.value.resolution
    with pytest.raises(MachineError):
        go_on(running, kept)
    assert lifetime.status(running).state == "suspended"
    assert suspension.find(running) == kept
    assert running.memory.exists() == (damage != "gone")
    running.memory.write_bytes(whole)
    go_on(running, kept)
    assert_goes_on(running)


def test_a_memory_is_checked_before_the_guest_runs(running: MachineFiles) -> None:
    kept = lifetime.suspend(running, soon())
    with pytest.raises(MachineError, match="saved memory of the machine box"):
        go_on(running, replace(kept, digest="another"))
    assert not any(line.startswith("cont") for line in talk(running))


def valid_note(running: MachineFiles) -> dict[str, Any]:
    lifetime.suspend(running, soon())
    note: dict[str, Any] = json.loads(running.suspension.read_text())
    return note


def test_a_note_that_cannot_be_read_is_an_error_and_no_boot(running: MachineFiles) -> None:
    note = valid_note(running)
    wrong: list[Any] = [
        "",
        "{",
        "[]",
        "null",
        "{}",
        json.dumps({**note, "new": 1}),
        json.dumps({**note, "facts": None}),
        json.dumps({**note, "facts": {"cpus": 2}}),
        json.dumps({key: value for key, value in note.items() if key != "digest"}),
        "\ud800".encode("utf-8", "surrogatepass"),
    ]
    for text in wrong:
        running.suspension.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(MachineError, match="saved memory of the machine box") as caught:
            suspension.find(running)
        assert "suspended.json cannot be read" in caught.value.details
        assert "vmbuild down box" in caught.value.resolution
        assert lifetime.status(running).state == "suspended"


def test_no_note_is_no_suspension(files: MachineFiles) -> None:
    files.memory.write_text("of a saving that was cut short")
    assert suspension.find(files) is None
    assert lifetime.status(files).state == "stopped"
    for _ in range(2):  # twice is harmless
        suspension.discard(files)
    assert not files.memory.exists()


def test_the_note_goes_before_the_memory(files: MachineFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = list[str]()
    monkeypatch.setattr(Path, "unlink", lambda path, **_: gone.append(path.name))
    suspension.discard(files)
    assert gone == ["suspended.json", "memory"]


# What the memory is loaded by.


def test_a_plain_stream_is_loaded_as_one_by_a_qemu_that_knows_more(
    files: MachineFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_QEMU_OLD", "1")
    start(files)
    kept = lifetime.suspend(files, soon())
    assert not kept.fast
    monkeypatch.delenv("FAKE_QEMU_OLD")
    (files.folder / "settings").unlink()
    go_on(files, kept)
    assert_goes_on(files)
    assert "mapped-ram" not in (files.folder / "settings").read_text()


def test_a_fast_one_is_refused_by_a_qemu_that_knows_less(
    running: MachineFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = lifetime.suspend(running, soon())
    monkeypatch.setenv("FAKE_QEMU_OLD", "1")
    with pytest.raises(MachineError, match="saved by a newer QEMU") as caught:
        go_on(running, kept)
    assert "QEMU 9.0 or newer" in caught.value.resolution
    assert suspension.find(running) == kept
    assert running.memory.exists()


# Which machine can go on.


def made_of(tmp_path: Path) -> Suspension:
    """Return the suspension of a machine as `make_spec` has it, whose disk has grown since."""
    facts = describe(make_spec(tmp_path), make_qemu(), 3 * GIB)
    return Suspension(facts, "10.0.2", True, "digest", 1, 100.0)


def test_what_can_go_on_is_what_it_was(tmp_path: Path) -> None:
    kept = made_of(tmp_path)
    # Asked for anything, and with a QEMU that has newer machine types by now: it stays what it was.
    newer = replace(make_qemu(), machine_types=("virt", "virt-10.0", "virt-11.0"), aio="threads", sandbox=False)
    asked = replace(make_spec(tmp_path / "elsewhere", memory_mib=9999), cpus=7, name="other")
    whole = suspension.fit(kept.facts, asked, newer)
    assert (whole.name, whole.cpus, whole.memory_mib, whole.disk_bytes) == ("other", 2, 2048, 3 * GIB)
    assert newer.newest(whole.image.machine_type) == "virt-10.0"
    assert kernel_boot(whole).kernel == tmp_path / "elsewhere" / "kernel"


@pytest.mark.parametrize(
    ("image", "qemu", "reason"),
    [
        ({"digest": "sha256:9999"}, {}, "guest image sha256:1234, here is sha256:9999"),
        ({}, {"accel": "kvm"}, "ran under tcg, on this host it would under kvm"),
        ({}, {"machine_types": ("virt", "virt-9.2")}, "QEMU 10.0.2 made it, and"),
        ({}, {"machine_types": ("virt", "virt-11.0")}, "no machine type virt-10.0"),
        ({"boot": OTHER_BOOT}, {}, "machines are built in another way"),
        ({"cpu_model": "max"}, {}, "machines are built in another way"),
    ],
    ids=["image", "accel", "older", "type dropped", "arguments", "cpu"],
)
def test_what_cannot_go_on_is_told_why(
    tmp_path: Path, image: dict[str, Any], qemu: dict[str, Any], reason: str
) -> None:
    spec = make_spec(tmp_path)
    with pytest.raises(MachineError, match="cannot go on with the suspended machine") as caught:
        suspension.fit(
            *(made_of(tmp_path).facts, replace(spec, image=replace(spec.image, **image))),
            *(replace(make_qemu(), **qemu), "10.0.2"),
        )
    assert reason in caught.value.details
    assert "same versions" in caught.value.resolution


@pytest.mark.parametrize("change", [{"cpus": 3}, {"memory_mib": 4096}, {"hardware": "another"}], ids=str)
def test_facts_that_do_not_belong_together_cannot_go_on(tmp_path: Path, change: dict[str, Any]) -> None:
    kept = made_of(tmp_path)
    with pytest.raises(MachineError) as caught:
        suspension.fit(replace(kept.facts, **change), make_spec(tmp_path), make_qemu())
    assert "another way" in caught.value.details


@pytest.mark.parametrize(
    ("asked", "key"), [({"cpus": 3}, "cpus"), ({"memory_mib": 1024}, "memory"), ({"image": "other"}, "image")], ids=str
)
def test_another_machine_is_refused_where_it_is_demanded(tmp_path: Path, asked: dict[str, Any], key: str) -> None:
    kept = made_of(tmp_path)
    request = replace(MachineRequest("box", 2, 2048, GIB, "debian-13-arm64"), **asked)
    for given in (frozenset[str](), frozenset(asked)):  # a default, or a file: what it was is good enough
        suspension.refuse_differences(kept, replace(request, given=given))
    demanded = frozenset({"cpus", "memory", "image", "disk", "name"})
    with pytest.raises(UsageError, match=f"is suspended with {key}") as caught:
        suspension.refuse_differences(kept, replace(request, demanded=demanded))
    assert "vmbuild down box" in caught.value.resolution
    suspension.refuse_differences(
        kept, replace(MachineRequest("box", 2, 2048, GIB, "debian-13-arm64"), demanded=demanded)
    )
