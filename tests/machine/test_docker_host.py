"""A machine as a Docker host: clients of this host, commands, files and ports, as people use them."""

from __future__ import annotations

import io
import json
import os
import signal
import stat
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import jsonschema
import pytest

from tests.machine.conftest import CLI, Cli, interrupt, on_terminal, wait_until
from tests.machine.host_client import fetch, free_port, run_docker
from vmbuild import schemas

pytestmark = pytest.mark.machine

IMAGE = "tiny:1"
BUSYBOX = "/bin/busybox"
SCHEMAS = Path(__file__).parents[2] / "docs" / "schemas"


@pytest.fixture(scope="module")
def env(machine: Cli) -> dict[str, str]:
    """The environment of a shell that has evaluated `vmbuild env`, a small image in the machine's Docker."""
    told = machine.ok("env", "--json").json()
    env = {**os.environ, **told["environment"]}
    machine.guest(f"tar -C / -c bin/busybox | docker import -c 'ENTRYPOINT [\"/bin/busybox\"]' - {IMAGE}")
    return env


def serve_in_container(env: dict[str, str], port: int) -> str:
    """Start a container with a small server in it, published at a port; return its id."""
    script = f"while true; do printf 'HTTP/1.0 200 OK\\r\\n\\r\\nfrom the guest' | {BUSYBOX} nc -l -p 80; done"
    return run_docker(env, "run", "-d", "-p", f"{port}:80", IMAGE, "sh", "-c", script).decode().strip()


def test_a_shell_that_evaluates_it_reaches_the_guests_docker(machine: Cli, env: dict[str, str]) -> None:
    script = 'eval "$(vmbuild env)"; docker version --format "{{.Server.Os}}/{{.Server.Arch}}"'
    path = f"{CLI.parent}{os.pathsep}{machine.env['PATH']}"
    done = subprocess.run(["sh", "-c", script], env={**machine.env, "PATH": path}, capture_output=True, check=True)
    assert done.stdout.strip() == b"linux/arm64"


def test_nobody_else_can_open_the_socket(machine: Cli, env: dict[str, str]) -> None:
    path = Path(env["DOCKER_HOST"].removeprefix("unix://"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((machine.state / "machines" / machine.name).stat().st_mode) == 0o700


def test_who_has_said_all_still_hears_the_answer(env: dict[str, str]) -> None:
    data = os.urandom(1_000_000)
    assert run_docker(env, "run", "--rm", "-i", IMAGE, "cat", stdin=data) == data
    archive = run_docker(env, "save", IMAGE)
    run_docker(env, "rmi", IMAGE)
    assert IMAGE in run_docker(env, "load", stdin=archive).decode()


def test_docker_py_is_a_client_too(env: dict[str, str]) -> None:
    client = docker.from_env(environment=env)
    assert client.ping()
    assert client.containers.run(IMAGE, ["uname", "-m"], remove=True) == b"aarch64\n"
    client.close()


def test_the_guests_own_client_on_pipes(machine: Cli, env: dict[str, str]) -> None:
    done = machine.run("docker", "--", "run", "--rm", "-i", IMAGE, "sh", "-c", f"{BUSYBOX} cat; exit 7", stdin=b"in\n")
    assert (done.code, done.out) == (7, b"in\n")


def test_the_guests_own_client_on_a_terminal(machine: Cli, env: dict[str, str]) -> None:
    with on_terminal(machine, f"vmbuild docker -- run --rm -it {IMAGE} sh; echo code=$?") as terminal:
        terminal.expect("#")
        terminal.send(f"{BUSYBOX} tty; echo size=$({BUSYBOX} stty size)\r".encode())
        terminal.expect("/dev/pts")
        terminal.expect("size=30 100")
        terminal.send(b"exit 9\r")
        terminal.expect("code=9")


def test_exec_and_shell(machine: Cli) -> None:
    done = machine.run(
        "exec", "-w", "/etc", "-e", "A=x y", "--", "sh", "-c", 'pwd; echo "$A"; cat; exit 3', stdin=b"no"
    )
    assert (done.code, done.out) == (3, b"/etc\nx y\n")
    assert machine.ok("exec", "-i", "cat", stdin=b"yes").out == b"yes"
    assert machine.ok("exec", "-t", "tty").out.startswith(b"/dev/pts")
    with on_terminal(machine, "vmbuild shell; echo code=$?") as terminal:
        terminal.expect("#")
        terminal.send(b"exit 4\r")
        terminal.expect("code=4")


def test_files_go_in_and_come_out(machine: Cli, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "large").write_bytes(os.urandom(20_000_000))
    (tree / "sub" / "tool").write_text("#!/bin/sh\n")
    (tree / "sub" / "tool").chmod(0o755)
    (tree / "link").symlink_to("sub/tool")
    machine.guest("rm -rf /disk/cp; mkdir /disk/cp")
    machine.ok("cp", str(tree), ":/disk/cp")
    assert machine.guest("cd /disk/cp/tree && stat -c '%n %u %a' large sub/tool && readlink link").split("\n")[1:3] == [
        "sub/tool 0 755",
        "sub/tool",
    ]
    machine.ok("cp", f"{machine.name}:/disk/cp/tree", str(tmp_path / "back"))
    assert (tmp_path / "back" / "large").read_bytes() == (tree / "large").read_bytes()
    assert os.access(tmp_path / "back" / "sub" / "tool", os.X_OK)
    assert str((tmp_path / "back" / "link").readlink()) == "sub/tool"


def test_what_leads_out_of_the_target_stays_in_the_guest(machine: Cli, tmp_path: Path) -> None:
    machine.guest(
        "rm -rf /disk/evil; mkdir /disk/evil; cd /disk/evil; ln -s /etc/passwd one; mkfifo two; echo 3 >three"
    )
    done = machine.ok("cp", ":/disk/evil/.", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["three"]
    assert "one" in done.err and "two" in done.err


def test_tar_streams_go_both_ways(machine: Cli) -> None:
    out = machine.ok("cp", ":/etc/hosts", "-").out
    with tarfile.open(fileobj=io.BytesIO(out)) as tar:
        assert [Path(name).name for name in tar.getnames()] == ["hosts"]
    machine.guest("rm -rf /disk/tar; mkdir /disk/tar")
    machine.ok("cp", "-", ":/disk/tar", stdin=out)
    assert machine.guest("cmp /etc/hosts /disk/tar/hosts && echo same").strip() == "same"
    assert machine.run("cp", ":/disk/nothing", "-").code == 2


@pytest.fixture
def published(env: dict[str, str]) -> Iterator[int]:
    """The number of a port that a container publishes, a small server behind it."""
    port = free_port()
    name = serve_in_container(env, port)
    yield port
    run_docker(env, "rm", "-f", name)


def test_a_port_is_forwarded_until_it_is_not(machine: Cli, published: int) -> None:
    port = free_port()
    assert fetch(port) == b""
    machine.ok("forward", f"{port}:{published}")
    wait_until(lambda: b"from the guest" in fetch(port), "the container answers", 20)
    assert machine.ok("forward", "--json").json() == [{"host_port": port, "guest_port": published}]
    machine.ok("forward", "--remove", str(port))
    assert fetch(port) == b""


def test_what_containers_publish_is_followed(machine: Cli, env: dict[str, str]) -> None:
    follower = machine.start("forward", "--containers")
    try:
        port = free_port()
        name = serve_in_container(env, port)
        wait_until(lambda: b"from the guest" in fetch(port), "the container answers", 30)
        run_docker(env, "rm", "-f", name)
        wait_until(lambda: machine.ok("forward", "--json").json() == [], "the port is closed", 30)
    finally:
        assert interrupt(follower, signal.SIGINT).code == 0


def test_without_openssh_it_is_slower_and_works(machine: Cli, env: dict[str, str], tmp_path: Path) -> None:
    folder = machine.state / "machines" / machine.name
    os.kill(int((folder / "docker.pid").read_text()), signal.SIGTERM)
    (tmp_path / "vacant").mkdir()
    machine.ok("env", PATH=str(tmp_path / "vacant"))
    assert b"vmbuild" in Path(f"/proc/{(folder / 'docker.pid').read_text().strip()}/cmdline").read_bytes()
    assert run_docker(env, "run", "--rm", "-i", IMAGE, "cat", stdin=b"through") == b"through"
    os.kill(int((folder / "docker.pid").read_text()), signal.SIGTERM)
    machine.ok("env")


@pytest.mark.parametrize(
    "argv",
    [
        *("up", "status", "list", "top -n 1", "trim", "env", "env --unset", "forward"),
        *("images", "images --snapshots", "images fetch", "config", "doctor"),
    ],
)
def test_facts_are_what_their_schema_says(machine: Cli, argv: str) -> None:
    told = json.loads(machine.run(*argv.split(), "--json").out)
    name = max((each for each in schemas.PRINTED if argv.startswith(each)), key=len)
    schema: Any = json.loads((SCHEMAS / schemas.file_name(name)).read_text())
    jsonschema.validate(told, schema)


def test_the_socket_goes_with_the_machine_and_comes_back_with_it(machine: Cli, env: dict[str, str]) -> None:
    path = Path(env["DOCKER_HOST"].removeprefix("unix://"))
    pid = int((path.parent / "docker.pid").read_text())
    machine.ok("suspend")
    assert not path.exists()
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "its program has ended", 10)
    assert machine.run("env").code == 75
    machine.ok("up")
    assert run_docker(env, "version", "--format", "{{.Server.Arch}}").strip() == b"arm64"
