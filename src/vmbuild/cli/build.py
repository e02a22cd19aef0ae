"""The commands that make container images: build, follow a build, go on with one, make a base image."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

import click

from vmbuild.cli.completion import complete_platforms
from vmbuild.cli.options import (
    as_json,
    machine_options,
    name_argument,
    name_option,
    read_settings,
    start_options,
    with_secrets_option,
)
from vmbuild.cli.ways_in import take_inputs, ways_in
from vmbuild.cli.ways_out import BuildCommand, check_outputs, output_options, read_outputs, tell_delivered
from vmbuild.errors import UsageError
from vmbuild.model import BuildRequest, BuildResult, parse_platforms
from vmbuild.outputs import STDOUT
from vmbuild.settings import BUILD_LIMITS, Settings

if TYPE_CHECKING:
    from vmbuild.guard import Limits

F = TypeVar("F", bound=Callable[..., Any])

limit_options = machine_options(*BUILD_LIMITS)


def bundle_options(command: F) -> F:
    """Give a click command the options of the bundle that a time limit makes."""
    text = "Where the bundle goes that --time-limit makes; without: stay here."
    return click.option("--suspend-to", metavar="FILE|DIR", help=text)(with_secrets_option(command))


def platform_option(text: str) -> Callable[[F], F]:
    """Return a decorator that gives a click command the option of its platforms."""
    return click.option(
        *("--platform", "platforms"),
        metavar="PLATFORM[,...]",
        shell_complete=complete_platforms,
        callback=lambda _context, _option, value: parse_platforms(value) if value is not None else (),
        help=f"{text} [default: the machine's own]",
    )


@click.command("build", cls=BuildCommand)
@click.argument("context", metavar="[PATH|-|URL]", default=".")
@click.option("-t", "--tag", "tags", multiple=True, metavar="NAME", help="Name of the container image; repeatable.")
@click.option("-f", "--file", "dockerfile", metavar="FILE", help="The Dockerfile; - reads it from standard input.")
@click.option("--build-arg", "build_args", multiple=True, metavar="KEY[=VALUE]", help="A build argument; repeatable.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="A label; repeatable.")
@click.option("--target", metavar="STAGE", help="Build this stage and stop.")
@platform_option("The platforms to build for, with commas between; several make one image with an index.")
@click.option("--no-cache", is_flag=True, help="Do not use the build cache.")
@click.option("--pull", is_flag=True, help="Ask the registry for newer base images.")
@click.option(
    "--progress",
    type=click.Choice(["auto", "plain", "tty", "rawjson"]),
    default="auto",
    show_default=True,
    help="How BuildKit shows what it does; rawjson is for programs.",
)
@output_options
@click.option("--iidfile", type=click.Path(path_type=Path), metavar="FILE", help="Write the image id to a file.")
@click.option("--metadata-file", type=click.Path(path_type=Path), metavar="FILE", help="Write BuildKit's metadata.")
@click.option("-q", "--quiet", is_flag=True, help="Print the image id only.")
@click.option("--oom-retry", is_flag=True, help="Build again with more memory what runs out of it.")
@ways_in
@limit_options
@bundle_options
@start_options
@as_json
def build_command(
    as_json: bool, quiet: bool, progress: str, suspend_to: str | None, with_secrets: bool, **flags: Any
) -> None:
    """Build a container image in the machine, starting it when it does not run."""
    from vmbuild import build, carry, ui

    begun = time.monotonic()
    given = take_inputs(flags)
    outputs, attests = read_outputs(flags)
    check_outputs(outputs, flags["tags"], as_json=as_json)
    job_keys = set(BuildRequest.__dataclass_fields__) & set(flags)
    job = {key: flags.pop(key) for key in job_keys}
    _check_job(job)
    found = read_settings(flags)
    terminal = _terminal(progress, quiet)
    request = BuildRequest(
        **{**job, "build_args": tuple(map(_from_environment, job["build_args"]))},
        outputs=outputs,
        attests=attests,
        progress="plain" if progress == "auto" and terminal is None else progress,
        terminal=terminal,
        quiet=quiet,
        inputs=given,
    )
    is_pure = progress == "rawjson"  # BuildKit's JSON alone, for a program to read
    reporter = ui.TerminalReporter(quiet=quiet or is_pure)
    limits = _limits(found, found["name"], suspend_to, begun, with_secrets=with_secrets)
    carry.check_secrets(limits, has_secrets=bool(given.secrets))
    with _standard_input() as stdin:
        machine = found.as_request()
        carried = limits.suspend_to is not None and not with_secrets
        machine = replace(machine, pass_on=replace(machine.pass_on, carried=carried))
        arguments = (machine, request, found.home(), reporter)
        result = carry.within(
            *(limits, found["name"], found.home(), reporter),
            lambda guard: build.build(*arguments, stdin=stdin, stdout=sys.stdout.buffer, watch=guard),
        )
    _show_result(result, as_json=as_json, quiet=quiet, silent=is_pure)


@click.command()
@name_argument
@name_option
@click.option("--build", "build_id", metavar="ID", help="Which build, where several run.")
@limit_options
@bundle_options
@as_json
def attach(
    positional: str | None,
    build_id: str | None,
    suspend_to: str | None,
    with_secrets: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Show a build that runs in the machine, whatever became of its command, and finish it as that would have."""
    from vmbuild import carry, follow, passing, ui

    begun = time.monotonic()
    found = read_settings(flags, positional)
    passing.trust_here(found.as_request())
    reporter = ui.TerminalReporter()
    arguments = (found["name"], build_id, found.home(), reporter)
    limits = _limits(found, found["name"], suspend_to, begun, with_secrets=with_secrets)
    carry.check_secrets(limits, has_secrets=carry.holds_secrets(found["name"], found.home()))
    result = carry.within(
        *(limits, found["name"], found.home(), reporter),
        lambda guard: follow.attach(*arguments, stdout=sys.stdout.buffer, watch=guard),
    )
    _show_end(result, as_json=as_json)


@click.command()
@click.argument("bundle", metavar="FILE|DIR", type=click.Path(path_type=Path))
@machine_options("name", "timeout", "mirror", "security_mirror")
@limit_options
@bundle_options
@click.option("--trusted", is_flag=True, help="Also push and load as the build in the bundle was asked to.")
@as_json
def resume(
    bundle: Path, suspend_to: str | None, with_secrets: bool, trusted: bool, as_json: bool, **flags: Any
) -> None:
    """Go on with the machine in a bundle, and finish the build in it as its command would have."""
    from vmbuild import carry, ui

    begun = time.monotonic()
    found = read_settings(flags)
    request = found.as_request()
    limits = _limits(found, carry.name_for(bundle, request), suspend_to, begun, with_secrets=with_secrets)
    arguments = (bundle, request, limits, found.home(), ui.TerminalReporter())
    result = carry.resume(*arguments, stdout=sys.stdout.buffer, trusted=trusted)
    _show_end(result, as_json=as_json)


@click.command()
@click.argument("reference", metavar="DEBIAN:SUITE-slim")
@platform_option("The platforms of the base image, with commas between; those made before stay.")
@click.option("--force", is_flag=True, help="Make it also when the machine has one by this name.")
@start_options
@as_json
def base(reference: str, platforms: tuple[str, ...], force: bool, as_json: bool, **flags: Any) -> None:
    """Make a Debian base image from signed packages, where no registry can be reached."""
    from vmbuild import build, ui

    found = read_settings(flags)
    reporter = ui.TerminalReporter()
    made = build.base(found.as_request(), reference, found.home(), reporter, platforms=platforms, force=force)
    if as_json:
        ui.print_json(made)
    else:
        ui.say(f"FROM {reference} works now for {', '.join(made.platforms)} ({made.image_id}).")


def _limits(found: Settings, name: str, suspend_to: str | None, begun: float, *, with_secrets: bool) -> Limits:
    """Return what a build in a machine may cost that was asked for at `begun`, on the monotonic clock."""
    from vmbuild import carry
    from vmbuild.guard import Limits

    seconds = found["time_limit"]
    if suspend_to is not None and seconds is None:
        raise UsageError("--suspend-to says where, but nothing says when", resolution="Add --time-limit, such as 45m.")
    limits = Limits(
        ends_at=None if seconds is None else begun + seconds,
        reserve_s=found["reserve"],
        suspend_to=carry.bundle_place(suspend_to, name) if suspend_to else None,
        with_secrets=with_secrets,
        stall_timeout_s=found["stall_timeout"],
    )
    carry.check_limits(limits, seconds)
    return limits


def _check_job(job: dict[str, Any]) -> None:
    if job["context"] == "-" and job["dockerfile"] == "-":
        raise UsageError(
            "standard input cannot be both the context and the Dockerfile", resolution="Give one of them as a file."
        )
    if job["oom_retry"] and "-" in (job["context"], job["dockerfile"]):
        raise UsageError("what comes on standard input cannot be built again", resolution="Leave --oom-retry out.")


def _from_environment(argument: str) -> str:
    """Return KEY=VALUE for a bare KEY, taken from the host's environment as docker does."""
    return argument if "=" in argument or argument not in os.environ else f"{argument}={os.environ[argument]}"


def _terminal(progress: str, quiet: bool) -> tuple[int, int] | None:
    if progress == "tty" or (progress == "auto" and not quiet and sys.stderr.isatty()):
        size = os.get_terminal_size(sys.stderr.fileno()) if sys.stderr.isatty() else os.terminal_size((100, 30))
        return size.columns, size.lines
    return None


def _standard_input() -> BinaryIO:
    """Return standard input unbuffered: a thread that waits in a buffered read keeps Python from ending."""
    return cast(BinaryIO, open(0, "rb", buffering=0, closefd=False))


def _show_result(result: BuildResult, *, as_json: bool, quiet: bool, silent: bool) -> None:
    from vmbuild import ui

    if as_json:
        ui.print_json(result)
    elif quiet and not any(each.where == STDOUT for each in result.outputs):
        click.echo(result.image_id)
    elif not quiet and not silent:
        done = "".join(f", {tell_delivered(each)}" for each in result.outputs)
        ui.say(f"Built {', '.join(result.tags) or result.image_id} in {result.seconds:.0f} s{done}.")


def _show_end(result: BuildResult | None, *, as_json: bool) -> None:
    from vmbuild import ui

    if result is not None:
        _show_result(result, as_json=as_json, quiet=False, silent=False)
    elif as_json:
        ui.print_json(None)
    else:
        ui.say("No build is left in it to finish.")
