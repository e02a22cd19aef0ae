"""The examples: what each folder has, and what its Dockerfile does not do."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
FOLDERS = sorted(path.parent for path in EXAMPLES.glob("*/Dockerfile"))
each_example = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


def instructions(folder: Path) -> list[str]:
    """Return a Dockerfile's instructions, each on one line, without comments."""
    lines = [line for line in (folder / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [line for line in joined.splitlines() if line.strip()]


def of(folder: Path, word: str) -> list[str]:
    return [line for line in instructions(folder) if line.split()[0] == word]


def test_all_workloads_are_there() -> None:
    assert [folder.name for folder in FOLDERS] == [
        *("go", "hello", "io", "many-small", "nginx", "python-wheel", "readdir32")
    ]


@each_example
def test_it_says_what_it_is_and_how_to_build_it(folder: Path) -> None:
    readme = (folder / "README.md").read_text()
    assert readme.startswith(f"# {folder.name}\n")
    assert f"vmbuild build examples/{folder.name} " in readme
    assert f"[{folder.name}]({folder.name})" in (EXAMPLES / "README.md").read_text()
    assert (folder / "Dockerfile").read_text().startswith("# ")


@each_example
def test_it_builds_on_the_base_that_needs_no_registry(folder: Path) -> None:
    stages = {line.split()[-1] for line in of(folder, "FROM") if " AS " in line}
    bases = {line.split()[1] for line in of(folder, "FROM")} - stages
    assert bases <= {"debian:trixie-slim", "scratch"}
    assert "debian:trixie-slim" in bases
    assert len(of(folder, "FROM")) > 1, "what is left over from building stays behind"


@each_example
def test_it_takes_nothing_from_elsewhere_than_debian(folder: Path) -> None:
    for path in filter(Path.is_file, folder.rglob("*")):
        if path.suffix != ".md":
            assert "://" not in path.read_text(), path
    assert of(folder, "ADD") == []
    for line in of(folder, "RUN"):
        assert not re.search(r"\b(curl|wget|pip3? install|npm|go get|go install)\b", line)


@each_example
def test_both_ways_of_building_read_it(folder: Path) -> None:
    # Debian 12's buildah, with which `vmbuild bench` compares, has neither mounts of all kinds nor heredocs.
    for line in instructions(folder):
        assert "--mount" not in line
        assert "--link" not in line
        assert "<<" not in line


@each_example
def test_apt_leaves_no_lists_behind_and_takes_no_recommendations(folder: Path) -> None:
    for line in of(folder, "RUN"):
        if "apt-get install" in line:
            assert "apt-get install -y --no-install-recommends " in line
            assert (
                line.index("apt-get update") < line.index("apt-get install") < line.index("rm -rf /var/lib/apt/lists")
            )
        assert "allow-unauthenticated" not in line
        assert "trusted=yes" not in line


@each_example
def test_what_is_measured_is_not_in_the_step_that_fetches(folder: Path) -> None:
    for line in of(folder, "RUN"):
        if "apt-get install" in line:
            assert {part.split()[0] for part in line.removeprefix("RUN ").split("&&")} <= {"apt-get", "rm"}


@each_example
def test_the_context_is_what_the_build_reads(folder: Path) -> None:
    assert {"*.tar", "README.md", "bench.toml"} <= set((folder / ".dockerignore").read_text().split())


@each_example
def test_its_manifest_for_the_suite_has_known_keys(folder: Path) -> None:
    manifest = tomllib.loads((folder / "bench.toml").read_text())
    assert manifest.keys() <= {"description", "dockerfile", "platforms", "runs", "build_args"}
    assert manifest["description"].endswith(".")
    arguments = {line.split()[1].partition("=")[0] for line in of(folder, "ARG")}
    assert manifest.get("build_args", {}).keys() <= arguments
    assert all(isinstance(value, str) for value in manifest.get("build_args", {}).values())


def test_nginx_is_compiled_from_what_apt_has_verified() -> None:
    steps = "\n".join(of(EXAMPLES / "nginx", "RUN"))
    assert "deb-src" in steps
    assert "apt-get source --download-only --tar-only nginx" in steps
    assert 'make -j"$(nproc)"' in steps


@pytest.mark.skipif(not Path("/usr/bin/perl").exists(), reason="no perl")
def test_io_makes_the_same_files_each_time(tmp_path: Path) -> None:
    for name in ("one", "two"):
        subprocess.run([str(EXAMPLES / "io/make-files"), "150", "4", str(tmp_path / name)], check=True)
    one, two = (files_of(tmp_path / name) for name in ("one", "two"))
    assert one == two
    assert len(one) == len(set(one.values())) == 150


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
