"""A C compiler for containers, put together natively: what it compiles is emulated, not how it got there."""

from __future__ import annotations

from pathlib import Path

from tests.machine.conftest import BASE
from vmbuild.image import catalog, rootfs
from vmbuild.image.debian import open_indexes
from vmbuild.image.fetch import fetch_all
from vmbuild.image.packages import package_downloads, resolve_closure
from vmbuild.image.tree import TreeWriter
from vmbuild.model import Arch
from vmbuild.report import SilentReporter

PACKAGES = ("gcc", "libc6-dev")
WITHOUT = (
    *("libasan8", "libatomic1", "libcc1-0", "libcrypt-dev", "libgomp1", "libhwasan0", "libitm1", "liblsan0"),
    *("libtsan2", "libubsan1", "linux-libc-dev", "rpcsvc-proto"),
)
"""What they depend on and a program of one file does not need."""

NOT_NEEDED = ("usr/share", "usr/bin/aarch64-linux-gnu-lto-dump-14", "usr/libexec/gcc/aarch64-linux-gnu/14/lto1")


def write_toolchain(cache: Path, archive: Path) -> None:
    """Write a tar of what a compiler adds to the base image, ready to run without being configured."""
    slim, report = catalog.load_base(BASE), SilentReporter()
    mirrors = {"debian": "auto", "debian-security": "auto"}
    indexes = open_indexes(slim.repositories, Arch.ARM64, mirrors, slim.keyrings, cache / "indexes", report)
    there = {package.name for package in resolve_closure(indexes, slim.packages, essential=True)}
    wanted = resolve_closure(indexes, PACKAGES, without=WITHOUT)
    packages = [package for package in wanted if package.name not in there]
    fetch_all(package_downloads(packages, cache / "packages"), report, label="download")
    others = rootfs.keep_all_but(NOT_NEEDED)
    with archive.open("wb") as out, TreeWriter(out) as tree:
        rootfs.add_packages(tree, packages, cache / "packages", lambda path: others(path) and is_kept(path), report)


def is_kept(path: str) -> bool:
    """Tell whether a file is no static library, but for those without which no program is linked."""
    return not path.endswith(".a") or Path(path).name in ("libgcc.a", "libc_nonshared.a")
