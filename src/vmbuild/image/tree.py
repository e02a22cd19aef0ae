"""A root tree as one tar stream: merged from packages, never laid out on the host's disk.

Written this way, ownership and device nodes need no root, and the tree goes straight into `sqfstar` or `docker import`.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from types import TracebackType
from typing import IO, Any, Protocol, cast

MERGED = ("bin", "sbin", "lib")
"""Top-level folders that are links into /usr on every Debian since 12 (Debian's UsrMerge)."""

Member = tuple[tarfile.TarInfo, IO[bytes] | None]
"""A member of a package and its content, None for anything that is not a regular file."""

Keep = Callable[[str], bool]


class Writable(Protocol):
    """Anything that takes bytes: a pipe, a file, a connection."""

    def write(self, data: bytes, /) -> object:
        """Take all of the bytes."""


@dataclass(frozen=True)
class File:
    """A file of our own: its path without a leading slash, content and permission bits."""

    path: str
    data: bytes
    mode: int = 0o644


@dataclass(frozen=True)
class Link:
    """A symbolic link of our own."""

    path: str
    target: str


def merged_path(name: str) -> str:
    """Return a package member's path as it is on a merged-/usr system: no leading `./`, `/bin` in `/usr/bin`."""
    path = PurePosixPath("/", name).relative_to("/")
    if path.parts and path.parts[0] in MERGED and len(path.parts) > 1:
        path = PurePosixPath("usr") / path
    return "" if str(path) == "." else str(path)


class TreeWriter:
    """Writes a root tree as a tar stream in which each path appears once: who comes first, wins."""

    def __init__(self, out: Writable) -> None:
        self._tar = tarfile.open(fileobj=cast(IO[bytes], out), mode="w|", format=tarfile.GNU_FORMAT)  # noqa: SIM115
        self._seen: set[str] = set()
        for name in MERGED:
            self.add_link(Link(name, f"usr/{name}"))

    def __enter__(self) -> TreeWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:  # a broken stream must not be ended as if it were whole, nor by its finaliser
            cast(Any, self._tar.fileobj).closed = True

    def add_file(self, file: File) -> None:
        """Add a file of our own and the folders above it."""
        self._add_parents(file.path)
        info = tarfile.TarInfo(file.path)
        info.mode, info.size = file.mode, len(file.data)
        self._put(info, io.BytesIO(file.data))

    def add_link(self, link: Link) -> None:
        """Add a symbolic link of our own and the folders above it."""
        self._add_parents(link.path)
        info = tarfile.TarInfo(link.path)
        info.type, info.linkname, info.mode = tarfile.SYMTYPE, link.target, 0o777
        self._put(info, None)

    def add_folder(self, path: str, mode: int = 0o755) -> None:
        """Add an empty folder."""
        info = tarfile.TarInfo(path)
        info.type, info.mode = tarfile.DIRTYPE, mode
        self._put(info, None)

    def add_members(self, members: Iterable[Member], keep: Keep) -> None:
        """Add the members of a package that `keep` accepts (asked with paths as in the tree)."""
        for info, content in members:
            info.name = merged_path(info.name)
            if info.islnk():
                info.linkname = merged_path(info.linkname)
            info.uname = info.gname = ""
            if info.name and keep(info.name):
                self._put(info, content)

    def close(self) -> None:
        """End the stream."""
        self._tar.close()

    def _add_parents(self, path: str) -> None:
        for parent in reversed(PurePosixPath(path).parents):
            if str(parent) != "." and str(parent) not in self._seen:
                self.add_folder(str(parent))

    def _put(self, info: tarfile.TarInfo, content: IO[bytes] | None) -> None:
        if info.name not in self._seen:
            self._seen.add(info.name)
            self._tar.addfile(info, content if info.isreg() else None)


def read_members(tar: tarfile.TarFile) -> Iterator[Member]:
    """Yield each member of a tar stream with its content, None for anything that is not a regular file."""
    for info in tar:
        yield info, tar.extractfile(info) if info.isreg() else None
