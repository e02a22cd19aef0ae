"""Which Debian mirror to use: the user's setting, else the one this host's own apt uses, else the public default.

Third parties, too, end their paths in /debian and call a component "main". A source of this host is taken for
Debian's own by what it shows, the best first:

1. it names Debian's keyring;
2. its path ends in /debian or /debian-security, and it is on debian.org, or serves `-updates` or `-security` suites
   (third parties have none), whatever key it names: a company's mirror may be signed anew;
3. its path ends so, it names no key, and its suite is this host's codename or `sid`: `stable` alone is a word that
   third parties use as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from debian.deb822 import Deb822

from vmbuild.model import Repository

AUTO = "auto"

# sources.list(5), the one-line style: type, [options], URI, suite, components
_LINE = re.compile(r"^\s*deb\s+(?:\[(?P<options>[^\]]*)\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)\s+(?P<components>[^#\n]+)")
_OF_DEBIAN_ALONE = ("-updates", "-security")


@dataclass(frozen=True)
class _Source:
    """One apt source: a URI with a suite that it serves."""

    uri: str
    suite: str
    components: tuple[str, ...]
    signed_by: str

    @property
    def mirror(self) -> str | None:
        """The mirror setting that this source would answer, None for backports and what is not HTTP or not main."""
        if urlsplit(self.uri).scheme not in ("http", "https") or "main" not in self.components:
            return None
        if self.suite.endswith("-security"):
            return "debian-security"
        return "debian" if self.suite.isalpha() else None

    @property
    def is_named_like_debians(self) -> bool:
        """Whether the URL ends as Debian's mirrors do."""
        return urlsplit(self.uri).path.endswith(("/debian", "/debian-security"))

    @property
    def is_on_debian_org(self) -> bool:
        """Whether the host is one of Debian's."""
        return f".{urlsplit(self.uri).hostname or ''}".endswith(".debian.org")


def mirror_urls(repository: Repository, mirrors: Mapping[str, str], *, root: Path = Path("/")) -> list[str]:
    """Return the URLs to fetch a repository from, the best first, without a slash at their ends.

    `mirrors` maps `debian` and `debian-security` to a URL or `auto`; `root` is where the host's apt sources lie.
    What the user has set is the only one; the mirror of the host's apt may lack an architecture, so the public one
    comes after it.
    """
    url = mirrors.get(repository.mirror, AUTO)
    if url != AUTO:
        return [url.rstrip("/")]
    public = repository.public_url.rstrip("/")
    found = host_mirrors(root).get(repository.mirror, public)
    return [found] if found == public else [found, public]


def host_mirrors(root: Path = Path("/")) -> dict[str, str]:
    """Return the URLs that this host's apt uses for `debian` and `debian-security`; empty where it is not Debian."""
    release = dict(re.findall(r"^(\w+)=[\"']?([^\"'\n]*?)[\"']?\s*$", _read(root / "etc/os-release"), re.MULTILINE))
    if release.get("ID") != "debian":
        return {}
    sources = [replace(source, uri=_follow(source.uri, root).rstrip("/")) for source in _sources(root / "etc/apt")]
    found: dict[str, str] = {}
    for source in _trusted(sources, release.get("VERSION_CODENAME", "")):
        if source.mirror is not None:
            found.setdefault(source.mirror, source.uri)
    return found


def _trusted(sources: list[_Source], codename: str) -> Iterator[_Source]:
    """Yield the sources that are Debian's, those that show it best first (see the top of this module)."""
    debians = {source.uri for source in sources if source.suite.endswith(_OF_DEBIAN_ALONE)}
    named = [source for source in sources if source.is_named_like_debians]
    yield from (source for source in sources if "debian-archive" in source.signed_by)
    yield from (source for source in named if source.is_on_debian_org or source.uri in debians)
    yield from (source for source in named if not source.signed_by and source.suite in (codename, "sid"))


def _follow(uri: str, root: Path) -> str:
    """Return the first web address of a mirror list (apt-transport-mirror(1)), any other URI as it is."""
    if not uri.startswith("mirror+file:"):
        return uri
    listed = _read(root / urlsplit(uri).path.lstrip("/"))
    return next((words[0] for words in map(str.split, listed.splitlines()) if words and _is_http(words[0])), uri)


def _is_http(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


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
