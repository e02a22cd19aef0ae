"""Data of the host -> files in the guest: over its drives where there are any, else over SSH."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import IO, cast

import zstandard

from vmbuild.errors import GuestError
from vmbuild.guest.channel import (
    Channel,
    Counted,
    Inbox,
    Sealed,
    UnpackError,
    borrow_inbox,
    fill,
    send_in,
    take_file,
    unpack,
)
from vmbuild.guest.session import CHUNK_BYTES, Feed, Session, Sink
from vmbuild.report import Reporter, SilentReporter

TAR = "/usr/bin/tar"
"""GNU tar; the guest's shell would take busybox's for a plain `tar`."""


class DiskFullError(GuestError):
    """The machine's disk has no room for what was to be written."""


def unpack_context(session: Session, folder: str, write_tar: Feed, channel: Channel, report: Reporter) -> int:
    """Unpack a tar stream in a folder, as root's files; return its bytes. Raises GuestError when the guest cannot."""
    return _unpack(session, folder, write_tar, "--no-same-owner", channel, report)


def unpack_tree(session: Session, folder: str, write_tar: Feed, channel: Channel) -> None:
    """Unpack a tar stream in a folder as a root tree, owners and all. Raises GuestError when the guest cannot."""
    _unpack(session, folder, write_tar, "--numeric-owner", channel, SilentReporter())  # who writes it shows how far


def _unpack(session: Session, folder: str, write_tar: Feed, option: str, channel: Channel, report: Reporter) -> int:
    take = partial(unpack, session, folder=folder, option=option, report=report)
    return _send(write_tar, take, partial(_unpack_over_ssh, session, folder, option), channel, report)


def _send(
    feed: Feed, take: Callable[[Sealed], bool], over_ssh: Callable[[Feed], None], channel: Channel, report: Reporter
) -> int:
    """Send a feed that may be asked twice over the inbox where that is open, else over SSH; return its bytes."""
    try:
        sent = send_in(channel, feed, take, report)
    except UnpackError as error:
        raise _unpack_failed(error.details) from error
    return sent if sent is not None else _counting(feed, over_ssh, report)


def _counting(feed: Feed, send: Callable[[Feed], None], report: Reporter) -> int:
    """Send a feed, and return its bytes."""
    total = 0

    def counted(sink: Sink) -> None:
        nonlocal total
        counting = Counted(sink, meter)
        feed(counting)
        total = counting.total

    with report.meter("context", None) as meter:
        send(counted)
    return total


def _unpack_over_ssh(session: Session, folder: str, option: str, write_tar: Feed) -> None:
    """Send a tar stream compressed: user-mode networking is slower than an emulated zstd (docs/design.md)."""
    errors = bytearray()
    # Without warnings, about a time in the future say, whatever is said tells that one of the two failed.
    argv = ["sh", "-c", f'zstd -dc | {TAR} -x --warning=none "$2" -C "$1"', "unpack", folder, option]

    def feed(sink: Sink) -> None:
        with zstandard.ZstdCompressor(level=1).stream_writer(cast(IO[bytes], sink), closefd=False) as packed:
            write_tar(packed)

    if session.run(argv, feed=feed, on_stderr=errors.extend) != 0 or errors:
        raise _unpack_failed(errors.decode(errors="replace"))


def write_file(session: Session, path: str, feed: Feed) -> None:
    """Write a file in the guest. Raises GuestError when the guest cannot."""
    errors = bytearray()
    if session.run(["sh", "-c", 'cat >"$1"', "write", path], feed=feed, on_stderr=errors.extend) != 0:
        raise _unpack_failed(errors.decode(errors="replace"))


def write_large_file(session: Session, path: str, feed: Feed, channel: Channel) -> None:
    """Write a file of megabytes in the guest; who writes it shows how far. Raises GuestError when the guest cannot.

    The feed may be asked twice.
    """
    take, over_ssh = partial(take_file, session, path=path), partial(write_file, session, path)
    _send(feed, take, over_ssh, channel, SilentReporter())


def write_stdin(session: Session, path: str, stdin: IO[bytes], channel: Channel, report: Reporter) -> int:
    """Write the host's standard input to a file in the guest; return its bytes. Raises GuestError.

    A build that had it as its own input could have no terminal, and would not end before its input does.
    """
    once = _Once(stdin)
    if once.is_short():  # a Dockerfile, say: what the guest starts to look into its drive would take longer
        return _counting(once.feed, partial(write_file, session, path), report)
    take = partial(take_file, session, path=path)
    return _send_once(once, take, partial(write_file, session, path), channel, report)


def unpack_stdin(session: Session, folder: str, stdin: IO[bytes], channel: Channel, report: Reporter) -> int:
    """Unpack the host's standard input, a tar, as root's files; return its bytes. Raises GuestError."""
    option = "--no-same-owner"
    take = partial(unpack, session, folder=folder, option=option, report=report)
    return _send_once(_Once(stdin), take, partial(_unpack_over_ssh, session, folder, option), channel, report)


def _send_once(
    once: _Once, take: Callable[[Sealed], bool], over_ssh: Callable[[Feed], None], channel: Channel, report: Reporter
) -> int:
    with borrow_inbox(channel) as inbox:
        try:
            if inbox is not None and (sealed := once.fill(inbox, report)) is not None and take(sealed):
                return sealed.size
        except UnpackError as error:
            raise _unpack_failed(error.details) from error
        return _counting(once.feed, over_ssh, report)


class _Once:
    """A stream that can be read only once, as a feed that can be asked twice: the inbox keeps what it has taken."""

    def __init__(self, stdin: IO[bytes]) -> None:
        self._stdin = stdin
        self._left = b""
        self._inbox: Inbox | None = None

    def is_short(self) -> bool:
        """Tell whether less than a chunk comes in all."""
        while len(self._left) < CHUNK_BYTES and (data := self._stdin.read(CHUNK_BYTES - len(self._left))):
            self._left += data
        return len(self._left) < CHUNK_BYTES

    def fill(self, inbox: Inbox, report: Reporter) -> Sealed | None:
        """Write all of it to the inbox; None where that has no room for it."""
        try:
            return fill(inbox, self.feed, report)
        finally:
            self._inbox = inbox

    def feed(self, sink: Sink) -> None:
        """Write all of it."""
        for data in self._inbox.read_again() if self._inbox is not None else ():
            sink.write(data)
        while data := self._left or self._stdin.read(CHUNK_BYTES):
            self._left = data  # until somebody has it
            sink.write(data)
            self._left = b""


def _unpack_failed(details: str) -> GuestError:
    if "No space left" in details:
        return disk_full(details)
    return GuestError("the build context could not be unpacked in the guest", details=details)


def disk_full(details: str) -> DiskFullError:
    """Return what is said when the guest has no room left."""
    return DiskFullError(
        "the machine's disk is full",
        details=details,
        resolution="Make room (`vmbuild ssh -- docker system prune -a`), or start with a larger --disk.",
    )
