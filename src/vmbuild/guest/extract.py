"""A tar stream out of the guest -> files on the host, none of them outside one new folder."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from vmbuild.errors import GuestError
from vmbuild.model import MIB
from vmbuild.whole import writing_in

MAX_NAME = 4096
"""PATH_MAX of Linux: no file of the guest could be named longer (limits.h)."""

MAX_EXTENSION = MIB
"""The most that a header which only names the next one may hold: tarfile reads it into memory."""

EXTENSIONS = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
MODE = 0o755
"""What is left of a mode: nobody else may write, and nobody runs as another user, because a guest said so."""

COPY_BYTES = MIB


@dataclass
class Left:
    """What was left out: links that lead out of the folder, and what is no file, folder or link."""

    links: list[str] = field(default_factory=list)
    special: list[str] = field(default_factory=list)


class Stream(Protocol):
    """Bytes that come one after the other."""

    def read(self, size: int, /) -> bytes:
        """Return up to so many of them; none at the end."""


def extract(stream: Stream, folder: Path) -> Left:
    """Unpack a tar stream in an empty folder that nobody else writes in; return what was left out.

    No link is made before all files are written, so nothing can be written through one. Raises GuestError for a stream
    that is damaged or names places outside, HostError when the host cannot write.
    """
    work = _Work(folder)
    with writing_in(folder):
        try:
            with _blaming_guest(), tarfile.open(fileobj=cast(BinaryIO, stream), mode="r|", tarinfo=_Header) as tar:
                while (member := tar.next()) is not None:
                    cast(Any, tar).members.clear()  # else it remembers every file
                    work.take(tar, member)
            work.make_links()
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise GuestError("the guest names one place twice", details=str(error)) from error
        work.finish_folders()
    return work.left


@contextmanager
def _blaming_guest() -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, ValueError, EOFError, RecursionError) as error:
        raise GuestError("what came out of the guest is damaged", details=repr(error)) from error


class _Header(tarfile.TarInfo):
    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        found = super().frombuf(buf, encoding, errors)
        if found.type in EXTENSIONS and found.size > MAX_EXTENSION:
            raise tarfile.ReadError(f"a header of {found.size} bytes")
        return found


class _Work:
    """One unpacking."""

    def __init__(self, folder: Path) -> None:
        self.left = Left()
        self._folder = folder
        self._folders: list[tuple[Path, tarfile.TarInfo]] = []
        self._links: list[tuple[Path, str, int]] = []

    def take(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        parts = split_name(member.name)
        path = self._folder.joinpath(*parts)
        if member.isdir():
            path.mkdir(parents=True, exist_ok=True)
            self._folders.append((path, member))
            return
        if not parts:
            raise GuestError(f"the guest sent {member.name!r}, which is no name of a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse():
            self._write(tar, member, path)
        elif member.islnk():
            self._link_hard(path, member)
        elif member.issym():
            self._links.append((path, member.linkname, len(parts) - 1))
        else:
            self.left.special.append(member.name)

    def _write(self, tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
        source = tar.extractfile(member)
        assert source is not None  # noqa: S101 - it is a regular file
        with path.open("xb") as file:
            size = member.size
            while size > 0:
                data = source.read(min(size, COPY_BYTES))
                if not data:
                    raise tarfile.ReadError(f"{member.name} ends early")
                file.write(data)
                size -= len(data)
        path.chmod(member.mode & MODE)
        _set_time(path, member)

    def _link_hard(self, path: Path, member: tarfile.TarInfo) -> None:
        target = self._folder.joinpath(*split_name(member.linkname))
        if not target.is_file():  # no links are there yet: it is one of ours
            self.left.links.append(member.name)
            return
        os.link(target, path, follow_symlinks=False)

    def make_links(self) -> None:
        for path, target, depth in self._links:
            if stays_inside(target, depth):
                path.symlink_to(target)
            else:
                self.left.links.append(str(path.relative_to(self._folder)))

    def finish_folders(self) -> None:
        """Set modes and times, the innermost first; whoever unpacks can always go on in them."""
        for path, member in reversed(self._folders):
            path.chmod(member.mode & MODE | 0o700)
            _set_time(path, member)


def split_name(name: str) -> list[str]:
    """Return the parts of a member's name. Raises GuestError for one that is absolute or climbs."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "\0" in name or len(name) > MAX_NAME:
        raise GuestError(f"the guest sent a file that would lie outside the target: {name[:200]!r}")
    return parts


def stays_inside(target: str, depth: int) -> bool:
    """Tell whether a symbolic link that lies `depth` folders deep can lead nowhere but into the tree.

    It may climb at its beginning only, through folders that are known to be none but folders; what it then goes down
    through may be another link, of which the same is true.
    """
    parts = [part for part in target.split("/") if part not in ("", ".")]
    climbs = next((at for at, part in enumerate(parts) if part != ".."), len(parts))
    return not target.startswith("/") and "\0" not in target and ".." not in parts[climbs:] and climbs <= depth


def _set_time(path: Path, member: tarfile.TarInfo) -> None:
    try:
        os.utime(path, (member.mtime, member.mtime))
    except (OverflowError, ValueError, OSError):  # a time that this host does not know is none
        os.utime(path)


def place(source: Path, target: Path) -> None:
    """Move what was unpacked to where it was wanted, into folders that are there; links there are not followed.

    Raises HostError where a file stands in a folder's way or a folder in a file's.
    """
    with writing_in(target.parent):
        _place(source, target)


def _place(source: Path, target: Path) -> None:
    is_folder = source.is_dir() and not source.is_symlink()
    if not (is_folder and target.is_dir() and not target.is_symlink()):
        if is_folder and os.path.lexists(target):
            raise NotADirectoryError(None, f"{target} is there and is no folder")
        source.replace(target)
        return
    for each in source.iterdir():
        _place(each, target / each.name)
