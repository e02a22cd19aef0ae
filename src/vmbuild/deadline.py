"""A time limit as a point in time, handed down through every wait."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Deadline:
    """A moment on the monotonic clock; `None` never comes."""

    at: float | None = None

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """Return the deadline that lies this many seconds ahead."""
        return cls(time.monotonic() + seconds)

    def remaining_s(self, at_most: float = 3600.0) -> float:
        """Return the seconds left, never negative, never more than `at_most`."""
        if self.at is None:
            return at_most
        return min(at_most, max(0.0, self.at - time.monotonic()))

    @property
    def passed(self) -> bool:
        """Tell whether the moment has come."""
        return self.at is not None and time.monotonic() >= self.at

    def sleep(self, seconds: float) -> None:
        """Sleep, but not beyond the deadline."""
        time.sleep(self.remaining_s(seconds))


NEVER = Deadline()
