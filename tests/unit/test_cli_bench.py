"""The command line of the comparison."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.bench.examples import make_failed, make_report, make_result
from vmbuild import compare
from vmbuild.bench.result import Report, Result
from vmbuild.cli.program import run
from vmbuild.errors import BuildError, MachineError, UsageError
from vmbuild.model import Home, MachineRequest
from vmbuild.sides import Asked


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for key in ("CACHE", "STATE"):
        monkeypatch.setenv(f"VMBUILD_{key}_DIR", str(tmp_path / key.lower()))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("VMBUILD_NAME", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Dockerfile").write_text("FROM debian:trixie-slim\nRUN true\n")
    return tmp_path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is compared, by a comparison that is over at once."""
    calls: list[Any] = []

    def fake(request: MachineRequest, what: Asked, home: Home, report: object) -> Iterator[Report]:
        calls.append((request, what))
        yield make_report()

    monkeypatch.setattr(compare, "compare", fake)
    return calls


def test_a_context_is_compared_by_defaults(asked: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench"]) == 0
    ((request, what),) = asked
    assert request.name == "bench"
    assert (what.sides, what.user_runner) == (("vm", "user"), "auto")
    assert [(work.runs, work.platform) for work in what.workloads] == [(3, "linux/arm64")]
    out = capsys.readouterr()
    assert "Whole build" in out.out
    assert "0.52 [0.49, 0.56]" in out.out
    assert "vm, run 2: other load" in out.err


def test_options_reach_the_comparison(asked: list[Any]) -> None:
    options = ["--against", "user, vm-cold", "--runs", "7", "--user-runner", "chroot", "--platform", "linux/arm/v7"]
    options += ["--quiet-limit", "1.5"]
    assert run(["bench", ".", *options, "--build-arg", "A=1=2", "--name", "mine", "--cpus", "3"]) == 0
    ((request, what),) = asked
    assert (request.name, request.cpus) == ("mine", 3)
    assert (what.sides, what.user_runner, what.quiet_s) == (("vm", "user", "vm-cold"), "chroot", 1.5)
    (work,) = what.workloads
    assert (work.runs, work.platform, work.build_args) == (7, "linux/arm/v7", {"A": "1=2"})


def test_the_report_is_a_page_and_its_data(asked: list[Any], here: Path) -> None:
    assert run(["bench", "--report", "found", "--json", "data.json"]) == 0
    assert (here / "found/index.html").read_text().startswith("<!doctype html>")
    data = json.loads((here / "found/report.json").read_text())
    assert data == json.loads((here / "data.json").read_text())


def test_json_on_standard_output_is_alone_there(asked: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["schema"] == 1


def have_found(monkeypatch: pytest.MonkeyPatch, *results: Result, then: Exception | None = None) -> None:
    """Let the comparison find these one after the other, and then end or fail."""

    def fake(*_: object) -> Iterator[Report]:
        for count in range(1, len(results) + 1):
            yield make_report(*results[:count])
        if then is not None:
            raise then

    monkeypatch.setattr(compare, "compare", fake)


def test_a_build_that_only_the_machine_can_do_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    have_found(monkeypatch, make_failed("user"))
    assert run(["bench"]) == 0
    out = capsys.readouterr()
    assert re.search(r"^Whole build +22\.0 s \(21\.0 s to 23\.0 s\) +- +- *$", out.out, re.MULTILINE)
    assert "user, warming up: the build failed after 61 s\n    word 5\n" in out.err
    assert "word 6" not in out.err


def test_a_build_that_the_machine_cannot_do_is_an_error_after_all_was_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    have_found(monkeypatch, make_failed("vm"), make_result("other"))
    assert run(["bench", "--report", "found"]) == BuildError.exit_code
    assert "error: vm could not build hello, linux/arm64\n" in capsys.readouterr().err
    assert len(json.loads((here / "found/report.json").read_text())["results"]) == 2


def test_what_ends_a_suite_does_not_cost_what_it_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    have_found(monkeypatch, make_result("one"), then=MachineError("QEMU did not start"))
    assert run(["bench", "--report", "found", "--json", "data.json"]) == MachineError.exit_code
    out = capsys.readouterr()
    assert "one, linux/arm64" in out.out
    assert "The report is found/index.html." in out.err
    for file in ("found/report.json", "data.json"):
        assert [each["name"] for each in json.loads((here / file).read_text())["results"]] == ["one"]


def test_a_suite_is_read_from_a_folder(asked: list[Any], here: Path) -> None:
    (here / "one").mkdir()
    (here / "one/Dockerfile").write_text("FROM scratch\n")
    (here / "one/bench.toml").write_text("runs = 2\n")
    assert run(["bench", "--suite", str(here)]) == 0
    assert [work.name for work in asked[0][1].workloads] == ["one"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--against", "native-cross"], "not measured"),
        (["--against", "docker"], "nothing is called 'docker'"),
        (["--against", "user,user"], "compared with itself"),
        (["--side", "user", "--against", "vm"], "is no machine"),
        (["--build-arg", "A"], "has no value"),
        (["--json", "nowhere/x.json"], "cannot write"),
        (["--report", "nowhere/x"], "cannot make"),
        (["elsewhere"], "is not a folder"),
        (["--suite"], "no workload"),
    ],
)
def test_what_cannot_be_is_said_before_anything_runs(
    asked: list[Any], capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    assert run(["bench", *options]) == UsageError.exit_code
    assert words in capsys.readouterr().err
    assert asked == []
