"""Certificate authorities that this host trusts beyond the public ones: a company's, say, whose proxy re-signs TLS.

Only certificates are read and passed on, each parsed and written anew: a private key beside one stays where it is.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vmbuild.errors import UsageError

AUTO = "auto"
OFF = "off"

FOLDERS = (
    "usr/local/share/ca-certificates",  # Debian, Alpine: update-ca-certificates(8)
    "etc/pki/ca-trust/source/anchors",  # Fedora: update-ca-trust(8)
    "etc/ca-certificates/trust-source/anchors",  # Arch
    "etc/pki/trust/anchors",  # SUSE
)
"""Where an administrator puts the certificates of authorities."""

VARIABLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NODE_EXTRA_CA_CERTS")
"""Where programs are told of a file of them: OpenSSL and Go, requests, curl, Node."""

PACKAGED = "usr/share/ca-certificates"
"""The public authorities as the distribution packages them (Debian, Alpine)."""

SUFFIXES = (".crt", ".pem", ".cer", ".der")

_BLOCK = re.compile(rb"-----BEGIN (?:X509 |TRUSTED )?CERTIFICATE-----\s(?P<body>[^-]+)-----END")


@dataclass(frozen=True)
class Authority:
    """An authority: its common name, or what stands for one, and its certificate as PEM."""

    name: str
    pem: str


def find(
    choice: Iterable[str], environment: Mapping[str, str], public: Iterable[Path] = (), root: Path = Path("/")
) -> list[Authority]:
    """Return the authorities of a choice, each once: `off`, `auto`, or files.

    `auto` is what the administrator of this host has added, in its FOLDERS or by one of VARIABLES, without what is in
    the bundles of `public` or packaged. Raises UsageError for a file that was named and has no certificate in it.
    """
    found: dict[bytes, Authority] = {}
    for word in choice:
        if word == AUTO:
            found.update(_added_here(environment, public, root))
        elif word != OFF:
            found.update(_read_named(Path(word)))
    return list(found.values())


def _added_here(environment: Mapping[str, str], public: Iterable[Path], root: Path) -> dict[bytes, Authority]:
    places = [path for folder in FOLDERS for path in _files_in(root / folder)]
    places += [Path(environment[name]) for name in VARIABLES if environment.get(name)]
    if not places:
        return {}
    known = {each for path in (*public, *_files_in(root / PACKAGED)) for each in _blocks(_read(path))}
    certificates = {der: None for path in places for der in _blocks(_read(path)) if der not in known}
    return dict(_parsed(certificates))


def _read_named(path: Path) -> dict[bytes, Authority]:
    try:
        found = dict(_parsed(_blocks(path.read_bytes())))
    except OSError as error:
        raise UsageError(f"cannot read the certificates of {path}: {error.strerror}", resolution=_ADVICE) from error
    if not found:
        raise UsageError(f"{path} holds no certificate", resolution=_ADVICE)
    return found


_ADVICE = "The setting `ca` names files of certificates (PEM or DER), or is auto or off."


def _blocks(data: bytes) -> Iterator[bytes]:
    """Yield the certificates of a file, PEM or DER, as DER; what is neither is passed over."""
    if data[:1] == b"\x30":  # a DER sequence
        yield data
        return
    for match in _BLOCK.finditer(data):
        try:
            yield base64.b64decode(b"".join(match["body"].split()), validate=True)
        except binascii.Error:
            continue


def _parsed(certificates: Iterable[bytes]) -> Iterator[tuple[bytes, Authority]]:
    for der in certificates:
        try:
            yield der, _parse(der)
        except ValueError:
            continue


def _parse(der: bytes) -> Authority:
    from cryptography import x509  # loaded for a certificate: few hosts have any, and it takes long
    from cryptography.hazmat.primitives.serialization import Encoding

    made = x509.load_der_x509_certificate(der)
    names = made.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    text = str(names[0].value) if names else made.subject.rfc4514_string()
    name = "".join(letter for letter in text if letter.isprintable()) or "without a name"
    return Authority(name, made.public_bytes(Encoding.PEM).decode())


def _files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES) if folder.is_dir() else []


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # not there, or not for us to read: it is not trusted here either
        return b""
