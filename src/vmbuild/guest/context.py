"""A folder of the host -> the tar stream that the guest unpacks, with `.dockerignore` honoured on the way."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import BinaryIO, cast

from vmbuild.address import is_remote
from vmbuild.errors import UsageError
from vmbuild.guest.listing import Entry, entry_of
from vmbuild.guest.session import Sink

BUFFER_BYTES = 256 * 1024


@dataclass(frozen=True)
class Pattern:
    """One line of a `.dockerignore`, as a regular expression over paths relative to the context."""

    regex: re.Pattern[str]
    negated: bool
    plain: str
    """The pattern up to its first character with a meaning."""


@dataclass(frozen=True)
class IgnoreRules:
    """The rules of a `.dockerignore`; the last that matches a path, or a folder above it, decides.

    Source: docs.docker.com/build/concepts/context, and the matcher it describes (Go's filepath.Match plus `**`).
    """

    patterns: tuple[Pattern, ...] = ()

    def excludes(self, path: str) -> bool:
        """Tell whether a path, relative to the context and with forward slashes, stays at home."""
        parts = path.split("/")
        candidates = ["/".join(parts[: i + 1]) for i in range(len(parts))]
        excluded = False
        for pattern in self.patterns:
            if pattern.negated == excluded and any(pattern.regex.fullmatch(each) for each in candidates):
                excluded = not pattern.negated
        return excluded

    def may_keep_below(self, folder: str) -> bool:
        """Tell whether something in an excluded folder may still travel."""
        below = folder + "/"
        exceptions = (pattern.plain for pattern in self.patterns if pattern.negated)
        return any(plain.startswith(below) or below.startswith(plain) for plain in exceptions)


def parse_ignore(text: str) -> IgnoreRules:
    """Return the rules in a `.dockerignore`. Raises UsageError for a pattern that cannot be read."""
    patterns = []
    for line in text.removeprefix("\ufeff").split("\n"):
        line = "" if line.startswith("#") else line.strip()
        negated = line.startswith("!")
        pattern = line.removeprefix("!").strip()
        if negated and not pattern:
            raise _bad_pattern(line, "nothing follows the exclamation mark")
        cleaned = os.path.normpath(pattern).lstrip("/") if pattern else ""
        if cleaned and cleaned != ".":
            patterns.append(Pattern(_translate(cleaned, line), negated, _SPECIAL.split(cleaned)[0]))
    return IgnoreRules(tuple(patterns))


def _translate(pattern: str, line: str) -> re.Pattern[str]:
    """Return a Go filepath.Match pattern with `**` as a regular expression, as moby's patternmatcher reads it."""
    out, at = [], 0
    while at < len(pattern):
        token = _TOKEN.match(pattern, at)
        if token is None:
            raise _bad_pattern(line, f"not understood from {pattern[at:]!r} on")
        text, at = token[0], token.end()
        if text.startswith("**"):
            # In the middle it stands for whole folders; at the end, or before plain letters, for anything.
            is_anything = at == len(pattern) or (text == pattern[:at] == "**" and not _SPECIAL.search(pattern, at))
            out.append(".*" if is_anything else "(?:.*/)?")
        elif text.startswith("["):
            out.append(_translate_class(text))
        else:
            out.append(_MEANING.get(text) or re.escape(text[-1]))
    try:
        return re.compile("".join(out), re.DOTALL)
    except re.error as error:
        raise _bad_pattern(line, str(error)) from error


def _translate_class(text: str) -> str:
    inside = text[1:-1].removeprefix("^")
    items = re.sub(r"\\?(.)(-?)", lambda item: re.escape(item[1]) + item[2], inside, flags=re.DOTALL)
    return f"[{'^' if text.startswith('[^') else ''}{items}]"


def _bad_pattern(line: str, why: str) -> UsageError:
    return UsageError(f"bad pattern in .dockerignore: {line}", details=why)


_ITEM = r"(?:\\.|[^\]\-\\])"
_TOKEN = re.compile(rf"\*\*/?|\*|\?|\[\^?(?:{_ITEM}(?:-{_ITEM})?)+\]|\\.|[^\[\\]", re.DOTALL)
_SPECIAL = re.compile(r"[*?\[\]\\]")
_MEANING = {"*": "[^/]*", "?": "[^/]"}


@dataclass(frozen=True)
class Context:
    """A build context on the host: its folder, its Dockerfile, and what stays at home.

    `dockerfile_inside` is its path relative to the context; None where it lies elsewhere (another folder, standard
    input), and `dockerfile_content` is what travels, unless Docker fetches it from `dockerfile_url`.
    """

    folder: Path
    dockerfile_inside: str | None
    dockerfile_content: bytes = b""
    dockerfile_url: str | None = None
    rules: IgnoreRules = field(default_factory=IgnoreRules)

    def files(self) -> Iterator[tuple[str, Path]]:
        """Yield what travels, sorted: the path relative to the context, and where it lies on the host."""
        needed = {".dockerignore", self.dockerfile_inside, f"{self.dockerfile_inside}.dockerignore"}
        yield from _walk(self.folder, "", self.rules, needed)

    def write_tar(self, sink: Sink) -> None:
        """Write the context as a tar stream. Owners become root, as `docker build` sends them.

        Raises UsageError for a file that cannot be read or changes while it is.
        """
        with open_tar(sink) as tar:
            for name, path in self.files():
                add_file(tar, name, path)


@contextmanager
def open_tar(sink: Sink) -> Iterator[tarfile.TarFile]:
    """Yield a tar stream to add files to."""
    fileobj = cast(BinaryIO, sink)
    with tarfile.open(fileobj=fileobj, mode="w|", bufsize=BUFFER_BYTES, format=tarfile.PAX_FORMAT) as tar:
        yield tar


def add_file(tar: tarfile.TarFile, name: str, path: Path) -> Entry | None:
    """Add a file, folder or link to a tar stream; return what was sent, None for what has no place in one (a socket).

    Raises UsageError when it cannot be read.
    """
    try:
        found = path.lstat()
        if stat.S_ISSOCK(found.st_mode):
            return None
        info = tar.gettarinfo(path, name)
        info.uid = info.gid = 0
        info.uname = info.gname = ""
        info.mtime, nanoseconds = divmod(found.st_mtime_ns, 1_000_000_000)
        if nanoseconds:  # which a float cannot hold
            info.pax_headers = {"mtime": str(Decimal(found.st_mtime_ns).scaleb(-9))}
        tar.getmembers().clear()  # else it remembers every file
        if not info.isreg():
            tar.addfile(info)
            return entry_of(found, info.linkname if info.issym() else "")
        with path.open("rb") as file:
            hashed = _Hashed(file)
            tar.addfile(info, cast(BinaryIO, hashed))
        return entry_of(found, digest=hashed.sha256.hexdigest())
    except OSError as error:
        raise unreadable(path, error) from error


class _Hashed:
    """Reads a file, and hashes what is read."""

    def __init__(self, file: BinaryIO) -> None:
        self.sha256 = hashlib.sha256()
        self._file = file

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self.sha256.update(data)
        return data


def open_context(folder: Path, dockerfile: str | None, stdin: BinaryIO) -> Context:
    """Return a folder as a build context. Raises UsageError when the folder or its Dockerfile is not there.

    `dockerfile` is relative to the current folder, as for `docker build -f`, or `-` for standard input.
    """
    if not folder.is_dir():
        raise UsageError(
            f"the build context {folder} is not a folder",
            resolution="Name a folder, a Git URL, or - for a tar on standard input.",
        )
    if dockerfile == "-":
        return replace(open_folder(folder), dockerfile_content=stdin.read())
    if dockerfile and is_remote(dockerfile):
        return replace(open_folder(folder), dockerfile_url=dockerfile)
    path = Path(dockerfile) if dockerfile else folder / "Dockerfile"
    if not path.is_file():
        raise UsageError(
            f"there is no Dockerfile at {path}",
            resolution="Name it with -f FILE, relative to the current folder.",
        )
    rules = _read_rules([Path(f"{path}.dockerignore"), folder / ".dockerignore"])
    place = path.parent.resolve() / path.name
    if place.is_relative_to(folder.resolve()):
        return Context(folder, place.relative_to(folder.resolve()).as_posix(), rules=rules)
    return Context(folder, None, _read(path), rules=rules)


def open_folder(folder: Path) -> Context:
    """Return a folder as a build context that has no Dockerfile, but may have a .dockerignore. Raises UsageError."""
    return Context(folder, None, rules=_read_rules([folder / ".dockerignore"]))


def _read_rules(candidates: list[Path]) -> IgnoreRules:
    """Return the rules of the first file that is there: one beside the Dockerfile goes before the context's."""
    for path in candidates:
        if path.is_file():
            return parse_ignore(_read(path).decode(errors="surrogateescape"))
    return IgnoreRules()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error


def _walk(folder: Path, prefix: str, rules: IgnoreRules, needed: set[str | None]) -> Iterator[tuple[str, Path]]:
    """Yield what travels of a folder; an excluded folder does when something in it does, as Docker sends it."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise unreadable(folder, error) from error
    for entry in entries:
        name = prefix + entry.name
        is_folder = entry.is_dir(follow_symlinks=False)
        excluded = rules.excludes(name)
        below = any(need is not None and need.startswith(name + "/") for need in needed)
        if not excluded or name in needed:
            yield name, Path(entry.path)
        if is_folder and not excluded:
            yield from _walk(Path(entry.path), name + "/", rules, needed)
        elif is_folder and (below or rules.may_keep_below(name)):
            inside = _walk(Path(entry.path), name + "/", rules, needed)
            if (first := next(inside, None)) is not None:
                yield name, Path(entry.path)
                yield first
                yield from inside


def unreadable(path: Path, error: OSError) -> UsageError:
    """Return what is said of a file of the context that cannot be read."""
    return UsageError(
        f"cannot read {path} of the build context: {error.strerror or error}",
        resolution="Make it readable, or exclude it with a line in .dockerignore.",
    )
