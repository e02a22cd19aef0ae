"""The same container image with its layers in another compression, or by the media types of the other kind."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import cast

from vmbuild.errors import GuestError
from vmbuild.guest import oci
from vmbuild.guest.blobs import HostBlobs
from vmbuild.guest.image import SUBJECT, Image, is_attestation
from vmbuild.guest.oci import Blob, Descriptor

OCI, DOCKER = "oci", "docker"
_DOCUMENTS = {
    OCI: (oci.INDEX, oci.MANIFEST, oci.CONFIG),
    DOCKER: (
        "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.docker.distribution.manifest.v2+json",
        "application/vnd.docker.container.image.v1+json",
    ),
}
_LAYERS = {
    (OCI, "uncompressed"): "application/vnd.oci.image.layer.v1.tar",
    (OCI, "gzip"): "application/vnd.oci.image.layer.v1.tar+gzip",
    (OCI, "zstd"): "application/vnd.oci.image.layer.v1.tar+zstd",
    (DOCKER, "uncompressed"): "application/vnd.docker.image.rootfs.diff.tar",
    (DOCKER, "gzip"): "application/vnd.docker.image.rootfs.diff.tar.gzip",
    (DOCKER, "zstd"): "application/vnd.docker.image.rootfs.diff.tar.zstd",
}
"""Media types. Source: the OCI image specification 1.1; distribution, image manifest V 2, schema 2; BuildKit."""

_KINDS = {name: kind for kind, name in _LAYERS.items()}


@dataclass(frozen=True)
class Wish:
    """How a container image is wanted: new layers in a compression, with `force` the others too.

    `oci_types` None keeps the kind of media types that it has where that can be.
    """

    compression: str
    level: int | None = None
    force: bool = False
    oci_types: bool | None = None


def rewrite(image: Image, wish: Wish, blobs: HostBlobs) -> Image:
    """Return a container image as it is wanted, itself when it is so already. What is made lies among the blobs.

    The digests of its manifests change with its layers'; what attests something of them names the new ones.
    """
    return _Rewriting(image, wish, blobs).image()


class _Rewriting:
    def __init__(self, image: Image, wish: Wish, blobs: HostBlobs) -> None:
        self._image, self._wish, self._blobs = image, wish, blobs
        self._family = self._choose_family()
        self._renamed: dict[str, str] = {}
        self._documents: dict[str, bytes] = {}

    def _choose_family(self) -> str:
        attested = any(map(is_attestation, self._image.entries()))
        if self._wish.oci_types or attested or (self._wish.compression == "zstd" and self._wish.oci_types is None):
            return OCI
        is_docker = self._image.media_type in _DOCUMENTS[DOCKER]
        return DOCKER if is_docker or self._wish.oci_types is False else OCI

    def image(self) -> Image:
        entries = [each if is_attestation(each) else self._manifest(each) for each in self._image.entries()]
        entries = [self._attestation(each) if is_attestation(each) else each for each in entries]
        if not self._image.is_index:
            digest = Blob.from_descriptor(entries[0]).digest
            manifest = oci.parse_object(self._documents[digest])
            return Image(manifest, self._documents, oci.blobs_of(manifest))
        top = {**self._image.top, "mediaType": _DOCUMENTS[self._family][0], "manifests": entries}
        described, data = self._keep(top, self._image.top, self._image.documents[self._image.digest])
        documents = {described.digest: data, **self._documents}
        blobs = [blob for entry in entries for blob in self._blobs_of(entry)]
        return Image(top, documents, blobs)

    def _blobs_of(self, entry: Descriptor) -> list[Blob]:
        return oci.blobs_of(oci.parse_object(self._documents[Blob.from_descriptor(entry).digest]))

    def _manifest(self, entry: Descriptor) -> Descriptor:
        old = self._image.part(entry)
        manifest = {
            **old.top,
            "mediaType": _DOCUMENTS[self._family][1],
            "config": self._config(cast(Descriptor, old.top["config"])),
            "layers": [self._layer(cast(Descriptor, each)) for each in cast(list[object], old.top["layers"])],
        }
        return self._replace(entry, old, manifest)

    def _config(self, config: Descriptor) -> Descriptor:
        is_known = any(config.get("mediaType") == names[2] for names in _DOCUMENTS.values())
        return {**config, "mediaType": _DOCUMENTS[self._family][2]} if is_known else config

    def _layer(self, layer: Descriptor) -> Descriptor:
        blob = Blob.from_descriptor(layer)
        _, has = _KINDS.get(blob.media_type, ("", ""))
        if not has:
            return layer  # a foreign layer, or none at all
        wanted = self._wish.compression if has == "uncompressed" or self._wish.force else has
        digest, size = blob.digest, blob.size
        if wanted != has or (self._wish.force and wanted != "uncompressed"):
            digest, size = self._blobs.recompress(blob, wanted, self._wish.level)
        return {**layer, "mediaType": _LAYERS[self._family, wanted], "digest": f"sha256:{digest}", "size": size}

    def _attestation(self, entry: Descriptor) -> Descriptor:
        """Return what attests something of a manifest, now of that manifest's new digest."""
        old = self._image.part(entry)
        config, *layers = oci.blobs_of(old.top)
        made = [self._statement(layer) for layer in layers]
        facts = oci.parse_object(self._blobs.read(config))
        facts["rootfs"] = {"type": "layers", "diff_ids": [f"sha256:{each.digest}" for each in made]}
        new_config = config if made == layers else self._blobs.add(_dump(facts), config.media_type)
        manifest = {
            **old.top,
            "config": _name(cast(Descriptor, old.top["config"]), new_config),
            "layers": [_name(cast(Descriptor, was), now) for was, now in zip(_layers(old), made, strict=True)],
        }
        notes = dict(cast(dict[str, str], entry["annotations"]))
        notes[SUBJECT] = self._new_name(str(notes.get(SUBJECT, "")))
        return {**self._replace(entry, old, manifest), "annotations": notes}

    def _statement(self, layer: Blob) -> Blob:
        """Return an in-toto statement about what is named anew here."""
        statement = oci.parse_object(self._blobs.read(layer))
        subjects = statement.get("subject")
        if not isinstance(subjects, list):
            return layer
        renamed = [self._subject(each) for each in subjects]
        return (
            layer
            if renamed == subjects
            else self._blobs.add(_dump({**statement, "subject": renamed}), layer.media_type)
        )

    def _subject(self, subject: object) -> object:
        if not isinstance(subject, dict) or not isinstance(subject.get("digest"), dict):
            return subject
        digests = {key: self._renamed.get(str(value), value) for key, value in subject["digest"].items()}
        return {**subject, "digest": digests}

    def _new_name(self, name: str) -> str:
        digest = name.removeprefix("sha256:")
        return f"sha256:{self._renamed.get(digest, digest)}"

    def _replace(self, entry: Descriptor, old: Image, manifest: dict[str, object]) -> Descriptor:
        made, data = self._keep(manifest, old.top, old.documents[old.digest])
        self._documents[made.digest] = data
        self._renamed[old.digest] = made.digest
        return {**_name(entry, made), "mediaType": str(manifest.get("mediaType") or oci.MANIFEST)}

    def _keep(self, new: dict[str, object], old: dict[str, object], data: bytes) -> tuple[Blob, bytes]:
        """Return what a document is now, byte for byte as before when nothing in it has changed."""
        data = data if new == old else _dump(new)
        return Blob.from_descriptor(oci.describe(str(new.get("mediaType")), data)), data


def _layers(image: Image) -> list[object]:
    found = image.top.get("layers")
    if not isinstance(found, list):
        raise GuestError("an attestation in the guest has no layers")
    return found


def _name(descriptor: Descriptor, blob: Blob) -> Descriptor:
    return {**descriptor, "digest": f"sha256:{blob.digest}", "size": blob.size}


def _dump(content: object) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()
