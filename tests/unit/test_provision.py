"""A disk is provisioned, kept, and nothing half-made stays: with the fake QEMU and a guest that says what it must."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.guest.fakes import FakeSession, Reply
from tests.unit.machine.conftest import make_qemu
from vmbuild import process, provision, start, stock
from vmbuild.deadline import Deadline
from vmbuild.errors import GuestImageError, MachineError, UsageError
from vmbuild.guest import ready
from vmbuild.guest.firstboot import PROVISION
from vmbuild.image import catalog, cloud, store
from vmbuild.machine import control, lifetime, serial
from vmbuild.machine.files import MachineFiles
from vmbuild.machine.firmware import Firmware
from vmbuild.model import GIB, Arch, ConsoleLogin, DiskBoot, DiskSpec, Home, MachineRequest, PassOn
from vmbuild.report import SilentReporter

REQUEST = MachineRequest("box", 2, 2048, 20 * GIB, "cloudy", snapshots=True)
LOGIN = ConsoleLogin("login: ", "root", "Password: ", "secret", "# ")
SOURCE = b"QFI\xfb" + (3).to_bytes(4, "big") + bytes(16) + (2 * GIB).to_bytes(8, "big") + b"disk"


class Steps(SilentReporter):
    """Remembers what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def step(self, text: str) -> None:
        self.said.append(text)


@dataclass
class World:
    """A home with a disk to provision; what the guest says, and what it was asked."""

    home: Home
    spec: DiskSpec
    fetched: cloud.Fetched
    says: list[str | BaseException] = field(
        default_factory=lambda: ["phase Installing \x1b[1mDocker", "noise", "provisioned"]
    )
    answers: tuple[tuple[tuple[str, ...], Reply], ...] = ((("sh",), Reply()), (("poweroff",), Reply()))
    sessions: list[FakeSession] = field(default_factory=list)
    typed: list[tuple[Any, ...]] = field(default_factory=list)
    machines: list[MachineFiles] = field(default_factory=list)
    steps: Steps = field(default_factory=Steps)

    def ensure(self, request: MachineRequest = REQUEST) -> Any:
        return provision.ensure(self.spec, request, self.home, self.steps)

    @property
    def left(self) -> list[str]:
        """What is in the cache of guest images."""
        return sorted(path.name for path in (self.home.cache / "images").iterdir())


@pytest.fixture
def world(tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    (tmp_path / "disk.qcow2").write_bytes(SOURCE)
    (tmp_path / "VARS.fd").write_bytes(b"variables")
    spec = DiskSpec(
        *("cloudy", Arch.ARM64, "", tmp_path, catalog.find_catalog() / "guest", (), "virt", "cortex-a76"),
        *("https://example.org/disk.qcow2", None, None, None, "apt", None),
    )
    fetched = cloud.Fetched("cloudy", tmp_path / "disk.qcow2", spec.url, "sha512:ab", "cd", len(SOURCE))
    world = World(Home(tmp_path / "cache", tmp_path / "state"), spec, fetched)
    qemu = replace(make_qemu(), firmware=Firmware(tmp_path / "CODE.fd", tmp_path / "VARS.fd"))

    def listen(files: MachineFiles, *_: object, **__: object) -> Iterator[str]:
        world.machines.append(files)
        for line in world.says:
            if isinstance(line, BaseException):
                raise line
            yield line

    def power_off(files: MachineFiles, _: object) -> bool:
        lifetime.stop(files, Deadline.after(0))
        return True

    def wait_ready(*_: object) -> FakeSession:
        world.sessions.append(FakeSession(*world.answers))
        return world.sessions[-1]

    monkeypatch.setattr(cloud, "ensure", lambda *_, **__: world.fetched)
    monkeypatch.setattr(provision, "probe_for", lambda *_: qemu)
    monkeypatch.setattr(start, "probe_for", lambda *_: qemu)
    monkeypatch.setattr(control, "listen", listen)
    monkeypatch.setattr(lifetime, "wait_off", power_off)
    monkeypatch.setattr(ready, "wait_ready", wait_ready)
    monkeypatch.setattr(provision, "run_on_console", lambda *words: world.typed.append(words))
    monkeypatch.setattr(catalog, "load_image", lambda *_: world.spec)
    monkeypatch.setattr(provision, "host_mirrors", lambda: {"debian": "http://localhost:3142/debian/"})
    yield world
    for files in (*world.machines, *lifetime.find_machines(world.home.state)):
        lifetime.stop(files, Deadline.after(0))


def test_the_provisioned_disk_is_kept_and_used_again(world: World) -> None:
    image = world.ensure()
    assert isinstance(image.boot, DiskBoot)
    assert image.boot.disk.read_bytes()[32:] == b"disk"
    manifest = json.loads((image.boot.disk.parent / "manifest.json").read_text())
    assert (manifest["name"], manifest["source"]) == ("cloudy", "https://example.org/disk.qcow2")
    assert manifest["source_digest"] == "sha512:ab"
    assert world.left == sorted([image.digest, "cloudy.lock", f"cloudy.{store.recipe_digest(world.spec)[:16]}"])
    assert sorted(path.name for path in image.boot.disk.parent.iterdir()) == ["disk.qcow2", "manifest.json"]
    assert world.ensure() == image
    assert len(world.machines) == 1


def test_phases_are_steps_without_what_a_terminal_would_obey(world: World) -> None:
    world.ensure()
    assert world.steps.said == [
        "Booting the disk for the first time, which takes minutes",
        "Installing Docker",
        "Removing what the first boot left behind",
        "Keeping the disk",
    ]


def test_it_is_cleaned_up_before_it_is_kept(world: World) -> None:
    world.ensure()
    assert [call.argv for call in world.sessions[0].calls] == [
        ("sh", "/run/vmbuild-first/provision", "clean"),
        ("poweroff",),
    ]
    assert world.sessions[0].closed


@pytest.mark.parametrize(
    "error", [MachineError("the guest could not become `provisioned`", details="no room"), KeyboardInterrupt()]
)
def test_nothing_half_made_stays_and_nothing_runs(world: World, error: BaseException) -> None:
    world.says = ["phase Installing Docker", error]
    with pytest.raises(type(error)):
        world.ensure()
    assert world.left == ["cloudy.lock"]
    assert lifetime.status(world.machines[0]).state == "stopped"


def test_a_failure_has_the_consoles_last_lines(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.says = [MachineError("the guest could not become `provisioned`", details="no room")]
    monkeypatch.setattr(serial, "tail", lambda *_: "E: no space left")
    with pytest.raises(MachineError) as failed:
        world.ensure()
    assert failed.value.details == "no room\nE: no space left"


def test_a_guest_that_is_not_clean_is_not_kept(world: World) -> None:
    world.answers = ((("sh",), Reply(code=1)),)
    with pytest.raises(Exception, match="failed in the guest"):
        world.ensure()
    assert world.left == ["cloudy.lock"]


def test_a_guest_that_stays_on_is_not_kept(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifetime, "wait_off", lambda *_: False)
    with pytest.raises(MachineError, match="does not power off"):
        world.ensure()
    assert world.left == ["cloudy.lock"]


def test_what_a_killed_attempt_left_is_ended_and_removed(world: World) -> None:
    left = world.home.cache / "images" / ".cloudy~abc" / "cloudy"
    left.mkdir(parents=True)
    (left / "qemu.pid").write_text("1")
    world.ensure()
    assert not left.exists()


def test_a_disk_without_cloud_init_is_entered_on_its_console(world: World) -> None:
    world.spec = replace(world.spec, login=LOGIN)
    world.ensure()
    assert [words[1:3] for words in world.typed] == [(LOGIN, PROVISION)]


def test_with_cloud_init_nobody_types(world: World) -> None:
    world.ensure()
    assert world.typed == []


def test_packages_come_from_where_the_user_says_as_the_guest_sees_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, str]] = []
    monkeypatch.setattr(provision, "write_first_boot", lambda *words: told.append(words[3]))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:8080")
    mirror = "http://mirror.example/debian-security"
    world.ensure(replace(REQUEST, security_mirror=mirror, pass_on=PassOn(proxy=True)))
    assert {key: told[0][key] for key in ("SYSTEM", "MIRROR", "SECURITY_MIRROR", "http_proxy")} == {
        "SYSTEM": "apt",
        "MIRROR": "http://10.0.2.2:3142/debian",
        "SECURITY_MIRROR": "http://mirror.example/debian-security",
        "http_proxy": "http://10.0.2.2:8080",
    }


def test_the_kit_has_what_a_guest_needs_and_its_programs_can_be_run(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    kits: list[list[Any]] = []
    monkeypatch.setattr(provision, "write_first_boot", lambda *words: kits.append(words[2]))
    world.ensure()
    modes = {file.path: file.mode for file in kits[0]}
    assert len(modes) == len(kits[0])
    for program in ("job", "second-stage", "control", "grow", "take-over"):
        assert modes[f"usr/lib/vmbuild/{program}"] == 0o755
    for name in ("etc/docker/daemon.json", "etc/containerd/config.toml", "usr/share/vmbuild/parts"):
        assert modes[name] == 0o644


def test_a_machine_starts_from_a_copy_and_boots(world: World) -> None:
    with start.open_session(REQUEST, world.home, world.steps):
        files = MachineFiles.at(world.home.state, "box")
        now = lifetime.status(files)
    assert (now.state, now.image, now.restored) == ("running", "cloudy", False)
    assert now.disk_virtual_bytes == 20 * GIB
    assert files.disk.read_bytes()[32:] == b"disk"
    assert files.variables.read_bytes() == b"variables"
    assert "pflash1=variables" in process.command_line(now.pid or 0)


def test_a_disk_that_is_larger_than_the_setting_stays_so(world: World) -> None:
    with start.open_session(replace(REQUEST, disk_bytes=GIB), world.home, world.steps):
        assert lifetime.status(MachineFiles.at(world.home.state, "box")).disk_virtual_bytes == provision.DISK_BYTES


def test_a_machine_of_another_kind_is_not_booted_from_this_disk(world: World) -> None:
    files = MachineFiles.at(world.home.state, "box")
    files.folder.mkdir(parents=True)
    files.disk.write_bytes(SOURCE)  # an appliance's, which has no firmware
    with (
        pytest.raises(UsageError, match="of another kind of guest image than cloudy"),
        start.open_session(REQUEST, world.home, world.steps),
    ):
        pass
    assert files.disk.read_bytes() == SOURCE


def test_no_snapshot_is_made_of_a_disk(world: World) -> None:
    with pytest.raises(UsageError, match="cloudy is a disk"):
        stock.make_snapshot(REQUEST, world.home, world.steps)


def test_a_download_that_fails_boots_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> cloud.Fetched:
        raise GuestImageError("the disk cannot be downloaded")

    monkeypatch.setattr(cloud, "ensure", fail)
    with pytest.raises(GuestImageError):
        world.ensure()
    assert world.machines == []


def test_a_disk_is_provisioned_anew_only_when_another_is_published(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refresh() -> Any:
        return start.fetch_image(REQUEST, world.home, world.steps, refresh=True)

    newest = ["sha512:ab"]
    monkeypatch.setattr(cloud, "ask_newest", lambda _: newest[0])
    image = refresh()
    assert refresh() == image
    assert len(world.machines) == 1
    newest[0], world.fetched = "sha512:ef", replace(world.fetched, source_digest="sha512:ef")
    world.says = [MachineError("it hangs")]
    with pytest.raises(MachineError):
        refresh()
    assert start.fetch_image(REQUEST, world.home, world.steps) == image, "the old one stays"
    world.says = ["provisioned"]
    newer = refresh()
    assert newer.digest != image.digest, "a failure is not forgotten: the newer disk is still to be provisioned"
    assert start.fetch_image(REQUEST, world.home, world.steps) == newer


def test_a_disk_gets_every_program_that_is_run_in_a_guest(world: World) -> None:
    source = Path(provision.__file__).parent
    texts = [path.read_text() for path in source.rglob("*.py")]
    run = {name for text in texts for name in re.findall(r'"/(usr/lib/vmbuild/[a-z-]+)"', text)}
    assert {"usr/lib/vmbuild/context", "usr/lib/vmbuild/job"} <= run
    assert run <= {file.path for file in provision._kit(world.spec)}
