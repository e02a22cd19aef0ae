"""The file of a disk from elsewhere: unpacked, seen to be a disk that leads to no other file, made a qcow2."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import zstandard

from vmbuild import process
from vmbuild.errors import GuestImageError, HostError
from vmbuild.model import GIB, format_size

MAX_BYTES = 2048 * GIB
"""No disk is taken that claims to be larger: a few bytes can claim exabytes."""

BLOCK_BYTES = 64 * 1024
ZSTD_BYTES = 4 * 1024
"""So much is decompressed at once: it can become 128 MiB."""

QCOW2 = b"QFI\xfb"
FOREIGN = {
    b"KDMV": "VMDK",
    b"# Disk Descri": "VMDK",
    b"COWD": "VMDK",
    b"vhdxfile": "VHDX",
    b"conectix": "VHD",
    b"QED\0": "QED",
    b"<<< ": "VDI",
    b"PK\3\4": "ZIP",
    b"BZh": "bzip2",
    b"<!DOCTYPE": "HTML",
    b"<html": "HTML",
}
"""What begins like this is none of the formats taken, even where it would pass for raw bytes."""


@dataclass(frozen=True)
class Packing:
    """A compression: what a file begins with, and how it is read."""

    magic: bytes
    read: Callable[[IO[bytes]], Iterator[bytes]]


def _read_blocks(file: IO[bytes]) -> Iterator[bytes]:
    return iter(lambda: file.read(BLOCK_BYTES), b"")


def _read_zstd(file: IO[bytes]) -> Iterator[bytes]:
    """Yield what a zstd file holds. Raises EOFError when it ends too early, as the library's own reader does not."""
    frame = zstandard.ZstdDecompressor().decompressobj()
    while data := file.read(ZSTD_BYTES):
        while data:
            if frame.eof:
                frame = zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(data)
            data = frame.unused_data
    if not frame.eof:
        raise EOFError("the file ends in the middle")


PACKINGS = (
    Packing(b"\xfd7zXZ\0", lambda file: _read_blocks(lzma.open(file))),  # noqa: SIM115
    Packing(b"\x1f\x8b", lambda file: _read_blocks(gzip.open(file))),  # type: ignore[arg-type]  # noqa: SIM115
    Packing(b"\x28\xb5\x2f\xfd", _read_zstd),
)


def unpack(path: Path, target: Path) -> Path:
    """Return the disk of a file that may be compressed: the file itself, or `target`, which is then written.

    What is zero becomes a hole. Raises GuestImageError for a file that is damaged or never ends, OSError.
    """
    with path.open("rb") as file:
        start = file.read(16)
        packing = next((each for each in PACKINGS if start.startswith(each.magic)), None)
        if packing is None:
            return path
        file.seek(0)
        try:
            with target.open("wb") as out:
                _write_sparse(packing.read(file), out)
        except (lzma.LZMAError, EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
            raise GuestImageError(f"the disk {path.name} cannot be unpacked", details=str(error)) from error
    return target


def _write_sparse(pieces: Iterator[bytes], out: IO[bytes]) -> None:
    size = 0
    for data in pieces:
        size += len(data)
        if size > MAX_BYTES:
            raise GuestImageError(f"the disk is larger than {format_size(MAX_BYTES)} when it is unpacked")
        for at in range(0, len(data), BLOCK_BYTES):
            block = data[at : at + BLOCK_BYTES]
            if block.count(0) == len(block):
                out.seek(len(block), os.SEEK_CUR)
            else:
                out.write(block)
    out.truncate(size)


def check_disk(path: Path) -> str:
    """Return a disk's format, `qcow2` or `raw`; the file is not trusted.

    Raises GuestImageError for any other, and for a qcow2 that is encrypted or leads to another file of the host, which
    would end up in the guest. Source: QEMU, docs/interop/qcow2.txt, "Header".
    """
    with path.open("rb") as file:
        header = file.read(1024).ljust(1024, b"\0")
    if header.startswith(QCOW2):
        problem = _qcow2_problem(header)
        if problem:
            raise _refused(path, problem)
        return "qcow2"
    foreign = next((name for magic, name in FOREIGN.items() if header.startswith(magic)), None)
    if foreign is not None:
        raise _refused(path, f"it is {foreign}")
    if header[510:512] != b"\x55\xaa":  # every raw disk with partitions has it, GPT's too (UEFI, 5.2)
        raise _refused(path, "it is no qcow2, and has no partition table")
    return "raw"


def _qcow2_problem(header: bytes) -> str:
    """Return why a qcow2 is not taken, empty when it is. Facts of the header are big-endian."""
    version, encryption = (int.from_bytes(header[at : at + 4], "big") for at in (4, 32))
    backing, size, features = (int.from_bytes(header[at : at + 8], "big") for at in (8, 24, 72))
    for is_so, problem in (
        (version not in (2, 3), f"it is a qcow2 of version {version}"),
        (backing, "it has a backing file: only a part of the disk is in it"),
        (version == 3 and features & 4, "its data is in another file"),
        (encryption, "it is encrypted"),
        (not 0 < size <= MAX_BYTES, f"its size is {format_size(size)}"),
    ):
        if is_so:
            return problem
    return ""


def convert(path: Path, form: str, target: Path) -> None:
    """Write a checked disk as a qcow2 of its own. Raises GuestImageError, or HostError when the host's disk is full.

    A qcow2 that was cut short would be converted with zeros for what is missing: that it is whole is asked first.
    """
    facts = json.loads(_qemu_img(path, ["info", "-f", form, "--output=json", str(path)]))
    specific = facts.get("format-specific", {}).get("data", {})
    if "backing-filename" in facts or "data-file" in specific:  # what the header said, as QEMU reads it
        raise _refused(path, "it leads to another file")
    if form == "qcow2":
        _qemu_img(path, ["check", "-q", "-f", form, str(path)], expect=(0, 3))  # 3: leaked clusters, which harm nobody
    _qemu_img(path, ["convert", "-f", form, "-O", "qcow2", str(path), str(target)])


def _qemu_img(path: Path, argv: list[str], *, expect: Sequence[int] = (0,)) -> bytes:
    try:
        return process.run(["qemu-img", *argv], expect=expect)
    except process.CommandError as error:
        if "No space left" in error.output:
            raise HostError(
                f"the disk is full: cannot convert {path.name}",
                details=error.details,
                resolution="Make room, or set VMBUILD_CACHE_DIR to another folder, and run the command again.",
            ) from error
        raise GuestImageError(f"the disk {path.name} cannot be converted", details=error.details) from error


def _refused(path: Path, problem: str) -> GuestImageError:
    return GuestImageError(
        f"{path.name} is no disk that vmbuild takes: {problem}",
        resolution="Give a raw or qcow2 disk that is whole in itself, plain or compressed with xz, gzip or zstd. "
        "Of others, qemu-img makes one: qemu-img convert -O qcow2 FILE disk.qcow2",
    )
