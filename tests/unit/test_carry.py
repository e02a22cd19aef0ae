"""A suspended machine on its way to another host: what travels, what does not, and what is never let in."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import zstandard

from tests.unit.building import IMAGE, METADATA, Guest
from tests.unit.listener import Listener
from tests.unit.machine.conftest import make_qemu, make_spec
from vmbuild import carry, host_agent, operate, reach, record, start
from vmbuild.cli import program
from vmbuild.deadline import Deadline
from vmbuild.errors import (
    BuildError,
    HostError,
    MachineError,
    SuspendedError,
    TimeIsUp,
    UsageError,
    VmbuildError,
)
from vmbuild.follow import Watch
from vmbuild.guard import Guard, Limits
from vmbuild.guest import cache, job, ready
from vmbuild.image import store
from vmbuild.machine import bundle, facts, lifetime, suspension
from vmbuild.machine.files import MachineFiles
from vmbuild.machine.suspension import Suspension
from vmbuild.model import GIB, BuildResult, Home, MachineRequest
from vmbuild.outputs import Kind, Output
from vmbuild.record import BuildRecord
from vmbuild.report import SilentMeter, SilentReporter

REQUEST = MachineRequest("default", 4, 4096, GIB, "debian-13-arm64", timeout_s=20.0)
NO_LIMITS = Limits()


class World:
    """Two hosts that share nothing but a bundle, and the guest that goes from one to the other."""

    def __init__(self, folder: Path) -> None:
        self.guest = Guest(output=b"#1 RUN make\n")
        self.here = Home(folder / "cache", folder / "here")
        self.there = Home(folder / "cache", folder / "there")
        self.bundle = folder / "box.vmbundle"
        self.cwd = folder / "cwd"
        for path in (self.here.cache, self.cwd):
            path.mkdir()

    @property
    def files(self) -> MachineFiles:
        """The machine where it was made."""
        return MachineFiles.at(self.here.state, "box")

    def resume(self, path: Path | None = None, home: Home | None = None, **asked: Any) -> BuildResult | None:
        """Go on with a bundle, on the other host if nothing else is said."""
        request = replace(REQUEST, **asked)
        report = Listener()
        self.heard = report.heard
        return carry.resume(path or self.bundle, request, NO_LIMITS, home or self.there, report, stdout=io.BytesIO())


@pytest.fixture
def world(tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Both hosts; on the first, a machine runs with a build in it."""
    world = World(tmp_path)
    monkeypatch.setenv("CI", "true")  # no snapshot is made in the background
    monkeypatch.setattr(start, "fetch_image", lambda *_: make_spec(tmp_path).image)
    monkeypatch.setattr(store, "find_digest", lambda *_: make_spec(tmp_path).image)
    monkeypatch.setattr(start, "probe_for", lambda *_: make_qemu())
    monkeypatch.setattr(ready, "wait_ready", lambda *_: world.guest)
    monkeypatch.setattr(reach, "connect", lambda *_: world.guest)
    monkeypatch.chdir(world.cwd)
    with start.open_session(replace(REQUEST, name="box", cpus=2, memory_mib=2048), world.here, SilentReporter()):
        pass
    yield world
    for home in (world.here, world.there):
        for found in lifetime.list_machines(home.state):
            operate.destroy(found.name, home, SilentReporter())


BUILD = BuildRecord(
    "/w/first", ("a:1",), ("type=docker,dest=a.tar",), "iid", "meta", False, "/home/of/somebody", 12, 3.5, 100.0
)


@pytest.fixture
def packed(world: World) -> Suspension:
    """A bundle of the machine, with a build in it."""
    record.save(world.files.builds, BUILD)
    return carry.suspend("box", world.bundle, world.here, SilentReporter())


def machines(home: Home) -> list[tuple[str, str]]:
    return [(found.name, found.state) for found in lifetime.list_machines(home.state)]


def assert_nothing_left(home: Home) -> None:
    """See that a host has no machine, and no part of one."""
    assert [path.name for path in home.state.rglob("*") if not path.name.endswith(".lock")] in ([], ["machines"])


# There and back.


def test_a_build_is_finished_on_another_host(world: World, packed: Suspension) -> None:
    result = world.resume()
    assert result is not None
    assert (result.image_id, result.tags, result.output) == (IMAGE, ("a:1",), "a.tar")
    assert (world.cwd / "a.tar").stat().st_size == result.output_bytes > 0
    assert (world.cwd / "iid").read_text() == IMAGE
    assert (world.cwd / "meta").read_text() == METADATA
    assert world.guest.removed() == ["/w/first"]
    files = MachineFiles.at(world.there.state, "box")
    assert machines(world.there) == [("box", "running")]
    assert (files.folder / "orders").read_text().startswith("go_on ")
    assert not files.suspension.exists()
    assert not files.memory.exists()
    assert record.load_all(files.builds) == []
    assert files.folder.stat().st_mode & 0o777 == 0o700
    now = lifetime.status(files)
    assert (now.cpus, now.memory_mib) == (2, 2048)  # not what this host's settings say
    assert files.disk.read_bytes() == world.files.disk.read_bytes()
    assert world.heard[:2] == [f"Unpacking {world.bundle}", "Going on with the suspended machine box"]


def test_where_it_came_from_it_stays_suspended(world: World, packed: Suspension) -> None:
    world.resume()
    assert machines(world.here) == [("box", "suspended")]
    assert suspension.find(world.files) == packed
    assert record.load_all(world.files.builds) == [BUILD]


def test_no_key_travels_and_no_path(world: World, packed: Suspension) -> None:
    key = world.files.client_key
    plain = unpacked(world.bundle)
    assert b"the state" in plain
    assert key.name.encode() not in plain
    assert all(line not in plain for line in key.read_bytes().splitlines() if line)
    assert key.with_name(key.name + ".pub").read_bytes().split()[1] not in plain
    for text in (BUILD.cwd, str(world.here.state), str(world.cwd)):
        assert text.encode() not in plain
    world.resume()
    other = MachineFiles.at(world.there.state, "box")
    assert other.client_key.read_bytes() != key.read_bytes()
    assert other.client_key.with_name(other.client_key.name + ".pub").read_bytes() in other.seed.read_bytes()


def test_the_host_key_in_the_memory_of_a_bundle_is_nobodys(world: World) -> None:
    key = world.files.host_key
    before = key.read_bytes()
    operate.suspend("box", world.here, SilentReporter())
    assert key.read_bytes() == before
    carry.suspend("box", world.bundle, world.here, SilentReporter())
    assert not key.exists()
    with start.open_session(replace(REQUEST, name="box"), world.here, SilentReporter()):
        pass
    assert key.read_bytes() not in (before, b"")
    assert key.read_bytes() in world.files.seed.read_bytes()
    assert world.files.host_public_key.exists()


def unpacked(path: Path) -> bytes:
    """Return all that is in a bundle."""
    with path.open("rb") as file:
        reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
        return reader.read()


def test_a_machine_without_a_build_just_goes_on(world: World) -> None:
    carry.suspend("box", world.bundle, world.here, SilentReporter())
    assert world.resume() is None
    assert machines(world.there) == [("box", "running")]


def test_of_several_builds_the_last_is_finished_and_the_others_run(world: World) -> None:
    for number, name in enumerate(("second", "first")):
        record.save(world.files.builds, replace(BUILD, folder=f"/w/{name}", started_at=100.0 + number))
    carry.suspend("box", world.bundle, world.here, SilentReporter())
    assert world.resume() is not None
    assert world.guest.removed() == ["/w/first"]
    (left,) = record.load_all(MachineFiles.at(world.there.state, "box").builds)
    assert (left.id, left.cwd) == ("second", str(world.cwd))


def test_it_can_have_another_name_and_go_on_twice(world: World, packed: Suspension) -> None:
    world.resume()
    assert world.resume(name="other", given=frozenset({"name"})) is not None
    assert machines(world.there) == [("box", "running"), ("other", "running")]


def test_it_can_be_carried_on(world: World, packed: Suspension) -> None:
    record.save(world.files.builds, BUILD)
    world.guest.endings = [TimeIsUp()]
    following = replace(NO_LIMITS, suspend_to=world.cwd / "next")
    with pytest.raises(SuspendedError):
        carry.resume(world.bundle, REQUEST, following, world.there, Listener(), stdout=io.BytesIO())
    assert machines(world.there) == [("box", "suspended")]
    assert bundle.read_facts(world.cwd / "next")["name"] == "box"
    shutil.rmtree(world.there.state)
    assert world.resume(world.cwd / "next") is not None


def test_a_suspended_machine_can_be_packed_later(world: World) -> None:
    saved = operate.suspend("box", world.here, SilentReporter())
    assert carry.suspend("box", None, world.here, SilentReporter()) == saved
    assert not world.bundle.exists()
    report = Listener()
    assert carry.suspend("box", world.bundle, world.here, report) == saved
    assert report.heard == ["Packing the machine box"]
    assert world.bundle.stat().st_mode & 0o077 == 0
    (label, total), *_ = report.meters
    assert (label, report.advanced) == ("pack", total)


@pytest.mark.parametrize("again", [False, True], ids=["runs", "suspended again"])
def test_one_that_goes_on_before_it_is_packed_is_not_packed(
    world: World, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    real = operate.suspend

    def suspend(name: str, home: Home, report: SilentReporter) -> Suspension:
        saved = real(name, home, report)
        with start.open_session(replace(REQUEST, name="box"), home, report):  # somebody else was quicker
            pass
        if again:
            real(name, home, report)
        return saved

    monkeypatch.setattr(operate, "suspend", suspend)
    with pytest.raises(MachineError, match="went on before it was packed"):
        carry.suspend("box", world.bundle, world.here, SilentReporter())
    assert not world.bundle.exists()


# Where there is one already.


@pytest.mark.parametrize("state", ["running", "stopped", "suspended"])
def test_a_machine_of_that_name_is_never_replaced(world: World, packed: Suspension, state: str) -> None:
    with start.open_session(replace(REQUEST, name="box"), world.there, SilentReporter()):
        pass
    if state == "stopped":
        lifetime.stop(MachineFiles.at(world.there.state, "box"), Deadline.after(0))
    if state == "suspended":
        operate.suspend("box", world.there, SilentReporter())
    with pytest.raises(UsageError, match="there is a machine named box already") as caught:
        world.resume()
    assert "--name" in caught.value.resolution
    assert machines(world.there) == [("box", state)]


def test_where_the_very_same_is_still_suspended_it_goes_on(
    world: World, packed: Suspension, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked_in = tmp_path / "asked in"
    asked_in.mkdir()
    record.save(world.files.builds, replace(BUILD, cwd=str(asked_in)))

    def unpack(*_: object) -> None:
        raise AssertionError("it is all there")

    monkeypatch.setattr(bundle, "unpack", unpack)
    key = world.files.client_key.read_bytes()
    assert world.resume(home=world.here) is not None
    assert world.heard[0] == "Going on with the suspended machine box"
    assert world.files.client_key.read_bytes() == key
    assert (asked_in / "a.tar").exists()  # as its command would have: that folder is here


def test_one_that_went_on_since_is_another(world: World, packed: Suspension) -> None:
    with start.open_session(replace(REQUEST, name="box"), world.here, SilentReporter()):
        pass
    operate.suspend("box", world.here, SilentReporter())
    with pytest.raises(UsageError, match="already"):
        world.resume(home=world.here)


def test_a_bundle_is_found_in_its_folder(world: World, packed: Suspension, tmp_path: Path) -> None:
    folder = tmp_path / "artifacts"
    folder.mkdir()
    (folder / "notes.txt").touch()
    with pytest.raises(UsageError, match="holds 0 bundles"):
        world.resume(folder)
    world.bundle.rename(folder / "box.vmbundle")
    assert world.resume(folder) is not None
    (folder / "other.vmbundle").touch()
    with pytest.raises(UsageError, match="holds 2 bundles") as caught:
        world.resume(folder)
    assert [Path(line).name for line in caught.value.details.splitlines()] == ["box.vmbundle", "other.vmbundle"]


# What cannot go on here.


def test_what_does_not_fit_is_told_before_anything_is_unpacked(
    world: World, packed: Suspension, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unpack(*_: object) -> None:
        raise AssertionError("gigabytes, in vain")

    monkeypatch.setattr(bundle, "unpack", unpack)
    with pytest.raises(UsageError, match="suspended with memory 2048"):
        world.resume(memory_mib=4096, demanded=frozenset({"memory"}))
    monkeypatch.setattr(start, "probe_for", lambda *_: make_qemu(accel="kvm"))
    with pytest.raises(MachineError, match="cannot go on") as caught:
        world.resume()
    assert "under kvm" in caught.value.details
    assert_nothing_left(world.there)


Change = Callable[[dict[str, Any]], object]
FOREIGN_RECORDS: list[dict[str, Any]] = [
    {"folder": 5},
    {"folder": ""},
    {"folder": "/w/.."},
    {"folder": "/w/a\0b"},
    {"tags": "a:1"},
    {"tags": [1]},
    {"output": 5},
    {"iidfile": ["x"]},
    {"quiet": "no"},
    {"started_at": "now"},
    {"started_at": float("nan")},
    {"boot_s": None},
    {"context_bytes": 1.5},
    {"more": 1},
]
FOREIGN_FACTS: list[dict[str, Any]] = [
    {"cpus": "2"},
    {"cpus": 2.0},
    {"memory_mib": "2048"},
    {"disk_bytes": None},
    {"machine_type": 5},
    {"machine_type": "virt-10.0,dumpdtb=x"},
    {"image": "../../x"},
    {"image": None},
    {"image_digest": "\0"},
    {"started_at": 1e300},
    {"hardware": "another"},
    {"uuid": 1},
]


def rebuild(world: World, change: Change, parts: dict[str, Path] | None = None) -> None:
    """Make the bundle anew, the way somebody would who has the program and a text editor."""
    about: dict[str, Any] = dict(bundle.read_facts(world.bundle))
    change(about)
    parts = {"memory": world.files.memory, "disk": world.files.disk} if parts is None else parts
    bundle.pack(world.bundle, about, parts, SilentMeter())


def assert_refused(world: World, match: str | None = None) -> VmbuildError:
    with pytest.raises((MachineError, UsageError), match=match) as caught:
        world.resume()
    assert_nothing_left(world.there)
    assert world.guest.ran(job.PROGRAM) == []
    return caught.value


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "", ".", "..", ".x", "a b", "a\n", "x" * 64])
def test_a_name_that_leads_elsewhere_is_refused(world: World, packed: Suspension, name: str) -> None:
    rebuild(world, lambda about: about.update(name=name))
    assert_refused(world, "cannot be a machine's name")


NONSENSE: dict[str, list[Any]] = {
    "name": [None, 5, ["box"], {}],
    "builds": [None, 5, "first", [None], [[]], {"a": 1}],
    "suspension": [None, [], {}, "x"],
    "suspension.fast": [None, "yes", 1],
    "suspension.digest": [None, 5],
    "suspension.more": [1],
}


@pytest.mark.parametrize(("key", "value"), [(key, each) for key, found in NONSENSE.items() for each in found], ids=str)
def test_facts_of_another_kind_are_refused(world: World, packed: Suspension, key: str, value: Any) -> None:
    def change(about: dict[str, Any]) -> None:
        *into, last = key.split(".")
        (about[into[0]] if into else about)[last] = value

    rebuild(world, change)
    assert_refused(world, "makes no sense to this vmbuild")


@pytest.mark.parametrize("key", ["name", "suspension", "builds"])
def test_facts_that_are_missing_are_refused(world: World, packed: Suspension, key: str) -> None:
    rebuild(world, lambda about: about.pop(key))
    assert_refused(world, "makes no sense to this vmbuild")


@pytest.mark.parametrize("wrong", FOREIGN_RECORDS, ids=repr)
def test_an_absurd_record_is_refused(world: World, packed: Suspension, wrong: dict[str, Any]) -> None:
    rebuild(world, lambda about: about["builds"][0].update(wrong))
    assert_refused(world, "makes no sense to this vmbuild")


@pytest.mark.parametrize("wrong", FOREIGN_FACTS, ids=repr)
def test_absurd_facts_are_refused(world: World, packed: Suspension, wrong: dict[str, Any]) -> None:
    rebuild(world, lambda about: about["suspension"]["facts"].update(wrong))
    assert_refused(world)


def qcow2(*, version: int = 3, backing: int = 0, features: int = 0, magic: bytes = b"QFI\xfb") -> bytes:
    """Return the header of a qcow2 and some more (QEMU, docs/interop/qcow2.txt)."""
    header = magic + version.to_bytes(4, "big") + backing.to_bytes(8, "big") + bytes(8) + GIB.to_bytes(8, "big")
    return (header.ljust(72, b"\0") + features.to_bytes(8, "big")).ljust(4096, b"\0") + b"/etc/shadow"


@pytest.mark.parametrize(
    "disk",
    [
        qcow2(backing=4096),
        qcow2(backing=4096, version=2),
        qcow2(features=4),
        qcow2(features=5),
        qcow2(magic=b"KDMV"),
        b"raw data" * 1000,
        b"",
        b"QFI",
    ],
    ids=["backing", "backing 2", "data file", "dirty data file", "vmdk", "raw", "empty", "short"],
)
def test_a_disk_that_leads_to_other_files_is_refused(
    world: World, packed: Suspension, tmp_path: Path, disk: bytes
) -> None:
    (tmp_path / "disk").write_bytes(disk)
    rebuild(world, lambda _: None, {"memory": world.files.memory, "disk": tmp_path / "disk"})
    assert_refused(world, "the disk in the bundle is not one that vmbuild makes")


def test_a_disk_of_an_older_form_is_one(world: World, packed: Suspension, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(qcow2(version=2, features=4))  # before version 3 that is no feature
    rebuild(world, lambda _: None, {"memory": world.files.memory, "disk": tmp_path / "disk"})
    assert world.resume() is not None


@pytest.mark.parametrize(
    "names",
    [(), ("memory",), ("disk",), ("memory", "disk", "builds"), ("memory", "disk", "other")],
    ids=lambda names: " ".join(names) or "none",
)
def test_parts_that_are_missing_or_too_many_are_refused(
    world: World, packed: Suspension, names: tuple[str, ...]
) -> None:
    parts = {name: world.files.memory if name == "memory" else world.files.disk for name in names}
    rebuild(world, lambda _: None, parts)
    assert_refused(world, "bundle")


def test_a_memory_that_is_not_the_one_it_tells_of_is_refused(world: World, packed: Suspension) -> None:
    rebuild(world, lambda about: about["suspension"].update(digest="0" * 64))
    error = assert_refused(world, "bundle")
    assert "vmbuild down" not in error.resolution  # there is no machine yet


@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "empty", "missing"])
def test_a_damaged_bundle_leaves_nothing(world: World, packed: Suspension, damage: str) -> None:
    whole = bytearray(world.bundle.read_bytes())
    whole[len(whole) // 2] ^= 1
    contents = {"cut": bytes(whole[:-10]), "flipped": bytes(whole), "text": b"hello", "empty": b""}
    if damage == "missing":
        world.bundle.unlink()
    else:
        world.bundle.write_bytes(contents[damage])
    with pytest.raises((MachineError, HostError), match=r"bundle|cannot read"):
        world.resume()
    assert_nothing_left(world.there)


@pytest.mark.parametrize(
    ("place", "here"),
    [("c", "c"), ("a/b", "a/b"), ("/etc/c", "c"), ("../c", "c"), ("/", "output"), ("a/../..", "output")],
)
def test_a_foreign_build_s_cache_goes_into_this_folder_and_it_gets_no_agent(
    world: World, packed: Suspension, place: str, here: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[Path] = []
    monkeypatch.setattr(cache, "bring_home", lambda *args: places.append(args[2]))
    monkeypatch.setattr(host_agent, "opened", lambda *_: pytest.fail("an agent was opened"))
    rebuild(world, lambda about: about["builds"][0].update(caches=[place], agents=["default"]))
    assert world.resume() is not None
    (written,) = places
    assert written.resolve().is_relative_to(world.cwd)
    assert written == world.cwd / here
    assert any("SSH agent" in line for line in world.heard)


@pytest.mark.parametrize("place", ["/{}", "/tmp/../{}", "../{}", "out/../../{}"])
def test_a_foreign_build_writes_nothing_outside_this_folder(
    world: World, packed: Suspension, tmp_path: Path, place: str
) -> None:
    """A hostile one could have anything written that is the user's: a shell's start file, say."""
    outside = {tmp_path / name: b"precious" for name in ("o", "i", "m")}
    for path, content in outside.items():
        path.write_bytes(content)
    here = str(tmp_path).lstrip("/") + "/" if place.startswith("/") else ""
    places = {key: place.format(here + key[0]) for key in ("iidfile", "metadata_file")}
    outputs = [Output(Kind.DOCKER, place.format(here + "o")).text]
    rebuild(world, lambda about: about["builds"][0].update(places, outputs=outputs))
    assert world.resume() is not None
    assert {path: path.read_bytes() for path in outside} == outside
    assert {path.name for path in world.cwd.iterdir()} == {"o", "i", "m"}
    assert len([line for line in world.heard if "here it is" in line]) == 3


@pytest.mark.parametrize("place", ["a.tar", "out/a.tar", "out/../a.tar", "{}/out/a.tar"])
def test_a_foreign_build_writes_where_it_was_told_in_this_folder(world: World, packed: Suspension, place: str) -> None:
    (world.cwd / "out").mkdir()
    output = place.format(world.cwd)
    rebuild(world, lambda about: about["builds"][0].update(outputs=[f"type=docker,dest={output}"]))
    assert world.resume() is not None
    assert Path(output).stat().st_size > 0
    assert not any("here it is" in line for line in world.heard)


def test_a_foreign_build_may_write_to_standard_output_or_nothing(world: World, packed: Suspension) -> None:
    rebuild(
        world, lambda about: about["builds"][0].update(outputs=["type=docker,dest=-"], iidfile=None, metadata_file=None)
    )
    result = world.resume()
    assert result is not None
    assert result.output == "-"
    assert list(world.cwd.iterdir()) == []


@pytest.mark.parametrize("place", [".", "/", "..", "out/.."])
def test_a_foreign_build_does_not_fill_this_folder_itself(world: World, packed: Suspension, place: str) -> None:
    """Among the files of a folder may be some that are run."""
    each = Output(Kind.LOCAL, place)
    rebuild(world, lambda about: about["builds"][0].update(outputs=[each.text], iidfile=None, metadata_file=None))
    assert world.resume() is not None
    assert [path.name for path in world.cwd.iterdir()] == ["output"]


@pytest.mark.parametrize(
    "text", ["type=registry,name=example.org/a:1", "type=load,dest=auto", "type=load,dest=ssh://a"]
)
def test_a_foreign_build_pushes_and_loads_nothing(world: World, packed: Suspension, text: str) -> None:
    rebuild(world, lambda about: about["builds"][0].update(outputs=[text, "type=docker,dest=a.tar"]))
    result = world.resume()
    assert result is not None
    assert [each.where for each in result.outputs] == ["a.tar"]
    assert any("that is left out" in line for line in world.heard)


def test_a_foreign_build_of_an_older_vmbuild_writes_its_archive(world: World, packed: Suspension) -> None:
    def older(about: Any) -> None:
        about["builds"][0].pop("outputs")
        about["builds"][0]["output"] = "old.tar"

    rebuild(world, older)
    result = world.resume()
    assert result is not None
    assert result.output == "old.tar"


# What is interrupted.


def interrupting(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Have the next measured work end with this."""

    class Interrupted(SilentMeter):
        def advance(self, amount: int) -> None:
            raise error

    @contextmanager
    def meter(*_: object, **__: object) -> Iterator[SilentMeter]:
        yield Interrupted()

    monkeypatch.setattr(Listener, "meter", meter)
    monkeypatch.setattr(SilentReporter, "meter", meter)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), HostError("the disk is full")], ids=repr)
def test_an_unpacking_that_ends_early_leaves_nothing(
    world: World, packed: Suspension, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        interrupting(patch, error)
        world.resume()
    assert_nothing_left(world.there)
    assert world.resume() is not None


@pytest.mark.parametrize(
    ("module", "step"),
    [(lifetime, "check_foreign_disk"), (facts, "write_facts"), (record, "save"), (suspension, "write_note")],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_ctrl_c_at_any_step_of_it_leaves_nothing(
    world: World, packed: Suspension, monkeypatch: pytest.MonkeyPatch, module: ModuleType, step: str
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, step, interrupt)
        world.resume()
    assert_nothing_left(world.there)


def test_what_a_killed_one_left_goes_with_the_next(world: World, packed: Suspension) -> None:
    folder = world.there.state / "machines"
    for name in (".box~1234", ".boxer~1234", ".box-2~1234"):
        (folder / name).mkdir(parents=True)
        (folder / name / "memory").write_bytes(b"half")
    assert machines(world.there) == []
    world.resume()
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == [".box-2~1234", ".boxer~1234", "box"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), HostError("the disk is full", details="where")], ids=repr)
def test_a_packing_that_ends_early_leaves_the_older_bundle_and_the_machine(
    world: World, packed: Suspension, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    older = world.bundle.read_bytes()
    beside = set(world.bundle.parent.iterdir())
    with monkeypatch.context() as patch, pytest.raises(type(error)) as caught:
        interrupting(patch, error)
        carry.suspend("box", world.bundle, world.here, SilentReporter())
    if isinstance(caught.value, HostError):
        assert (caught.value.brief, caught.value.details) == ("the disk is full", "where")
        assert "Nothing is lost: `vmbuild up --name box` goes on with it, here." in caught.value.resolution
    assert world.bundle.read_bytes() == older
    assert set(world.bundle.parent.iterdir()) == beside
    assert suspension.find(world.files) == packed
    with start.open_session(replace(REQUEST, name="box"), world.here, SilentReporter()):
        assert machines(world.here) == [("box", "running")]


def test_a_place_that_cannot_be_written_keeps_the_machine(world: World) -> None:
    with pytest.raises(HostError, match="cannot write") as caught:
        carry.suspend("box", world.cwd, world.here, SilentReporter())  # a folder
    assert "vmbuild up" in caught.value.resolution
    assert machines(world.here) == [("box", "suspended")]


# Within limits.


def test_limits_that_leave_nothing_are_refused(tmp_path: Path) -> None:
    limits = Limits(ends_at=100.0, reserve_s=60.0, suspend_to=tmp_path / "x.vmbundle")
    carry.check_limits(limits, 61)
    for seconds in (60, 10):
        with pytest.raises(UsageError, match="leaves nothing for the build: 60 s are kept") as caught:
            carry.check_limits(limits, seconds)
        assert "--reserve" in caught.value.resolution
    with pytest.raises(UsageError, match="cannot write a bundle to"):
        carry.check_limits(replace(limits, suspend_to=tmp_path / "none" / "x"), 61)
    carry.check_limits(replace(limits, suspend_to=None), 61)
    carry.check_limits(replace(limits, ends_at=None), 0)


def test_a_bundle_is_a_file_or_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert carry.bundle_place(str(tmp_path), "box") == tmp_path / "box.vmbundle"
    assert carry.bundle_place("~", "box") == tmp_path / "box.vmbundle"
    assert carry.bundle_place(f"{tmp_path}/new/", "box") == tmp_path / "new" / "box.vmbundle"
    assert carry.bundle_place(f"{tmp_path}/x", "box") == tmp_path / "x"


def within(world: World, limits: Limits, work: Callable[[Guard], str]) -> tuple[str, list[str]]:
    report = Listener()
    return carry.within(limits, "box", world.here, report, work), report.heard


def time_up(watch: Watch) -> str:
    raise TimeIsUp


def test_work_that_ends_in_time_is_not_disturbed(world: World) -> None:
    assert within(world, Limits(ends_at=0.0), lambda _: "done") == ("done", [])

    def fail(_: Watch) -> str:
        raise BuildError("a step failed")

    with pytest.raises(BuildError):
        within(world, Limits(ends_at=0.0), fail)
    assert machines(world.here) == [("box", "running")]


def test_work_is_watched_by_a_guard_of_its_machine(world: World) -> None:
    def look(guard: Guard) -> str:
        guard.tick()
        return "unreached"

    with pytest.raises(SuspendedError):
        within(world, Limits(ends_at=0.0, reserve_s=0.0), look)
    assert machines(world.here) == [("box", "suspended")]


def test_time_that_is_up_suspends_the_machine_where_it_is(world: World) -> None:
    record.save(world.files.builds, BUILD)
    with pytest.raises(SuspendedError, match="the build is suspended in the machine box") as caught:
        within(world, Limits(ends_at=0.0), time_up)
    assert caught.value.exit_code == 75
    assert "vmbuild up --name box" in caught.value.resolution
    assert "vmbuild attach box" in caught.value.resolution
    assert machines(world.here) == [("box", "suspended")]
    assert record.load_all(world.files.builds) == [BUILD]


def test_time_that_is_up_makes_a_bundle_where_one_is_wanted(world: World) -> None:
    with pytest.raises(SuspendedError) as caught:
        within(world, Limits(ends_at=0.0, suspend_to=world.bundle), time_up)
    assert caught.value.brief == f"the build is suspended in {world.bundle}"
    assert f"vmbuild resume {world.bundle}" in caught.value.resolution
    assert bundle.read_facts(world.bundle)["name"] == "box"
    assert world.resume() is None


def test_a_machine_that_cannot_be_suspended_goes_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise HostError("the disk is full")

    monkeypatch.setattr(suspension, "publish", refuse)
    with pytest.raises(HostError, match="disk is full"):
        within(world, Limits(ends_at=0.0, suspend_to=world.bundle), time_up)
    assert machines(world.here) == [("box", "running")]
    assert not world.bundle.exists()


# At the edge.


@pytest.fixture
def edge(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The settings of a command line that work on the first host."""
    monkeypatch.setenv("VMBUILD_CACHE_DIR", str(world.here.cache))
    monkeypatch.setenv("VMBUILD_STATE_DIR", str(world.here.state))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


def test_a_build_that_runs_out_of_time_ends_with_75_and_is_resumed(
    world: World, edge: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (world.cwd / "Dockerfile").write_text("FROM scratch\n")
    world.guest.endings = [TimeIsUp()]
    monkeypatch.setattr(bundle, "packing_rate", lambda *_: float("inf"))  # a disk of a few bytes has no rate
    argv = ["build", ".", "-t", "a:1", "-o", "a.tar", "--name", "box", "--progress", "plain"]
    assert program.run([*argv, "--time-limit", "45m", "--suspend-to", "kept/"]) == 2  # no such folder
    (world.cwd / "kept").mkdir()
    assert program.run([*argv, "--time-limit", "45m", "--suspend-to", "kept"]) == 75
    assert "vmbuild resume kept/box.vmbundle" in " ".join(capsys.readouterr().err.split())
    assert not (world.cwd / "a.tar").exists()
    assert world.guest.removed() == []
    monkeypatch.setenv("VMBUILD_STATE_DIR", str(world.there.state))
    assert program.run(["resume", "kept", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["image_id"], found["output"]) == (IMAGE, "a.tar")
    assert (world.cwd / "a.tar").exists()
    assert world.guest.removed() == ["/w"]


@pytest.mark.parametrize(
    "argv",
    [
        ["build", ".", "--suspend-to", "x.vmbundle"],
        ["attach", "--suspend-to", "x.vmbundle"],
        ["build", ".", "--time-limit", "30s"],
        ["build", ".", "--time-limit", "45m", "--reserve", "1h"],
    ],
    ids=" ".join,
)
def test_limits_that_cannot_be_are_wrong_usage(world: World, edge: None, argv: list[str]) -> None:
    assert program.run(argv) == UsageError.exit_code
    assert machines(world.here) == [("box", "running")]


def test_facts_in_a_bundle_are_all_that_resuming_needs(world: World, packed: Suspension) -> None:
    assert bundle.read_facts(world.bundle) == {
        "name": "box",
        "suspension": asdict(packed),
        "builds": [json.loads(json.dumps(asdict(replace(BUILD, cwd=""))))],
    }


def test_where_keys_lie_does_not_travel(world: World) -> None:
    record.save(world.files.builds, replace(BUILD, agents=("default", "git=/home/me/.ssh/secret-key")))
    carry.suspend("box", world.bundle, world.here, SilentReporter())
    told = json.dumps(bundle.read_facts(world.bundle))
    assert '"agents": ["default", "git"]' in told
    assert ".ssh" not in told


def test_a_build_with_secrets_stays_here(world: World) -> None:
    record.save(world.files.builds, replace(BUILD, has_secrets=True))
    with pytest.raises(UsageError, match="secrets"):
        carry.suspend("box", world.bundle, world.here, SilentReporter())
    assert machines(world.here) == [("box", "running")]
    carry.suspend("box", None, world.here, SilentReporter())
    assert machines(world.here) == [("box", "suspended")]
    with pytest.raises(UsageError, match="secrets"):  # packed later, they would travel too
        carry.suspend("box", world.bundle, world.here, SilentReporter())
    assert not world.bundle.exists()


def test_unless_somebody_asks_for_it(world: World) -> None:
    report = Listener()
    record.save(world.files.builds, replace(BUILD, has_secrets=True))
    carry.suspend("box", world.bundle, world.here, report, with_secrets=True)
    assert [line for line in report.warnings if "whoever can read" in line and str(world.bundle) in line]
    assert world.bundle.stat().st_mode & 0o777 == 0o600
    assert '"has_secrets": true' in json.dumps(bundle.read_facts(world.bundle))


def test_that_secrets_were_in_a_machine_s_memory_is_told(world: World) -> None:
    report = Listener()
    record.save(world.files.builds, replace(BUILD, has_secrets=True))
    record.forget(world.files.builds, BUILD)
    carry.suspend("box", world.bundle, world.here, report)
    assert [line for line in report.warnings if "builds with secrets have run" in line]
    record.forget_all(world.files.builds)  # as a boot does
    assert not record.had_secrets(world.files.builds)


def test_a_build_with_secrets_that_began_meanwhile_is_not_packed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    save = operate.suspend

    def suspend(*args: Any) -> Suspension:
        record.save(world.files.builds, replace(BUILD, has_secrets=True))
        return save(*args)

    monkeypatch.setattr(operate, "suspend", suspend)
    with pytest.raises(UsageError, match="secrets") as caught:
        carry.suspend("box", world.bundle, world.here, SilentReporter())
    assert "vmbuild up --name box" in caught.value.resolution
    assert not world.bundle.exists()
    assert machines(world.here) == [("box", "suspended")]


def test_a_place_that_there_is_not_suspends_nothing(world: World, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot write a bundle"):
        carry.suspend("box", tmp_path / "none" / "b.vmbundle", world.here, SilentReporter())
    assert not MachineFiles.at(world.here.state, "box").suspension.exists()


def test_a_machine_that_boots_a_disk_is_not_packed(world: World, tmp_path: Path) -> None:
    files = MachineFiles.at(world.here.state, "box")
    files.variables.touch()
    with pytest.raises(UsageError, match="cannot be packed as a bundle"):
        carry.suspend("box", tmp_path / "b.vmbundle", world.here, SilentReporter())
    assert not files.suspension.exists()
