from __future__ import annotations

import re

import pytest

from vmbuild.errors import UsageError
from vmbuild.model import GIB, KIB, MIB, format_size, parse_platforms, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2G", 2 * GIB),
        ("1500M", 1500 * MIB),
        ("1.5GiB", 3 * GIB // 2),
        ("512mb", 512 * MIB),
        (" 4 k ", 4 * KIB),
        ("1T", 1024 * GIB),
        ("1073741824", GIB),
    ],
)
def test_sizes_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1G", "0", "0.0G", "1X", "1GG", "2G2", "NaN", "1,5G", "1e3", "9" * 400])
def test_nonsense_is_refused_by_name(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size") as caught:
        parse_size(text)
    assert "2G" in caught.value.resolution


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (KIB, "1.0 KiB"), (1536 * MIB, "1.5 GiB"), (5 * MIB, "5.0 MiB")]
)
def test_sizes_as_people_read_them(size: int, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.parametrize(
    ("text", "platforms"),
    [
        ("linux/arm64", ("linux/arm64",)),
        ("linux/arm64/v8", ("linux/arm64",)),
        ("linux/arm", ("linux/arm/v7",)),
        ("linux/arm/v6, linux/arm64,linux/arm/v7", ("linux/arm/v6", "linux/arm64", "linux/arm/v7")),
    ],
)
def test_platforms_are_a_list_with_commas(text: str, platforms: tuple[str, ...]) -> None:
    assert parse_platforms(text) == platforms


@pytest.mark.parametrize(
    ("text", "brief"),
    [
        ("linux/amd64", "does not build for 'linux/amd64'"),
        ("linux/arm64,linux/arm/v5", "does not build for 'linux/arm/v5'"),
        ("linux/arm64,", "a platform is missing"),
        ("", "a platform is missing"),
        ("linux/arm64,linux/arm64/v8", "linux/arm64 is given twice"),
    ],
)
def test_a_list_of_platforms_that_makes_no_sense_is_refused(text: str, brief: str) -> None:
    with pytest.raises(UsageError, match=re.escape(brief)) as caught:
        parse_platforms(text)
    assert caught.value.resolution
