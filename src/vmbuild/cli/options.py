"""What commands have in common: the options that several take, and the settings that those make."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import click

from vmbuild import settings
from vmbuild.cli.completion import COMPLETERS
from vmbuild.errors import HostError, UsageError
from vmbuild.settings import Settings

as_json = click.option("--json", "as_json", is_flag=True, help="Print facts as JSON.")
machine_options = partial(settings.machine_options, completers=COMPLETERS)
start_options = machine_options(*settings.COMMAND_LINE)
name_option = machine_options("name")
name_argument = click.argument("positional", metavar="[NAME]", required=False, shell_complete=COMPLETERS["name"])
with_secrets_option = click.option(
    "--with-secrets", is_flag=True, help="Also make a bundle that holds a build's secrets, for whoever can read it."
)


class Group(click.Group):
    """Commands in the order in which people meet them, each told in full."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(name, each.get_short_help_str(200)) for name, each in self.commands.items()])


def read_settings(flags: dict[str, Any], positional: str | None = None) -> Settings:
    """Return the settings that a command's options make; the machine's name may be an argument too."""
    if positional is not None and flags.get("name") not in (None, positional):
        raise UsageError(f"two names: {positional} and {flags['name']}", resolution="Give one.")
    given = {**flags, "name": positional or flags.get("name")}
    return settings.resolve(given, os.environ, _current_folder())


def _current_folder() -> Path:
    try:
        return Path.cwd()
    except FileNotFoundError as error:
        raise HostError("the current folder does not exist any more", resolution="Go to another one.") from error
