"""The cache of guest images: each lies there whole, verified and read-only, named by the digest of its manifest."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vmbuild.errors import GuestImageError, HostError
from vmbuild.image import cloud
from vmbuild.lock import hold
from vmbuild.model import ApplianceSpec, DiskBoot, DiskSpec, GuestImage, ImageSpec, KernelBoot, Repository
from vmbuild.report import Reporter
from vmbuild.whole import hash_file, write_whole

if TYPE_CHECKING:
    from vmbuild.image.packages import Package

RECIPE = 2
"""Raise it when `image.appliance` would make another guest image from the same packages and guest files."""

PARTS = {"appliance": ("kernel", "initrd", "root.squashfs"), "disk": ("disk.qcow2",)}
"""The files of a guest image, by the kind of its row."""


@dataclass(frozen=True)
class Check:
    """What re-hashing one guest image found; `problem` is empty when nothing is wrong."""

    name: str
    digest: str
    problem: str


def ensure(spec: ImageSpec, mirrors: Mapping[str, str], cache: Path, report: Reporter) -> GuestImage:
    """Return a guest image, assembling it first when the cache has none of this recipe.

    Of a disk, until one is published that has been made ready for machines, it is the disk as it was fetched. Safe when
    two ask at once. Raises GuestImageError or HostError; the cache then holds nothing half-written.
    """
    found = find(spec, cache)
    if found is not None:
        return found
    if isinstance(spec, DiskSpec):
        return _as_fetched(spec, cloud.ensure(spec, cache, report))
    with hold(cache / "images" / f"{spec.name}.lock", report, f"assembles {spec.name}"):
        return find(spec, cache) or _make(spec, mirrors, cache, report)


@contextmanager
def renewing(spec: ImageSpec, cache: Path, report: Reporter) -> Iterator[None]:
    """Have a guest image made anew in this block, of what is published today; when that fails the old one stays.

    A guest image of the disk that is still the one that is published stays as it is, and nothing is downloaded.
    """
    pointer = pointer_of(spec, cache)
    if isinstance(spec, DiskSpec):
        if _made_of(spec, cache) == cloud.ask_newest(spec):
            report.step(f"The disk of {spec.name} is the newest")
            yield
            return
        cloud.ensure(spec, cache, report, refresh=True)
    old = pointer.read_bytes() if pointer.exists() else None
    pointer.unlink(missing_ok=True)
    try:
        yield
    except BaseException:
        if old is not None:
            write_whole(pointer, old)
        raise


def _made_of(spec: DiskSpec, cache: Path) -> str | None:
    """Return the digest of the published disk that a row's guest image was made of."""
    found = find(spec, cache)
    if found is None:
        return None
    made_of = json.loads((cache / "images" / found.digest / "manifest.json").read_bytes()).get("source_digest")
    return made_of if isinstance(made_of, str) else None


def find(spec: ImageSpec, cache: Path) -> GuestImage | None:
    """Return the guest image that the cache holds for this row as it now is, None when there is none."""
    try:
        digest = pointer_of(spec, cache).read_text().strip()
        return _load(spec, cache, digest)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unusable(cache, error) from error


def find_digest(spec: ImageSpec, digest: str, cache: Path) -> GuestImage | None:
    """Return a row's guest image of this digest, though another may be current; None when the cache has it not."""
    try:
        return _load(spec, cache, digest)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unusable(cache, error) from error


def verify(cache: Path) -> list[Check]:
    """Hash every file of every guest image again and compare it with its manifest; likewise disks as fetched."""
    fetched = [
        Check(f"{found.name}, as fetched", found.sha256, "" if cloud.is_whole(found) else "the disk was changed")
        for found in cloud.list_disks(cache)
    ]
    return [_check(folder) for folder in sorted((cache / "images").glob("[!.]*/manifest.json"))] + fetched


def _check(manifest_path: Path) -> Check:
    digest = manifest_path.parent.name
    text = manifest_path.read_bytes()
    if hashlib.sha256(text).hexdigest() != digest:
        return Check("unknown", digest, "the manifest was changed")
    manifest = json.loads(text)
    problems = []
    for part, facts in manifest["files"].items():
        path = manifest_path.parent / part
        if not path.exists():
            problems.append(f"{part} is missing")
        elif hash_file(path) != facts["sha256"]:
            problems.append(f"{part} was changed")
    return Check(manifest["name"], digest, ", ".join(problems))


def recipe_digest(spec: ImageSpec) -> str:
    """Return a digest of all that decides what a row assembles to, but for the packages' versions."""
    facts = {key: str(value) for key, value in sorted(vars(spec).items()) if key not in ("folder", "guest_files")}
    facts["keyrings"] = " ".join(path.name for path in spec.keyrings)  # wherever vmbuild is installed
    digest = hashlib.sha256(json.dumps([RECIPE, facts], default=str).encode())
    for path in sorted(path for path in spec.guest_files.rglob("*") if path.is_file()):
        digest.update(path.relative_to(spec.guest_files).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _unusable(cache: Path, error: OSError) -> HostError:
    return HostError(
        f"cannot use the cache folder {cache}: {error.strerror}",
        resolution="Set VMBUILD_CACHE_DIR to a folder that you may write.",
    )


def pointer_of(spec: ImageSpec, cache: Path) -> Path:
    """Return the file that says which guest image is the current one of a row."""
    return cache / "images" / f"{spec.name}.{recipe_digest(spec)[:16]}"


def _load(spec: ImageSpec, cache: Path, digest: str) -> GuestImage:
    folder = cache / "images" / digest
    text = (folder / "manifest.json").read_bytes()
    if hashlib.sha256(text).hexdigest() != digest:
        raise _damaged(spec, folder, "its manifest was changed")
    manifest = json.loads(text)
    for part, facts in manifest["files"].items():
        if (folder / part).stat().st_size != facts["size"]:
            raise _damaged(spec, folder, f"{part} has another size")
    size = sum(facts["size"] for facts in manifest["files"].values())
    return GuestImage(spec.name, digest, spec.arch, spec.machine_type, spec.cpu_model, _boot(spec, folder), size)


def _boot(spec: ImageSpec, folder: Path) -> KernelBoot | DiskBoot:
    parts = [folder / part for part in PARTS[spec.kind]]
    if isinstance(spec, ApplianceSpec):
        kernel, initrd, root = parts
        return KernelBoot(kernel, initrd, root, spec.kernel_args)
    return DiskBoot(*parts)


def _damaged(spec: ImageSpec, folder: Path, what: str) -> GuestImageError:
    return GuestImageError(
        f"the guest image {spec.name} in the cache is damaged: {what}",
        resolution=f"Delete {folder} and run the command again.",
    )


def _as_fetched(spec: DiskSpec, found: cloud.Fetched) -> GuestImage:
    boot = DiskBoot(found.path)
    return GuestImage(spec.name, found.sha256, spec.arch, spec.machine_type, spec.cpu_model, boot, found.size_bytes)


def _make(spec: ImageSpec, mirrors: Mapping[str, str], cache: Path, report: Reporter) -> GuestImage:
    from vmbuild.image import appliance

    assert isinstance(spec, ApplianceSpec)  # noqa: S101 - the only kind that is assembled
    closure = fetch_packages(spec, mirrors, cache, report)
    with workspace(cache, spec.name) as folder:
        facts: dict[str, object] = dict(appliance.assemble(spec, closure, cache / "packages", folder, report))
        facts["packages"] = [{"name": p.name, "version": p.version, "sha256": p.sha256} for p in closure]
        return publish(spec, cache, folder, facts)


def fetch_packages(
    spec: ApplianceSpec, mirrors: Mapping[str, str], cache: Path, report: Reporter
) -> tuple[Package, ...]:
    """Resolve a row's packages and bring them all into the cache, verified."""
    from vmbuild.image import debian, fetch, packages

    report.step(f"Reading the package lists for {spec.name}")

    def resolve(repositories: Sequence[Repository], wanted: Sequence[str]) -> tuple[Package, ...]:
        indexes = debian.open_indexes(repositories, spec.arch, mirrors, spec.keyrings, cache / "indexes", report)
        return packages.resolve_closure(indexes, wanted, without=spec.without)

    if spec.kernel_repositories:
        closure = resolve(spec.repositories, spec.packages) + resolve(spec.kernel_repositories, [spec.kernel])
    else:
        closure = resolve(spec.repositories, [*spec.packages, spec.kernel])
    report.step(f"Downloading {len(closure)} packages")
    fetch.fetch_all(packages.package_downloads(closure, cache / "packages"), report, label="download")
    return closure


def publish(spec: ImageSpec, cache: Path, folder: Path, facts: Mapping[str, object]) -> GuestImage:
    """Give the files in a workspace their manifest and their name, and make them the row's guest image."""
    manifest = json.dumps(_manifest(spec, folder, facts), indent=1, sort_keys=True).encode()
    (folder / "manifest.json").write_bytes(manifest)
    digest = hashlib.sha256(manifest).hexdigest()
    _publish(folder, cache / "images" / digest)
    write_whole(pointer_of(spec, cache), digest.encode())
    return _load(spec, cache, digest)


def _manifest(spec: ImageSpec, folder: Path, facts: Mapping[str, object]) -> dict[str, object]:
    return {
        "name": spec.name,
        "arch": str(spec.arch),
        "recipe": recipe_digest(spec),
        **facts,
        "files": {
            part: {"sha256": hash_file(folder / part), "size": (folder / part).stat().st_size}
            for part in PARTS[spec.kind]
        },
    }


@contextmanager
def workspace(cache: Path, name: str) -> Iterator[Path]:
    """Yield an empty folder for assembling in; the lock is held, so older ones are an interrupted run's remains."""
    images = cache / "images"
    for remains in images.glob(f".{name}~*"):
        shutil.rmtree(remains)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{name}~", dir=images, ignore_cleanup_errors=True) as folder:
            yield Path(folder)
    except OSError as error:
        raise HostError(
            f"cannot write the guest image: {error.strerror}",
            details=str(error),
            resolution=f"Make room in {images} or set VMBUILD_CACHE_DIR to another folder.",
        ) from error


def _publish(folder: Path, target: Path) -> None:
    """Make the files read-only and durable, then give the folder its name in one step."""
    for path in folder.iterdir():
        path.chmod(0o444)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    folder.chmod(0o755)
    if target.exists():  # damaged, or we would not be here
        target.replace(folder.with_name(f"{folder.name}-damaged"))
    folder.replace(target)
