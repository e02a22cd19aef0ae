"""Container images as OCI specifies them: what names a blob, a manifest, an index, and an archive of them.

Source: the OCI image specification 1.1 (image-layout.md, image-index.md, manifest.md).
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from vmbuild.errors import GuestError
from vmbuild.guest.session import Session, Sink, capture

BLOBS = "/var/lib/docker/containerd/daemon/io.containerd.content.v1.content/blobs/sha256"
"""Where containerd in the guest keeps blobs, by digest. Source: containerd, docs/content-flow.md."""

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
GZIP_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
LAYOUT = {"imageLayoutVersion": "1.0.0"}
BLOCK = 512

Descriptor = dict[str, object]


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
    def from_descriptor(cls, descriptor: object) -> Blob:
        """Return the blob that an OCI descriptor names. Raises GuestError for anything but SHA-256."""
        try:
            fields = cast(Descriptor, descriptor)
            name, size, media_type = str(fields["digest"]), int(str(fields["size"])), str(fields["mediaType"])
        except (ValueError, TypeError, KeyError) as error:
            raise _makes_no_sense(error) from error
        algorithm, _, digest = name.partition(":")
        if algorithm != "sha256" or len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
            raise GuestError(f"the guest names a blob by {name}, which is no SHA-256")
        if size < 0:
            raise GuestError(f"the guest gives the blob {digest} a size of {size} bytes")
        return cls(digest, size, media_type)


def full_reference(name: str) -> str:
    """Return a container image's name with registry and tag, as Docker completes it."""
    first, slash, rest = name.partition("/")
    has_registry = slash and (set(".:") & set(first) or first == "localhost")
    registry, path = (first, rest) if has_registry else ("docker.io", name)
    registry = registry.removeprefix("index.") if registry == "index.docker.io" else registry
    if registry == "docker.io" and "/" not in path:
        path = f"library/{path}"
    return f"{registry}/{path}" if ":" in path.rpartition("/")[2] else f"{registry}/{path}:latest"


def blob_path(digest: str) -> str:
    """Return where the guest has a blob, by the hexadecimal part of its digest."""
    return f"{BLOBS}/{digest}"


def describe(media_type: str, data: bytes) -> Descriptor:
    """Return the descriptor of a blob."""
    return {"mediaType": media_type, "digest": f"sha256:{hashlib.sha256(data).hexdigest()}", "size": len(data)}


def layout_index(descriptor: Descriptor, names: Sequence[str]) -> dict[str, object]:
    """Return the `index.json` of an archive that holds one container image under these names."""
    full = [full_reference(name) for name in names]
    entries = [
        {**descriptor, "annotations": {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": tag}}
        for name, tag in ((name, name.rpartition(":")[2]) for name in full)
    ]
    return {"schemaVersion": 2, "mediaType": INDEX, "manifests": entries or [descriptor]}


def read_checked(session: Session, digest: str) -> bytes:
    """Return a small blob of the guest by the hexadecimal part of its digest. Raises GuestError."""
    data = capture(session, ["cat", blob_path(digest)]).encode()
    if hashlib.sha256(data).hexdigest() != digest:
        raise GuestError(f"the blob {digest} came out of the guest with other content")
    return data


def parse_object(data: bytes) -> dict[str, object]:
    """Return a manifest or an index. Raises GuestError for what is neither."""
    try:
        content = json.loads(data)
    except ValueError as error:
        raise _makes_no_sense(error) from error
    if not isinstance(content, dict):
        raise _makes_no_sense(TypeError(type(content).__name__))
    return content


def blobs_of(manifest: Mapping[str, object]) -> list[Blob]:
    """Return the blobs that a manifest names, the config first. Raises GuestError."""
    if "config" not in manifest:
        raise _makes_no_sense(KeyError("config"))
    return [Blob.from_descriptor(each) for each in (manifest["config"], *_list_at("layers", manifest))]


def manifests_of(index: Mapping[str, object]) -> list[Blob]:
    """Return the manifests that an index names. Raises GuestError."""
    return [Blob.from_descriptor(each) for each in _list_at("manifests", index)]


def list_descriptors(index: Mapping[str, object]) -> list[Descriptor]:
    """Return the descriptors that an index holds, which nobody has looked at yet. Raises GuestError."""
    return [each for each in _list_at("manifests", index) if isinstance(each, dict)]


def _list_at(key: str, content: Mapping[str, object]) -> list[object]:
    found = content.get(key)
    if not isinstance(found, list):
        raise _makes_no_sense(TypeError(f"no list of {key}"))
    return found


def _makes_no_sense(error: Exception) -> GuestError:
    return GuestError("the guest's manifest of the container image makes no sense", details=repr(error))


class ArchiveWriter:
    """A tar file whose members come in pieces."""

    def __init__(self, out: Sink) -> None:
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
        self._out.write(data)
        self._total += len(data)
