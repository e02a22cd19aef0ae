"""Docker's engine on this host, from signed Debian packages: in a network of its own, gone at the end."""

from __future__ import annotations

import os
import platform
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.machine.conftest import wait_until
from tests.machine.plugins import read_programs, write_plugins
from vmbuild.bench import binfmt
from vmbuild.bench.binfmt import Emulator

PROGRAMS = {"usr/sbin/": ("dockerd", "runc"), "usr/bin/": ("containerd", "containerd-shim-runc-v2")}


@dataclass(frozen=True)
class Client:
    """What makes docker the client of an engine: the values of DOCKER_HOST and DOCKER_CONFIG."""

    host: str
    config: str

    @property
    def env(self) -> dict[str, str]:
        """An environment in which it is."""
        return {**os.environ, "DOCKER_HOST": self.host, "DOCKER_CONFIG": self.config}


def can_run() -> bool:
    """Tell whether this host can have an engine of its own, which takes root and a table of emulators to add one to."""
    return os.geteuid() == 0 and (binfmt.TABLE / "register").exists() and platform.machine() != "aarch64"


@contextmanager
def running(cache: Path) -> Iterator[Client]:
    """Run an engine, all of its files in a folder of its own; yield how docker is its client."""
    with tempfile.TemporaryDirectory(prefix="vmbuild-", dir="/tmp") as folder:  # a short path: there are sockets in it
        yield from _run(cache, Path(folder))


def _run(cache: Path, folder: Path) -> Iterator[Client]:
    programs, config, socket = folder / "programs", folder / "config", folder / "docker.sock"
    for each in (programs, config):
        each.mkdir(parents=True)
    write_plugins(cache, config)
    # Debian 13's runc asks for a newer libc than Debian 12 has.
    for base, packages in (("debian:trixie-slim", ("docker.io", "containerd")), ("debian:bookworm-slim", ("runc",))):
        for path, content in read_programs(cache, base, packages, tuple(PROGRAMS)).items():
            program = programs / Path(path).name
            if program.name in PROGRAMS[f"{Path(path).parent}/"]:
                program.write_bytes(content)
                program.chmod(0o755)
    places = (f"--data-root={folder}/data", f"--exec-root={folder}/exec", f"--pidfile={folder}/pid")
    argv = [
        "unshare",
        "--net",
        "--mount",
        "dockerd",
        *places,
        f"--host=unix://{socket}",
        "--group=root",
        "--userland-proxy=false",
    ]
    env = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    with (folder / "log").open("wb") as log:
        engine = subprocess.Popen(argv, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_until(lambda: b"API listen" in (folder / "log").read_bytes(), "the engine answers", 60)
        yield Client(f"unix://{socket}", str(config))
    finally:
        engine.terminate()
        engine.wait(60)


@contextmanager
def registered(emulator: Emulator, program: str) -> Iterator[None]:
    """Have this host's kernel know an emulator, where it does not yet."""
    if binfmt.find_registered(emulator):
        yield
        return
    (binfmt.TABLE / "register").write_text(binfmt.row_for(emulator, program))
    try:
        yield
    finally:
        (binfmt.TABLE / emulator.name).write_text("-1")
