"""How mirrors, registries, ports and files of certificates are written in settings: with commas or spaces between."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from urllib.parse import urlsplit

from vmbuild.errors import UsageError

_REGISTRY = re.compile(r"[\w.-]+(:\d{1,5})?|\[[0-9a-fA-F:]+\](:\d{1,5})?")
_PORTS = range(1, 65536)


def parse_words(text: str) -> tuple[str, ...]:
    """Return the words of a list, each once; `off` is none."""
    return tuple(dict.fromkeys(word for word in re.split(r"[,\s]+", text) if word and word != "off"))


def parse_authorities(text: str) -> tuple[str, ...]:
    """Return `auto` and paths made absolute. Raises UsageError for `~somebody` whom this host does not know."""
    return tuple(word if word == "auto" else _absolute(word) for word in parse_words(text))


def _absolute(text: str) -> str:
    try:
        return str(Path(text).expanduser().absolute())
    except RuntimeError as error:
        raise UsageError(f"{text!r} is no file of certificates", details=str(error)) from error


def parse_mirrors(text: str) -> tuple[str, ...]:
    """Return the URLs of registry mirrors. Raises UsageError for what Docker would not take (moby, ValidateMirror)."""
    return tuple(dict.fromkeys(map(_parse_mirror, parse_words(text))))


def _parse_mirror(text: str) -> str:
    parts = urlsplit(text)
    is_plain = parts.hostname and not parts.path.strip("/") and not set("@?#") & set(text)
    if parts.scheme not in ("http", "https") or not is_plain:
        raise UsageError(
            f"{text!r} is no registry mirror", resolution="Give http://HOST[:PORT] or https://HOST[:PORT], no path."
        )
    return text.rstrip("/")


def parse_registries(text: str) -> tuple[str, ...]:
    """Return hosts, with or without a port, and ranges, as `insecure-registries` has them. Raises UsageError."""
    return tuple(map(_parse_registry, parse_words(text)))


def _parse_registry(text: str) -> str:
    if _REGISTRY.fullmatch(text):
        return text.lower()
    try:
        return str(ipaddress.ip_network(text, strict=False))
    except ValueError as error:
        raise UsageError(f"{text!r} is no registry", resolution="Give HOST, HOST:PORT, or a range (CIDR).") from error


def parse_ports(text: str) -> tuple[int, ...]:
    """Return port numbers. Raises UsageError."""
    words = parse_words(text)
    for word in words:
        if not (word.isascii() and word.isdigit() and int(word) in _PORTS):
            raise UsageError(f"{word!r} is no port", resolution="Give numbers from 1 to 65535.")
    return tuple(map(int, words))
