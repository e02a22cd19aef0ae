"""What JSON of a stranger may say."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import pytest

from vmbuild.plain import read_plain


@dataclass(frozen=True)
class Inner:
    number: int
    fast: bool


@dataclass(frozen=True)
class Outer:
    name: str
    maybe: str | None
    tags: tuple[str, ...]
    at: float
    inner: Inner


VALUE = Outer("ü \udcff", None, ("a", "b"), 12.5, Inner(7, True))
DATA: dict[str, Any] = json.loads(json.dumps(asdict(VALUE)))


@dataclass(frozen=True)
class Younger:
    name: str
    arch: str = "arm64"


def test_what_an_older_vmbuild_did_not_know_has_its_default() -> None:
    assert read_plain(Younger, {"name": "a"}) == Younger("a", "arm64")
    assert read_plain(Younger, {"name": "a", "arch": "armhf"}) == Younger("a", "armhf")
    for wrong in ({"arch": "armhf"}, {"name": "a", "arch": None}, {"name": "a", "other": 1}):
        with pytest.raises((TypeError, ValueError)):
            read_plain(Younger, wrong)


def test_what_was_written_is_read() -> None:
    assert read_plain(Outer, DATA) == VALUE
    assert read_plain(Outer, {**DATA, "maybe": "x", "tags": [], "at": 3}) == Outer(
        VALUE.name, "x", (), 3.0, VALUE.inner
    )


@pytest.mark.parametrize(
    "change",
    [
        {"name": None},
        {"name": 5},
        {"name": ["a"]},
        {"name": "a\0b"},
        {"name": "\ud800"},
        {"maybe": 5},
        {"maybe": "\0"},
        {"tags": "ab"},
        {"tags": None},
        {"tags": {"a": 1}},
        {"tags": ["a", 1]},
        {"at": "12"},
        {"at": None},
        {"at": True},
        {"at": -1},
        {"at": float("nan")},
        {"at": float("inf")},
        {"at": 1e300},
        {"at": 10**400},
        {"inner": None},
        {"inner": []},
        {"inner": {"number": 7}},
        {"inner": {"number": 7, "fast": True, "more": 1}},
        {"inner": {"number": "7", "fast": True}},
        {"inner": {"number": 7.0, "fast": True}},
        {"inner": {"number": True, "fast": True}},
        {"inner": {"number": 7, "fast": 1}},
        {"inner": {"number": 7, "fast": None}},
        {"more": 1},
    ],
    ids=repr,
)
def test_what_is_not_of_its_type_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)):
        read_plain(Outer, {**DATA, **change})


@pytest.mark.parametrize("data", [None, [], "text", 5, {}, [DATA]], ids=repr)
def test_what_is_no_such_value_is_refused(data: object) -> None:
    with pytest.raises(TypeError):
        read_plain(Outer, data)


@pytest.mark.parametrize("missing", sorted(DATA))
def test_what_lacks_something_is_refused(missing: str) -> None:
    with pytest.raises(TypeError, match="has the fields name, maybe, tags, at, inner"):
        read_plain(Outer, {name: value for name, value in DATA.items() if name != missing})
