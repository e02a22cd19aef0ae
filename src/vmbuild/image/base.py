"""Packages -> a Debian base image, unpacked but not configured: its second stage runs in a guest's real kernel.

Laid down the way dpkg itself leaves a tree between unpacking and configuring, so that `dpkg --configure -a` is all
that is missing (dpkg(1), deb-triggers(5)).
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from debian.deb822 import Deb822

from vmbuild.address import seen_from_guest, without_credentials
from vmbuild.errors import GuestImageError
from vmbuild.image import rootfs
from vmbuild.image.catalog import BaseSpec
from vmbuild.image.debian import open_indexes
from vmbuild.image.fetch import NotFound, fetch_all
from vmbuild.image.packages import Package, PackageIndex, package_downloads, package_path, resolve_closure
from vmbuild.image.tree import File, Keep, Member, TreeWriter, Writable, read_members
from vmbuild.report import Reporter
from vmbuild.whole import hash_file, open_whole, write_whole

RECIPE = 1
"""Raise it when this module, or the guest's second stage, would make another image from the same packages."""

CHUNK_BYTES = 256 * 1024
INFO = "var/lib/dpkg/info"
PROGRAMS = ("preinst", "postinst", "prerm", "postrm", "config")


@dataclass
class Database:
    """What dpkg remembers of unpacked packages."""

    status: list[str] = field(default_factory=list)
    files: list[File] = field(default_factory=list)
    interests: dict[str, list[str]] = field(default_factory=dict)


def write_base(
    spec: BaseSpec, packages: Sequence[Package], downloads: Path, sources: str, out: Writable, report: Reporter
) -> None:
    """Write the tree as a tar stream; `sources` becomes its apt sources. Raises GuestImageError for a bad package."""
    database = Database()
    keep = keep_slim(spec.exclude, spec.keep)
    with TreeWriter(out) as tree, report.meter("unpack", len(packages), unit="packages") as meter:
        tree.add_folder(".")  # else the root would have the mode of the private folder that it is unpacked in
        tree.add_file(File("etc/apt/sources.list.d/debian.sources", sources.encode()))
        for file in _slim_settings(spec):
            tree.add_file(file)
        for package in packages:
            _unpack(tree, database, package_path(package, downloads), keep)
            meter.advance(1)
        for file in _database_files(database):
            tree.add_file(file)


def keep_slim(exclude: Sequence[str], patterns: Sequence[str]) -> Keep:
    """Return the filter of a slim image: drops the prefixes, but never what a pattern matches (copyright files)."""
    keep = rootfs.keep_all_but(exclude)
    return lambda path: keep(path) or any(fnmatch(f"./{path}", pattern) for pattern in patterns)


def _unpack(tree: TreeWriter, database: Database, deb: Path, keep: Keep) -> None:
    control = rootfs.read_files(deb, [""], part="control")
    paths: list[str] = []
    with rootfs.open_part(deb, "data") as tar:
        tree.add_members(_noting_paths(read_members(tar), paths), keep)
    conffiles = [path for path in control.get("conffiles", b"").decode().split("\n") if path.startswith("/")]
    data = rootfs.read_files(deb, [path[1:] for path in conffiles]) if conffiles else {}
    # dpkg's own format asks for MD5 here; nothing is verified with it.
    digests = {path: hashlib.md5(data[path[1:]]).hexdigest() for path in conffiles if path[1:] in data}  # noqa: S324
    _record(database, control, paths, digests)


def _noting_paths(members: Iterable[Member], paths: list[str]) -> Iterator[Member]:
    for info, content in members:
        paths.append("/" + (info.name.removeprefix("./").strip("/") or "."))
        yield info, content


def _record(database: Database, control: dict[str, bytes], paths: list[str], conffiles: Mapping[str, str]) -> None:
    fields = Deb822(control["control"])
    name = fields["Package"]
    if fields.get("Multi-Arch") == "same":
        name += ":" + fields["Architecture"]
    fields["Status"] = "install ok unpacked"
    if conffiles:
        fields["Conffiles"] = "\n" + "\n".join(f" {path} {digest}" for path, digest in conffiles.items())
    database.status.append(fields.dump())
    database.files.append(File(f"{INFO}/{name}.list", "\n".join([*paths, ""]).encode()))
    for part, data in control.items():
        if part != "control":
            database.files.append(File(f"{INFO}/{name}.{part}", data, 0o755 if part in PROGRAMS else 0o644))
    for line in control.get("triggers", b"").decode().splitlines():
        _record_interest(database, line.partition("#")[0].split(), name)


def _record_interest(database: Database, words: list[str], package: str) -> None:
    """Note a package's interest in a trigger, as dpkg does when it unpacks (triggers(5) in dpkg's documentation)."""
    if len(words) == 2 and words[0] in ("interest", "interest-await", "interest-noawait"):
        waits = "/noawait" if words[0].endswith("noawait") else ""
        if words[1].startswith("/"):
            database.interests.setdefault("File", []).append(f"{words[1]} {package}{waits}")
        else:
            database.interests.setdefault(words[1], []).append(f"{package}{waits}")


def _database_files(database: Database) -> list[File]:
    return [
        File("var/lib/dpkg/status", "\n".join(database.status).encode()),
        File(f"{INFO}/format", b"1\n"),
        *database.files,
        *(
            File(f"var/lib/dpkg/triggers/{name}", "\n".join([*lines, ""]).encode())
            for name, lines in database.interests.items()
        ),
    ]


def _slim_settings(spec: BaseSpec) -> list[File]:
    """Return what keeps the image slim when packages are added later: dpkg's path filters and apt's clean-up."""
    lines = [f"path-exclude {prefix.removeprefix('.')}/*" for prefix in spec.exclude]
    lines += [f"path-include {pattern.removeprefix('.')}" for pattern in spec.keep]
    clean = (
        'DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb /var/cache/apt/archives/partial/*.deb || true"; };\n'
        'Dir::Cache::pkgcache "";\nDir::Cache::srcpkgcache "";\n'
    )
    return [
        File("etc/dpkg/dpkg.cfg.d/docker", b"force-unsafe-io\n" + "\n".join([*lines, ""]).encode()),
        File("etc/apt/apt.conf.d/docker-clean", clean.encode()),
        File("etc/apt/apt.conf.d/docker-no-languages", b'Acquire::Languages "none";\n'),
        File("etc/apt/apt.conf.d/docker-autoremove-suggests", b'Apt::AutoRemove::SuggestsImportant "false";\n'),
        File("usr/sbin/policy-rc.d", b"#!/bin/sh\nexit 101\n", 0o755),
        File("etc/resolv.conf", b""),
        File("etc/hostname", b"debian\n"),
    ]


@dataclass(frozen=True)
class BasePlan:
    """A base image that can be made: what goes in, and where its one layer (gzip-compressed tar) is kept."""

    spec: BaseSpec
    packages: tuple[Package, ...]
    downloads: Path
    sources: str
    layer: Path


def plan(spec: BaseSpec, arch: str, mirrors: Mapping[str, str], cache: Path, report: Reporter) -> BasePlan:
    """Resolve and fetch the packages of a base image for a Debian architecture. Raises GuestImageError.

    A mirror can have the list of a new release and not yet all of its packages: then all are taken as its suites are
    under their other names.
    """
    try:
        return _plan(spec, arch, mirrors, cache, report, by_alias=False)
    except NotFound as error:
        aliases = ", ".join(repository.alias for repository in spec.repositories if repository.alias)
        if not aliases:
            raise
        report.warn(f"{error.brief}: taking the packages as of {aliases}")
        try:
            return _plan(spec, arch, mirrors, cache, report, by_alias=True)
        except GuestImageError:
            raise error from None


def _plan(
    spec: BaseSpec, arch: str, mirrors: Mapping[str, str], cache: Path, report: Reporter, *, by_alias: bool
) -> BasePlan:
    report.step(f"Reading the package lists for {spec.repo_tag}")
    indexes = open_indexes(
        spec.repositories, arch, mirrors, spec.keyrings, cache / "indexes", report, by_alias=by_alias
    )
    packages = resolve_closure(indexes, spec.packages, essential=spec.essential)
    report.step(f"Downloading {len(packages)} packages")
    fetch_all(package_downloads(packages, cache / "packages"), report, label="download")
    sources = "\n".join(map(_source, indexes))
    facts = [RECIPE, arch, sources, spec.exclude, [package.sha256 for package in packages]]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    folder = cache / "bases"
    folder.mkdir(parents=True, exist_ok=True)
    return BasePlan(spec, packages, cache / "packages", sources, folder / f"{spec.name}-{digest[:16]}.tar.gz")


def _source(index: PackageIndex) -> str:
    """Return the apt source of a repository that was opened: apt-get update fails when one that is listed is not there.

    The suite has the name that it was opened by: under the other the mirror is out of step for apt too.
    The URL is the host's: a guest reaches the host's loopback elsewhere, and an image is no place for credentials.
    """
    repository = index.repository
    return (
        f"Types: deb\nURIs: {seen_from_guest(without_credentials(index.url))}\nSuites: {index.suite}\n"
        f"Components: {' '.join(repository.components)}\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
    )


def write_plan(plan: BasePlan, out: Writable, report: Reporter) -> None:
    """Write the plan's unpacked tree as a tar stream."""
    write_base(plan.spec, plan.packages, plan.downloads, plan.sources, out, report)


def keep_layer(plan: BasePlan, read: Callable[[int], bytes]) -> None:
    """Keep a configured tree, whose tar is read piece by piece, as the plan's layer when all went well.

    The layer's file time is fixed, so that the same tree gives the same digest.
    """
    with (
        open_whole(plan.layer) as file,
        gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=file, mtime=0) as packed,
    ):
        while data := read(CHUNK_BYTES):
            packed.write(data)
    write_whole(digest_file(plan.layer), hash_file(plan.layer).encode())


def is_kept(plan: BasePlan) -> bool:
    """Tell whether the plan's layer lies in the cache as it was written: a restored cache may hold other bytes."""
    note = digest_file(plan.layer)
    return plan.layer.exists() and note.exists() and note.read_text() == hash_file(plan.layer)


def digest_file(layer: Path) -> Path:
    """Return the file beside a layer that says its SHA-256."""
    return layer.with_name(layer.name + ".sha256")


def known_layers(cache: Path) -> Callable[[str], Path | None]:
    """Return where the host has a layer, by SHA-256: those of base images need not come back from the guest."""

    def find(digest: str) -> Path | None:
        for note in (cache / "bases").glob("*.sha256"):
            layer = note.with_suffix("")
            if note.read_text() == digest and layer.exists() and hash_file(layer) == digest:
                return layer
        return None

    return find


def hash_plain(layer: Path) -> str:
    """Return the SHA-256 of a layer's tar before it was compressed, in hexadecimal."""
    digest = hashlib.sha256()
    with gzip.open(layer) as file:
        while data := file.read(CHUNK_BYTES):
            digest.update(data)
    return digest.hexdigest()
