"""The side without a machine: what buildah is asked for, and what the host must have."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from vmbuild.bench import binfmt, userspace
from vmbuild.bench.binfmt import EMULATORS
from vmbuild.bench.userspace import Runner, Userspace
from vmbuild.bench.workload import Workload
from vmbuild.errors import HostError

BUILDAH = """#!/bin/sh
[ "$1" = --version ] && { echo buildah version 1.39; exit; }
while [ "${1#--}" != "$1" ]; do shift 2; done
echo "$*" >>"$FAKE_LOG"
case $1 in
pull) echo Getting image; echo 0123abcd ;;
from) echo Getting image; echo work-1 ;;
bud) echo "STEP 1/2: FROM debian"; echo "STEP 2/2: RUN true"; echo "COMMIT x" ;;
push) for place; do :; done; echo archive >"${place#docker-archive:}" ;;
esac
"""


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fake buildah and fake emulators, first on PATH; where buildah tells what it was asked for."""
    folder = tmp_path / "bin"
    folder.mkdir()
    version = "#!/bin/sh\necho qemu-aarch64 version 10.0.2\n"
    for name, text in (("buildah", BUILDAH), ("qemu-aarch64-static", version), ("qemu-arm-static", version)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    monkeypatch.setattr(binfmt, "find_registered", lambda _: "qemu-aarch64-static")
    return tmp_path / "log"


def work(folder: Path) -> Workload:
    return Workload("it", folder, folder / "Dockerfile", build_args={"SIZE": "3 4"}, target="last")


def host_side(folder: Path, platform: str = "linux/arm64") -> Userspace:
    return Userspace(folder, platform, Runner.HOST, EMULATORS[platform])


def test_the_script_builds_and_writes_the_archive(tmp_path: Path) -> None:
    script = host_side(tmp_path).build_script(work(tmp_path), tmp_path / "o.tar")
    first, build, push = script.splitlines()
    assert first == "set -e"
    words = shlex.split(build)
    assert words[:3] == ["buildah", "--root", str(tmp_path / "host-linux-arm64/root")]
    for option in (["--isolation", "chroot"], ["--platform", "linux/arm64"]):
        assert any(words[at : at + 2] == option for at in range(len(words))), option
    assert {"--no-cache", "--layers=false", "--pull-never", "SIZE=3 4", "last"} <= set(words)
    assert words[-1] == str(tmp_path)
    assert shlex.split(push)[-1] == f"docker-archive:{tmp_path}/o.tar"


def test_platforms_and_runners_have_a_storage_each(tmp_path: Path) -> None:
    chroot = Userspace(tmp_path, "linux/arm64", Runner.CHROOT, EMULATORS["linux/arm64"])
    places = {side.buildah()[2] for side in (host_side(tmp_path), host_side(tmp_path, "linux/arm/v7"), chroot)}
    assert len(places) == 3


NAME = "docker.io/library/debian:trixie-slim"


def test_a_base_image_tells_the_emulator_its_cpu(tmp_path: Path, log: Path) -> None:
    host_side(tmp_path).import_base(NAME, tmp_path / "base.tar")
    assert log.read_text().splitlines() == [
        f"pull --quiet docker-archive:{tmp_path}/base.tar",
        f"tag 0123abcd {NAME}",
        f"from --pull-never --platform linux/arm64 {NAME}",
        "config --env QEMU_CPU=cortex-a76 work-1",
        f"commit --quiet --rm work-1 {NAME}",
        "rm --all",
        "rmi --prune",
    ]


def test_what_vmbuild_cannot_make_is_pulled(tmp_path: Path, log: Path) -> None:
    host_side(tmp_path).import_base("docker.io/library/alpine:3.22", None)
    assert log.read_text().splitlines()[0] == "from --pull --platform linux/arm64 docker.io/library/alpine:3.22"


def test_a_native_build_has_no_emulator(tmp_path: Path, log: Path) -> None:
    native = Userspace(tmp_path, "linux/arm64", Runner.NATIVE, None)
    native.import_base(NAME, tmp_path / "base.tar")
    assert "QEMU_CPU" not in log.read_text()


def test_a_build_leaves_its_archive_alone(tmp_path: Path, log: Path) -> None:
    (tmp_path / "o.tar").write_text("of the run before")
    found = host_side(tmp_path).run_build(work(tmp_path), tmp_path / "o.tar")
    assert (tmp_path / "o.tar").read_text() == "archive\n"
    assert [line.text for line in found.lines][-1] == "COMMIT x"
    assert log.read_text().splitlines()[-1] == "rmi --force localhost/vmbuild-bench:latest"


def test_in_a_namespace_the_emulator_is_registered_before_anything_runs(tmp_path: Path, log: Path) -> None:
    side = Userspace(tmp_path, "linux/arm64", Runner.CHROOT, EMULATORS["linux/arm64"])
    command = side.command(["buildah", "images"])
    assert list(command.argv[:3]) == ["unshare", "--user", "--mount"]
    assert command.argv[-4].startswith(":qemu-aarch64:M::")
    assert f":{log.parent}/bin/qemu-aarch64-static:POF" in command.argv[-4]
    assert list(command.argv[-3:]) == [str(os.getuid()), "buildah", "images"]
    assert command.ready == userspace.READY


def test_auto_takes_what_the_host_has(tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert userspace.open_userspace("linux/arm64", "auto", tmp_path).runner is Runner.HOST
    monkeypatch.setattr(binfmt, "find_registered", lambda _: None)
    monkeypatch.setattr(binfmt, "check_namespaces", lambda: None)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert userspace.open_userspace("linux/arm64", "auto", tmp_path).runner is Runner.CHROOT


def test_a_host_that_knows_no_emulator_says_why_and_what_else_there_is(
    tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(binfmt, "find_registered", lambda _: None)
    with pytest.raises(HostError, match="runs no programs for linux/arm64") as caught:
        userspace.open_userspace("linux/arm64", "host", tmp_path)
    assert "The reason: " in caught.value.details
    assert "--user-runner chroot" in caught.value.resolution


def test_native_is_for_arm_hosts(tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    with pytest.raises(HostError, match="itself"):
        userspace.open_userspace("linux/arm64", "native", tmp_path)
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert userspace.open_userspace("linux/arm64", "native", tmp_path).emulator is None


def test_a_missing_builder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="buildah is not installed"):
        userspace.open_userspace("linux/arm64", "auto", tmp_path)


def test_the_report_names_what_ran(tmp_path: Path, log: Path) -> None:
    facts = host_side(tmp_path).describe()
    assert facts["qemu"] == "10.0.2"
    assert facts["cpu"] == "cortex-a76"
    assert facts["builder"] == "buildah version 1.39"
