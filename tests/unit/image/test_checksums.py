"""Lines of files of checksums, as publishers write them."""

from __future__ import annotations

import pytest

from vmbuild.errors import GuestImageError
from vmbuild.image.checksums import find_digest

A, B = "a" * 64, "b" * 64
LONG = "c" * 128
URL = "https://x.invalid/SHA256SUMS"


@pytest.mark.parametrize(
    ("text", "digest"),
    [
        (f"{A}  disk.img\n{B}  other.img\n", f"sha256:{A}"),
        (f"{A} *disk.img\n", f"sha256:{A}"),
        (f"{A}  ./disk.img\r\n", f"sha256:{A}"),
        (f"{A.upper()}  disk.img", f"sha256:{A}"),
        (f"SHA256 (disk.img) = {A}", f"sha256:{A}"),
        (f"# disk.img: 5 bytes\nSHA512 (disk.img) = {LONG}", f"sha512:{LONG}"),
        (f"{A}  disk.img\n{LONG}  disk.img", f"sha512:{LONG}"),
        (f"{A}  disk.img\n{A}  disk.img", f"sha256:{A}"),
        (f"{B}  disk.img.xz\n{B}  my-disk.img\n{B}  old/disk.img\n{A}  disk.img", f"sha256:{A}"),
    ],
)
def test_the_line_of_exactly_this_file_counts(text: str, digest: str) -> None:
    assert find_digest(text, "disk.img", URL) == digest


@pytest.mark.parametrize(
    "text",
    [
        "",
        A,
        f"{A}  disk.img.xz",
        f"{A}  xdisk.img",
        f"{A}  DISK.img",
        f"{A}  old/disk.img",
        f"{A[:-1]}  disk.img",
        f"{'d' * 32}  disk.img",
        f"{'d' * 40}  disk.img",
        "<html>disk.img</html>",
    ],
)
def test_nothing_else_does(text: str) -> None:
    with pytest.raises(GuestImageError, match=r"has no SHA-256 or SHA-512 of disk\.img"):
        find_digest(text, "disk.img", URL)


def test_a_digest_alone_counts_beside_the_file_that_it_is_named_after() -> None:
    assert find_digest(f"{LONG}\n", "disk.img", "https://x.invalid/disk.img.sha512") == f"sha512:{LONG}"
    with pytest.raises(GuestImageError):
        find_digest(f"{LONG}\n", "disk.img", "https://x.invalid/other.img.sha512")


def test_two_that_differ_are_none() -> None:
    with pytest.raises(GuestImageError, match="two digests"):
        find_digest(f"{A}  disk.img\n{B}  disk.img", "disk.img", URL)
