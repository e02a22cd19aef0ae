"""The recipe of a comparison: the same build, in turns, in a machine and under user-mode emulation, and what it took.

Every run is a program that is watched from outside, as a user would start it; nothing is measured from within.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from vmbuild.bench import facts, sampler
from vmbuild.bench.result import Failure, Report, Result, Run, run_name
from vmbuild.bench.runner import RunFailedError
from vmbuild.bench.workload import Workload
from vmbuild.model import Home, MachineRequest
from vmbuild.report import Reporter
from vmbuild.sides import SIDES, Asked, Side, open_sides
from vmbuild.whole import hash_file


def compare(request: MachineRequest, asked: Asked, home: Home, report: Reporter) -> Iterator[Report]:
    """Build each workload on each side, in turns; yield what that took: of the first, of the first two, and so on.

    A side whose build fails has no more turns: that is a result too.
    """
    found = Report(time.time(), version("vmbuild"), asked.command, facts.host_facts(), ())
    with _on_cpus(request.cpus):
        for work in asked.workloads:
            found = replace(found, results=(*found.results, _compare_one(request, asked, work, home, report)))
            yield found


@contextmanager
def _on_cpus(count: int) -> Iterator[None]:
    """Run what is started here, on either side, on so many of the host's CPUs; all where it has fewer."""
    usable = os.sched_getaffinity(0)
    os.sched_setaffinity(0, set(sorted(usable)[:count]))
    try:
        yield
    finally:
        os.sched_setaffinity(0, usable)


def _compare_one(request: MachineRequest, asked: Asked, work: Workload, home: Home, report: Reporter) -> Result:
    report.step(
        f"{work.name} for {work.platform}: {', '.join(asked.sides)}, {work.runs} runs each after one to warm up"
    )
    with tempfile.TemporaryDirectory(prefix="vmbuild-bench-") as folder, ExitStack() as until_done:
        sides = open_sides(request, asked, work, home, report, Path(folder), until_done)
        runs, failures = list[Run](), dict[str, Failure]()
        for number in range(work.runs + 1):
            for side in sides:
                if side.name in failures:
                    continue
                try:
                    runs += _run_once(side, number, Path(folder) / "image.tar", asked.quiet_s, report)
                except RunFailedError as error:
                    failures[side.name] = Failure(side.name, number, error.seconds, error.words)
                    report.warn(f"{side.name}, {run_name(number)}: the build failed after {error.seconds:.1f} s")
        side_facts = {side.name: {"what": SIDES[side.name].what, **side.facts()} for side in sides}
    return Result(
        name=work.name,
        platform=work.platform,
        description=work.description,
        cpus=request.cpus,
        memory_mib=request.memory_mib,
        build_args=work.build_args,
        dockerfile_sha256=hash_file(work.dockerfile),
        sides=tuple(side.name for side in sides),
        side_facts=side_facts,
        runs=tuple(runs),
        failures=tuple(failures.values()),
    )


def _run_once(side: Side, number: int, output: Path, quiet_s: float, report: Reporter) -> list[Run]:
    """Make a run; the first, which warms up, counts for nothing. Raises RunFailedError."""
    side.before()
    output.unlink(missing_ok=True)
    is_quiet = sampler.wait_quiet(quiet_s)
    measured = side.run(output)
    taken = measured.taken
    doubt = _doubt(taken, is_quiet=is_quiet)
    report.step(f"{side.name}, {run_name(number)}: {taken.seconds:.1f} s, {taken.cpu_s:.1f} s of CPU{doubt}")
    if number == 0:
        return []
    size = output.stat().st_size
    return [
        Run(
            side=side.name,
            number=number,
            started_at=measured.begun,
            seconds=taken.seconds,
            cpu_s=taken.cpu_s,
            peak_memory_bytes=taken.peak_memory_bytes,
            other_cpu_s=taken.other_cpu_s,
            disturbed=taken.is_disturbed,
            archive_bytes=size,
            phases=side.read(measured),
            samples=taken.samples,
        )
    ]


def _doubt(taken: sampler.Taken, *, is_quiet: bool) -> str:
    """Return what speaks against a run, behind its figures."""
    if taken.is_disturbed:
        return " (other load on this host)"
    return "" if is_quiet else " (the host did not become idle)"
