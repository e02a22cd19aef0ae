"""A machine comes up, stays one, survives what happens to it, and goes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.machine.conftest import Cli, interrupt, wait_until
from vmbuild import process
from vmbuild.guest import keys

pytestmark = pytest.mark.machine


def test_up_leads_to_a_docker_that_answers(machine: Cli) -> None:
    status = machine.ok("status", "--json").json()
    assert status["state"] == "running"
    assert status["memory_mib"] == 2048
    assert machine.guest("docker version --format '{{.Server.Os}}/{{.Server.Arch}}'").strip() == "linux/arm64"
    assert machine.guest("uname -m").strip() == "aarch64"


def test_up_again_finds_the_same_machine(machine: Cli) -> None:
    before = machine.ok("status", "--json").json()
    machine.ok("up")
    assert machine.ok("status", "--json").json()["pid"] == before["pid"]


def test_a_wrong_choice_for_a_running_machine_is_said(machine: Cli) -> None:
    assert "takes effect after" in machine.ok("up", "--cpus", "3").err


def test_the_guest_is_set_up_as_promised(machine: Cli) -> None:
    assert "zram" in machine.guest("cat /proc/swaps")
    assert "overlay" in machine.guest("mount | grep ' / '")
    assert machine.guest("docker info --format '{{.Driver}} {{.CgroupVersion}}'").split() == ["overlayfs", "2"]
    assert (
        machine.guest("cat /proc/$(pidof containerd)/timerslack_ns /proc/self/timerslack_ns").split() == ["4000000"] * 2
    )
    assert "unpigz" in machine.guest("command -v unpigz")
    clock = int(machine.guest("date +%s"))
    assert abs(clock - int(process.run(["date", "+%s"]))) <= 5


def test_ssh_passes_input_output_and_exit_code(machine: Cli) -> None:
    done = machine.run("ssh", "--", "sh", "-c", "cat; echo no >&2; exit 42", stdin=b"in\n")
    assert (done.code, done.out) == (42, b"in\n")
    assert "no" in done.err


def test_a_wrong_host_key_is_refused(machine: Cli, tmp_path: Path) -> None:
    public = machine.state / "machines" / machine.name / "ssh_host_ed25519_key.pub"
    before = public.read_bytes()
    keys.ensure_key(tmp_path / "stranger", "stranger")
    try:
        shutil.copy(tmp_path / "stranger.pub", public)
        done = machine.run("ssh", "--", "true")
        assert done.code == 6
        assert "host key" in done.err
    finally:
        public.write_bytes(before)
    machine.ok("ssh", "--", "true")


def test_only_loopback_listens(machine: Cli) -> None:
    port = machine.ok("status", "--json").json()["ssh_port"]
    rows = Path("/proc/net/tcp").read_text().splitlines() + Path("/proc/net/tcp6").read_text().splitlines()
    listening = [row.split()[1] for row in rows if row.split()[3] == "0A"]
    assert [address for address in listening if address.endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]


def test_two_at_once_start_one_machine(cli: Cli) -> None:
    twin = cli.named("twin")
    programs = [twin.start("up"), twin.start("up")]
    ends = [program.communicate(timeout=300)[1].decode() for program in programs]
    assert [program.returncode for program in programs] == [0, 0], ends
    assert twin.ok("status", "--json").json()["state"] == "running"
    folder = twin.state / "machines" / "twin"
    twin.ok("destroy", "--yes")
    assert not folder.exists()


def test_one_of_two_that_is_interrupted_takes_nothing_from_the_other(cli: Cli) -> None:
    twin = cli.named("twin")
    first = twin.start("up")
    wait_until(lambda: b"running" in twin.run("status", "--json").out, "QEMU runs", 60)
    second = twin.start("up")
    assert interrupt(first).code == 130
    _, err = second.communicate(timeout=300)
    assert second.returncode == 0, err.decode()
    assert twin.ok("status", "--json").json()["state"] == "running"
    twin.ok("destroy", "--yes")


def test_a_clock_that_is_late_is_set(machine: Cli) -> None:
    machine.guest("date -u -s @1500000000")
    machine.ok("up")
    assert abs(int(machine.guest("date +%s")) - time.time()) <= 5


@pytest.mark.parametrize("program", ["containerd", "dockerd"])
def test_docker_comes_back_after_a_crash(machine: Cli, program: str) -> None:
    before = machine.guest(f"pidof {program}")
    machine.guest(f"killall -KILL {program}")
    wait_until(lambda: machine.run("ssh", "--", "docker", "image", "prune", "--force").code == 0, "Docker answers", 60)
    after = machine.guest(f"pidof {program}").split()
    assert len(after) == 1 and after != before.split()
    assert machine.guest("pidof containerd dockerd | wc -w").strip() == "2"


def test_killed_qemu_costs_no_data(machine: Cli) -> None:
    machine.guest("echo kept >/var/lib/vmbuild/kept; sync")
    pid = machine.ok("status", "--json").json()["pid"]
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not process.is_alive(pid), "QEMU is gone", 10)
    assert machine.ok("status", "--json").json()["state"] == "stopped"
    machine.ok("up")
    assert machine.guest("cat /var/lib/vmbuild/kept").strip() == "kept"


def test_down_leaves_the_disk_and_nothing_that_runs(machine: Cli) -> None:
    machine.guest("echo kept >/var/lib/vmbuild/down")
    pid = machine.ok("status", "--json").json()["pid"]
    machine.ok("down")
    assert not process.is_alive(pid)
    assert machine.ok("status", "--json").json()["state"] == "stopped"
    left = {path.name for path in (machine.state / "machines" / machine.name).iterdir()}
    assert not {name for name in left if name.endswith((".sock", ".pid"))}
    assert machine.ok("down").code == 0
    machine.ok("up")
    assert machine.guest("cat /var/lib/vmbuild/down").strip() == "kept"
    assert "recovering journal" not in machine.guest("cat /run/vmbuild/e2fsck.log")


def test_a_disk_that_cannot_be_read_is_not_formatted(cli: Cli) -> None:
    torn = cli.named("torn")
    torn.ok("up")
    torn.ok("down")
    disk = torn.state / "machines" / "torn" / "disk.qcow2"
    superblock = "1024 1024"
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", f"write -P 0 {superblock}", str(disk)], check=True)
    done = torn.run("up")
    assert done.code == 6
    assert "left as it is" in done.err
    read = subprocess.run(["qemu-io", "-f", "qcow2", "-c", f"read -P 0 {superblock}", str(disk)], check=False)
    assert read.returncode == 0
    torn.ok("destroy", "--yes")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small tmpfs")
def test_a_full_host_disk_pauses_the_machine_and_loses_nothing(cli: Cli, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(small)], check=True)
    full = Cli(cli.cache, small, "full")
    fill = "for i in 1 2 3 4 5 6 7 8; do dd if=/dev/urandom of=/disk/fill.$i bs=1M count=50 && sync; done; echo filled"
    try:
        full.ok("up")
        full.guest("echo kept >/disk/kept; sync")
        done = full.run("ssh", "--", "sh", "-c", fill)
        assert done.code == 3, done.err
        assert "paused because the host's disk is full" in done.err
        assert full.ok("status", "--json").json()["state"] == "paused"
        assert full.run("up").code == 3
        subprocess.run(["mount", "-o", "remount,size=900m", str(small)], check=True)
        full.ok("up")
        assert full.guest("cat /disk/kept").strip() == "kept"
    finally:
        full.run("destroy", "--yes")
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_while_starting_it_leaves_nothing_that_runs(cli: Cli, number: signal.Signals) -> None:
    other = cli.named("hasty")
    program = other.start("up")
    wait_until(lambda: b"running" in other.run("status", "--json").out, "QEMU runs", 60)
    assert interrupt(program, number).code == 130
    assert other.ok("status", "--json").json()["state"] == "stopped"
    other.ok("destroy", "--yes")


def test_the_console_gives_a_shell(machine: Cli) -> None:
    done = machine.ok("console", stdin=b"echo console-$((6 * 7))\n")
    assert b"console-42" in done.out
