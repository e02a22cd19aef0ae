"""The file of a disk from elsewhere: unpacked, seen to be a disk that leads to no other file, made a qcow2."""

from __future__ import annotations

import gzip
import json
import lzma
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import zstandard

from vmbuild import process
from vmbuild.errors import GuestImageError, HostError
from vmbuild.model import GIB, format_size

MAX_BYTES = 2048 * GIB
"""No disk is taken that claims to be larger: a few bytes can claim exabytes."""

BLOCK_BYTES = 64 * 1024

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
    open: Callable[[IO[bytes]], AbstractContextManager[Any]]


PACKINGS = (
    Packing(b"\xfd7zXZ\0", lzma.LZMAFile),
    Packing(b"\x1f\x8b", lambda file: gzip.GzipFile(fileobj=file)),
    Packing(b"\x28\xb5\x2f\xfd", lambda f: zstandard.ZstdDecompressor().stream_reader(f, read_across_frames=True)),
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
            with packing.open(file) as source, target.open("wb") as out:
                _copy_sparse(source, out)
        except (lzma.LZMAError, EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
            raise GuestImageError(f"the disk {path.name} cannot be unpacked", details=str(error)) from error
    return target


def _copy_sparse(source: IO[bytes], out: IO[bytes]) -> None:
    zeros, size = bytes(BLOCK_BYTES), 0
    while data := source.read(BLOCK_BYTES):
        size += len(data)
        if size > MAX_BYTES:
            raise GuestImageError(f"the disk is larger than {format_size(MAX_BYTES)} when it is unpacked")
        if data == zeros[: len(data)]:
            out.seek(len(data), 1)
        else:
            out.write(data)
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
    """Write a checked disk as a qcow2 of its own. Raises GuestImageError, or HostError when the host's disk is full."""
    facts = json.loads(_qemu_img(path, ["info", "-f", form, "--output=json", str(path)]))
    specific = facts.get("format-specific", {}).get("data", {})
    if "backing-filename" in facts or "data-file" in specific:  # what the header said, as QEMU reads it
        raise _refused(path, "it leads to another file")
    _qemu_img(path, ["convert", "-f", form, "-O", "qcow2", str(path), str(target)])


def _qemu_img(path: Path, argv: list[str]) -> bytes:
    try:
        return process.run(["qemu-img", *argv])
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
