"""The command line of the comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.bench.examples import make_report
from vmbuild import compare
from vmbuild.bench.result import Report
from vmbuild.cli.program import run
from vmbuild.errors import UsageError
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

    def fake(request: MachineRequest, what: Asked, home: Home, report: object) -> Report:
        calls.append((request, what))
        return make_report()

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
