"""The side that is the host's own Docker: buildx on its engine, each foreign program under a user-mode emulator."""

from __future__ import annotations

import hashlib
import os
import platform as host
import shlex
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from vmbuild import process
from vmbuild.bench import binfmt
from vmbuild.bench.binfmt import Emulator
from vmbuild.bench.phases import Phase, read_buildkit
from vmbuild.bench.runner import Command, Measured, measure
from vmbuild.bench.sampler import PROC
from vmbuild.bench.workload import IMAGE, Workload
from vmbuild.deadline import Deadline
from vmbuild.errors import HostError

DAEMONS = ("dockerd", "containerd")
"""What an engine's work is done by, or by their children: BuildKit is a part of dockerd."""

ANSWER_S = 30.0


@dataclass(frozen=True)
class Engine:
    """Docker of this host for one platform, by the builder that is its engine's own."""

    platform: str
    emulator: Emulator
    builder: str
    bases: dict[str, str] = field(default_factory=dict)
    """What Dockerfiles call their base images, in full, and what these are here: the user's names stay theirs."""

    loaded: list[str] = field(default_factory=list)

    def command(self, argv: list[str]) -> Command:
        """Return a program to measure, with what the engine does for it."""
        return Command(argv, _environment(), apart=find_daemons)

    def import_base(self, reference: str, archive: Path | None) -> None:
        """Give the engine a base image, of an archive or else the registry's, that tells the emulator its CPU.

        Raises HostError.
        """
        known = reference if archive is None else self._load(archive)
        own = f"localhost/vmbuild-bench-base:{hashlib.sha256(reference.encode()).hexdigest()[:16]}"
        with tempfile.TemporaryDirectory(prefix="vmbuild-bench-") as folder:
            (Path(folder) / "Dockerfile").write_text(f"FROM {known}\nENV QEMU_CPU={self.emulator.cpu_model}\n")
            self._run(*self._build("--pull" if archive is None else "--pull=false", "--tag", own), folder)
        self.bases[reference] = own

    def _load(self, archive: Path) -> str:
        """Load an archive; return the name that is in it."""
        name = self._run("load", "--quiet", "--input", str(archive)).strip().rpartition("Loaded image: ")[2]
        self.loaded.append(name)
        return name

    def _build(self, *options: str) -> list[str]:
        fixed = ["--builder", self.builder, "--platform", self.platform, "--provenance", "false", "--load"]
        return ["buildx", "build", *fixed, *options]

    def _run(self, *args: str) -> str:
        return process.run(["docker", *args], env=_environment()).decode(errors="replace")

    def build_script(self, work: Workload, output: Path) -> str:
        """Return the shell script that builds a workload and writes its archive."""
        options = ["--no-cache", "--progress", "rawjson", "--tag", IMAGE]
        for name, own in self.bases.items():
            options += ["--build-context", f"{name}=docker-image://{own}"]
        options += work.options()
        options += ["--file", str(work.dockerfile.absolute()), str(work.context.absolute())]
        save = ["docker", "save", "--output", str(output), IMAGE]
        return f"set -e\n{shlex.join(['docker', *self._build(*options)])}\n{shlex.join(save)}\n"

    def run_build(self, work: Workload, output: Path) -> Measured:
        """Build a workload. Raises RunFailedError."""
        measured = measure(self.command(["sh", "-c", self.build_script(work, output)]))
        self._run("image", "rm", "--force", IMAGE)
        return measured

    def read(self, work: Workload, measured: Measured) -> tuple[Phase, ...]:
        """Return the phases of a build that was measured."""
        return read_buildkit(measured.lines, work.stages, measured.begun, measured.ended)

    def qemu_version(self) -> str:
        """Return the emulator's version; nothing where the kernel has it from a container, as docker's often is."""
        program = binfmt.find_registered(self.emulator)
        return binfmt.version_of(program) if program and Path(program).exists() else ""

    def describe(self) -> dict[str, str]:
        """Return what there is to know of this side in a report."""
        version = self._run("version", "--format", "{{.Server.Version}}").strip()
        return {
            "what": "docker buildx, with qemu-user through binfmt_misc",
            "builder": f"Docker {version}, on all CPUs of the host",
            "qemu": self.qemu_version() or "not known",
            "cpu": self.emulator.cpu_model,
            "emulator": str(binfmt.find_registered(self.emulator)),
        }

    def close(self) -> None:
        """Remove the base images: they are in an engine that others use. Raises HostError."""
        if names := {*self.bases.values(), *self.loaded}:
            self._run("image", "rm", "--force", *sorted(names))


def open_engine(platform: str) -> Engine:
    """Return Docker of this host for a platform. Raises HostError, with the reason, when it cannot be compared."""
    emulator = binfmt.check_registered(
        platform, "Debian: apt install qemu-user-static. With Docker alone: docker run --privileged tonistiigi/binfmt."
    )
    limit, env = Deadline.after(ANSWER_S), _environment()
    process.run(["docker", "buildx", "version"], env=env, deadline=limit)
    there = process.run(["docker", "info", "--format", "{{.Architecture}}"], env=env, deadline=limit).decode().strip()
    if there != host.machine() or not find_daemons():
        raise HostError(
            "the Docker engine that answers does not run on this host",
            details=f"Its architecture is {there}, this host's {host.machine()}.",
            resolution="What a build takes can be counted here only: unset DOCKER_HOST, or use --user-runner chroot.",
        )
    builder = process.run(["docker", "context", "show"], env=env, deadline=limit).decode().strip()
    return Engine(platform, emulator, builder)


def find_daemons(proc: Path = PROC) -> list[int]:
    """Return the processes that are this host's engine."""
    found = []
    for name in proc.glob("[0-9]*/comm"):
        with suppress(OSError):  # it has ended meanwhile
            if name.read_text().strip() in DAEMONS:
                found.append(int(name.parent.name))
    return found


def _environment() -> Mapping[str, str]:
    """Return ours without the choice of a builder: another than the engine's own knows none of its images."""
    return {name: value for name, value in os.environ.items() if name != "BUILDX_BUILDER"}
