"""Take out of the cache what no row of the catalogue leads to any more, and what was only needed on the way."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from vmbuild.errors import GuestImageError
from vmbuild.image import cloud, store
from vmbuild.lock import hold
from vmbuild.model import DiskSpec, Freed, ImageSpec
from vmbuild.report import Reporter


def prune(
    specs: Sequence[ImageSpec], cache: Path, report: Reporter, *, everything: bool, needed: Mapping[str, str]
) -> list[Freed]:
    """Delete the guest images that no row of the catalogue leads to any more, and the packages they were made of.

    With `everything`, all guest images and base images. `needed` are the digests of those that stay nevertheless, each
    with who needs it.
    """
    images = cache / "images"
    with ExitStack() as locks:
        for spec in specs:
            locks.enter_context(hold(images / f"{spec.name}.lock", report, f"assembles {spec.name}"))
        current = set() if everything else {store.pointer_of(spec, cache) for spec in specs}
        wanted = {pointer.read_text().strip() for pointer in current if pointer.exists()}
        doomed = [folder for folder in sorted(images.glob("*/")) if folder.name not in wanted]
        freed = [_free("guest image", folder) for folder in doomed if not _is_needed(folder.name, needed, report)]
        for pointer in images.glob("*.*"):
            is_old = pointer.is_file() and pointer.suffix != ".lock" and pointer not in current
            if is_old and pointer.read_text(errors="replace").strip() not in needed:
                pointer.unlink()
        freed += _prune_disks([] if everything else specs, cache, report, needed)
    downloads = ("packages", "indexes", "bases") if everything else ("packages", "indexes")
    return freed + [_free("downloads", cache / name) for name in downloads if (cache / name).exists()]


def _prune_disks(specs: Sequence[ImageSpec], cache: Path, report: Reporter, needed: Mapping[str, str]) -> list[Freed]:
    """Delete disks as they were fetched, but for those that are still to be made a guest image of; and all downloads.

    A disk that was made ready for machines is a guest image of its own: then this one is a mere download.
    """
    kept = {cloud.folder_of(spec, cache) for spec in specs if isinstance(spec, DiskSpec) and not _is_made(spec, cache)}
    freed = []
    for folder in sorted((cache / "disks").glob("[!.]*/")):
        with hold(cloud.lock_of(folder), report, "fetches a disk"):
            found = cloud.load(folder)
            if folder in kept or (found is not None and _is_needed(found.sha256, needed, report)):
                freed += _free_downloads(folder)
            else:
                freed.append(_free("disk" if found else "downloads", folder))
    return freed


def _is_made(spec: ImageSpec, cache: Path) -> bool:
    try:
        return store.find(spec, cache) is not None
    except GuestImageError:  # damaged
        return False


def _free_downloads(folder: Path) -> list[Freed]:
    """Delete what is left of downloads that were interrupted."""
    parts = [path for path in folder.iterdir() if path.name.startswith(("download-", ".convert~"))]
    if not parts:
        return []
    doomed = folder / ".doomed"
    doomed.mkdir()
    for part in parts:
        part.replace(doomed / part.name)
    return [_free("downloads", doomed, name=folder.name)]


def _is_needed(digest: str, needed: Mapping[str, str], report: Reporter) -> bool:
    if digest in needed:
        report.step(f"Keeping the guest image {digest[:12]}: {needed[digest]} needs it")
    return digest in needed


def _free(what: str, folder: Path, *, name: str = "") -> Freed:
    doomed = folder.with_name(f".{folder.name.lstrip('.')}~pruned")  # what others begin now, they begin afresh
    folder.replace(doomed)
    size = sum(path.lstat().st_blocks * 512 for path in doomed.rglob("*"))
    shutil.rmtree(doomed, ignore_errors=True)
    return Freed(what, name or folder.name, size)
