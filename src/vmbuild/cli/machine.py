"""The commands for a machine: start it, look at it, change it, go into it, end it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import click

from vmbuild.cli.options import as_json, name_argument, name_option, read_settings, start_options, with_secrets_option
from vmbuild.errors import UsageError
from vmbuild.model import MIB, Freed, MachineStatus, format_size, parse_size


@click.command()
@name_argument
@start_options
@as_json
def up(positional: str | None, as_json: bool, **flags: Any) -> None:
    """Start the machine, or find it running; return when Docker answers."""
    from vmbuild import operate, ui

    found = read_settings(flags, positional)
    status = operate.up(found.as_request(), found.home(), ui.TerminalReporter())
    if as_json:
        ui.print_json(status)
    else:
        ui.say(f"The machine {status.name} is ready ({_describe(status)}).")


def _describe(status: MachineStatus) -> str:
    size = format_size((status.memory_mib or 0) * 1024 * 1024)
    return f"{status.cpus} CPUs, {size}, ssh 127.0.0.1:{status.ssh_port}"


@click.command()
@name_argument
@name_option
@as_json
def status(positional: str | None, as_json: bool, **flags: Any) -> None:
    """Show what the machine is now."""
    from vmbuild import operate, ui

    found = read_settings(flags, positional)
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


@click.command()
@name_argument
@name_option
@click.option("--cpus", type=click.IntRange(min=1), metavar="N", help="CPUs that are on.")
@click.option("--memory", metavar="SIZE", help="Memory that the guest may use.")
@click.option("--disk", metavar="SIZE", help="Size of the disk; it can only grow.")
def resize(positional: str | None, cpus: int | None, memory: str | None, disk: str | None, **flags: Any) -> None:
    """Change a running machine, a build in it or not: up to what it was started with, the disk to any size."""
    from vmbuild import operate, ui

    if cpus is None and memory is None and disk is None:
        raise UsageError("nothing to change", resolution="Give --cpus, --memory or --disk.")
    found = read_settings(flags, positional)
    operate.resize(
        *(found["name"], found.home(), ui.TerminalReporter()),
        cpus=cpus,
        memory_mib=parse_size(memory, what="memory size") // MIB if memory else None,
        disk_bytes=parse_size(disk, what="disk size") // MIB * MIB if disk else None,
    )


@click.command()
@name_argument
@name_option
@click.option(
    "--memory",
    is_flag=True,
    help="Give memory back instead: what the guest keeps of files, and QEMU of the guest. Nobody may be connected.",
)
@click.option("--when-idle", is_flag=True, hidden=True)
@as_json
def trim(positional: str | None, memory: bool, when_idle: bool, as_json: bool, **flags: Any) -> None:
    """Give the host back what the machine's disk does not use any more; done after each build anyway."""
    from vmbuild import operate, renew, ui

    found = read_settings(flags, positional)
    if when_idle:
        renew.renew_when_idle(found["name"], found.home())
        return
    if memory:
        freed = renew.trim_memory(found["name"], found.home(), ui.TerminalReporter())
    else:
        freed = Freed("disk", found["name"], operate.trim(found["name"], found.home()))
    if as_json:
        ui.print_json(freed)
        return
    what = "The memory" if memory else "The disk"
    ui.say(f"{what} of the machine {found['name']} takes {format_size(freed.size_bytes)} less.")


@click.command("list")
@as_json
def list_command(as_json: bool) -> None:
    """List the machines."""
    from vmbuild import operate, ui

    machines = operate.list_machines(read_settings({}).home())
    if as_json:
        ui.print_json(machines)
        return
    columns = ("name", "state", "arch", "cpus", "memory", "ssh", "image")
    rows = [
        (m.name, m.state, m.arch, m.cpus, f"{m.memory_mib} MiB" if m.memory_mib else None, m.ssh_port, m.image)
        for m in machines
    ]
    ui.print_table(columns, rows)


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@name_option
def ssh(command: Sequence[str], **flags: Any) -> None:
    """Run COMMAND in the guest, or a shell; ends with its exit code."""
    from vmbuild import operate

    found = read_settings(flags)
    sys.exit(operate.run_in_guest(found["name"], command, found.home()))


@click.command()
@name_argument
@name_option
def console(positional: str | None, **flags: Any) -> None:
    """Connect to the serial console; Ctrl-] detaches."""
    from vmbuild import operate, ui

    found = read_settings(flags, positional)
    operate.console(found["name"], found.home(), ui.TerminalReporter())


@click.command()
@name_argument
@name_option
@click.option(
    "-n", "--lines", default=0, type=click.IntRange(min=0), metavar="N", help="Show the last N lines; 0 shows all."
)
@click.option("-f", "--follow", is_flag=True, help="Go on as the guest writes.")
def logs(positional: str | None, lines: int, follow: bool, **flags: Any) -> None:
    """Show what the guest wrote to its console."""
    from vmbuild import operate

    found = read_settings(flags, positional)
    for line in operate.logs(found["name"], found.home(), lines, follow):
        click.echo(line)


@click.command()
@name_argument
@name_option
def down(positional: str | None, **flags: Any) -> None:
    """Stop the machine; its disk stays."""
    from vmbuild import operate, ui

    found = read_settings(flags, positional)
    ran = operate.down(found["name"], found.home(), ui.TerminalReporter())
    ui.say(f"The machine {found['name']} {'is down' if ran else 'was not running'}.")


@click.command()
@name_argument
@name_option
@click.option("--to", metavar="FILE|DIR", help="Make a bundle too, for `vmbuild resume` on another host.")
@with_secrets_option
@as_json
def suspend(positional: str | None, to: str | None, with_secrets: bool, as_json: bool, **flags: Any) -> None:
    """Save the machine as it is, a build in it or not, and free its CPUs and memory; `up` goes on with it."""
    from vmbuild import carry, ui

    found = read_settings(flags, positional)
    target = carry.bundle_place(to, found["name"]) if to else None
    report = ui.TerminalReporter()
    saved = carry.suspend(found["name"], target, found.home(), report, with_secrets=with_secrets)
    if as_json:
        ui.print_json(saved)
    else:
        name, size = found["name"], format_size(saved.size_bytes)
        ui.say(f"The machine {name} is suspended ({size}); `vmbuild up --name {name}` goes on with it.")
        if target is not None:
            ui.say(f"It is in {target} too ({format_size(target.stat().st_size)}), for `vmbuild resume` elsewhere.")


@click.command()
@name_argument
@name_option
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def destroy(positional: str | None, yes: bool, **flags: Any) -> None:
    """Stop the machine and delete it, disk and keys included."""
    from vmbuild import operate, ui

    found = read_settings(flags, positional)
    if not yes and operate.exists(found["name"], found.home()):
        if not sys.stdin.isatty():
            raise UsageError("destroy asks before it deletes, and nobody is there", resolution="Add --yes.")
        click.confirm(f"Delete the machine {found['name']} and all container images on it?", abort=True, err=True)
    there = operate.destroy(found["name"], found.home(), ui.TerminalReporter())
    ui.say(f"The machine {found['name']} {'is gone' if there else 'does not exist'}.")
