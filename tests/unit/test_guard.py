"""What a build may cost: when its time is up, and what counts as standing still. The clock is a number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from vmbuild import guard, process
from vmbuild.errors import BuildError, HostError, StalledError, TimeIsUp
from vmbuild.guard import Guard, Limits
from vmbuild.machine import bundle, lifetime
from vmbuild.machine.files import MachineFiles
from vmbuild.model import GIB, MIB

FOREVER = 10_000.0


@dataclass
class World:
    """What the guard sees: the time, and what QEMU takes and has done."""

    now: float = 1000.0
    pid: int | None = 7
    memory: int | None = 2 * GIB
    disk: int = 3 * GIB
    rate: float = 100.0 * MIB
    cpu: float | None = 50.0
    measured: tuple[Path, Path] | None = None
    measurements: int = 0
    looks: int = 0


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()

    def find_pid(*_: object) -> int | None:
        world.looks += 1
        return world.pid

    def packing_rate(path: Path, into: Path) -> float:
        world.measured = (path, into)
        world.measurements += 1
        return world.rate

    monkeypatch.setattr(lifetime, "find_pid", find_pid)
    monkeypatch.setattr(process, "rss_bytes", lambda _: world.memory)
    monkeypatch.setattr(process, "cpu_seconds", lambda _: world.cpu)
    monkeypatch.setattr(bundle, "data_bytes", lambda _: world.disk)
    monkeypatch.setattr(bundle, "packing_rate", packing_rate)
    return world


@pytest.fixture
def files(tmp_path: Path) -> MachineFiles:
    return MachineFiles.at(tmp_path, "box")


def make_guard(world: World, files: MachineFiles, limits: Limits) -> Guard:
    return Guard(limits, files, clock=lambda: world.now)


def time_up(world: World, guard: Guard) -> float:
    """Return the moment at which a guard ends the following; it is asked twice a second."""
    while world.now < FOREVER:
        world.now += 0.5
        try:
            guard.tick()
        except TimeIsUp:
            return world.now
    return FOREVER


def test_without_limits_nothing_ends(world: World, files: MachineFiles) -> None:
    assert time_up(world, make_guard(world, files, Limits())) == FOREVER
    assert world.measurements == 0


def test_it_looks_every_two_seconds_however_often_it_is_asked(world: World, files: MachineFiles) -> None:
    watch = make_guard(world, files, Limits(ends_at=FOREVER * 2, stall_timeout_s=FOREVER))
    for _ in range(100):
        watch.tick()
    assert world.looks == 1
    for _ in range(100):
        world.now += 0.1
        watch.tick()
    assert 5 <= world.looks <= 6


def test_the_time_ends_early_enough_to_write_memory_and_disk_into_a_bundle(
    world: World, files: MachineFiles, tmp_path: Path
) -> None:
    limits = Limits(ends_at=5000.0, reserve_s=60.0, suspend_to=tmp_path / "elsewhere" / "b.vmbundle")
    # The memory is written beside the disk first; then both are read, packed and written. Twice as long as measured.
    needed = 60.0 + 2 * (2 + 2 + 3) * 1024 / 100
    up = time_up(world, make_guard(world, files, limits))
    assert 5000 - needed - guard.LOOK_EVERY_S - 0.5 <= up <= 5000 - needed
    assert world.measured == (files.disk, tmp_path / "elsewhere")
    assert world.measurements == 1


def test_without_a_bundle_only_the_memory_is_written(world: World, files: MachineFiles) -> None:
    needed = 30.0 + 2 * 2 * 1024 / 100
    up = time_up(world, make_guard(world, files, Limits(ends_at=5000.0, reserve_s=30.0)))
    assert 5000 - needed - guard.LOOK_EVERY_S - 0.5 <= up <= 5000 - needed
    assert world.measured == (files.disk, files.folder)


def test_a_guest_that_grows_is_suspended_earlier(world: World, files: MachineFiles) -> None:
    limits = Limits(ends_at=5000.0, reserve_s=0.0)
    watch = make_guard(world, files, limits)
    world.now = 4900.0
    watch.tick()
    world.memory = 6 * GIB
    world.now = 4902.0
    with pytest.raises(TimeIsUp):
        watch.tick()


@pytest.mark.parametrize(("memory", "rate"), [(None, 1.0), (2 * GIB, float("inf"))], ids=["no figure", "only holes"])
def test_what_cannot_be_measured_leaves_the_reserve(
    world: World, files: MachineFiles, memory: int | None, rate: float
) -> None:
    world.memory, world.rate = memory, rate
    up = time_up(world, make_guard(world, files, Limits(ends_at=2000.0, reserve_s=100.0)))
    assert 1897.5 <= up <= 1900


def test_a_folder_that_takes_no_trial_ends_no_build(
    world: World, files: MachineFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> float:
        raise HostError("the disk is full")

    monkeypatch.setattr(bundle, "packing_rate", refuse)
    up = time_up(world, make_guard(world, files, Limits(ends_at=2000.0, reserve_s=100.0)))
    assert 1897.5 <= up <= 1900


def test_a_limit_that_has_passed_already_ends_at_once(world: World, files: MachineFiles) -> None:
    with pytest.raises(TimeIsUp):
        make_guard(world, files, Limits(ends_at=900.0)).tick()


def test_a_machine_that_is_gone_is_for_others_to_find(world: World, files: MachineFiles) -> None:
    world.pid = None
    assert time_up(world, make_guard(world, files, Limits(ends_at=1100.0, stall_timeout_s=10.0))) == FOREVER


# Standing still.


STALL = Limits(stall_timeout_s=60.0)


def pass_time(world: World, watch: Guard, seconds: float, *, cpu: float = 0.0) -> None:
    """Let time pass, the machine using so many CPUs, and the guard asked as often as it is."""
    for _ in range(round(seconds * 2)):
        world.now += 0.5
        if world.cpu is not None:
            world.cpu += cpu / 2
        watch.tick()


@pytest.fixture
def watch(world: World, files: MachineFiles) -> Iterator[Guard]:
    yield make_guard(world, files, STALL)


@pytest.mark.parametrize("cpu", [0.0, guard.IDLE * 0.9], ids=["nothing", "no more than a progress bar"])
def test_silence_without_work_is_a_stall(world: World, watch: Guard, cpu: float) -> None:
    pass_time(world, watch, 59, cpu=cpu)
    with pytest.raises(StalledError, match="said nothing and done nothing for 60 s") as caught:
        pass_time(world, watch, 6, cpu=cpu)
    assert isinstance(caught.value, BuildError)
    assert "--stall-timeout" in caught.value.resolution


def test_work_without_a_word_is_none(world: World, watch: Guard) -> None:
    pass_time(world, watch, 1000, cpu=guard.IDLE * 1.2)


def test_words_without_work_are_none(world: World, watch: Guard) -> None:
    for _ in range(20):
        pass_time(world, watch, 50)
        watch.heard()
    with pytest.raises(StalledError):
        pass_time(world, watch, 66)


def test_the_count_begins_anew_with_the_last_word(world: World, watch: Guard) -> None:
    pass_time(world, watch, 40)
    watch.heard()
    pass_time(world, watch, 59)
    with pytest.raises(StalledError):
        pass_time(world, watch, 6)


def test_the_count_begins_anew_with_the_last_work(world: World, watch: Guard) -> None:
    pass_time(world, watch, 300, cpu=1.0)
    pass_time(world, watch, 40)  # of the last minute, a third was work
    with pytest.raises(StalledError):
        pass_time(world, watch, 30)


def test_a_burst_of_work_counts_as_long_as_it_is_in_sight(world: World, watch: Guard) -> None:
    pass_time(world, watch, 50)
    pass_time(world, watch, 15, cpu=1.0)
    pass_time(world, watch, 50)
    with pytest.raises(StalledError):
        pass_time(world, watch, 30)


def test_a_host_that_tells_no_cpu_time_never_finds_one(world: World, watch: Guard) -> None:
    world.cpu = None
    pass_time(world, watch, 1000)


def test_a_figure_that_comes_late_begins_the_count(world: World, watch: Guard) -> None:
    world.cpu = None
    pass_time(world, watch, 100)
    world.cpu = 10.0
    pass_time(world, watch, 55)
    with pytest.raises(StalledError):
        pass_time(world, watch, 10)


def test_figures_are_forgotten_that_are_older_than_needed(world: World, watch: Guard) -> None:
    pass_time(world, watch, 1000, cpu=1.0)
    assert len(watch._used) <= 60 / guard.LOOK_EVERY_S + 2


def test_without_a_limit_it_may_stand_still_for_ever(world: World, files: MachineFiles) -> None:
    pass_time(world, make_guard(world, files, Limits(ends_at=FOREVER)), 1000)
