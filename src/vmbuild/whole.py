"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from vmbuild.errors import HostError

OURS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EISDIR, errno.EACCES, errno.ENOENT)


@contextmanager
def open_whole(path: Path, *, mode: int = 0o644) -> Iterator[IO[bytes]]:
    """Yield a file to write beside `path`; it takes that name when the block ends well and is removed otherwise.

    Raises HostError when the host cannot write it (a full disk, a missing folder, no permission).
    """
    try:
        handle, part = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(part).chmod(mode)
        Path(part).replace(path)
    except OSError as error:
        if error.errno in OURS:
            raise _cannot_write(path, error) from error
        raise  # of the caller's own work: a connection, a file that it reads
    finally:
        Path(part).unlink(missing_ok=True)


def write_whole(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write a file in one step. Raises HostError."""
    with open_whole(path, mode=mode) as file:
        file.write(data)


def hash_file(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cannot_write(path: Path, error: OSError) -> HostError:
    return HostError(
        f"cannot write {path}: {error.strerror or error}",
        resolution=f"Make room in {path.parent}, or name another place.",
    )
