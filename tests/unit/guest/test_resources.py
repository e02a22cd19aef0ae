"""What a guest says of its resources, and what it is told to do with them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.unit.guest.fakes import FakeSession, HostSession, Reply
from vmbuild.errors import GuestError
from vmbuild.guest import resources
from vmbuild.guest.oom import Victim, find_victims, read_clock

ANSWER = b"MemTotal: 2030596\nMemAvailable: 1606420\nload: 0.57\nuptime: 61.5\ncpus: 2\ndisk: 204800\n"


def test_usage_is_read_in_one_go() -> None:
    session = FakeSession((("sh",), Reply(stdout=ANSWER)))
    assert resources.read_usage(session) == resources.Usage(2, 0.57, 1983, 415, 200 * 1024 * 1024, 61.5)
    assert len(session.calls) == 1


def test_the_script_says_all_that_is_read() -> None:
    """On this host, whose /proc is the guest's kind; only the disk is elsewhere."""
    script = resources.READ_USAGE.replace("/disk", "/")
    out = subprocess.check_output(["sh", "-c", script], text=True)
    assert [line.split(":")[0] for line in out.splitlines()] == [
        line.split(":")[0] for line in ANSWER.decode().splitlines()
    ]


@pytest.mark.parametrize(("count", "wanted"), [(1, "100"), (2, "110"), (3, "111")])
def test_cpus_are_turned_on_and_off_in_order(tmp_path: Path, count: int, wanted: str) -> None:
    for number, online in enumerate(("", "1", "0")):  # the first has no switch
        (tmp_path / f"cpu{number}").mkdir()
        if online:
            (tmp_path / f"cpu{number}" / "online").write_text(f"{online}\n")
    (tmp_path / "cpufreq").mkdir()
    script = resources.SET_CPUS.replace("/sys/devices/system/cpu", str(tmp_path))
    subprocess.run(["sh", "-c", script, "cpus", str(count)], check=True)
    found = [(tmp_path / f"cpu{number}" / "online").read_text().strip() for number in (1, 2)]
    assert "1" + "".join(found) == wanted


def test_a_guest_that_cannot_is_said() -> None:
    session = FakeSession((("sh",), Reply(1, stderr=b"Device or resource busy")))
    for do in (resources.trim, resources.give_back_later, resources.grow_file_system):
        with pytest.raises(GuestError) as caught:
            do(session)
        assert "busy" in caught.value.details


MEMINFO = "Cached: 900000 kB\nActive(anon): 900000 kB\nActive(file): 200000 kB\nInactive(file): {} kB\n"


@pytest.mark.parametrize(
    ("inactive", "building", "takes_order", "reclaims", "drops"),
    [
        (200_000, False, True, True, False),
        (200_000, False, False, True, True),
        (190_000, False, True, False, False),
        (200_000, True, True, False, False),
    ],
)
def test_a_large_cache_goes_when_nobody_builds(
    tmp_path: Path, inactive: int, building: bool, takes_order: bool, reclaims: bool, drops: bool
) -> None:
    (tmp_path / "sys/vm").mkdir(parents=True)
    (tmp_path / "meminfo").write_text(MEMINFO.format(inactive))
    (tmp_path / "less").write_text(MEMINFO.format(0))
    fakes = f"""
        sync() {{ :; }}
        renice() {{ :; }}
        pidof() {{ [ "$1" = docker-buildx ] && {str(building).lower()}; }}
        fstrim() {{ echo "$1" >{tmp_path}/trimmed; }}
        echo() {{
            printf '%s\\n' "$*"
            [ "${{1#* }}" != swappiness=0 ] || ! {str(takes_order).lower()} || cp {tmp_path}/less {tmp_path}/meminfo
        }}
    """
    script = resources.GIVE_BACK.replace("/proc", str(tmp_path)).replace("/sys/fs/cgroup", str(tmp_path))
    subprocess.run(["sh", "-c", fakes + script], check=True)
    order = tmp_path / "memory.reclaim"
    assert (order.read_text() if order.exists() else "") == ("262M swappiness=0\n" if reclaims else "")
    assert (tmp_path / "sys/vm/drop_caches").exists() == drops
    assert (tmp_path / "sys/vm/compact_memory").exists() == reclaims
    assert (tmp_path / "trimmed").read_text() == "/disk\n"


def test_nobody_waits_for_what_is_given_back() -> None:
    session = FakeSession((("sh",), Reply()))
    resources.give_back_later(session)
    (call,) = session.calls
    assert call.argv[2].endswith("&")
    assert call.argv[-1] == resources.GIVE_BACK


def test_the_guest_has_what_the_scripts_run() -> None:
    """Nobody would see what fails in the background."""
    has = (Path(__file__).parents[3] / "images/guest/applets").read_text().split()
    assert {"awk", "fstrim", "pidof", "renice", "setsid", "sh", "sync"} <= set(has)


LOG = b"""[    1.000000] Booting Linux
[   10.500000] Out of memory: Killed process 77 (old) total-vm:1kB, anon-rss:1024kB, file-rss:0kB, shmem-rss:0kB
[  100.123456] cc1 invoked oom-killer: gfp_mask=0x140dca
[  100.200000] Out of memory: Killed process 812 (cc1plus) total-vm:900kB, anon-rss:731136kB, file-rss:1kB, UID:0
[  101.000000] Out of memory: Killed process 813 (a (b) c) total-vm:9kB, anon-rss:2048kB, file-rss:0kB
[  102.000000] Memory cgroup out of memory: Killed process 814 (limited) total-vm:9kB, anon-rss:2048kB, file-rss:0kB
"""


def test_victims_since_a_moment_are_found() -> None:
    session = FakeSession((("dmesg",), Reply(stdout=LOG)))
    assert find_victims(session, 50.0) == [Victim("cc1plus", 714), Victim("a (b) c", 2)]
    assert [victim.process for victim in find_victims(session, 0.0)] == ["old", "cc1plus", "a (b) c"]
    assert find_victims(session, 200.0) == []


def test_the_guests_clock_is_the_kernels() -> None:
    assert 0 < read_clock(HostSession()) < 1e9
