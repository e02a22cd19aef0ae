"""The built wheel holds all that it needs: installed elsewhere, it knows its catalogue and its guest files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel in it; its dependencies are this environment's own."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    wheel = next(folder.glob("*.whl"))
    venv = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    pip = [str(venv / "bin/pip"), "install", "--quiet", "--no-deps", "--disable-pip-version-check", str(wheel)]
    subprocess.run(pip, check=True)
    site = next((venv / "lib").glob("python*/site-packages"))
    here = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "dependencies.pth").write_text(here)
    return venv


def test_the_wheel_lists_its_catalogue(installed: Path, tmp_path: Path) -> None:
    own = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "XDG_CONFIG_HOME")}
    env = {**own, "HOME": str(tmp_path), "VMBUILD_CACHE_DIR": str(tmp_path / "cache")}
    out = subprocess.check_output([str(installed / "bin/vmbuild"), "images", "--json"], cwd=tmp_path, env=env)
    rows = json.loads(out)
    assert "debian-13-arm64" in {row["name"] for row in rows}
    assert all(str(installed) in row["origin"] for row in rows)


def test_the_wheel_has_the_same_images_folder(installed: Path) -> None:
    package = next((installed / "lib").glob("python*/site-packages/vmbuild/images"))
    want = {path.relative_to(ROOT / "images") for path in (ROOT / "images").rglob("*") if path.is_file()}
    assert {path.relative_to(package) for path in package.rglob("*") if path.is_file()} == want
