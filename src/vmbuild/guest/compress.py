"""Layers compressed and unpacked on the host, at the host's speed."""

from __future__ import annotations

import gzip
import hashlib
import os
import struct
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

import zstandard

from vmbuild.errors import GuestError
from vmbuild.model import KIB, MIB
from vmbuild.report import Meter

PIECE_BYTES = MIB
BEFORE_BYTES = 32 * KIB
"""What deflate may refer back to. Source: RFC 1951."""

WINDOW_BYTES = 128 * MIB
"""The most that a zstd layer may ask to be kept in memory, which is what `zstd --ultra -22` asks for."""

_GZIP_HEAD = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"
_LAST_BLOCK = b"\x03\0"
GZIP_LEVEL = 6
ZSTD_LEVEL = 3


@contextmanager
def open_plain(path: Path) -> Iterator[IO[bytes]]:
    """Yield the tar of a layer, unpacked by what its first bytes say. Raises GuestError when it is damaged."""
    with path.open("rb") as file:
        magic = file.read(4)
        file.seek(0)
        plain: IO[bytes] = file
        if magic[:2] == _GZIP_HEAD[:2]:
            plain = cast(IO[bytes], gzip.GzipFile(fileobj=file))
        elif magic == zstandard.FRAME_HEADER:
            unpacker = zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES)
            plain = cast(IO[bytes], unpacker.stream_reader(file, read_across_frames=True))
        try:
            yield plain
        except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
            raise GuestError(f"the layer {path.name} is damaged", details=str(error)) from error


def compress(source: Path, target: Path, compression: str, level: int | None, meter: Meter) -> tuple[str, int]:
    """Write a layer in another compression; return the hexadecimal SHA-256 of what was written, and its bytes.

    The same layer always comes out the same, on however many CPUs.
    """
    digest, size = hashlib.sha256(), 0
    with open_plain(source) as plain, target.open("xb") as out:
        for data in _PACKERS[compression](_pieces(plain, meter), level):
            digest.update(data)
            size += out.write(data)
    return digest.hexdigest(), size


def _pieces(plain: IO[bytes], meter: Meter) -> Iterator[bytes]:
    while data := _read_full(plain):
        meter.advance(len(data))
        yield data


def _read_full(plain: IO[bytes]) -> bytes:
    """Read one whole piece: where pieces end shows in what comes out, and must not depend on the reads before."""
    data = plain.read(PIECE_BYTES)
    while data and len(data) < PIECE_BYTES and (more := plain.read(PIECE_BYTES - len(data))):
        data += more
    return data


def _plain(pieces: Iterator[bytes], _level: int | None) -> Iterator[bytes]:
    return pieces


def _gzip(pieces: Iterator[bytes], level: int | None) -> Iterator[bytes]:
    """Yield one gzip member, its pieces deflated beside each other as pigz does it."""
    crc = size = 0
    before = b""
    workers = os.cpu_count() or 1
    waiting: deque[Future[bytes]] = deque()
    yield _GZIP_HEAD
    with ThreadPoolExecutor(workers) as pool:
        for data in pieces:
            waiting.append(pool.submit(_deflate, data, before, GZIP_LEVEL if level is None else level))
            crc, size, before = zlib.crc32(data, crc), size + len(data), data[-BEFORE_BYTES:]
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        for each in waiting:
            yield each.result()
    yield _LAST_BLOCK + struct.pack("<II", crc, size & 0xFFFFFFFF)


def _deflate(data: bytes, before: bytes, level: int) -> bytes:
    if before:
        packer = zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS, zdict=before)
    else:
        packer = zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush(zlib.Z_SYNC_FLUSH)


def _zstd(pieces: Iterator[bytes], level: int | None) -> Iterator[bytes]:
    """Yield one zstd frame; with threads, however many, it comes out the same."""
    packer = zstandard.ZstdCompressor(level=level or ZSTD_LEVEL, threads=os.cpu_count() or 1).compressobj()
    for data in pieces:
        yield packer.compress(data)
    yield packer.flush()


_PACKERS = {"uncompressed": _plain, "gzip": _gzip, "zstd": _zstd}
