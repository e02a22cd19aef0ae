"""Small disks for the tests, and rows that lead to them."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

from vmbuild.image.catalog import find_catalog
from vmbuild.model import Arch, ConsoleLogin, DiskSpec

SECTOR = 512


def raw_disk(size: int = 1024 * 1024, *, seed: int = 1) -> bytes:
    """Return a raw disk with the mark of a partition table, some data and a great hole."""
    data = random.Random(seed).randbytes(300_000)
    return bytes(SECTOR - 2) + b"\x55\xaa" + data + bytes(size - SECTOR - len(data))


def qcow2_disk(folder: Path, content: bytes | None = None, *options: str) -> bytes:
    """Return a qcow2 with this content."""
    folder.mkdir(parents=True, exist_ok=True)
    raw, made = folder / "raw", folder / "made.qcow2"
    raw.write_bytes(raw_disk() if content is None else content)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, str(raw), str(made)], check=True)
    return made.read_bytes()


def content_of(disk: Path, folder: Path) -> bytes:
    """Return what a guest reads from a qcow2."""
    raw = folder / "read-back"
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(disk), str(raw)], check=True)
    return raw.read_bytes()


def disk_spec(
    url: str,
    *,
    digest: str | None = None,
    checksums: str | None = None,
    signature: str | None = None,
    keyrings: tuple[Path, ...] = (),
    login: ConsoleLogin | None = None,
    name: str = "test",
) -> DiskSpec:
    """Return a row."""
    return DiskSpec(
        name=name,
        arch=Arch.ARM64,
        description="a test",
        folder=find_catalog(),
        guest_files=find_catalog() / "guest",
        keyrings=keyrings,
        machine_type="virt",
        cpu_model="cortex-a76",
        url=url,
        digest=digest,
        checksums=checksums,
        signature=signature,
        system="apt",
        login=login,
    )
