"""A bootable disk from elsewhere -> a verified file on this host."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from vmbuild import process
from vmbuild.errors import GuestImageError
from vmbuild.model import DiskSpec
from vmbuild.report import Reporter
from vmbuild.whole import hash_file


def fetch_disk(spec: DiskSpec, cache: Path, report: Reporter) -> Path:  # noqa: ARG001
    """Return the verified disk of a row, a qcow2. Raises GuestImageError."""
    url = urlsplit(spec.url)
    path = Path(unquote(url.path))
    if url.scheme != "file" or spec.digest is None:
        raise GuestImageError(f"the disk {spec.url} cannot be downloaded yet")
    if f"sha256:{hash_file(path)}" != spec.digest:
        raise GuestImageError(f"the disk {path} is not the one that the catalogue means")
    disk = cache / "disks" / f"{spec.name}.qcow2"
    disk.parent.mkdir(parents=True, exist_ok=True)
    process.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(path), str(disk)])
    return disk
