"""Snapshots: saved and loaded by way of QEMU, kept by shape, told from damaged ones."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.machine.conftest import OTHER_BOOT, make_qemu, make_spec, soon
from vmbuild.deadline import Deadline
from vmbuild.errors import HostError, MachineError
from vmbuild.lock import hold
from vmbuild.machine import control, lifetime, snapshot
from vmbuild.machine.files import MachineFiles
from vmbuild.machine.lifetime import Restore
from vmbuild.machine.probe import Qemu
from vmbuild.model import GIB, MIB, MachineSpec
from vmbuild.report import SilentReporter


def nothing_wrong() -> None:
    """Find nothing to object to."""


def settings(files: MachineFiles) -> list[dict[str, object]]:
    """Return what QEMU was told about its migration."""
    return [json.loads(line) for line in (files.folder / "settings").read_text().splitlines()]


def test_a_state_is_saved_and_a_machine_goes_on_from_it(running: MachineFiles, tmp_path: Path) -> None:
    lifetime.save(running, tmp_path / "ram", soon())
    assert lifetime.status(running).state == "paused"
    lifetime.stop(running, soon())
    lifetime.start(
        make_spec(tmp_path), running, make_qemu(), restore=Restore(tmp_path / "ram", "wake 12", nothing_wrong)
    )
    assert lifetime.status(running).state == "running"
    assert (running.folder / "orders").read_text() == "wake 12\n"
    assert settings(running)[0] == {
        "capabilities": [{"capability": name, "state": True} for name in ("mapped-ram", "multifd")]
    }


def test_an_older_qemu_gets_a_plain_stream(
    files: MachineFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_QEMU_OLD", "1")
    lifetime.start(make_spec(tmp_path), files, make_qemu())
    lifetime.save(files, tmp_path / "ram", soon())
    assert [set(each) for each in settings(files)] == [{"max-bandwidth"}]


@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_a_state_that_is_not_saved_is_said(
    files: MachineFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    monkeypatch.setenv("FAKE_QEMU_MIGRATION", status)
    lifetime.start(make_spec(tmp_path), files, make_qemu())
    with pytest.raises(MachineError, match="could not be saved") as caught:
        lifetime.save(files, tmp_path / "ram", soon())
    assert "it broke" in caught.value.details


def test_a_state_that_takes_too_long_is_given_up(
    files: MachineFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_QEMU_MIGRATION", "active")
    lifetime.start(make_spec(tmp_path), files, make_qemu())
    with pytest.raises(MachineError):
        lifetime.save(files, tmp_path / "ram", Deadline.after(0.5))


def test_a_place_that_cannot_be_written_is_the_hosts_fault(running: MachineFiles, tmp_path: Path) -> None:
    with pytest.raises(HostError, match="cannot open"):
        lifetime.save(running, tmp_path / "none" / "ram", soon())


def test_a_state_that_does_not_fit_leaves_nothing_that_runs(files: MachineFiles, tmp_path: Path) -> None:
    (tmp_path / "ram").write_text("something else")
    with pytest.raises(MachineError, match="refused migrate-incoming"):
        lifetime.start(
            make_spec(tmp_path), files, make_qemu(), restore=Restore(tmp_path / "ram", "wake", nothing_wrong)
        )
    assert lifetime.status(files).state == "stopped"


def test_a_state_that_is_not_to_be_trusted_never_runs(
    running: MachineFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def object_to_it() -> None:
        raise MachineError("it was changed")

    lifetime.save(running, tmp_path / "ram", soon())
    lifetime.stop(running, soon())
    with pytest.raises(MachineError, match="it was changed"):
        lifetime.start(
            make_spec(tmp_path), running, make_qemu(), restore=Restore(tmp_path / "ram", "wake", object_to_it)
        )
    assert not (running.folder / "orders").exists()
    assert lifetime.status(running).state == "stopped"


def test_a_restore_that_was_given_up_is_told_from_a_pause(
    files: MachineFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_QEMU_STATUS", "inmigrate")
    lifetime.start(make_spec(tmp_path), files, make_qemu())
    assert lifetime.status(files).state == "restoring"


def test_a_state_that_is_gone_is_the_snapshots_fault_not_the_hosts(files: MachineFiles, tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="No such file"):
        lifetime.start(
            make_spec(tmp_path), files, make_qemu(), restore=Restore(tmp_path / "ram", "wake", nothing_wrong)
        )


@pytest.fixture
def qemu(tmp_path: Path) -> Qemu:
    """A QEMU whose binary can be replaced."""
    binary = tmp_path / "qemu"
    binary.write_bytes(make_qemu_bytes())
    return make_qemu(binary)


def make_qemu_bytes() -> bytes:
    return Path(make_qemu().binary).read_bytes()


def test_the_same_shape_has_the_same_key_whatever_its_name_disk_and_place(tmp_path: Path, qemu: Qemu) -> None:
    one = make_spec(tmp_path / "one")
    other = replace(make_spec(tmp_path / "other", disk_bytes=9 * GIB), name="other")
    assert snapshot.shape_key(one, qemu) == snapshot.shape_key(other, qemu)


@pytest.mark.parametrize(
    "change",
    [
        {"cpus": 3},
        {"memory_mib": 1024},
        {"image": {"digest": "another"}},
        {"image": {"boot": OTHER_BOOT}},
        {"image": {"cpu_model": "max"}},
    ],
    ids=str,
)
def test_another_shape_has_another_key(tmp_path: Path, qemu: Qemu, change: dict[str, object]) -> None:
    spec = make_spec(tmp_path)
    image = change.pop("image", {})
    assert isinstance(image, dict)
    other = replace(spec, image=replace(spec.image, **image), **change)  # type: ignore[arg-type]
    assert snapshot.shape_key(spec, qemu) != snapshot.shape_key(other, qemu)


def test_another_qemu_has_another_key(tmp_path: Path, qemu: Qemu) -> None:
    spec = make_spec(tmp_path)
    before = snapshot.shape_key(spec, qemu)
    Path(qemu.binary).write_bytes(make_qemu_bytes() + b"\n")
    assert snapshot.shape_key(spec, qemu) != before
    assert snapshot.shape_key(spec, replace(qemu, aio="threads")) != snapshot.shape_key(spec, qemu)


def make(cache: Path, key: str, spec: MachineSpec, qemu: Qemu) -> snapshot.Snapshot:
    """Make a snapshot of a sparse file."""
    with snapshot.making(cache, key) as files, files.folder.joinpath("ram").open("wb") as ram:
        ram.write(b"first")
        ram.truncate(64 * MIB)
        ram.seek(50 * MIB + 17)
        ram.write(b"second")
        ram.flush()
        return snapshot.publish(cache, key, spec, qemu, files.folder / "ram")


def test_a_snapshot_is_kept_found_listed_and_removed(tmp_path: Path, qemu: Qemu) -> None:
    cache, spec = tmp_path / "cache", make_spec(tmp_path)
    assert snapshot.find(cache, "one") is None
    made = make(cache, "one", spec, qemu)
    assert snapshot.find(cache, "one") == made
    assert snapshot.list_snapshots(cache) == [made]
    assert (made.cpus, made.memory_mib, made.image_digest) == (spec.cpus, spec.memory_mib, spec.image.digest)
    assert made.size_bytes < 3 * MIB  # as it lies on disk
    assert made.ram.stat().st_mode & 0o077 == 0 or made.folder.stat().st_mode & 0o077 == 0
    assert {path.name for path in (cache / "snapshots").iterdir()} == {"one"}
    newer = make(cache, "one", spec, qemu)
    assert snapshot.list_snapshots(cache) == [newer]
    snapshot.remove(newer)
    assert snapshot.list_snapshots(cache) == []


def test_prune_keeps_what_a_machine_would_start_from(tmp_path: Path, qemu: Qemu) -> None:
    spec = make_spec(tmp_path)
    kept = make(tmp_path, "kept", spec, qemu)
    make(tmp_path, "old", replace(spec, image=replace(spec.image, digest="old")), qemu)
    (tmp_path / "snapshots" / "strange").mkdir()
    freed = snapshot.prune(tmp_path, lambda each: each == kept)
    assert sorted(each.name for each in freed) == ["debian-13-arm64, 2 CPUs, 2048 MiB", "strange"]
    assert snapshot.list_snapshots(tmp_path) == [kept]
    assert snapshot.prune(tmp_path, lambda _: True) == []


def test_one_flipped_bit_is_noticed_and_a_copy_without_holes_is_not(tmp_path: Path, qemu: Qemu) -> None:
    made = make(tmp_path, "one", make_spec(tmp_path), qemu)
    assert snapshot.is_whole(made)
    data = made.ram.read_bytes()
    made.ram.write_bytes(data)
    assert snapshot.is_whole(made)
    for place in (0, 50 * MIB + 18, 30 * MIB, len(data) - 1):
        changed = bytearray(data)
        changed[place] ^= 1
        made.ram.write_bytes(changed)
        assert not snapshot.is_whole(made), place
    made.ram.write_bytes(data[:-1])
    assert not snapshot.is_whole(made)
    made.ram.unlink()
    assert not snapshot.is_whole(made)


def test_what_an_interrupted_one_left_is_cleared_away_by_the_next(tmp_path: Path, qemu: Qemu) -> None:
    remains = tmp_path / "snapshots" / ".one~killed"
    remains.mkdir(parents=True)
    (remains / "ram").write_bytes(b"half")
    assert snapshot.list_snapshots(tmp_path) == []
    make(tmp_path, "one", make_spec(tmp_path), qemu)
    assert not remains.exists()


def test_what_somebody_still_works_on_is_not_abandoned(tmp_path: Path) -> None:
    for key in ("held", "free"):
        (tmp_path / "snapshots" / f".{key}~x").mkdir(parents=True)
    with hold(snapshot.lock_file(tmp_path, "held"), SilentReporter(), "makes it"):
        assert [left.name for left in snapshot.abandoned(tmp_path)] == [".free~x"]
    assert len(snapshot.abandoned(tmp_path)) == 2


@pytest.mark.parametrize("text", ["", "{", "{}", '{"key": 1}'])
def test_what_cannot_be_read_is_no_snapshot(tmp_path: Path, qemu: Qemu, text: str) -> None:
    made = make(tmp_path, "one", make_spec(tmp_path), qemu)
    (made.folder / "snapshot.json").write_text(text)
    assert snapshot.find(tmp_path, "one") is None
    assert snapshot.list_snapshots(tmp_path) == []


@contextmanager
def guest(files: MachineFiles, *answers: str) -> Iterator[list[str]]:
    """Answer orders on the pipes as a guest behind QEMU does, which keeps both ends of both open."""
    files.folder.mkdir(parents=True, exist_ok=True)
    control.make_pipes(files)
    orders = os.open(files.control_in, os.O_RDWR)
    replies = os.open(files.control_out, os.O_RDWR)
    heard = list[str]()

    def serve() -> None:
        for answer in answers:
            heard.append(os.read(orders, 4096).decode())
            for word in answer.split("|"):
                os.write(replies, word.encode())

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield heard
    os.close(orders)
    os.close(replies)


def test_an_order_is_answered_even_in_pieces(tmp_path: Path) -> None:
    files = MachineFiles.at(tmp_path, "box")
    with guest(files, "noise\npar|ked\n", "awake\n") as heard:
        control.send(files, "park")
        control.wait_for(files, "parked", soon())
        control.send(files, "wake 12")
        control.wait_for(files, "awake", soon())
    assert heard == ["park\n", "wake 12\n"]


def test_a_guest_that_does_not_answer_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    files = MachineFiles.at(tmp_path, "box")
    with guest(files), pytest.raises(MachineError, match="did not answer `parked`"):
        control.wait_for(files, "parked", Deadline.after(0.3))


def test_a_guest_that_cannot_says_so(tmp_path: Path) -> None:
    files = MachineFiles.at(tmp_path, "box")
    with guest(files, "failed\n"), pytest.raises(MachineError, match="could not become `parked`"):
        control.send(files, "park")
        control.wait_for(files, "parked", soon())


def test_a_qemu_that_ended_is_not_waited_for(tmp_path: Path) -> None:
    files = MachineFiles.at(tmp_path, "box")
    files.folder.mkdir(parents=True)
    control.make_pipes(files)
    with pytest.raises(MachineError, match="QEMU ended"):
        control.wait_for(files, "awake", soon())


def test_in_the_background_it_is_tried_once_a_day(tmp_path: Path, qemu: Qemu) -> None:
    assert snapshot.may_try(tmp_path, "one")
    assert not snapshot.may_try(tmp_path, "one")
    assert snapshot.may_try(tmp_path, "other")
    yesterday = time.time() - 25 * 3600
    os.utime(tmp_path / "snapshots" / ".one.tried", (yesterday, yesterday))
    assert snapshot.may_try(tmp_path, "one")
    snapshot.remove(make(tmp_path, "one", make_spec(tmp_path), qemu))
    assert snapshot.may_try(tmp_path, "one")  # there was one, so it can be made


def test_one_that_took_the_place_of_another_is_not_removed_for_it(tmp_path: Path, qemu: Qemu) -> None:
    old = make(tmp_path, "one", make_spec(tmp_path), qemu)
    newer = make(tmp_path, "one", make_spec(tmp_path), qemu)
    snapshot.remove(replace(old, digest="another"))
    assert snapshot.find(tmp_path, "one") == newer


def test_a_machine_without_the_port_says_so(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="does not take orders"):
        control.send(MachineFiles.at(tmp_path, "box"), "park")
