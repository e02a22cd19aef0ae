"""`images/*.toml` -> `ImageSpec`, `images/bases/*.toml` -> `BaseSpec`. The only reader of catalogue files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import platformdirs

from vmbuild.errors import GuestImageError, UsageError
from vmbuild.image import disk_row
from vmbuild.image.table import Table
from vmbuild.model import SYSTEMS, ApplianceSpec, Arch, DiskSpec, ImageSpec, Repository

MIRRORS = ("debian", "debian-security")
PACKAGE_NAME = re.compile(r"[a-z0-9][a-z0-9+.-]+")
"""Debian Policy 5.6.1."""


@dataclass(frozen=True)
class BaseSpec:
    """A row of `images/bases`: a Debian base image that is assembled where no registry can be reached.

    `essential` adds every package with `Essential: yes` or `Priority: required`. `exclude` are path prefixes left out
    of the tree, `keep` are shell patterns (fnmatch) of files that stay although a prefix would leave them out.
    """

    name: str
    repo_tag: str
    description: str
    repositories: tuple[Repository, ...]
    keyrings: tuple[Path, ...]
    packages: tuple[str, ...]
    essential: bool
    exclude: tuple[str, ...]
    keep: tuple[str, ...]


def find_catalog() -> Path:
    """Return the folder of the shipped catalogue: package data in an installed wheel, `images/` in a checkout.

    Raises GuestImageError when neither is there (a damaged installation).
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "images", package.parents[1] / "images"):
        if folder.is_dir():
            return folder
    raise GuestImageError(
        "the catalogue of guest images is missing",
        details=f"looked beside {package}",
        resolution="Install vmbuild again.",
    )


def find_folders(cache: Path | None = None) -> list[Path]:
    """Return the folders of rows, first those that win: the user's own, the shipped one, what was given by a place."""
    own = Path(platformdirs.user_config_dir("vmbuild")) / "images"
    return [own, find_catalog(), *([cache / "given"] if cache else [])]


def load_image(name: str, folders: Sequence[Path] | None = None) -> ImageSpec:
    """Return the guest image of this name from the first folder that has it; by default those of find_folders.

    Raises UsageError for a name that no folder has, GuestImageError for a file that is wrong.
    """
    files = _image_files(folders)
    if name not in files:
        raise UsageError(
            f"there is no guest image named {name!r}",
            resolution=f"Choose one of: {', '.join(sorted(files)) or 'none, the catalogue is empty'}. "
            f"A disk of your own is given with its path: ./{name}",
        )
    return _read_image(files[name])


def list_images(folders: Sequence[Path] | None = None) -> list[ImageSpec]:
    """Return every guest image by name. Raises GuestImageError for a file that is wrong."""
    return [_read_image(file) for _, file in sorted(_image_files(folders).items())]


def find_shadowed(spec: ImageSpec, folders: Sequence[Path] | None = None) -> list[Path]:
    """Return the files of other folders that a row hides, because it has the same name."""
    files = [folder / f"{spec.name}.toml" for folder in (find_folders() if folders is None else folders)]
    return [file for file in files if file.parent != spec.folder and file.is_file()]


def _image_files(folders: Sequence[Path] | None) -> dict[str, Path]:
    folders = find_folders() if folders is None else folders
    return {file.stem: file for folder in reversed(folders) for file in folder.glob("*.toml")}


def load_base(reference: str, folders: Sequence[Path] | None = None) -> BaseSpec:
    """Return the base image that `debian:trixie-slim`, `trixie-slim` or `docker.io/library/debian:trixie-slim` names.

    Raises UsageError for an unknown reference, GuestImageError for a file that is wrong.
    """
    bases = list_bases(folders)
    short = reference.removeprefix("docker.io/").removeprefix("library/")
    for base in bases:
        if short in (base.repo_tag, base.repo_tag.partition(":")[2], base.name):
            return base
    raise UsageError(
        f"vmbuild cannot assemble the base image {reference!r}",
        resolution=f"Choose one of: {', '.join(base.repo_tag for base in bases) or 'none'}.",
    )


def list_bases(folders: Sequence[Path] | None = None) -> list[BaseSpec]:
    """Return every base image by name. Raises GuestImageError for a file that is wrong."""
    folders = [find_catalog()] if folders is None else folders
    files = {file.stem: file for folder in reversed(folders) for file in folder.glob("bases/*.toml")}
    return [_read_base(file) for _, file in sorted(files.items())]


def _read_image(file: Path) -> ImageSpec:
    row = Table.read(file)
    read = READERS[row.choice("kind", READERS)]
    spec = read(file, row, row.table("boot"))
    row.end()
    return spec


def _read_appliance(file: Path, row: Table, boot: Table) -> ApplianceSpec:
    spec = ApplianceSpec(
        **_common(file, row, boot),
        repositories=_repositories(row),
        packages=row.texts("packages"),
        without=row.texts("without", default=()),
        exclude=row.texts("exclude", default=()),
        kernel=boot.text("kernel"),
        kernel_repositories=_repositories(boot) if boot.has("repositories") else (),
        modules=boot.texts("modules"),
        kernel_args=boot.texts("kernel_args"),
    )
    boot.end()
    return spec


class _Common(TypedDict):
    """What every kind of row has."""

    name: str
    arch: Arch
    description: str
    folder: Path
    guest_files: Path
    keyrings: tuple[Path, ...]
    machine_type: str
    cpu_model: str


def _common(file: Path, row: Table, boot: Table, *, is_signed: bool = True) -> _Common:
    return {
        "name": row.choice("name", [file.stem]),
        "arch": Arch(row.choice("arch", list(Arch))),
        "description": row.text("description"),
        "folder": file.parent,
        "guest_files": _beside(file.parent, "guest"),
        "keyrings": _keyrings(row, file.parent, None if is_signed else ()),
        "machine_type": boot.text("machine_type"),
        "cpu_model": boot.text("cpu_model"),
    }


def _read_disk(file: Path, row: Table, boot: Table) -> DiskSpec:
    verification = {key: row.maybe(key) for key in ("digest", "checksums", "signature")}
    spec = DiskSpec(
        **_common(file, row, boot, is_signed=False),
        url=disk_row.read_url(row, file.parent),
        **verification,
        system=row.choice("system", SYSTEMS),
        login=disk_row.read_login(row.table("login")) if row.has("login") else None,
    )
    boot.end()
    disk_row.check_verification(row, spec)
    return spec


READERS = {"appliance": _read_appliance, "disk": _read_disk}
"""How a row of each kind is read."""


def _read_base(file: Path) -> BaseSpec:
    row = Table.read(file)
    spec = BaseSpec(
        name=row.choice("name", [file.stem]),
        repo_tag=row.text("repo_tag"),
        description=row.text("description"),
        repositories=_repositories(row),
        keyrings=_keyrings(row, file.parent.parent),
        packages=row.texts("packages"),
        essential=row.flag("essential"),
        exclude=row.texts("exclude", default=()),
        keep=row.texts("keep", default=()),
    )
    row.end()
    return spec


def _repositories(row: Table) -> tuple[Repository, ...]:
    found = []
    for table in row.tables("repositories"):
        repository = Repository(
            suite=table.text("suite"),
            mirror=table.choice("mirror", MIRRORS),
            public_url=table.text("public_url"),
            components=table.texts("components", default=("main",)),
            optional=table.flag("optional"),
            alias=table.maybe("alias"),
            only=_only(table),
        )
        table.end()
        found.append(repository)
    return tuple(found)


def _only(table: Table) -> tuple[str, ...]:
    if not table.has("only"):
        return ()
    names = table.texts("only")
    wrong = [name for name in names if not PACKAGE_NAME.fullmatch(name)]
    if wrong or not names:
        raise table.wrong("only", f"is {wrong or []}, expected one or more names of packages")
    return names


def _keyrings(row: Table, folder: Path, default: tuple[str, ...] | None = None) -> tuple[Path, ...]:
    keyrings = tuple(_beside(folder, name) for name in row.texts("keyrings", default=default))
    for keyring in keyrings:
        if not keyring.is_file():
            raise row.wrong("keyrings", f"names {keyring}, which is not there")
    return keyrings


def _beside(folder: Path, name: str) -> Path:
    """Return a file of this catalogue folder, else the shipped one: a user's folder may hold nothing but TOML."""
    own = folder / name
    return own if own.exists() else find_catalog() / name
