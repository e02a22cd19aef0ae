"""The envelope of a bundle: zstd frames, and a seal that tells whether all of them are there as they were written.

The seal is the SHA-256 of every byte before it, in a skippable frame, which other programs pass over.
Source of the frames: RFC 8878, 3.1.
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

import zstandard

from vmbuild.errors import HostError, MachineError
from vmbuild.model import MIB

LEVEL = 3
THREADS = 8
"""Each keeps some 20 MiB, and few disks take more than eight of them give."""

WINDOW_BYTES = 8 * MIB
"""The most that a frame may ask to be kept in memory; level 3 asks for 2 MiB."""

SEAL = struct.Struct("<II32s")
SEAL_MAGIC = 0x184D2A50
FRAME_MAGIC = bytes.fromhex("28b52ffd")


class SealedWriter:
    """A file that is written compressed, and sealed at its end."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        threads = min(os.cpu_count() or 1, THREADS)
        self._compressor = zstandard.ZstdCompressor(level=LEVEL, threads=threads, write_checksum=True)

    def write_frame(self, pieces: Iterable[bytes]) -> None:
        """Write a frame that has its own checksum."""
        packing = self._compressor.compressobj()
        for piece in pieces:
            self._write(packing.compress(piece))
        self._write(packing.flush())

    def write_seal(self) -> None:
        """Write what is last."""
        digest = self._digest.digest()
        self._file.write(SEAL.pack(SEAL_MAGIC, len(digest), digest))

    def _write(self, data: bytes) -> None:
        self._digest.update(data)
        self._file.write(data)


@contextmanager
def open_sealed(path: Path) -> Iterator[SealedReader]:
    """Yield a bundle to read. Raises HostError, MachineError when the file is something else."""
    with reading(path):  # O_NONBLOCK: a pipe is refused, and not waited for
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        with reading(path):
            magic = os.pread(handle, len(FRAME_MAGIC), 0)
        if magic != FRAME_MAGIC:
            raise foreign(path, "it does not begin with a zstd frame")
        yield SealedReader(path, handle)
    finally:
        os.close(handle)


class SealedReader:
    """What is in the frames of a bundle, read to its end once. Every method raises HostError and MachineError."""

    def __init__(self, path: Path, handle: int) -> None:
        self.path = path
        self._bytes = _Bytes(path, handle)
        unpacking = zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES)
        source = cast(IO[bytes], self._bytes)
        plain = unpacking.stream_reader(source, read_across_frames=True, closefd=False)
        self._plain = io.BufferedReader(cast(io.RawIOBase, plain), MIB)

    def take(self, size: int) -> bytes:
        """Return the next `size` bytes."""
        with self._unpacking():
            data = self._plain.read(size)
        if len(data) < size:
            raise damaged(self.path, "it ends too early")
        return data

    def check_frame(self) -> None:
        """Meet the checksum of the frame whose content was just taken, which is where the next one begins."""
        with self._unpacking():
            self._plain.peek(1)

    def check_seal(self) -> None:
        """Look whether there is a seal at the end, long before all is read: a copy that broke off has none."""
        magic, size, _ = self._bytes.seal()
        if (magic, size) != (SEAL_MAGIC, hashlib.sha256().digest_size):
            raise damaged(self.path, "it does not end in a seal: a part of it is missing, or something was added")

    def check_end(self) -> None:
        """Look whether all was taken and is what was sealed."""
        with self._unpacking():
            rest = self._plain.read(1)
        if rest:
            raise damaged(self.path, "there is more in it than its parts")
        if not self._bytes.are_sealed():
            raise damaged(self.path, "its SHA-256 is not the one in its seal")

    @contextmanager
    def _unpacking(self) -> Iterator[None]:
        try:
            yield
        except zstandard.ZstdError as error:
            raise damaged(self.path, str(error)) from error


class _Bytes:
    """The bytes of a file up to its seal, digested as they are read."""

    def __init__(self, path: Path, handle: int) -> None:
        self._path = path
        self._handle = handle
        self._digest = hashlib.sha256()
        self._at = 0
        self._end = max(0, os.fstat(handle).st_size - SEAL.size)

    def read(self, size: int) -> bytes:
        with reading(self._path):
            data = os.pread(self._handle, min(size, self._end - self._at), self._at)
        self._at += len(data)
        self._digest.update(data)
        return data

    def seal(self) -> tuple[int, int, bytes]:
        with reading(self._path):
            found = os.pread(self._handle, SEAL.size, self._end)
        magic, size, digest = SEAL.unpack(found.ljust(SEAL.size, b"\0"))
        return magic, size, digest

    def are_sealed(self) -> bool:
        return self._at == self._end and self.seal() == (SEAL_MAGIC, self._digest.digest_size, self._digest.digest())


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Say what the host refuses when a file is read as a HostError."""
    try:
        yield
    except OSError as error:
        brief = f"cannot read {path}: {error.strerror or error}"
        raise HostError(brief, resolution=f"See to it that {path} is a file that you may read.") from error


def damaged(path: Path, reason: str) -> MachineError:
    """Return what to raise for a bundle that is not what was packed."""
    resolution = "Copy it again from where it was made, or make a new one."
    return MachineError(f"the bundle {path} is damaged", details=reason, resolution=resolution)


def foreign(path: Path, reason: str) -> MachineError:
    """Return what to raise for a file that is something else."""
    return MachineError(f"{path} is no bundle", details=reason, resolution="Name a file that vmbuild has packed.")
