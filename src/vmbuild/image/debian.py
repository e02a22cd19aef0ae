"""A signed Debian repository: `InRelease` checked by gpgv, package indexes by the digests that it lists."""

from __future__ import annotations

import lzma
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

from debian.deb822 import Release

from vmbuild.errors import GuestImageError
from vmbuild.image.fetch import Download, NotFound, Unreachable, WrongDigest, fetch_all, fetch_bytes
from vmbuild.image.mirrors import host_mirrors, mirror_urls
from vmbuild.image.packages import Package, PackageIndex, package_downloads, resolve_closure
from vmbuild.image.signature import BadSignature, read_signed
from vmbuild.model import MIB, Repository
from vmbuild.report import Reporter

__all__ = [
    "BadSignature",
    "ExpiredRelease",
    "Package",
    "PackageIndex",
    "host_mirrors",
    "mirror_urls",
    "open_index",
    "open_indexes",
    "package_downloads",
    "resolve_closure",
]

RETRY_PAUSES_S = (2.0, 10.0)
"""Waits before `InRelease` is read again when the index it names is not there: the mirror is being updated."""

NOT_DEBIANS = (
    "Something between here and Debian altered it, or the mirror is not Debian's: "
    "set VMBUILD_MIRROR to another one. Do not go on with this one."
)


class _OutOfStep(Exception):
    """Release file and index of a suite do not fit each other; `problem` is what to say when they never do."""

    def __init__(self, problem: GuestImageError) -> None:
        super().__init__(problem.brief)
        self.problem = problem


class NotInSuite(GuestImageError):
    """The signed Release file names no such index: an old release keeps fewer architectures up to date."""


class ExpiredRelease(GuestImageError):
    """A repository's `Valid-Until` has passed: a mirror that is no longer updated, or a clock that is wrong."""


@dataclass(frozen=True)
class _Entry:
    """A file that a Release lists: its path relative to the suite, SHA-256 and size in bytes."""

    path: str
    sha256: str
    size: int


def open_indexes(
    repositories: Sequence[Repository],
    arch: str,
    mirrors: Mapping[str, str],
    keyrings: Sequence[Path],
    cache: Path,
    report: Reporter,
    *,
    by_alias: bool = False,
) -> list[PackageIndex]:
    """Return the indexes of all repositories; an optional one that cannot be had costs a warning.

    `by_alias` opens each suite by its other name, where it has one: a mirror may have that as of another moment.
    Raises what open_index raises; a bad signature or a wrong digest is an error even where the repository is optional.
    """
    indexes = []
    for repository in repositories:
        try:
            index = open_index(repository, arch, mirrors, keyrings, cache, report, by_alias=by_alias)
        except (NotFound, Unreachable, ExpiredRelease, NotInSuite) as error:
            if not repository.optional:
                raise
            cause = error.details.partition("\n")[0]
            report.warn(f"going on without {repository.suite}: {error.brief}{cause and f' ({cause})'}")
        else:
            _check_only(index)
            indexes.append(index)
    return indexes


def open_index(
    repository: Repository,
    arch: str,
    mirrors: Mapping[str, str],
    keyrings: Sequence[Path],
    cache: Path,
    report: Reporter,
    *,
    by_alias: bool = False,
) -> PackageIndex:
    """Return the verified package index of one repository; only `InRelease` is downloaded when it has not changed.

    What the host's own mirror does not have comes from the public one, with a warning.
    Raises BadSignature, ExpiredRelease, Unreachable, NotFound, WrongDigest (all GuestImageError).
    """
    *first, last = mirror_urls(repository, mirrors)
    for url in first:
        try:
            return _open_at(url, repository, arch, keyrings, cache, report, by_alias=by_alias)
        except (NotFound, Unreachable) as error:
            report.warn(f"this host's mirror cannot be used for {repository.suite}, taking {last}: {error.brief}")
    return _open_at(last, repository, arch, keyrings, cache, report, by_alias=by_alias)


def _check_only(index: PackageIndex) -> None:
    """See that a repository has the packages that are to be taken from it; an optional one may lack any of them."""
    missing = [name for name in index.repository.only if index.find(name) is None]
    if missing and not index.repository.optional:
        raise GuestImageError(
            f"{index.repository.suite} has no package {', '.join(missing)}, which `only` of this repository names",
            details=f"looked for in {index.url}/dists/{index.suite}",
            resolution="Correct `only` in the catalogue file.",
        )


def _open_at(
    url: str,
    repository: Repository,
    arch: str,
    keyrings: Sequence[Path],
    cache: Path,
    report: Reporter,
    *,
    by_alias: bool,
) -> PackageIndex:
    first = repository.alias if by_alias and repository.alias else repository.suite

    def open_as(name: str) -> PackageIndex:
        suite_url = f"{url}/dists/{name}"
        release = _read_release(suite_url, repository.suite, keyrings)
        try:
            paths = [_fetch_part(release, suite_url, part, arch, cache, report) for part in repository.components]
        except (WrongDigest, NotFound) as error:
            raise _OutOfStep(_out_of_step(error, suite_url)) from error
        return PackageIndex(_decompress(paths), url, repository, name)

    for pause in RETRY_PAUSES_S:
        try:
            return open_as(first)
        except _OutOfStep:
            report.step(f"{first} is being updated on the mirror, trying again in {pause:.0f} s")
            time.sleep(pause)
    try:
        return open_as(first)
    except _OutOfStep as error:
        if first == repository.alias:
            raise error.problem from None
        return _open_alias(open_as, repository, error.problem, report)


def _open_alias(
    open_as: Callable[[str], PackageIndex], repository: Repository, problem: GuestImageError, report: Reporter
) -> PackageIndex:
    """Open a suite by its other name; raise the problem with the first one when that does not do either.

    A mirror that caches by path can have Release file and index apart for days under one name. Under the other it has
    them as of another moment, signed as well; an older moment that is past its Valid-Until stays refused.
    """
    if repository.alias is None:
        raise problem
    try:
        found = open_as(repository.alias)
    except ExpiredRelease:
        raise
    except (_OutOfStep, GuestImageError):
        raise problem from None
    report.warn(f"{repository.suite} is out of step on the mirror: taking its packages as of {repository.alias}")
    return found


def _read_release(suite_url: str, suite: str, keyrings: Sequence[Path]) -> Release:
    url = f"{suite_url}/InRelease"
    release = Release(read_signed(fetch_bytes(url), keyrings, url, resolution=NOT_DEBIANS).decode())
    if suite not in (release.get("Suite"), release.get("Codename")):
        raise GuestImageError(
            f"{url} is signed, but for another suite",
            details=f"asked for {suite}, got Suite {release.get('Suite')}, Codename {release.get('Codename')}",
            resolution="The mirror is wrong: set VMBUILD_MIRROR to another one.",
        )
    _check_date(release, url)
    return release


def _check_date(release: Release, url: str) -> None:
    until = release.get("Valid-Until")
    if until is None:
        return
    try:
        moment = parsedate_to_datetime(until)
    except ValueError as error:
        raise GuestImageError(f"{url} has a Valid-Until that is no date: {until}") from error
    if moment.replace(tzinfo=moment.tzinfo or UTC) < datetime.now(UTC):
        raise ExpiredRelease(
            f"{url} has expired",
            details=f"valid until {until}, it is now {datetime.now(UTC):%a, %d %b %Y %H:%M:%S} UTC",
            resolution="Either the mirror is no longer updated (set VMBUILD_MIRROR to another one) "
            "or the clock of this host is wrong.",
        )


def _fetch_part(release: Release, suite_url: str, component: str, arch: str, cache: Path, report: Reporter) -> Path:
    """Return one component's verified `Packages.xz`, out of the cache when that has the digest asked for."""
    entry = _find_entry(release, f"{component}/binary-{arch}/Packages.xz", suite_url)
    path = cache / f"{entry.sha256}.xz"
    label = f"package list {suite_url.rpartition('/')[2]}"

    def fetch(url: str) -> None:
        fetch_all([Download(url, path, entry.sha256, entry.size)], report, label=label)

    plain = f"{suite_url}/{entry.path}"
    if release.get("Acquire-By-Hash") == "yes":
        _first_found(fetch, [f"{plain.rpartition('/')[0]}/by-hash/SHA256/{entry.sha256}", plain])
    else:
        fetch(plain)
    return path


def _decompress(paths: Sequence[Path]) -> bytearray:
    """Return the files' contents, each after a newline, in one buffer: at 56 MB a second copy would be felt."""
    data = bytearray()
    for path in paths:
        data += b"\n"
        try:
            with lzma.open(path) as file:
                while chunk := file.read(MIB):
                    data += chunk
        except (lzma.LZMAError, EOFError) as error:
            path.unlink()
            raise GuestImageError(
                f"the cached package index {path} was damaged", details=str(error), resolution="Run the command again."
            ) from error
    return data


def _first_found(fetch: Callable[[str], None], urls: Sequence[str]) -> None:
    for url in urls[:-1]:
        try:
            return fetch(url)
        except NotFound:
            continue
    return fetch(urls[-1])


def _find_entry(release: Release, path: str, suite_url: str) -> _Entry:
    for row in release.get("SHA256", ()):
        if row["name"] == path:
            return _Entry(path, row["sha256"], int(row["size"]))
    raise NotInSuite(
        f"{suite_url} has no {path}", resolution="The architecture or component does not exist in this suite."
    )


def _out_of_step(error: GuestImageError, suite_url: str) -> GuestImageError:
    return type(error)(
        f"the package index and the Release file of {suite_url} are out of step",
        details="\n".join(filter(None, (error.brief, error.details))),
        resolution="The mirror is probably being updated: run the command again in some minutes, "
        "or set VMBUILD_MIRROR to another mirror.",
    )
