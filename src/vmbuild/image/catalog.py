"""`images/*.toml` -> `ImageSpec`, `images/bases/*.toml` -> `BaseSpec`. The only reader of catalogue files."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, TypeVar

from vmbuild.errors import GuestImageError, UsageError
from vmbuild.model import ApplianceSpec, Arch, ImageSpec, Repository

MIRRORS = ("debian", "debian-security")

T = TypeVar("T")


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


def load_image(name: str, folders: Sequence[Path] | None = None) -> ImageSpec:
    """Return the guest image of this name from the first folder that has it; by default the shipped catalogue's.

    Raises UsageError for a name that no folder has, GuestImageError for a file that is wrong.
    """
    files = _image_files(folders)
    if name not in files:
        raise UsageError(
            f"there is no guest image named {name!r}",
            resolution=f"Choose one of: {', '.join(sorted(files)) or 'none, the catalogue is empty'}.",
        )
    return _read_image(files[name])


def list_images(folders: Sequence[Path] | None = None) -> list[ImageSpec]:
    """Return every guest image by name. Raises GuestImageError for a file that is wrong."""
    return [_read_image(file) for _, file in sorted(_image_files(folders).items())]


def _image_files(folders: Sequence[Path] | None) -> dict[str, Path]:
    folders = [find_catalog()] if folders is None else folders
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
    row = _Table.read(file)
    read = READERS[row.choice("kind", READERS)]
    spec = read(file, row, row.table("boot"))
    row.end()
    return spec


def _read_appliance(file: Path, row: _Table, boot: _Table) -> ApplianceSpec:
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


def _common(file: Path, row: _Table, boot: _Table) -> _Common:
    return {
        "name": row.choice("name", [file.stem]),
        "arch": Arch(row.choice("arch", list(Arch))),
        "description": row.text("description"),
        "folder": file.parent,
        "guest_files": _beside(file.parent, "guest"),
        "keyrings": _keyrings(row, file.parent),
        "machine_type": boot.text("machine_type"),
        "cpu_model": boot.text("cpu_model"),
    }


READERS = {"appliance": _read_appliance}
"""How a row of each kind is read."""


def _read_base(file: Path) -> BaseSpec:
    row = _Table.read(file)
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


def _repositories(row: _Table) -> tuple[Repository, ...]:
    found = []
    for table in row.tables("repositories"):
        repository = Repository(
            suite=table.text("suite"),
            mirror=table.choice("mirror", MIRRORS),
            public_url=table.text("public_url"),
            components=table.texts("components", default=("main",)),
            optional=table.flag("optional"),
            alias=table.optional_text("alias"),
        )
        table.end()
        found.append(repository)
    return tuple(found)


def _keyrings(row: _Table, folder: Path) -> tuple[Path, ...]:
    keyrings = tuple(_beside(folder, name) for name in row.texts("keyrings"))
    for keyring in keyrings:
        if not keyring.is_file():
            raise row.wrong("keyrings", f"names {keyring}, which is not there")
    return keyrings


def _beside(folder: Path, name: str) -> Path:
    """Return a file of this catalogue folder, else the shipped one: a user's folder may hold nothing but TOML."""
    own = folder / name
    return own if own.exists() else find_catalog() / name


class _Table:
    """A TOML table that is read key by key and then must be empty. Its methods raise GuestImageError."""

    def __init__(self, file: Path, values: dict[str, object], prefix: str = "") -> None:
        self._file = file
        self._values = values
        self._prefix = prefix

    @classmethod
    def read(cls, file: Path) -> _Table:
        try:
            return cls(file, tomllib.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise GuestImageError(f"the catalogue file {file} cannot be read", details=str(error)) from error

    def text(self, key: str) -> str:
        value = self._take(key, str, "a text in quotes")
        if not value:
            raise self.wrong(key, "must not be empty")
        return value

    def has(self, key: str) -> bool:
        return key in self._values

    def optional_text(self, key: str) -> str | None:
        return self.text(key) if self.has(key) else None

    def choice(self, key: str, allowed: Iterable[str]) -> str:
        value, allowed = self.text(key), list(allowed)
        if value not in allowed:
            raise self.wrong(key, f"is {value!r}, expected {' or '.join(repr(str(name)) for name in allowed)}")
        return value

    def texts(self, key: str, *, default: tuple[str, ...] | None = None) -> tuple[str, ...]:
        expected = "a list of texts in quotes"
        values = self._take(key, list, expected, None if default is None else list(default))
        return tuple(self._check(key, value, str, expected) for value in values)

    def flag(self, key: str) -> bool:
        return self._take(key, bool, "true or false", False)

    def table(self, key: str) -> _Table:
        return _Table(self._file, self._take(key, dict, f"a table [{key}]"), f"{self._prefix}{key}.")

    def tables(self, key: str) -> list[_Table]:
        expected = f"one or more tables [[{key}]]"
        values = self._take(key, list, expected)
        if not values:
            raise self.wrong(key, f"is empty, expected {expected}")
        return [_Table(self._file, self._check(key, value, dict, expected), f"{key}.") for value in values]

    def end(self) -> None:
        """Raise for keys that nobody asked for: most often a slip of the pen."""
        for key in self._values:
            raise self.wrong(key, "is not a key that a catalogue file has")

    def wrong(self, key: str, problem: str) -> GuestImageError:
        return GuestImageError(
            f"the catalogue file {self._file} is wrong: {self._prefix}{key} {problem}",
            resolution=f"Compare it with the files in {find_catalog()}.",
        )

    def _take(self, key: str, kind: type[T], expected: str, default: T | None = None) -> T:
        value = self._values.pop(key, default)
        if value is None:
            raise self.wrong(key, f"is missing, expected {expected}")
        return self._check(key, value, kind, expected)

    def _check(self, key: str, value: object, kind: type[T], expected: str) -> T:
        if not isinstance(value, kind):
            raise self.wrong(key, f"is {value!r}, expected {expected}")
        return value
