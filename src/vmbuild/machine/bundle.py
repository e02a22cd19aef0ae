"""A bundle: a suspended machine packed as one file that another host can resume.

A tar stream in the envelope of `machine.sealed`, so that `zstd -dc FILE | tar -t` lists it: `bundle.json`, then the
pieces of each part that are not all zero, each named by its part and place in bytes (`memory/0000000000100000`).
Bundles come from elsewhere: members that `pack` would not have written are refused.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from vmbuild.errors import HostError, MachineError
from vmbuild.machine.sealed import SealedReader, SealedWriter, damaged, foreign, open_sealed, reading
from vmbuild.machine.sparse import PIECE_BYTES, create_sparse, is_zero, piece_places, write_sparse
from vmbuild.model import GIB, MIB
from vmbuild.report import Meter
from vmbuild.whole import open_whole, writing_in

FORMAT = 1
HEAD = "bundle.json"
HEAD_BYTES = MIB
BLOCK = 512
MOST_PARTS = 16
PART_BYTES = 16 * 1024 * GIB
"""The most that a part may hold, holes included: the largest file of ext4."""

_NAME = re.compile(r"[a-z][a-z0-9-]{0,62}")
_PLACE = re.compile(r"(?P<part>[^/]+)/(?P<at>[0-9a-f]{16})")


def pack(path: Path, facts: Mapping[str, object], parts: Mapping[str, Path], meter: Meter) -> None:
    """Write a bundle; an older one under its name stays until the new one is whole.

    `facts` is what JSON can say, `meter` counts what `data_bytes` does. Raises HostError.
    """
    with ExitStack() as stack:
        opened = {name: stack.enter_context(_open_part(file)) for name, file in parts.items()}
        sizes = {name: part.size for name, part in opened.items()}
        head = json.dumps({"format": FORMAT, "facts": dict(facts), "parts": sizes}).encode()
        if not _are_sizes(sizes) or len(head) > HEAD_BYTES:
            raise ValueError(f"no bundle can hold {sizes} and {len(head)} bytes of facts")
        writer = SealedWriter(stack.enter_context(open_whole(path, mode=0o600)))
        writer.write_frame([_member(HEAD, head)])  # a frame of its own, whose checksum is met without the rest
        writer.write_frame(_members(opened, meter))
        writer.write_seal()


def data_bytes(path: Path) -> int:
    """Return the bytes of a file that packing reads: the pieces of it that are not all hole. Raises HostError."""
    with _open_part(path) as part:
        return sum(part.length(at) for at in part.places())


def packing_rate(path: Path, into: Path, limit_bytes: int = 64 * MIB) -> float:
    """Return the bytes a second (of `data_bytes`) at which a file would be packed into a folder.

    Measured with at most `limit_bytes` (and one piece at least) from all over the file, each read, compressed and
    written; infinite when all of it is a hole. Raises HostError.
    """
    with _open_part(path) as part, writing_in(into), tempfile.TemporaryFile(dir=into) as file:
        places = part.places()
        wanted = max(1, limit_bytes // PIECE_BYTES)
        sample = places[:: -(-len(places) // wanted) or 1]
        begin = time.perf_counter()
        SealedWriter(file).write_frame(part.read(at) for at in sample)
        file.flush()
        os.fsync(file.fileno())
        took_s = time.perf_counter() - begin
    return sum(part.length(at) for at in sample) / took_s if sample else float("inf")


@dataclass(frozen=True)
class _Part:
    """An open file to be packed, its size in bytes."""

    path: Path
    handle: int
    size: int

    def places(self) -> list[int]:
        with reading(self.path):
            return list(piece_places(self.handle, self.size))

    def length(self, at: int) -> int:
        return min(PIECE_BYTES, self.size - at)

    def read(self, at: int) -> bytes:
        with reading(self.path):
            piece = os.pread(self.handle, self.length(at), at)
        if len(piece) < self.length(at):
            raise HostError(f"cannot read {self.path}: it became shorter while it was packed")
        return piece


@contextmanager
def _open_part(path: Path) -> Iterator[_Part]:
    with reading(path):
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield _Part(path, handle, os.fstat(handle).st_size)
    finally:
        os.close(handle)


def _members(parts: Mapping[str, _Part], meter: Meter) -> Iterator[bytes]:
    for name, part in parts.items():
        for at in part.places():
            piece = part.read(at)
            if not is_zero(piece):
                yield _member(f"{name}/{at:016x}", piece)
            meter.advance(len(piece))
    yield bytes(2 * BLOCK)


def _member(name: str, data: bytes) -> bytes:
    header = tarfile.TarInfo(name)
    header.size, header.mode = len(data), 0o600
    return header.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % BLOCK)


def read_facts(path: Path) -> dict[str, object]:
    """Return the facts in the head of a bundle, without a look at the rest. Raises MachineError, HostError."""
    with open_sealed(path) as sealed:
        return _read_head(sealed).facts


def unpack(path: Path, folder: Path, meter: Meter) -> dict[str, object]:
    """Write each part of a bundle as a file of its name in a folder, and return the facts.

    None of the files may be there before, and they mean nothing unless this returns: the seal is met last. `meter`
    counts the bytes of all pieces. Raises MachineError for what is damaged or no bundle, HostError.
    """
    with open_sealed(path) as sealed, writing_in(folder), ExitStack() as stack:
        head = _read_head(sealed)
        sealed.check_seal()
        files = {name: stack.enter_context(create_sparse(folder / name, size)) for name, size in head.sizes.items()}
        for name, at, piece in _take_pieces(sealed, head.sizes):
            write_sparse(files[name], at, piece)
            meter.advance(len(piece))
        sealed.check_end()
    return head.facts


@dataclass(frozen=True)
class _Head:
    """The first member: facts, and the size of each part in bytes."""

    facts: dict[str, object]
    sizes: dict[str, int]


def _read_head(sealed: SealedReader) -> _Head:
    """Return the head of a bundle, once the checksum of its frame was met."""
    name, size = _member_of(sealed.take(BLOCK)) or ("", 0)
    if name != HEAD:
        raise foreign(sealed.path, f"its first member is not {HEAD}")
    if size > HEAD_BYTES:
        raise damaged(sealed.path, f"{HEAD} has {size} bytes")
    content = _take_content(sealed, size)
    sealed.check_frame()
    try:
        return _parse_head(sealed.path, json.loads(content))
    except (ValueError, RecursionError) as error:
        raise damaged(sealed.path, f"{HEAD} cannot be read: {error}") from error


def _parse_head(path: Path, head: object) -> _Head:
    match head:
        case {"format": int(number)} if number > FORMAT:
            raise MachineError(
                f"the bundle {path} was made by a newer vmbuild",
                details=f"it has format {number}, and this vmbuild reads format {FORMAT}",
                resolution="Update vmbuild on this host.",
            )
        case {"format": 1, "facts": dict(facts), "parts": dict(sizes)} if _are_sizes(sizes):
            return _Head(facts, sizes)
    raise damaged(path, f"{HEAD} does not say what has to be in it")


def _are_sizes(sizes: Mapping[str, object]) -> bool:
    return len(sizes) <= MOST_PARTS and all(
        _NAME.fullmatch(name) and isinstance(size, int) and 0 <= size <= PART_BYTES for name, size in sizes.items()
    )


def _take_pieces(sealed: SealedReader, sizes: Mapping[str, int]) -> Iterator[tuple[str, int, bytes]]:
    """Yield the part, place and content of each piece, up to the end of the tar stream."""
    free = dict.fromkeys(sizes, 0)
    while (block := sealed.take(BLOCK)) != bytes(BLOCK):
        name, size = _member_of(block) or ("", 0)
        match = _PLACE.fullmatch(name)
        part, at = (match["part"], int(match["at"], 16)) if match else ("", 0)
        whole = min(PIECE_BYTES, sizes.get(part, 0) - at)
        if at % PIECE_BYTES or at < free.get(part, 0) or size != whole or size == 0:
            raise damaged(sealed.path, f"there is no place for the piece {name!r} of {size} bytes")
        free[part] = at + PIECE_BYTES
        yield part, at, _take_content(sealed, size)
    if sealed.take(BLOCK) != bytes(BLOCK):
        raise damaged(sealed.path, "its tar stream does not end in two empty blocks")


def _member_of(block: bytes) -> tuple[str, int] | None:
    """Return the name and size of a plain file in a tar stream by its header, None when the header is another."""
    try:
        member = tarfile.TarInfo.frombuf(block, "ascii", "strict")
    except (tarfile.TarError, ValueError):
        return None
    return (member.name, member.size) if member.type == tarfile.REGTYPE and member.size >= 0 else None


def _take_content(sealed: SealedReader, size: int) -> bytes:
    content = sealed.take(size)
    sealed.take(-size % BLOCK)
    return content
