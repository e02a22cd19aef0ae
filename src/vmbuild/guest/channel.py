"""Bulk bytes into the guest and out of it, over two raw drives that host and guest both see.

User-mode networking carries a tenth of it (docs/design.md). The host writes the inbox and reads the outbox as files;
the guest has both as block devices, without a file system.
"""

from __future__ import annotations

import io
import os
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from vmbuild.errors import GuestError
from vmbuild.guest.session import Feed, Session, Sink
from vmbuild.lock import attempt
from vmbuild.model import MIB
from vmbuild.report import Meter, Reporter

BLOCK = 512
CHUNK_BYTES = MIB
NO_DRIVE = 9
STALE = 10

PIECE_BYTES = MIB
"""Where a blob may begin in the outbox: the guest writes past its page cache, in pieces of this size."""

RECORD_BYTES = MIB
"""How much tar reads at once: the guest itself reads no further ahead than 128 KiB, and so tar is a third slower."""

TELL_EVERY = 5
"""After so many records of that size tar tells how far it is."""

FIND = """
drive() {
    for block in /sys/block/vd*; do
        [ "$(cat "$block/serial")" = "vmbuild-$1" ] && echo "/dev/${block##*/}" && return
    done
    return 9
}
"""

# A drive that nobody has open has no pages in the guest's cache, so what is read is what the host wrote last; the stamp
# behind it proves that.
OPEN = (
    FIND
    + """
inbox=$(drive inbox) || exit 9
[ "$(dd if="$inbox" bs=512 skip="$1" count=1 2>/dev/null | head -n 1)" = "$2" ] || exit 10
"""
)

# tar reads the drive itself: under emulation a pipe moves 15 MB/s.
UNPACK = (
    OPEN
    + f"""
exec /usr/bin/tar -x -b {RECORD_BYTES // 512} --warning=none --checkpoint={TELL_EVERY} \
    --checkpoint-action=echo=%u -f "$inbox" -C "$3" "$4"
"""
)
TAKE = (
    OPEN
    + f"""
dd if="$inbox" of="$3" bs={PIECE_BYTES} count=$((($4 + {PIECE_BYTES - 1}) / {PIECE_BYTES})) status=none || exit
exec truncate -s "$4" "$3"
"""
)

# Each file goes to the next place, past the page cache but for its end, and is told when it lies there.
WRITE = (
    FIND
    + f"""
outbox=$(drive outbox) || exit 9
at=0
for blob; do
    size=$(stat -c %s "$blob") || exit
    whole=$((size / {PIECE_BYTES}))
    put() {{ dd if="$blob" of="$outbox" bs={PIECE_BYTES} conv=notrunc "$@" 2>/dev/null; }}
    [ $whole = 0 ] || put count=$whole seek=$at oflag=direct || exit
    put skip=$whole seek=$((at + whole)) conv=notrunc,fsync || exit
    echo "$at $size"
    at=$((at + whole + 1))
done
"""
)


TakeBlob = Callable[[int, Iterator[bytes]], None]

_CHECKPOINT = re.compile(r"^(?:\S*tar: )?(\d+)$")


@dataclass(frozen=True)
class Channel:
    """The files of the host behind a machine's two raw drives, and the lock of who uses them."""

    inbox: Path
    outbox: Path
    lock: Path


def send_in(channel: Channel, feed: Feed, take: Callable[[Sealed], bool], report: Reporter) -> int | None:
    """Pass a feed through the inbox to what takes it there, `unpack` or `take_file`; return its bytes.

    None when this way is closed: another build uses it, the machine has no such drives, or the host no room.
    Raises UnpackError when the guest cannot take it.
    """
    with borrow_inbox(channel) as inbox:
        if inbox is None or (sealed := fill(inbox, feed, report)) is None:
            return None
        return sealed.size if take(sealed) else None


def fill(inbox: Inbox, feed: Feed, report: Reporter) -> Sealed | None:
    """Write all of a feed to the inbox, and seal it; None where that has no room for it."""
    try:
        with report.meter("context", None) as meter:
            feed(Counted(inbox, meter))
        return inbox.seal()
    except NoRoom:
        return None


@contextmanager
def borrow_inbox(channel: Channel) -> Iterator[Inbox | None]:
    """Yield the inbox to write to, emptied afterwards; None when another uses it or there is none."""
    with attempt(channel.lock) as is_ours:
        if not is_ours or not channel.inbox.exists():
            yield None
            return
        try:
            with channel.inbox.open("r+b", buffering=0) as file:
                yield Inbox(file)
        finally:
            _empty(channel.inbox)


def take_file(session: Session, sealed: Sealed, path: str) -> bool:
    """Have the guest write what lies in its inbox to a file; tell whether it found it there. Raises UnpackError."""
    errors = bytearray()
    argv = ["sh", "-c", TAKE, "take", *sealed.words, path, str(sealed.size)]
    return _has_found(session.run(argv, on_stderr=errors.extend), errors.decode(errors="replace"))


def unpack(session: Session, sealed: Sealed, folder: str, option: str, report: Reporter) -> bool:
    """Have the guest unpack what lies in its inbox; tell whether it found it there. Raises UnpackError."""
    with report.meter("unpack", sealed.size) as meter:
        return _unpack(session, sealed, folder, option, meter)


def _unpack(session: Session, sealed: Sealed, folder: str, option: str, meter: Meter) -> bool:
    errors, size, told = _Lines(), sealed.size, 0

    def listen(data: bytes) -> None:
        nonlocal told
        for line in errors.take(data):
            if match := _CHECKPOINT.search(line):
                now = min(size, int(match[1]) * RECORD_BYTES)
                meter.advance(now - told)
                told = now
            else:
                errors.kept.append(line)

    argv = ["sh", "-c", UNPACK, "unpack", *sealed.words, folder, option]
    code = session.run(argv, on_stderr=listen)
    if not _has_found(code, "\n".join(errors.kept)):
        return False
    meter.advance(size - told)
    return True


def _has_found(code: int, errors: str) -> bool:
    if code in (NO_DRIVE, STALE):
        return False
    if code != 0 or errors:
        raise UnpackError("what was sent could not be unpacked in the guest", details=errors)
    return True


def receive(channel: Channel, session: Session, paths: Sequence[tuple[str, int]], take: TakeBlob) -> bool:
    """Pass on files of the guest, each with its path and size in bytes, as they come to lie in the outbox.

    `take` gets the number of the file and its content, piece by piece. False when this way is closed; nothing has been
    passed on then. Raises GuestError when a file is not there or has another size.
    """
    room = channel.outbox.stat().st_size if channel.outbox.exists() else 0
    if sum(size // PIECE_BYTES + 1 for _, size in paths) * PIECE_BYTES > room:
        return False
    with attempt(channel.lock) as is_ours:
        if not is_ours:
            return False
        try:
            return _receive(channel.outbox, session, paths, take)
        finally:
            _empty(channel.outbox)


def _receive(outbox: Path, session: Session, paths: Sequence[tuple[str, int]], take: TakeBlob) -> bool:
    lines, errors, number, at = _Lines(), bytearray(), 0, 0
    with outbox.open("rb") as box:

        def listen(data: bytes) -> None:
            nonlocal number, at
            for line in lines.take(data):
                path, size = paths[number] if number < len(paths) else ("nothing more", -1)
                if line != f"{at} {size}":
                    raise GuestError(f"the guest says {line!r} of {path}, which should be {size} bytes")
                take(number, _pieces(box, at * PIECE_BYTES, size))
                number, at = number + 1, at + size // PIECE_BYTES + 1

        argv = ["sh", "-c", WRITE, "write", *(path for path, _ in paths)]
        code = session.run(argv, on_stdout=listen, on_stderr=errors.extend)
    if code == NO_DRIVE and number == 0:
        return False
    if code != 0 or number != len(paths):
        raise GuestError(
            f"the guest could not give out {paths[min(number, len(paths) - 1)][0]}",
            details=errors.decode(errors="replace"),
        )
    return True


def _pieces(box: IO[bytes], at: int, size: int) -> Iterator[bytes]:
    box.seek(at)
    while size > 0:
        data = box.read(min(CHUNK_BYTES, size))
        if not data:
            raise GuestError("the drive became shorter while it was read")
        size -= len(data)
        yield data


@contextmanager
def borrow_outbox(channel: Channel) -> Iterator[IO[bytes] | None]:
    """Yield the outbox to read from, emptied afterwards; None when another uses it or there is none."""
    with attempt(channel.lock) as is_ours:
        if not is_ours or not channel.outbox.exists():
            yield None
            return
        try:
            with channel.outbox.open("rb") as box:
                yield box
        finally:
            _empty(channel.outbox)


def _empty(box: Path) -> None:
    """Give the host its disk space back; the size stays, which the guest knows."""
    with suppress(OSError):
        size = box.stat().st_size
        os.truncate(box, 0)
        os.truncate(box, size)


class UnpackError(GuestError):
    """The guest could not take what lies in its inbox; the details have its words."""


class NoRoom(Exception):
    """The host's disk, or the inbox, cannot hold what is to be sent."""


@dataclass(frozen=True)
class Sealed:
    """What lies in the inbox: so many bytes, and a stamp in the block behind them."""

    size: int
    stamp: str

    @property
    def words(self) -> tuple[str, str]:
        """The block of the stamp, and the stamp, as OPEN asks for them."""
        return str(-(-self.size // BLOCK)), self.stamp


class Inbox:
    """A sink that writes to the inbox. What it has taken can be read again."""

    def __init__(self, file: io.FileIO) -> None:
        self._size = 0
        self._file = file
        self._room = os.fstat(file.fileno()).st_size - 2 * BLOCK

    def write(self, data: bytes, /) -> None:
        """Take all of the bytes, or none. Raises NoRoom."""
        if self._size + len(data) > self._room:
            raise NoRoom
        left = memoryview(data)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise NoRoom from error
        self._size += len(data)

    def seal(self) -> Sealed:
        """Write a stamp behind what was taken. Raises NoRoom."""
        sealed = Sealed(self._size, secrets.token_hex(16))
        self.write(bytes(-self._size % BLOCK) + f"{sealed.stamp}\n".encode().ljust(BLOCK, b"\0"))
        self._size = sealed.size
        return sealed

    def read_again(self) -> Iterator[bytes]:
        """Yield what was taken, from the beginning."""
        return _pieces(self._file, 0, self._size)


class Counted:
    """A sink before another one, which counts what goes through it, and moves a meter."""

    def __init__(self, sink: Sink, meter: Meter) -> None:
        self.total = 0
        self._sink, self._meter = sink, meter

    def write(self, data: bytes, /) -> None:
        """Pass on the bytes."""
        self._sink.write(data)
        self.total += len(data)
        self._meter.advance(len(data))


class _Lines:
    """Cuts what comes in pieces into lines."""

    def __init__(self) -> None:
        self.kept: list[str] = []
        self._rest = b""

    def take(self, data: bytes) -> list[str]:
        *whole, self._rest = (self._rest + data).split(b"\n")
        return [line.decode(errors="replace") for line in whole]
