"""Programs for this host from signed Debian packages: the docker client's plugins, of which Debian 12 has neither."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

from tests.machine.conftest import BASE
from vmbuild.image import catalog
from vmbuild.image.debian import open_indexes
from vmbuild.image.fetch import fetch_all
from vmbuild.image.packages import package_downloads, package_path, resolve_closure
from vmbuild.image.rootfs import read_files
from vmbuild.report import SilentReporter

PACKAGES = ("docker-buildx", "docker-compose")
FOLDER = "usr/libexec/docker/cli-plugins/"
DEBIAN_ARCHES = {"x86_64": "amd64", "aarch64": "arm64"}
WITHOUT = ("libc6",)
"""This host has it: they ask for none newer than that of Debian 12."""


def read_programs(cache: Path, base: str, names: Sequence[str], folders: Sequence[str]) -> dict[str, bytes]:
    """Return the files that packages of a base image's Debian have in some folders, without what they depend on."""
    row, report = catalog.load_base(base), SilentReporter()
    arch, mirrors = DEBIAN_ARCHES[platform.machine()], {"debian": "auto", "debian-security": "auto"}
    indexes = open_indexes(row.repositories, arch, mirrors, row.keyrings, cache / "indexes", report)
    packages = [each for each in resolve_closure(indexes, names, without=WITHOUT) if each.name in names]
    fetch_all(package_downloads(packages, cache / "packages"), report, label="download")
    found = dict[str, bytes]()
    for package in packages:
        found |= read_files(package_path(package, cache / "packages"), folders)
    return found


def write_plugins(cache: Path, folder: Path) -> None:
    """Write the plugins into `cli-plugins` of a folder that DOCKER_CONFIG may name."""
    (folder / "cli-plugins").mkdir()
    for path, content in read_programs(cache, BASE, PACKAGES, (FOLDER,)).items():
        plugin = folder / "cli-plugins" / Path(path).name
        plugin.write_bytes(content)
        plugin.chmod(0o755)
