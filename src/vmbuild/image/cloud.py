"""A bootable disk from elsewhere -> a verified qcow2 in the cache, fetched once and kept until it is pruned.

Each row has a folder among `disks`, named by what says where the disk is from: the download while it is coming in, the
disk, and `facts.json`, which is written last and says which disk is the current one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from vmbuild.address import is_protected, without_credentials
from vmbuild.errors import GuestImageError, HostError, UsageError
from vmbuild.image import disk
from vmbuild.image.checksums import find_digest
from vmbuild.image.fetch import (
    NETWORK_ADVICE,
    Download,
    NotFound,
    Unreachable,
    WrongDigest,
    ask_size,
    fetch_all,
    fetch_bytes,
)
from vmbuild.image.signature import BadSignature, check_detached, read_signed
from vmbuild.lock import hold
from vmbuild.model import MIB, DiskSpec, format_size
from vmbuild.report import Reporter
from vmbuild.whole import hash_file, write_whole, writing_in

RETRY_PAUSE_S = 5.0
"""Wait before checksums are read again that do not fit: the server is being updated."""

MAX_CHECKSUMS_BYTES = 4 * MIB


@dataclass(frozen=True)
class Fetched:
    """A disk in the cache. `source_digest` is of the file as it was published, `sha256` that of the qcow2."""

    name: str
    path: Path
    source: str
    source_digest: str
    sha256: str
    size_bytes: int


def ensure(spec: DiskSpec, cache: Path, report: Reporter, *, refresh: bool = False) -> Fetched:
    """Return the disk of a row, fetched first when the cache has it not, or with `refresh` not the one of today.

    Safe when two ask at once. Raises GuestImageError or HostError; an interrupted download is resumed by the next call.
    """
    found = find(spec, cache)
    if found is not None and not refresh:
        return found
    folder = folder_of(spec, cache)
    with hold(lock_of(folder), report, f"fetches {spec.name}"), writing_in(folder), _advice(spec):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        now = find(spec, cache)
        if now is not None and (not refresh or now != found):  # another has brought it while we waited
            return now
        return _bring(spec, folder, now, report)


def ask_newest(spec: DiskSpec) -> str:
    """Return the digest of the disk that is published today, which is not fetched. Raises what `ensure` raises."""
    with _advice(spec):
        return _hash_local(spec) if spec.url.startswith("file:") else _read_digest(spec)


def find(spec: DiskSpec, cache: Path) -> Fetched | None:
    """Return the disk of a row if the cache has it; the network is not asked."""
    return load(folder_of(spec, cache))


def folder_of(spec: DiskSpec, cache: Path) -> Path:
    """Return the folder of a row's disk."""
    facts = [spec.url, spec.digest, spec.checksums, spec.signature, *(hash_file(path) for path in spec.keyrings)]
    return cache / "disks" / f"{spec.name}.{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}"


def lock_of(folder: Path) -> Path:
    """Return the file that who changes a disk's folder holds; it stays when the folder goes."""
    return folder.with_name(f"{folder.name}.lock")


def is_whole(found: Fetched) -> bool:
    """Hash a disk again; tell whether it is what it was."""
    return found.path.exists() and hash_file(found.path) == found.sha256


def list_disks(cache: Path) -> list[Fetched]:
    """Return every disk in the cache."""
    return [found for folder in sorted((cache / "disks").glob("[!.]*/")) if (found := load(folder)) is not None]


def load(folder: Path) -> Fetched | None:
    """Return the disk of a folder, None when there is no whole one."""
    try:
        facts = json.loads((folder / "facts.json").read_bytes())
        found = Fetched(**{**facts, "path": folder / facts["path"]})
        return found if found.path.stat().st_size == found.size_bytes else None
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None  # an interrupted run's, or damaged: it is fetched again


def _bring(spec: DiskSpec, folder: Path, now: Fetched | None, report: Reporter) -> Fetched:
    if spec.url.startswith("file:"):
        return _take_local(spec, folder, now)
    wanted = _read_digest(spec)
    if now is not None and now.source_digest == wanted:
        report.step(f"The disk of {spec.name} is the newest")
        return now
    try:
        download = _download(spec, wanted, folder, report)
    except (WrongDigest, NotFound):
        again = _read_digest_later(spec, report)
        if again == wanted:
            raise
        wanted, download = again, _download(spec, again, folder, report)
    report.step("Converting the disk")
    made = _make(spec, download, wanted, folder)
    for left in folder.glob("download-*"):
        left.unlink()
    return made


def _take_local(spec: DiskSpec, folder: Path, now: Fetched | None) -> Fetched:
    """Convert a disk of this host, which nobody else needs to vouch for. Raises UsageError when it is not there."""
    path = _local_path(spec)
    before = path.stat()
    actual = _hash_local(spec)
    if now is not None and now.source_digest == actual:
        return now
    made = _make(spec, path, actual, folder)
    after = path.stat()
    if (before.st_mtime_ns, before.st_size) != (after.st_mtime_ns, after.st_size):
        (folder / "facts.json").unlink()
        raise GuestImageError(f"{path} was changed while it was read", resolution="End what writes it first.")
    return made


def _local_path(spec: DiskSpec) -> Path:
    path = Path(unquote(urlsplit(spec.url).path))
    if not path.is_file() or not os.access(path, os.R_OK):
        raise UsageError(f"there is no disk {path} that can be read")
    return path


def _hash_local(spec: DiskSpec) -> str:
    """Return the digest of a disk of this host. Raises WrongDigest when the row gives another."""
    path = _local_path(spec)
    algorithm = (spec.digest or "sha256:").partition(":")[0]
    actual = f"{algorithm}:{hash_file(path, algorithm)}"
    if spec.digest not in (None, actual):
        raise WrongDigest(f"{path} is not the disk that the catalogue means", details=f"its digest is {actual}")
    return actual


def _read_digest(spec: DiskSpec) -> str:
    """Return the digest that the row gives, or that its checksums do, their signature verified."""
    if spec.digest is not None:
        return spec.digest
    assert spec.checksums is not None  # noqa: S101 - the catalogue takes no row with neither
    protected = spec.signature is None and is_protected(spec.checksums)
    content = fetch_bytes(spec.checksums, limit_bytes=MAX_CHECKSUMS_BYTES, only_tls=protected)
    if spec.signature == spec.checksums:
        content = read_signed(content, spec.keyrings, spec.checksums)
    elif spec.signature is not None:
        check_detached(content, fetch_bytes(spec.signature, limit_bytes=MIB), spec.keyrings, spec.checksums)
    return find_digest(content.decode(errors="replace"), file_name(spec.url), spec.checksums)


def _read_digest_later(spec: DiskSpec, report: Reporter) -> str:
    if spec.checksums is not None:
        report.step(f"Disk and checksums of {spec.name} are out of step, asking again in {RETRY_PAUSE_S:.0f} s")
        time.sleep(RETRY_PAUSE_S)
    return _read_digest(spec)


def file_name(url: str) -> str:
    """Return the name of the file that a URL leads to."""
    return unquote(urlsplit(url).path).rpartition("/")[2]


def _download(spec: DiskSpec, wanted: str, folder: Path, report: Reporter) -> Path:
    algorithm, _, digest = wanted.partition(":")
    path = folder / f"download-{digest[:16]}"
    for left in folder.glob("download-*"):
        if not left.name.startswith(path.name):  # of a disk that is no longer the one of today
            left.unlink()
    size = ask_size(spec.url)
    _check_room(path, size)
    report.step(f"Downloading {file_name(spec.url)}")
    fetch_all([Download(spec.url, path, digest, size, algorithm)], report, label="download", workers=1)
    return path


def _check_room(path: Path, size: int | None) -> None:
    part = path.with_name(f"{path.name}.part")
    there = part.stat().st_size if part.exists() else 0
    free = shutil.disk_usage(path.parent).free
    if size is not None and not path.exists() and size - there > free:
        raise HostError(
            f"the disk is full: {format_size(size - there)} are to be downloaded, {format_size(free)} are free",
            resolution=f"Make room in {path.parent}, or set VMBUILD_CACHE_DIR to another folder.",
        )


def _make(spec: DiskSpec, path: Path, source_digest: str, folder: Path) -> Fetched:
    """Check and convert a verified file, and make the result the row's disk. What an interrupted run left goes."""
    for remains in folder.glob(".convert~*"):
        shutil.rmtree(remains)
    with tempfile.TemporaryDirectory(prefix=".convert~", dir=folder) as work:
        plain = disk.unpack(path, Path(work) / "unpacked")
        target = Path(work) / "disk.qcow2"
        disk.convert(plain, disk.check_disk(plain), target)
        with target.open("rb") as file:
            os.fsync(file.fileno())
        target.chmod(0o444)
        sha256, size = hash_file(target), target.stat().st_size
        name = f"{sha256[:16]}.qcow2"
        made = Fetched(spec.name, folder / name, without_credentials(spec.url), source_digest, sha256, size)
        target.replace(made.path)
    write_whole(folder / "facts.json", json.dumps({**asdict(made), "path": name}, indent=1).encode())
    for outdated in folder.glob("*.qcow2"):
        if outdated.name != name:
            outdated.unlink()
    return made


@contextmanager
def _advice(spec: DiskSpec) -> Iterator[None]:
    """Say what to do about a disk: the advice of who fetches packages is of Debian's mirrors."""
    try:
        yield
    except NotFound as error:
        error.resolution = f"The publisher may have moved it: correct the row {spec.name}, or give another one."
        raise
    except Unreachable as error:
        error.resolution = NETWORK_ADVICE
        raise
    except (WrongDigest, BadSignature) as error:
        if spec.url.startswith("file:"):
            error.resolution = f"The file was changed: bring it back, or correct `digest` in the row {spec.name}."
            raise
        error.resolution = (
            "Nothing of it is used. The server may be in the middle of an update: run the command again "
            "in some minutes. If it stays so, a proxy or somebody else has altered the file."
        )
        raise
