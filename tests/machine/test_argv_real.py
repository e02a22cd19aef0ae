"""The real QEMU accepts what vmbuild calls it with; paused, so that no guest is needed."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.machine.conftest import kernel_boot, make_spec
from vmbuild import process
from vmbuild.deadline import Deadline
from vmbuild.errors import MachineError
from vmbuild.machine import lifetime
from vmbuild.machine.argv import ROWS
from vmbuild.machine.facts import load_facts
from vmbuild.machine.files import MachineFiles
from vmbuild.machine.probe import Qemu, probe
from vmbuild.machine.qmp import Qmp
from vmbuild.model import GIB, Arch, MachineSpec

pytestmark = pytest.mark.machine


@pytest.fixture
def qemu(tmp_path: Path) -> Qemu:
    """The host's QEMU, started paused."""
    return paused_qemu(Arch.ARM64, tmp_path)


def paused_qemu(arch: Arch, tmp_path: Path) -> Qemu:
    """Return a QEMU that starts paused: `exec` keeps its process id and command line."""
    qemu = probe(arch, tmp_path / "cache")
    paused = tmp_path / "paused-qemu"
    paused.write_text(f'#!/bin/sh\nexec "{qemu.binary}" "$@" -S\n')
    paused.chmod(0o755)
    return replace(qemu, binary=str(paused))


@pytest.fixture
def spec(tmp_path: Path) -> MachineSpec:
    """A machine whose kernel, initramfs and root are nothing but zeroes, in a folder with a comma."""
    folder = tmp_path / "image,1"
    folder.mkdir()
    spec = make_spec(folder, memory_mib=512)
    boot = kernel_boot(spec)
    for path in (boot.kernel, boot.initrd, boot.root):
        path.write_bytes(bytes(64 * 1024))
    return spec


@pytest.fixture
def files(tmp_path: Path, spec: MachineSpec) -> Iterator[MachineFiles]:
    """The files of a machine with a disk, in a folder too deep for a socket's name."""
    files = MachineFiles.at(tmp_path / ("d" * 60) / ("e" * 60), "box")
    lifetime.prepare(spec, files, explicit_disk=False)
    files.seed.write_bytes(bytes(10240))
    yield files
    lifetime.stop(files, Deadline.after(5))


def test_start_ask_stop(spec: MachineSpec, qemu: Qemu, files: MachineFiles) -> None:
    lifetime.start(spec, files, qemu)
    now = lifetime.status(files)
    assert (now.state, now.disk_virtual_bytes) == ("paused", GIB)
    assert now.pid is not None and now.ssh_port is not None
    socket.create_connection(("127.0.0.1", now.ssh_port), 5).close()
    facts = load_facts(files)
    with Qmp(files.qmp, Deadline.after(5)) as qmp:
        assert facts is not None and qmp.execute("query-uuid")["UUID"] == facts.uuid
        drives = {drive["inserted"]["node-name"]: drive["inserted"]["ro"] for drive in qmp.execute("query-block")}
        assert drives == {"root": True, "disk": False, "seed": True, "inbox": True, "outbox": False}
        assert "read 512/512" not in qmp.hmp('qemu-io disk "read 0 512"')  # goes to QEMU's own output
    assert "read 512/512 bytes" in files.qemu_log.read_text()
    lifetime.stop(files, Deadline.after(5))
    assert not process.is_alive(now.pid)
    assert not any(path.exists() for path in files.runtime)


def test_a_hundred_starts_and_stops_leave_nothing(spec: MachineSpec, qemu: Qemu, files: MachineFiles) -> None:
    lifetime.start(spec, files, qemu)
    lifetime.stop(files, Deadline.after(5))
    before, handles, pids = sorted(files.folder.iterdir()), len(list(Path("/proc/self/fd").iterdir())), dict[int, str]()
    for number in range(100):
        lifetime.start(spec, files, qemu)
        pid = lifetime.find_pid(files)
        facts = load_facts(files)
        assert pid is not None and facts is not None
        pids[pid] = facts.uuid
        if number % 2:
            os.kill(pid, signal.SIGKILL)  # every other one, as a host that is out of memory would
            assert process.wait_gone(pid, Deadline.after(30))
        lifetime.stop(files, Deadline.after(5))
    assert sorted(path for path in files.folder.iterdir() if path.suffix != ".1") == [
        path for path in before if path.suffix != ".1"
    ]
    assert len(list(Path("/proc/self/fd").iterdir())) == handles
    assert len(pids) == 100
    # By its UUID: an id may be another program's by now.
    assert [pid for pid, uuid in pids.items() if process.is_alive(pid) and uuid in process.command_line(pid)] == []


def test_a_disk_in_use_is_said_in_qemus_words(
    spec: MachineSpec, qemu: Qemu, files: MachineFiles, tmp_path: Path
) -> None:
    lifetime.start(spec, files, qemu)
    other = MachineFiles.at(tmp_path / "other", "box")
    other.folder.mkdir(parents=True)
    other.disk.hardlink_to(files.disk)
    shutil.copy(files.seed, other.seed)
    with pytest.raises(MachineError, match="QEMU did not start") as caught:
        lifetime.start(spec, other, qemu)
    assert "Another QEMU uses the machine's disk" in caught.value.resolution
    assert lifetime.status(files).state == "paused"


def test_more_memory_than_there_is_is_said(spec: MachineSpec, qemu: Qemu, files: MachineFiles) -> None:
    with pytest.raises(MachineError) as caught:
        lifetime.start(replace(spec, memory_mib=200 * 1024 * 1024), files, qemu)
    assert "--memory" in caught.value.resolution, caught.value.details


@pytest.mark.skipif(shutil.which("qemu-system-arm") is None, reason="qemu-system-arm is not installed")
def test_a_32_bit_machine_has_as_many_cpus_as_its_row_says(
    spec: MachineSpec, files: MachineFiles, tmp_path: Path
) -> None:
    qemu, most = paused_qemu(Arch.ARMHF, tmp_path), ROWS[Arch.ARMHF].max_cpus
    spec = replace(spec, cpus=most, image=replace(spec.image, arch=Arch.ARMHF, cpu_model="cortex-a15"))
    lifetime.start(spec, files, qemu)
    assert (lifetime.status(files).state, lifetime.status(files).cpus) == ("paused", most)
    lifetime.stop(files, Deadline.after(5))
    with pytest.raises(MachineError) as caught:
        lifetime.start(replace(spec, cpus=most + 1), files, qemu)
    assert "exceeds max CPUs" in caught.value.details
