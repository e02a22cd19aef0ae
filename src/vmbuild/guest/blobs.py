"""The blobs of a container image on the host, where every way out finds them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from vmbuild.errors import GuestError
from vmbuild.guest.archive import Known, copy_blobs
from vmbuild.guest.channel import Channel
from vmbuild.guest.compress import compress
from vmbuild.guest.image import Image, read_image
from vmbuild.guest.oci import Blob
from vmbuild.guest.session import Session
from vmbuild.report import Reporter
from vmbuild.whole import writing_in


class HostBlobs:
    """Blobs in a folder of the host: brought from the guest when they are wanted, or made here. Each is checked."""

    def __init__(self, session: Session, channel: Channel | None, known: Known, folder: Path, report: Reporter) -> None:
        self._session, self._channel, self._known = session, channel, known
        self._folder, self._report = folder, report
        self._made: dict[tuple[str, str, int | None], tuple[str, int]] = {}

    def image(self, image_id: str) -> Image:
        """Return the documents of a container image in the guest by its id, `sha256:...`. Raises GuestError."""
        return read_image(self._session, image_id.removeprefix("sha256:"))

    def path(self, digest: str) -> Path:
        """Return where a blob lies that was brought here, made here, or is the host's anyway."""
        own = self._folder / digest
        return own if own.exists() else self._known(digest) or own

    def bring(self, blobs: Iterable[Blob]) -> None:
        """Have blobs on the host. Raises GuestError, or HostError when there is no room."""
        missing = list({blob.digest: blob for blob in blobs if not self.path(blob.digest).exists()}.values())
        if not missing:
            return
        with writing_in(self._folder), self._report.meter("export", sum(blob.size for blob in missing)) as meter:
            copy_blobs(self._session, missing, lambda _: None, _FolderWriter(self._folder), meter, self._channel)

    def read(self, blob: Blob) -> bytes:
        """Return a small blob. Raises GuestError."""
        self.bring([blob])
        return self.path(blob.digest).read_bytes()

    def add(self, data: bytes, media_type: str) -> Blob:
        """Keep a blob that was made here."""
        digest = hashlib.sha256(data).hexdigest()
        (self._folder / digest).write_bytes(data)
        return Blob(digest, len(data), media_type)

    def recompress(self, blob: Blob, compression: str, level: int | None) -> tuple[str, int]:
        """Have a layer in another compression; return its hexadecimal SHA-256 and its bytes. Raises GuestError."""
        key = (blob.digest, compression, level)
        if key not in self._made:
            self.bring([blob])
            with writing_in(self._folder):
                self._made[key] = self._recompress(blob, compression, level)
        return self._made[key]

    def _recompress(self, blob: Blob, compression: str, level: int | None) -> tuple[str, int]:
        part = self._folder / "part"
        part.unlink(missing_ok=True)
        total = None if blob.is_compressed else blob.size
        with self._report.meter("compress", total) as meter:
            made = compress(self.path(blob.digest), part, compression, level, meter)
        part.replace(self._folder / made[0])
        return made


class _FolderWriter:
    """Takes blobs as files in a folder, each by its digest."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: IO[bytes] | None = None

    def begin(self, name: str, size: int) -> None:
        self._name, self._left = name.rpartition("/")[2], size
        self._file = (self._folder / f"{self._name}.part").open("wb")

    def write(self, data: bytes) -> None:
        if self._file is None or len(data) > self._left:
            raise GuestError("a blob came out of the guest with more bytes than it should have")
        self._left -= len(data)
        self._file.write(data)

    def end(self) -> None:
        if self._file is None or self._left:
            raise GuestError("a blob came out of the guest with fewer bytes than it should have")
        self._file.close()
        (self._folder / f"{self._name}.part").replace(self._folder / self._name)
