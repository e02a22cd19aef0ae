"""A reporter that remembers."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from vmbuild.report import Meter, SilentReporter


class Listener(SilentReporter):
    """Remembers what it was told; `heard` has steps and warnings in their order."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.warnings: list[str] = []
        self.meters: list[tuple[str, int | None]] = []
        self.heard: list[str] = []
        self.advanced = 0

    def step(self, text: str) -> None:
        self.steps.append(text)
        self.heard.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)
        self.heard.append(f"warning: {text}")

    def meter(self, label: str, total: int | None, *, unit: str = "B") -> AbstractContextManager[Meter]:
        self.meters.append((label, total))
        return nullcontext(self)

    def advance(self, amount: int) -> None:
        self.advanced += amount
