"""The cache of snapshots: the memory of a guest that has booted and belongs to nobody yet, one for each shape.

A shape is everything that must match: QEMU's binary and argv, the guest image, CPUs and memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from cryptography.hazmat.primitives.poly1305 import Poly1305

from vmbuild.lock import is_free
from vmbuild.machine.argv import neutral_argv
from vmbuild.machine.files import MachineFiles
from vmbuild.machine.probe import Qemu
from vmbuild.machine.sparse import is_zero, piece_places
from vmbuild.model import KIB, Freed, MachineSpec
from vmbuild.whole import write_whole, writing_in

TRY_AGAIN_S = 24 * 3600.0

DIGEST_BYTES = 128 * KIB
"""What is read at once for a digest. Memory lies in many small runs: of larger pieces much would be holes."""

KEY_BYTES = 32

FORMAT = 3
"""Raised when what a parked guest expects of the host changes, or how its digest is made."""


@dataclass(frozen=True)
class Snapshot:
    """A snapshot in the cache. Sizes in their units, `size_bytes` as it lies on disk, time in POSIX seconds."""

    key: str
    image: str
    image_digest: str
    cpus: int
    memory_mib: int
    qemu: str
    digest: str
    size_bytes: int
    created_at: float
    folder: Path

    @property
    def ram(self) -> Path:
        """The saved memory and devices."""
        return self.folder / "ram"


def shape_key(spec: MachineSpec, qemu: Qemu) -> str:
    """Return what names the shape of a machine, whatever its name, disk and place in the file system."""
    facts = Path(qemu.binary).stat()
    binary = [qemu.binary, facts.st_size, facts.st_mtime_ns, qemu.aio, qemu.sandbox]
    shape = [FORMAT, binary, spec.image.digest, neutral_argv(spec, qemu)]
    return hashlib.sha256(json.dumps(shape).encode()).hexdigest()[:32]


def find(cache: Path, key: str) -> Snapshot | None:
    """Return the snapshot of a shape, None when there is none."""
    return _load(cache / "snapshots" / key)


def list_snapshots(cache: Path) -> list[Snapshot]:
    """Return every snapshot in the cache, oldest first."""
    found = [_load(path.parent) for path in (cache / "snapshots").glob("[!.]*/snapshot.json")]
    return sorted((each for each in found if each is not None), key=lambda each: each.created_at)


def _load(folder: Path) -> Snapshot | None:
    try:
        facts = json.loads((folder / "snapshot.json").read_text())
        snapshot = Snapshot(**facts, folder=folder)
        return snapshot if snapshot.ram.exists() else None
    except (OSError, ValueError, TypeError):
        return None


def remains(cache: Path, key: str) -> list[MachineFiles]:
    """Return the machines, perhaps still running, of earlier attempts at a snapshot that were killed."""
    return [MachineFiles(folder) for folder in (cache / "snapshots").glob(f".{key}~*")]


def abandoned(cache: Path) -> list[MachineFiles]:
    """Return such remains of every shape that nobody makes a snapshot of now."""
    folder = cache / "snapshots"
    keys = {path.name[1:].partition("~")[0] for path in folder.glob(".*~*")}
    return [left for key in sorted(keys) if is_free(lock_file(cache, key)) for left in remains(cache, key)]


def lock_file(cache: Path, key: str) -> Path:
    """Return the lock that who makes a snapshot holds."""
    return cache / "snapshots" / f".{key}.lock"


@contextmanager
def making(cache: Path, key: str) -> Iterator[MachineFiles]:
    """Yield the files of a machine whose memory is to be saved; all of them are gone at the end."""
    folder = cache / "snapshots"
    with ExitStack() as stack:
        with writing_in(folder):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for left in remains(cache, key):
                shutil.rmtree(left.folder)
            place = tempfile.TemporaryDirectory(prefix=f".{key}~", dir=folder, ignore_cleanup_errors=True)
            made = stack.enter_context(place)
        yield MachineFiles(Path(made))


def publish(cache: Path, key: str, spec: MachineSpec, qemu: Qemu, ram: Path) -> Snapshot:
    """Give a saved memory its place in the cache, in one step. Raises HostError."""
    folder = ram.parent / "whole"
    with writing_in(ram.parent):
        folder.mkdir(mode=0o700)
        ram.replace(folder / "ram")
    target = cache / "snapshots" / key
    snapshot = Snapshot(
        key=key,
        image=spec.image.name,
        image_digest=spec.image.digest,
        cpus=spec.cpus,
        memory_mib=spec.memory_mib,
        qemu=qemu.binary,
        digest=sparse_digest(folder / "ram"),
        size_bytes=(folder / "ram").stat().st_blocks * 512,
        created_at=time.time(),
        folder=target,
    )
    facts = {name: value for name, value in asdict(snapshot).items() if name != "folder"}
    write_whole(folder / "snapshot.json", json.dumps(facts).encode(), mode=0o600)
    shutil.rmtree(target, ignore_errors=True)
    with writing_in(target.parent):
        folder.replace(target)
    return snapshot


def remove(snapshot: Snapshot) -> None:
    """Delete a snapshot; a reader that has it open keeps it, and one that took its place since then stays."""
    now = _load(snapshot.folder)
    if now is None or now.digest == snapshot.digest:
        shutil.rmtree(snapshot.folder, ignore_errors=True)
    _note(snapshot.folder).unlink(missing_ok=True)


def may_try(cache: Path, key: str) -> bool:
    """Tell whether a snapshot should be made in the background, and remember that it was tried: once a day will do."""
    note = _note(cache / "snapshots" / key)
    with suppress(OSError):
        if time.time() - note.stat().st_mtime < TRY_AGAIN_S:
            return False
    note.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    note.touch()
    return True


def _note(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.tried")


def prune(cache: Path, is_wanted: Callable[[Snapshot], bool]) -> list[Freed]:
    """Delete the snapshots that are not wanted, and what looks like one and cannot be read."""
    freed = []
    for folder in sorted((cache / "snapshots").glob("[!.]*/")):
        found = _load(folder)
        if found is None or not is_wanted(found):
            size = sum(path.lstat().st_blocks * 512 for path in folder.iterdir())
            shutil.rmtree(folder, ignore_errors=True)
            _note(folder).unlink(missing_ok=True)
            name = f"{found.image}, {found.cpus} CPUs, {found.memory_mib} MiB" if found else folder.name
            freed.append(Freed("snapshot", name, size))
    return freed


def is_whole(snapshot: Snapshot) -> bool:
    """Tell whether a snapshot is what it was when it was made."""
    try:
        return is_unchanged(snapshot.ram, snapshot.digest)
    except OSError:
        return False


def is_unchanged(path: Path, digest: str) -> bool:
    """Tell whether a sparse file still has this digest. Raises OSError."""
    try:
        return sparse_digest(path, bytes.fromhex(digest)[:KEY_BYTES]) == digest
    except ValueError:
        return False


def sparse_digest(path: Path, key: bytes | None = None) -> str:
    """Return a key, made here if none is given, and under it the checksum of a sparse file, in hexadecimal.

    It is of the pieces that are not all zero, each with its place: the same whether a copy has kept the holes or not,
    and as quick as there is little in the file. It tells damage, not malice: who may change the file may change what
    the digest is kept in. Source: RFC 8439, Poly1305, which takes a seventh of SHA-256's time.
    """
    key = os.urandom(KEY_BYTES) if key is None else key
    checksum = Poly1305(key)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        checksum.update(size.to_bytes(8, "little"))
        for at in piece_places(file.fileno(), size, DIGEST_BYTES):
            piece = os.pread(file.fileno(), DIGEST_BYTES, at)
            if not is_zero(piece):
                checksum.update(at.to_bytes(8, "little"))
                checksum.update(piece)
    return (key + checksum.finalize()).hex()
