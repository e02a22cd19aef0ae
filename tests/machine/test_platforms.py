"""One container image for several platforms, built in one 64-bit machine."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.machine.conftest import BASE, EXAMPLES, Cli, leave_out_updates

pytestmark = pytest.mark.machine

PLATFORMS = {
    "linux/arm64": ("aarch64", "arm64", "qemu-aarch64-static"),
    "linux/arm/v7": ("armv7l", "armhf", "qemu-arm-static"),
    "linux/arm/v6": ("armv6l", "armel", "qemu-arm-static"),
}
"""What `uname -m` and Debian call each, and what runs its programs on another host."""

DOCKERFILE = f"""
FROM {BASE} AS look
RUN uname -m >/told && dpkg --print-architecture >>/told && cat /told
FROM scratch
COPY --from=look /told /told
COPY --from=look /usr/bin/dash /bin/sh
COPY --from=look /usr/lib /lib
"""


@pytest.fixture(scope="module")
def bases(machine: Cli) -> Cli:
    """The machine, with the base image for all platforms: the last is added to the others."""
    first, *others = reversed(PLATFORMS)
    machine.ok("base", BASE, "--platform", first)
    made = machine.ok("base", BASE, "--platform", ",".join(others), "--json").json()
    assert made["platforms"] == others
    return machine


@pytest.fixture(scope="module")
def archive(bases: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("platforms")
    (folder / "Dockerfile").write_text(DOCKERFILE)
    options = ("--platform", ",".join(PLATFORMS), "-t", "told:1", "--no-cache")
    bases.ok("build", str(folder), *options, "--iidfile", str(folder / "id"), "-o", str(folder / "out.tar"))
    return folder / "out.tar"


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_container_of_each_platform_knows_its_machine(bases: Cli, platform: str) -> None:
    said = bases.guest(f"docker run --rm --platform {platform} {BASE} sh -c 'uname -m; dpkg --print-architecture'")
    assert tuple(said.split()) == PLATFORMS[platform][:2]


def test_who_comes_in_later_sees_the_same_machine_and_codes_and_signals_get_through(bases: Cli) -> None:
    run = f"docker run -d --platform linux/arm/v6 {BASE} sh -c 'trap \"exit 3\" TERM; while :; do sleep 0.2; done'"
    script = f"id=$({run}); docker exec $id sh -c 'uname -m; exit 7'; echo $?; docker stop -t 30 $id >/dev/null"
    said = bases.guest(f"{script}; docker inspect --format '{{{{.State.ExitCode}}}}' $id; docker rm $id >/dev/null")
    assert said.split() == ["armv6l", "7", "3"]


def test_the_archive_holds_each_platform_and_each_blob_once(archive: Path) -> None:
    raw = subprocess.check_output(["skopeo", "inspect", "--raw", f"oci-archive:{archive}"])
    assert archive.with_name("id").read_text().strip() == f"sha256:{hashlib.sha256(raw).hexdigest()}"
    assert ["/".join(platform_of(each)) for each in json.loads(raw)["manifests"]] == list(PLATFORMS)
    with tarfile.open(archive) as tar:
        names = tar.getnames()
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_step_of_each_platform_knew_its_machine_and_its_programs_run_elsewhere(
    archive: Path, tmp_path: Path, platform: str
) -> None:
    machine, debian, emulator = PLATFORMS[platform]
    root = unpack(archive, tmp_path, platform)
    assert (root / "told").read_text().split() == [machine, debian]
    if shutil.which(emulator) is None:
        pytest.skip(f"{emulator} is not installed")
    said = subprocess.check_output([emulator, "-L", str(root), str(root / "bin/sh"), "-c", "echo $((6 * 7))"])
    assert said == b"42\n"


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_example_is_compiled_for_each_platform(hello: Path, tmp_path: Path, platform: str) -> None:
    machine, _, emulator = PLATFORMS[platform]
    program = unpack(hello, tmp_path, platform) / "usr/local/bin/hello"
    said = subprocess.check_output(["readelf", "-h", "-A", str(program)], text=True)
    assert re.search(rf"(Machine: +|Tag_CPU_arch: ){CPU_ARCH[machine]}$", said, re.MULTILINE), said
    assert "Hello from " in subprocess.check_output([emulator, str(program)], text=True)
    assert machine in subprocess.check_output(["cat", str(hello.with_name("log"))], text=True)


CPU_ARCH = {"aarch64": "AArch64", "armv7l": "v7", "armv6l": "v6"}
"""What readelf calls the CPUs that a program is for."""


@pytest.fixture(scope="module")
def hello(bases: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive of examples/hello for all platforms, beside the log of its build."""
    folder = tmp_path_factory.mktemp("hello")
    leave_out_updates(bases, folder, tuple(PLATFORMS))
    options = ("--platform", ",".join(PLATFORMS), "--progress", "plain", "-o", str(folder / "hello.tar"))
    (folder / "log").write_text(bases.ok("build", str(EXAMPLES / "hello"), *options, timeout_s=1500).err)
    return folder / "hello.tar"


def platform_of(descriptor: dict[str, Any]) -> list[str]:
    """Return the parts of a platform's name; of arm64 the variant is understood."""
    parts = descriptor["platform"]
    return [parts["os"], parts["architecture"], *([parts["variant"]] if parts["architecture"] == "arm" else [])]


def unpack(archive: Path, folder: Path, platform: str) -> Path:
    """Return the files of one platform, by way of a copy of all that skopeo has checked."""
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(folder), "TMPDIR": str(folder)}
    copy = ["skopeo", "copy", "--all", "--insecure-policy", f"oci-archive:{archive}", f"dir:{folder}/all"]
    subprocess.run(copy, check=True, capture_output=True, env=environment)
    index = json.loads((folder / "all/manifest.json").read_text())
    (found,) = (each["digest"] for each in index["manifests"] if "/".join(platform_of(each)) == platform)
    manifest = json.loads((folder / "all" / f"{found.removeprefix('sha256:')}.manifest.json").read_text())
    for layer in manifest["layers"]:
        with tarfile.open(folder / "all" / layer["digest"].removeprefix("sha256:")) as tar:
            tar.extractall(folder / "root", filter="tar")
    return folder / "root"
