"""How a machine comes up: booted, or restored from a snapshot, and what becomes of one that does not fit."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.guest.fakes import FakeSession, Reply
from tests.unit.listener import Listener
from tests.unit.machine.conftest import make_qemu, make_spec
from vmbuild import operate, process, start
from vmbuild.deadline import Deadline
from vmbuild.errors import GuestError, HostError, UsageError
from vmbuild.guest import passed, ready
from vmbuild.machine import control, lifetime, snapshot
from vmbuild.machine.facts import Facts
from vmbuild.machine.files import MachineFiles
from vmbuild.machine.snapshot import Snapshot
from vmbuild.machine.suspension import Suspension
from vmbuild.model import Arch, Home, MachineRequest, PassOn
from vmbuild.report import SilentReporter
from vmbuild.settings import resolve

REQUEST = MachineRequest("box", 2, 2048, 1 << 30, "debian-13-arm64")


@pytest.fixture
def makers(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What was started in the background, environment and all, none of it in truth."""
    started: list[dict[str, Any]] = []
    monkeypatch.delenv("CI", raising=False)
    real = process.starting

    @contextmanager
    def starting(argv: list[str], **options: Any) -> Iterator[Any]:
        if "snapshot" in argv:
            started.append({"argv": argv, **options["env"]})
            yield lambda: None
        else:
            with real(argv, **options) as exit_code:
                yield exit_code

    monkeypatch.setattr(process, "starting", starting)
    return started


@pytest.fixture
def kept(home: Home, tmp_path: Path) -> Snapshot:
    """A snapshot of the machine's shape."""
    spec, qemu = make_spec(tmp_path), make_qemu()
    key = snapshot.shape_key(spec, qemu)
    with snapshot.making(home.cache, key) as files:
        (files.folder / "ram").write_text("the state")
        return snapshot.publish(home.cache, key, spec, qemu, files.folder / "ram")


def up(home: Home, request: MachineRequest = REQUEST) -> list[str]:
    """Bring the machine up; return what was said."""
    report = Listener()
    with start.open_session(request, home, report):
        pass
    assert operate.status("box", home).state == "running"
    return report.heard


def test_the_first_start_boots_and_has_a_snapshot_made(home: Home, makers: list[dict[str, Any]]) -> None:
    assert up(home) == ["Starting the machine box"]
    assert operate.status("box", home).restored is False
    (maker,) = makers
    assert maker["argv"][-3:] == ["images", "snapshot", "--in-background"]
    assert (maker["VMBUILD_CPUS"], maker["VMBUILD_MEMORY"], maker["VMBUILD_TIMEOUT"]) == ("2", "2048M", "300.0s")
    assert (maker["VMBUILD_ARCH"], maker["VMBUILD_IMAGE"]) == ("arm64", "debian-13-arm64")
    assert up(home) == []  # it runs
    assert len(makers) == 1


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"proxy": "off", "ca": "off", "logins": "off"},
        {
            "ca": "{folder}/a.pem,{folder}/b.pem",
            "registry_mirrors": "http://one.example:5000,https://two.example",
            "insecure_registries": "three.example:5000",
            "host_ports": "5000,5001",
        },
    ],
    ids=["defaults", "off", "named"],
)
def test_another_vmbuild_is_asked_for_the_same_machine(tmp_path: Path, flags: dict[str, str]) -> None:
    for name in ("a.pem", "b.pem"):
        (tmp_path / name).touch()
    given = {key: text.format(folder=tmp_path) for key, text in flags.items()}
    asked = resolve(given, {}, tmp_path, tmp_path / "none").as_request()
    again = resolve({}, start.asking_for(asked, tmp_path), tmp_path, tmp_path / "none").as_request()
    assert again.pass_on == asked.pass_on
    assert (again.cpus, again.memory_mib, again.timeout_s) == (asked.cpus, asked.memory_mib, asked.timeout_s)


def test_what_is_passed_on_reaches_a_guest_that_is_ready_whether_it_ran_or_not(
    home: Home, makers: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[passed.Passed, bool]] = []

    def take(_: object, wanted: passed.Passed, *, is_new: bool) -> passed.Outcome:
        told.append((wanted, is_new))
        return passed.Outcome()

    monkeypatch.setattr(passed, "apply", take)
    request = replace(REQUEST, pass_on=PassOn(registry_mirrors=("http://localhost:5000",)))
    words = "Passing on to the guest: registry mirror http://localhost:5000; the host's localhost:5000"
    assert up(home, request) == ["Starting the machine box", words]
    assert up(home, request) == [words]
    assert up(home) == []
    mirrors = ("http://localhost:5000",)
    assert [(each.mirrors, is_new) for each, is_new in told] == [(mirrors, True), (mirrors, False), ((), False)]


@pytest.mark.parametrize(("proxy", "is_there"), [(True, True), (False, False)])
def test_the_proxies_of_the_host_are_in_the_seed_unless_turned_off(
    home: Home, makers: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, proxy: bool, is_there: bool
) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    up(home, replace(REQUEST, pass_on=PassOn(proxy=proxy)))
    assert (b"http://proxy.example:3128" in MachineFiles.at(home.state, "box").seed.read_bytes()) is is_there


def test_a_file_of_certificates_that_is_not_there_starts_nothing(home: Home) -> None:
    with pytest.raises(UsageError, match="cannot read the certificates of /none"):
        up(home, replace(REQUEST, pass_on=PassOn(authorities=("/none",))))
    assert not MachineFiles.at(home.state, "box").folder.exists()


def test_a_machine_of_another_architecture_is_no_surprise_but_a_choice_is(
    home: Home, makers: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Once a 32-bit one, it is found as such by who asks for none, and refused to who asks for another."""
    monkeypatch.setattr(start, "fetch_image", lambda *_: make_spec(tmp_path, arch=Arch.ARMHF).image)
    arm = replace(REQUEST, arch=Arch.ARMHF, image="debian-13-armhf", given=frozenset({"arch"}))
    assert up(home, arm) == ["Starting the machine box"]
    assert operate.status("box", home).arch == "arm"
    assert (makers[0]["VMBUILD_ARCH"], makers[0]["VMBUILD_IMAGE"]) == ("arm", "debian-13-armhf")
    assert up(home) == []
    with pytest.raises(UsageError, match="the machine box is running with the architecture arm, not arm64"):
        up(home, replace(REQUEST, arch=Arch.ARM64, given=frozenset({"arch"})))
    operate.down("box", home, SilentReporter())
    assert up(home)[-1] == "Starting the machine box"
    assert makers[-1]["VMBUILD_IMAGE"] == "debian-13-armhf"


def test_a_snapshot_that_cannot_be_made_costs_nobody_a_machine(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start.sys, "executable", "/none")  # type: ignore[attr-defined]
    (home.cache / "snapshot.log").mkdir()
    assert up(home) == ["Starting the machine box"]


@pytest.mark.parametrize("reason", ["CI", "memory", "disk", "tried"])
def test_none_is_made_where_it_would_be_in_the_way(
    home: Home, makers: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reason: str
) -> None:
    if reason == "CI":
        monkeypatch.setenv("CI", "true")
    if reason == "memory":
        monkeypatch.setattr(process, "available_memory_bytes", lambda: 3 << 30)
    if reason == "disk":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3 << 30))
    if reason == "tried":
        snapshot.may_try(home.cache, snapshot.shape_key(make_spec(tmp_path), make_qemu()))
    request = MachineRequest(**{**vars(REQUEST), "memory_mib": 2048 if reason == "tried" else 2500})
    assert up(home, request) == ["Starting the machine box"]
    assert makers == []


def test_a_later_start_restores(home: Home, makers: list[dict[str, Any]], kept: Snapshot) -> None:
    assert up(home) == ["Restoring the machine box"]
    files = MachineFiles.at(home.state, "box")
    assert (files.folder / "orders").read_text().startswith("wake 1")
    assert operate.status("box", home).restored is True
    assert makers == []
    assert snapshot.list_snapshots(home.cache) == [kept]


def test_who_wants_no_snapshots_gets_none(home: Home, makers: list[dict[str, Any]], kept: Snapshot) -> None:
    request = MachineRequest(**{**vars(REQUEST), "snapshots": False})
    assert up(home, request) == ["Starting the machine box"]
    assert makers == []


def answer(what: Any) -> Any:
    """Return an answer, or raise it."""
    if isinstance(what, Exception):
        raise what
    return what


def find_and_lose(find: Callable[[Path, str], Snapshot | None]) -> Callable[[Path, str], Snapshot | None]:
    """Return a search whose find is deleted by somebody else at once."""

    def search(cache: Path, key: str) -> Snapshot | None:
        found = find(cache, key)
        if found is not None:
            found.ram.unlink()
        return found

    return search


@pytest.mark.parametrize("fault", ["changed", "unfit", "gone", "asleep", "unready"])
def test_a_snapshot_that_does_not_do_is_told_and_deleted_and_the_machine_boots(
    home: Home, makers: list[dict[str, Any]], kept: Snapshot, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    if fault == "changed":
        monkeypatch.setattr(snapshot, "is_whole", lambda _: False)
    if fault == "unready":
        answers: list[Any] = [GuestError("not ready"), FakeSession((("sh",), Reply()))]
        monkeypatch.setattr(ready, "wait_ready", lambda *_: answer(answers.pop(0)))
    if fault == "unfit":
        kept.ram.write_text("something else")
    if fault == "gone":
        monkeypatch.setattr(snapshot, "find", find_and_lose(snapshot.find))
    if fault == "asleep":
        monkeypatch.setenv("FAKE_QEMU_ASLEEP", "1")
    monkeypatch.setattr(start, "WAKE_S", 0.5)
    restoring, warning, booting = up(home, MachineRequest(**{**vars(REQUEST), "timeout_s": 1.0}))
    assert (restoring, booting) == ("Restoring the machine box", "Starting the machine box")
    assert "the snapshot cannot be used" in warning
    assert "booting instead" in warning
    assert not kept.folder.exists()
    assert len(makers) == 1  # a new one


def test_a_machine_that_does_not_boot_either_is_not_the_snapshots_fault(
    home: Home, makers: list[dict[str, Any]], kept: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ready, "wait_ready", lambda *_: answer(GuestError("the disk is damaged")))
    with pytest.raises(GuestError, match="damaged"), start.open_session(REQUEST, home, SilentReporter()):
        pass
    assert snapshot.list_snapshots(home.cache) == [kept]
    assert makers == []


def test_ctrl_c_while_restoring_leaves_nothing_that_runs(
    home: Home, kept: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(control, "wait_for", interrupt)
    with pytest.raises(KeyboardInterrupt), start.open_session(REQUEST, home, SilentReporter()):
        pass
    assert operate.status("box", home).state == "stopped"
    assert snapshot.list_snapshots(home.cache) == [kept]


def test_a_start_that_nobody_saw_succeed_leaves_nothing_that_runs(
    home: Home, makers: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def give_up(*_: object) -> None:
        raise GuestError("not ready")

    monkeypatch.setattr(ready, "wait_ready", give_up)
    with pytest.raises(GuestError), start.open_session(REQUEST, home, SilentReporter()):
        pass
    assert operate.status("box", home).state == "stopped"
    assert makers == []


def test_a_restore_that_was_given_up_is_begun_again(
    home: Home, makers: list[dict[str, Any]], kept: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = MachineFiles.at(home.state, "box")
    lifetime.prepare(make_spec(tmp_path), files, explicit_disk=False)
    monkeypatch.setenv("FAKE_QEMU_STATUS", "inmigrate")
    lifetime.start(make_spec(tmp_path), files, make_qemu())
    monkeypatch.delenv("FAKE_QEMU_STATUS")
    before = lifetime.status(files)
    assert before.state == "restoring"
    assert up(home) == ["Restoring the machine box"]
    assert before.pid is not None and not process.is_alive(before.pid)


def test_a_disk_that_has_grown_satisfies_a_file_but_not_a_flag(home: Home, makers: list[dict[str, Any]]) -> None:
    up(home, replace(REQUEST, disk_bytes=3 << 30))
    files = MachineFiles.at(home.state, "box")
    from_file = replace(REQUEST, disk_bytes=2 << 30, given=frozenset({"disk"}))
    from_flag = replace(from_file, demanded=frozenset({"disk"}))
    assert up(home, from_file) == []  # it runs, and nothing is to be said
    for _ in ("it runs", "it is down"):
        with pytest.raises(UsageError, match="cannot shrink"):
            up(home, from_flag)
        lifetime.stop(files, Deadline.after(0))
    assert up(home, from_file) == ["Starting the machine box"]
    assert lifetime.disk_size(files) == 3 << 30
    lifetime.stop(files, Deadline.after(0))
    up(home, replace(from_file, disk_bytes=4 << 30))
    assert lifetime.disk_size(files) == 4 << 30


def test_a_host_at_fault_is_not_blamed_on_the_snapshot(
    home: Home, kept: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise HostError("the disk is full")

    monkeypatch.setattr(lifetime, "start", refuse)
    with pytest.raises(HostError, match="disk is full"), start.open_session(REQUEST, home, SilentReporter()):
        pass
    assert snapshot.list_snapshots(home.cache) == [kept]


@pytest.mark.parametrize("kind", ["path", "url"])
def test_facts_from_elsewhere_name_no_disk_to_take(home: Home, tmp_path: Path, kind: str) -> None:
    """Who made a bundle must not have a file of this host, or a URL, become a disk here."""
    (tmp_path / "secret.img").write_bytes(bytes(510) + b"\x55\xaa" + bytes(512))
    image = {"path": str(tmp_path / "secret.img"), "url": f"http://127.0.0.1:1/d.img#sha256={'a' * 64}"}[kind]
    facts = Facts("u", 2, 2048, 1 << 30, image, "d", 1.0, "virt-9.2", "tcg", "h")
    kept = Suspension(facts, "9.2", fast=True, digest="d", size_bytes=1, suspended_at=1.0)
    with pytest.raises(UsageError, match="there is no guest image named"):
        start.fit_here(kept, REQUEST, home, SilentReporter())
    assert not (home.cache / "given").exists()
    assert not (home.cache / "disks").exists()
