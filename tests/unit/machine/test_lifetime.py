"""A machine starts, is found, stops and goes, whatever happened to it in between."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

import pytest

from tests.unit.machine.conftest import make_qemu, make_spec, soon
from tests.unit.test_process import headless
from vmbuild import process
from vmbuild.deadline import Deadline
from vmbuild.errors import HostError, MachineError, UsageError
from vmbuild.machine import lifetime
from vmbuild.machine.facts import load_facts
from vmbuild.machine.files import MachineFiles
from vmbuild.model import GIB, format_size
from vmbuild.report import SilentReporter


def start(files: MachineFiles) -> int:
    """Start the machine and return its pid."""
    lifetime.start(make_spec(files.folder.parents[2]), files, make_qemu())
    pid = lifetime.status(files).pid
    assert pid is not None
    return pid


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits for a QEMU that does not do what it should."""
    monkeypatch.setattr(lifetime, "ANSWER_S", 0.3)
    monkeypatch.setattr(lifetime, "QUIT_S", 0.3)


@pytest.mark.parametrize("name", ["default", "a", "9", "a.b_c-D", "x" * 63, "box.lock"])
def test_names(tmp_path: Path, name: str) -> None:
    assert MachineFiles.at(tmp_path, name).folder == tmp_path / "machines" / name


@pytest.mark.parametrize("name", ["", ".", "..", "-a", ".a", "a/b", "a b", "ä", "x" * 64, "a\n", "a,b"])
def test_names_that_cannot_be(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="cannot be a machine's name"):
        MachineFiles.at(tmp_path, name)


def test_no_machine_lies_where_another_has_its_lock(tmp_path: Path) -> None:
    lock = MachineFiles.at(tmp_path, "box").lock
    with pytest.raises(UsageError):
        MachineFiles.at(tmp_path, lock.name)


def test_start_status_stop(files: MachineFiles) -> None:
    assert lifetime.status(files).state == "stopped"
    pid = start(files)
    now = lifetime.status(files)
    assert (now.name, now.state, now.pid, now.ssh_port) == ("box", "running", pid, 40222)
    assert (now.cpus, now.memory_mib, now.disk_virtual_bytes) == (2, 2048, GIB)
    assert (now.image, now.image_digest) == ("debian-13-arm64", "sha256:1234")
    assert now.rss_bytes and now.started_at and now.disk_actual_bytes is not None
    assert os.getsid(pid) == pid  # no terminal, no process group of ours
    lifetime.stop(files, soon())
    lifetime.stop(files, soon())
    assert not process.is_alive(pid)
    assert lifetime.status(files).state == "stopped"
    assert not any(path.exists() for path in files.runtime)


def test_the_previous_console_log_is_kept(files: MachineFiles) -> None:
    files.console_log.write_text("first life\n")
    start(files)
    assert (files.folder / "console.log.1").read_text() == "first life\n"
    assert "first life" not in files.console_log.read_text()


def test_a_killed_qemu_is_stopped_and_starts_again(files: MachineFiles) -> None:
    pid = start(files)
    before = files.disk.read_bytes()
    os.kill(pid, signal.SIGKILL)
    assert process.wait_gone(pid, soon())
    assert files.pid.exists() and files.qmp.exists()
    assert lifetime.status(files).state == "stopped"
    with pytest.raises(MachineError, match="is not running") as caught:
        lifetime.check_alive(files)
    assert caught.value.details == "booting"
    assert start(files) != pid
    lifetime.check_alive(files)
    assert files.disk.read_bytes() == before


def test_a_stranger_with_our_pid_is_left_alone(files: MachineFiles) -> None:
    pid = start(files)
    os.kill(pid, signal.SIGKILL)
    assert process.wait_gone(pid, soon())
    files.pid.write_text(f"{os.getpid()}\n")  # the host was restarted, the number is another's
    assert lifetime.status(files).state == "stopped"
    lifetime.stop(files, soon())
    assert not files.pid.exists()
    start(files)


@pytest.mark.parametrize("text", ["", "no number", "999999999"])
def test_a_damaged_pid_file_means_stopped(files: MachineFiles, text: str) -> None:
    files.pid.write_text(text)
    assert lifetime.status(files).state == "stopped"


def test_damaged_facts_mean_unknown(files: MachineFiles) -> None:
    files.facts.write_text('{"uuid":')
    now = lifetime.status(files)
    assert (now.state, now.cpus, now.image) == ("stopped", None, None)


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ("cannot set up guest memory 'mach-virt.ram': Cannot allocate memory", "--memory"),
        ('Failed to get "write" lock', "Another QEMU"),
        ("disk.qcow2: No space left on device", "disk is full"),
        ("something never seen", "doctor"),
    ],
)
def test_what_qemu_says_is_passed_on(
    files: MachineFiles, monkeypatch: pytest.MonkeyPatch, words: str, advice: str
) -> None:
    monkeypatch.setenv("FAKE_QEMU_FAIL", words)
    with pytest.raises(MachineError, match="QEMU did not start") as caught:
        start(files)
    assert words in caught.value.details
    assert advice in caught.value.resolution
    assert lifetime.status(files).state == "stopped"


@pytest.mark.usefixtures("hurry")
def test_a_qemu_that_never_answers_is_ended(files: MachineFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_QEMU_SILENT", "1")
    monkeypatch.setattr(lifetime, "START_S", 1.0)
    with pytest.raises(MachineError, match="QEMU did not start") as caught:
        start(files)
    assert "did not answer in time" in caught.value.details
    facts = load_facts(files)
    assert facts is not None
    assert facts.uuid not in process.run(["ps", "-ww", "-A", "-o", "args="]).decode()


@pytest.mark.usefixtures("hurry")
def test_a_qemu_that_stands_still_is_broken_and_can_be_ended(files: MachineFiles) -> None:
    pid = start(files)
    os.kill(pid, signal.SIGSTOP)
    assert lifetime.status(files).state == "broken"
    lifetime.stop(files, soon())
    assert not process.is_alive(pid)
    assert not any(path.exists() for path in files.runtime)


@pytest.mark.usefixtures("hurry")
def test_a_stubborn_qemu_is_killed(files: MachineFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_QEMU_STUBBORN", "1")
    pid = start(files)
    lifetime.stop(files, soon())
    assert not process.is_alive(pid)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="a process's threads are seen in Linux' /proc")
def test_a_start_waits_for_a_qemu_that_was_killed_and_is_not_gone(files: MachineFiles) -> None:
    child = headless()
    assert child.stdin is not None
    files.pid.write_text(str(child.pid))
    threading.Timer(0.5, child.stdin.close).start()
    start(files)
    assert child.poll() == 0


def test_the_guest_is_asked_first(files: MachineFiles) -> None:
    pid = start(files)
    lifetime.stop(files, soon(), ask=lambda _: os.kill(pid, signal.SIGTERM))
    assert not process.is_alive(pid)


def test_a_guest_that_cannot_be_asked_is_no_hindrance(files: MachineFiles) -> None:
    def ask(limit: Deadline) -> None:
        raise MachineError("nobody there")

    pid = start(files)
    lifetime.stop(files, soon(), ask=ask)
    assert not process.is_alive(pid)


def test_a_paused_guest_is_not_asked(files: MachineFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_QEMU_STATUS", "io-error")
    pid, asked = start(files), list[Deadline]()
    lifetime.stop(files, soon(), ask=asked.append)
    assert asked == []
    assert not process.is_alive(pid)


def test_interrupted_before_qemu_has_a_pid_file_it_is_ended(
    files: MachineFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(files: MachineFiles) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(lifetime, "_answers", interrupt)
    with pytest.raises(KeyboardInterrupt):
        start(files)
    facts = load_facts(files)
    assert facts is not None
    assert facts.uuid not in process.run(["ps", "-ww", "-A", "-o", "args="]).decode()
    assert lifetime.status(files).state == "stopped"


def test_a_paused_machine_goes_on(files: MachineFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_QEMU_STATUS", "io-error")
    start(files)
    assert lifetime.status(files).state == "paused"
    lifetime.resume(files)
    assert lifetime.status(files).state == "running"


def test_the_disk_grows_when_asked_and_never_shrinks(files: MachineFiles, tmp_path: Path) -> None:
    lifetime.prepare(make_spec(tmp_path, disk_bytes=2 * GIB), files, explicit_disk=False)
    assert lifetime.disk_size(files) == GIB
    lifetime.prepare(make_spec(tmp_path, disk_bytes=2 * GIB), files, explicit_disk=True)
    assert lifetime.disk_size(files) == 2 * GIB
    for explicit in (False, True):
        lifetime.prepare(make_spec(tmp_path, disk_bytes=GIB), files, explicit_disk=explicit)
    assert lifetime.disk_size(files) == 2 * GIB


def test_a_disk_that_is_larger_than_wanted_is_said(files: MachineFiles, tmp_path: Path) -> None:
    lifetime.check_disk(files, GIB)
    lifetime.check_disk(MachineFiles.at(tmp_path, "none"), 1)
    with pytest.raises(UsageError, match=f"{format_size(GIB)} large and cannot shrink"):
        lifetime.check_disk(files, GIB - 1)


def test_a_disk_appears_whole_or_not_at_all(programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = MachineFiles.at(tmp_path, "box")
    monkeypatch.setenv("FAKE_QEMU_IMG_FAIL", "No space left on device")
    with pytest.raises(HostError) as caught:
        lifetime.prepare(make_spec(tmp_path), files, explicit_disk=False)
    assert "No space left" in caught.value.details
    assert not files.disk.exists()
    monkeypatch.delenv("FAKE_QEMU_IMG_FAIL")
    lifetime.prepare(make_spec(tmp_path), files, explicit_disk=False)
    assert lifetime.disk_size(files) == GIB
    assert files.folder.stat().st_mode & 0o777 == 0o700


def test_a_state_folder_that_cannot_be_written_is_the_hosts_fault(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    files = MachineFiles.at(tmp_path / "state", "box")
    with pytest.raises(HostError, match="cannot write"), lifetime.lock(files, SilentReporter()):
        pass


def test_destroy_refuses_a_running_machine(files: MachineFiles) -> None:
    start(files)
    with pytest.raises(MachineError, match="is running"):
        lifetime.destroy(files)
    lifetime.stop(files, soon())
    lifetime.destroy(files)
    assert list(files.folder.parent.iterdir()) == []


def test_all_machines_by_name(files: MachineFiles, tmp_path: Path) -> None:
    start(files)
    other = MachineFiles.at(tmp_path / "state", "another")
    lifetime.prepare(make_spec(tmp_path), other, explicit_disk=False)
    other.folder.with_name(".gone.1234").mkdir()
    found = lifetime.list_machines(tmp_path / "state")
    assert [(now.name, now.state) for now in found] == [("another", "stopped"), ("box", "running")]
    assert lifetime.list_machines(tmp_path / "nothing") == []


def test_the_facts_are_json(running: MachineFiles) -> None:
    assert json.loads(running.facts.read_text())["memory_mib"] == 2048


class Listener(SilentReporter):
    """Keeps the steps."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.heard = threading.Event()

    def step(self, text: str) -> None:
        self.steps.append(text)
        self.heard.set()


def test_the_second_waits_for_the_first_and_says_so(files: MachineFiles) -> None:
    listener = Listener()
    done = threading.Event()

    def second() -> None:
        with lifetime.lock(files, listener):
            done.set()

    with lifetime.lock(files, SilentReporter()):
        thread = threading.Thread(target=second)
        thread.start()
        assert listener.heard.wait(5)
        assert not done.is_set()
    thread.join(5)
    assert done.is_set()
    assert listener.steps == ["Waiting for another vmbuild that works on the machine box"]
