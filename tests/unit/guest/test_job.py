"""A program that outlives who started it: the guest's own script, run here on this host's perl."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.unit.guest.fakes import FakeSession, HostSession, Reply
from vmbuild.guest import job

SCRIPT = Path(__file__).parents[3] / "images/guest/root/usr/lib/vmbuild/job"
pytestmark = pytest.mark.skipif(shutil.which("perl") is None, reason="needs perl, as the guest has it")


class Here(HostSession):
    """A session to this host, with the guest's script where the guest has it."""

    def run(self, argv: Sequence[str], **options: Any) -> int:
        return super().run([str(SCRIPT) if argv[0] == job.PROGRAM else argv[0], *argv[1:]], **options)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(tmp_path)


def follow(folder: str, offset: int = 0) -> tuple[int, bytes]:
    heard = bytearray()
    code = job.follow(Here(), folder, offset, heard.extend, lambda: None)
    return code, bytes(heard)


def start(folder: str, script: str, terminal: tuple[int, int] | None = None) -> None:
    job.start(Here(), folder, ["sh", "-c", script], terminal)


@pytest.mark.parametrize("code", [0, 7, 127])
def test_output_and_exit_code_are_kept(folder: str, code: int) -> None:
    start(folder, f"echo out; echo err >&2; exit {code}")
    for _ in range(2):
        assert follow(folder) == (code, b"out\nerr\n")
    assert follow(folder, 4) == (code, b"err\n")


def test_it_is_followed_while_it_writes(folder: str) -> None:
    start(folder, "for i in 1 2 3 4 5; do echo $i; sleep 0.2; done")
    assert follow(folder) == (0, b"1\n2\n3\n4\n5\n")


def test_nothing_is_lost_of_much_output(folder: str) -> None:
    start(folder, "head -c 5000000 /dev/zero; echo end")
    code, heard = follow(folder)
    assert (code, len(heard), heard[-4:]) == (0, 5_000_004, b"end\n")


def test_a_terminal_has_its_size_and_is_the_programs_own(folder: str) -> None:
    start(folder, 'stty size; echo "$TERM"; [ -t 0 ] && [ -t 1 ] && [ -t 2 ] && echo here >/dev/tty; exit 3', (90, 33))
    assert follow(folder) == (3, b"33 90\r\nxterm-256color\r\nhere\r\n")


def test_without_a_terminal_its_input_is_at_its_end(folder: str) -> None:
    start(folder, "cat; [ -t 1 ] || echo none")
    assert follow(folder) == (0, b"none\n")


def test_a_program_that_is_not_there(folder: str) -> None:
    job.start(Here(), folder, ["no-such-program", "it"], None)
    code, heard = follow(folder)
    assert code == 127
    assert b"no-such-program: No such file" in heard


@pytest.mark.parametrize("terminal", [None, (80, 24)], ids=["plain", "terminal"])
def test_it_is_asked_to_end_and_ends_with_all_that_it_started(folder: str, terminal: tuple[int, int] | None) -> None:
    start(folder, "trap 'echo asked; exit 9' INT; sleep 1000 & echo $!; wait", terminal)
    for _ in range(100):
        if Path(folder, "log").read_bytes().endswith(b"\n"):
            break
        time.sleep(0.05)
    job.stop(Here(), folder)
    code, heard = follow(folder)
    assert code == 9
    assert heard.split()[1:] == [b"asked"]
    job.stop(Here(), folder)  # twice is harmless


def test_who_does_not_listen_is_killed(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = Path(folder, "quick")
    quick.write_text(SCRIPT.read_text().replace("['INT', 10], ['TERM', 5]", "['INT', 0.3], ['TERM', 0.3]"))
    quick.chmod(0o755)
    monkeypatch.setattr("tests.unit.guest.test_job.SCRIPT", quick)
    start(folder, "trap '' INT TERM; while :; do sleep 0.1; done")
    job.stop(Here(), folder)
    assert follow(folder) == (255, b"")


def test_stopped_before_it_began_it_has_ended(folder: str) -> None:
    job.stop(Here(), folder)
    assert Here().run(["ls", folder]) == 0


def test_a_keeper_that_was_killed_ends_the_following(folder: str) -> None:
    start(folder, "echo begun; exec sleep 1000")
    for _ in range(100):
        if Path(folder, "log").read_bytes():
            break
        time.sleep(0.05)
    os.kill(int(Path(folder, "keeper").read_text()), signal.SIGKILL)
    assert follow(folder) == (255, b"begun\n")
    os.killpg(int(Path(folder, "group").read_text()), signal.SIGKILL)


def test_it_outlives_who_started_it(folder: str) -> None:
    subprocess.run(
        ["setsid", "sh", "-c", f"{SCRIPT} start {folder} 0 0 sh -c 'sleep 0.5; echo late'; kill -9 -$$"], check=False
    )
    assert follow(folder) == (0, b"late\n")


def test_what_is_asked_of_the_guest() -> None:
    session = FakeSession(((job.PROGRAM,), Reply(stdout=b"words")), (("test",), Reply(1)))
    ticks, heard = list[int](), bytearray()
    job.follow(session, "/w", 12, heard.extend, lambda: ticks.append(1))
    assert session.calls[0].argv == (job.PROGRAM, "follow", "/w", "12")
    assert (bytes(heard), ticks) == (b"words", [1])
    assert not job.exists(session, "/w")
