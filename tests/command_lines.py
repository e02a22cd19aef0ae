"""Command lines of vmbuild as people write them in texts, and whether the program knows what they say."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence

import click

from vmbuild.cli.app import app

ENDS = frozenset({"&&", "||", "|", ";", "&", "(", ")", "<", ">", ">>", "<<<", "2>", "2>&1", ">&"})
VALUES = {"TIME_LIMIT": "45m", "DOCKERFILE_PATH:-Dockerfile": "Dockerfile", "PLATFORM": "linux/arm64"}
"""What stands for a shell variable where not any word will do."""


def resolve(args: Sequence[str]) -> click.Context:
    """Return what click makes of a command line, which is not run. Raises click.UsageError for what is not known."""
    command: click.Command = app
    rest = list(args)
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        name, *rest = rest
        if name not in command.commands:
            raise click.UsageError(f"no command {name!r}")
        command = command.commands[name]
    return command.make_context("vmbuild", rest)


def resolve_options(args: Sequence[str]) -> None:
    """Check a command line that may lack arguments, as in prose: its command and the names of its options.

    Raises click.UsageError.
    """
    command: click.Command = app
    known = {option for each in command.params for option in each.opts} | {"--help", "-h"}
    for arg in args:
        if arg == "--":
            return
        if isinstance(command, click.Group) and not arg.startswith("-") and arg in command.commands:
            command = command.commands[arg]
            known |= {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
        elif command is app and not arg.startswith("-"):
            raise click.UsageError(f"no command {arg!r}")
        elif arg.startswith("-") and arg != "-" and arg.partition("=")[0] not in known:
            raise click.NoSuchOption(arg)


def find_commands(shell: str) -> Iterator[list[str]]:
    """Yield the arguments of each call of vmbuild in a shell script, a word or a known value for each variable."""
    shell = re.sub(r"\\\n\s*", " ", shell)
    for line in shell.splitlines():
        if "vmbuild" not in line or line.lstrip().startswith("#"):
            continue
        yield from _find_in_line(line)


def _find_in_line(line: str) -> Iterator[list[str]]:
    line = re.sub(r'"\$\{\w+\[@\]\}"', "", line)
    line = re.sub(r"\$\{?([A-Za-z_][\w:.-]*)\}?", lambda match: VALUES.get(match[1], "word"), line)
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] | None = None
    for word in [*lexer, ";"]:
        if word in ENDS or set(word) <= set("();<>|&"):
            if words:
                yield words
            words = None
        elif words is None and word.rpartition("bin/")[2] == "vmbuild":
            words = []
        elif words is not None:
            words.append(word)
