"""Files that only a build may know: the guest's own scripts, run here on this host's perl."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from vmbuild.guest import secrets

SCRIPTS = Path(__file__).parents[3] / "images/guest/root/usr/lib/vmbuild"
MEMORY = Path("/dev/shm")
pytestmark = pytest.mark.skipif(
    shutil.which("perl") is None or not MEMORY.is_dir(), reason="needs perl and a tmpfs, as the guest has them"
)
FILES = {"0": b"first\nsecret", "config.json": b"", "2": bytes(range(256)) * 300}


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Path]:
    folder = MEMORY / f"vmbuild-test-{os.getpid()}" / tmp_path.name
    yield folder
    shutil.rmtree(folder.parent, ignore_errors=True)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def records(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    secrets.feed_of(files)(out)
    return out.getvalue()


def put(held: Path, work: Path, data: bytes, *program: str) -> subprocess.CompletedProcess[bytes]:
    argv = [str(SCRIPTS / "secrets"), "put", str(held), str(work / "held"), *program]
    return subprocess.run(argv, input=data, capture_output=True, check=False, timeout=30)


def test_a_program_finds_the_files_and_nobody_else_may(held: Path, work: Path) -> None:
    done = put(held, work, records(FILES), "sh", "-c", 'cat; ls -A "$0"', str(held))
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().split() == sorted(FILES)  # and nothing was left to read
    assert {path.name: path.read_bytes() for path in held.iterdir()} == FILES
    assert {path.stat().st_mode & 0o777 for path in held.iterdir()} == {0o600}
    assert held.stat().st_mode & 0o777 == 0o700


def test_wiping_writes_over_what_it_removes(held: Path, work: Path) -> None:
    put(held, work, records(FILES), "true")
    with (held / "2").open("rb") as still_open:
        for _ in range(2):
            subprocess.run([str(SCRIPTS / "secrets"), "wipe", str(work / "held")], check=True)
        assert still_open.read() == bytes(len(FILES["2"]))
    assert not held.exists()
    assert not (work / "held").is_symlink()


@pytest.mark.parametrize(
    "data",
    [records(FILES)[:-2], b"5 x\nabc", b"", b"3 ../x\nabc.\n", b"3 .x\nabc.\n", b"x\n"],
    ids=["no end", "short", "nothing", "a path", "hidden", "nonsense"],
)
def test_input_that_was_cut_short_leaves_nothing(held: Path, work: Path, data: bytes) -> None:
    done = put(held, work, data, "touch", str(work / "ran"))
    assert done.returncode != 0
    assert list(work.iterdir()) == []
    assert not held.exists()


def test_a_program_that_is_not_there_leaves_nothing(held: Path, work: Path) -> None:
    assert put(held, work, records(FILES), "/nonexistent").returncode != 0
    assert not held.exists()


def test_a_folder_that_is_on_a_disk_is_refused(work: Path) -> None:
    done = put(work / "here", work, records(FILES), "true")
    if b"not in memory" not in done.stderr:
        pytest.skip("this host's temporary folder is in memory")
    assert done.returncode != 0
    assert not (work / "here").exists()


def job(work: Path, *words: str) -> list[str]:
    return [str(SCRIPTS / "job"), words[0], str(work), *words[1:]]


def wait_gone(path: Path) -> None:
    end = time.monotonic() + 20
    while path.exists():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_they_are_gone_when_the_job_has_ended_though_nobody_follows(held: Path, work: Path) -> None:
    begin = job(work, "start", "0", "0", "sh", "-c", f"wc -c {held}/*; while [ ! -e {work}/go ]; do sleep 0.05; done")
    assert put(held, work, records(FILES), *begin).returncode == 0
    assert held.exists()
    (work / "go").touch()
    wait_gone(held)
    subprocess.run(job(work, "follow", "0"), check=True, stdout=subprocess.DEVNULL, timeout=20)
    assert f"{sum(map(len, FILES.values()))} total" in (work / "log").read_text()


def test_they_are_gone_when_the_job_was_killed_and_its_keeper_too(held: Path, work: Path) -> None:
    put(held, work, records(FILES), *job(work, "start", "0", "0", "sleep", "60"))
    os.kill(int((work / "keeper").read_text()), signal.SIGKILL)
    assert held.exists()
    subprocess.run(job(work, "stop"), check=True, timeout=30)
    assert not held.exists()
    with suppress(ProcessLookupError):
        os.kill(int((work / "group").read_text()), signal.SIGKILL)
