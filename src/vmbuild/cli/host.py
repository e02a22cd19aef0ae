"""The commands that tell what vmbuild has to go by: this host, and the settings."""

from __future__ import annotations

from typing import Any

import click

from vmbuild.cli import completion
from vmbuild.cli.options import as_json, read_settings, start_options
from vmbuild.errors import HostError
from vmbuild.settings import show


@click.command()
@as_json
def doctor(as_json: bool) -> None:
    """Check what this host has and lacks."""
    from vmbuild import ui
    from vmbuild.doctor import check_host

    checks = check_host(read_settings({}).home())
    if as_json:
        ui.print_json(checks)
    else:
        rows = [("ok" if c.ok else "MISSING", c.name, c.found + (f" - {c.hint}" if c.hint else "")) for c in checks]
        ui.print_table(("", "what", "found"), rows)
    if not all(check.ok for check in checks):
        raise HostError("this host lacks something", resolution="The rows marked MISSING say what to do.")


@click.command()
@start_options
@as_json
def config(as_json: bool, **flags: Any) -> None:
    """Show each setting, its value and where that came from."""
    from vmbuild import ui

    found = read_settings(flags).values
    if as_json:
        ui.print_json({key: {"value": value.value, "origin": value.origin} for key, value in found.items()})
    else:
        ui.print_table(("setting", "value", "from"), [(key, show(v, key), v.origin) for key, v in found.items()])


@click.command("completion")
@click.argument("shell", type=click.Choice(completion.SHELLS))
@click.pass_context
def completion_command(ctx: click.Context, shell: str) -> None:
    """Print what makes a shell complete vmbuild's command lines, for its start-up file."""
    from vmbuild import ui

    ui.print_text(completion.script(shell, ctx.find_root().command))
