"""The recipe of a comparison: turns, warming up, and what becomes of the runs."""

from __future__ import annotations

import os
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import pytest

from tests.unit.listener import Listener
from vmbuild import compare
from vmbuild.bench import sampler
from vmbuild.bench.phases import Kind, Line, Phase
from vmbuild.bench.result import Failure, Report
from vmbuild.bench.runner import Command, Measured, RunFailedError
from vmbuild.bench.sampler import Taken
from vmbuild.bench.workload import Workload
from vmbuild.errors import MachineError
from vmbuild.model import GIB, Home, MachineRequest
from vmbuild.report import Reporter, SilentReporter
from vmbuild.sides import Asked, Side

PHASE = Phase("run 1.01", Kind.RUN, "RUN true", 1.0)


class Turns:
    """Sides that do nothing, and whose turn it was."""

    def __init__(self, *names: str) -> None:
        self.log: list[str] = []
        self.waited_s: list[float] = []
        self.sides = [self._side(name) for name in names]
        self.closed = False

    def _side(self, name: str) -> Side:
        def run(output: Path) -> Measured:
            assert not output.exists(), "an archive of the run before is in the way"
            output.write_bytes(b"x" * 10)
            self.log.append(name)
            others = 5.0 if len(self.log) == 3 else 0.0
            return Measured(1.8e9, 1.8e9 + 2, (), Taken(2.0, 1.0, 100, others, 2, ()))

        return Side(name, run, lambda _: (PHASE,), lambda: None, lambda: {"qemu": "10.0.2"})

    def wait_quiet(self, limit_s: float) -> bool:
        """Stand in for `sampler.wait_quiet`."""
        self.waited_s.append(limit_s)
        return True

    def open(self, *args: object) -> list[Side]:
        """Stand in for `sides.open_sides`."""
        until_done = args[-1]
        assert isinstance(until_done, ExitStack)
        until_done.callback(setattr, self, "closed", True)
        return self.sides


@pytest.fixture
def work(tmp_path: Path) -> Workload:
    (tmp_path / "Dockerfile").write_text("FROM scratch\n")
    return Workload("it", tmp_path, tmp_path / "Dockerfile", runs=2)


def go(work: Workload, home: Path, *, cpus: int = 1, report: Reporter | None = None) -> Report:
    request = MachineRequest("bench", cpus, 2048, GIB, "debian-13-arm64")
    asked = Asked((work,), ("vm", "user"), "auto", "disk", "vmbuild bench", quiet_s=3)
    *_, last = compare.compare(request, asked, Home(home, home), report or SilentReporter())
    return last


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> Turns:
    found = Turns("vm", "user")
    monkeypatch.setattr(compare, "open_sides", found.open)
    monkeypatch.setattr(sampler, "wait_quiet", found.wait_quiet)
    return found


def test_sides_take_turns_and_the_first_round_does_not_count(work: Workload, turns: Turns, tmp_path: Path) -> None:
    report = go(work, tmp_path)
    assert turns.log == ["vm", "user"] * 3
    assert turns.waited_s == [3.0] * 6
    (result,) = report.results
    assert [(run.side, run.number) for run in result.runs] == [("vm", 1), ("user", 1), ("vm", 2), ("user", 2)]
    assert turns.closed


def test_a_run_keeps_what_it_took(work: Workload, turns: Turns, tmp_path: Path) -> None:
    (result,) = go(work, tmp_path).results
    first, second, *_ = result.runs
    assert first.disturbed and not second.disturbed
    assert (first.seconds, first.cpu_s, first.archive_bytes, first.phases) == (2.0, 1.0, 10, (PHASE,))
    assert result.side_facts["vm"] == {"what": "the machine, running already", "qemu": "10.0.2"}


def test_both_sides_run_on_the_machines_number_of_cpus(work: Workload, turns: Turns, tmp_path: Path) -> None:
    usable = os.sched_getaffinity(0)
    seen: list[set[int]] = []
    run = turns.sides[0].run

    def looking(output: Path) -> Measured:
        seen.append(os.sched_getaffinity(0))
        return run(output)

    object.__setattr__(turns.sides[0], "run", looking)
    go(work, tmp_path, cpus=1)
    assert {len(each) for each in seen} == {1}
    assert os.sched_getaffinity(0) == usable


def failing(turns: Turns, index: int, *, at_turn: int) -> None:
    """Let a side's build fail at one of its turns."""
    run, turn = turns.sides[index].run, count(1)

    def fail(output: Path) -> Measured:
        if next(turn) == at_turn:
            raise RunFailedError(Command(["make"]), 2, 1.5, [Line(0.0, "make: *** all is lost")])
        return run(output)

    object.__setattr__(turns.sides[index], "run", fail)


@pytest.mark.parametrize(
    ("at_turn", "log", "runs"),
    [
        (1, ["vm"] * 3, [("vm", 1), ("vm", 2)]),
        (3, ["vm", "user"] * 2 + ["vm"], [("vm", 1), ("user", 1), ("vm", 2)]),
    ],
)
def test_a_side_that_fails_has_no_more_turns_and_the_other_goes_on(
    work: Workload, turns: Turns, tmp_path: Path, at_turn: int, log: list[str], runs: list[tuple[str, int]]
) -> None:
    failing(turns, 1, at_turn=at_turn)
    listener = Listener()
    (result,) = go(work, tmp_path, report=listener).results
    assert turns.log == log
    assert [(run.side, run.number) for run in result.runs] == runs
    assert result.failures == (Failure("user", at_turn - 1, 1.5, ("make: *** all is lost",)),)
    assert any("the build failed after 1.5 s" in line for line in listener.heard)


def test_where_every_side_fails_the_next_workload_has_its_turn(work: Workload, turns: Turns, tmp_path: Path) -> None:
    failing(turns, 0, at_turn=1)
    failing(turns, 1, at_turn=1)
    request = MachineRequest("bench", 1, 2048, GIB, "debian-13-arm64")
    asked = Asked((work, work), ("vm", "user"), "auto", "disk", "vmbuild bench")
    first, second = compare.compare(request, asked, Home(tmp_path, tmp_path), SilentReporter())
    assert [(each.side, each.run) for each in first.results[0].failures] == [
        ("vm", "warming up"),
        ("user", "warming up"),
    ]
    assert first.results[0].runs == ()
    assert second.results[0] is first.results[0]
    assert len(second.results[1].runs) == 4


def test_what_cannot_be_prepared_ends_it_all_and_takes_the_machines_down(
    work: Workload, turns: Turns, tmp_path: Path
) -> None:
    def fail() -> None:
        raise MachineError("QEMU did not start")

    object.__setattr__(turns.sides[1], "before", fail)
    usable = os.sched_getaffinity(0)
    with pytest.raises(MachineError):
        go(work, tmp_path)
    assert turns.closed
    assert os.sched_getaffinity(0) == usable
