"""A build cache in the guest -> a folder of the host, an OCI layout that `--cache-from type=local` reads."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from vmbuild.errors import GuestError
from vmbuild.guest.channel import Channel, receive
from vmbuild.guest.oci import INDEX, LAYOUT, Blob, Descriptor, list_descriptors, parse_object
from vmbuild.guest.session import Output, Session, capture
from vmbuild.report import Meter, Reporter
from vmbuild.whole import open_whole, write_whole, writing_in

NAME = "org.opencontainers.image.ref.name"

LIST = 'cd "$1/blobs/sha256" && find . -type f -exec stat -c "%s %n" {} +'

_LINE = re.compile(r"(\d+) \./([0-9a-f]{64})")

Listed = tuple[str, int]
"""A blob's digest and size."""


def bring_home(session: Session, source: str, folder: Path, channel: Channel, report: Reporter) -> int:
    """Bring a cache out of the guest; return the bytes that travelled.

    Blobs that the folder has stay, the index comes last: whoever reads it meanwhile finds what was there before, or all
    of the new. Raises GuestError when a blob is not what its name says, HostError when the host cannot write it.
    """
    index = parse_object(capture(session, ["cat", f"{source}/index.json"]).encode())
    blobs = folder / "blobs" / "sha256"
    with writing_in(folder):
        blobs.mkdir(parents=True, exist_ok=True)
    missing = [each for each in _list(session, source) if not _has(blobs, each)]
    size = sum(size for _, size in missing)
    with report.meter("cache", size) as meter:
        _copy(session, f"{source}/blobs/sha256", missing, blobs, channel, meter)
    write_whole(folder / "oci-layout", json.dumps(LAYOUT).encode())
    write_whole(folder / "index.json", json.dumps(_merge(folder / "index.json", index, blobs)).encode())
    return size


def _list(session: Session, source: str) -> list[Listed]:
    lines = capture(session, ["sh", "-c", LIST, "list", source]).splitlines()
    found = [match for line in lines if (match := _LINE.fullmatch(line))]
    if len(found) != len(lines):
        raise GuestError("the build cache in the guest holds what is no blob", details="\n".join(lines))
    return [(match[2], int(match[1])) for match in found]


def _has(blobs: Path, listed: Listed) -> bool:
    with suppress(OSError):
        return (blobs / listed[0]).stat().st_size == listed[1]
    return False


def _copy(
    session: Session, source: str, missing: Sequence[Listed], blobs: Path, channel: Channel, meter: Meter
) -> None:
    def take(number: int, content: Iterator[bytes]) -> None:
        with _writing(blobs / missing[number][0], meter) as write:
            for data in content:
                write(data)

    paths = [(f"{source}/{digest}", size) for digest, size in missing]
    if missing and not receive(channel, session, paths, take):
        for (path, _), (digest, _) in zip(paths, missing, strict=True):
            with _writing(blobs / digest, meter) as write:
                if session.run(["cat", path], on_stdout=write) != 0:
                    raise GuestError(f"the blob {digest} of the build cache is not in the guest")


@contextmanager
def _writing(path: Path, meter: Meter) -> Iterator[Output]:
    """Yield what takes a blob's content; the file appears when that has the digest which is its name."""
    found = hashlib.sha256()
    with open_whole(path) as file:

        def take(data: bytes) -> None:
            found.update(data)
            file.write(data)
            meter.advance(len(data))

        yield take
        if found.hexdigest() != path.name:
            raise GuestError(f"the blob {path.name} of the build cache came out of the guest with other content")


def _merge(path: Path, new: Descriptor, blobs: Path) -> Descriptor:
    """Return an index of what a folder's had, but for what the new one names as well, and all of the new one."""
    entries = [_plain(each, blobs) for each in list_descriptors(new)]
    names = {_name(each) for each in entries}
    old: list[Descriptor] = []
    with suppress(OSError, ValueError, GuestError):
        old = [each for each in list_descriptors(parse_object(path.read_bytes())) if _name(each) not in names]
    return {"schemaVersion": 2, "mediaType": INDEX, "manifests": [*old, *entries]}


def _plain(descriptor: Descriptor, blobs: Path) -> Descriptor:
    """Return what an entry of the guest's index may say: which blob, and its name. Raises GuestError."""
    blob = Blob.from_descriptor(descriptor)
    if not _has(blobs, (blob.digest, blob.size)):
        raise GuestError(f"the build cache names the blob {blob.digest}, which it has not")
    entry: Descriptor = {"mediaType": blob.media_type, "digest": f"sha256:{blob.digest}", "size": blob.size}
    return {**entry, "annotations": {NAME: name}} if (name := _name(descriptor)) else entry


def _name(descriptor: Descriptor) -> str:
    annotations = descriptor.get("annotations")
    return str(annotations.get(NAME, "")) if isinstance(annotations, dict) else ""
