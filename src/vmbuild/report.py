"""How long work tells what it does, without knowing who listens."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Meter(Protocol):
    """A running measure of one piece of work."""

    def advance(self, amount: int) -> None:
        """Say that this many more units (bytes, packages) are done."""


class Reporter(Protocol):
    """Someone who listens to long work."""

    def step(self, text: str) -> None:
        """Say what begins now, in a few words."""

    def warn(self, text: str) -> None:
        """Say something that the user should know but that stops nothing."""

    def output(self, data: bytes) -> None:
        """Pass on what a program in the guest wrote, as it came."""

    def meter(self, label: str, total: int | None, *, unit: str = "B") -> AbstractContextManager[Meter]:
        """Measure work of `total` units (None: unknown); `B` means bytes and shows a rate."""


class SilentMeter:
    """A meter nobody reads."""

    def advance(self, amount: int) -> None:
        """Do nothing."""


class SilentReporter:
    """A reporter that says nothing."""

    def step(self, text: str) -> None:
        """Do nothing."""

    def warn(self, text: str) -> None:
        """Do nothing."""

    def output(self, data: bytes) -> None:
        """Do nothing."""

    def meter(self, label: str, total: int | None, *, unit: str = "B") -> AbstractContextManager[Meter]:  # noqa: ARG002
        """Return a meter nobody reads."""
        return nullcontext(SilentMeter())
