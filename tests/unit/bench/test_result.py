"""What runs say together."""

from __future__ import annotations

import json

import pytest

from tests.unit.bench.examples import STEP, make_report, make_result
from vmbuild.bench.result import phase_rows, summary_rows, to_json


def test_the_whole_comes_first_with_its_ratio() -> None:
    total, cpu, memory = summary_rows(make_result())
    assert (total.title, cpu.title, memory.title, memory.unit) == ("Whole build", "CPU time", "Peak memory", "B")
    assert total.summaries["vm"].median == 22
    assert total.ratios["user"].value == pytest.approx(22 / 42)


def test_phases_come_in_the_order_of_a_build() -> None:
    rows = phase_rows(make_result())
    assert [row.key for row in rows] == ["context", "run 1.01", "export"]
    assert rows[1].title == STEP
    assert rows[1].ratios["user"].value == pytest.approx(20 / 40)


def test_a_phase_that_one_side_has_not_has_no_ratio() -> None:
    result = make_result()
    object.__setattr__(result.runs[0].phases[0], "key", "elsewhere")
    rows = {row.key: row for row in phase_rows(result)}
    assert set(rows["elsewhere"].summaries) == {"vm"}
    assert rows["elsewhere"].ratios == {}


def test_json_has_runs_and_what_they_say_together() -> None:
    data = json.loads(json.dumps(to_json(make_report())))
    assert data["schema"] == 1
    assert set(data) == {"schema", "made_at", "version", "command", "host", "results"}
    (result,) = data["results"]
    assert set(result) == {
        *("name", "platform", "description", "cpus", "memory_mib", "build_args", "dockerfile_sha256"),
        *("sides", "side_facts", "runs", "failures", "summary"),
    }
    assert set(result["runs"][0]) == {
        *("side", "number", "started_at", "seconds", "cpu_s", "peak_memory_bytes", "other_cpu_s", "disturbed"),
        *("archive_bytes", "phases", "samples"),
    }
    assert result["summary"][0]["ratios"]["user"]["value"] == pytest.approx(22 / 42)
