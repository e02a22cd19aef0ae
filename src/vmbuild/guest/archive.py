"""A container image in the guest -> a docker archive on the host, whole or not at all.

Blobs are read where containerd keeps them, by digest, and the archive is put together here: `docker save` moves
bytes through emulated Go at a tenth of the speed, and a blob that the host already has need not travel at all.
Source of the folder's layout: containerd, docs/content-flow.md.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import zstandard

from vmbuild.errors import GuestError, HostError, UsageError
from vmbuild.guest.channel import Channel, receive
from vmbuild.guest.session import Output, Session, capture
from vmbuild.report import Meter, Reporter
from vmbuild.whole import open_whole

BLOBS = "/var/lib/docker/containerd/daemon/io.containerd.content.v1.content/blobs/sha256"
BLOCK = 512
CHUNK_BYTES = 1024 * 1024
WINDOW_BYTES = 8 * 1024 * 1024
"""The most that a compressed blob may ask to be kept in memory; `zstd -1` asks for 512 KiB."""

Known = Callable[[str], Path | None]
"""Where the host has a blob, by the hexadecimal part of its SHA-256; None when it has not."""


@dataclass(frozen=True)
class Blob:
    """A blob that a manifest names: the hexadecimal part of its SHA-256, its size in bytes, its media type."""

    digest: str
    size: int
    media_type: str

    @property
    def is_compressed(self) -> bool:
        """Tell whether its content is compressed already."""
        return self.media_type.endswith(("gzip", "zstd"))

    @classmethod
    def from_descriptor(cls, descriptor: dict[str, object]) -> Blob:
        """Return the blob that an OCI descriptor names. Raises GuestError for anything but SHA-256."""
        algorithm, _, digest = str(descriptor["digest"]).partition(":")
        if algorithm != "sha256" or len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
            raise GuestError(f"the guest names a blob by {descriptor['digest']}, which is no SHA-256")
        size = int(str(descriptor["size"]))
        if size < 0:
            raise GuestError(f"the guest gives the blob {digest} a size of {size} bytes")
        return cls(digest, size, str(descriptor["mediaType"]))


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
def open_output(output: str | None, stdout: IO[bytes]) -> Iterator[IO[bytes]]:
    """Yield where an archive goes: a file that appears whole, or standard output for `-`. Raises HostError."""
    if output is None:
        yield io.BytesIO()
    elif output == "-":
        yield stdout
        with _blaming_reader():
            stdout.flush()
    else:
        with open_whole(Path(output)) as file:
            yield file


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
    out: IO[bytes],
    known: Known,
    report: Reporter,
    channel: Channel | None = None,
) -> int:
    """Write the container image with this manifest digest as a docker archive; return the bytes written.

    Every blob is checked against its digest on the way. Raises GuestError when one does not match.
    """
    manifest_hex = digest.removeprefix("sha256:")
    manifest_data = _read_checked(session, manifest_hex)
    manifest, blobs = _parse_manifest(manifest_data)
    archive = _Archive(out)
    each_once = {blob.digest: blob for blob in blobs}
    with report.meter("export", sum(blob.size for blob in each_once.values())) as meter:
        copies = _Copies(list(each_once.values()), known, archive, meter)
        _copy_from_guest(session, copies, archive, meter, channel)
        copies.catch_up(None)
    archive.add_data(f"blobs/sha256/{manifest_hex}", manifest_data)
    for name, content in _indexes(manifest_hex, manifest_data, manifest, blobs, tags).items():
        archive.add_data(name, json.dumps(content).encode())
    return archive.close()


class _Copies:
    """Blobs on their way into the archive, in their order: those that the host has, between those of the guest."""

    def __init__(self, blobs: Sequence[Blob], known: Known, archive: _Archive, meter: Meter) -> None:
        self._local = {blob: path for blob in blobs if (path := known(blob.digest)) is not None}
        self._left = iter(blobs)
        self._archive, self._meter = archive, meter
        self.wanted = [blob for blob in blobs if blob not in self._local]

    def catch_up(self, blob: Blob | None) -> None:
        """Copy what the host has before a blob of the guest; None: what is left."""
        for each in self._left:
            if each == blob:
                return
            _copy_blob(each, self._archive, self._meter, _read_file(self._local[each]))


def _copy_from_guest(
    session: Session, copies: _Copies, archive: _Archive, meter: Meter, channel: Channel | None
) -> None:
    wanted = copies.wanted
    paths = [(f"{BLOBS}/{blob.digest}", blob.size) for blob in wanted]

    def take(number: int, content: Iterator[bytes]) -> None:
        copies.catch_up(wanted[number])
        _copy_blob(wanted[number], archive, meter, content)

    if channel is None or not wanted or not receive(channel, session, paths, take):
        for blob in wanted:
            copies.catch_up(blob)
            _pull_blob(session, blob, archive, meter)


def _parse_manifest(data: bytes) -> tuple[dict[str, object], list[Blob]]:
    """Return a manifest and its blobs, the config first. Raises GuestError."""
    try:
        manifest = json.loads(data)
        if "layers" not in manifest and "manifests" in manifest:
            raise GuestError("the container image is for several platforms and cannot become a docker archive")
        return manifest, [Blob.from_descriptor(each) for each in (manifest["config"], *manifest["layers"])]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise GuestError("the guest's manifest of the container image makes no sense", details=repr(error)) from error


def _read_checked(session: Session, digest: str) -> bytes:
    data = capture(session, ["cat", f"{BLOBS}/{digest}"]).encode()
    if hashlib.sha256(data).hexdigest() != digest:
        raise GuestError(f"the blob {digest} came out of the guest with other content")
    return data


class _BlobCopy:
    """One blob on its way into the archive, checked against its digest and size."""

    def __init__(self, blob: Blob, archive: _Archive, meter: Meter) -> None:
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


def _copy_blob(blob: Blob, archive: _Archive, meter: Meter, content: Iterator[bytes]) -> None:
    copy = _BlobCopy(blob, archive, meter)
    for data in content:
        copy.take(data)
    copy.end()


def _read_file(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while data := file.read(CHUNK_BYTES):
            yield data


def _pull_blob(session: Session, blob: Blob, archive: _Archive, meter: Meter) -> None:
    """Read a blob over SSH; what is not compressed is compressed for the way (docs/design.md)."""
    copy = _BlobCopy(blob, archive, meter)
    path = f"{BLOBS}/{blob.digest}"
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


def _indexes(
    manifest_hex: str, manifest_data: bytes, manifest: dict[str, object], blobs: Sequence[Blob], tags: Sequence[str]
) -> dict[str, object]:
    """Return the archive's three tables: docker's own, and those of the OCI image layout."""
    config, *layers = (f"blobs/sha256/{blob.digest}" for blob in blobs)
    names = [full_reference(tag) for tag in tags]
    descriptor = {"mediaType": manifest["mediaType"], "digest": f"sha256:{manifest_hex}", "size": len(manifest_data)}
    entries = [
        {**descriptor, "annotations": {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": tag}}
        for name, tag in ((name, name.rpartition(":")[2]) for name in names)
    ]
    short = [name.removeprefix("docker.io/library/").removeprefix("docker.io/") for name in names]
    return {
        "manifest.json": [{"Config": config, "RepoTags": short or None, "Layers": layers}],
        "index.json": {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": entries or [descriptor],
        },
        "oci-layout": {"imageLayoutVersion": "1.0.0"},
    }


def full_reference(name: str) -> str:
    """Return a container image's name with registry and tag, as Docker completes it."""
    first, slash, rest = name.partition("/")
    has_registry = slash and (set(".:") & set(first) or first == "localhost")
    registry, path = (first, rest) if has_registry else ("docker.io", name)
    registry = registry.removeprefix("index.") if registry == "index.docker.io" else registry
    if registry == "docker.io" and "/" not in path:
        path = f"library/{path}"
    return f"{registry}/{path}" if ":" in path.rpartition("/")[2] else f"{registry}/{path}:latest"


class _Archive:
    """A tar file whose members come in pieces."""

    def __init__(self, out: IO[bytes]) -> None:
        self._out = out
        self._left = 0
        self._total = 0

    def begin(self, name: str, size: int) -> None:
        info = tarfile.TarInfo(name)
        info.size, info.mode = size, 0o644
        self._put(info.tobuf(tarfile.GNU_FORMAT))  # plain ustar ends at 8 GiB
        self._left, self._size = size, size

    def write(self, data: bytes) -> None:
        self._left -= len(data)
        if self._left < 0:
            raise GuestError("a blob came out of the guest with more bytes than it should have")
        self._put(data)

    def end(self) -> None:
        if self._left:
            raise GuestError("a blob came out of the guest with fewer bytes than it should have")
        self._put(b"\0" * (-self._size % BLOCK))

    def add_data(self, name: str, data: bytes) -> None:
        self.begin(name, len(data))
        self.write(data)
        self.end()

    def close(self) -> int:
        self._put(b"\0" * (2 * BLOCK))
        return self._total

    def _put(self, data: bytes) -> None:
        with _blaming_reader():
            self._out.write(data)
        self._total += len(data)
