"""The side that has no machine: buildah, each foreign program under a user-mode emulator, or none on an ARM host."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from vmbuild import process
from vmbuild.bench import binfmt
from vmbuild.bench.binfmt import Emulator
from vmbuild.bench.phases import Phase, read_buildah
from vmbuild.bench.runner import Command, Measured, measure
from vmbuild.bench.workload import IMAGE, Workload
from vmbuild.errors import HostError

READY = "vmbuild: the namespace is there"
IDS = 65536
"""As many users and groups as a container image may have files of."""


class Runner(StrEnum):
    """Where the kernel learns of the emulator: it knows already, or in a user namespace of our own, or needs none."""

    HOST = "host"
    CHROOT = "chroot"
    NATIVE = "native"


INSIDE = """
echo "$0"; read -r _
mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc &&
printf '%s' "$1" >/proc/sys/fs/binfmt_misc/register || exit
shift
export _CONTAINERS_USERNS_CONFIGURED=1 _CONTAINERS_ROOTLESS_UID="$1"
shift
exec "$@"
"""
"""Run in a namespace of its own: waits until its users are mapped, tells its kernel of the emulator, goes on.

The variables tell buildah that it needs no other namespace, and whose files it may write (containers/storage,
pkg/unshare): else it looks for short names in root's.
"""


@dataclass(frozen=True)
class Userspace:
    """A buildah with a storage of its own for one platform."""

    folder: Path
    platform: str
    runner: Runner
    emulator: Emulator | None

    @property
    def program(self) -> str:
        """The emulator's program. Raises HostError when it is not installed."""
        assert self.emulator is not None  # noqa: S101 - who is native asks for none
        if self.runner is Runner.HOST:
            registered = binfmt.find_registered(self.emulator) or self.emulator.program
            return str(
                Path(process.find_program(registered)).resolve()
            )  # by another name it reads its options otherwise
        return process.find_program(self.emulator.program)

    def buildah(self, *args: str) -> list[str]:
        """Return the argv of a buildah command."""
        place = self.folder / f"{self.runner}-{self.platform.replace('/', '-')}"
        roots = ("--root", str(place / "root"), "--runroot", str(place / "run"), "--storage-driver", "overlay")
        return ["buildah", *roots, *args]

    def command(self, argv: Sequence[str]) -> Command:
        """Return a program as it is run on this side."""
        if self.runner is not Runner.CHROOT:
            return Command(argv)
        assert self.emulator is not None  # noqa: S101 - see program
        row = binfmt.row_for(self.emulator, self.program)
        return Command(
            [*_unshare(), "sh", "-c", INSIDE, READY, row, str(os.getuid()), *argv], ready=READY, on_ready=_map_ids
        )

    def run(self, *args: str) -> str:
        """Run a buildah command and return its output. Raises BuildError."""
        return "\n".join(line.text for line in measure(self.command(self.buildah(*args))).lines)

    def take_archive(self, reference: str, archive: Path) -> None:
        """Take a docker archive in by a full name: buildah reads a short one as `localhost`'s."""
        image = self.run("pull", "--quiet", f"docker-archive:{archive}").split()[-1]
        self.run("tag", image, reference)

    def import_base(self, reference: str, archive: Path | None) -> None:
        """Give this side a base image by its full name: the very one that the machine has, else the registry's.

        The emulator is told its CPU by a variable, and only an image's own variables reach the steps of a build:
        buildah's --env is for the image that comes of it (buildah 1.28).
        """
        if archive is not None:
            self.take_archive(reference, archive)
        pull = "--pull" if archive is None else "--pull-never"
        container = self.run("from", pull, "--platform", self.platform, reference).split()[-1]
        for name, value in self._emulator_env().items():
            self.run("config", "--env", f"{name}={value}", container)
        self.run("commit", "--quiet", "--rm", container, reference)
        self.run("rm", "--all")  # an earlier run's, which was interrupted: it would keep its image
        self.run("rmi", "--prune")

    def build_script(self, work: Workload, output: Path) -> str:
        """Return the shell script that builds a workload and writes its archive."""
        options = ["--isolation", "chroot", "--platform", self.platform, "--no-cache", "--layers=false", "--tag", IMAGE]
        options += ["--pull-never", *work.options()]
        build = self.buildah("bud", *options, "--file", str(work.dockerfile.absolute()), str(work.context.absolute()))
        push = self.buildah("push", "--quiet", IMAGE, f"docker-archive:{output}")
        return f"set -e\n{shlex.join(build)}\n{shlex.join(push)}\n"

    def run_build(self, work: Workload, output: Path) -> Measured:
        """Build a workload. Raises RunFailedError."""
        output.unlink(missing_ok=True)  # buildah does not write into an archive that is there
        measured = measure(self.command(["sh", "-c", self.build_script(work, output)]))
        self.run("rmi", "--force", IMAGE)
        return measured

    def read(self, _: Workload, measured: Measured) -> tuple[Phase, ...]:
        """Return the phases of a build that was measured."""
        return read_buildah(measured.lines, measured.begun, measured.ended)

    def qemu_version(self) -> str:
        """Return the emulator's version; nothing where there is none."""
        return binfmt.version_of(self.program) if self.emulator else ""

    def describe(self) -> dict[str, str]:
        """Return what there is to know of this side in a report."""
        facts = {"runner": str(self.runner), "builder": process.run(["buildah", "--version"]).decode().strip()}
        if self.emulator is not None:
            facts["qemu"] = self.qemu_version()
            facts["cpu"] = self.emulator.cpu_model
            facts["emulator"] = self.program
        return facts

    def _emulator_env(self) -> Mapping[str, str]:
        return {"QEMU_CPU": self.emulator.cpu_model} if self.emulator else {}

    def close(self) -> None:
        """Leave the base images: they are in a storage of our own."""


def open_userspace(platform: str, runner: str, folder: Path) -> Userspace:
    """Return the side without a machine for a platform. `runner` is `auto`, `host`, `chroot` or `native`.

    Raises HostError, with the reason, when this host cannot.
    """
    process.find_program("buildah")
    if runner == Runner.NATIVE:
        if not binfmt.is_native(platform):
            raise HostError(f"this host does not run programs for {platform} itself")
        return Userspace(folder, platform, Runner.NATIVE, None)
    emulator = binfmt.EMULATORS[platform]
    if runner == "auto":
        runner = Runner.HOST if binfmt.find_registered(emulator) else Runner.CHROOT
    chosen = Runner(runner)
    if chosen is Runner.HOST:
        binfmt.check_registered(
            platform, "Use --user-runner chroot, which needs nothing of the host's kernel but namespaces (Linux 6.7)."
        )
    found = Userspace(folder, platform, chosen, emulator)
    process.find_program(emulator.program)
    if chosen is Runner.CHROOT:
        binfmt.check_namespaces()
        for name in ("unshare",) if os.geteuid() == 0 else ("unshare", "newuidmap"):
            process.find_program(name)
    return found


def _unshare() -> list[str]:
    """Return the start of a command line in new namespaces: root maps users itself, others have newuidmap do it."""
    own = ["unshare", "--user", "--mount"]
    return own if os.geteuid() == 0 else [*own, "--map-root-user", "--map-auto"]


def _map_ids(pid: int) -> None:
    """Give a namespace the same users and groups as the host, so that files of all of them can be made."""
    if os.geteuid() == 0:
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{pid}/{name}").write_text(f"0 0 {IDS}\n")
