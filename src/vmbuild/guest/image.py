"""A container image as its documents describe it: an index or a manifest, and the blobs that they name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from vmbuild.errors import GuestError
from vmbuild.guest.oci import (
    INDEX,
    LAYOUT,
    MANIFEST,
    Blob,
    Descriptor,
    blobs_of,
    describe,
    full_reference,
    layout_index,
    list_descriptors,
    manifests_of,
    parse_object,
    read_checked,
)
from vmbuild.guest.session import Session

ATTESTATION = "vnd.docker.reference.type"
SUBJECT = "vnd.docker.reference.digest"
"""Annotations of an attestation's manifest in an index. Source: BuildKit, docs/attestations/attestation-storage.md."""


@dataclass(frozen=True)
class Image:
    """A container image: its own document (manifest or index) first, all its documents by digest, and their blobs."""

    top: Descriptor
    documents: dict[str, bytes]
    blobs: list[Blob]

    @property
    def digest(self) -> str:
        """The hexadecimal part of its digest."""
        return next(iter(self.documents))

    @property
    def is_index(self) -> bool:
        """Tell whether it is one of several manifests."""
        return "manifests" in self.top

    @property
    def media_type(self) -> str:
        """The media type of its own document."""
        return str(self.top.get("mediaType") or (INDEX if self.is_index else MANIFEST))

    @property
    def descriptor(self) -> Descriptor:
        """What names it."""
        return describe(self.media_type, self.documents[self.digest])

    def entries(self) -> list[Descriptor]:
        """Return the descriptors of its manifests, attestations among them; its own when it is no index."""
        return list_descriptors(self.top) if self.is_index else [self.descriptor]

    def runnable(self) -> list[Image]:
        """Return its manifests that are no attestations, each as a container image."""
        return [self.part(each) for each in self.entries() if not is_attestation(each)]

    def part(self, entry: Descriptor) -> Image:
        """Return one of its manifests as a container image."""
        digest = Blob.from_descriptor(entry).digest
        manifest = parse_object(self.documents[digest])
        return Image(manifest, {digest: self.documents[digest]}, blobs_of(manifest))

    def single(self) -> Image:
        """Return its one manifest where there is but one that can be run, else itself."""
        found = self.runnable()
        return found[0] if self.is_index and len(found) == 1 else self

    def each_blob_once(self) -> list[Blob]:
        """Return its blobs in their order, none of them twice."""
        return list({blob.digest: blob for blob in self.blobs}.values())

    def tables(self, tags: Sequence[str]) -> dict[str, object]:
        """Return the tables of an archive: those of the OCI image layout, after docker's own where there can be one."""
        tables: dict[str, object] = {"index.json": layout_index(self.descriptor, tags), "oci-layout": LAYOUT}
        if self.is_index:
            return tables
        config, *layers = (f"blobs/sha256/{blob.digest}" for blob in self.blobs)
        names = [full_reference(tag) for tag in tags]
        short = [name.removeprefix("docker.io/library/").removeprefix("docker.io/") for name in names]
        return {"manifest.json": [{"Config": config, "RepoTags": short or None, "Layers": layers}], **tables}


def read_image(session: Session, digest: str) -> Image:
    """Read what describes a container image in the guest. Raises GuestError."""
    data = read_checked(session, digest)
    top = parse_object(data)
    if "manifests" not in top:
        return Image(top, {digest: data}, blobs_of(top))
    documents, blobs = {digest: data}, list[Blob]()
    for each in manifests_of(top):
        documents[each.digest] = read_checked(session, each.digest)
        if len(documents[each.digest]) != each.size:
            raise GuestError(f"the manifest {each.digest} has another size than the guest's index says")
        blobs += blobs_of(parse_object(documents[each.digest]))
    return Image(top, documents, blobs)


def is_attestation(entry: Mapping[str, object]) -> bool:
    """Tell whether a descriptor of an index names what is said of another container image, and is none itself."""
    notes = entry.get("annotations")
    return isinstance(notes, dict) and ATTESTATION in cast(Descriptor, notes)
