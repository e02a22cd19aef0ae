"""Which architecture a machine has, and what follows: guest image, limits, platforms. A table of what is refused."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.machine.conftest import make_qemu, make_spec
from vmbuild import build, settle
from vmbuild.errors import UsageError
from vmbuild.follow import Watch
from vmbuild.image import given
from vmbuild.machine import lifetime
from vmbuild.machine.facts import describe, write_facts
from vmbuild.machine.files import MachineFiles
from vmbuild.model import GIB, Arch, BuildRequest, Home, MachineRequest, MachineStatus
from vmbuild.report import SilentReporter

NO_CACHE = Path("/nonexistent")
PLAIN = MachineRequest("box", 2, 2048, GIB, "debian-13-arm64")
ARM = replace(PLAIN, arch=Arch.ARMHF, image="debian-13-armhf", given=frozenset({"arch"}))
ARM64 = replace(PLAIN, arch=Arch.ARM64, given=frozenset({"arch"}))
IMAGE_ARM = replace(PLAIN, image="debian-13-armhf", given=frozenset({"image"}))


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "cache", tmp_path / "state")


@pytest.fixture
def files(home: Home) -> MachineFiles:
    """The files of a machine that was a 32-bit one last time, and does not run."""
    files = MachineFiles.at(home.state, "box")
    files.folder.mkdir(parents=True)
    write_facts(files, describe(make_spec(home.state, arch=Arch.ARMHF), make_qemu(), GIB))
    return files


@pytest.fixture
def new(home: Home) -> MachineFiles:
    """The files of a machine that there is not yet."""
    return MachineFiles.at(home.state, "new")


@pytest.mark.parametrize(
    ("request_", "image"),
    [(PLAIN, "debian-13-arm64"), (ARM64, "debian-13-arm64"), (ARM, "debian-13-armhf"), (IMAGE_ARM, "debian-13-armhf")],
)
def test_a_new_machine_is_what_was_asked_for(new: MachineFiles, request_: MachineRequest, image: str) -> None:
    assert settle.settle(request_, new, NO_CACHE).image == image


def test_a_machine_keeps_its_architecture_when_nobody_asks_for_one(files: MachineFiles) -> None:
    settled = settle.settle(PLAIN, files, NO_CACHE)
    assert (settled.image, settled.given) == ("debian-13-armhf", PLAIN.given)
    assert settle.settle(settled, files, NO_CACHE) == settled


def test_a_machine_keeps_its_guest_image_when_nobody_asks_for_one(
    home: Home, files: MachineFiles, tmp_path: Path
) -> None:
    disk = tmp_path / "my.qcow2"
    disk.write_bytes(b"a disk")
    row = given.find_row(str(disk), home.cache)
    spec = make_spec(home.state)
    write_facts(files, describe(replace(spec, image=replace(spec.image, name=row.name)), make_qemu(), GIB))
    assert settle.settle(PLAIN, files, home.cache).image == row.name
    asked = replace(PLAIN, given=frozenset({"image"}))
    assert settle.settle(asked, files, home.cache).image == "debian-13-arm64"
    (home.cache / "given" / f"{row.name}.toml").unlink()
    assert settle.settle(PLAIN, files, home.cache).image == "debian-13-arm64"


def test_one_that_is_down_becomes_what_is_asked_for(files: MachineFiles) -> None:
    assert settle.settle(ARM64, files, NO_CACHE).image == "debian-13-arm64"
    assert settle.settle(ARM, files, NO_CACHE).image == "debian-13-armhf"


def test_a_machine_of_an_older_vmbuild_is_an_arm64_one(files: MachineFiles) -> None:
    files.facts.write_text(files.facts.read_text().replace(', "arch": "armhf"', ""))
    assert settle.machine_arch(PLAIN, files, NO_CACHE) == Arch.ARM64
    assert settle.machine_arch(ARM, files, NO_CACHE) == Arch.ARMHF


@pytest.mark.parametrize("state", ["running", "paused", "suspended", "broken", "restoring"])
def test_one_at_work_as_another_is_refused(files: MachineFiles, monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    monkeypatch.setattr(lifetime, "status", lambda _: MachineStatus("box", state))
    assert settle.settle(PLAIN, files, NO_CACHE).image == "debian-13-armhf"
    assert settle.settle(IMAGE_ARM, files, NO_CACHE).image == "debian-13-armhf"
    for asked in (ARM64, replace(PLAIN, given=frozenset({"image"}))):
        with pytest.raises(UsageError) as caught:
            settle.settle(asked, files, NO_CACHE)
        assert caught.value.brief == f"the machine box is {state} with the architecture arm, not arm64"
        assert "--name" in caught.value.resolution
        assert "`vmbuild down box`" in caught.value.resolution


def test_an_image_that_contradicts_the_architecture_is_refused(new: MachineFiles) -> None:
    with pytest.raises(UsageError, match="debian-13-arm64 is for arm64, and --arch asks for arm"):
        settle.settle(replace(ARM, image="debian-13-arm64", given=frozenset({"arch", "image"})), new, NO_CACHE)


def test_more_cpus_than_an_architecture_has_are_refused_where_they_were_chosen(new: MachineFiles) -> None:
    with pytest.raises(UsageError, match="arm has 8 CPUs at most, not 9") as caught:
        settle.settle(replace(ARM, cpus=9, given=frozenset({"arch", "cpus"})), new, NO_CACHE)
    assert "--cpus 8" in caught.value.resolution
    assert settle.settle(replace(ARM, cpus=16), new, NO_CACHE).cpus == 8  # the host's number, which nobody chose
    assert settle.settle(replace(PLAIN, cpus=16, given=frozenset({"cpus"})), new, NO_CACHE).cpus == 16


def test_more_memory_than_an_architecture_has_is_refused(new: MachineFiles) -> None:
    with pytest.raises(UsageError, match=r"arm has 16\.0 GiB of memory at most") as caught:
        settle.settle(replace(ARM, memory_mib=16385), new, NO_CACHE)
    assert "--memory 16384M" in caught.value.resolution
    assert settle.settle(replace(ARM, memory_mib=16384), new, NO_CACHE).memory_mib == 16384
    assert settle.settle(replace(PLAIN, memory_mib=500_000), new, NO_CACHE).memory_mib == 500_000


@pytest.mark.parametrize(
    ("asked", "arch", "platforms"),
    [
        ((), Arch.ARM64, ("linux/arm64",)),
        (("linux/arm/v6", "linux/arm64"), Arch.ARM64, ("linux/arm/v6", "linux/arm64")),
        ((), Arch.ARMHF, ("linux/arm/v7",)),
        (("linux/arm/v6",), Arch.ARMHF, ("linux/arm/v6",)),
    ],
)
def test_platforms_are_the_machines_own_or_ones_that_it_runs(
    asked: tuple[str, ...], arch: Arch, platforms: tuple[str, ...]
) -> None:
    assert settle.choose_platforms(asked, arch) == platforms


def test_a_platform_that_a_machine_cannot_run_is_refused() -> None:
    with pytest.raises(UsageError, match="arm does not build for linux/arm64") as caught:
        settle.choose_platforms(("linux/arm/v7", "linux/arm64"), Arch.ARMHF)
    assert caught.value.resolution == "Choose linux/arm/v7 or linux/arm/v6. A machine with --arch arm64 does."
    with pytest.raises(UsageError) as caught:
        settle.choose_platforms(("linux/riscv64",), Arch.ARMHF)
    assert caught.value.resolution == "Choose linux/arm/v7 or linux/arm/v6."


def test_a_foreign_platform_costs_no_start(home: Home, files: MachineFiles, tmp_path: Path) -> None:
    """Neither is the context read, which is not there, nor the machine started."""
    asked = BuildRequest(str(tmp_path / "none"), platforms=("linux/arm64",))
    with pytest.raises(UsageError, match="does not build for linux/arm64"):
        build.build(
            *(ARM, asked, home, SilentReporter()),
            stdin=io.BytesIO(),
            stdout=io.BytesIO(),
            watch=Watch(),
        )
    with pytest.raises(UsageError, match="does not build for linux/arm64"):
        build.base(ARM, "debian:trixie-slim", home, SilentReporter(), platforms=("linux/arm64",), force=False)
