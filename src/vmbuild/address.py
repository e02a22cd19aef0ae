"""Addresses as they are right in a guest: the host's loopback is elsewhere, and credentials stay at home."""

from __future__ import annotations

import re

HOST = "10.0.2.2"
"""The host, as a guest behind QEMU's user-mode network sees it (QEMU, net/slirp)."""

_LOOPBACK = re.compile(r"(?<=://)(?P<user>[^@/]*@)?(?:localhost|127\.0\.0\.1|\[::1\])(?=[:/]|$)")
_CREDENTIALS = re.compile(r"(?<=://)[^/?#]*@")


def seen_from_guest(url: str) -> str:
    """Return a URL with the host's loopback replaced by the address under which a guest reaches the host."""
    return _LOOPBACK.sub(lambda match: (match["user"] or "") + HOST, url)


def without_credentials(url: str) -> str:
    """Return a URL without `user:password@`."""
    return _CREDENTIALS.sub("", url)
