"""The other way to build for ARM on this host, to compare with: buildah, and QEMU's user-mode emulation."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

from vmbuild.bench import binfmt
from vmbuild.bench.userspace import Userspace
from vmbuild.errors import HostError

PLATFORM = "linux/arm64"


def can_emulate() -> bool:
    """Tell whether this host can do the other side at all: it is Linux's and Debian's to give."""
    emulator = binfmt.EMULATORS[PLATFORM]
    if not shutil.which("buildah") or not shutil.which(emulator.program) or platform.machine() == "aarch64":
        return False
    if os.geteuid() != 0 and not shutil.which("newuidmap"):
        return False
    try:
        binfmt.check_namespaces()
    except HostError:
        return binfmt.find_registered(emulator) is not None
    return True


@dataclass(frozen=True)
class Buildah:
    """buildah with a storage of its own, and with emulation that the rest of the host knows nothing of."""

    space: Userspace

    def take(self, archive: Path, reference: str) -> None:
        """Take a docker archive in, by this name."""
        self.space.take_archive(f"docker.io/library/{reference}", archive)

    def build(self, context: Path, reference: str, *options: str) -> None:
        """Build a context, as Docker's format can say it all."""
        isolation = ("--isolation", "chroot", "--platform", PLATFORM, "--format", "docker", "--layers=false")
        name = f"docker.io/library/{reference}"
        self.space.run("bud", *isolation, "--pull-never", "-t", name, *options, str(context))

    def save(self, reference: str, archive: Path) -> None:
        """Write a container image as a docker archive."""
        self.space.run("push", "-q", f"docker.io/library/{reference}", f"docker-archive:{archive}:{reference}")
