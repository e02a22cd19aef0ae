"""What a comparison found: the runs as they were, and what they say together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vmbuild.bench.phases import Kind, Phase
from vmbuild.bench.sampler import Sample
from vmbuild.bench.statistics import Ratio, Summary, compare, summarise

SCHEMA = 1
"""The version of the JSON that is written; a field that goes or changes its meaning makes another."""


@dataclass(frozen=True)
class Run:
    """One measured build. Times in seconds, `started_at` POSIX; `other_cpu_s` is what others had of the host."""

    side: str
    number: int
    started_at: float
    seconds: float
    cpu_s: float
    peak_memory_bytes: int
    other_cpu_s: float
    disturbed: bool
    archive_bytes: int
    phases: tuple[Phase, ...]
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Failure:
    """A side's build that failed, after so many seconds; the side had no turn after it. Run 0 was to warm up."""

    side: str
    number: int
    seconds: float
    words: tuple[str, ...]
    """The last lines of the build."""

    @property
    def run(self) -> str:
        """The run, in words."""
        return run_name(self.number)


def run_name(number: int) -> str:
    """Return what a run is called."""
    return f"run {number}" if number else "warming up"


@dataclass(frozen=True)
class Result:
    """A workload's runs, in the order in which they were made. The first of `sides` is what others are compared to."""

    name: str
    platform: str
    description: str
    cpus: int
    memory_mib: int
    build_args: Mapping[str, str]
    dockerfile_sha256: str
    sides: tuple[str, ...]
    side_facts: Mapping[str, Mapping[str, str]]
    runs: tuple[Run, ...]
    failures: tuple[Failure, ...] = ()

    @property
    def title(self) -> str:
        """What was built, for what."""
        return f"{self.name}, {self.platform}"

    def of(self, side: str) -> list[Run]:
        """Return a side's runs."""
        return [run for run in self.runs if run.side == side]


@dataclass(frozen=True)
class Row:
    """A line of the comparison: what it is of, each side's summary, and each other side's ratio (first / other).

    A side that has no such phase has no summary. `unit` is `s` or `B`.
    """

    key: str
    kind: str
    title: str
    unit: str
    summaries: Mapping[str, Summary]
    ratios: Mapping[str, Ratio]


@dataclass(frozen=True)
class Report:
    """Everything that one command measured. `made_at` is POSIX seconds."""

    made_at: float
    version: str
    command: str
    host: Mapping[str, str]
    results: tuple[Result, ...]


def summary_rows(result: Result) -> list[Row]:
    """Return what is compared first: all of the time, the CPU time, the most memory."""
    return [
        _row(
            result,
            "total",
            "Whole build",
            "s",
            {side: [run.seconds for run in result.of(side)] for side in result.sides},
        ),
        _row(result, "cpu", "CPU time", "s", {side: [run.cpu_s for run in result.of(side)] for side in result.sides}),
        _row(
            *(result, "memory", "Peak memory", "B"),
            {side: [float(run.peak_memory_bytes) for run in result.of(side)] for side in result.sides},
        ),
    ]


def phase_rows(result: Result) -> list[Row]:
    """Return the comparison of every phase, in the order of a build."""
    found: dict[str, Phase] = {}
    for run in result.runs:
        for phase in run.phases:
            found.setdefault(phase.key, phase)
    order = list(Kind)
    rows = []
    for phase in sorted(found.values(), key=lambda each: (order.index(each.kind), each.key)):
        values = {side: _seconds_of(result.of(side), phase.key) for side in result.sides}
        rows.append(_row(result, phase.key, phase.title, "s", values, kind=phase.kind))
    return rows


def _seconds_of(runs: Sequence[Run], key: str) -> list[float]:
    return [phase.seconds for run in runs for phase in run.phases if phase.key == key]


def _row(
    result: Result, key: str, title: str, unit: str, values: Mapping[str, Sequence[float]], *, kind: str = "summary"
) -> Row:
    first, *others = result.sides
    summaries = {side: summarise(each) for side, each in values.items() if each}
    ratios = {side: ratio for side in others if (ratio := compare(values[first], values[side])) is not None}
    return Row(key, str(kind), title, unit, summaries, ratios)


def to_json(report: Report) -> dict[str, Any]:
    """Return a report as plain data: the runs, and beside them what they say together."""
    data = asdict(report)
    for each, result in zip(data["results"], report.results, strict=True):
        each["summary"] = [asdict(row) for row in (*summary_rows(result), *phase_rows(result))]
    return {"schema": SCHEMA, **data}
