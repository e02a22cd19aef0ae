"""Which addresses can be trusted, and which are places of a disk."""

from __future__ import annotations

import pytest

from vmbuild.address import is_place, is_protected


@pytest.mark.parametrize(
    "url", ["https://example.org/x", "file:///x", "http://127.0.0.1:1/x", "http://[::1]/", "http://localhost/"]
)
def test_nobody_on_the_way_can_alter_these(url: str) -> None:
    assert is_protected(url)


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/x",
        "http://localhost.example.org/",
        "http://127.0.0.1@example.org/",
        "ftp://localhost.x/",
        "",
    ],
)
def test_anybody_on_the_way_can_alter_these(url: str) -> None:
    assert not is_protected(url)


@pytest.mark.parametrize("image", ["./a", "../a", "~/a", "/a", "a/b.qcow2", "https://x/a", ".hidden", "~a"])
def test_these_are_places(image: str) -> None:
    assert is_place(image)


@pytest.mark.parametrize("image", ["debian-13-arm64", "a.qcow2", "a", ""])
def test_these_are_names(image: str) -> None:
    assert not is_place(image)
