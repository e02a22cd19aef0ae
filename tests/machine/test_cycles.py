"""A hundred times up and down, guests and all, and what that leaves on the host: nothing."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.machine.conftest import Cli, wait_until
from vmbuild import process

pytestmark = [
    pytest.mark.machine,
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() in ("aarch64", "arm64"), reason="guests run on the host's own CPU here"),
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="traces are read in Linux's /proc"),
]

CYCLES = 100


@dataclass(frozen=True)
class CyclingCli(Cli):
    """The program with snapshots on, and with a folder of its own for what it leaves elsewhere."""

    @property
    def env(self) -> dict[str, str]:
        own = {"TMPDIR": str(self.scratch), "XDG_RUNTIME_DIR": str(self.scratch), "HOME": str(self.scratch)}
        return {**super().env, "VMBUILD_SNAPSHOTS": "on", "CI": "1", **own}

    @property
    def scratch(self) -> Path:
        """The folder of temporary files."""
        return self.state.with_name("scratch")


@dataclass(frozen=True)
class Traces:
    """What a program has on the host: its files, those of them that are sockets, its processes."""

    files: frozenset[str]
    sockets: frozenset[str]
    processes: frozenset[int]

    @classmethod
    def of(cls, program: CyclingCli) -> Traces:
        """Look at them now. A process is known by its environment, which all that one starts inherit."""
        folders = (program.state, program.scratch, program.cache)
        mark = f"VMBUILD_STATE_DIR={program.state}".encode()
        files = [path for folder in folders for path in folder.rglob("*")]
        return cls(
            files=frozenset(map(str, files)),
            sockets=frozenset(str(path) for path in files if path.is_socket()),
            processes=frozenset(pid for pid in _all_processes() if mark in _environment(pid)),
        )


def _all_processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").glob("[0-9]*")]


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # it has ended, or is somebody else's
        return []


@pytest.fixture
def cycling(cli: Cli, tmp_path: Path) -> Iterator[CyclingCli]:
    """The program, and its guest image, with no other test beside it."""
    program = CyclingCli(tmp_path / "cache", tmp_path / "state", "cycling")
    shutil.copytree(cli.cache / "images", program.cache / "images")
    program.state.mkdir()
    program.scratch.mkdir()
    program.ok("images", "snapshot")
    yield program
    program.run("destroy", "--yes")


@pytest.mark.timeout(5400)
def test_a_hundred_machines_that_come_and_go_leave_nothing(cycling: CyclingCli) -> None:
    cycling.ok("up")
    has_socket = shutil.which("ssh") is not None and cycling.run("env").code == 0
    _end(cycling, is_killed=True)
    cycling.ok("up")
    _end(cycling, is_killed=False)
    wait_until(lambda: not Traces.of(cycling).processes, "what belonged to the machine ends")
    before = Traces.of(cycling)
    assert before.files and not before.sockets
    for number in range(CYCLES):
        assert "Restoring the machine" in cycling.ok("up").err
        during = Traces.of(cycling)
        assert len(during.processes) >= 1 + has_socket, "what a machine has is seen"
        assert during.sockets, "what a machine has is seen"
        _end(cycling, is_killed=number % 2 == 0)
    wait_until(lambda: not Traces.of(cycling).processes, "what belonged to the last machine ends")
    assert Traces.of(cycling) == before


def _end(program: CyclingCli, *, is_killed: bool) -> None:
    """End the machine: as its user does, or as a host does that is out of memory."""
    if is_killed:
        process.stop(program.ok("status", "--json").json()["pid"], grace_s=0)
    else:
        program.ok("down")
