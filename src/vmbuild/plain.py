"""Frozen values from JSON that somebody else wrote: another vmbuild, another host, or who means harm."""

from __future__ import annotations

import os
from dataclasses import is_dataclass
from typing import Any, TypeVar, get_type_hints

T = TypeVar("T")

PLAIN = (str, str | None, int, bool)
MOST_SECONDS = 1e11
"""POSIX seconds of the year 5138: what is later is no time."""


def read_plain(kind: type[T], data: object) -> T:
    """Return the dataclass that a JSON object tells of.

    Its fields may be text, numbers, seconds (float), truth values, tuples of text, and such dataclasses again. One that
    has a default may be missing: an older vmbuild knew nothing of it. Raises TypeError or ValueError for a field too
    many or too few, and for a value that is not of its field's type.
    """
    hints = get_type_hints(kind)
    needed = {name for name in hints if not hasattr(kind, name)}  # a dataclass keeps its defaults as class attributes
    if not isinstance(data, dict) or not needed <= data.keys() <= hints.keys():
        raise TypeError(f"{kind.__name__} has the fields {', '.join(hints)}, and not what {data!r:.200} says")
    return kind(**{name: _read(hints[name], value, name) for name, value in data.items()})


def _read(hint: Any, value: Any, name: str) -> Any:
    if is_dataclass(hint):
        return read_plain(hint, value)  # type: ignore[arg-type]
    if hint == tuple[str, ...] and isinstance(value, list):
        return tuple(_read(str, each, name) for each in value)
    if hint is float and type(value) in (int, float) and 0 <= value <= MOST_SECONDS:
        return float(value)
    fits = hint in PLAIN and isinstance(value, hint) and isinstance(value, bool) is (hint is bool)
    if not fits or (isinstance(value, str) and b"\0" in os.fsencode(value)):  # which no path can hold, nor an argv
        raise ValueError(f"{name} cannot be {value!r:.200}")
    return value
