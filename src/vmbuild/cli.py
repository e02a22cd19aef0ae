"""The commands, and the one place where an exception becomes an exit code.

Heavy modules (paramiko, requests, rich, qemu) are imported inside the commands: `vmbuild --help` is quick.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn, TypeVar, cast

import click

from vmbuild import settings as s
from vmbuild.errors import EXIT_CODES, INTERRUPTED, GuestImageError, HostError, HungUp, UsageError, VmbuildError
from vmbuild.model import MIB, BuildRequest, BuildResult, MachineStatus, format_size, parse_size
from vmbuild.settings import Settings, machine_options

if TYPE_CHECKING:
    from vmbuild.guard import Limits
    from vmbuild.machine.snapshot import Snapshot
    from vmbuild.ui import TerminalReporter
    from vmbuild.watch import Reading

F = TypeVar("F", bound=Callable[..., Any])
HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
as_json = click.option("--json", "as_json", is_flag=True, help="Print facts as JSON.")
start_options = machine_options(*s.COMMAND_LINE)
name_option = machine_options("name")
limit_options = machine_options(*s.BUILD_LIMITS)
suspend_to_option = click.option(
    "--suspend-to", metavar="FILE|DIR", help="Where the bundle goes that --time-limit makes; without: stay here."
)
name_argument = click.argument("positional", metavar="[NAME]", required=False)
LEAST_DELAY_S, MOST_DELAY_S = 0.1, 3600.0
TOP_COLUMNS = ("name", "state", "cpus", "cpu%", "load", "memory", "rss", "disk", "up", "ssh")


class Commands(click.Group):
    """The group: commands in the order in which people meet them, exit codes below them."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(name, each.get_short_help_str(200)) for name, each in self.commands.items()])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), meaning) for code, meaning in EXIT_CODES.items()])


@click.group(cls=Commands, context_settings=HELP)
@click.version_option(package_name="vmbuild", prog_name="vmbuild")
def app() -> None:
    """Build ARM container images on x86 hosts, in a full virtual machine."""


def _settings(flags: dict[str, Any], positional: str | None = None) -> Settings:
    if positional is not None and flags.get("name") not in (None, positional):
        raise UsageError(f"two names: {positional} and {flags['name']}", resolution="Give one.")
    given = {**flags, "name": positional or flags.get("name")}
    return s.resolve(given, os.environ, _current_folder())


def _current_folder() -> Path:
    try:
        return Path.cwd()
    except FileNotFoundError as error:
        raise HostError("the current folder does not exist any more", resolution="Go to another one.") from error


def _reporter(*, quiet: bool = False) -> TerminalReporter:
    from vmbuild.ui import TerminalReporter

    return TerminalReporter(quiet=quiet)


def _describe(status: MachineStatus) -> str:
    size = format_size((status.memory_mib or 0) * 1024 * 1024)
    return f"{status.cpus} CPUs, {size}, ssh 127.0.0.1:{status.ssh_port}"


@app.command()
@start_options
@as_json
def up(as_json: bool, **flags: Any) -> None:
    """Start the machine, or find it running; return when Docker answers."""
    from vmbuild import operate, ui

    found = _settings(flags)
    status = operate.up(found.as_request(), found.home(), _reporter())
    if as_json:
        ui.print_json(status)
    else:
        ui.say(f"The machine {status.name} is ready ({_describe(status)}).")


@app.command("build")
@click.argument("context", metavar="PATH|-|URL", default=".")
@click.option("-t", "--tag", "tags", multiple=True, metavar="NAME", help="Name of the container image; repeatable.")
@click.option("-f", "--file", "dockerfile", metavar="FILE", help="The Dockerfile; - reads it from standard input.")
@click.option("--build-arg", "build_args", multiple=True, metavar="KEY[=VALUE]", help="A build argument; repeatable.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="A label; repeatable.")
@click.option("--target", metavar="STAGE", help="Build this stage and stop.")
@click.option("--platform", default="linux/arm64", show_default=True, help="The platform to build for.")
@click.option("--no-cache", is_flag=True, help="Do not use the build cache.")
@click.option("--pull", is_flag=True, help="Ask the registry for newer base images.")
@click.option("--progress", type=click.Choice(["auto", "plain", "tty", "rawjson"]), default="auto", show_default=True)
@click.option("-o", "--output", metavar="FILE|-", help="Write the container image as a docker archive; - is stdout.")
@click.option("--iidfile", type=click.Path(path_type=Path), metavar="FILE", help="Write the image id to a file.")
@click.option("--metadata-file", type=click.Path(path_type=Path), metavar="FILE", help="Write BuildKit's metadata.")
@click.option("-q", "--quiet", is_flag=True, help="Print the image id only.")
@click.option("--oom-retry", is_flag=True, help="Build again with more memory what runs out of it.")
@limit_options
@suspend_to_option
@start_options
@as_json
def build_command(as_json: bool, quiet: bool, progress: str, suspend_to: str | None, **flags: Any) -> None:
    """Build a container image in the machine, starting it when it does not run."""
    from vmbuild import build, carry

    begun = time.monotonic()
    job_keys = set(BuildRequest.__dataclass_fields__) & set(flags)
    job = {key: flags.pop(key) for key in job_keys}
    _check_job(job, as_json)
    found = _settings(flags)
    terminal = _terminal(progress, quiet)
    request = BuildRequest(
        **{**job, "build_args": tuple(map(_from_environment, job["build_args"]))},
        progress="plain" if progress == "auto" and terminal is None else progress,
        terminal=terminal,
        quiet=quiet,
    )
    is_pure = progress == "rawjson"  # BuildKit's JSON alone, for a program to read
    reporter = _reporter(quiet=quiet or is_pure)
    limits = _limits(found, suspend_to, begun)
    with _standard_input() as stdin:
        arguments = (found.as_request(), request, found.home(), reporter)
        result = carry.within(
            *(limits, found["name"], found.home(), reporter),
            lambda guard: build.build(*arguments, stdin=stdin, stdout=sys.stdout.buffer, watch=guard),
        )
    _show_result(result, as_json=as_json, quiet=quiet, silent=is_pure)


def _limits(found: Settings, suspend_to: str | None, begun: float) -> Limits:
    """Return what a build may cost that was asked for at `begun`, on the monotonic clock."""
    from vmbuild import carry
    from vmbuild.guard import Limits

    seconds = found["time_limit"]
    if suspend_to is not None and seconds is None:
        raise UsageError("--suspend-to says where, but nothing says when", resolution="Add --time-limit, such as 45m.")
    limits = Limits(
        ends_at=None if seconds is None else begun + seconds,
        reserve_s=found["reserve"],
        suspend_to=carry.bundle_place(suspend_to, found["name"]) if suspend_to else None,
        stall_timeout_s=found["stall_timeout"],
    )
    carry.check_limits(limits, seconds)
    return limits


def _show_result(result: BuildResult, *, as_json: bool, quiet: bool, silent: bool) -> None:
    from vmbuild import ui

    if as_json:
        ui.print_json(result)
    elif quiet and result.output != "-":
        click.echo(result.image_id)
    elif not quiet and not silent:
        wrote = f", wrote {result.output} ({format_size(result.output_bytes)})" if result.output else ""
        ui.say(f"Built {', '.join(result.tags) or result.image_id} in {result.seconds:.0f} s{wrote}.")


@app.command()
@name_argument
@name_option
@click.option("--build", "build_id", metavar="ID", help="Which build, where several run.")
@limit_options
@suspend_to_option
@as_json
def attach(positional: str | None, build_id: str | None, suspend_to: str | None, as_json: bool, **flags: Any) -> None:
    """Show a build that runs in the machine, whatever became of its command, and finish it as that would have."""
    from vmbuild import carry, follow

    begun = time.monotonic()
    found = _settings(flags, positional)
    reporter = _reporter()
    arguments = (found["name"], build_id, found.home(), reporter)
    result = carry.within(
        *(_limits(found, suspend_to, begun), found["name"], found.home(), reporter),
        lambda guard: follow.attach(*arguments, stdout=sys.stdout.buffer, watch=guard),
    )
    _show_end(result, as_json=as_json)


@app.command()
@click.argument("bundle", metavar="FILE|DIR", type=click.Path(path_type=Path))
@machine_options("name", "timeout", "mirror", "security_mirror")
@limit_options
@suspend_to_option
@as_json
def resume(bundle: Path, suspend_to: str | None, as_json: bool, **flags: Any) -> None:
    """Go on with the machine in a bundle, and finish the build in it as its command would have."""
    from vmbuild import carry

    begun = time.monotonic()
    found = _settings(flags)
    limits = _limits(found, suspend_to, begun)
    result = carry.resume(bundle, found.as_request(), limits, found.home(), _reporter(), stdout=sys.stdout.buffer)
    _show_end(result, as_json=as_json)


def _show_end(result: BuildResult | None, *, as_json: bool) -> None:
    from vmbuild import ui

    if result is not None:
        _show_result(result, as_json=as_json, quiet=False, silent=False)
    elif as_json:
        ui.print_json(None)
    else:
        ui.say("No build is left in it to finish.")


def _standard_input() -> BinaryIO:
    """Return standard input unbuffered: a thread that waits in a buffered read keeps Python from ending."""
    if sys.stdin is None:  # closed by who started us
        return open(os.devnull, "rb")  # noqa: PTH123
    return cast(BinaryIO, open(0, "rb", buffering=0, closefd=False))


def _read_output(text: str | None) -> str | None:
    """Return where -o points, written as a file or as Docker writes it: type=docker,dest=FILE."""
    if text is None or not text.startswith(("type=", "dest=")):
        return text
    fields = dict(part.partition("=")[::2] for part in text.split(","))
    if fields.keys() != {"type", "dest"} or fields["type"] != "docker":
        raise UsageError(
            f"vmbuild cannot write {text}", resolution="Use -o FILE or -o type=docker,dest=FILE, a docker archive."
        )
    return fields["dest"]


def _check_job(job: dict[str, Any], as_json: bool) -> None:
    job["output"] = _read_output(job["output"])
    if job["output"] == "-" and sys.stdout.isatty():
        raise UsageError("cannot write an archive to a terminal", resolution="Use -o FILE, or redirect.")
    if job["output"] == "-" and as_json:
        raise UsageError("standard output cannot carry both the archive and JSON", resolution="Use -o FILE.")
    if job["platform"] not in ("linux/arm64", "linux/arm64/v8"):
        raise UsageError(f"this machine does not build for {job['platform']}", resolution="Use linux/arm64.")
    if job["context"] == "-" and job["dockerfile"] == "-":
        raise UsageError("standard input cannot be both the context and the Dockerfile")
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


@app.command()
@click.argument("reference", metavar="DEBIAN:SUITE-slim")
@click.option("--platform", default="linux/arm64", show_default=True, help="The platform of the base image.")
@click.option("--force", is_flag=True, help="Make it also when the machine has one by this name.")
@start_options
@as_json
def base(reference: str, platform: str, force: bool, as_json: bool, **flags: Any) -> None:
    """Make a Debian base image from signed packages, where no registry can be reached."""
    from vmbuild import build, ui

    found = _settings(flags)
    reporter = _reporter()
    identity = build.base(found.as_request(), reference, found.home(), reporter, platform=platform, force=force)
    if as_json:
        ui.print_json({"reference": reference, "platform": platform, "image_id": identity})
    else:
        ui.say(f"FROM {reference} works now ({identity}).")


@app.command()
@name_argument
@name_option
@as_json
def status(positional: str | None, as_json: bool, **flags: Any) -> None:
    """Show what the machine is now."""
    from vmbuild import operate, ui

    found = _settings(flags, positional)
    now = ui.to_data(operate.status(found["name"], found.home()))
    guest = ui.to_data(operate.usage(found["name"], found.home()))
    if as_json:
        ui.print_json({**now, "guest": guest})
        return
    rows = [(key.replace("_", " "), _show(key, value)) for key, value in now.items()]
    rows += [(f"guest: {key.replace('_', ' ')}", _show(key, value)) for key, value in (guest or {}).items()]
    ui.print_table(("what", "now"), rows)


def _show(key: str, value: Any) -> object:
    """Return a fact as people read it; the end of its name tells its unit."""
    if value is None:
        return None
    if key.endswith("_bytes"):
        return format_size(value)
    if key.endswith("_mib"):
        return format_size(value * MIB)
    return f"{value:.0f} s" if key.endswith("_s") else value


@app.command()
@name_argument
@click.option("--name", metavar="NAME", help="The machine to watch; all without.")
@click.option("-d", "--delay", type=float, default=2.0, metavar="SECONDS", help="Between two rounds; 2 by default.")
@click.option(
    "-n", "--iterations", type=click.IntRange(min=0), default=0, metavar="N", help="End after N rounds; 0 never ends."
)
@as_json
def top(positional: str | None, name: str | None, delay: float, iterations: int, as_json: bool) -> None:
    """Watch what the running machines do, or one of them, until Ctrl-C.

    cpus: that are on / of all; cpu%: what QEMU takes, 100 is one core of the host; load: the guest's, of a minute;
    memory: used in the guest / of what it may have; rss: what QEMU takes; disk: used in the guest / on the host / size.
    """
    from vmbuild import ui, watch

    if not LEAST_DELAY_S <= delay <= MOST_DELAY_S:  # nan too
        raise UsageError(f"a delay of {delay:g} s is not possible", resolution="Give 0.1 to 3600 seconds.")
    home = _settings({"name": name}, positional).home()
    endless = watch.watch(positional or name, home, delay)
    with suppress(KeyboardInterrupt), closing(endless):  # Ctrl-C is how one leaves it
        rounds = islice(endless, iterations or None)
        if as_json:
            for each in rounds:
                ui.print_json_line({"at": each.at, "machines": [_reading_data(one) for one in each.machines]})
        else:
            ui.show_rounds(TOP_COLUMNS, (map(_top_row, each.machines) for each in rounds))


def _reading_data(reading: Reading) -> dict[str, Any]:
    from vmbuild import ui

    facts: dict[str, Any] = ui.to_data(reading)
    return {**facts.pop("machine"), **facts}


def _top_row(reading: Reading) -> tuple[object, ...]:
    now, guest, cpu = reading.machine, reading.guest, reading.cpu_percent
    begun = "restored" if now.restored else "booted"
    memory_mib = now.memory_now_mib or now.memory_mib
    memory = (guest.memory_used_mib * MIB if guest else None, memory_mib * MIB if memory_mib else None)
    disk = (guest.disk_used_bytes if guest else None, now.disk_actual_bytes, now.disk_virtual_bytes)
    return (
        now.name,
        begun if now.state == "running" else now.state,
        _parts(guest.cpus_online if guest else None, now.cpus),
        None if cpu is None else f"{cpu:.0f}%",
        f"{guest.load:.2f}" if guest else None,
        _parts(*map(_short, memory)),
        _short(now.rss_bytes),
        _parts(*map(_short, disk)),
        _span(reading.uptime_s),
        now.ssh_port,
    )


def _parts(*values: object) -> str:
    return "/".join("-" if value is None else str(value) for value in values)


def _short(size_bytes: int | None) -> str | None:
    """Return bytes as a narrow column shows them, such as `1.5G` and `40G`."""
    if size_bytes is None:
        return None
    number, unit = format_size(size_bytes).split()
    return (number if float(number) < 10 else f"{float(number):.0f}") + unit[0]


def _span(seconds: float | None) -> str | None:
    """Return a time as a narrow column shows it, such as `3m07s` or `2d04h`."""
    if seconds is None:
        return None
    minutes, hours, days = (int(seconds) // unit for unit in (60, 3600, 86_400))
    if days:
        return f"{days}d{hours % 24:02}h"
    return f"{hours}h{minutes % 60:02}m" if hours else f"{minutes}m{int(seconds) % 60:02}s"


@app.command()
@name_argument
@name_option
@click.option("--cpus", type=click.IntRange(min=1), metavar="N", help="CPUs that are on.")
@click.option("--memory", metavar="SIZE", help="Memory that the guest may use.")
@click.option("--disk", metavar="SIZE", help="Size of the disk; it can only grow.")
def resize(positional: str | None, cpus: int | None, memory: str | None, disk: str | None, **flags: Any) -> None:
    """Change a running machine, a build in it or not: up to what it was started with, the disk to any size."""
    from vmbuild import operate

    if cpus is None and memory is None and disk is None:
        raise UsageError("nothing to change", resolution="Give --cpus, --memory or --disk.")
    found = _settings(flags, positional)
    operate.resize(
        *(found["name"], found.home(), _reporter()),
        cpus=cpus,
        memory_mib=parse_size(memory, what="memory size") // MIB if memory else None,
        disk_bytes=parse_size(disk, what="disk size") // MIB * MIB if disk else None,
    )


@app.command()
@name_argument
@name_option
def trim(positional: str | None, **flags: Any) -> None:
    """Give the host back what the machine's disk does not use any more; done after each build anyway."""
    from vmbuild import operate, ui

    found = _settings(flags, positional)
    freed = operate.trim(found["name"], found.home())
    ui.say(f"The disk of the machine {found['name']} takes {format_size(freed)} less.")


@app.command("list")
@as_json
def list_command(as_json: bool) -> None:
    """List the machines."""
    from vmbuild import operate, ui

    machines = operate.list_machines(_settings({}).home())
    if as_json:
        ui.print_json(machines)
        return
    columns = ("name", "state", "cpus", "memory", "ssh", "image")
    rows = [
        (m.name, m.state, m.cpus, f"{m.memory_mib} MiB" if m.memory_mib else None, m.ssh_port, m.image)
        for m in machines
    ]
    ui.print_table(columns, rows)


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@name_option
def ssh(command: Sequence[str], **flags: Any) -> None:
    """Run COMMAND in the guest, or a shell; ends with its exit code."""
    from vmbuild import operate

    found = _settings(flags)
    sys.exit(operate.run_in_guest(found["name"], command, found.home()))


@app.command()
@name_argument
@name_option
def console(positional: str | None, **flags: Any) -> None:
    """Connect to the serial console; Ctrl-] detaches."""
    from vmbuild import operate

    found = _settings(flags, positional)
    click.echo("Connected to the serial console; Ctrl-] detaches.", err=True)
    operate.console(found["name"], found.home())


@app.command()
@name_argument
@name_option
@click.option(
    "-n", "--lines", default=0, type=click.IntRange(min=0), metavar="N", help="Show the last N lines; 0 shows all."
)
@click.option("-f", "--follow", is_flag=True, help="Go on as the guest writes.")
def logs(positional: str | None, lines: int, follow: bool, **flags: Any) -> None:
    """Show what the guest wrote to its console."""
    from vmbuild import operate

    found = _settings(flags, positional)
    for line in operate.logs(found["name"], found.home(), lines, follow):
        click.echo(line)


@app.command()
@name_argument
@name_option
def down(positional: str | None, **flags: Any) -> None:
    """Stop the machine; its disk stays."""
    from vmbuild import operate, ui

    found = _settings(flags, positional)
    ran = operate.down(found["name"], found.home(), _reporter())
    ui.say(f"The machine {found['name']} {'is down' if ran else 'was not running'}.")


@app.command()
@name_argument
@name_option
@click.option("--to", metavar="FILE|DIR", help="Make a bundle too, for `vmbuild resume` on another host.")
@as_json
def suspend(positional: str | None, to: str | None, as_json: bool, **flags: Any) -> None:
    """Save the machine as it is, a build in it or not, and free its CPUs and memory; `up` goes on with it."""
    from vmbuild import carry, ui

    found = _settings(flags, positional)
    target = carry.bundle_place(to, found["name"]) if to else None
    saved = carry.suspend(found["name"], target, found.home(), _reporter())
    if as_json:
        ui.print_json(saved)
    else:
        size = format_size(saved.size_bytes)
        ui.say(f"The machine {found['name']} is suspended ({size}); `vmbuild up` goes on with it.")


@app.command()
@name_argument
@name_option
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def destroy(positional: str | None, yes: bool, **flags: Any) -> None:
    """Stop the machine and delete it, disk and keys included."""
    from vmbuild import operate, ui

    found = _settings(flags, positional)
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError("destroy asks before it deletes, and nobody is there", resolution="Add --yes.")
        click.confirm(f"Delete the machine {found['name']} and all container images on it?", abort=True, err=True)
    there = operate.destroy(found["name"], found.home(), _reporter())
    ui.say(f"The machine {found['name']} {'is gone' if there else 'does not exist'}.")


@app.group(invoke_without_command=True)
@click.option("--snapshots", is_flag=True, help="List the snapshots that machines start from instead.")
@as_json
@click.pass_context
def images(ctx: click.Context, snapshots: bool, as_json: bool) -> None:
    """List the guest images: the catalogue, and what is in the cache."""
    if ctx.invoked_subcommand is not None:
        return
    from vmbuild import stock, ui

    if snapshots:
        _show_snapshots(stock.list_snapshots(_settings({}).home()), as_json)
        return
    rows = stock.list_images(_settings({}).home())
    if as_json:
        ui.print_json(rows)
        return
    columns = ("name", "kind", "arch", "cached", "size", "description")
    cells = []
    for row in rows:
        size = format_size(row.size_bytes) if row.size_bytes else None
        cells.append((row.name, row.kind, row.arch, row.digest and row.digest[:12], size, row.description))
    ui.print_table(columns, cells)


def _show_snapshots(found: list[Snapshot], as_json: bool) -> None:
    from vmbuild import ui

    if as_json:
        ui.print_json(found)
        return
    rows = [(s.image, s.cpus, f"{s.memory_mib} MiB", format_size(s.size_bytes), s.qemu, s.key[:12]) for s in found]
    ui.print_table(("image", "cpus", "memory", "size", "qemu", "key"), rows)


@images.command("snapshot")
@machine_options("cpus", "memory", "image", "timeout", "mirror", "security_mirror")
@click.option("--in-background", is_flag=True, hidden=True)
@as_json
def images_snapshot(as_json: bool, in_background: bool, **flags: Any) -> None:
    """Have the snapshot that machines of this shape start from; `up` has it made in the background."""
    from vmbuild import stock, ui

    found = _settings(flags)
    made = stock.make_snapshot(found.as_request(), found.home(), _reporter(), in_background=in_background)
    if as_json:
        ui.print_json(made)
    else:
        ui.say(f"The snapshot is in the cache ({format_size(made.size_bytes)}).")


@images.command("fetch")
@machine_options("image", "mirror", "security_mirror")
@as_json
def images_fetch(as_json: bool, **flags: Any) -> None:
    """Have a guest image in the cache, starting no machine: for a CI cache, or before a journey."""
    from vmbuild import start, ui

    found = _settings(flags)
    image = start.fetch_image(found.as_request(), found.home(), _reporter())
    if as_json:
        ui.print_json(image)
    else:
        ui.say(f"The guest image {image.name} is in the cache ({format_size(image.size_bytes)}).")


@images.command("verify")
@as_json
def images_verify(as_json: bool) -> None:
    """Hash every cached guest image again."""
    from vmbuild import stock, ui

    checks = stock.verify_images(_settings({}).home())
    if as_json:
        ui.print_json(checks)
    else:
        ui.print_table(("name", "digest", "result"), [(c.name, c.digest[:12], c.problem or "whole") for c in checks])
    if any(check.problem for check in checks):
        raise GuestImageError("a guest image in the cache is damaged", resolution="Delete its folder in the cache.")


@app.command()
@click.option("--all", "everything", is_flag=True, help="Also what the next machine would start from.")
@as_json
def prune(everything: bool, as_json: bool) -> None:
    """Delete outdated guest images, their snapshots and downloads from the cache; say how much that frees."""
    from vmbuild import stock, ui

    freed = stock.prune(_settings({}).home(), _reporter(), everything=everything)
    if as_json:
        ui.print_json(freed)
        return
    ui.print_table(("what", "name", "size"), [(f.what, f.name, format_size(f.size_bytes)) for f in freed])
    ui.say(f"Freed {format_size(sum(f.size_bytes for f in freed))}.")


@app.command()
@as_json
def doctor(as_json: bool) -> None:
    """Check what this host has and lacks."""
    from vmbuild import ui
    from vmbuild.doctor import check_host

    checks = check_host(_settings({}).home())
    if as_json:
        ui.print_json(checks)
    else:
        rows = [("ok" if c.ok else "MISSING", c.name, c.found + (f" - {c.hint}" if c.hint else "")) for c in checks]
        ui.print_table(("", "what", "found"), rows)
    if not all(check.ok for check in checks):
        raise HostError("this host lacks something", resolution="The rows marked MISSING say what to do.")


@app.command()
@start_options
@as_json
def config(as_json: bool, **flags: Any) -> None:
    """Show each setting, its value and where that came from."""
    from vmbuild import ui

    found = _settings(flags).values
    if as_json:
        ui.print_json({key: {"value": value.value, "origin": value.origin} for key, value in found.items()})
    else:
        ui.print_table(("setting", "value", "from"), [(key, s.show(v, key), v.origin) for key, v in found.items()])


def commands_table() -> str:
    """Return the commands as a Markdown table."""
    rows = ["| command | what |", "|---|---|"]
    for name, command in app.commands.items():
        rows.append(f"| `vmbuild {name}` | {command.get_short_help_str(200)} |")
        for sub, each in getattr(command, "commands", {}).items():
            rows.append(f"| `vmbuild {name} {sub}` | {each.get_short_help_str(200)} |")
    return "\n".join(rows)


def exit_codes_table() -> str:
    """Return the exit codes as a Markdown table."""
    return "\n".join(
        ["| code | meaning |", "|---|---|", *(f"| {code} | {text} |" for code, text in EXIT_CODES.items())]
    )


def main() -> NoReturn:
    """Run the program."""
    # How CI systems cancel: clean up as after Ctrl-C. And how a terminal says that it is gone: a build goes on then.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup wants it
            signal.signal(number, _interrupt)
    sys.exit(run(sys.argv[1:]))


def _settle_stdout() -> None:
    """Write what is left, or let it go: else Python complains of it at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _interrupt(number: int, frame: object) -> NoReturn:  # noqa: ARG001
    raise HungUp if number == signal.SIGHUP else KeyboardInterrupt


def run(argv: Sequence[str]) -> int:
    """Run a command line and return its exit code."""
    try:
        app.main(list(argv), prog_name="vmbuild", standalone_mode=False)
    except VmbuildError as error:
        from vmbuild import ui

        ui.show_error(error)
        _settle_stdout()
        return error.exit_code
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return UsageError.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return INTERRUPTED
    except BrokenPipeError:  # the reader has gone: say nothing
        _settle_stdout()
        return 1
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except Exception:
        traceback.print_exc()
        click.echo("This is a defect in vmbuild. Please report it with the lines above.", err=True)
        return VmbuildError.exit_code
    return 0
