"""What a context and its manifest say is measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmbuild.bench.workload import Choice, find_bases, find_stages, read_context, read_suite
from vmbuild.errors import UsageError

DOCKERFILE = """FROM --platform=$TARGETPLATFORM debian:trixie-slim AS Build
RUN true
from build as test
FROM scratch
FROM debian:trixie-slim
COPY --from=build /x /x
"""


def context(folder: Path, manifest: str | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "Dockerfile").write_text(DOCKERFILE)
    if manifest is not None:
        (folder / "bench.toml").write_text(manifest)
    return folder


def test_stages_have_their_names_and_bases_are_no_stages() -> None:
    assert find_stages(DOCKERFILE) == ("build", "test", "", "")
    assert find_bases(DOCKERFILE) == ("debian:trixie-slim",)


def test_a_context_without_a_manifest_is_measured_by_the_defaults(tmp_path: Path) -> None:
    (work,) = read_context(context(tmp_path / "here"), Choice())
    assert (work.name, work.platform, work.runs, work.build_args) == ("here", "linux/arm64", 3, {})
    assert work.dockerfile == tmp_path / "here" / "Dockerfile"


MANIFEST = """description = "Compiles."
platforms = ["linux/arm64", "linux/arm"]
runs = 5
[build_args]
SIZE = "3"
KEEP = "1"
"""


def test_each_platform_is_a_build_of_its_own(tmp_path: Path) -> None:
    works = read_context(context(tmp_path / "here", MANIFEST), Choice())
    assert [(work.platform, work.runs) for work in works] == [("linux/arm64", 5), ("linux/arm/v7", 5)]
    assert works[0].description == "Compiles."


def test_the_command_line_wins(tmp_path: Path) -> None:
    choice = Choice(platforms=("linux/arm64",), runs=2, build_args={"SIZE": "9"}, target="build")
    (work,) = read_context(context(tmp_path / "here", MANIFEST), choice)
    assert (work.runs, work.build_args, work.target) == (2, {"SIZE": "9", "KEEP": "1"}, "build")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rnus = 3", "rnus"),
        ("runs = '3'", "runs cannot be"),
        ("runs = true", "runs cannot be"),
        ("runs = 0", "runs must be"),
        ("dockerfile = '../Dockerfile'", "same folder"),
        ("build_args = {A = 1}", "are text"),
        ("platforms = ['linux/amd64']", "linux/amd64"),
        ("runs = ", "cannot read"),
    ],
)
def test_a_wrong_manifest_is_refused_by_name(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        read_context(context(tmp_path / "here", text), Choice())


def test_what_is_no_context_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a folder"):
        read_context(tmp_path / "nowhere", Choice())
    with pytest.raises(UsageError, match="cannot read"):
        read_context(tmp_path, Choice())


def test_a_suite_is_every_context_with_a_manifest(tmp_path: Path) -> None:
    context(tmp_path / "b", "")
    context(tmp_path / "a", MANIFEST)
    context(tmp_path / "no")
    assert [(work.name, work.platform) for work in read_suite(tmp_path, Choice())] == [
        ("a", "linux/arm64"),
        ("a", "linux/arm/v7"),
        ("b", "linux/arm64"),
    ]
    with pytest.raises(UsageError, match="no workload"):
        read_suite(tmp_path / "a", Choice())
