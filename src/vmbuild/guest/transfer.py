"""Data of the host -> files in the guest: over its drives where there are any, else over SSH."""

from __future__ import annotations

from typing import IO, cast

import zstandard

from vmbuild.errors import GuestError
from vmbuild.guest.channel import Channel, UnpackError, send_tar
from vmbuild.guest.session import CHUNK_BYTES, Feed, Session, Sink
from vmbuild.report import Meter, Reporter, SilentReporter

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
    try:
        sent = send_tar(channel, session, folder, write_tar, option, report)
    except UnpackError as error:
        raise _unpack_failed(error.details) from error
    if sent is not None:
        return sent
    with report.meter("context", None) as meter:
        counter = _Counter(meter)
        _unpack_over_ssh(session, folder, lambda sink: write_tar(counter.through(sink)), option)
        return counter.total


def _unpack_over_ssh(session: Session, folder: str, write_tar: Feed, option: str) -> None:
    """Send a tar stream compressed: user-mode networking is slower than an emulated zstd (docs/design.md)."""
    errors = bytearray()
    # Without warnings, about a time in the future say, whatever is said tells that one of the two failed.
    argv = ["sh", "-c", f'zstd -dc | {TAR} -x --warning=none "$2" -C "$1"', "unpack", folder, option]

    def feed(sink: Sink) -> None:
        with zstandard.ZstdCompressor(level=1).stream_writer(cast(IO[bytes], sink), closefd=False) as packed:
            write_tar(packed)

    if session.run(argv, feed=feed, on_stderr=errors.extend) != 0 or errors:
        raise _unpack_failed(errors.decode(errors="replace"))


class _Counter:
    """Counts what goes through it, and moves a meter."""

    def __init__(self, meter: Meter) -> None:
        self.total = 0
        self._meter = meter
        self._sink: Sink | None = None

    def through(self, sink: Sink) -> Sink:
        self._sink = sink
        return self

    def write(self, data: bytes, /) -> None:
        assert self._sink is not None  # noqa: S101 - `through` was called
        self._sink.write(data)
        self.total += len(data)
        self._meter.advance(len(data))


def write_file(session: Session, path: str, feed: Feed) -> None:
    """Write a file in the guest. Raises GuestError when the guest cannot."""
    errors = bytearray()
    if session.run(["sh", "-c", 'cat >"$1"', "write", path], feed=feed, on_stderr=errors.extend) != 0:
        raise _unpack_failed(errors.decode(errors="replace"))


def write_stdin(session: Session, path: str, stdin: IO[bytes]) -> int:
    """Write the host's standard input to a file in the guest; return its bytes. Raises GuestError.

    A build that had it as its own input could have no terminal, and would not end before its input does.
    """
    sent = 0

    def feed(sink: Sink) -> None:
        nonlocal sent
        while data := stdin.read(CHUNK_BYTES):
            sink.write(data)
            sent += len(data)

    write_file(session, path, feed)
    return sent


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
