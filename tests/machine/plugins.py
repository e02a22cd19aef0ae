"""Plugins of the docker client for this host, from signed Debian packages: Debian 12 has neither of these."""

from __future__ import annotations

import platform
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


def write_plugins(cache: Path, folder: Path) -> None:
    """Write the plugins into `cli-plugins` of a folder that DOCKER_CONFIG may name."""
    trixie, report = catalog.load_base(BASE), SilentReporter()
    arch, mirrors = DEBIAN_ARCHES[platform.machine()], {"debian": "auto", "debian-security": "auto"}
    indexes = open_indexes(trixie.repositories, arch, mirrors, trixie.keyrings, cache / "indexes", report)
    packages = resolve_closure(indexes, PACKAGES, without=WITHOUT)
    fetch_all(package_downloads(packages, cache / "packages"), report, label="download")
    (folder / "cli-plugins").mkdir()
    for package in packages:
        for path, content in read_files(package_path(package, cache / "packages"), [FOLDER]).items():
            plugin = folder / "cli-plugins" / Path(path).name
            plugin.write_bytes(content)
            plugin.chmod(0o755)
