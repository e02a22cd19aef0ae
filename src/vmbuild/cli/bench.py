"""The command that compares full-system and user-mode emulation, and its table."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vmbuild.cli.options import read_settings, start_options
from vmbuild.errors import BuildError, UsageError
from vmbuild.model import format_size, parse_platforms

if TYPE_CHECKING:
    from vmbuild.bench.result import Report, Result, Row
    from vmbuild.bench.workload import Choice, Workload

NAME = "bench"
"""What the comparison's machines are called, with their side behind it; the user's own machine is left alone."""

PAGE, DATA = "index.html", "report.json"

SHOWN_LINES = 5
"""So much is shown of a build that failed; the report has more."""


@click.command("bench")
@click.argument("context", metavar="[CONTEXT]", default=".")
@click.option("--suite", is_flag=True, help="Measure every workload of a folder of contexts: those with a bench.toml.")
@click.option(
    "--side", default="vm", metavar="SIDE", help="What is compared: vm, vm-cold or vm-disk.", show_default=True
)
@click.option(
    "--against",
    default="user",
    metavar="SIDE[,...]",
    help="What with: user, native, vm-cold, vm-disk.",
    show_default=True,
)
@click.option(
    "--runs", type=click.IntRange(1, 100), metavar="N", help="Runs of each side, after one to warm up. [default: 3]"
)
@click.option(
    "--quiet-limit",
    type=click.FloatRange(min=0),
    default=20.0,
    metavar="SECONDS",
    help="How long each run may wait until the host is idle.",
    show_default=True,
)
@click.option("-f", "--file", "dockerfile", type=click.Path(path_type=Path), metavar="FILE", help="The Dockerfile.")
@click.option("--build-arg", "build_args", multiple=True, metavar="KEY=VALUE", help="A build argument; repeatable.")
@click.option("--target", metavar="STAGE", help="Build this stage and stop.")
@click.option(
    "--platform", "platforms", metavar="PLATFORM[,...]", help="Each is measured by itself. [default: linux/arm64]"
)
@click.option(
    "--user-runner",
    type=click.Choice(["auto", "host", "chroot", "docker"]),
    default="auto",
    show_default=True,
    help="host: buildah with the emulator that the host's kernel knows; chroot: with one in a user namespace of its "
    "own; docker: buildx on this host's Docker.",
)
@click.option(
    "--disk-image",
    metavar="IMAGE",
    default="debian-13-cloud-arm64",
    help="The guest image of vm-disk.",
    show_default=True,
)
@click.option(
    "--report", "folder", type=click.Path(path_type=Path), metavar="DIR", help=f"Write {PAGE} and {DATA} there."
)
@click.option("--json", "data_file", metavar="FILE|-", help="Write what was measured as JSON.")
@start_options
def bench_command(context: str, suite: bool, folder: Path | None, data_file: str | None, **flags: Any) -> None:
    """Compare builds in the machine with the same under user-mode emulation, in turns, phase by phase."""
    from vmbuild import compare, ui
    from vmbuild.bench import workload
    from vmbuild.bench.result import to_json
    from vmbuild.sides import Asked

    choice = _choice(flags)
    sides = _sides(flags.pop("side"), flags.pop("against"))
    runner, disk_image, quiet_s = (flags.pop(name) for name in ("user_runner", "disk_image", "quiet_limit"))
    read = workload.read_suite if suite else workload.read_context
    works: Sequence[Workload] = read(Path(context), choice)
    found = read_settings(flags)
    request = found.as_request()
    if "name" not in request.given:
        request = replace(request, name=NAME)
    _check_places(folder, data_file)
    asked = Asked(works, sides, runner, disk_image, shlex.join(["vmbuild", *sys.argv[1:]]), quiet_s)
    report = None
    try:
        for report in compare.compare(request, asked, found.home(), ui.TerminalReporter()):
            _write(report, folder, data_file)  # after each workload: what the next one meets must not cost it
            if data_file != "-":
                _show(report.results[-1])
    finally:
        if report is not None and folder is not None:
            ui.say(f"The report is {folder / PAGE}.")
    assert report is not None  # noqa: S101 - there is a workload
    if data_file == "-":
        ui.print_json(to_json(report))
    _check_built(report)


def _choice(flags: dict[str, Any]) -> Choice:
    from vmbuild.bench.workload import Choice

    arguments = {}
    for text in flags.pop("build_args"):
        key, given, value = text.partition("=")
        if not given:
            raise UsageError(f"the build argument {key} has no value", resolution="Write KEY=VALUE.")
        arguments[key] = value
    platforms = flags.pop("platforms")
    return Choice(
        dockerfile=flags.pop("dockerfile"),
        platforms=parse_platforms(platforms) if platforms else (),
        runs=flags.pop("runs"),
        build_args=arguments,
        target=flags.pop("target"),
    )


def _sides(first: str, against: str) -> tuple[str, ...]:
    """Return what is compared, in the order of a round. Raises UsageError for what cannot be."""
    from vmbuild import sides

    names = (first, *(name.strip() for name in against.split(",") if name.strip()))
    if "native-cross" in names:
        raise UsageError(
            "native-cross is not measured",
            details="A cross compiler needs another Dockerfile, and base images for the host: not the same build.",
            resolution="Measure that Dockerfile by itself, and compare the two reports.",
        )
    for name in names:
        if name not in sides.SIDES:
            raise UsageError(f"nothing is called {name!r}", resolution=f"Choose among {', '.join(sides.SIDES)}.")
        if names.count(name) > 1:
            raise UsageError(f"{name} cannot be compared with itself", resolution="Name each side once.")
    if sides.SIDES[first].runner is not None:
        raise UsageError(f"{first} is no machine", resolution="Give it to --against.")
    return names


def _check_places(folder: Path | None, data_file: str | None) -> None:
    """See that what is measured can be written, before it is."""
    if data_file not in (None, "-") and not Path(str(data_file)).absolute().parent.is_dir():
        raise UsageError(f"cannot write {data_file}", resolution="Name a file in a folder that exists.")
    if folder is not None and not folder.absolute().parent.is_dir():
        raise UsageError(f"cannot make {folder}", resolution="Name a folder in one that exists.")


def _write(report: Report, folder: Path | None, data_file: str | None) -> None:
    import json

    from vmbuild.bench import page
    from vmbuild.bench.result import to_json
    from vmbuild.whole import write_whole, writing_in

    text = json.dumps(to_json(report), indent=1).encode() + b"\n"
    places = [Path(data_file)] if data_file and data_file != "-" else []
    if folder is not None:
        with writing_in(folder):
            folder.mkdir(exist_ok=True)
        places.append(folder / DATA)
        write_whole(folder / PAGE, page.render(report).encode())
    for path in places:
        write_whole(path, text)


def _show(result: Result) -> None:
    from vmbuild import ui
    from vmbuild.bench.result import phase_rows, summary_rows

    first, *others = result.sides
    columns = [result.title, *result.sides, *(f"{first} / {side}" for side in others)]
    ui.print_table(columns, [_cells(row, result) for row in (*summary_rows(result), *phase_rows(result))])
    for run in result.runs:
        if run.disturbed:
            ui.say(f"  {run.side}, run {run.number}: other load on this host took {run.other_cpu_s:.0f} s of CPU time")
    for failure in result.failures:
        ui.say(f"  {failure.side}, {failure.run}: the build failed after {failure.seconds:.0f} s")
        for line in failure.words[-SHOWN_LINES:]:
            ui.say(f"    {line}")


def _check_built(report: Report) -> None:
    """Raise BuildError when the first side could not build everything; that another cannot is what one may look for."""
    failed = [(result, each) for result in report.results for each in result.failures if each.side == result.sides[0]]
    if failed:
        raise BuildError(
            f"{failed[0][1].side} could not build {'; '.join(result.title for result, _ in failed)}",
            details="\n".join(failed[0][1].words),
            resolution="What else was measured stands above, and in the report.",
        )


def _cells(row: Row, result: Result) -> tuple[object, ...]:
    cells: list[object] = [row.title if len(row.title) <= 48 else row.title[:45] + "..."]
    for side in result.sides:
        found = row.summaries.get(side)
        values = [_amount(value, row.unit) for value in (found.median, found.least, found.most)] if found else []
        cells.append(f"{values[0]} ({values[1]} to {values[2]})" if found else None)
    for side in result.sides[1:]:
        ratio = row.ratios.get(side)
        cells.append(f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]" if ratio else None)
    return tuple(cells)


def _amount(value: float, unit: str) -> str:
    return format_size(value) if unit == "B" else f"{value:.1f} s"
