"""Disks as people have them from elsewhere, provisioned for real and used: UEFI, a boot loader, systemd.

In this process instead of the program: the shipped catalogue has no row for a disk that is made here.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.machine import disks
from vmbuild import build, carry, operate, start
from vmbuild.errors import MachineError, UsageError
from vmbuild.follow import Watch
from vmbuild.guest import job
from vmbuild.guest.session import capture
from vmbuild.image import catalog, rootfs, store
from vmbuild.image.packages import package_path
from vmbuild.machine import lifetime
from vmbuild.model import (
    GIB,
    Arch,
    BuildRequest,
    ConsoleLogin,
    DiskBoot,
    DiskSpec,
    GuestImage,
    Home,
    MachineRequest,
    MachineStatus,
)
from vmbuild.outputs import parse_output
from vmbuild.reach import running_session
from vmbuild.report import SilentReporter

pytestmark = [pytest.mark.machine, pytest.mark.slow, pytest.mark.timeout(3600)]

LOGIN = ConsoleLogin(r"login: ", "root", r"[Pp]assword: ", disks.PASSWORD, r"[#$] ")
DEBIAN_13S = {"docker.io": "26.", "docker-cli": "26.", "docker-buildx": "0.13.", "containerd": "1.7."}
"""What a disk of Debian 12 has from Debian 13: how the versions begin."""

DOCKERFILE = """FROM scratch
COPY busybox /bin/busybox
RUN ["/bin/busybox", "sh", "-c", "/bin/busybox uname -m >/machine"]
"""


class Steps(SilentReporter):
    """Shows how long each step took, which docs/guest-images.md tells."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self._begun = time.monotonic()

    def step(self, text: str) -> None:
        self.said.append(text)
        print(f"{time.monotonic() - self._begun:6.1f} s  {text}", flush=True)


@dataclass
class World:
    """A home with one disk to boot, and what is asked of it."""

    home: Home
    spec: DiskSpec
    image: GuestImage
    provisioning: Steps
    steps: Steps = field(default_factory=Steps)

    def request(self, name: str) -> MachineRequest:
        return MachineRequest(name, 2, 2048, 12 * GIB, self.spec.name, timeout_s=600)

    def up(self, name: str) -> MachineStatus:
        return operate.up(self.request(name), self.home, self.steps)

    def guest(self, name: str, script: str) -> str:
        with running_session(name, self.home) as session:
            return capture(session, ["sh", "-c", script])


def disk_spec(name: str, disk: Path, login: ConsoleLogin | None) -> DiskSpec:
    with disk.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return DiskSpec(
        name=name,
        arch=Arch.ARM64,
        description="",
        folder=disk.parent,
        guest_files=catalog.find_catalog() / "guest",
        keyrings=(),
        machine_type="virt",
        cpu_model="cortex-a76",
        url=disk.as_uri(),
        digest=f"sha256:{digest}",
        checksums=None,
        signature=None,
        system="apt",
        login=login,
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """A cache of its own: the disks are kept, what is provisioned of them is made anew."""
    folder = tmp_path_factory.mktemp("disks")
    home = Home(folder / "cache", folder / "state")
    yield home
    for machine in lifetime.list_machines(home.state):
        operate.destroy(machine.name, home, SilentReporter())


def disk_cache(home: Home) -> Path:
    """Return where the disks are kept, and what they are made of."""
    given = os.environ.get("VMBUILD_TEST_CACHE")
    return Path(given) if given else home.cache


@pytest.fixture(scope="module", params=["cloud-init", "console", "bookworm"])
def world(request: pytest.FixtureRequest, home: Home) -> Iterator[World]:
    """A provisioned disk: by cloud-init with GRUB, of Debian 12 too; by a log-in on its console with systemd-boot."""
    kind: str = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CI", "true")
        base = disks.BOOKWORM if kind == "bookworm" else disks.TRIXIE
        made = disks.make_disks(Home(disk_cache(home), home.state), Steps(), base)
        disk, login = (made.plain, LOGIN) if kind == "console" else (made.cloud_init, None)
        spec = disk_spec(f"test-{kind}", disk, login)
        patch.setattr(catalog, "load_image", lambda *_: spec)
        steps = Steps()
        image = start.fetch_image(MachineRequest("none", 2, 2048, GIB, spec.name), home, steps)
        print(f"{image.size_bytes / GIB:.2f} GiB", flush=True)
        yield World(home, spec, image, steps)


@pytest.fixture(scope="module")
def machine(world: World) -> str:
    """The name of a machine that runs from the disk."""
    name = f"{world.spec.name}-1"
    world.up(name)
    return name


def test_its_phases_are_told(world: World) -> None:
    assert world.provisioning.said == [
        "Booting the disk for the first time, which takes minutes",
        "Unpacking vmbuild's files",
        "Reading the package lists",
        "Downloading Docker",
        "Installing Docker",
        "Starting Docker",
        "Waiting for the guest",
        "Waiting for Docker",
        "Removing what the first boot left behind",
        "Keeping the disk",
    ]


def test_it_is_provisioned_once_and_whole(world: World) -> None:
    steps = Steps()
    assert start.fetch_image(world.request("none"), world.home, steps) == world.image
    assert steps.said == []
    assert {check.problem for check in store.verify(world.home.cache)} == {""}
    assert not [path for path in (world.home.cache / "images").iterdir() if path.name.startswith(".test")]


def test_a_container_image_is_built_in_it(world: World, machine: str, tmp_path: Path) -> None:
    plan = disks.make_plan(disk_cache(world.home), SilentReporter())
    path = "usr/bin/busybox"
    busybox = rootfs.read_files(package_path(plan.tools["busybox-static"], plan.downloads), [path])[path]
    (tmp_path / "busybox").write_bytes(busybox)
    (tmp_path / "busybox").chmod(0o755)
    (tmp_path / "Dockerfile").write_text(DOCKERFILE)
    out = tmp_path / "out.tar"
    build.build(
        world.request(machine),
        BuildRequest(str(tmp_path), tags=("small:1",), outputs=(parse_output(str(out)),)),
        world.home,
        world.steps,
        stdin=io.BytesIO(),
        stdout=io.BytesIO(),
        watch=Watch(),
    )
    facts = json.loads(subprocess.check_output(["skopeo", "inspect", f"docker-archive:{out}"]))
    assert (facts["Os"], facts["Architecture"]) == ("linux", "arm64")
    with tarfile.open(out) as outer:
        manifest = json.load(outer.extractfile("manifest.json") or io.BytesIO())
        layer = outer.extractfile(manifest[0]["Layers"][-1])
        assert layer is not None
        with tarfile.open(fileobj=io.BytesIO(layer.read())) as inner:
            assert (inner.extractfile("machine") or io.BytesIO()).read() == b"aarch64\n"


def test_debian_12_has_docker_alone_from_debian_13_and_its_apt_as_it_was(world: World, machine: str) -> None:
    if world.spec.name != "test-bookworm":
        pytest.skip("of Debian 12")
    said = world.guest(machine, "dpkg-query -W -f '${Package} ${Version}\\n'")
    versions = dict(line.split() for line in said.splitlines())
    assert all(versions[name].startswith(begin) for name, begin in DEBIAN_13S.items()), versions
    assert versions["libc6"].startswith("2.36") and versions["runc"].startswith("1.1.5")
    assert {name for name, version in versions.items() if "+deb13" in version} <= set(DEBIAN_13S)
    assert world.guest(machine, "grep -rl trixie /etc/apt || true") == ""


def test_nothing_has_failed_in_it_and_it_has_what_was_asked_for(world: World, machine: str) -> None:
    assert world.guest(machine, "systemctl --failed --no-legend") == ""
    assert world.guest(machine, "hostname").strip() == f"vmbuild-{machine}"
    assert int(world.guest(machine, "df -k / | awk 'END { print $2 }'")) > 11 * 1024 * 1024
    for word in ("kpti=off", "nokaslr"):
        assert word in world.guest(machine, "cat /proc/cmdline").split()


def test_it_grows_while_it_runs(world: World, machine: str) -> None:
    operate.resize(machine, world.home, world.steps, cpus=1, memory_mib=None, disk_bytes=16 * GIB)
    assert int(world.guest(machine, "df -k / | awk 'END { print $2 }'")) > 15 * 1024 * 1024
    assert world.guest(machine, "nproc").strip() == "1"
    operate.resize(machine, world.home, world.steps, cpus=2, memory_mib=None, disk_bytes=None)


def test_it_is_suspended_and_goes_on(world: World, machine: str) -> None:
    boot = "cat /proc/sys/kernel/random/boot_id"
    before = world.guest(machine, boot)
    with running_session(machine, world.home) as session:
        capture(session, ["mkdir", "/run/a-build"])
        job.start(session, "/run/a-build", ["sleep", "600"], None)
    operate.suspend(machine, world.home, world.steps)
    assert world.up(machine).restored
    assert world.guest(machine, boot) == before
    world.guest(machine, "kill -0 $(cat /run/a-build/keeper)")  # OpenSSH's server was started again meanwhile
    assert abs(float(world.guest(machine, "date +%s")) - time.time()) < 5


def test_it_is_not_packed_as_a_bundle(world: World, machine: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be packed"):
        carry.suspend(machine, tmp_path / "x.vmbundle", world.home, world.steps)
    assert operate.status(machine, world.home).state == "running"


def test_it_is_stopped_and_keeps_what_it_has(world: World, machine: str) -> None:
    images = world.guest(machine, "docker images -q")
    begun = time.monotonic()
    assert operate.down(machine, world.home, world.steps)
    assert time.monotonic() - begun < operate.POWER_OFF_S  # it powered itself off
    world.up(machine)
    assert world.guest(machine, "docker images -q") == images


def test_two_machines_have_nothing_in_common(world: World, machine: str) -> None:
    identity = "cat /etc/machine-id; cat /var/lib/docker/engine-id; echo; cut -d ' ' -f 2 /root/.ssh/authorized_keys"
    first = world.guest(machine, identity).split()
    operate.destroy(machine, world.home, world.steps)
    other = f"{world.spec.name}-2"
    world.up(other)
    second = world.guest(other, identity).split()
    assert len(first) == len(second) == 3
    assert not set(first) & set(second)
    operate.destroy(other, world.home, world.steps)


def test_the_kept_disk_has_no_keys_and_no_identity(world: World, tmp_path: Path) -> None:
    assert isinstance(world.image.boot, DiskBoot)
    raw = tmp_path / "disk.raw"
    argv = ["qemu-img", "convert", "-O", "raw", str(world.image.boot.disk), str(raw)]
    subprocess.run(argv, check=True)

    def look(command: str) -> str:
        argv = ["debugfs", "-R", command, f"{raw}?offset={disks.ROOT_AT}"]
        return subprocess.run(argv, check=True, capture_output=True, text=True).stdout

    assert look("cat /etc/machine-id").strip() in ("", "uninitialized")
    assert "authorized_keys" not in look("ls /root")
    assert "ssh_host" not in look("ls /etc/ssh")
    assert look("cat /var/lib/docker/engine-id") == ""


def test_a_disk_without_a_system_ends_with_its_console_and_leaves_nothing(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blank = tmp_path / "blank.raw"
    with blank.open("wb") as file:
        file.write(bytes(510) + b"\x55\xaa")  # a partition table, as a disk has that is taken at all; nothing in it
        file.truncate(64 * 1024 * 1024)
    spec = disk_spec("test-blank", blank, LOGIN)
    monkeypatch.setattr(catalog, "load_image", lambda *_: spec)
    monkeypatch.setattr("vmbuild.provision.FIRST_BOOT_S", 30.0)
    request = MachineRequest("none", 1, 512, GIB, spec.name, timeout_s=30)
    with pytest.raises(MachineError) as failed:
        start.fetch_image(request, home, SilentReporter())
    assert "UEFI" in failed.value.details or "BdsDxe" in failed.value.details
    assert sorted(path.name for path in (home.cache / "images").glob("*test-blank*")) == ["test-blank.lock"]
