"""A machine that grows, shrinks and gives back what it does not need, while something runs in it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.machine.conftest import BASE, Cli, wait_until

pytestmark = pytest.mark.machine

MIB = 1024 * 1024


@pytest.fixture
def resized(based: Cli) -> Iterator[Cli]:
    """The machine, with all of its CPUs and memory given back at the end."""
    yield based
    now = based.ok("status", "--json").json()
    based.ok("resize", "--cpus", str(now["cpus"]), "--memory", f"{now['memory_mib']}M")


def test_a_build_goes_on_while_its_machine_changes(resized: Cli, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(
        f"FROM {BASE}\n"
        "RUN i=0; while [ $i -lt 12 ]; do sha256sum /usr/bin/perl; nproc; sleep 1; i=$((i+1)); done; echo done >/word\n"
    )
    running = resized.start("build", str(tmp_path), "-t", "resized:1", "--progress", "plain")
    wait_until(lambda: "sleep 1" in resized.guest("ps -o args"), "the step runs", 120)
    containers = "/sys/fs/cgroup/docker"
    weight, *step = resized.guest(f"cat {containers}/cpu.weight; cat {containers}/buildkit/*/cgroup.procs").split()
    assert weight == "10"
    assert step
    begun = time.monotonic()
    resized.ok("resize", "--cpus", "1", "--memory", "700M")
    assert time.monotonic() - begun < 30  # a hang, not a figure: scripts/measure has those
    now = resized.ok("status", "--json").json()
    assert now["guest"]["cpus_online"] == 1
    wait_until(lambda: resized.ok("status", "--json").json()["memory_now_mib"] <= 716, "memory is given back", 60)
    assert now["cpus"] == int(resized.guest("ls -d /sys/devices/system/cpu/cpu[0-9]* | wc -l"))
    resized.ok("resize", "--cpus", str(now["cpus"]), "--memory", "2G")
    _, err = running.communicate(timeout=300)
    assert running.returncode == 0, err.decode()
    assert resized.ok("status", "--json").json()["memory_now_mib"] == 2048
    assert resized.guest("docker run --rm resized:1 cat /word") == "done\n"


def test_what_does_not_fit_is_refused(based: Cli) -> None:
    for options in (["--cpus", "99"], ["--memory", "64G"], ["--memory", "100M"], ["--disk", "1G"], []):
        assert based.run("resize", *options).code == 2, options


def test_a_disk_grows_under_a_running_machine(based: Cli) -> None:
    before = based.ok("status", "--json").json()["disk_virtual_bytes"]
    based.ok("resize", "--disk", str(before + 5 * 1024 * MIB))
    assert based.ok("status", "--json").json()["disk_virtual_bytes"] == before + 5 * 1024 * MIB
    assert int(based.guest("df -k /disk | tail -n 1").split()[1]) * 1024 > before + 4 * 1024 * MIB


def test_deleted_files_leave_the_hosts_disk(based: Cli) -> None:
    based.ok("trim")
    empty = based.ok("status", "--json").json()["disk_actual_bytes"]
    based.guest("dd if=/dev/urandom of=/disk/filled bs=1M count=200 2>/dev/null; sync")
    full = based.ok("status", "--json").json()["disk_actual_bytes"]
    assert full - empty > 190 * MIB
    based.guest("rm /disk/filled; sync")
    based.ok("trim")
    assert full - based.ok("status", "--json").json()["disk_actual_bytes"] > 180 * MIB


def test_memory_that_the_guest_freed_leaves_qemu(cli: Cli) -> None:
    fresh = cli.named("fresh")  # memory goes back in pieces of many pages, which a guest that has worked has fewer of
    fresh.ok("up")
    fresh.guest("dd if=/dev/zero of=/dev/shm/filled bs=1M count=600 2>/dev/null")
    full = fresh.ok("status", "--json").json()["rss_bytes"]
    fresh.guest("rm /dev/shm/filled")
    wait_until(lambda: full - fresh.ok("status", "--json").json()["rss_bytes"] > 500 * MIB, "memory is given back", 60)
    fresh.ok("destroy", "--yes")


def test_what_a_build_left_in_the_page_cache_leaves_qemu(based: Cli, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(f"FROM {BASE}\n")
    based.guest("dd if=/dev/urandom of=/disk/filled bs=1M count=800 2>/dev/null; sync")
    full = based.ok("status", "--json").json()["rss_bytes"]
    based.ok("build", str(tmp_path))
    wait_until(lambda: full - based.ok("status", "--json").json()["rss_bytes"] > 500 * MIB, "memory is given back", 60)
    based.guest("rm /disk/filled")


def test_a_machine_that_nobody_uses_goes_on_in_another_qemu(based: Cli) -> None:
    based.guest(f"docker run -d --name counter {BASE} sh -c 'while sleep 1; do date; done'")
    before = based.ok("status", "--json").json()
    with_terminal = based.start("exec", "sleep", "600")
    wait_until(lambda: "sleep 600" in based.guest("ps -o args"), "somebody is connected", 60)
    refused = based.run("trim", "--memory")
    assert refused.code == 5
    assert "network connection" in refused.err
    with_terminal.kill()
    with_terminal.communicate()
    freed = based.ok("trim", "--memory", "--json").json()
    now = based.ok("status", "--json").json()
    assert freed["what"] == "memory"
    assert now["pid"] != before["pid"]
    assert now["ssh_port"] == before["ssh_port"]
    assert now["rss_bytes"] < before["rss_bytes"]
    lines = based.guest("docker logs counter | wc -l")
    wait_until(lambda: based.guest("docker logs counter | wc -l") != lines, "the container goes on", 60)
    based.guest("docker rm -f counter")


@pytest.mark.slow  # beside other machines on two cores no guest is idle for long
def test_after_a_large_build_the_machine_goes_on_in_another_qemu(based: Cli, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(f"FROM {BASE}\nRUN perl -e '$x = q(x) x (1100 << 20)'\n")
    before, pid_file = based.ok("status", "--json").json(), based.state / "machines" / based.name / "qemu.pid"
    based.ok("build", str(tmp_path), CI="")  # where it is set, the next build comes at once or never
    # Not asked of the machine, which is in use while it is asked.
    wait_until(lambda: pid_file.exists() and int(pid_file.read_text()) != before["pid"], "there is another QEMU", 90)
    based.guest("true")
    now = based.ok("status", "--json").json()
    assert now["ssh_port"] == before["ssh_port"]
    assert now["restored"]
    wait_until(lambda: based.ok("status", "--json").json()["rss_bytes"] < 600 * MIB, "memory is given back", 60)


def test_a_step_that_was_killed_for_want_of_memory(resized: Cli, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(f"FROM {BASE}\nRUN tail /dev/zero\n")
    resized.guest("swapoff /dev/zram0")
    try:
        resized.ok("resize", "--memory", "600M")
        done = resized.run("build", str(tmp_path))
    finally:
        resized.guest("swapon /dev/zram0")
    assert done.code == 7
    assert "killed tail" in done.err
    assert "--memory" in done.err
    assert "OK" in resized.guest(
        "printf 'GET /_ping HTTP/1.0\\r\\n\\r\\n' | socat -t 10 - UNIX-CONNECT:/run/docker.sock"
    )
