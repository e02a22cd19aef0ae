"""A guest image that is given by a path or a URL instead of a name: its row is made up, and kept in the cache."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

from vmbuild.address import is_place, is_protected, without_credentials
from vmbuild.errors import GuestImageError, UsageError
from vmbuild.image import catalog
from vmbuild.image.checksums import find_digest
from vmbuild.image.fetch import NETWORK_ADVICE, NotFound, Unreachable, fetch_bytes
from vmbuild.model import MIB, Arch, DiskSpec, ImageSpec
from vmbuild.whole import hash_file, write_whole

CPU_MODELS = {Arch.ARM64: "cortex-a76", Arch.ARMHF: "cortex-a15"}

BESIDE = ("{url}.sha256", "{url}.sha512", "{folder}/SHA256SUMS", "{folder}/SHA512SUMS", "{folder}/CHECKSUM")
"""Where publishers have the checksums of a disk."""

_DIGEST = re.compile(r"sha256[=:][0-9a-f]{64}|sha512[=:][0-9a-f]{128}")
_SUFFIXES = re.compile(r"(\.(xz|gz|zst|qcow2|img|raw))+$")


def find_row(image: str, cache: Path, *, arch: Arch = Arch.ARM64) -> ImageSpec:
    """Return the guest image that a name of the catalogue, a path or a URL means.

    `arch` is that of a disk given by its place. Raises UsageError, GuestImageError, HostError.
    """
    folders = catalog.find_folders(cache)
    if not is_place(image):
        return catalog.load_image(image, folders)
    rows = cache / "given"
    name, facts = _of_url(image, rows) if "://" in image else _of_file(Path(image), rows)
    if arch != Arch.ARM64:
        name = f"{name}-{arch}"
    about = {"name": name, "kind": "disk", "arch": str(arch), "system": "apt", "description": "given by its place"}
    boot = {"machine_type": "virt", "cpu_model": CPU_MODELS[arch]}
    row = f"{_toml(about | facts)}\n[boot]\n{_toml(boot)}"
    if not (rows / f"{name}.toml").exists() or (rows / f"{name}.toml").read_text() != row:
        rows.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_whole(rows / f"{name}.toml", row.encode(), mode=0o600)
    return catalog.load_image(name, folders)


def is_outdated(spec: ImageSpec, cache: Path) -> bool:
    """Tell whether a row was made of a file that is gone or is now another."""
    if spec.folder != cache / "given" or not isinstance(spec, DiskSpec) or not spec.url.startswith("file:"):
        return False
    path = Path(unquote(urlsplit(spec.url).path))
    return not path.is_file() or f"sha256:{_hash(path, spec.folder)}" != spec.digest


def _toml(facts: dict[str, str]) -> str:
    """Return a table of texts; JSON's escapes are TOML's, but for surrogates, which are not written."""
    return "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in facts.items())


def _name(file: str, digest: str) -> str:
    stem = re.sub(r"[^a-z0-9.]+", "-", _SUFFIXES.sub("", file.lower())).strip("-.")
    return f"{stem[:40] or 'disk'}-{digest[:8]}"


def _of_file(path: Path, rows: Path) -> tuple[str, dict[str, str]]:
    path = path.expanduser().absolute()
    if not path.is_file() or not os.access(path, os.R_OK):
        raise UsageError(f"there is no disk {path} that can be read", resolution="Give a raw or qcow2 disk.")
    digest = _hash(path, rows)
    return _name(path.name, digest), {"url": path.as_uri(), "digest": f"sha256:{digest}"}


def _hash(path: Path, rows: Path) -> str:
    """Return a file's SHA-256, which is remembered for as long as nothing shows that the file was changed."""
    note, now = rows / "digests.json", path.stat()
    known = _read_digests(note)
    facts: list[object] = [now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino]
    match known.get(str(path)):
        case [*kept, str(digest)] if kept == facts:
            return digest
    digest = hash_file(path)
    rows.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_whole(note, json.dumps({**known, str(path): [*facts, digest]}).encode(), mode=0o600)
    return digest


def _read_digests(note: Path) -> dict[str, object]:
    """Return what is remembered of files, nothing when the memory is damaged."""
    with suppress(FileNotFoundError, ValueError):
        known = json.loads(note.read_bytes())
        return known if isinstance(known, dict) else {}
    return {}


def _of_url(image: str, rows: Path) -> tuple[str, dict[str, str]]:
    url, fragment = urldefrag(image)
    file = unquote(urlsplit(url).path).rpartition("/")[2]
    if urlsplit(url).scheme not in ("https", "http") or not file:
        raise UsageError(f"{image!r} is no disk", resolution="Give an https or http URL of a file, or a path.")
    if fragment:
        if not _DIGEST.fullmatch(fragment):
            raise UsageError(f"{fragment!r} is no digest of a disk", resolution=_HOW)
        algorithm, digest = fragment[:6], fragment[7:]
        return _name(file, digest), {"url": url, "digest": f"{algorithm}:{digest}"}
    name = _name(file, hashlib.sha256(url.encode()).hexdigest())
    return name, {"url": url, "checksums": _known_checksums(name, url, rows) or _find_checksums(url, file)}


_HOW = (
    "Say what the disk must be: URL#sha256=HEX or URL#sha512=HEX, with the digest that its publisher names; or write a "
    'row of your own (README, "Guest images").'
)


def _known_checksums(name: str, url: str, rows: Path) -> str | None:
    """Return what an earlier run has found, so that a disk in the cache needs no network."""
    with suppress(UsageError, GuestImageError):
        spec = catalog.load_image(name, [rows])
        if isinstance(spec, DiskSpec) and spec.url == url:
            return spec.checksums
    return None


def _find_checksums(url: str, file: str) -> str:
    """Return the URL of a file of checksums beside a disk that has a digest of it. Raises UsageError for none."""
    for place in _beside(url) if is_protected(url) else ():
        with suppress(NotFound):
            text = _fetch_text(place)
            with suppress(GuestImageError):
                find_digest(text, file, place)
                return place
    where = "no file of checksums beside it has one" if is_protected(url) else "it does not come over https"
    raise UsageError(f"nothing tells whether {without_credentials(url)} is what it should be: {where}", resolution=_HOW)


def _fetch_text(url: str) -> str:
    try:
        return fetch_bytes(url, limit_bytes=4 * MIB, only_tls=True).decode(errors="replace")
    except Unreachable as error:
        error.resolution = NETWORK_ADVICE
        raise


def _beside(url: str) -> Iterator[str]:
    return (place.format(url=url, folder=url.rpartition("/")[0]) for place in BESIDE)
