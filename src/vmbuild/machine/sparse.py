"""Files that are mostly holes, piece by piece: a machine's memory and its disk."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import IO

from vmbuild.model import KIB, MIB

PIECE_BYTES = MIB
HOLE_BYTES = 4 * KIB
"""The least that is left out when it is zero: a page of memory, and a block of most file systems."""

_ZEROS = bytes(PIECE_BYTES)


def is_zero(data: bytes | memoryview) -> bool:
    """Tell whether there is nothing but zeros in a piece or less."""
    return data == _ZEROS[: len(data)]


def piece_places(handle: int, size: int, piece_bytes: int = PIECE_BYTES) -> Iterator[int]:
    """Yield where in a file of `size` bytes the pieces begin that are not all hole. Raises OSError."""
    at = _next_place(handle, 0, piece_bytes)
    while at is not None and at < size:
        yield at
        at = _next_place(handle, at + piece_bytes, piece_bytes)


def _next_place(handle: int, at: int, piece_bytes: int) -> int | None:
    try:
        return os.lseek(handle, at, os.SEEK_DATA) // piece_bytes * piece_bytes
    except OSError as error:
        if error.errno == errno.ENXIO:  # nothing but a hole up to the end
            return None
        raise


@contextmanager
def create_sparse(path: Path, size: int) -> Iterator[IO[bytes]]:
    """Yield a new file that is one hole, for its owner alone; it is on the disk when the block ends. Raises OSError."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.truncate(size)
        yield file
        file.flush()
        os.fsync(file.fileno())


def write_sparse(file: IO[bytes], at: int, piece: bytes) -> None:
    """Write a piece where there was a hole; what is zero in it stays one. Raises OSError."""
    view = memoryview(piece)
    begin = 0
    for empty, run in groupby(_blocks(view), key=is_zero):
        end = begin + sum(len(block) for block in run)
        if not empty:
            file.seek(at + begin)
            file.write(view[begin:end])
        begin = end


def _blocks(view: memoryview) -> Iterator[memoryview]:
    return (view[begin : begin + HOLE_BYTES] for begin in range(0, len(view), HOLE_BYTES))
