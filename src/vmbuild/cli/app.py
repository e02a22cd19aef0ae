"""The program as people meet it: its commands in their order, its exit codes, and both as the README shows them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from vmbuild.cli import bench, build, cache, dockerhost, host, inside, machine, top
from vmbuild.cli.options import Group
from vmbuild.errors import EXIT_CODES, ReaderGone

HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
COMMANDS: tuple[click.Command, ...] = (
    *(machine.up, build.build_command, build.attach, build.resume, build.base),
    *(machine.status, top.top, machine.resize, machine.trim, machine.list_command),
    *(machine.ssh, machine.console, machine.logs, machine.down, machine.suspend, machine.destroy),
    *(dockerhost.env, dockerhost.docker, dockerhost.forward, inside.exec_command, inside.shell, inside.cp),
    *(cache.images, cache.prune, bench.bench_command, host.doctor, host.config, host.completion_command),
)
"""In the order in which people meet them."""


@contextmanager
def _noticing_gone_readers() -> Iterator[None]:
    """Keep click and rich from making an ordinary failure, 1, of a reader who has gone."""
    try:
        yield
    except (BrokenPipeError, SystemExit) as error:
        if BrokenPipeError in (type(error), type(error.__context__)):
            raise ReaderGone from error
        raise


class Program(Group):
    """The group of all commands, exit codes below them."""

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        with _noticing_gone_readers():
            return super().make_context(*args, **options)

    def invoke(self, ctx: click.Context) -> Any:
        with _noticing_gone_readers():
            return super().invoke(ctx)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), meaning) for code, meaning in EXIT_CODES.items()])


@click.group(cls=Program, commands=COMMANDS, context_settings=HELP)
@click.version_option(package_name="vmbuild", prog_name="vmbuild")
def app() -> None:
    """Build ARM container images on x86 hosts, in a full virtual machine."""


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
