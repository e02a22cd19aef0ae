"""Results to test with: made up, and always the same."""

from __future__ import annotations

from dataclasses import replace

from vmbuild.bench.phases import Kind, Phase
from vmbuild.bench.result import Failure, Report, Result, Run
from vmbuild.bench.sampler import Sample

STEP = 'RUN echo "<b>&" && make -j$(nproc)'


def make_run(side: str, number: int, seconds: float, *, disturbed: bool = False) -> Run:
    """Return a run whose one step takes all of its time but two seconds."""
    phases = (
        Phase("context", Kind.CONTEXT, "Start, context", 1.0),
        Phase("run 1.01", Kind.RUN, STEP, seconds - 2),
        Phase("export", Kind.EXPORT, "Export", 1.0),
    )
    samples = tuple(Sample(at / 2, 150.0, 400_000_000 + at) for at in range(1, int(2 * seconds)))
    return Run(side, number, 1.8e9, seconds, seconds * 1.5, 5 * 10**8, 0.1, disturbed, 10**8, phases, samples)


def make_result(name: str = "hello", ours: float = 20.0, theirs: float = 40.0) -> Result:
    """Return a result of three runs each."""
    runs = []
    for number in (1, 2, 3):
        runs.append(make_run("vm", number, ours + number, disturbed=number == 2))
        runs.append(make_run("user", number, theirs + number))
    facts = {"vm": {"what": "the machine", "qemu": "10.0.2"}, "user": {"what": "buildah", "qemu": "10.0.2"}}
    return Result(
        *(name, "linux/arm64", "Compiles.", 2, 2048, {"SIZE": "3"}, "ab" * 32, ("vm", "user"), facts, tuple(runs))
    )


def make_failed(side: str) -> Result:
    """Return a result of three runs of one side, the other's build having failed."""
    found = make_result()
    failure = Failure(side, 0, 61.2, tuple(f"word {each}" for each in (7, 6, 5, 2, 1, 0, "<&>" + "x" * 300)))
    return replace(found, runs=tuple(run for run in found.runs if run.side != side), failures=(failure,))


def make_report(*results: Result) -> Report:
    """Return a report of these results, of one without any."""
    return Report(1.8e9, "0.1.0", "vmbuild bench .", {"CPU": "<fast>"}, results or (make_result(),))
