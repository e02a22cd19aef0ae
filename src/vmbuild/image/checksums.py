"""What a file of checksums says about one file: `sha256sum` and BSD lines, or a digest alone beside its file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import unquote, urlsplit

from vmbuild.errors import GuestImageError

ALGORITHMS = {64: "sha256", 128: "sha512"}
"""By the length of a digest in hexadecimal, weakest first; MD5 and SHA-1 do not count."""

_HEX = r"(?P<digest>[0-9a-fA-F]{64}|[0-9a-fA-F]{128})"
_GNU = re.compile(rf"{_HEX}\s[ *]?(?:\./)?(?P<name>\S.*)")  # coreutils, sha256sum(1): a star means binary
_BSD = re.compile(rf"SHA(?:256|512) ?\((?:\./)?(?P<name>.+)\) ?= ?{_HEX}")
_ALONE = re.compile(_HEX)


def find_digest(text: str, name: str, url: str) -> str:
    """Return the strongest digest of the file called exactly `name`, such as `sha512:...`.

    `url` is where the text is from: a digest alone counts only in a file that is named after the one it is of.
    Raises GuestImageError when there is none, or two that differ.
    """
    found = set(_named(text, name))
    own = unquote(urlsplit(url).path).rpartition("/")[2]
    alone = _ALONE.fullmatch(text.strip())
    if alone and own.startswith(f"{name}."):
        found.add(alone["digest"].lower())
    for length, algorithm in sorted(ALGORITHMS.items(), reverse=True):
        digests = [digest for digest in found if len(digest) == length]
        if len(digests) > 1:
            raise GuestImageError(f"{url} has two digests for {name}", details="\n".join(sorted(digests)))
        if digests:
            return f"{algorithm}:{digests[0]}"
    raise GuestImageError(
        f"{url} has no SHA-256 or SHA-512 of {name}",
        details="\n".join(text.splitlines()[:20]),
        resolution="The publisher may have renamed the file: correct `url` or `checksums` in the catalogue file.",
    )


def _named(text: str, name: str) -> Iterator[str]:
    for line in text.splitlines():
        match = _GNU.fullmatch(line.strip()) or _BSD.fullmatch(line.strip())
        if match and match["name"] == name:
            yield match["digest"].lower()
