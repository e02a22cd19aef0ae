"""What a run takes of the host."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from vmbuild.bench import sampler
from vmbuild.bench.sampler import Process, Sampler, Taken, find_tree, list_processes, own_memory_bytes, read_busy_s
from vmbuild.errors import HostError


def proc_folder(folder: Path, processes: dict[int, tuple[str, int, int]]) -> Path:
    """Make a /proc: for each pid a name, a parent and ticks of CPU time, half of them its ended children's."""
    for pid, (name, parent, ticks) in processes.items():
        (folder / str(pid)).mkdir(parents=True)
        half = ticks // 2
        fields = f"{pid} ({name}) S {parent} 1 1 0 -1 0 0 0 0 0 {half - 1} 1 {half} 0 20 0 1 0 99"
        (folder / str(pid) / "stat").write_text(fields)
        (folder / str(pid) / "statm").write_text("9000 100 40 1 0 1 0")
    return folder


def test_processes_are_read_whatever_they_are_called(tmp_path: Path) -> None:
    proc = proc_folder(tmp_path, {1: ("init", 0, 0), 7: ("a) S 5 (b", 1, 2 * sampler.TICKS)})
    (proc / "self").mkdir()
    (proc / "8").mkdir()  # it has just ended
    assert list_processes(proc)[7] == Process(7, 1, 2.0)
    assert sorted(list_processes(proc)) == [1, 7]
    assert own_memory_bytes(7, proc) == 60 * sampler.PAGE_BYTES
    assert own_memory_bytes(9, proc) == 0


def test_a_tree_is_all_that_was_started() -> None:
    processes = {pid: Process(pid, parent, 0.0) for pid, parent in {2: 1, 3: 2, 4: 3, 5: 1, 6: 5}.items()}
    assert find_tree([2], processes) == {2, 3, 4}
    assert find_tree([3, 5, 99], processes) == {3, 4, 5, 6}
    assert find_tree([], processes) == set()


def test_busy_is_all_but_idle_and_waiting(tmp_path: Path) -> None:
    (tmp_path / "stat").write_text("cpu  100 10 20 7777 5555 1 2 30 88 99\ncpu0 1 1 1\n")
    assert read_busy_s(tmp_path) == 163 / sampler.TICKS
    with pytest.raises(HostError, match="does not tell"):
        read_busy_s(tmp_path / "none")


@pytest.mark.parametrize(("others", "disturbed"), [(1.9, False), (2.1, True)])
def test_a_run_is_disturbed_by_a_tenth_of_the_host(others: float, disturbed: bool) -> None:
    assert Taken(10.0, 5.0, 0, others, 2, ()).is_disturbed is disturbed


BURN = """
import subprocess, sys, time
keep = b"x" * 80_000_000
def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end: pass
if len(sys.argv) > 1:
    burn(0.4)
else:
    subprocess.run([sys.executable, __file__, "child"])
    burn(0.4)
"""


def test_a_real_run_is_counted_with_its_children(tmp_path: Path) -> None:
    script = tmp_path / "burn.py"
    script.write_text(BURN)
    watch = Sampler(interval_s=0.05)
    program = subprocess.Popen([sys.executable, str(script)])
    watch.start(program.pid)
    program.wait()
    taken = watch.stop()
    assert 0.75 < taken.cpu_s < 2.5
    assert taken.seconds >= 0.75
    assert taken.peak_memory_bytes > 60_000_000
    assert max(each.cpu_percent for each in taken.samples) > 20
    assert all(one.at_s < two.at_s for one, two in zip(taken.samples, taken.samples[1:], strict=False))


def test_what_is_apart_counts_from_the_beginning_of_the_run_only(tmp_path: Path) -> None:
    script = "import time, sys\nend = time.process_time() + 0.5\nwhile time.process_time() < end: pass\nprint()\n"
    script += "sys.stdout.flush(); sys.stdin.read()"
    apart = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert apart.stdout is not None and apart.stdin is not None
    apart.stdout.readline()  # it has burnt what it burns
    watch = Sampler(lambda: [apart.pid], interval_s=0.05)
    program = subprocess.Popen(["sleep", "0.2"])
    watch.start(program.pid)
    program.wait()
    taken = watch.stop()
    apart.stdin.close()
    apart.wait()
    apart.stdout.close()
    assert taken.cpu_s < 0.4


def test_waiting_for_an_idle_host_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = iter(range(0, 10_000_000, 1000))
    monkeypatch.setattr(sampler, "read_busy_s", lambda: float(next(busy)))
    begun = time.monotonic()
    assert not sampler.wait_quiet(0.05, step_s=0.01)
    assert time.monotonic() - begun < 5
    monkeypatch.setattr(sampler, "read_busy_s", lambda: 1.0)
    assert sampler.wait_quiet(5, step_s=0.01)
