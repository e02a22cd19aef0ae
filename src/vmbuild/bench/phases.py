"""What a build spent its time on: BuildKit's JSON and buildah's lines, told as the same phases."""

from __future__ import annotations

import json
import re
from base64 import b64decode
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any


class Kind(StrEnum):
    """What a phase is for."""

    CONTEXT = "context"
    BASE = "base"
    RUN = "run"
    COPY = "copy"
    EXPORT = "export"
    REST = "rest"


TITLES = {
    Kind.CONTEXT: "Start, context",
    Kind.BASE: "Base image",
    Kind.COPY: "COPY and the like",
    Kind.EXPORT: "Export",
    Kind.REST: "Between the steps",
}


@dataclass(frozen=True)
class Phase:
    """One phase of a build. `key` is the same on every side; of RUN steps it is the stage and the number in it."""

    key: str
    kind: Kind
    title: str
    seconds: float


@dataclass(frozen=True)
class Line:
    """A line that a program wrote, and when: POSIX seconds of the host."""

    at: float
    text: str


@dataclass
class Spent:
    """Gathers the seconds of phases; those of one key are added up."""

    titles: dict[str, tuple[Kind, str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, kind: Kind, seconds: float, key: str | None = None, title: str | None = None) -> None:
        """Add to a phase."""
        key = key or str(kind)
        self.titles.setdefault(key, (kind, title or TITLES[kind]))
        self.seconds[key] = self.seconds.get(key, 0.0) + max(0.0, seconds)

    def phases(self, total_s: float) -> tuple[Phase, ...]:
        """Return the phases in the order of a build, and as the last what is in none of them."""
        self.add(Kind.REST, total_s - sum(self.seconds.values()))
        order = list(Kind)
        rank = {key: (order.index(kind), key) for key, (kind, _) in self.titles.items()}
        return tuple(Phase(key, *self.titles[key], self.seconds[key]) for key in sorted(rank, key=lambda k: rank[k]))


@dataclass
class _Vertex:
    name: str = ""
    started: float | None = None
    completed: float | None = None

    @property
    def seconds(self) -> float:
        return (self.completed or self.started or 0.0) - (self.started or 0.0)


_STEP = re.compile(
    r"^\[(?:\S+/\S+ )?(?:(?P<stage>[^\] ]+) )?(?P<number>\d+)/\d+\] (?P<word>[A-Z]+)(?P<rest>.*)$", re.DOTALL
)
_UNNAMED = re.compile(r"stage-(\d+)")


def read_buildkit(lines: Iterable[Line], stages: Sequence[str], begun: float, ended: float) -> tuple[Phase, ...]:
    """Return the phases of a build by what BuildKit wrote with `--progress rawjson`.

    `stages` are the names of the Dockerfile's. What comes before BuildKit's first word is the context's, what comes
    after the last step the export's. BuildKit's clock is the guest's, which is set with every session.
    """
    vertices = [each for each in _read_vertices(lines).values() if each.started is not None]
    spent = Spent()
    if not vertices:
        return spent.phases(ended - begun)
    spent.add(Kind.CONTEXT, min(each.started or 0.0 for each in vertices) - begun)
    steps = [(match, each) for each in vertices if (match := _STEP.match(each.name))]
    last_step = max((each.completed or 0.0 for _, each in steps), default=begun)
    spent.add(Kind.EXPORT, ended - last_step)
    for each in vertices:
        if each.name.startswith("[internal] load metadata"):
            spent.add(Kind.BASE, each.seconds)
        elif each.name.startswith("[internal]"):
            spent.add(Kind.CONTEXT, each.seconds)
    for stage, step in _number_runs(steps, stages):
        _add_step(spent, stage, *step)
    return spent.phases(ended - begun)


def _add_step(spent: Spent, key: str | None, match: re.Match[str], vertex: _Vertex) -> None:
    if key is not None:
        spent.add(Kind.RUN, vertex.seconds, key, _title(match["word"] + match["rest"]))
    else:
        spent.add(Kind.BASE if match["word"] == "FROM" else Kind.COPY, vertex.seconds)


def _number_runs(
    steps: Iterable[tuple[re.Match[str], _Vertex]], stages: Sequence[str]
) -> Iterable[tuple[str | None, tuple[re.Match[str], _Vertex]]]:
    """Yield steps in the Dockerfile's order, each with the key of a RUN step, or None."""
    ordered = sorted(steps, key=lambda step: (_stage_number(step[0]["stage"], stages), int(step[0]["number"])))
    counts: dict[int, int] = {}
    for match, vertex in ordered:
        stage = _stage_number(match["stage"], stages)
        if match["word"] != "RUN":
            yield None, (match, vertex)
            continue
        counts[stage] = counts.get(stage, 0) + 1
        yield _run_key(stage, counts[stage]), (match, vertex)


def _run_key(stage: int, number: int) -> str:
    return f"run {stage + 1}.{number:02}"


def _stage_number(name: str | None, stages: Sequence[str]) -> int:
    if name is None:
        return max(len(stages) - 1, 0)
    if name.lower() in stages:
        return list(stages).index(name.lower())
    unnamed = _UNNAMED.fullmatch(name)
    return int(unnamed[1]) if unnamed else 0


def _read_vertices(lines: Iterable[Line]) -> dict[str, _Vertex]:
    found: dict[str, _Vertex] = {}
    for status in _read_objects(line.text for line in lines):
        for data in status.get("vertexes") or ():
            vertex = found.setdefault(str(data.get("digest")), _Vertex())
            vertex.name = str(data.get("name") or vertex.name)
            if data.get("started") and vertex.started is None:
                vertex.started = _seconds(data["started"])
            if data.get("completed"):
                vertex.completed = _seconds(data["completed"])
    return found


def _read_objects(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects among other lines."""
    return (part for part in _read_parts(lines) if isinstance(part, dict))


def _read_parts(lines: Iterable[str]) -> Iterator[str | dict[str, Any]]:
    """Yield JSON objects, one on a line, or indented over several, as buildx 0.13 writes them, and other lines."""
    held: list[str] = []
    for line in lines:
        if not held and not line.startswith("{"):
            yield line  # somebody else's
            continue
        held.append(line)
        if line.startswith("}") or (len(held) == 1 and line.endswith("}")):
            with suppress(ValueError):
                yield json.loads("\n".join(held))
            held.clear()


def read_words(lines: Iterable[Line]) -> Iterator[str]:
    """Yield a build's lines as a person reads them: of BuildKit's JSON what the steps wrote, and how they failed."""
    for part in _read_parts(line.text for line in lines):
        if isinstance(part, str):
            yield part
            continue
        for log in part.get("logs") or ():
            yield from b64decode(log.get("data") or "").decode(errors="replace").splitlines()
        for vertex in part.get("vertexes") or ():
            if vertex.get("error"):
                yield f"{vertex.get('name')}: {vertex['error']}"


def _seconds(stamp: str) -> float:
    return datetime.fromisoformat(stamp).timestamp()


def _title(text: str) -> str:
    return " ".join(text.split())


_BUILDAH_STEP = re.compile(r"^(?:\[(?P<stage>\d+)/\d+\] )?STEP \d+/\d+: (?P<word>\w+)(?P<rest>.*)$")
_COMMIT = re.compile(r"^(?:\[\d+/\d+\] )?COMMIT\b")


def read_buildah(lines: Sequence[Line], begun: float, ended: float) -> tuple[Phase, ...]:
    """Return the phases of a build by the lines that buildah wrote; a step lasts until the next one begins.

    What comes before the first step is the context's, what comes after the last COMMIT the export's.
    """
    spent = Spent()
    marks = [(line.at, match) for line in lines if (match := _BUILDAH_STEP.match(line.text))]
    commits = [line.at for line in lines if _COMMIT.match(line.text)]
    if not marks:
        return spent.phases(ended - begun)
    exported = commits[-1] if commits else ended
    spent.add(Kind.CONTEXT, marks[0][0] - begun)
    spent.add(Kind.EXPORT, ended - exported)
    turns = sorted([*(at for at, _ in marks), *commits, exported])
    counts: dict[int, int] = {}
    for at, match in marks:
        end = next(turn for turn in turns if turn > at or turn == exported)
        stage, word = int(match["stage"] or 1) - 1, match["word"].upper()
        if word == "RUN":
            counts[stage] = counts.get(stage, 0) + 1
            spent.add(Kind.RUN, end - at, _run_key(stage, counts[stage]), _title(match["word"] + match["rest"]))
        else:
            spent.add(Kind.BASE if word == "FROM" else Kind.COPY, end - at)
    return spent.phases(ended - begun)
