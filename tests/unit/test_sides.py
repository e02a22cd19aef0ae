"""The sides of a comparison: what is brought up, and that both get the same."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vmbuild import build, operate, process, sides
from vmbuild.bench import binfmt, engine, userspace
from vmbuild.bench.engine import Engine
from vmbuild.bench.userspace import Runner, Userspace
from vmbuild.bench.workload import Workload
from vmbuild.errors import HostError, UsageError
from vmbuild.model import GIB, Arch, Home, MachineRequest
from vmbuild.report import SilentReporter
from vmbuild.sides import Asked

REQUEST = MachineRequest("bench", 2, 2048, 8 * GIB, "debian-13-arm64", demanded=frozenset({"disk"}))


class Listener(SilentReporter):
    """Keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What is done to machines and to buildah's storage, none of which is there."""
    log: list[tuple[Any, ...]] = []
    monkeypatch.setattr(operate, "down", lambda name, *_: log.append(("down", name)))
    monkeypatch.setattr(operate, "exists", lambda name, _: name != "bench-new-vm")
    monkeypatch.setattr(operate, "up", lambda request, *_: log.append(("up", request.name)))

    def base(request: MachineRequest, reference: str, *_: object, platforms: object, force: bool) -> None:
        log.append(("base", request.name, reference, platforms))

    def export(request: MachineRequest, reference: str, platform: str, *_: object) -> None:
        log.append(("export", request.name, reference, platform))

    def open_userspace(platform: str, runner: str, folder: Path) -> Userspace:
        log.append(("open", platform, runner))
        return Userspace(folder, platform, Runner.HOST, binfmt.EMULATORS[platform])

    def open_engine(platform: str) -> Engine:
        log.append(("open docker", platform))
        return Engine(platform, binfmt.EMULATORS[platform], "default")

    monkeypatch.setattr(build, "base", base)
    monkeypatch.setattr(sides, "_export_base", export)
    monkeypatch.setattr(userspace, "open_userspace", open_userspace)
    for kind in (Userspace, Engine):
        monkeypatch.setattr(kind, "import_base", lambda _, *given: log.append(("import", given[0], name_of(given[1]))))
        monkeypatch.setattr(kind, "close", lambda _: log.append(("close",)))
    monkeypatch.setattr(engine, "open_engine", open_engine)
    monkeypatch.setattr(sides, "_warn_of_versions", lambda *_: None)
    return log


def name_of(path: Path | None) -> str | None:
    return path.name if path else None


def work(folder: Path, *bases: str) -> Workload:
    return Workload("it", folder, folder / "Dockerfile", platform="linux/arm/v7", bases=bases)


def opened(folder: Path, names: tuple[str, ...], *bases: str) -> tuple[list[sides.Side], ExitStack]:
    asked = Asked((), names, "chroot", "a-disk", "")
    stack = ExitStack()
    home = Home(folder, folder)
    return sides.open_sides(REQUEST, asked, work(folder, *bases), home, SilentReporter(), folder, stack), stack


def test_both_sides_get_the_machines_base_image(tmp_path: Path, calls: list[tuple[Any, ...]]) -> None:
    found, stack = opened(tmp_path, ("vm", "user"), "debian:trixie-slim", "alpine:3.22")
    assert [side.name for side in found] == ["vm", "user"]
    assert calls == [
        ("open", "linux/arm/v7", "chroot"),
        ("down", "bench-vm"),
        ("base", "bench-vm", "debian:trixie-slim", ("linux/arm/v7",)),
        ("export", "bench-vm", "debian:trixie-slim", "linux/arm/v7"),
        ("import", "docker.io/library/debian:trixie-slim", "base-0.tar"),
        ("import", "docker.io/library/alpine:3.22", None),
    ]
    stack.close()
    assert calls[-2:] == [("down", "bench-vm"), ("close",)]


@pytest.mark.parametrize(
    ("runner", "programs", "opened_by"),
    [
        ("docker", ("buildah", "docker"), "open docker"),
        ("auto", ("docker",), "open docker"),
        ("auto", ("buildah", "docker"), "open"),
        ("auto", (), "open"),
        ("host", ("docker",), "open"),
    ],
)
def test_docker_is_the_other_side_where_it_is_asked_for_or_all_there_is(
    tmp_path: Path,
    calls: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
    runner: str,
    programs: tuple[str, ...],
    opened_by: str,
) -> None:
    monkeypatch.setattr(process, "has_program", lambda name: name in programs)
    asked, report = Asked((), ("vm", "user"), runner, "a-disk", ""), Listener()
    request, home = replace(REQUEST, cpus=1), Home(tmp_path, tmp_path)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    sides.open_sides(request, asked, work(tmp_path), home, report, tmp_path, ExitStack())
    assert calls[0][0] == opened_by
    assert report.warnings == (
        ["Docker's engine builds on all 4 CPUs of this host, the machine on 1"] if opened_by == "open docker" else []
    )


def test_a_machine_that_never_was_is_not_stopped(tmp_path: Path, calls: list[tuple[Any, ...]]) -> None:
    asked = Asked((), ("vm",), "auto", "a-disk", "")
    request, home, report = replace(REQUEST, name="bench-new"), Home(tmp_path, tmp_path), SilentReporter()
    sides.open_sides(request, asked, work(tmp_path), home, report, tmp_path, ExitStack())
    assert calls == []


def test_each_machine_is_one_of_its_own(tmp_path: Path, calls: list[tuple[Any, ...]]) -> None:
    found, _ = opened(tmp_path, ("vm", "vm-cold"))
    calls.clear()
    for side in found:
        side.before()
    assert calls == [("up", "bench-vm"), ("down", "bench-vm-cold")]


def test_without_a_machine_there_is_no_base_image(tmp_path: Path, calls: list[tuple[Any, ...]]) -> None:
    with pytest.raises(UsageError, match="made in a machine"):
        opened(tmp_path, ("user",), "debian:trixie-slim")


def test_what_the_host_cannot_is_said_before_a_machine_starts(
    tmp_path: Path, calls: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> Userspace:
        raise HostError("no")

    monkeypatch.setattr(userspace, "open_userspace", refuse)
    with pytest.raises(HostError):
        opened(tmp_path, ("vm", "user"), "debian:trixie-slim")
    assert calls == []


def test_a_machine_builds_by_the_command_that_a_user_types(tmp_path: Path) -> None:
    one = replace(work(tmp_path), build_args={"SIZE": "3"}, target="last")
    argv = sides._build_argv(REQUEST, one, tmp_path / "o.tar")
    assert argv[1:5] == ["-m", "vmbuild", "build", str(tmp_path)]
    for option in (
        *(["--name", "bench"], ["--platform", "linux/arm/v7"], ["--progress", "rawjson"]),
        *(["--output", str(tmp_path / "o.tar")], ["--build-arg", "SIZE=3"], ["--target", "last"]),
    ):
        assert any(argv[at : at + 2] == option for at in range(len(argv))), option
    assert "--no-cache" in argv


def test_its_settings_are_passed_on(tmp_path: Path) -> None:
    env = sides._build_env(replace(REQUEST, arch=Arch.ARMHF), Home(tmp_path / "c", tmp_path / "s"))
    assert env["VMBUILD_CPUS"] == "2"
    assert env["VMBUILD_MEMORY"] == "2048M"
    assert env["VMBUILD_ARCH"] == "arm"
    assert env["VMBUILD_SNAPSHOTS"] == "off"
    assert env["CI"]  # an idle machine is not renewed while the other side builds
    assert (env["VMBUILD_CACHE_DIR"], env["VMBUILD_STATE_DIR"]) == (str(tmp_path / "c"), str(tmp_path / "s"))


def test_machines_of_a_comparison_start_from_no_snapshot(tmp_path: Path) -> None:
    asked = Asked((), ("vm", "vm-disk"), "auto", "a-disk", "")
    own = sides._request_for("vm", REQUEST, asked)
    assert (own.name, own.image, own.snapshots, own.demanded) == ("bench-vm", REQUEST.image, False, frozenset())
    assert sides._request_for("vm-disk", REQUEST, asked).image == "a-disk"


@pytest.mark.parametrize(("theirs", "warnings"), [("10.0.2 (Debian 2)", 0), ("9.2.0", 1)])
def test_two_versions_of_qemu_are_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, programs: Path, theirs: str, warnings: int
) -> None:
    side = Userspace(tmp_path, "linux/arm64", Runner.CHROOT, binfmt.EMULATORS["linux/arm64"])
    monkeypatch.setattr(Userspace, "program", "user")
    monkeypatch.setattr(binfmt, "version_of", lambda name: theirs if name == "user" else "10.0.2 (Debian 1)")
    listener = Listener()
    sides._warn_of_versions({"user": side}, REQUEST, Home(tmp_path, tmp_path), listener)
    assert len(listener.warnings) == warnings
