"""What a guest has of a build context already, as the host remembers it, and what of the context differs by now."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path

from vmbuild.whole import write_whole, writing_in

FILE, FOLDER, LINK, OTHER = "file", "folder", "link", "other"

RACY_NS = 2_000_000_000
"""A file that changed so shortly before it was read may change once more and show the same times (git, racy-git)."""

CHUNK_BYTES = 1024 * 1024


@dataclass(frozen=True)
class Entry:
    """A file, folder or link as it was sent. Times in nanoseconds; `changed_ns` is 0 where it cannot be trusted.

    `digest` is the SHA-256 of a file's content, `target` where a link leads.
    """

    kind: str
    mode: int
    size: int
    mtime_ns: int
    inode: int = 0
    changed_ns: int = 0
    digest: str = ""
    target: str = ""

    @property
    def looks(self) -> Entry:
        """The entry as far as a look at it tells, without reading a file."""
        return replace(self, digest="")


Listing = Mapping[str, Entry]


@dataclass
class Changes:
    """How a context differs from a listing: `gone` and `touched` come before what is sent.

    `touched` have another mode or time, but the content that the guest has; `kept` is what needs nothing.
    """

    gone: list[str] = field(default_factory=list)
    touched: dict[str, Entry] = field(default_factory=dict)
    sent: list[tuple[str, Path]] = field(default_factory=list)
    kept: dict[str, Entry] = field(default_factory=dict)


def look(path: Path) -> Entry:
    """Return what a look at a path tells, links not followed. Raises OSError."""
    return entry_of(path.lstat(), str(path.readlink()) if path.is_symlink() else "")


def entry_of(found: os.stat_result, target: str = "", digest: str = "") -> Entry:
    """Return the entry of a file's status."""
    return Entry(
        kind=_kind(found.st_mode),
        mode=stat.S_IMODE(found.st_mode),
        size=found.st_size if stat.S_ISREG(found.st_mode) else 0,
        mtime_ns=found.st_mtime_ns,
        inode=found.st_ino,
        changed_ns=found.st_ctime_ns if time.time_ns() - found.st_ctime_ns > RACY_NS else 0,
        digest=digest,
        target=target,
    )


def _kind(mode: int) -> str:
    kinds = {stat.S_IFREG: FILE, stat.S_IFDIR: FOLDER, stat.S_IFLNK: LINK}
    return kinds.get(stat.S_IFMT(mode), OTHER)


def compare(known: Listing, files: Iterable[tuple[str, Path]]) -> Changes:
    """Return how the files of a context differ from what the guest has. Raises OSError for one that cannot be read."""
    changes, folders = Changes(), dict[str, tuple[Path, Entry]]()
    seen = set[str]()
    for name, path in files:
        now, old = look(path), known.get(name)
        seen.add(name)
        if old is not None and old.kind != now.kind:
            changes.gone.append(name)
            old = None
        if now.kind == FOLDER:
            folders[name] = (path, now)
        _sort_in(changes, name, path, now, old)
    changes.gone += [name for name in known if name not in seen]
    _send_again(changes, folders)
    return changes


def _sort_in(changes: Changes, name: str, path: Path, now: Entry, old: Entry | None) -> None:
    if old is not None and _is_same(now, old):
        changes.kept[name] = old
    elif old is not None and now.kind == FILE and now.size == old.size and _is_content_same(path, old):
        same = (now.mode, now.mtime_ns) == (old.mode, old.mtime_ns)
        (changes.kept if same else changes.touched)[name] = replace(now, digest=old.digest)
    else:
        changes.sent.append((name, path))


def _is_same(now: Entry, old: Entry) -> bool:
    if now.kind == FILE:
        return bool(now.changed_ns) and now == old.looks
    return now.kind != OTHER and (now.mode, now.mtime_ns, now.target) == (old.mode, old.mtime_ns, old.target)


def _is_content_same(path: Path, old: Entry) -> bool:
    with path.open("rb") as file:
        is_linked = os.fstat(file.fileno()).st_nlink > 1  # a name's own times would be every other name's too
        return not is_linked and hashlib.file_digest(file, "sha256").hexdigest() == old.digest


def _send_again(changes: Changes, folders: Mapping[str, tuple[Path, Entry]]) -> None:
    """Have a folder's times set again where something in it is written or removed."""
    written = {name.rpartition("/")[0] for name in [*changes.gone, *(name for name, _ in changes.sent)]}
    for name in sorted(written & changes.kept.keys() & folders.keys()):
        del changes.kept[name]
        changes.sent.append((name, folders[name][0]))
    changes.sent.sort()


def load_listing(path: Path, stamp: str) -> Listing:
    """Return the listing with this stamp, an empty one when it is not there or another's."""
    try:
        data = json.loads(path.read_text(encoding="ascii"))
        if data["stamp"] != stamp:
            return {}
        return {name: Entry(*values) for name, values in data["entries"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def save_listing(path: Path, stamp: str, entries: Listing) -> None:
    """Remember what the guest has, under a stamp that the guest has too. Raises HostError."""
    data = {"stamp": stamp, "entries": {name: astuple(entry) for name, entry in entries.items()}}
    with writing_in(path.parent):
        path.parent.mkdir(mode=0o700, exist_ok=True)
    write_whole(path, json.dumps(data).encode("ascii"), mode=0o600)
