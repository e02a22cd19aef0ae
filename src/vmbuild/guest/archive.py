"""A container image in the guest -> an archive on the host, whole or not at all.

Blobs are read where containerd keeps them, by digest, and the archive is put together here: `docker save` moves
bytes through emulated Go at a tenth of the speed, and a blob that the host already has need not travel at all.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol, cast

import zstandard

from vmbuild.errors import GuestError, HostError, UsageError
from vmbuild.guest.channel import Channel, receive
from vmbuild.guest.image import Image, read_image
from vmbuild.guest.oci import ArchiveWriter, Blob, blob_path
from vmbuild.guest.session import Output, Session, Sink
from vmbuild.report import Meter, Reporter
from vmbuild.whole import open_whole

CHUNK_BYTES = 1024 * 1024
WINDOW_BYTES = 8 * 1024 * 1024
"""The most that a compressed blob may ask to be kept in memory; `zstd -1` asks for 512 KiB."""

Known = Callable[[str], Path | None]
"""Where the host has a blob, by the hexadecimal part of its SHA-256; None when it has not."""


def check_output(output: str | None) -> None:
    """See that an archive can be written there: a place that cannot costs no build. Raises HostError or UsageError."""
    if output in (None, "-"):
        return
    path = Path(str(output))
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"cannot write the archive to {output}", resolution="Name a file in a folder that exists.")
    if not os.access(path if path.exists() and not path.is_file() else path.resolve().parent, os.W_OK):
        raise HostError(f"cannot write the archive to {output}: no permission", resolution="Name another place.")


@contextmanager
def open_output(output: str | None, stdout: IO[bytes]) -> Iterator[Sink]:
    """Yield where an archive goes: a file that appears whole, or standard output for `-`. Raises HostError."""
    if output is None:
        yield io.BytesIO()
    elif output == "-":
        yield _StandardOutput(stdout)
        with _blaming_reader():
            stdout.flush()
    else:
        with open_whole(Path(output)) as file:
            yield file


class _StandardOutput:
    """Standard output, which says itself what it refuses."""

    def __init__(self, stdout: IO[bytes]) -> None:
        self._stdout = stdout

    def write(self, data: bytes, /) -> None:
        with _blaming_reader():
            self._stdout.write(data)


@contextmanager
def _blaming_reader() -> Iterator[None]:
    """Say what standard output refuses: its reader has gone, or its disk is full."""
    try:
        yield
    except OSError as error:
        raise HostError(f"cannot write the archive to standard output: {error.strerror or error}") from error


def write_archive(
    session: Session,
    digest: str,
    tags: Sequence[str],
    out: Sink,
    known: Known,
    report: Reporter,
    channel: Channel | None = None,
) -> int:
    """Write the container image with this digest as an archive; return the bytes written.

    One platform makes a docker archive, without what is attested of it; an index of several an OCI archive of all that
    it names, without a preference among them. Every blob is checked against its digest on the way. Raises GuestError
    when one does not match.
    """
    image, archive = read_image(session, digest.removeprefix("sha256:")).single(), ArchiveWriter(out)
    blobs = image.each_blob_once()
    with report.meter("export", sum(blob.size for blob in blobs)) as meter:
        copy_blobs(session, blobs, known, archive, meter, channel)
    return end_archive(archive, image, tags)


def end_archive(archive: ArchiveWriter, image: Image, tags: Sequence[str]) -> int:
    """Write what an archive has after its blobs; return the bytes of all of it."""
    for name, data in image.documents.items():
        archive.add_data(f"blobs/sha256/{name}", data)
    for name, content in image.tables(tags).items():
        archive.add_data(name, json.dumps(content).encode())
    return archive.close()


def write_from_host(
    image: Image, tags: Sequence[str], out: Sink, path_of: Callable[[str], Path], report: Reporter
) -> int:
    """Write a container image whose blobs lie on the host as an archive, each checked; return the bytes written."""
    archive, blobs = ArchiveWriter(out), image.each_blob_once()
    with report.meter("write", sum(blob.size for blob in blobs)) as meter:
        for blob in blobs:
            copy_blob(blob, archive, meter, read_file(path_of(blob.digest)))
    return end_archive(archive, image, tags)


class Members(Protocol):
    """Something that takes blobs one after the other, each in pieces."""

    def begin(self, name: str, size: int) -> None:
        """Begin a blob of so many bytes, which has this path in an archive."""

    def write(self, data: bytes) -> None:
        """Take what comes next of it."""

    def end(self) -> None:
        """End it."""


def copy_blobs(
    session: Session, blobs: Sequence[Blob], known: Known, out: Members, meter: Meter, channel: Channel | None
) -> None:
    """Copy blobs in their order, each checked against its digest: from the host where it has them, else the guest."""
    copies = _Copies(blobs, known, out, meter)
    _copy_from_guest(session, copies, out, meter, channel)
    copies.catch_up(None)


class _Copies:
    """Blobs on their way into the archive, in their order: those that the host has, between those of the guest."""

    def __init__(self, blobs: Sequence[Blob], known: Known, archive: Members, meter: Meter) -> None:
        self._local = {blob: path for blob in blobs if (path := known(blob.digest)) is not None}
        self._left = iter(blobs)
        self._archive, self._meter = archive, meter
        self.wanted = [blob for blob in blobs if blob not in self._local]

    def catch_up(self, blob: Blob | None) -> None:
        """Copy what the host has before a blob of the guest; None: what is left."""
        for each in self._left:
            if each == blob:
                return
            copy_blob(each, self._archive, self._meter, read_file(self._local[each]))


def _copy_from_guest(
    session: Session, copies: _Copies, archive: Members, meter: Meter, channel: Channel | None
) -> None:
    wanted = copies.wanted
    paths = [(blob_path(blob.digest), blob.size) for blob in wanted]

    def take(number: int, content: Iterator[bytes]) -> None:
        copies.catch_up(wanted[number])
        copy_blob(wanted[number], archive, meter, content)

    if channel is None or not wanted or not receive(channel, session, paths, take):
        for blob in wanted:
            copies.catch_up(blob)
            _pull_blob(session, blob, archive, meter)


class _BlobCopy:
    """One blob on its way into the archive, checked against its digest and size."""

    def __init__(self, blob: Blob, archive: Members, meter: Meter) -> None:
        self._blob, self._archive, self._meter = blob, archive, meter
        self._digest = hashlib.sha256()
        archive.begin(f"blobs/sha256/{blob.digest}", blob.size)

    def take(self, data: bytes) -> None:
        self._digest.update(data)
        self._archive.write(data)
        self._meter.advance(len(data))

    def end(self) -> None:
        if self._digest.hexdigest() != self._blob.digest:
            raise GuestError(f"the blob {self._blob.digest} came out of the guest with other content")
        self._archive.end()


def copy_blob(blob: Blob, archive: Members, meter: Meter, content: Iterator[bytes]) -> None:
    """Copy one blob, checked against its digest. Raises GuestError."""
    copy = _BlobCopy(blob, archive, meter)
    for data in content:
        copy.take(data)
    copy.end()


def read_file(path: Path) -> Iterator[bytes]:
    """Yield a file's content in pieces."""
    with path.open("rb") as file:
        while data := file.read(CHUNK_BYTES):
            yield data


def _pull_blob(session: Session, blob: Blob, archive: Members, meter: Meter) -> None:
    """Read a blob over SSH; what is not compressed is compressed for the way (docs/design.md)."""
    copy = _BlobCopy(blob, archive, meter)
    path = blob_path(blob.digest)
    if blob.is_compressed:
        code = session.run(["cat", path], on_stdout=copy.take)
    else:
        code = session.run(["zstd", "-q", "-1", "-c", path], on_stdout=_unpacking(copy.take))
    if code != 0:
        raise GuestError(f"the blob {blob.digest} is not in the guest")
    copy.end()


def _unpacking(take: Output) -> Output:
    """Return an output that unpacks zstd on the way, in pieces however much comes of a little."""

    class Taker(io.RawIOBase):
        def write(self, data: object, /) -> int:
            take(bytes(cast(memoryview, data)))
            return len(cast(memoryview, data))

    unpack = zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES).stream_writer(cast(IO[bytes], Taker()))

    def output(data: bytes) -> None:
        try:
            unpack.write(data)
        except zstandard.ZstdError as error:
            raise GuestError("a blob came out of the guest damaged", details=str(error)) from error

    return output
