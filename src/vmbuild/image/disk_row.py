"""What a row of kind `disk` has of its own: where the disk is, how it is known for what it should be, how to log in."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

from vmbuild.address import is_protected
from vmbuild.image.table import Table
from vmbuild.model import ConsoleLogin, DiskSpec

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")


def read_url(row: Table, folder: Path) -> str:
    """Return the URL of a disk; what has no scheme is a path, relative to the catalogue file.

    Raises GuestImageError.
    """
    url = row.text("url")
    scheme = urlsplit(url).scheme
    if not scheme:
        return (folder / Path(url).expanduser()).absolute().as_uri()
    if scheme not in ("https", "http", "file"):
        raise row.wrong("url", f"is {url!r}, expected an https, http or file URL, or a path")
    if urlsplit(url).path.rpartition("/")[2] == "":
        raise row.wrong("url", f"is {url!r}, expected that of a file")
    return url


def check_verification(row: Table, spec: DiskSpec) -> None:
    """See that there is one way to know the disk for what it should be, and that nothing in the row is idle.

    Raises GuestImageError.
    """
    from_web = not spec.url.startswith("file:")
    places = [(key, found) for key in ("checksums", "signature") if (found := getattr(spec, key))]
    for is_wrong, key, problem in (
        (
            from_web and not spec.digest and not spec.checksums,
            "digest",
            'is missing: a disk from the network is verified by digest = "sha256:..." (or "sha512:..."), '
            'or by checksums = "https://...", the URL of a file with its digest',
        ),
        (spec.digest and not _DIGEST.fullmatch(spec.digest), "digest", "is none: expected sha256: or sha512:, and hex"),
        (spec.digest and spec.checksums, "checksums", "says what digest says already: give one of them"),
        (spec.checksums and not from_web, "checksums", "is idle: a file of this host is verified by digest"),
        *((not _is_web(found), key, f"is {found!r}, expected an https or http URL") for key, found in places),
        (spec.signature and not spec.checksums, "signature", "is that of checksums, which are missing"),
        (spec.signature and not spec.keyrings, "keyrings", "is missing: whose is the signature?"),
        (spec.keyrings and not spec.signature, "keyrings", "is idle without signature"),
        (
            spec.checksums and not spec.signature and not is_protected(spec.checksums),
            "checksums",
            "is neither signed nor fetched over https: whoever alters the disk on its way could alter it too",
        ),
    ):
        if is_wrong:
            raise row.wrong(key, problem)


def _is_web(url: str) -> bool:
    return urlsplit(url).scheme in ("https", "http")


def read_login(table: Table) -> ConsoleLogin:
    """Return how to log in on a disk's console. Raises GuestImageError."""
    login = ConsoleLogin(
        login_prompt=table.text("login_prompt"),
        user=table.text("user"),
        password_prompt=table.text("password_prompt"),
        password=table.text("password"),
        shell_prompt=table.text("shell_prompt"),
    )
    for key in ("login_prompt", "password_prompt", "shell_prompt"):
        try:
            re.compile(getattr(login, key))
        except re.error as error:
            raise table.wrong(key, f"is no regular expression: {error}") from error
    table.end()
    return login
