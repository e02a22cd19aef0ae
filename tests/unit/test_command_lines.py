"""Every command line of vmbuild that a text shows is one that the program knows."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from tests import ci_recipes as ci
from tests.command_lines import find_commands, resolve, resolve_options

ROOT = Path(__file__).parents[2]
TEXTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "ci/*.md", "examples/*.md", "examples/*/README.md")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"
)


def consoles(text: str) -> str:
    """Return what is typed in a text's console blocks and what its shell blocks say, one command a line."""
    found = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if language in ("console", ""):
            found += [line[2:] for line in block.splitlines() if line.startswith("$ ")]
        elif language in ("sh", "bash"):
            found.append(block)
    return "\n".join(re.sub(r"\s#\s.*", "", line) for line in "\n".join(found).splitlines())


def inline(text: str) -> list[list[str]]:
    """Return what a text's prose and tables say in code, as arguments of vmbuild."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [args for code in re.findall(r"`(vmbuild [^`]+)`", prose) for args in find_commands(code)]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_text_shows_what_the_program_knows(path: Path) -> None:
    for args in find_commands(consoles(path.read_text())):
        resolve(args)
    for args in inline(path.read_text()):
        resolve_options(args)


@pytest.mark.parametrize("script", ci.all_scripts(), ids=lambda script: script.where)
def test_a_recipe_runs_what_the_program_knows(script: ci.Script) -> None:
    for args in find_commands(script.text):
        resolve(args)


def test_the_texts_have_some() -> None:
    commands = [args for path in TEXTS for args in find_commands(consoles(path.read_text()))]
    assert len(commands) > 20
    assert {args[0] for args in commands} >= {"up", "build", "base", "resume", "ssh"}
    assert len([args for script in ci.all_scripts() for args in find_commands(script.text)]) > 15


@pytest.mark.parametrize("args", [["bulid"], ["build", "--tags", "x"], ["images", "fetsch"], ["build", "--progress=x"]])
def test_what_the_program_does_not_know_is_seen(args: list[str]) -> None:
    with pytest.raises(click.UsageError):
        resolve(args)


@pytest.mark.parametrize("args", [["bulid"], ["build", "--tags"], ["images", "fetch", "--fresh"]])
def test_in_prose_too(args: list[str]) -> None:
    with pytest.raises(click.UsageError):
        resolve_options(args)


def test_a_shell_line_is_taken_apart() -> None:
    line = (
        '[ -f x ] || "$HOME/bin/vmbuild" build "$A" -t a:1 "${more[@]}" --time-limit "$TIME_LIMIT" >log && vmbuild up'
    )
    assert list(find_commands(line)) == [["build", "word", "-t", "a:1", "--time-limit", "45m"], ["up"]]
