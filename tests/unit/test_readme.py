"""The README says what the code does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from vmbuild.cli.app import app

ROOT = Path(__file__).parents[2]


def test_its_tables_are_the_codes() -> None:
    subprocess.run([sys.executable, str(ROOT / "scripts/readme"), "--check"], check=True)


def test_every_command_and_script_it_names_exists() -> None:
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"vmbuild ([a-z]+)\b", "\n".join(re.findall(r"`[^`]*`|^\$ .*", text, re.MULTILINE))))
    assert named - set(app.commands) == set()
    for script in set(re.findall(r"scripts/([a-z]+)", text)):
        assert (ROOT / "scripts" / script).exists(), script
    for folder in set(re.findall(r"examples/([a-z0-9-]+)", text)):
        assert (ROOT / "examples" / folder / "Dockerfile").exists(), folder
