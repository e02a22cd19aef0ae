"""What is in the cache, put there and taken away: guest images, their snapshots, and downloads."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from vmbuild import process, settle
from vmbuild.address import without_credentials
from vmbuild.deadline import Deadline
from vmbuild.errors import GuestImageError, HostError, UsageError
from vmbuild.image import catalog, cloud, given, store
from vmbuild.image import prune as pruning
from vmbuild.lock import hold
from vmbuild.machine import control, lifetime, snapshot
from vmbuild.machine.facts import load_facts
from vmbuild.machine.files import MachineFiles
from vmbuild.machine.probe import probe_for
from vmbuild.model import (
    ApplianceSpec,
    DiskSpec,
    Freed,
    GuestImage,
    Home,
    ImageSpec,
    KernelBoot,
    MachineRequest,
    MachineSpec,
)
from vmbuild.reach import wait_ready, write_seed
from vmbuild.report import Reporter
from vmbuild.start import Shape, shape_of

PARK_S = 120.0
SAVE_S = 300.0

PATIENCE = 12
"""So many times as long each part may take in the background, where it has only what the others leave of the CPUs."""


@dataclass(frozen=True)
class ImageRow:
    """A guest image of the catalogue; digest and size only where it is in the cache.

    `source` is where it is from, `verified` how that is known to be right; `fetched_digest` and `fetched_bytes` are of
    a disk as it was downloaded. `origin` is the row's file, `hides` are files that would have a row of this name too.
    """

    name: str
    kind: str
    arch: str
    description: str
    digest: str | None
    size_bytes: int | None
    source: str
    verified: str
    fetched_digest: str | None
    fetched_bytes: int | None
    origin: Path
    hides: tuple[Path, ...]


def list_snapshots(home: Home) -> list[snapshot.Snapshot]:
    """Return every snapshot in the cache."""
    return snapshot.list_snapshots(home.cache)


def make_snapshot(
    request: MachineRequest, home: Home, report: Reporter, *, in_background: bool = False
) -> snapshot.Snapshot:
    """Boot a guest that belongs to nobody and save its memory, for machines of this shape to start from.

    `in_background` leaves the host's CPUs to others. Raises UsageError where the host runs guests on its own CPU.
    """
    if in_background:
        process.give_way(os.getpid())
    patience = PATIENCE if in_background else 1
    request = settle.fit(replace(request, snapshots=True), settle.choose_image(request, home.cache).arch)
    shape = shape_of("snapshot", request, home, report)
    if shape.key is None:
        if not isinstance(shape.spec.image.boot, KernelBoot):
            raise UsageError(f"the guest image {shape.spec.image.name} is a disk, of which no snapshot can be made")
        raise UsageError("snapshots serve machines that QEMU emulates; this host runs them on its own CPU")
    with hold(snapshot.lock_file(home.cache, shape.key), report, "makes this snapshot"):
        return snapshot.find(home.cache, shape.key) or _boot_and_save(shape, shape.key, request, home, report, patience)


def _boot_and_save(
    shape: Shape, key: str, request: MachineRequest, home: Home, report: Reporter, patience: int
) -> snapshot.Snapshot:
    for left in snapshot.remains(home.cache, key):  # we hold the lock: nobody waits for these
        lifetime.stop(left, Deadline.after(0))
    with snapshot.making(home.cache, key) as files:
        lifetime.prepare(shape.spec, files, explicit_disk=False)
        write_seed(files, "vmbuild", {})
        report.step("Booting the guest")
        lifetime.start(shape.spec, files, shape.qemu)
        try:
            _give_way_too(files)
            wait_ready(files, Deadline.after(patience * request.timeout_s), report).close()
            control.send(files, "park")
            control.wait_for(files, "parked", Deadline.after(patience * PARK_S))
            report.step("Saving its memory")
            lifetime.save(files, files.folder / "ram", Deadline.after(patience * SAVE_S))
        finally:
            lifetime.stop(files, Deadline.after(0))
        return snapshot.publish(home.cache, key, shape.spec, shape.qemu, files.folder / "ram")


def _give_way_too(files: MachineFiles) -> None:
    """Give QEMU, which has a session of its own, the priority of this process."""
    pid = lifetime.status(files).pid
    if pid is not None and os.nice(0) > 0:
        process.give_way(pid)


def list_images(home: Home) -> list[ImageRow]:
    """Return every guest image of the catalogue, and what of it is in the cache."""
    folders = catalog.find_folders(home.cache)
    return [_row_of(spec, home, folders) for spec in catalog.list_images(folders)]


def _row_of(spec: ImageSpec, home: Home, folders: list[Path]) -> ImageRow:
    found = store.find(spec, home.cache)
    fetched = cloud.find(spec, home.cache) if isinstance(spec, DiskSpec) else None
    return ImageRow(
        name=spec.name,
        kind=spec.kind,
        arch=str(spec.arch),
        description=spec.description,
        digest=found.digest if found else None,
        size_bytes=found.size_bytes if found else None,
        source=_source_of(spec),
        verified=_how_verified(spec),
        fetched_digest=fetched.source_digest if fetched else None,
        fetched_bytes=fetched.size_bytes if fetched else None,
        origin=spec.folder / f"{spec.name}.toml",
        hides=tuple(catalog.find_shadowed(spec, folders)),
    )


def _source_of(spec: ImageSpec) -> str:
    if isinstance(spec, ApplianceSpec):
        return "packages: " + ", ".join(sorted({each.public_url for each in spec.repositories}))
    assert isinstance(spec, DiskSpec)  # noqa: S101 - there are two kinds
    return without_credentials(spec.url)


def _how_verified(spec: ImageSpec) -> str:
    if isinstance(spec, DiskSpec) and spec.digest is not None:
        return "given digest"
    if isinstance(spec, DiskSpec) and spec.checksums is None:
        return "not: a file of this host"
    if isinstance(spec, DiskSpec) and spec.signature is None:
        return f"checksum over {(spec.checksums or '').partition(':')[0]}"
    first, *more = (path.stem for path in spec.keyrings)
    return f"signed by {first}" + (f" and {len(more)} more" if more else "")


def verify_images(home: Home) -> list[store.Check]:
    """Hash every cached guest image again."""
    return store.verify(home.cache)


def prune(home: Home, report: Reporter, *, everything: bool) -> list[Freed]:
    """Delete from the cache what no machine would start from any more; with `everything`, all that none still needs."""
    needed = _needed_images(home)
    specs = catalog.list_images(catalog.find_folders(home.cache))
    specs = [spec for spec in specs if not _forget_given(spec, home, needed, everything=everything)]
    freed = pruning.prune(specs, home.cache, report, everything=everything, needed=needed)
    for left in snapshot.abandoned(home.cache):
        lifetime.stop(left, Deadline.after(0))
        shutil.rmtree(left.folder, ignore_errors=True)
    images = list(filter(None, (_find_whole(spec, home) for spec in specs)))
    return freed + snapshot.prune(home.cache, lambda kept: not everything and _is_current(kept, images, home))


def _forget_given(spec: ImageSpec, home: Home, needed: Mapping[str, str], *, everything: bool) -> bool:
    """Delete a row that was made of a place, when that has another disk by now; tell whether it is gone."""
    if spec.folder != home.cache / "given" or not (everything or given.is_outdated(spec, home.cache)):
        return False
    found = _find_whole(spec, home)
    if found is not None and found.digest in needed:
        return False
    (spec.folder / f"{spec.name}.toml").unlink()
    return True


def _needed_images(home: Home) -> dict[str, str]:
    """Return the digests of the guest images that a machine runs on, or can only go on with, and which one it is."""
    needed = {}
    for files in lifetime.find_machines(home.state):
        facts = load_facts(files)
        if facts is not None and (files.suspension.exists() or lifetime.find_pid(files) is not None):
            needed[facts.image_digest] = f"the machine {files.name}"
    return needed


def _find_whole(spec: ImageSpec, home: Home) -> GuestImage | None:
    try:
        return store.find(spec, home.cache)
    except GuestImageError:  # damaged: nothing starts from it
        return None


def _is_current(kept: snapshot.Snapshot, images: list[GuestImage], home: Home) -> bool:
    """Tell whether a machine of a snapshot's shape would start from it, with today's QEMU and guest image."""
    for image in images:
        if image.digest == kept.image_digest:
            spec = MachineSpec("", kept.cpus, kept.memory_mib, 0, image)
            with suppress(HostError):
                return snapshot.shape_key(spec, probe_for(image, home.cache)) == kept.key
    return False
