"""What a shell completes: the program is asked as the scripts of `vmbuild completion` ask it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vmbuild.cli.completion import SHELLS
from vmbuild.cli.program import run

PROGRAM = "import sys; from vmbuild.cli.program import run; sys.exit(run(sys.argv[1:]))"


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    own = {"VMBUILD_STATE_DIR": str(tmp_path / "state"), "VMBUILD_CACHE_DIR": str(tmp_path / "cache")}
    for name in ("default", "other", ".lock"):
        (tmp_path / "state" / "machines" / name).mkdir(parents=True)
    return {**os.environ, **own, "XDG_CONFIG_HOME": str(tmp_path)}


def complete(env: dict[str, str], *words: str) -> list[str]:
    """Return what bash is told about the last of these words, each with its type."""
    asked = {"COMP_WORDS": " ".join(("vmbuild", *words)), "COMP_CWORD": str(len(words))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**env, **asked, "_VMBUILD_COMPLETE": "bash_complete"},
        capture_output=True,
        check=True,
        text=True,
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_machines_images_platforms_and_words(env: dict[str, str]) -> None:
    assert complete(env, "up", "--name", "") == ["plain,default", "plain,other"]
    assert complete(env, "down", "o") == ["plain,other"]
    assert complete(env, "top", "--name", "d") == ["plain,default"]
    assert "plain,debian-13-arm64" in complete(env, "up", "--image", "debian")
    assert complete(env, "up", "--image", "./x") == ["file,./x"]
    assert complete(env, "up", "--arch", "") == ["plain,arm64", "plain,arm"]
    assert complete(env, "up", "--snapshots", "of") == ["plain,off"]
    assert complete(env, "build", "--platform", "linux/arm/v6,linux/arm/") == ["plain,linux/arm/v6,linux/arm/v7"]
    assert complete(env, "cp", "ot") == ["plain,other:", "file,ot"]
    assert complete(env, "comp") == ["plain,completion"]


def test_a_file_that_is_wrong_completes_nothing_and_says_nothing(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "vmbuild").mkdir()
    (tmp_path / "vmbuild" / "config.toml").write_text("nonsense = 1")
    assert complete(env, "up", "--name", "") == []
    assert complete(env, "up", "--image", "") == []


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_has_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", shell]) == 0
    assert "_VMBUILD_COMPLETE" in capsys.readouterr().out


def test_bash_can_read_its_script(env: dict[str, str]) -> None:
    """click asks bash for its version; the script itself must be taken without a word."""
    script = subprocess.run(
        [sys.executable, "-c", PROGRAM, "completion", "bash"], env=env, capture_output=True, check=True, text=True
    ).stdout
    done = subprocess.run(["bash", "-c", f"{script}\ncomplete -p vmbuild"], capture_output=True, text=True, check=True)
    assert "_vmbuild_completion" in done.stdout


def test_another_shell_is_refused() -> None:
    assert run(["completion", "tcsh"]) == 2
