"""A container image on the host, made of layers that a test tells of, as if it had come out of a guest."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.unit.guest.fakes import FakeSession
from vmbuild.guest import oci
from vmbuild.guest.blobs import HostBlobs
from vmbuild.guest.image import Image
from vmbuild.report import SilentReporter

PLAIN = "application/vnd.docker.image.rootfs.diff.tar"
GZIP = f"{PLAIN}.gzip"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
IN_TOTO = "application/vnd.in-toto+json"

Entry = tuple[str, Any]
"""A name, and its content as text; `None` for a folder, a dict for fields of the tar's member."""


def make_layer(*entries: Entry) -> bytes:
    """Return a tar of these entries."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in entries:
            info, data = tarfile.TarInfo(name), b""
            info.mode, info.mtime = 0o644, 1000
            if content is None:
                info.type, info.mode = tarfile.DIRTYPE, 0o755
            elif isinstance(content, str):
                data = content.encode()
            else:
                data = content.pop("data", b"")
                for key, value in content.items():
                    setattr(info, key, value)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def link(target: str) -> dict[str, Any]:
    """Return the fields of a symbolic link."""
    return {"type": tarfile.SYMTYPE, "linkname": target}


def hard_link(target: str) -> dict[str, Any]:
    """Return the fields of a hard link."""
    return {"type": tarfile.LNKTYPE, "linkname": target}


class Host:
    """A folder of blobs, and the container images in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.session = FakeSession()  # what is missing here is nowhere
        self.blobs = HostBlobs(self.session, None, lambda _: None, folder, SilentReporter())

    def add(self, data: bytes, media_type: str) -> dict[str, Any]:
        """Keep a blob and return its descriptor."""
        blob = self.blobs.add(data, media_type)
        return {"mediaType": media_type, "digest": f"sha256:{blob.digest}", "size": blob.size}

    def manifest(self, layers: Sequence[bytes], platform: str = "arm64", kind: str = PLAIN) -> tuple[bytes, str]:
        """Return a manifest and its media type."""
        plain = [gzip.decompress(each) if kind.endswith("gzip") else each for each in layers]
        diff_ids = [f"sha256:{hashlib.sha256(each).hexdigest()}" for each in plain]
        architecture, _, variant = platform.partition("/")
        config = {"os": "linux", "architecture": architecture, "rootfs": {"type": "layers", "diff_ids": diff_ids}}
        config |= {"variant": variant} if variant else {}
        media_type = DOCKER_MANIFEST if "docker" in kind else oci.MANIFEST
        content = {
            "schemaVersion": 2,
            "mediaType": media_type,
            "config": self.add(json.dumps(config).encode(), DOCKER_CONFIG if "docker" in kind else oci.CONFIG),
            "layers": [self.add(each, kind) for each in layers],
        }
        return json.dumps(content, indent=1).encode(), media_type

    def image(self, *layers: bytes, kind: str = PLAIN) -> Image:
        """Return a container image for one platform."""
        data, _ = self.manifest(layers, kind=kind)
        top = json.loads(data)
        return Image(top, {hashlib.sha256(data).hexdigest(): data}, oci.blobs_of(top))

    def index(self, platforms: dict[str, Sequence[bytes]], *, attested: bool = False) -> Image:
        """Return a container image for several platforms, each with an attestation of its provenance if wanted."""
        documents, entries, blobs = dict[str, bytes](), list[dict[str, Any]](), list[oci.Blob]()

        def keep(data: bytes, media_type: str, **more: Any) -> str:
            digest = hashlib.sha256(data).hexdigest()
            documents[digest] = data
            entries.append({"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data), **more})
            blobs.extend(oci.blobs_of(json.loads(data)))
            return digest

        for name, layers in platforms.items():
            data, media_type = self.manifest(layers, name, "application/vnd.oci.image.layer.v1.tar")
            digest = keep(data, media_type, platform={"os": "linux", "architecture": name.partition("/")[0]})
            if attested:
                notes = {
                    "vnd.docker.reference.digest": f"sha256:{digest}",
                    "vnd.docker.reference.type": "attestation-manifest",
                }
                keep(self._attestation(digest), oci.MANIFEST, annotations=notes)
        top = {"schemaVersion": 2, "mediaType": oci.INDEX, "manifests": entries}
        data = json.dumps(top).encode()
        return Image(top, {hashlib.sha256(data).hexdigest(): data, **documents}, blobs)

    def _attestation(self, digest: str) -> bytes:
        statement = {"_type": "t", "subject": [{"name": "pkg", "digest": {"sha256": digest}}], "predicate": {"a": 1}}
        layer = self.add(json.dumps(statement).encode(), IN_TOTO)
        config = {"os": "unknown", "architecture": "unknown", "rootfs": {"diff_ids": [layer["digest"]]}}
        content = {
            "schemaVersion": 2,
            "mediaType": oci.MANIFEST,
            "config": self.add(json.dumps(config).encode(), oci.CONFIG),
            "layers": [layer],
        }
        return json.dumps(content).encode()

    def document(self, image: Image, digest: str) -> Any:
        """Return a document of a container image by `sha256:...`."""
        return json.loads(image.documents[digest.removeprefix("sha256:")])

    def blob(self, descriptor: dict[str, Any]) -> bytes:
        """Return the blob that a descriptor names, which it has to describe rightly."""
        data = self.blobs.path(descriptor["digest"].removeprefix("sha256:")).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (descriptor["digest"][7:], descriptor["size"])
        return data
