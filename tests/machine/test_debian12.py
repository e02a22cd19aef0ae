"""Debian 12's appliances: Docker of Debian 13 on the libraries and the kernel of Debian 12."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.machine.conftest import Cli, wait_until
from tests.machine.host_client import fetch, free_port, run_docker
from tests.machine.sources import served
from tests.machine.test_snapshot import WarmCli, assert_restored

pytestmark = [
    pytest.mark.machine,
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(shutil.which("qemu-system-arm") is None, reason="qemu-system-arm is not installed"),
]

BASE = "debian:bookworm-slim"
DOCKERFILE = f"""FROM {BASE} AS look
ARG PORT
RUN uname -m >/told && cut -d . -f 1 /etc/debian_version >>/told
RUN bash -c 'exec 3<>/dev/tcp/10.0.2.2/'$PORT' && printf "GET /word HTTP/1.0\\r\\n\\r\\n" >&3 && tail -n 1 <&3' >>/told
FROM scratch
COPY --from=look /told /told
"""
"""The second step asks this host: it has a network, and a name for where that leads."""


@dataclass(frozen=True)
class Row:
    """A guest image: what its kernel calls the machine, and each container on it."""

    image: str
    machine: str
    containers: dict[str, str]


ROWS = (
    Row("debian-12-arm64", "aarch64", {"linux/arm64": "aarch64", "linux/arm/v7": "armv7l"}),
    Row("debian-12-armhf", "armv7l", {"linux/arm/v7": "armv7l"}),
)


@dataclass(frozen=True)
class Bookworm:
    """A machine of a row, base images in it."""

    row: Row
    cli: Cli


@pytest.fixture(scope="module", params=ROWS, ids=lambda row: row.image)
def bookworm(request: pytest.FixtureRequest, cli: Cli) -> Iterator[Bookworm]:
    """A machine with Debian 12's base image for all its platforms; it goes at the end."""
    row: Row = request.param
    program = cli.named(row.image)
    program.ok("up", "--image", row.image)
    program.ok("base", BASE, "--platform", ",".join(row.containers), timeout_s=1800)
    yield Bookworm(row, program)
    program.ok("destroy", "--yes")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.image)
def test_it_starts_from_a_snapshot(cli: Cli, tmp_path: Path, row: Row) -> None:
    cli.ok("images", "fetch", "--image", row.image)
    warm = WarmCli(tmp_path, cli.state, f"warm-{row.image}")
    shutil.copytree(cli.cache / "images", warm.cache / "images")
    warm.ok("images", "snapshot", "--image", row.image)
    try:
        assert_restored(warm.ok("up", "--image", row.image))
        assert warm.guest("docker info --format '{{.Driver}}'; uname -m").split() == ["overlayfs", row.machine]
    finally:
        warm.run("destroy", "--yes")


def test_it_is_debian_12_with_a_docker_that_is_newer(bookworm: Bookworm) -> None:
    said = bookworm.cli.guest("uname -m; uname -r | cut -d . -f 1-2; cut -d . -f 1 /etc/debian_version")
    assert said.split() == [bookworm.row.machine, "6.1", "12"]
    wanted = "{{.Architecture}} {{.Driver}} {{.CgroupVersion}} {{.ServerVersion}}"
    *facts, version = bookworm.cli.guest(f"docker info --format '{wanted}'").split()
    assert facts == [bookworm.row.machine, "overlayfs", "2"]
    assert int(version.split(".")[0]) >= 26
    assert "docker/buildx" in bookworm.cli.guest("docker buildx version")
    assert "zram" in bookworm.cli.guest("cat /proc/swaps")


def test_it_builds_for_each_platform_that_it_runs(bookworm: Bookworm, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(DOCKERFILE)
    (tmp_path / "served").mkdir()
    (tmp_path / "served/word").write_text("from the host\n")
    for platform, machine in bookworm.row.containers.items():
        out = tmp_path / machine
        with served(tmp_path / "served") as url:
            options = ("--platform", platform, "--build-arg", f"PORT={urlsplit(url).port}", "-o", f"{out}/")
            bookworm.cli.ok("build", str(tmp_path), *options)
        assert (out / "told").read_text() == f"{machine}\n12\nfrom the host\n"


def test_the_hosts_client_and_its_ports_reach_it(bookworm: Bookworm) -> None:
    env = {**os.environ, **bookworm.cli.ok("env", "--json").json()["environment"]}
    data = os.urandom(1_000_000)
    assert run_docker(env, "run", "--rm", "-i", BASE, "cat", stdin=data) == data
    port = free_port()
    serve = """perl -MSocket -e 'socket(S, PF_INET, SOCK_STREAM, 0); bind(S, sockaddr_in(80, INADDR_ANY)); listen(S, 9);
        while (accept(C, S)) { sysread(C, $_, 4096); syswrite(C, "from the guest"); close(C) }'"""
    run_docker(env, "run", "-d", "--name", "server", "-p", f"{port}:80", BASE, "sh", "-c", serve)
    bookworm.cli.ok("forward", str(port))
    wait_until(lambda: fetch(port) == b"from the guest", "the container answers on this host")
    run_docker(env, "rm", "-f", "server")


def test_it_is_resized_and_suspended_as_any_other(bookworm: Bookworm) -> None:
    most = bookworm.cli.ok("status", "--json").json()["cpus"]
    bookworm.cli.ok("resize", "--memory", "1G", "--cpus", "1")
    assert bookworm.cli.ok("status", "--json").json()["memory_now_mib"] < 1100
    assert bookworm.cli.guest("nproc").strip() == "1"
    bookworm.cli.ok("resize", "--memory", "2G", "--cpus", str(most))
    bookworm.cli.guest("echo kept >/run/kept")
    bookworm.cli.ok("suspend")
    bookworm.cli.ok("up")
    assert bookworm.cli.guest("cat /run/kept; uname -m").split() == ["kept", bookworm.row.machine]
    assert abs(int(bookworm.cli.guest("date +%s")) - int(subprocess.check_output(["date", "+%s"]))) <= 5
