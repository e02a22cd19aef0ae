"""Addresses: which can be trusted, and how they are right in a guest, where the host's loopback is elsewhere."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

HOST = "10.0.2.2"
"""The host, as a guest behind QEMU's user-mode network sees it (QEMU, net/slirp)."""

_LOOPBACK = re.compile(
    r"(?:(?<=://)(?P<user>[^@/]*@)?|^(?P<git>git@))(?:localhost|127\.0\.0\.1|\[::1\])(?=[:/]|$)", re.IGNORECASE
)
_CREDENTIALS = re.compile(r"(?<=://)[^/?#]*@")


def seen_from_guest(url: str) -> str:
    """Return a URL with the host's loopback replaced by the address under which a guest reaches the host."""
    return _LOOPBACK.sub(lambda match: (match["user"] or match["git"] or "") + HOST, url)


def is_remote(text: str) -> bool:
    """Tell whether a build context is Docker's to fetch: a URL, or one of Git's short forms."""
    return "://" in text or text.startswith(("git@", "github.com/"))


def without_credentials(url: str) -> str:
    """Return a URL without `user:password@`."""
    return _CREDENTIALS.sub("", url)


def is_protected(url: str) -> bool:
    """Tell whether nobody on the way can alter what comes from a URL: over TLS, or from this very host."""
    found = urlsplit(url)
    return found.scheme in ("https", "file") or found.hostname in ("127.0.0.1", "::1", "localhost")


def is_place(image: str) -> bool:
    """Tell whether a guest image is given by a path or a URL; otherwise it is a name of the catalogue."""
    return "/" in image or image.startswith(("~", "."))
