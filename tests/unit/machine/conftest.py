"""Machines of fake programs: the same code as with the real ones, without a guest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.conftest import PROGRAMS
from vmbuild import process
from vmbuild.deadline import Deadline
from vmbuild.machine import lifetime
from vmbuild.machine.files import MachineFiles
from vmbuild.machine.probe import Qemu
from vmbuild.model import GIB, Arch, GuestImage, KernelBoot, MachineSpec


def make_spec(folder: Path, *, memory_mib: int = 2048, disk_bytes: int = GIB, arch: Arch = Arch.ARM64) -> MachineSpec:
    """Return a machine whose guest image has its files in a folder."""
    image = GuestImage(
        name="debian-13-arm64",
        digest="sha256:1234",
        arch=arch,
        machine_type="virt",
        cpu_model="cortex-a76",
        boot=KernelBoot(
            folder / "kernel", folder / "initrd", folder / "root.squashfs", ("console=ttyAMA0", "kpti=off")
        ),
        size_bytes=1,
    )
    return MachineSpec("box", 2, memory_mib, disk_bytes, image)


OTHER_BOOT = KernelBoot(Path("kernel"), Path("initrd"), Path("root"), ("other",))


def kernel_boot(spec: MachineSpec) -> KernelBoot:
    """Return how a machine of `make_spec` boots."""
    assert isinstance(spec.image.boot, KernelBoot)
    return spec.image.boot


def make_qemu(binary: Path = PROGRAMS / "qemu-system-aarch64", *, accel: str = "tcg", sandbox: bool = True) -> Qemu:
    """Return a QEMU that can do everything."""
    types = ("virt", "virt-7.2", "virt-10.0", "virt-9.2")
    return Qemu(str(binary), types, ("cortex-a76",), accel=accel, aio="io_uring", sandbox=sandbox)


@pytest.fixture
def files(tmp_path: Path, programs: Path) -> Iterator[MachineFiles]:
    """The files of a machine that has a disk and a seed; its QEMU is ended with the test."""
    files = MachineFiles.at(tmp_path / "state", "box")
    lifetime.prepare(make_spec(tmp_path), files, explicit_disk=False)
    files.seed.write_bytes(bytes(512))
    yield files
    pid = lifetime.find_pid(files)
    if pid is not None:
        process.stop(pid, grace_s=0.1)


@pytest.fixture
def running(files: MachineFiles, tmp_path: Path) -> MachineFiles:
    """The files of a machine that runs."""
    lifetime.start(make_spec(tmp_path), files, make_qemu())
    return files


SOON = 5.0


def soon() -> Deadline:
    """Return a limit that only a defect reaches."""
    return Deadline.after(SOON)
