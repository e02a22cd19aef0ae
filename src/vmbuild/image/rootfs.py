"""Packages -> a root tree: opened and merged natively, no `dpkg`, no root, no foreign instruction run."""

from __future__ import annotations

import gzip
import lzma
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import zstandard
from debian.arfile import ArError, ArFile

from vmbuild.errors import GuestImageError
from vmbuild.image.packages import Package, package_path
from vmbuild.image.tree import Keep, TreeWriter, merged_path, read_members
from vmbuild.report import Reporter

UNREADABLE = (ArError, tarfile.TarError, lzma.LZMAError, zstandard.ZstdError, zlib.error, gzip.BadGzipFile, EOFError)
"""What a damaged package makes its readers raise."""


@contextmanager
def open_part(deb: Path, part: str) -> Iterator[tarfile.TarFile]:
    """Open `data` or `control` of a .deb as a tar stream. Raises GuestImageError when it is not a package.

    A .deb is an ar archive with control.tar.* and data.tar.* in it (deb(5)).
    """
    try:
        with deb.open("rb") as file:
            archive = _open_ar(file)
            name = next((name for name in archive.getnames() if name.startswith(f"{part}.tar")), None)
            if name is None:
                raise ArError(f"it has no {part}.tar")
            with tarfile.open(fileobj=_decompress(name, archive.getmember(name)), mode="r|") as tar:
                yield tar
    except UNREADABLE as error:
        raise GuestImageError(
            f"the package file {deb} cannot be read",
            details=str(error),
            resolution="Delete it and run the command again.",
        ) from error


def _open_ar(file: BinaryIO) -> ArFile:
    try:
        return ArFile(fileobj=file)
    except OSError as error:  # python-debian's word for a cut header
        raise ArError(str(error)) from error


def _decompress(name: str, member: Any) -> Any:
    if name.endswith(".xz"):
        return lzma.open(member)
    if name.endswith(".zst"):
        return zstandard.ZstdDecompressor().stream_reader(member)
    if name.endswith(".gz"):
        return gzip.open(member)
    return member


def read_files(deb: Path, prefixes: Sequence[str], *, part: str = "data") -> dict[str, bytes]:
    """Return the regular files of a package whose path in the tree starts with one of `prefixes`."""
    found = {}
    with open_part(deb, part) as tar:
        for info, content in read_members(tar):
            path = merged_path(info.name)
            if content is not None and path.startswith(tuple(prefixes)):
                found[path] = content.read()
    return found


def add_packages(tree: TreeWriter, packages: Iterable[Package], downloads: Path, keep: Keep, report: Reporter) -> None:
    """Merge the packages' files into the tree."""
    packages = list(packages)
    with report.meter("extract", len(packages), unit="packages") as meter:
        for package in packages:
            with open_part(package_path(package, downloads), "data") as tar:
                tree.add_members(read_members(tar), keep)
            meter.advance(1)


def keep_all_but(exclude: Sequence[str]) -> Keep:
    """Return a filter that drops the given path prefixes (written `./usr/share/doc`)."""
    prefixes = tuple(prefix.removeprefix("./").rstrip("/") for prefix in exclude)

    def keep(path: str) -> bool:
        return not any(path == prefix or path.startswith(prefix + "/") for prefix in prefixes)

    return keep
