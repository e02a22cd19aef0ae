"""What a build spent its time on, by what two builders wrote."""

from __future__ import annotations

import json
from base64 import b64encode
from datetime import UTC, datetime

import pytest

from vmbuild.bench.phases import Line, Phase, read_buildah, read_buildkit, read_words

BEGUN = 1_800_000_000.0


def stamp(seconds: float) -> str:
    return datetime.fromtimestamp(BEGUN + seconds, UTC).isoformat().replace("+00:00", "Z")


def status(name: str, started: float, completed: float | None) -> Line:
    vertex = {"digest": f"sha256:{name}", "name": name, "started": stamp(started)}
    if completed is not None:
        vertex["completed"] = stamp(completed)
    return Line(BEGUN, json.dumps({"vertexes": [vertex]}))


BUILDKIT = [
    Line(BEGUN, "warning: somebody else's line"),
    Line(BEGUN, json.dumps({"vertexes": [{"digest": "sha256:x", "name": "[last 9/9] RUN never"}]})),
    Line(BEGUN, json.dumps({"logs": [{"vertex": "x", "data": "aGk="}]})),
    status("[internal] load build definition from Dockerfile", 2.0, 2.5),
    status("[internal] load metadata for docker.io/library/debian:trixie-slim", 2.5, 2.75),
    status("[internal] load build context", 3.0, 3.25),
    status("[build 1/4] FROM docker.io/library/debian:trixie-slim", 3.0, 3.5),
    status("[build 2/4] RUN first     && more", 4.0, None),
    status("[build 2/4] RUN first     && more", 4.0, 10.0),
    status("[build 3/4] WORKDIR /src", 10.0, 10.5),
    status("[build 4/4] RUN second", 10.5, 12.5),
    status("[stage-1 2/3] RUN third", 4.0, 6.0),
    status("[stage-1 3/3] COPY --from=build /a /a", 12.5, 13.0),
    status("exporting to image", 13.0, 14.0),
]


def by_key(phases: tuple[Phase, ...]) -> dict[str, float]:
    return {phase.key: round(phase.seconds, 2) for phase in phases}


def test_buildkits_vertices_become_phases() -> None:
    phases = read_buildkit(BUILDKIT, ("build", ""), BEGUN, BEGUN + 16)
    assert by_key(phases) == {
        "context": 2.0 + 0.5 + 0.25,
        "base": 0.25 + 0.5,
        "run 1.01": 6.0,
        "run 1.02": 2.0,
        "run 2.01": 2.0,
        "copy": 0.5 + 0.5,
        "export": 3.0,
        "rest": 0.0,
    }
    assert [phase.title for phase in phases if phase.kind == "run"] == ["RUN first && more", "RUN second", "RUN third"]


def test_indented_json_is_the_same() -> None:
    indented = []
    for each in BUILDKIT:
        text = json.dumps(json.loads(each.text), indent=2) if each.text.startswith("{") else each.text
        indented += [Line(each.at, part) for part in text.splitlines()]
    assert len(indented) > 5 * len(BUILDKIT)
    stages = ("build", "")
    assert read_buildkit(indented, stages, BEGUN, BEGUN + 16) == read_buildkit(BUILDKIT, stages, BEGUN, BEGUN + 16)


def test_what_a_person_reads_are_the_words_of_the_steps_and_why_they_failed() -> None:
    failed = {"vertexes": [{"digest": "sha256:x", "name": "[2/2] RUN make", "error": "exit code: 2"}]}
    said = {"logs": [{"vertex": "x", "data": b64encode(b"cc: no\ncc: at all\n").decode()}, {"vertex": "x"}]}
    indented = [Line(BEGUN, text) for text in json.dumps(said, indent=2).splitlines()]
    lines = [*BUILDKIT, *indented, Line(BEGUN, json.dumps(failed)), Line(BEGUN, "error: it failed")]
    assert list(read_words(lines)) == [
        "warning: somebody else's line",
        "hi",
        "cc: no",
        "cc: at all",
        "[2/2] RUN make: exit code: 2",
        "error: it failed",
    ]


def test_one_stage_has_no_name() -> None:
    lines = [status("[1/2] FROM x", 1.0, 2.0), status("[2/2] RUN it", 2.0, 5.0)]
    assert by_key(read_buildkit(lines, ("",), BEGUN, BEGUN + 6))["run 1.01"] == 3.0


def test_a_stage_for_another_platform_is_the_same_stage() -> None:
    lines = [status("[linux/arm64 build 2/2] RUN it", 2.0, 5.0)]
    assert by_key(read_buildkit(lines, ("x", "build"), BEGUN, BEGUN + 6))["run 2.01"] == 3.0


def line(seconds: float, text: str) -> Line:
    return Line(BEGUN + seconds, text)


BUILDAH = [
    line(0.5, "[1/2] STEP 1/4: FROM debian:trixie-slim AS build"),
    line(0.75, "[1/2] STEP 2/4: RUN first     && more"),
    line(3.0, "STEP by step, says the program"),
    line(6.75, "[1/2] STEP 3/4: WORKDIR /src"),
    line(7.0, "[1/2] STEP 4/4: RUN second"),
    line(9.0, "[2/2] STEP 1/3: FROM debian:trixie-slim"),
    line(9.25, "[2/2] STEP 2/3: RUN third"),
    line(10.0, "[2/2] STEP 3/3: COPY --from=build /a /a"),
    line(10.5, "[2/2] COMMIT localhost/vmbuild-bench:latest"),
]


def test_buildahs_lines_become_the_same_phases() -> None:
    phases = read_buildah(BUILDAH, BEGUN, BEGUN + 12)
    assert by_key(phases) == {
        "context": 0.5,
        "base": 0.25 + 0.25,
        "run 1.01": 6.0,
        "run 1.02": 2.0,
        "run 2.01": 0.75,
        "copy": 0.25 + 0.5,
        "export": 1.5,
        "rest": 0.0,
    }


def test_both_builders_call_the_same_steps_the_same() -> None:
    ours = read_buildkit(BUILDKIT, ("build", ""), BEGUN, BEGUN + 16)
    theirs = read_buildah(BUILDAH, BEGUN, BEGUN + 12)
    assert [(phase.key, phase.title) for phase in ours] == [(phase.key, phase.title) for phase in theirs]


def test_a_stage_that_is_committed_ends_there() -> None:
    lines = [*BUILDAH[:5], line(8.0, "[1/2] COMMIT"), *BUILDAH[5:]]
    assert by_key(read_buildah(lines, BEGUN, BEGUN + 12))["run 1.02"] == 1.0


@pytest.mark.parametrize("lines", [[], [line(1, "nothing of note")]])
def test_what_nobody_understands_is_all_rest(lines: list[Line]) -> None:
    assert by_key(read_buildah(lines, BEGUN, BEGUN + 12)) == {"rest": 12.0}
    assert by_key(read_buildkit(lines, (), BEGUN, BEGUN + 12)) == {"rest": 12.0}


def test_phases_add_up_to_the_whole_unless_stages_ran_side_by_side() -> None:
    assert sum(phase.seconds for phase in read_buildah(BUILDAH, BEGUN, BEGUN + 12)) == pytest.approx(12)
