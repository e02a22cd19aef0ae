"""A Debian package index and the dependency closure in it."""

from __future__ import annotations

import operator
import re
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from debian.deb822 import Deb822, PkgRelation
from debian.debian_support import Version

from vmbuild.errors import GuestImageError
from vmbuild.image.fetch import Download
from vmbuild.model import Repository

# deb-version(7) and Debian Policy 7.1; a lone < or > is an old spelling of <= and >=
_COMPARE = {
    "<<": operator.lt,
    "<=": operator.le,
    "<": operator.le,
    "=": operator.eq,
    ">=": operator.ge,
    ">": operator.ge,
    ">>": operator.gt,
}
_PRIORITIES = ("required", "important", "standard", "optional", "extra")


@dataclass(frozen=True)
class Package:
    """A binary package as its index describes it.

    `depends` is Pre-Depends and Depends together, `control` the raw stanza, `size` the .deb's bytes.
    """

    name: str
    version: str
    architecture: str
    sha256: str
    size: int
    url: str
    filename: str
    depends: str
    provides: str
    essential: bool
    priority: str
    control: str


@dataclass(frozen=True)
class Relation:
    """One alternative of a dependency, such as `libc6 (>= 2.38)`."""

    name: str
    operator: str = ""
    version: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.operator} {self.version})" if self.operator else self.name

    def accepts(self, version: str) -> bool:
        """Tell whether a version satisfies this relation; no version (an unversioned Provides) only satisfies any."""
        if not self.operator:
            return True
        return bool(version) and bool(_COMPARE[self.operator](Version(version), Version(self.version)))

    def accepts_package(self, package: Package) -> bool:
        """Tell whether a package satisfies this relation, by its name or by what it provides."""
        if package.name == self.name:
            return self.accepts(package.version)
        provided = (relation for group in parse_relations(package.provides) for relation in group)
        return any(other.name == self.name and self.accepts(other.version) for other in provided)


def parse_relations(text: str) -> list[list[Relation]]:
    """Return the groups of alternatives of a Depends or Provides field."""
    parts = (part for part in text.split(",") if part.strip())
    groups = PkgRelation.parse_relations(",".join(parts)) if text.strip(", \n") else []
    return [[Relation(item["name"], *(item["version"] or ())) for item in group] for group in groups]


class PackageIndex:
    """One `Packages` file. Stanzas are found by regex and parsed only when asked for: there are 68,000 of them."""

    def __init__(self, data: bytes | bytearray, url: str, repository: Repository, suite: str | None = None) -> None:
        """Take the file's content, the URL it came from, which package file names are relative to, and whose it is.

        `suite` is the name that the suite was opened by, where that is not the repository's first.
        """
        self.url = url
        self.repository = repository
        self.suite = suite or repository.suite
        self._data = data if data.startswith(b"\n") else b"\n" + data  # every stanza begins after a newline

    def find(self, name: str) -> Package | None:
        """Return the newest version of a package, None when there is no such package, or it is not to be taken here."""
        if not self._offers(name):
            return None
        packages = [self._parse(offset) for offset in self._offsets.get(name.encode(), ())]
        return newest(packages)

    def providers(self, name: str) -> list[str]:
        """Return the names of packages that provide a virtual package."""
        return [provider for provider in self._providers.get(name, ()) if self._offers(provider)]

    def essential(self) -> list[str]:
        """Return the names of packages with `Essential: yes` or `Priority: required`."""
        marks = re.finditer(rb"\n(?:Essential: yes|Priority: required)(?=\n)", self._data)
        return sorted({name for mark in marks if self._offers(name := self._name_at(mark.start()))})

    def _offers(self, name: str) -> bool:
        return not self.repository.only or name in self.repository.only

    @cached_property
    def _offsets(self) -> dict[bytes, list[int]]:
        table: dict[bytes, list[int]] = {}
        for match in re.finditer(rb"\nPackage: ([^\n]+)", self._data):
            table.setdefault(match[1], []).append(match.start())
        return table

    @cached_property
    def _providers(self) -> dict[str, list[str]]:
        table: dict[str, list[str]] = {}
        for match in re.finditer(rb"\nProvides: ([^\n]+(?:\n[ \t][^\n]*)*)", self._data):
            name = self._name_at(match.start())
            for provided in re.findall(r"([a-zA-Z0-9][\w.+-]*)(?:\s*\([^)]*\))?\s*(?:,|$)", match[1].decode()):
                table.setdefault(provided, []).append(name)
        return table

    def _name_at(self, offset: int) -> str:
        match = re.search(rb"\nPackage: ([^\n]+)", self._stanza(offset))
        return match[1].decode() if match else ""

    def _stanza(self, offset: int) -> bytes | bytearray:
        start = self._data.rfind(b"\n\n", 0, offset + 1)
        end = self._data.find(b"\n\n", offset + 1)
        return self._data[max(start, 0) : end if end >= 0 else None]

    def _parse(self, offset: int) -> Package:
        control = self._stanza(offset).decode().strip("\n") + "\n"
        fields = Deb822(control)
        try:
            return Package(
                name=fields["Package"],
                version=fields["Version"],
                architecture=fields["Architecture"],
                sha256=fields["SHA256"],
                size=int(fields["Size"]),
                url=f"{self.url}/{fields['Filename']}",
                filename=fields["Filename"],
                depends=", ".join(fields[key] for key in ("Pre-Depends", "Depends") if key in fields),
                provides=fields.get("Provides", ""),
                essential=fields.get("Essential", "no") == "yes",
                priority=fields.get("Priority", "optional"),
                control=control,
            )
        except (KeyError, ValueError) as error:
            raise GuestImageError(f"the package index of {self.url} has a stanza without {error}") from error


def newest(packages: Sequence[Package]) -> Package | None:
    """Return the package with the highest version, None when there is none."""
    return max(packages, key=lambda package: Version(package.version), default=None)


def package_path(package: Package, folder: Path) -> Path:
    """Return where a package's file lies under `folder`: content-addressed by its SHA-256."""
    return folder / package.sha256[:2] / package.sha256


def package_downloads(packages: Sequence[Package], folder: Path) -> list[Download]:
    """Return what to fetch to have the packages' files under `folder`, named by their SHA-256."""
    return [Download(package.url, package_path(package, folder), package.sha256, package.size) for package in packages]


def resolve_closure(
    indexes: Sequence[PackageIndex], wanted: Sequence[str], *, without: Collection[str] = (), essential: bool = False
) -> tuple[Package, ...]:
    """Return the wanted packages and all they depend on, by name; the newest version in any index wins.

    A dependency takes the alternative that is selected already, else the first that exists. A name in `without` counts
    as existing and brings nothing. Raises GuestImageError that names the chain for what cannot be satisfied.
    """
    names = [*wanted, *(name for index in indexes for name in index.essential())] if essential else wanted
    closure = _Closure(indexes, frozenset(without))
    closure.add_wanted(names)
    return tuple(package for _, package in sorted(closure.selected.items()))


class _Closure:
    """A walk over dependencies, breadth first, so that what is asked for is selected before what it drags in."""

    def __init__(self, indexes: Sequence[PackageIndex], without: frozenset[str]) -> None:
        self.selected: dict[str, Package] = {}
        self._indexes = indexes
        self._without = without
        self._found: dict[str, Package | None] = {}
        self._provided: dict[str, list[Package]] = {}
        self._parents: dict[str, str] = {}
        self._todo: deque[Package] = deque()

    def add_wanted(self, names: Sequence[str]) -> None:
        for name in names:
            if name in self._without:
                continue
            package = self._find(name)
            if package is None:
                raise self._missing(name, "")
            self._select(package, "")
        while self._todo:
            package = self._todo.popleft()
            for group in parse_relations(package.depends):
                self._satisfy(group, package.name)

    def _satisfy(self, group: list[Relation], parent: str) -> None:
        if any(self._is_selected(relation) for relation in group):
            return
        for relation in group:
            if relation.name in self._without:
                return
            for package in self._candidates(relation):
                if package.name not in self._without:
                    self._select(package, parent)
                return
        raise self._missing(" | ".join(map(str, group)), parent)

    def _is_selected(self, relation: Relation) -> bool:
        named = self.selected.get(relation.name)
        packages = [*self._provided.get(relation.name, ()), *([named] if named else ())]
        return any(relation.accepts_package(package) for package in packages)

    def _candidates(self, relation: Relation) -> Iterator[Package]:
        """Yield what could satisfy a relation, best first: the package of that name, what is left out, by priority."""
        named = self._find(relation.name)
        if named is not None and relation.accepts_package(named):
            yield named
        names = {name for index in self._indexes for name in index.providers(relation.name)}
        found = [package for package in map(self._find, sorted(names)) if package is not None]
        yield from sorted(filter(relation.accepts_package, found), key=self._rank)

    def _rank(self, package: Package) -> tuple[bool, int, str]:
        priority = _PRIORITIES.index(package.priority) if package.priority in _PRIORITIES else len(_PRIORITIES)
        return package.name not in self._without, priority, package.name

    def _find(self, name: str) -> Package | None:
        if name not in self._found:
            self._found[name] = newest([package for index in self._indexes if (package := index.find(name))])
        return self._found[name]

    def _select(self, package: Package, parent: str) -> None:
        if package.name in self.selected:
            return
        self.selected[package.name] = package
        self._parents[package.name] = parent
        self._todo.append(package)
        for group in parse_relations(package.provides):
            for relation in group:
                self._provided.setdefault(relation.name, []).append(package)

    def _missing(self, what: str, parent: str) -> GuestImageError:
        chain: list[str] = []
        while parent:
            chain.insert(0, parent)
            parent = self._parents[parent]
        return GuestImageError(
            f"no package satisfies {what}",
            details=f"wanted by {' -> '.join(chain)}" if chain else "wanted by the package list",
            resolution="A mirror may be in the middle of an update: run the command again in some minutes. "
            "Otherwise correct `packages` or `without` in the catalogue file.",
        )
