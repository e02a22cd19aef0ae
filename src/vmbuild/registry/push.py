"""A container image's way into a repository: blobs that it has not, then manifests.

Source: the OCI distribution specification 1.1, "Push".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from vmbuild.deadline import Deadline
from vmbuild.errors import DeliveryError
from vmbuild.model import MIB
from vmbuild.registry.transport import BACKOFF_S, TRIES, Answer, Broken, Transport
from vmbuild.report import Meter

PART_BYTES = 32 * MIB
"""How much is sent at once to a registry, or the proxy before it, that finds a whole layer too large."""

TOO_LARGE = 413
TAKEN = 202
MADE = 201


@dataclass(frozen=True)
class Part:
    """A blob to be pushed: the hexadecimal part of its SHA-256, and its bytes."""

    digest: str
    size: int


@dataclass(frozen=True)
class Target:
    """A container image's place: registry, repository, and tag."""

    registry: str
    repository: str
    tag: str

    @classmethod
    def parse(cls, reference: str) -> Target:
        """Return the place that a full reference (`REGISTRY/REPOSITORY:TAG`) names."""
        registry, _, rest = reference.partition("/")
        repository, _, tag = rest.rpartition(":")
        return cls(registry, repository, tag)

    @property
    def scope(self) -> str:
        """What a token is asked for."""
        return f"repository:{self.repository}:pull,push"


class Repository:
    """One repository of a registry, to be pushed to."""

    def __init__(self, transport: Transport, repository: str, beside: Sequence[str] = ()) -> None:
        self._transport = transport
        self._name = repository
        self._beside = [name for name in beside if name != repository]
        self._scope = " ".join(f"repository:{name}:{what}" for name, what in self._wanted())
        self._whole = True

    def _wanted(self) -> Iterable[tuple[str, str]]:
        yield self._name, "pull,push"
        yield from ((name, "pull") for name in self._beside)

    def check(self) -> None:
        """See that a push would be let in: begin one, and give it up. Raises DeliveryError."""
        begun = self._begin(None)
        if begun is not None:
            self._transport.ask("DELETE", begun, self._scope, good=tuple(range(200, 500)))

    def missing(self, parts: Iterable[Part]) -> list[Part]:
        """Return the blobs that the repository has not. Raises DeliveryError."""
        return [part for part in parts if not self._has(part)]

    def _has(self, part: Part) -> bool:
        url = f"/v2/{self._name}/blobs/sha256:{part.digest}"
        return self._transport.ask("HEAD", url, self._scope, good=(200, 307, 404)).status != 404

    def upload(self, part: Part, path: Path, meter: Meter) -> int:
        """Send a blob, unless it lies in a repository beside; return the bytes that were sent.

        Where the line breaks it goes on with what the registry has. Raises DeliveryError.
        """
        location = self._begin(part)
        if location is None:
            meter.advance(part.size)
            return 0
        upload = _Upload(self._transport, self._scope, location, path, part.size, meter)
        upload.send(whole=self._whole)
        self._whole = self._whole and not upload.was_too_large
        separator = "&" if "?" in upload.location else "?"
        done = f"{upload.location}{separator}digest=sha256:{part.digest}"
        self._transport.ask("PUT", done, self._scope, good=(MADE, 204))
        return part.size

    def _begin(self, part: Part | None) -> str | None:
        """Begin an upload and return its URL; None when the registry took the blob from a repository beside."""
        url = f"/v2/{self._name}/blobs/uploads/"
        if part is not None and self._beside:
            url += f"?mount=sha256:{part.digest}&from={self._beside[0]}"
        answer = self._transport.ask("POST", url, self._scope, good=(MADE, TAKEN))
        return None if answer.status == MADE else _location(self._transport, answer)

    def put_manifest(self, reference: str, media_type: str, data: bytes) -> None:
        """Put a manifest or an index under a tag or a digest. Raises DeliveryError."""
        url = f"/v2/{self._name}/manifests/{reference}"
        self._transport.ask(
            "PUT", url, self._scope, headers={"Content-Type": media_type}, body=lambda: data, good=(MADE, 200, 202)
        )


def _location(transport: Transport, answer: Answer) -> str:
    if "location" not in answer.headers:
        raise transport.failed("it does not say where to send a layer")
    return answer.headers["location"]


class _Upload:
    """A blob on its way, which knows how much of it the registry has."""

    def __init__(self, transport: Transport, scope: str, location: str, path: Path, size: int, meter: Meter) -> None:
        self.location = location
        self.was_too_large = False
        self._transport, self._scope = transport, scope
        self._path, self._size, self._meter = path, size, meter
        self._at = self._shown = 0

    def send(self, *, whole: bool) -> None:
        failed = 0
        while self._at < self._size:
            before = self._at
            try:
                self._send_piece(self._size if whole else PART_BYTES)
            except Broken as error:
                Deadline.after(BACKOFF_S * 2**failed).sleep(BACKOFF_S * 2**failed)
                self._ask_how_far()
                failed = failed + 1 if self._at <= before else 0
                if failed >= TRIES:
                    raise self._transport.failed(str(error)) from error
            except DeliveryError:
                if not whole or not self.was_too_large:
                    raise
                whole = False

    def _send_piece(self, most: int) -> None:
        end = min(self._size, self._at + most)
        headers = {"Content-Type": "application/octet-stream", "Content-Range": f"{self._at}-{end - 1}"}
        if end - self._at == self._size:
            del headers["Content-Range"]  # as docker sends it: all of it, in one request
        with self._path.open("rb") as file:
            answer = self._transport.ask_once(
                "PATCH",
                self.location,
                self._scope,
                headers=headers,
                body=lambda: cast(IO[bytes], _Piece(file, self._at, end, self._show)),
                good=(TAKEN, 204, TOO_LARGE),
            )
        if answer.status == TOO_LARGE:
            self.was_too_large = True
            raise self._transport.failed("a layer is too large for it")
        self.location = _location(self._transport, answer)
        self._at = end
        self._show(end)

    def _ask_how_far(self) -> None:
        """Ask what has arrived of an upload that broke off."""
        answer = self._transport.ask("GET", self.location, self._scope, good=(200, 204))
        self.location = answer.headers.get("location", self.location)
        found = re.fullmatch(r"(?:bytes=)?0-(\d+)", answer.headers.get("range", ""))
        has = int(found[1]) + 1 if found and int(found[1]) else 0
        self._at = min(has, self._size)

    def _show(self, position: int) -> None:
        if position > self._shown:
            self._meter.advance(position - self._shown)
            self._shown = position


class _Piece:
    """A piece of a file as the body of a request: it has a length, and says how far it was read."""

    def __init__(self, file: IO[bytes], begin: int, end: int, show: Callable[[int], None]) -> None:
        self._file, self._begin, self._end, self._show = file, begin, end, show
        file.seek(begin)

    def __len__(self) -> int:
        return self._end - self._begin

    def __iter__(self) -> Iterator[bytes]:
        """Yield the piece; what can be iterated is what requests sends as it comes."""
        while data := self.read(MIB):
            yield data

    def read(self, size: int = -1) -> bytes:
        position = self._file.tell()
        left = self._end - position
        data = self._file.read(left if size < 0 else min(max(size, MIB), left))
        self._show(position + len(data))
        return data
