"""Which Debian mirror to use: the user's setting, else the one this host's own apt uses, else the public default."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from debian.deb822 import Deb822

from vmbuild.model import Repository

AUTO = "auto"

# sources.list(5), the one-line style: type, [options], URI, suite, components
_LINE = re.compile(r"^\s*deb\s+(?:\[(?P<options>[^\]]*)\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)\s+(?P<components>[^#\n]+)")


@dataclass(frozen=True)
class _Source:
    """One apt source: a URI with a suite that it serves."""

    uri: str
    suite: str
    components: tuple[str, ...]
    signed_by: str

    @property
    def mirror(self) -> str | None:
        """The mirror setting that this source answers, None for backports, third parties and what is not HTTP."""
        url = urlsplit(self.uri)
        path = url.path.rstrip("/")
        # third parties, too, end their paths in /debian: a keyring of their own or no "main" gives them away
        ours = "debian-archive" in self.signed_by if self.signed_by else path.endswith(("/debian", "/debian-security"))
        if url.scheme not in ("http", "https") or not ours or "main" not in self.components:
            return None
        if self.suite.endswith("-security"):
            return "debian-security"
        return "debian" if self.suite.isalpha() else None


def resolve_mirror(repository: Repository, mirrors: Mapping[str, str], *, root: Path = Path("/")) -> str:
    """Return the URL to fetch a repository from, without a slash at its end.

    `mirrors` maps `debian` and `debian-security` to a URL or `auto`; `root` is where the host's apt sources lie.
    """
    url = mirrors.get(repository.mirror, AUTO)
    if url == AUTO:
        url = host_mirrors(root).get(repository.mirror, repository.public_url)
    return url.rstrip("/")


def host_mirrors(root: Path = Path("/")) -> dict[str, str]:
    """Return the URLs that this host's apt uses for `debian` and `debian-security`; empty where it is not Debian."""
    if not _is_debian(root):
        return {}
    found: dict[str, str] = {}
    for source in _sources(root / "etc/apt"):
        if source.mirror is not None:
            found.setdefault(source.mirror, source.uri.rstrip("/"))
    return found


def _is_debian(root: Path) -> bool:
    text = _read(root / "etc/os-release")
    return re.search(r"^ID=[\"']?debian[\"']?\s*$", text, re.MULTILINE) is not None


def _sources(folder: Path) -> Iterator[_Source]:
    yield from _one_line(_read(folder / "sources.list"))
    for path in sorted((folder / "sources.list.d").glob("*")):
        if path.suffix == ".list":
            yield from _one_line(_read(path))
        elif path.suffix == ".sources":
            yield from _deb822(_read(path))


def _one_line(text: str) -> Iterator[_Source]:
    for line in text.splitlines():
        match = _LINE.match(line)
        if match:
            signed_by = re.search(r"signed-by=(\S+)", match["options"] or "")
            components = tuple(match["components"].split())
            yield _Source(match["uri"], match["suite"], components, signed_by[1] if signed_by else "")


def _deb822(text: str) -> Iterator[_Source]:
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    for stanza in Deb822.iter_paragraphs(lines):
        types = stanza.get("Types", "").split()
        if "deb" not in types or stanza.get("Enabled", "yes").strip().lower() in ("no", "false", "off", "0"):
            continue
        components = tuple(stanza.get("Components", "").split())
        for uri in stanza.get("URIs", "").split():
            for suite in stanza.get("Suites", "").split():
                yield _Source(uri, suite, components, stanza.get("Signed-By", ""))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:  # not there, or not for us to read: then apt's choice is not known
        return ""
