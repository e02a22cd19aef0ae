"""What a person sees: steps, bars, errors and tables on standard error; facts on standard output."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from vmbuild.errors import HostError, VmbuildError
from vmbuild.model import format_size
from vmbuild.report import Meter

if TYPE_CHECKING:  # else where they are drawn: few commands draw one
    from rich.progress import ProgressColumn
    from rich.table import Table

PLAIN_EVERY_S = 5.0
MAX_DETAIL_LINES = 40
PIPE_COLUMNS = 10_000
"""How wide a table may be where nobody folds lines: rich would cut its cells to 80 columns."""


class TerminalReporter:
    """A reporter that draws on standard error; `quiet` shows nothing but warnings and what a failed build said."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._quiet = quiet

    def step(self, text: str) -> None:
        """Show what begins now."""
        if not self._quiet:
            _print_line(self._console, (">", "bold cyan"), f" {text}")

    def warn(self, text: str) -> None:
        """Show a warning."""
        _print_line(self._console, ("warning:", "bold yellow"), f" {text}")

    def output(self, data: bytes) -> None:
        """Pass bytes on as they are."""
        sys.stderr.flush()
        sys.stderr.buffer.write(data)
        sys.stderr.buffer.flush()

    def meter(self, label: str, total: int | None, *, unit: str = "B") -> AbstractContextManager[Meter]:
        """Show a bar on a terminal, now and then a line elsewhere."""
        # Not rich's is_terminal: a CI that forces colour would get a bar in its log.
        if self._quiet or not sys.stderr.isatty() or self._console.is_dumb_terminal:
            return _lines(None if self._quiet else self, label, total, unit)
        return _bar(self._console, label, total, unit)


@contextmanager
def _bar(console: Console, label: str, total: int | None, unit: str) -> Iterator[Meter]:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    numbers: list[ProgressColumn] = (
        [DownloadColumn(binary_units=True), TransferSpeedColumn()]
        if unit == "B"
        else [MofNCompleteColumn(), TextColumn(unit)]
    )
    columns = [TextColumn("  {task.description}"), BarColumn(), *numbers, TimeRemainingColumn()]
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(label, total=total)

        class Bar:
            def advance(self, amount: int) -> None:
                progress.advance(task, amount)

        yield Bar()


@contextmanager
def _lines(reporter: TerminalReporter | None, label: str, total: int | None, unit: str) -> Iterator[Meter]:
    meter = _LineMeter(reporter, label, total, unit)
    meter.begin()
    yield meter
    meter.finish()


class _LineMeter:
    """Prints a line every few seconds, so that a log shows that work goes on."""

    def __init__(self, reporter: TerminalReporter | None, label: str, total: int | None, unit: str) -> None:
        self._reporter, self._label, self._total, self._unit = reporter, label, total, unit
        self._done = 0
        self._begun = self._shown = time.monotonic()

    def advance(self, amount: int) -> None:
        self._done += amount
        if time.monotonic() - self._shown >= PLAIN_EVERY_S:
            self._show()

    def begin(self) -> None:
        if self._reporter is not None and self._total:
            self._reporter.step(f"{self._label}: {self._amount(self._total)}")

    def finish(self) -> None:
        if self._done:
            self._show()

    def _show(self) -> None:
        self._shown = time.monotonic()
        if self._reporter is not None:
            seconds = max(self._shown - self._begun, 0.001)
            rate = f", {format_size(self._done / seconds)}/s" if self._unit == "B" else ""
            of = f" of {self._amount(self._total)}" if self._total else ""
            self._reporter.step(f"{self._label}: {self._amount(self._done)}{of} in {seconds:.0f} s{rate}")

    def _amount(self, count: int) -> str:
        return format_size(count) if self._unit == "B" else f"{count} {self._unit}"


def _print_line(console: Console, *parts: str | tuple[str, str]) -> None:
    """Print parts, each with its style, as they are: what others wrote is no markup, holds no emoji, is not folded."""
    console.print(Text.assemble(*parts), soft_wrap=True)


def show_error(error: VmbuildError) -> None:
    """Show what went wrong, the facts, and what to do."""
    console = Console(stderr=True, highlight=False)
    _print_line(console, ("error:", "bold red"), f" {error.brief}")
    lines = error.details.strip().splitlines()
    if len(lines) > MAX_DETAIL_LINES:
        lines = ["...", *lines[-MAX_DETAIL_LINES:]]
    for line in lines:
        _print_line(console, (f"  {line}", "dim"))
    if error.resolution:
        _print_line(console, f"  {error.resolution}")


def say(text: str) -> None:
    """Say a sentence to the person, not to a pipe."""
    _print_line(Console(stderr=True, highlight=False), text)


def print_json(value: Any) -> None:
    """Print facts as JSON on standard output."""
    _print_out(json.dumps(to_data(value), indent=2, default=str))


def print_json_line(value: Any) -> None:
    """Print facts as JSON on one line of standard output."""
    _print_out(json.dumps(to_data(value), separators=(",", ":"), default=str))


def print_text(text: str) -> None:
    """Print text on standard output as it is, for a program to read."""
    _print_out(text)


def _print_out(line: str) -> None:
    with _blaming_stdout():
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def to_data(value: Any) -> Any:
    """Return dataclasses as plain data, paths as text."""
    if is_dataclass(value) and not isinstance(value, type):
        return to_data(asdict(value))
    if isinstance(value, dict):
        return {key: to_data(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_data(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table on standard output; `-` stands for what is not there."""
    with _blaming_stdout():
        Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_COLUMNS).print(_table(columns, rows))
        sys.stdout.flush()


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    from rich.table import Table

    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*(Text("-" if cell is None else str(cell), overflow="fold") for cell in row))
    return table


def show_rounds(columns: Sequence[str], rounds: Iterable[Iterable[Sequence[object]]]) -> None:
    """Draw a table for each round of rows: in place on a terminal, one below the other elsewhere."""
    console = Console(highlight=False)
    if not sys.stdout.isatty() or console.is_dumb_terminal:
        for rows in rounds:
            print_table(columns, list(rows))
        return
    from rich.live import Live

    with Live(console=console, auto_refresh=False) as live:
        for rows in rounds:
            with _blaming_stdout():
                live.update(_table(columns, rows), refresh=True)


@contextmanager
def _blaming_stdout() -> Iterator[None]:
    """Say what standard output refuses; a reader who has gone is no failure."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise HostError(f"cannot write to standard output: {error.strerror or error}") from error
