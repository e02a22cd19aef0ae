"""The command that watches machines, and how a round of its readings looks."""

from __future__ import annotations

from contextlib import closing, suppress
from itertools import islice
from typing import TYPE_CHECKING, Any

import click

from vmbuild.cli.completion import COMPLETERS
from vmbuild.cli.options import as_json, name_argument, read_settings
from vmbuild.errors import UsageError
from vmbuild.model import MIB, format_size

if TYPE_CHECKING:
    from vmbuild.watch import Reading

LEAST_DELAY_S, MOST_DELAY_S = 0.1, 3600.0
COLUMNS = ("name", "state", "cpus", "cpu%", "load", "memory", "rss", "disk", "up", "ssh")


@click.command()
@name_argument
@click.option("--name", metavar="NAME", shell_complete=COMPLETERS["name"], help="The machine to watch; all without.")
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
    home = read_settings({"name": name}, positional).home()
    endless = watch.watch(positional or name, home, delay)
    with suppress(KeyboardInterrupt), closing(endless):  # Ctrl-C is how one leaves it
        rounds = islice(endless, iterations or None)
        if as_json:
            for each in rounds:
                ui.print_json_line({"at": each.at, "machines": [_reading_data(one) for one in each.machines]})
        else:
            ui.show_rounds(COLUMNS, (map(_row, each.machines) for each in rounds))


def _reading_data(reading: Reading) -> dict[str, Any]:
    from vmbuild import ui

    facts: dict[str, Any] = ui.to_data(reading)
    return {**facts.pop("machine"), **facts}


def _row(reading: Reading) -> tuple[object, ...]:
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
