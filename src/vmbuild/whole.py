"""Files that appear whole or not at all."""

from __future__ import annotations

import hashlib
import io
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from vmbuild.errors import HostError

BUFFER_BYTES = 1024 * 1024


@contextmanager
def open_whole(path: Path, *, mode: int = 0o644) -> Iterator[IO[bytes]]:
    """Yield a file to write beside `path`; it takes that name when the block ends well and is removed otherwise.

    Links are followed; a pipe or a device is written as it is. `mode` is before the umask. Raises HostError when the
    host cannot write it (a full disk, a missing folder, no permission); what else fails in the block passes unchanged.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        with _blaming(path):
            handle = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        with io.BufferedWriter(_Raw(handle, path), BUFFER_BYTES) as stream:
            yield stream
        return
    path = path.resolve()
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    with _blaming(path):
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with io.BufferedWriter(_Raw(handle, path), BUFFER_BYTES) as file:
            yield file
            file.flush()
            with _blaming(path):
                os.fsync(handle)
        with _blaming(path):
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


class _Raw(io.FileIO):
    """A file whose own failures are told apart from those of whoever writes it."""

    def __init__(self, handle: int, path: Path) -> None:
        super().__init__(handle, "wb")
        self._path = path

    def write(self, data: Any, /) -> int:
        with _blaming(self._path):
            return super().write(data)


@contextmanager
def writing_in(folder: Path) -> Iterator[None]:
    """Say what the host's file system refuses in a folder as a HostError."""
    with _blaming_host(f"cannot write in {folder}", f"Make room in {folder}, or see to it that you may write there."):
        yield


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    with _blaming_host(f"cannot write {path}", f"Make room in {path.parent}, or name another place."):
        yield


@contextmanager
def _blaming_host(what: str, resolution: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise HostError(f"{what}: {error.strerror or error}", resolution=resolution) from error


def write_whole(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write a file in one step. Raises HostError."""
    with open_whole(path, mode=mode) as file:
        file.write(data)


def hash_file(path: Path, algorithm: str = "sha256") -> str:
    """Return a file's digest in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()
