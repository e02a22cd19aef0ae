"""What the documents link to is there, and what docs/migrating.md says is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.command_lines import resolve
from vmbuild.cli.app import app
from vmbuild.errors import UsageError
from vmbuild.model import PLATFORMS

ROOT = Path(__file__).parents[2]
TEXTS = sorted(path for path in ROOT.glob("**/*.md") if not {".venv", ".git"} & set(path.relative_to(ROOT).parts))
MIGRATING = (ROOT / "docs/migrating.md").read_text()


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_text_links_to_is_there(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target.partition("#")[0]).exists(), target


def test_every_platform_of_the_tables_is_one_that_vmbuild_builds_for() -> None:
    named = set(re.findall(r"linux/arm[\w/]*", MIGRATING))
    assert named == set(PLATFORMS)


@pytest.mark.parametrize("platform", ["linux/amd64", "linux/ppc64le", "linux/s390x", "linux/riscv64", "linux/mips64le"])
def test_the_platforms_that_it_says_are_refused_are_refused(platform: str) -> None:
    with pytest.raises(UsageError, match="does not build"):
        resolve(["build", ".", "--platform", platform])


def test_an_option_that_both_have_is_the_same() -> None:
    (row,) = (line for line in MIGRATING.splitlines() if "--build-arg A=1" in line)
    before = row.split("`")[1].removeprefix("docker buildx build ").split()
    (other,) = (line for line in MIGRATING.splitlines() if "--progress plain --iidfile" in line)
    for args in (before, other.split("`")[1].removeprefix("docker buildx build ").split()):
        resolve(["build", *args])


def test_commands_that_it_names_exist() -> None:
    named = {line.split()[1] for line in re.findall(r"`(vmbuild [a-z]+)", MIGRATING)}
    assert named <= set(app.commands)
    assert {"build", "up", "down", "destroy", "base", "ssh", "list"} <= named
