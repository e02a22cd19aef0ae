from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vmbuild import process
from vmbuild.deadline import Deadline
from vmbuild.errors import HostError

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"

HEADLESS = """
import ctypes, os, threading
threading.Thread(target=lambda: (os.read(0, 1), os._exit(0))).start()
ctypes.CDLL(None).pthread_exit(None)
"""


def headless() -> subprocess.Popen[bytes]:
    """Start a program whose first thread has ended and whose second goes on until its input does."""
    child = subprocess.Popen([sys.executable, "-c", HEADLESS], stdin=subprocess.PIPE)
    end = Deadline.after(10)
    while Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert not end.passed
        end.sleep(0.01)
    return child


def test_run_returns_standard_output() -> None:
    assert process.run(["cat"], stdin=b"in") == b"in"


def test_a_failure_tells_command_exit_code_and_output() -> None:
    with pytest.raises(process.CommandError) as caught:
        process.run(["sh", "-c", "echo out; echo err >&2; exit 9"])
    assert caught.value.code == 9
    for part in ("sh -c", "out", "err", "exit code 9"):
        assert part in caught.value.details


def test_an_expected_exit_code_is_no_failure() -> None:
    assert process.run(["sh", "-c", "echo two; exit 2"], expect=(0, 2)) == b"two\n"


def test_a_missing_program_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(HostError, match="sqfstar is not installed") as caught:
        process.run(["sqfstar"])
    assert "squashfs-tools" in caught.value.resolution


def test_a_deadline_ends_a_program() -> None:
    begun = time.monotonic()
    with pytest.raises(HostError, match="did not end in time"):
        process.run(["sleep", "30"], deadline=Deadline.after(0.2))
    assert time.monotonic() - begun < 10


def test_feed_writes_all_and_waits(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with process.feed(["sh", "-c", f"cat >{target}"]) as pipe:
        pipe.write(b"x" * 1_000_000)
    assert target.stat().st_size == 1_000_000


@pytest.mark.parametrize("size", [10, 1_000_000])
def test_feed_tells_why_a_program_stopped_reading(size: int) -> None:
    with (
        pytest.raises(process.CommandError) as caught,
        process.feed(["sh", "-c", "exec <&-; echo words >&2; exit 4"]) as pipe,
    ):
        time.sleep(0.2)
        pipe.write(b"x" * size)
    assert caught.value.code == 4
    assert "words" in caught.value.output


def test_feed_kills_the_program_when_the_block_fails(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with pytest.raises(KeyboardInterrupt), process.feed(["sh", "-c", f"echo $$ >{note}; exec sleep 60"]):
        read_pid(note)
        raise KeyboardInterrupt
    assert not process.is_alive(read_pid(note))


def test_a_detached_program_logs_and_tells_its_exit_code(tmp_path: Path) -> None:
    log = tmp_path / "log"
    end = Deadline.after(10)
    with process.starting(["sh", "-c", "echo done; exit 3"], cwd=tmp_path, log=log) as exit_code:
        while exit_code() is None and not end.passed:
            end.sleep(0.02)
    assert exit_code() == 3
    assert "done" in log.read_text()


def read_pid(note: Path) -> int:
    end = Deadline.after(20)
    while not note.exists() or not note.read_text().strip():
        assert not end.passed, "the program did not start"
        end.sleep(0.02)
    return int(note.read_text())


def test_a_detached_program_is_no_part_of_this_session_and_goes_on(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    argv = ["sh", "-c", f"echo $$ >{note}; exec sleep 60"]
    with process.starting(argv, cwd=tmp_path, log=tmp_path / "l") as exit_code:
        pid = read_pid(note)
    try:
        assert os.getsid(pid) == pid
        assert exit_code() is None
    finally:
        process.stop(pid)
    assert exit_code() is not None


def test_a_detached_program_that_was_not_seen_to_work_is_ended(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    argv = ["sh", "-c", f"echo $$ >{note}; exec sleep 60"]
    with pytest.raises(KeyboardInterrupt), process.starting(argv, cwd=tmp_path, log=tmp_path / "l"):
        pid = read_pid(note)
        raise KeyboardInterrupt
    assert not process.is_alive(pid)


def test_a_zombie_is_not_alive() -> None:
    child = subprocess.Popen(["true"])
    end = Deadline.after(10)
    while process.is_alive(child.pid) and not end.passed:
        end.sleep(0.01)
    assert not process.is_alive(child.pid)
    assert child.wait() == 0
    assert not process.is_alive(child.pid)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="a process's threads are seen in Linux' /proc")
def test_who_is_killed_is_alive_while_a_thread_of_it_is() -> None:
    child = headless()
    assert child.stdin is not None
    assert process.command_line(child.pid) == ""
    assert process.is_alive(child.pid)
    child.stdin.close()
    assert process.wait_gone(child.pid, Deadline.after(10))
    assert child.wait() == 0


def test_stop_kills_who_does_not_listen_and_is_harmless_twice() -> None:
    child = subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"up\n"
    process.stop(child.pid, grace_s=0.3)
    assert child.wait(5) == -signal.SIGKILL
    child.stdout.close()
    process.stop(child.pid)


def test_facts_of_a_process() -> None:
    assert "python" in process.command_line(os.getpid())
    rss = process.rss_bytes(os.getpid())
    assert rss is not None and rss > 1_000_000
    assert process.rss_bytes(2**22 + 1) is None
    assert process.command_line(2**22 + 1) == ""


def test_cpu_time_is_what_was_used() -> None:
    before = process.cpu_seconds(os.getpid())
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
    after = process.cpu_seconds(os.getpid())
    assert before is not None and after is not None
    assert 0.15 < after - before < 1
    assert process.cpu_seconds(2**22 + 1) is None


def test_a_programs_name_is_not_mistaken_for_its_facts(tmp_path: Path) -> None:
    program = tmp_path / "a) R 1 (b"
    shutil.copy(shutil.which("sleep") or "", program)
    child = subprocess.Popen([program, "60"])
    try:
        used = process.cpu_seconds(child.pid)
        assert used is not None and used < 5
        assert process.is_alive(child.pid)
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0.25", 0.25), ("0:00.52", 0.52), ("123:45.67", 7425.67), ("01:02:03", 3723), ("2-03:04:05", 183_845)],
)
def test_cpu_time_as_ps_writes_it(text: str, seconds: float) -> None:
    assert process.parse_cpu_time(text) == pytest.approx(seconds)


def test_a_program_that_is_started_leaves_its_id(tmp_path: Path) -> None:
    with process.starting(["sleep", "60"], cwd=tmp_path, log=tmp_path / "log", pid_file=tmp_path / "pid") as exit_code:
        pid = int((tmp_path / "pid").read_text())
        assert process.command_line(pid) == "sleep 60" or process.is_alive(pid)
        assert exit_code() is None
    process.stop(pid)
    assert not process.is_alive(pid)


def test_a_program_is_looked_for_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert process.has_program("sh")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not process.has_program("sh")


def test_a_program_is_spoken_with_line_by_line() -> None:
    with process.talking(["sh", "-c", "echo one; read -r word; echo $word >&2; exit 4"]) as talk:
        lines = talk.lines()
        assert next(lines) == "one"
        talk.say("two")
        assert list(lines) == ["two"]
        assert talk.wait() == 4


def test_who_listens_no_more_is_told_nothing() -> None:
    with process.talking(["true"]) as talk:
        assert talk.wait() == 0
        talk.say("is anyone there")


def test_a_program_that_is_left_ends_with_all_that_it_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "TALK_GRACE_S", 0.5)
    with process.talking(["sh", "-c", f'{sys.executable} -c "{STUBBORN}"; :']) as talk:
        assert next(talk.lines()) == "up"
        child = int(subprocess.run(["pgrep", "-P", str(talk.pid)], capture_output=True, check=True).stdout)
    assert process.wait_gone(child, Deadline.after(5))


def test_the_most_memory_that_a_process_has_had() -> None:
    script = "x = bytearray(b'x') * (64 << 20); del x; print(end='.', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as held:
        assert held.stdout is not None
        assert held.stdout.read(1) == b"."
        now, most = process.rss_bytes(held.pid), process.peak_rss_bytes(held.pid)
        held.kill()
    assert now is not None
    assert most is not None
    assert most > 64 << 20 > now
    assert process.peak_rss_bytes(held.pid) is None
