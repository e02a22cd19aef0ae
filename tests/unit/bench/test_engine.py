"""The side that is Docker: what it is asked for, what is left behind, and what it has to be."""

from __future__ import annotations

import os
import platform
import shlex
from pathlib import Path

import pytest

from vmbuild.bench import binfmt, engine
from vmbuild.bench.binfmt import EMULATORS
from vmbuild.bench.engine import Engine
from vmbuild.bench.runner import RunFailedError
from vmbuild.bench.workload import IMAGE, Workload
from vmbuild.errors import HostError

DOCKER = """#!/bin/sh
echo "$*" >>"$FAKE_LOG"
[ -z "$BUILDX_BUILDER" ] || exit 9
case $* in
load*) echo Loaded image: localhost/vmbuild-bench/debian:trixie-slim ;;
"buildx version") exit ${FAKE_BUILDX:-0} ;;
"buildx build"*) for context; do :; done; cat "$context/Dockerfile" >>"$FAKE_LOG"; exit ${FAKE_BUILD:-0} ;;
save*) echo archive >"$3" ;;
info*) echo "$FAKE_ARCHITECTURE" ;;
"context show") echo desktop ;;
version*) echo 26.1.5 ;;
esac
"""
NAME = "docker.io/library/debian:trixie-slim"
ENGINE = Engine("linux/arm64", EMULATORS["linux/arm64"], "desktop")


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fake docker, first on PATH, and where it tells what it was asked for."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("docker", DOCKER), ("emulator", "#!/bin/sh\necho qemu-aarch64 version 10.0.2\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("FAKE_ARCHITECTURE", platform.machine())
    monkeypatch.setenv("BUILDX_BUILDER", "elsewhere")
    monkeypatch.setattr(binfmt, "find_registered", lambda _: str(folder / "emulator"))
    monkeypatch.setattr(engine, "find_daemons", lambda: [os.getpid()])
    return tmp_path / "log"


@pytest.fixture
def work(tmp_path: Path) -> Workload:
    (tmp_path / "Dockerfile").write_text("FROM debian:trixie-slim\nRUN true\n")
    return Workload("it", tmp_path, tmp_path / "Dockerfile", build_args={"SIZE": "3 4"}, target="last")


def opened() -> Engine:
    return engine.open_engine("linux/arm64")


def test_the_builder_is_the_engines_own(log: Path) -> None:
    assert opened() == ENGINE


def test_a_base_image_tells_the_emulator_its_cpu_and_takes_no_name_of_the_users(log: Path) -> None:
    side = opened()
    log.unlink()
    side.import_base(NAME, Path("/x/base.tar"))
    load, build, *dockerfile = log.read_text().splitlines()
    assert load == "load --quiet --input /x/base.tar"
    assert dockerfile == ["FROM localhost/vmbuild-bench/debian:trixie-slim", "ENV QEMU_CPU=cortex-a76"]
    words = build.split()
    assert {"--pull=false", "--load", "linux/arm64"} <= set(words)
    assert words[words.index("--builder") + 1] == "desktop"
    own = words[words.index("--tag") + 1]
    assert own.startswith("localhost/vmbuild-bench-base:")
    side.close()
    assert log.read_text().splitlines()[-1] == (f"image rm --force {own} localhost/vmbuild-bench/debian:trixie-slim")


def test_what_vmbuild_cannot_make_is_pulled(log: Path) -> None:
    opened().import_base("docker.io/library/alpine:3.22", None)
    *_, build, first, _ = log.read_text().splitlines()
    assert "--pull --tag" in build
    assert first == "FROM docker.io/library/alpine:3.22"


def test_a_build_is_from_these_base_images_and_leaves_its_archive_alone(log: Path, work: Workload) -> None:
    side = opened()
    side.import_base(NAME, Path("/x/base.tar"))
    first, build, save = side.build_script(work, Path("/y/o.tar")).splitlines()
    assert first == "set -e"
    words = shlex.split(build)
    assert words[:3] == ["docker", "buildx", "build"]
    for option in (
        *(["--progress", "rawjson"], ["--build-arg", "SIZE=3 4"], ["--target", "last"], ["--provenance", "false"]),
        ["--build-context", f"{NAME}=docker-image://{side.bases[NAME]}"],
    ):
        assert any(words[at : at + 2] == option for at in range(len(words))), option
    assert {"--no-cache", "--load"} <= set(words)
    assert words[-1] == str(work.context)
    assert shlex.split(save) == ["docker", "save", "--output", "/y/o.tar", IMAGE]
    side.run_build(work, work.context / "o.tar")
    assert (work.context / "o.tar").read_text() == "archive\n"
    assert log.read_text().splitlines()[-1] == f"image rm --force {IMAGE}"


def test_a_build_that_fails_says_so(log: Path, work: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_BUILD", "3")
    with pytest.raises(RunFailedError, match="exit code 3"):
        opened().run_build(work, work.context / "o.tar")


def test_the_report_names_what_ran(log: Path) -> None:
    facts = opened().describe()
    assert facts["builder"] == "Docker 26.1.5, on all CPUs of the host"
    assert (facts["qemu"], facts["cpu"]) == ("10.0.2", "cortex-a76")
    assert facts["what"].startswith("docker buildx")


def test_an_emulator_that_came_from_a_container_has_a_version_that_nobody_knows(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(binfmt, "find_registered", lambda _: "/usr/bin/only-in-a-container")
    assert opened().qemu_version() == ""
    assert opened().describe()["qemu"] == "not known"


def test_an_engine_elsewhere_cannot_be_counted(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_ARCHITECTURE", "s390x")
    with pytest.raises(HostError, match="does not run on this host"):
        opened()
    monkeypatch.setenv("FAKE_ARCHITECTURE", platform.machine())
    monkeypatch.setattr(engine, "find_daemons", list)
    with pytest.raises(HostError, match="does not run on this host"):
        opened()


def test_without_buildx_or_an_emulator_it_cannot_be(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_BUILDX", "1")
    with pytest.raises(HostError, match="docker"):
        opened()
    monkeypatch.setattr(binfmt, "find_registered", lambda _: None)
    with pytest.raises(HostError, match="runs no programs for linux/arm64") as caught:
        opened()
    assert "binfmt" in caught.value.resolution


def test_an_engine_is_found_by_its_processes(tmp_path: Path) -> None:
    for pid, name in ((17, "dockerd"), (18, "containerd"), (19, "containerd-shim"), (20, "bash")):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "comm").write_text(f"{name}\n")
    assert sorted(engine.find_daemons(tmp_path)) == [17, 18]
