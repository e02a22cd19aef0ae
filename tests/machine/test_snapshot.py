"""A real guest that is parked, saved, and given to machine after machine."""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.machine.conftest import Cli, Done, wait_until
from vmbuild import process

pytestmark = [
    pytest.mark.machine,
    pytest.mark.skipif(platform.machine() in ("aarch64", "arm64"), reason="guests run on the host's own CPU here"),
]


@dataclass(frozen=True)
class WarmCli(Cli):
    """The program with snapshots on, as users have it."""

    @property
    def env(self) -> dict[str, str]:
        return {**super().env, "VMBUILD_SNAPSHOTS": "on", "CI": ""}

    def made(self) -> list[dict[str, object]]:
        """Return the snapshots in the cache."""
        found = self.ok("images", "--snapshots", "--json").json()
        assert isinstance(found, list)
        return found

    def makers(self) -> list[int]:
        """Return the processes that make a snapshot for this cache."""
        pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
        return [pid for pid in pids if f"{self.cache}/snapshots/" in _folder_and_words(pid)]

    def is_made(self) -> bool:
        """Tell whether one is made; give those who make it their share of the CPUs, as others may leave them none."""
        for pid in self.makers():
            with suppress(OSError):  # it has just ended, or it is not root who tests
                for thread in Path(f"/proc/{pid}/task").iterdir():
                    os.setpriority(os.PRIO_PROCESS, int(thread.name), 0)
                Path(f"/proc/{pid}/autogroup").write_text("0")
        return self.made() != []


def _folder_and_words(pid: int) -> str:
    try:
        return f"{Path(f'/proc/{pid}/cwd').readlink()}/ {process.command_line(pid)}"
    except OSError:
        return ""


@pytest.fixture(scope="module")
def warm(cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmCli]:
    """A machine that was restored from a snapshot; it goes at the end, as others want its memory.

    The snapshots are its own: other tests make some, and none may be deleted under them.
    """
    program = WarmCli(tmp_path_factory.mktemp("warm"), cli.state, "warm")
    shutil.copytree(cli.cache / "images", program.cache / "images")
    for name in ("indexes", "packages", "bases"):
        (cli.cache / name).mkdir(exist_ok=True)
        (program.cache / name).symlink_to(cli.cache / name)
    program.ok("images", "snapshot")
    done = program.ok("up")
    assert_restored(done)
    yield program
    program.run("destroy", "--yes")


def assert_restored(done: Done) -> None:
    assert "Restoring the machine" in done.err
    assert "Starting the machine" not in done.err


def test_a_restored_machine_is_a_machine_of_its_own(warm: WarmCli) -> None:
    assert warm.guest("hostname").strip() == "vmbuild-warm"
    before = time.time()
    now = int(warm.guest("date +%s"))  # cut to a second
    assert before - 3 <= now <= time.time() + 2
    assert "zram" in warm.guest("cat /proc/swaps")
    assert warm.guest("docker info --format '{{.Driver}} {{.CgroupVersion}}'").split() == ["overlayfs", "2"]
    other = WarmCli(warm.cache, warm.state, "warm2")
    assert_restored(other.ok("up"))
    try:
        for what in (
            "sha256sum </run/vmbuild/seed/dropbear_ed25519_host_key",
            "tune2fs -l $(grep ' /disk ' /proc/mounts | cut -d ' ' -f 1) | grep UUID",
            "cat /proc/sys/kernel/random/uuid",
        ):
            answers = [each.guest(what) for each in (warm, other)]
            assert all(answers) and answers[0] != answers[1], what
    finally:
        other.ok("destroy", "--yes")


def test_its_disk_is_its_own_and_stays(warm: WarmCli, tmp_path: Path) -> None:
    warm.ok("base", "debian:trixie-slim")
    (tmp_path / "Dockerfile").write_text("FROM debian:trixie-slim\nRUN echo warm >/word\n")
    warm.ok("build", str(tmp_path), "-t", "warm:1")
    warm.ok("down")
    assert_restored(warm.ok("up", "--disk", "45G"))
    assert warm.guest("docker run --rm warm:1 cat /word") == "warm\n"
    size = int(warm.guest("df -k /disk | tail -n 1").split()[1])
    assert size > 43 * 1024 * 1024
    assert "recovering journal" not in warm.guest("cat /run/vmbuild/e2fsck.log")


def test_a_killed_qemu_is_restored_and_has_lost_nothing(warm: WarmCli) -> None:
    warm.guest("echo kept >/disk/kept; sync")
    pid = warm.ok("status", "--json").json()["pid"]
    process.stop(pid, grace_s=0)
    assert_restored(warm.ok("up"))
    assert warm.guest("cat /disk/kept") == "kept\n"


def test_a_snapshot_that_was_damaged_is_told_and_the_machine_boots(warm: WarmCli) -> None:
    (kept,) = warm.made()
    ram = warm.cache / "snapshots" / str(kept["key"]) / "ram"
    with ram.open("r+b") as file:
        file.seek(ram.stat().st_size - 5000)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    damaged = WarmCli(warm.cache, warm.state, "damaged")
    done = damaged.ok("up")
    try:
        assert re.search(r"the snapshot cannot be used .*booting instead", done.err)
        assert "Starting the machine" in done.err
        assert b"vmbuild: booted in" in damaged.ok("logs").out
        wait_until(warm.is_made, "another one is made in the background", 700)
        assert warm.made() != [kept]
    finally:
        damaged.ok("destroy", "--yes")
        print((warm.cache / "snapshot.log").read_text())  # of what it may have met


@pytest.mark.skipif(os.cpu_count() == 1, reason="one CPU is the shape that there is already")
def test_killed_while_it_is_made_it_is_made_by_the_next(warm: WarmCli) -> None:
    other = WarmCli(warm.cache, warm.state, "warm")
    maker = other.start("images", "snapshot", "--cpus", "1")
    wait_until(lambda: list(other.cache.glob("snapshots/.*~*/qmp.sock")), "a guest boots", 240)
    maker.send_signal(signal.SIGKILL)
    maker.communicate()
    assert other.makers() != []  # its QEMU is an orphan now
    assert [each["cpus"] for each in other.made()] != [1]
    made = other.ok("images", "snapshot", "--cpus", "1", "--json").json()
    assert made["cpus"] == 1
    assert not list(other.cache.glob("snapshots/.*~*"))
    assert other.makers() == []
