"""The other way to build for ARM on this host, to compare with: buildah, and QEMU's user-mode emulation."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

BINFMT = Path("/proc/sys/fs/binfmt_misc")
RULES = Path("/usr/lib/binfmt.d")
PLATFORM = "linux/arm64"


def why_not() -> str | None:
    """Return why user-mode emulation cannot be had on this host; None when it is ready."""
    if shutil.which("buildah") is None:
        return "buildah is not installed"
    if (BINFMT / "qemu-aarch64").exists():
        return None
    rule = RULES / "qemu-aarch64.conf"
    if os.geteuid() != 0 or not rule.exists():
        return "QEMU's user-mode emulation is not registered with binfmt_misc, and cannot be from here"
    if not (BINFMT / "register").exists():
        subprocess.run(["mount", "-t", "binfmt_misc", "none", str(BINFMT)], check=False)
    try:
        (BINFMT / "register").write_text(rule.read_text())
    except OSError as error:
        return f"QEMU's user-mode emulation cannot be registered: {error}"
    return None


@dataclass(frozen=True)
class Buildah:
    """buildah with a storage of its own."""

    folder: Path

    def run(self, *args: str) -> str:
        """Run it and return what it printed."""
        storage = ("--root", str(self.folder / "root"), "--runroot", str(self.folder / "runroot"))
        done = subprocess.run(["buildah", *storage, *args], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"buildah {' '.join(args)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def take(self, archive: Path, reference: str) -> None:
        """Take a docker archive in, by this name."""
        image = self.run("pull", "-q", f"docker-archive:{archive}").strip()
        self.run("tag", image, f"docker.io/library/{reference}")

    def build(self, context: Path, reference: str, *options: str) -> None:
        """Build a context, as Docker's format can say it all."""
        isolation = ("--isolation", "chroot", "--platform", PLATFORM, "--format", "docker", "--layers=false")
        name = f"docker.io/library/{reference}"
        self.run("bud", *isolation, "--pull-never", "-t", name, *options, str(context))

    def save(self, reference: str, archive: Path) -> None:
        """Write a container image as a docker archive."""
        self.run("push", "-q", f"docker.io/library/{reference}", f"docker-archive:{archive}:{reference}")
