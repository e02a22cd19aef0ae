"""What may go from the cache, and what a machine still needs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest

from tests.unit.listener import Listener
from tests.unit.machine.conftest import make_qemu, make_spec
from vmbuild import operate, process, stock
from vmbuild.deadline import Deadline
from vmbuild.machine import control, lifetime, snapshot
from vmbuild.machine.files import MachineFiles
from vmbuild.model import Home, MachineRequest
from vmbuild.report import SilentReporter
from vmbuild.start import Shape


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """A home with two guest images that no row of the catalogue leads to."""
    home = Home(tmp_path / "cache", tmp_path / "state")
    for digest in (make_spec(tmp_path).image.digest, "sha256:other"):
        (home.cache / "images" / digest).mkdir(parents=True)
    return home


@pytest.fixture
def machine(home: Home, programs: Path) -> Iterator[MachineFiles]:
    """A machine of the fake QEMU that runs on the first of them."""
    files = MachineFiles.at(home.state, "box")
    spec = make_spec(home.state)
    lifetime.prepare(spec, files, explicit_disk=False)
    files.seed.write_bytes(bytes(512))
    lifetime.start(spec, files, make_qemu())
    yield files
    operate.destroy("box", home, SilentReporter())


def prune(home: Home, *, everything: bool) -> tuple[set[str], list[str]]:
    """Prune; return the names of what is gone, and what was said."""
    report = Listener()
    return {each.name for each in stock.prune(home, report, everything=everything)}, report.heard


KEPT = ["Keeping the guest image sha256:1234: the machine box needs it"]


@pytest.mark.parametrize("everything", [True, False])
@pytest.mark.parametrize("state", ["running", "suspended"])
def test_a_machine_keeps_the_guest_image_that_it_goes_on_with(
    home: Home, machine: MachineFiles, state: str, everything: bool
) -> None:
    if state == "suspended":
        lifetime.stop(machine, Deadline.after(0))
        machine.suspension.write_text(json.dumps({}))
    assert prune(home, everything=everything) == ({"sha256:other"}, KEPT)


def test_a_stopped_machine_boots_what_is_there_then(home: Home, machine: MachineFiles) -> None:
    lifetime.stop(machine, Deadline.after(0))
    assert prune(home, everything=True) == ({"sha256:1234", "sha256:other"}, [])


@pytest.mark.parametrize("everything", [True, False])
def test_a_snapshot_goes_with_everything(
    home: Home, machine: MachineFiles, monkeypatch: pytest.MonkeyPatch, everything: bool
) -> None:
    spec, qemu = make_spec(home.state), make_qemu()
    monkeypatch.setattr(stock, "_is_current", lambda *_: True)
    with snapshot.making(home.cache, "key") as files:
        (files.folder / "ram").write_text("the state")
        snapshot.publish(home.cache, "key", spec, qemu, files.folder / "ram")
    prune(home, everything=everything)
    assert (stock.list_snapshots(home) == []) is everything


def test_a_machine_whose_facts_are_lost_keeps_nothing(home: Home, machine: MachineFiles) -> None:
    lifetime.stop(machine, Deadline.after(0))
    machine.suspension.touch()
    machine.facts.unlink()
    assert prune(home, everything=True) == ({"sha256:1234", "sha256:other"}, [])


@pytest.mark.parametrize(("in_background", "times"), [(False, 1), (True, stock.PATIENCE)])
def test_what_has_the_cpus_last_has_longer_for_each_part(
    home: Home, programs: Path, monkeypatch: pytest.MonkeyPatch, in_background: bool, times: int
) -> None:
    limits: dict[str, float] = {}
    ready = Mock(side_effect=lambda _files, limit, _report: limits.update(boot=limit.remaining_s()) or Mock())
    parked = Mock(side_effect=lambda _files, word, limit: limits.update({word: limit.remaining_s()}))

    def save(_files: MachineFiles, ram: Path, limit: Deadline) -> None:
        limits["save"] = limit.remaining_s()
        ram.write_text("the state")

    monkeypatch.setattr(process, "give_way", Mock())
    monkeypatch.setattr(stock, "shape_of", lambda *_: Shape(make_spec(home.state), make_qemu(), "key"))
    monkeypatch.setattr(stock, "wait_ready", ready)
    monkeypatch.setattr(control, "send", Mock())
    monkeypatch.setattr(control, "wait_for", parked)
    monkeypatch.setattr(lifetime, "save", save)
    request = MachineRequest("box", 2, 2048, 1 << 30, "debian-13-arm64", timeout_s=200)
    stock.make_snapshot(request, home, SilentReporter(), in_background=in_background)
    expected = {"boot": 200, "parked": stock.PARK_S, "save": stock.SAVE_S}
    assert limits == pytest.approx({part: times * limit_s for part, limit_s in expected.items()}, abs=10)
