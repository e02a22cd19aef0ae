"""What else the people of this host use Docker with, on a machine's: compose, buildx and Testcontainers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import pytest

from tests.machine import throwaway
from tests.machine.conftest import Cli, interrupt, wait_until
from tests.machine.host_client import fetch, free_port, run_docker
from tests.machine.plugins import write_plugins

pytestmark = [
    pytest.mark.machine,
    pytest.mark.skipif(sys.platform != "linux", reason="the plugins are Debian's"),
]

CONTEXTS = Path(__file__).with_name("contexts")
IMAGE = "toolbox:1"
LIBRARIES = " ".join(f"lib/aarch64-linux-gnu/{name}" for name in ("libc.so.6", "libm.so.6", "libcrypt.so.1"))
MAKE_IMAGE = f"""
set -e
rm -rf /disk/toolbox
mkdir -p /disk/toolbox/bin /disk/toolbox/srv /disk/toolbox/tmp
cd /disk/toolbox
busybox --install -s bin
tar -C / -ch usr/bin/busybox usr/bin/perl lib/ld-linux-aarch64.so.1 {LIBRARIES} | tar -x
tar -c . | docker import - {IMAGE}
rm -rf /disk/toolbox
"""
"""Busybox under all its names, and perl: no registry has to be reached."""


@pytest.fixture(scope="module")
def env(machine: Cli, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a shell that has evaluated `vmbuild env`, its docker client with plugins."""
    folder = tmp_path_factory.mktemp("docker")
    write_plugins(machine.cache, folder)
    machine.guest(MAKE_IMAGE)
    told: dict[str, Any] = machine.ok("env", "--json", BUILDX_BUILDER="elsewhere").json()
    before = {**os.environ, "BUILDX_BUILDER": "elsewhere", "DOCKER_CONFIG": str(folder)}
    set_now: dict[str, str] = told["environment"]
    return {name: value for name, value in before.items() if name not in told["unset"]} | set_now


def test_compose_builds_and_runs_a_project(machine: Cli, env: dict[str, str]) -> None:
    host_port, port = free_port(), free_port()

    def compose(*args: str) -> str:
        return run_docker({**env, "PORT": str(port)}, "compose", *args, cwd=CONTEXTS / "project").decode()

    compose("up", "-d", "--build", "--wait")
    rows = [json.loads(line) for line in compose("ps", "--format", "json").splitlines()]
    assert {row["Service"]: row["State"] for row in rows} == {"web": "running", "asker": "running"}
    wait_until(lambda: "built for aarch64" in compose("logs", "asker"), "one service sees the other")
    machine.ok("forward", f"{host_port}:{port}")
    assert b"built for aarch64" in fetch(host_port)
    machine.ok("forward", "--remove", str(host_port))
    assert compose("exec", "-T", "web", "ls", "/kept") == "started\n"
    compose("down", "-t", "0")
    assert b"project_kept" in run_docker(env, "volume", "ls", "-q").split()
    compose("down", "--volumes", "--rmi", "local")
    assert b"project_kept" not in run_docker(env, "volume", "ls", "-q").split()


@pytest.mark.parametrize("build", ["buildx build --load -t made:1 .", "buildx bake --load", "build -t made:1 ."])
def test_what_the_default_builder_makes_is_in_the_guest(env: dict[str, str], tmp_path: Path, build: str) -> None:
    (tmp_path / "Dockerfile").write_text(f"FROM {IMAGE}\nRUN uname -m >/arch\n")
    (tmp_path / "docker-bake.json").write_text('{"target": {"default": {"tags": ["made:1"]}}}')
    run_docker(env, *build.split(), cwd=tmp_path)
    assert run_docker(env, "run", "--rm", "made:1", "cat", "/arch") == b"aarch64\n"
    run_docker(env, "rmi", "made:1")


ARCH_ALONE = f"FROM {IMAGE} AS made\nRUN uname -m >/arch\nFROM scratch\nCOPY --from=made /arch /\n"


def test_what_the_default_builder_makes_is_on_this_host(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(ARCH_ALONE)
    out = ("-o", f"type=local,dest={tmp_path}/out", "-o", f"type=docker,dest={tmp_path}/made.tar")
    for each in (out[:2], out[2:]):  # buildx 0.13 takes one at a time
        run_docker(env, "buildx", "build", *each, str(tmp_path))
    assert (tmp_path / "out" / "arch").read_text() == "aarch64\n"
    with tarfile.open(tmp_path / "made.tar") as tar:
        manifest = json.load(cast(IO[bytes], tar.extractfile("manifest.json")))
        assert json.load(cast(IO[bytes], tar.extractfile(manifest[0]["Config"])))["architecture"] == "arm64"


@pytest.fixture
def builder(machine: Cli, env: dict[str, str]) -> Iterator[str]:
    """An image that is used as BuildKit's, for builders that want one of their own."""
    run_docker(env, "buildx", "build", "-t", "builder:1", str(CONTEXTS / "builder"))
    bridge = machine.start(
        "exec", "socat", "TCP-LISTEN:2375,bind=127.0.0.1,fork,reuseaddr", "UNIX-CONNECT:/run/docker.sock"
    )
    yield "builder:1"
    interrupt(bridge, signal.SIGINT)


def test_the_guest_is_appended_to_a_builder(env: dict[str, str], builder: str, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(ARCH_ALONE)
    (tmp_path / "other.sock").symlink_to(env["DOCKER_HOST"].removeprefix("unix://"))

    def buildx(*args: str) -> str:
        return run_docker(env, "buildx", *args).decode()

    other = ("--driver-opt", "image=never:1", "--platform", "linux/amd64", f"unix://{tmp_path}/other.sock")
    buildx("create", "--name", "many", "--driver", "docker-container", *other)
    node = ("--node", "guest", "--platform", "linux/arm64", "--driver-opt", f"image={builder},network=host")
    buildx("create", "--append", "--name", "many", *node, env["DOCKER_HOST"])
    buildx("build", "--builder", "many", "--platform", "linux/arm64", "-o", str(tmp_path / "out"), str(tmp_path))
    assert (tmp_path / "out" / "arch").read_text() == "aarch64\n"
    nodes = buildx("inspect", "many").split("Name:")
    assert env["DOCKER_HOST"] in nodes[-1] and "running" in nodes[-1]
    assert b"buildx_buildkit_guest" in run_docker(env, "ps", "--format", "{{.Names}}").split()
    buildx("rm", "many")
    assert b"buildx_buildkit_guest" not in run_docker(env, "ps", "--format", "{{.Names}}").split()


@pytest.fixture
def followed(machine: Cli) -> Iterator[None]:
    """What containers publish is forwarded, as a user of Testcontainers has it."""
    follower = machine.start("forward", "--containers")
    yield
    assert interrupt(follower, signal.SIGINT).code == 0


def run_throwaway(env: dict[str, str], *args: str, **more: str) -> str:
    """Run the program that uses Testcontainers, and return what it says."""
    argv = [sys.executable, throwaway.__file__, IMAGE, *args]
    more["no_proxy"] = "127.0.0.1"
    done = subprocess.run(argv, env={**env, **more}, capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_testcontainers_finds_what_it_starts(env: dict[str, str], followed: None) -> None:
    assert run_throwaway(env, TESTCONTAINERS_RYUK_DISABLED="true") == "from a test aarch64\n"
    assert run_docker(env, "ps", "-aq", "--filter", "label=org.testcontainers") == b""


def test_what_testcontainers_leaves_is_reaped(env: dict[str, str], followed: None) -> None:
    run_docker(env, "buildx", "build", "-t", "reaper:1", str(CONTEXTS / "reaper"))
    reaper = {"TESTCONTAINERS_RYUK_DISABLED": "false", "RYUK_CONTAINER_IMAGE": "reaper:1"}
    assert run_throwaway(env, "leave", **reaper) == "from a test aarch64\n"
    label = ("ps", "-aq", "--filter", "label=org.testcontainers")
    wait_until(lambda: run_docker(env, *label) == b"", "what was left is removed, and who removes it has ended")
