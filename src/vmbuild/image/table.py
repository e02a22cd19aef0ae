"""A catalogue file, read key by key, so that whatever is wrong is said with its place. The door to tomllib here."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from vmbuild.errors import GuestImageError

T = TypeVar("T")


class Table:
    """A TOML table that is read key by key and then must be empty. Its methods raise GuestImageError."""

    def __init__(self, file: Path, values: dict[str, object], prefix: str = "") -> None:
        self._file = file
        self._values = values
        self._prefix = prefix

    @classmethod
    def read(cls, file: Path) -> Table:
        """Read a file."""
        try:
            return cls(file, tomllib.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise GuestImageError(f"the catalogue file {file} cannot be read", details=str(error)) from error

    def text(self, key: str) -> str:
        """Return a text that is not empty."""
        value = self._take(key, str, "a text in quotes")
        if not value:
            raise self.wrong(key, "must not be empty")
        return value

    def maybe(self, key: str) -> str | None:
        """Return a text, None where the file has not this key."""
        return self.text(key) if key in self._values else None

    def choice(self, key: str, allowed: Iterable[str]) -> str:
        """Return a text that is one of those allowed."""
        value, allowed = self.text(key), list(allowed)
        if value not in allowed:
            raise self.wrong(key, f"is {value!r}, expected {' or '.join(repr(str(name)) for name in allowed)}")
        return value

    def texts(self, key: str, *, default: tuple[str, ...] | None = None) -> tuple[str, ...]:
        """Return a list of texts."""
        expected = "a list of texts in quotes"
        values = self._take(key, list, expected, None if default is None else list(default))
        return tuple(self._check(key, value, str, expected) for value in values)

    def flag(self, key: str) -> bool:
        """Return true or false, false where the file has not this key."""
        return self._take(key, bool, "true or false", False)

    def has(self, key: str) -> bool:
        """Tell whether the file has this key."""
        return key in self._values

    def table(self, key: str) -> Table:
        """Return a table within."""
        return Table(self._file, self._take(key, dict, f"a table [{key}]"), f"{self._prefix}{key}.")

    def tables(self, key: str) -> list[Table]:
        """Return the tables of a list that is not empty."""
        expected = f"one or more tables [[{key}]]"
        values = self._take(key, list, expected)
        if not values:
            raise self.wrong(key, f"is empty, expected {expected}")
        return [Table(self._file, self._check(key, value, dict, expected), f"{key}.") for value in values]

    def end(self) -> None:
        """Raise for keys that nobody asked for: most often a slip of the pen."""
        for key in self._values:
            raise self.wrong(key, "is not a key that a catalogue file has")

    def wrong(self, key: str, problem: str) -> GuestImageError:
        """Return the error that names a key and what is wrong with it."""
        return GuestImageError(
            f"the catalogue file {self._file} is wrong: {self._prefix}{key} {problem}",
            resolution="Compare it with the rows that vmbuild ships, and with its README.",
        )

    def _take(self, key: str, kind: type[T], expected: str, default: T | None = None) -> T:
        value = self._values.pop(key, default)
        if value is None:
            raise self.wrong(key, f"is missing, expected {expected}")
        return self._check(key, value, kind, expected)

    def _check(self, key: str, value: object, kind: type[T], expected: str) -> T:
        if not isinstance(value, kind):
            raise self.wrong(key, f"is {value!r}, expected {expected}")
        return value
