"""The recipe of `cp`: files of the host into a machine that runs, and files of its guest onto the host."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from vmbuild.errors import UsageError
from vmbuild.guest import copying, extract
from vmbuild.guest.channel import Channel
from vmbuild.guest.extract import Left, Stream
from vmbuild.guest.session import Session
from vmbuild.model import Home
from vmbuild.reach import channel_of, existing, running_session
from vmbuild.report import Reporter
from vmbuild.whole import writing_in

STREAM = "-"
"""What stands for a tar stream on standard input or output."""

CHUNK_BYTES = 1024 * 1024
_GUEST = re.compile(r"(?P<machine>[a-zA-Z0-9][a-zA-Z0-9_.-]*)?:(?P<path>.*)", re.DOTALL)


@dataclass(frozen=True)
class Place:
    """One end of a copy: a path of a machine's guest, or of the host where `machine` is None."""

    machine: str | None
    path: str

    @classmethod
    def parse(cls, text: str, default: str) -> Place:
        """Read `MACHINE:PATH`, `:PATH` of the default machine, or a path of the host, as `docker cp` does."""
        match = None if text.startswith(("/", ".")) else _GUEST.fullmatch(text)
        return Place(match["machine"] or default, match["path"] or ".") if match else Place(None, text)

    @property
    def name(self) -> str:
        """The last name of the path; empty for what has none of its own, such as `/` and `..`."""
        last = self.path.rstrip("/").rpartition("/")[2]
        return "" if last in (".", "..") else last

    @property
    def is_contents(self) -> bool:
        """Tell whether what is in a folder is meant, and not the folder: `FOLDER/.`."""
        return not self.name


def copy(source: Place, target: Place, home: Home, report: Reporter, *, stdin: BinaryIO, stdout: BinaryIO) -> None:
    """Copy a file or folder between the host and a guest that runs, over its drives where they are free.

    Raises UsageError for places that do not fit, MachineError or GuestError for a guest that does not answer.
    """
    if (source.machine is None) == (target.machine is None):
        raise UsageError(
            "one end of a copy is in a machine, the other on this host",
            resolution="Write MACHINE:PATH, or :PATH for the default machine; ./NAME is a path of this host.",
        )
    name = source.machine or target.machine or ""
    files = existing(name, home)
    with running_session(name, home) as session:
        if target.machine is not None:
            _copy_in(source, target, session, channel_of(files), report, stdin)
        else:
            _copy_out(source, target, session, channel_of(files), report, stdout)


def _copy_in(
    source: Place, target: Place, session: Session, channel: Channel, report: Reporter, stdin: BinaryIO
) -> None:
    if source.path == STREAM:
        if copying.look(session, target.path) != "folder":
            raise UsageError(f"{target.path} is no folder in the guest, and a tar stream goes into one")
        copying.send_stream(session, channel, stdin, target.path, report)
        return
    path = Path(source.path).expanduser()
    if not path.exists():
        raise UsageError(f"there is no {path} on this host")
    name, is_folder = source.name or path.resolve().name, path.is_dir()
    found = copying.look(session, target.path)
    place = copying.target_in_guest(
        *(found, target.path, name), is_folder=is_folder, is_contents=is_folder and source.is_contents
    )
    copying.send_path(session, channel, path, place, report)


def _copy_out(
    source: Place, target: Place, session: Session, channel: Channel, report: Reporter, stdout: BinaryIO
) -> None:
    found = copying.look(session, source.path)
    if found not in ("folder", "file"):
        raise UsageError(f"there is no {source.path} in the guest")
    is_folder = found == "folder"
    wanted = None if target.path == STREAM else _target_on_host(source, target, is_folder=is_folder)
    with copying.packed(session, channel, source.path, report) as stream:
        if wanted is None:
            while data := stream.read(CHUNK_BYTES):
                stdout.write(data)
            stdout.flush()
        else:
            _tell(_unpack(stream, wanted, is_folder=is_folder), report)


def _target_on_host(source: Place, target: Place, *, is_folder: bool) -> Path:
    """Return what a file or folder of the guest becomes on this host, as `docker cp` has it. Raises UsageError."""
    path = Path(target.path).expanduser()
    if path.is_dir():
        path = path.resolve()
        return path if is_folder and source.is_contents else path / source.name
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {path.parent} on this host")
    if is_folder and path.exists():
        raise UsageError(f"{path} is there and is no folder")
    if not is_folder and target.path.endswith("/"):
        raise UsageError(f"there is no folder {path} on this host")
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is no file", resolution="`-` writes a tar stream to standard output.")
    return path.resolve() if path.exists() else path


def _unpack(stream: Stream, target: Path, *, is_folder: bool) -> Left:
    with _beside(target) as made:
        left = extract.extract(stream, made)
        if is_folder:
            extract.place(made, target)
            return left
        for each in made.iterdir():
            extract.place(each, target)
    return left


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """Yield a new folder on the target's file system."""
    parent = target if target.is_dir() else target.parent
    with writing_in(parent):
        folder = Path(tempfile.mkdtemp(prefix=".vmbuild~", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _tell(left: Left, report: Reporter) -> None:
    if left.links:
        report.warn(f"{_some(left.links)} would lead out of what was copied and was left out")
    if left.special:
        report.warn(f"{_some(left.special)} is no file, folder or link and was left out")


def _some(names: list[str]) -> str:
    return repr(names[0]) + (f" (and {len(names) - 1} more like it)" if len(names) > 1 else "")
