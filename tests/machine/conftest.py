"""One real machine for the tests of this folder, driven through the `vmbuild` program as a user drives it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pexpect
import pytest

CLI = Path(sys.executable).with_name("vmbuild")
BASE = "debian:trixie-slim"
EXAMPLES = Path(__file__).parents[2] / "examples"


@dataclass(frozen=True)
class Done:
    """How a run of the program ended."""

    code: int
    out: bytes
    err: str

    def json(self) -> Any:
        """Return standard output as JSON."""
        return json.loads(self.out)


@dataclass(frozen=True)
class Cli:
    """The `vmbuild` program with a cache and a state folder of its own."""

    cache: Path
    state: Path
    name: str = "shared"

    @property
    def env(self) -> dict[str, str]:
        """The environment that it runs in."""
        own = {
            "VMBUILD_CACHE_DIR": str(self.cache),
            "VMBUILD_STATE_DIR": str(self.state),
            "VMBUILD_NAME": self.name,
            "VMBUILD_MEMORY": "2G",
            "VMBUILD_SNAPSHOTS": "off",  # but for the tests of snapshots: they are made in the background
            "XDG_CONFIG_HOME": str(self.state / "no-config"),
        }
        return {**os.environ, **own}

    def start(
        self, *args: str, stdin: int = subprocess.DEVNULL, cwd: Path | None = None, **env: str
    ) -> subprocess.Popen[bytes]:
        """Start the program, both outputs piped."""
        return subprocess.Popen(
            [str(CLI), *args],
            cwd=cwd,
            env={**self.env, **env},
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, *args: str, stdin: bytes = b"", cwd: Path | None = None, timeout_s: float = 600, **env: str) -> Done:
        """Run the program to its end, whatever its exit code."""
        done = subprocess.run(
            [str(CLI), *args],
            cwd=cwd,
            env={**self.env, **env},
            input=stdin,
            capture_output=True,
            check=False,
            timeout=timeout_s,
        )
        return Done(done.returncode, done.stdout, done.stderr.decode(errors="replace"))

    def ok(self, *args: str, stdin: bytes = b"", cwd: Path | None = None, timeout_s: float = 600, **env: str) -> Done:
        """Run the program and expect it to end well."""
        done = self.run(*args, stdin=stdin, cwd=cwd, timeout_s=timeout_s, **env)
        assert done.code == 0, f"vmbuild {' '.join(args)} -> {done.code}\n{done.err}"
        return done

    def guest(self, script: str) -> str:
        """Run a shell script in the guest and return its output."""
        return self.ok("ssh", "--", "sh", "-c", script).out.decode()

    def named(self, name: str) -> Cli:
        """Return the same program with another machine."""
        return Cli(self.cache, self.state, name)


FIRST = (
    *("test_suspend.py", "test_quickstart.py", "test_up.py", "test_build.py", "test_platforms.py"),
    *("test_ci_recipes.py", "test_snapshot.py", "test_ways_in.py", "test_dockerfiles.py", "test_arm32.py"),
    *("test_docker_clients.py", "test_passed_on.py", "test_ways_out.py", "test_bench.py", "test_resources.py"),
    "test_docker_host.py",
)
"""The files that take longest, longest first; but those that the first workers begin with do not all want the base
image, which one makes and the others would wait for.
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest: files are dealt out one by one, and a long one at last would be waited for."""
    ranks = {Path(__file__).with_name(name): rank for rank, name in enumerate(FIRST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


def cache_of_this_run(factory: pytest.TempPathFactory) -> Path:
    """Return the cache that all workers of this run share, so that nothing is made twice; or the one that is given."""
    given = os.environ.get("VMBUILD_TEST_CACHE")
    base = factory.getbasetemp()
    return Path(given) if given else (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"


@pytest.fixture(scope="session")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cli]:
    """The program, with every machine of its state folder destroyed at the end."""
    folder = tmp_path_factory.mktemp("home")
    program = Cli(cache_of_this_run(tmp_path_factory), folder / "state")
    program.state.mkdir()
    program.ok("images", "fetch")  # no test's time limit should have to hold for it
    yield program
    for machine in program.run("list", "--json").json():
        program.run("destroy", "--yes", machine["name"])


@pytest.fixture(scope="session")
def machine(cli: Cli) -> Cli:
    """The program, with its machine up."""
    cli.ok("up")
    return cli


@pytest.fixture(scope="session")
def based(machine: Cli) -> Cli:
    """The program, with its machine up and the base image in it."""
    machine.ok("base", BASE)
    return machine


def leave_out_updates(program: Cli, folder: Path, platforms: tuple[str, ...]) -> None:
    """Have apt in the base image read the release alone: a mirror may have the updates' lists out of step for days."""
    context = folder / "release"
    context.mkdir()
    first_alone = "sed -i '/^$/,$d' /etc/apt/sources.list.d/debian.sources"
    (context / "Dockerfile").write_text(f"FROM {BASE}\nRUN {first_alone}\n")
    program.ok("build", str(context), "-t", BASE, "--platform", ",".join(platforms))


def on_terminal(program: Cli, script: str) -> pexpect.spawn[bytes]:
    """Run a shell script on a terminal of its own, `vmbuild` on its PATH."""
    env = {**program.env, "PATH": f"{CLI.parent}{os.pathsep}{os.environ['PATH']}"}
    return pexpect.spawn("/bin/sh", ["-c", script], env=env, timeout=180, dimensions=(30, 100))


def interrupt(program: subprocess.Popen[bytes], number: signal.Signals = signal.SIGINT) -> Done:
    """Press Ctrl-C, or send another signal, and wait for the end."""
    program.send_signal(number)
    out, err = program.communicate(timeout=120)
    return Done(program.returncode, out, err.decode(errors="replace"))


def wait_until(check: Any, what: str, limit_s: float = 60) -> None:
    """Wait until a check is true."""
    end = time.monotonic() + limit_s
    while not check():
        assert time.monotonic() < end, f"waited {limit_s} s in vain: {what}"
        time.sleep(0.3)
