"""The sides of a comparison: machines and what has none, brought up with the same base images."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from vmbuild import build, operate, process, settle
from vmbuild.bench import binfmt, engine, facts, phases, userspace
from vmbuild.bench.runner import Command, Measured, measure
from vmbuild.bench.workload import Workload
from vmbuild.errors import UsageError
from vmbuild.guest import archive, bases, oci
from vmbuild.image import base as base_image
from vmbuild.image import catalog
from vmbuild.machine import lifetime
from vmbuild.machine.files import MachineFiles
from vmbuild.machine.probe import probe
from vmbuild.model import Home, MachineRequest, arch_name
from vmbuild.reach import channel_of
from vmbuild.report import Reporter
from vmbuild.start import asking_for, open_session


@dataclass(frozen=True)
class SideKind:
    """A way to build: `runner` of the side without a machine, None for one with a machine."""

    what: str
    runner: str | None = None
    cold: bool = False
    disk: bool = False


SIDES = {
    "vm": SideKind("the machine, running already"),
    "vm-cold": SideKind("the machine, booted for the build", cold=True),
    "vm-disk": SideKind("a machine that runs a distribution's own disk", disk=True),
    "user": SideKind("buildah, with qemu-user through binfmt_misc", runner="auto"),
    "native": SideKind("buildah on an ARM host", runner="native"),
}
"""What can be compared, by name."""


@dataclass(frozen=True)
class Asked:
    """What to compare: the first side with the others, in a machine of this kind.

    `quiet_s` is how long a run may wait until the host is idle: what the run before left to do is no part of it.
    """

    workloads: Sequence[Workload]
    sides: tuple[str, ...]
    user_runner: str
    disk_image: str
    command: str
    quiet_s: float = 20.0


@dataclass(frozen=True)
class Side:
    """A way to build that is ready: what makes one run, and what there is to know of it."""

    name: str
    run: Callable[[Path], Measured]
    read: Callable[[Measured], tuple[phases.Phase, ...]]
    before: Callable[[], None]
    facts: Callable[[], Mapping[str, str]]


class Bare(Protocol):
    """A side without a machine, for one platform."""

    def import_base(self, reference: str, archive: Path | None, /) -> None:
        """Give it a base image by its full name, of an archive or else the registry's."""

    def run_build(self, work: Workload, output: Path, /) -> Measured:
        """Build a workload and write its archive. Raises RunFailedError."""

    def read(self, work: Workload, measured: Measured, /) -> tuple[phases.Phase, ...]:
        """Return the phases of a build that was measured."""

    def qemu_version(self) -> str:
        """Return the emulator's version; nothing where there is none, or it cannot be known."""

    def describe(self) -> dict[str, str]:
        """Return what there is to know of it in a report."""

    def close(self) -> None:
        """Leave the host as it was, but for what is in vmbuild's cache."""


def open_sides(
    request: MachineRequest,
    asked: Asked,
    work: Workload,
    home: Home,
    report: Reporter,
    folder: Path,
    until_done: ExitStack,
) -> list[Side]:
    """Bring every side up, with the same base images."""
    known = [name for name in work.bases if _is_known(name)]
    opened: dict[str, Side] = {}
    # What cannot be is said before anything that takes long.
    user_sides = {
        name: _open_bare(SIDES[name], work.platform, request, asked, home, report)
        for name in asked.sides
        if SIDES[name].runner is not None
    }
    for space in user_sides.values():
        until_done.callback(space.close)
    archives: dict[str, Path] = {}
    machines = [name for name in asked.sides if SIDES[name].runner is None]
    if not machines and known:
        raise UsageError("base images are made in a machine", resolution="Compare with vm, vm-cold or vm-disk.")
    for name in machines:
        own = _request_for(name, request, asked)
        until_done.callback(_stop, own.name, home, report)
        _stop(own.name, home, report)  # its CPUs and memory may have been others, and the host's CPUs free
        for reference in known:
            build.base(own, reference, home, report, platforms=(work.platform,), force=False)
            if user_sides and reference not in archives:
                archives[reference] = folder / f"base-{len(archives)}.tar"
                _export_base(own, reference, work.platform, archives[reference], home, report)
        opened[name] = _machine_side(name, own, work, home, report)
    for name, space in user_sides.items():
        for reference in work.bases:
            space.import_base(oci.full_reference(reference), archives.get(reference))
        opened[name] = _user_side(name, space, work)
    _warn_of_versions(user_sides, request, home, report)
    return [opened[name] for name in asked.sides]


def _open_bare(
    kind: SideKind, platform: str, request: MachineRequest, asked: Asked, home: Home, report: Reporter
) -> Bare:
    """Return a side without a machine. Raises HostError when this host cannot."""
    runner = asked.user_runner if kind.runner == "auto" else str(kind.runner)
    if runner == "auto" and not process.has_program("buildah") and process.has_program("docker"):
        runner = "docker"
    if runner != "docker":
        return userspace.open_userspace(platform, runner, home.cache / "bench")
    has = os.cpu_count() or 1
    if request.cpus < has:
        report.warn(f"Docker's engine builds on all {has} CPUs of this host, the machine on {request.cpus}")
    return engine.open_engine(platform)


def _stop(name: str, home: Home, report: Reporter) -> None:
    if operate.exists(name, home):
        operate.down(name, home, report)


def _is_known(reference: str) -> bool:
    try:
        catalog.load_base(reference)
    except UsageError:
        return False
    return True


def _request_for(name: str, request: MachineRequest, asked: Asked) -> MachineRequest:
    """Return the machine of a side: each has one of its own, started from no snapshot and making none."""
    own = replace(request, name=f"{request.name}-{name}", snapshots=False, demanded=frozenset())
    return replace(own, image=asked.disk_image) if SIDES[name].disk else own


def _export_base(
    request: MachineRequest, reference: str, platform: str, path: Path, home: Home, report: Reporter
) -> None:
    """Write a base image of the machine as a docker archive."""
    tag = catalog.load_base(reference).repo_tag
    own = f"localhost/vmbuild-bench/{tag}"  # an engine of the host may have another by the plain name
    with open_session(request, home, report) as session, path.open("wb") as out:
        found = bases.find(session, tag)
        assert found is not None  # noqa: S101 - it was made a moment ago
        digest = str(found.manifests[platform]["digest"])
        known = base_image.known_layers(home.cache)
        archive.write_archive(session, digest, (own,), out, known, report, channel_of(_files(request, home)))


def _files(request: MachineRequest, home: Home) -> MachineFiles:
    return MachineFiles.at(home.state, request.name)


def _machine_side(name: str, request: MachineRequest, work: Workload, home: Home, report: Reporter) -> Side:
    files = _files(request, home)
    env = _build_env(request, home)

    def before() -> None:
        if SIDES[name].cold:
            _stop(request.name, home, report)
        else:
            operate.up(request, home, report)

    def run(output: Path) -> Measured:
        argv = _build_argv(request, work, output)
        return measure(Command(argv, env, apart=partial(_find_qemu, files)))

    def read(measured: Measured) -> tuple[phases.Phase, ...]:
        return phases.read_buildkit(measured.lines, work.stages, measured.begun, measured.ended)

    return Side(name, run, read, before, partial(_machine_facts, name, request, home, report))


def _find_qemu(files: MachineFiles) -> list[int]:
    pid = lifetime.find_pid(files)
    return [] if pid is None else [pid]


def _build_argv(request: MachineRequest, work: Workload, output: Path) -> list[str]:
    """Return the command that a user would build with."""
    argv = [sys.executable, "-m", "vmbuild", "build", str(work.context), "--file", str(work.dockerfile.absolute())]
    argv += ["--name", request.name, "--platform", work.platform, "--progress", "rawjson", "--no-cache"]
    return [*argv, "--tag", "vmbuild-bench", "--output", str(output), *work.options()]


def _build_env(request: MachineRequest, home: Home) -> dict[str, str]:
    own = {"DISK": str(request.disk_bytes), "SNAPSHOTS": "off", "STATE_DIR": str(home.state)}
    if request.arch:
        own["ARCH"] = arch_name(request.arch)
    quiet = {"CI": "1"}  # nothing goes on in the background: not while the other side has its turn, either
    return {**asking_for(request, home.cache), **quiet, **{f"VMBUILD_{name}": value for name, value in own.items()}}


def _machine_facts(name: str, request: MachineRequest, home: Home, report: Reporter) -> dict[str, str]:
    qemu = probe(settle.machine_arch(request, _files(request, home), home.cache), home.cache)
    if SIDES[name].cold:
        operate.up(request, home, report)  # to be asked
    pids = _find_qemu(_files(request, home))
    argv = process.command_line(pids[0]).split() if pids else []
    return {
        "builder": f"vmbuild {version('vmbuild')}, BuildKit in the guest",
        "qemu": binfmt.version_of(qemu.binary),
        "cpu": next((value for option, value in pairwise(argv) if option == "-cpu"), ""),
        "flags": facts.pick_flags(argv),
        "guest image": request.image,
    }


def _user_side(name: str, space: Bare, work: Workload) -> Side:
    return Side(name, partial(space.run_build, work), partial(space.read, work), lambda: None, space.describe)


def _warn_of_versions(spaces: Mapping[str, Bare], request: MachineRequest, home: Home, report: Reporter) -> None:
    """Say when the two sides do not run the same QEMU: then they are not compared, but two versions of it."""
    qemu = probe(settle.machine_arch(request, _files(request, home), home.cache), home.cache)
    ours = binfmt.short_version(binfmt.version_of(qemu.binary))
    for name, space in spaces.items():
        theirs = space.qemu_version()
        if theirs and binfmt.short_version(theirs) != ours:
            report.warn(f"{name} runs QEMU {theirs}, the machine {ours}: what differs may be the version")
