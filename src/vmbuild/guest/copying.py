"""Files of the host into the guest, and of the guest out of it, as tar streams over its drives or over SSH."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO

import zstandard

from vmbuild.errors import GuestError, UsageError
from vmbuild.guest import channel, transfer
from vmbuild.guest.channel import Channel
from vmbuild.guest.context import add_file, open_tar
from vmbuild.guest.extract import Stream
from vmbuild.guest.session import Session, Sink, capture
from vmbuild.report import Meter, Reporter

WINDOW_BYTES = 8 * 1024 * 1024
"""The most that a compressed stream may ask to be kept in memory; `zstd -1` asks for 512 KiB."""

LOOK = """
if [ -d "$1" ]; then echo folder
elif [ -e "$1" ]; then echo file
elif [ -d "$(dirname "$1")" ]; then echo free
else echo nowhere
fi
"""

# What is named is followed when it is a link; links in it stay links.
ENTER = """
path=$(realpath "$1") || exit 8
if [ -d "$path" ]; then cd "$path" && name=.
else cd "$(dirname "$path")" && name=./$(basename "$path")
fi || exit 8
"""
# tar tells how much it wrote, in records that are always full: a block device has no end, and a pipe may end early.
# Whichever way a tree goes, it is packed alike: a layer that is made of it has one digest.
PACK = f"LC_ALL=C {transfer.TAR} -c --format=gnu --numeric-owner --sort=name --warning=no-file-changed --totals -b 2048"
PACK_TO_DRIVE = (
    channel.FIND
    + "outbox=$(drive outbox) || exit 9\n"
    + ENTER
    + f'{PACK} -f "$outbox" -- "$name"; code=$?\n'
    + 'dd if=/dev/null of="$outbox" conv=notrunc,fsync 2>/dev/null && exit $code'
)
PACK_TO_PIPE = ENTER + f'{PACK} -f - -- "$name" | zstd -q -1 -c'

OTHER_LENGTH = "what came out of the guest is not as long as the guest says"

_TOTAL = re.compile(rb"Total bytes written: (\d+)")


def look(session: Session, path: str) -> str:
    """Return what is at a path of the guest: `folder`, `file`, `free` (nothing, in a folder) or `nowhere`."""
    return capture(session, ["sh", "-c", LOOK, "look", _no_option(path)]).strip()


def _no_option(path: str) -> str:
    """Return a path that no program takes for an option: busybox's do not all know `--`."""
    return f"./{path}" if path.startswith("-") else path


@dataclass(frozen=True)
class Target:
    """Where in the guest something goes: a folder, and the name that it gets there, `.` for what is in it."""

    folder: str
    name: str


def target_in_guest(found: str, path: str, name: str, *, is_folder: bool, is_contents: bool) -> Target:
    """Return where a file or folder named `name` goes, as `docker cp` has it. Raises UsageError where it cannot.

    `found` is what `look` said of the path; `is_contents` asks for what is in a folder instead of the folder.
    """
    whole = PurePosixPath(path)
    if found == "folder":
        return Target(path, "." if is_contents else name)
    if found == "nowhere":
        raise UsageError(f"there is no folder {whole.parent} in the guest")
    if found == "file" and is_folder:
        raise UsageError(f"{path} is a file in the guest, and cannot become a folder")
    if path.endswith("/") and not is_folder:
        raise UsageError(f"there is no folder {path} in the guest")
    return Target(str(whole.parent), whole.name)


def send_path(session: Session, channel_: Channel, source: Path, target: Target, report: Reporter) -> None:
    """Copy a file or folder of the host into the guest, as root's. Raises UsageError, GuestError."""

    def write_tar(sink: Sink) -> None:
        with open_tar(sink) as tar:
            for name, path in _walk(source, target.name):
                add_file(tar, name, path)

    with _naming_a_copy():
        transfer.unpack_context(session, target.folder, write_tar, channel_, report)


def _walk(source: Path, name: str) -> Iterator[tuple[str, Path]]:
    """Yield what is in a folder, itself first, each with its name in the guest."""
    source = source.resolve()
    if not source.is_dir():
        yield name, source
        return
    if name != ".":
        yield name, source
    for folder, folders, files in os.walk(source, onerror=_refuse):
        folders.sort()
        for each in sorted([*folders, *files]):
            path = Path(folder) / each
            yield str(PurePosixPath(name) / path.relative_to(source)), path


def _refuse(error: OSError) -> None:
    raise UsageError(f"cannot read {error.filename}", details=str(error)) from error


def send_stream(session: Session, channel_: Channel, stdin: BinaryIO, folder: str, report: Reporter) -> None:
    """Unpack a tar stream of the host in a folder of the guest. Raises GuestError."""
    with _naming_a_copy():
        transfer.unpack_stdin(session, folder, stdin, channel_, report)


@contextmanager
def _naming_a_copy() -> Iterator[None]:
    try:
        yield
    except transfer.DiskFullError:
        raise
    except GuestError as error:
        raise GuestError("the guest could not unpack what was copied", details=error.details) from error


@contextmanager
def packed(session: Session, channel_: Channel, path: str, report: Reporter) -> Iterator[Stream]:
    """Yield a file or folder of the guest as a tar stream; a folder's names begin at the folder.

    Raises GuestError when it cannot be read.
    """
    with channel.borrow_outbox(channel_) as box:
        size = _pack_to_drive(session, path) if box is not None else None
        if box is not None and size is not None:
            with report.meter("copy", size) as meter:
                yield _Part(box, size, meter)
            return
    with tempfile.TemporaryFile() as kept:
        with report.meter("copy", None) as meter:
            size = _pack_to_file(session, path, kept, meter)
        kept.seek(0)
        yield _Plain(kept, size)


def _pack_to_drive(session: Session, path: str) -> int | None:
    """Have a path packed onto the outbox; return the bytes of it, None where the guest has no such drive."""
    words = bytearray()
    code = session.run(["sh", "-c", PACK_TO_DRIVE, "pack", _no_option(path)], on_stderr=words.extend)
    if code == channel.NO_DRIVE:
        return None
    return _check(code, path, words)


def _pack_to_file(session: Session, path: str, file: IO[bytes], meter: Meter) -> int:
    """Write a path, packed and compressed, to a file; return the bytes that it has when it is not compressed."""
    words = bytearray()

    def take(data: bytes) -> None:
        file.write(data)
        meter.advance(len(data))

    code = session.run(["sh", "-c", PACK_TO_PIPE, "pack", _no_option(path)], on_stdout=take, on_stderr=words.extend)
    return _check(2 if b"Exiting with failure" in words else code, path, words)  # the code is the pipe's last one's


def _check(code: int, path: str, words: bytearray) -> int:
    """Return the bytes that tar has written. Raises UsageError, GuestError."""
    details = words.decode(errors="replace")
    if code == 8:
        raise UsageError(f"there is no {path} in the guest", details=details)
    if code not in (0, 1):  # 1: a file changed while it was read (tar(1))
        raise GuestError(f"the guest could not pack {path}", details=details)
    found = _TOTAL.search(words)
    if found is None:
        raise GuestError(f"the guest does not say how large {path} is", details=details)
    return int(found[1])


class _Plain:
    """The content of a compressed file, for who reads to the end."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._reader = zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES).stream_reader(file)
        self._left = size

    def read(self, size: int, /) -> bytes:
        try:
            data = self._reader.read(size)
        except zstandard.ZstdError as error:
            raise GuestError("what came out of the guest is damaged", details=str(error)) from error
        self._left -= len(data)
        if self._left < 0 or (self._left and size and not data):
            raise GuestError(OTHER_LENGTH)
        return data


class _Part:
    """The first bytes of a drive, for who reads to the end."""

    def __init__(self, file: IO[bytes], size: int, meter: Meter) -> None:
        self._file, self._left, self._meter = file, size, meter

    def read(self, size: int, /) -> bytes:
        data = self._file.read(min(size, self._left))
        if self._left and size and not data:
            raise GuestError(OTHER_LENGTH)
        self._left -= len(data)
        self._meter.advance(len(data))
        return data
