"""Base images in the guest's Docker: one name, and under it an index of every platform that was made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vmbuild.errors import GuestError
from vmbuild.guest import oci
from vmbuild.guest.oci import ArchiveWriter, Descriptor
from vmbuild.guest.session import Session, Sink, capture
from vmbuild.model import PLATFORMS, Platform

CHUNK_BYTES = 256 * 1024
ENV = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Layer:
    """A base image's one layer on the host, a gzip-compressed tar: both digests are SHA-256, in hexadecimal."""

    path: Path
    digest: str
    plain_digest: str


@dataclass(frozen=True)
class Tagged:
    """What a name stands for in the guest: its id (`sha256:...`) and the manifest of each platform that is whole."""

    image_id: str
    manifests: Mapping[str, Descriptor]


def find(session: Session, reference: str) -> Tagged | None:
    """Return what the guest's Docker has under a name, None when it has nothing. Raises GuestError."""
    out = bytearray()
    if session.run(["docker", "image", "inspect", "--format", "{{.Id}}", reference], on_stdout=out.extend) != 0:
        return None
    image_id = out.decode().strip()
    data = oci.read_checked(session, image_id.removeprefix("sha256:"))
    top = oci.parse_object(data)
    if "manifests" not in top:
        kind = str(top.get("mediaType") or oci.MANIFEST)
        found = [_look_up(session, oci.describe(kind, data), data)]
    else:
        found = [_look_up(session, each) for each in oci.list_descriptors(top)]
    return Tagged(image_id, dict(filter(None, found)))


def _look_up(session: Session, descriptor: Descriptor, data: bytes | None = None) -> tuple[str, Descriptor] | None:
    """Return a manifest's platform and its descriptor; None when the guest has not all of it, or it is none of ours."""
    try:
        blob = oci.Blob.from_descriptor(descriptor)
        manifest = oci.parse_object(data or oci.read_checked(session, blob.digest))
        config, *layers = oci.blobs_of(manifest)
        facts = oci.parse_object(oci.read_checked(session, config.digest))
    except GuestError:
        return None
    paths = [oci.blob_path(layer.digest) for layer in layers]
    has_all = session.run(["sh", "-c", 'for f; do [ -e "$f" ] || exit 1; done', "have", *paths]) == 0
    platform = _platform_of(facts)
    if platform is None or not has_all:
        return None
    return platform.name, {**descriptor, "platform": _describe_platform(platform)}


def _platform_of(facts: Mapping[str, object]) -> Platform | None:
    """Return the platform of a container image's config. `arm64` has the variant v8, or none (containerd's rule)."""
    variant = str(facts.get("variant") or "")
    for row in PLATFORMS.values():
        same_variant = variant == row.variant or (row.architecture == "arm64" and variant == "v8")
        if facts.get("os") == "linux" and facts.get("architecture") == row.architecture and same_variant:
            return row
    return None


def _describe_platform(platform: Platform) -> dict[str, str]:
    parts = {"os": "linux", "architecture": platform.architecture}
    return {**parts, "variant": platform.variant} if platform.variant else parts


def load(session: Session, archive: str, reference: str) -> str:
    """Load an archive that lies in the guest; return the id that its name then stands for. Raises GuestError."""
    capture(session, ["docker", "load", "--quiet", "--input", archive])
    return capture(session, ["docker", "image", "inspect", "--format", "{{.Id}}", reference]).strip()


def write_archive(sink: Sink, reference: str, layers: Mapping[str, Layer], others: Mapping[str, Descriptor]) -> None:
    """Write an OCI archive of an index: a new manifest for each layer's platform, and others that the guest has."""
    archive = ArchiveWriter(sink)
    manifests = {name: each for name, each in others.items() if name not in layers}
    for name, layer in layers.items():
        manifests[name] = _add_manifest(archive, PLATFORMS[name], layer)
    ordered = [manifests[name] for name in PLATFORMS if name in manifests]
    index = {"schemaVersion": 2, "mediaType": oci.INDEX, "manifests": ordered}
    top = _add_document(archive, oci.INDEX, index)
    archive.add_data("index.json", json.dumps(oci.layout_index(top, [reference])).encode())
    archive.add_data("oci-layout", json.dumps(oci.LAYOUT).encode())
    archive.close()


def _add_manifest(archive: ArchiveWriter, platform: Platform, layer: Layer) -> Descriptor:
    config = {
        **_describe_platform(platform),
        "config": {"Cmd": ["bash"], "Env": [ENV]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer.plain_digest}"]},
        "history": [{"created_by": "vmbuild base"}],
    }
    size = layer.path.stat().st_size
    _add_file(archive, layer, size)
    manifest = {
        "schemaVersion": 2,
        "mediaType": oci.MANIFEST,
        "config": _add_document(archive, oci.CONFIG, config),
        "layers": [{"mediaType": oci.GZIP_LAYER, "digest": f"sha256:{layer.digest}", "size": size}],
    }
    return {**_add_document(archive, oci.MANIFEST, manifest), "platform": _describe_platform(platform)}


def _add_file(archive: ArchiveWriter, layer: Layer, size: int) -> None:
    archive.begin(f"blobs/sha256/{layer.digest}", size)
    with layer.path.open("rb") as file:
        while data := file.read(CHUNK_BYTES):
            archive.write(data)
    archive.end()


def _add_document(archive: ArchiveWriter, media_type: str, content: Mapping[str, object]) -> Descriptor:
    data = json.dumps(content).encode()
    descriptor = oci.describe(media_type, data)
    archive.add_data(f"blobs/sha256/{str(descriptor['digest']).removeprefix('sha256:')}", data)
    return descriptor
