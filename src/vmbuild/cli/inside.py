"""The commands for what is in a guest: a shell, a command, files."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from vmbuild.cli.completion import complete_places
from vmbuild.cli.options import name_argument, name_option, read_settings
from vmbuild.errors import UsageError


@click.command("exec", context_settings={"allow_interspersed_args": False})
@name_option
@click.option("-i", "--interactive", is_flag=True, help="Pass standard input on.")
@click.option("-t", "--tty", is_flag=True, help="Give it a terminal.")
@click.option("-w", "--workdir", default=".", metavar="DIR", help="The folder to run it in.")
@click.option(
    "-e",
    "--env",
    "variables",
    multiple=True,
    metavar="KEY[=VALUE]",
    help="Set a variable; without a value as it is on this host. Repeatable.",
)
@click.argument("command", metavar="[--] COMMAND...", nargs=-1, required=True, type=click.UNPROCESSED)
def exec_command(
    command: Sequence[str], interactive: bool, tty: bool, workdir: str, variables: Sequence[str], **flags: Any
) -> None:
    """Run COMMAND in the guest, as `docker exec` does in a container; ends with its exit code."""
    from vmbuild import operate

    if tty and interactive and not sys.stdin.isatty():
        raise UsageError("standard input is no terminal", resolution="Leave -t out.")
    found = read_settings(flags)
    argv = operate.place_command(command, workdir, _assignments(variables))
    sys.exit(operate.run_in_guest(found["name"], argv, found.home(), interactive=interactive, has_terminal=tty))


def _assignments(variables: Sequence[str]) -> list[str]:
    """Return KEY=VALUE words; a bare KEY that this host has not is left out, as docker leaves it."""
    for each in variables:
        if not each.partition("=")[0].replace("_", "a").isalnum() or each[0].isdigit():
            raise UsageError(f"{each.partition('=')[0]!r} cannot be a variable's name")
    whole = (each if "=" in each else f"{each}={os.environ[each]}" for each in variables if _is_known(each))
    return list(whole)


def _is_known(variable: str) -> bool:
    return "=" in variable or variable in os.environ


@click.command()
@name_argument
@name_option
def shell(positional: str | None, **flags: Any) -> None:
    """Open a login shell in the guest, as `vmbuild ssh` does without a command."""
    from vmbuild import operate

    found = read_settings(flags, positional)
    sys.exit(operate.run_in_guest(found["name"], [], found.home()))


@click.command()
@click.argument("source", metavar="SOURCE", shell_complete=complete_places)
@click.argument("target", metavar="TARGET", shell_complete=complete_places)
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
@name_option
def cp(source: str, target: str, quiet: bool, **flags: Any) -> None:
    """Copy a file or folder into the guest or out of it: MACHINE:PATH, :PATH, or a path of this host.

    Folders and existing targets are as `docker cp` has them; - is a tar stream on standard input or output. A path of
    the guest that is not absolute begins at root's home. What comes out of the guest stays below the target: links
    that lead elsewhere are left out.
    """
    from vmbuild import copy, ui

    found = read_settings(flags)
    begin, end = (copy.Place.parse(text, found["name"]) for text in (source, target))
    if end == copy.Place(None, copy.STREAM) and sys.stdout.isatty():
        raise UsageError("cannot write a tar stream to a terminal", resolution="Name a target, or redirect.")
    reporter = ui.TerminalReporter(quiet=quiet)
    copy.copy(begin, end, found.home(), reporter, stdin=sys.stdin.buffer, stdout=sys.stdout.buffer)
