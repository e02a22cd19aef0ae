"""What QEMU is called with, list against list."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.machine.conftest import make_qemu, make_spec
from vmbuild.machine.argv import neutral_argv, qemu_argv
from vmbuild.machine.files import MachineFiles
from vmbuild.machine.firmware import Firmware
from vmbuild.machine.probe import Qemu
from vmbuild.model import Arch, DiskBoot, MachineSpec

UUID = "00000000-0000-4000-8000-000000000000"
FILES = MachineFiles(Path("/state/machines/box"))
IMAGE = Path("/cache/image")


def argv_of(spec: MachineSpec, qemu: Qemu) -> list[str]:
    return qemu_argv(spec, qemu, FILES, UUID)


def after(argv: list[str], option: str) -> list[str]:
    """Return what follows each use of an option."""
    return [argv[at + 1] for at, word in enumerate(argv) if word == option]


def test_arm64_under_tcg() -> None:
    rw = "aio=io_uring,discard=unmap,detect-zeroes=unmap"
    ro = "aio=io_uring,read-only=on"
    assert argv_of(make_spec(IMAGE), make_qemu(Path("/usr/bin/qemu-system-aarch64"))) == [
        *("/usr/bin/qemu-system-aarch64", "-nodefaults", "-no-user-config", "-no-reboot"),
        *("-display", "none"),
        *("-name", "guest=vmbuild-box"),
        *("-uuid", UUID),
        *("-pidfile", "qemu.pid"),
        *("-machine", "virt-10.0,gic-version=3"),
        *("-accel", "tcg,thread=multi,tb-size=512"),
        *("-cpu", "cortex-a76,pmu=off"),
        *("-smp", "2"),
        *("-m", "2048M"),
        *("-rtc", "base=utc"),
        *("-kernel", "/cache/image/kernel"),
        *("-initrd", "/cache/image/initrd"),
        *("-append", "console=ttyAMA0 kpti=off"),
        *("-blockdev", f"driver=file,node-name=root-file,{ro},filename=/cache/image/root.squashfs"),
        *("-blockdev", "driver=raw,node-name=root,read-only=on,file=root-file"),
        *("-device", "virtio-blk-pci,drive=root,serial=vmbuild-root"),
        *("-blockdev", f"driver=file,node-name=disk-file,{rw},filename=disk.qcow2"),
        *("-blockdev", "driver=qcow2,node-name=disk,discard=unmap,detect-zeroes=unmap,file=disk-file"),
        *("-device", "virtio-blk-pci,drive=disk,serial=vmbuild-disk"),
        *("-blockdev", f"driver=file,node-name=seed-file,{ro},filename=seed.tar"),
        *("-blockdev", "driver=raw,node-name=seed,read-only=on,file=seed-file"),
        *("-device", "virtio-blk-pci,drive=seed,serial=vmbuild-seed"),
        *("-blockdev", f"driver=file,node-name=inbox-file,{ro},filename=inbox.raw"),
        *("-blockdev", "driver=raw,node-name=inbox,read-only=on,file=inbox-file"),
        *("-device", "virtio-blk-pci,drive=inbox,serial=vmbuild-inbox"),
        *("-blockdev", f"driver=file,node-name=outbox-file,{rw},filename=outbox.raw"),
        *("-blockdev", "driver=raw,node-name=outbox,discard=unmap,detect-zeroes=unmap,file=outbox-file"),
        *("-device", "virtio-blk-pci,drive=outbox,serial=vmbuild-outbox"),
        *("-netdev", "user,id=net,net=10.0.2.0/24,hostfwd=tcp:127.0.0.1:0-10.0.2.15:22"),
        *("-device", "virtio-net-pci,netdev=net,romfile="),
        *("-device", "virtio-rng-pci"),
        *("-device", "virtio-balloon-pci,id=balloon,free-page-reporting=on"),
        *(
            "-chardev",
            "socket,id=console,path=console.sock,server=on,wait=off,logfile=console.log,logappend=on",
        ),
        *("-serial", "chardev:console"),
        *("-device", "virtio-serial-pci,id=ports"),
        *("-chardev", "pipe,id=control,path=control"),
        *("-device", "virtserialport,bus=ports.0,chardev=control,name=vmbuild.control"),
        *("-chardev", "socket,id=qmp,path=qmp.sock,server=on,wait=off"),
        *("-mon", "chardev=qmp,mode=control"),
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
    ]


@pytest.mark.parametrize(("memory_mib", "tb_mib"), [(512, 128), (1024, 256), (2048, 512), (16384, 512)])
def test_translated_code_gets_a_quarter_of_the_memory_up_to_a_limit(memory_mib: int, tb_mib: int) -> None:
    argv = argv_of(make_spec(IMAGE, memory_mib=memory_mib), make_qemu())
    assert after(argv, "-accel") == [f"tcg,thread=multi,tb-size={tb_mib}"]


def test_kvm_takes_the_hosts_cpu_and_interrupt_controller() -> None:
    argv = argv_of(make_spec(IMAGE), make_qemu(accel="kvm"))
    assert (after(argv, "-accel"), after(argv, "-cpu")) == (["kvm"], ["host"])
    assert after(argv, "-machine") == ["virt-10.0,gic-version=host"]


def test_hvf_takes_the_hosts_cpu() -> None:
    argv = argv_of(make_spec(IMAGE), make_qemu(accel="hvf"))
    assert (after(argv, "-accel"), after(argv, "-cpu")) == (["hvf"], ["host"])
    assert after(argv, "-machine") == ["virt-10.0,gic-version=3"]


def test_armhf_has_a_row_of_its_own() -> None:
    argv = argv_of(make_spec(IMAGE, arch=Arch.ARMHF), make_qemu())
    assert after(argv, "-machine") == ["virt-10.0,gic-version=2,highmem=on"]


def test_what_is_restored_has_its_kernel_in_memory() -> None:
    booted = argv_of(make_spec(IMAGE), make_qemu())
    at = booted.index("-kernel")
    restored = qemu_argv(make_spec(IMAGE), make_qemu(), FILES, UUID, is_restored=True)
    network = booted.index("-netdev") + 1
    booted[network] = booted[network].replace(",hostfwd=tcp:127.0.0.1:0-10.0.2.15:22", "")  # until it is awake
    assert restored == [*booted[:at], *booted[at + 6 : -2], "-incoming", "defer", *booted[-2:]]


def test_commas_in_paths_are_doubled() -> None:
    argv = argv_of(make_spec(Path("/a,b")), make_qemu())
    assert "filename=/a,,b/root.squashfs" in " ".join(argv)
    assert after(argv, "-kernel") == ["/a,b/kernel"]  # not an option list: taken as it is


def test_without_a_sandbox_or_io_uring() -> None:
    argv = argv_of(make_spec(IMAGE), replace(make_qemu(sandbox=False), aio="threads"))
    assert "-sandbox" not in argv
    assert "io_uring" not in " ".join(argv)


FIRMWARE = Firmware(Path("/fw/CODE,1.fd"), Path("/fw/VARS.fd"))


def disk_argv(*, first_boot: bool = False, firmware: Firmware = FIRMWARE) -> list[str]:
    spec = make_spec(IMAGE)
    spec = replace(spec, image=replace(spec.image, boot=DiskBoot(IMAGE / "disk.qcow2")))
    return qemu_argv(spec, replace(make_qemu(), firmware=firmware), FILES, UUID, first_boot=first_boot)


def test_a_disk_is_booted_by_firmware_instead_of_a_kernel() -> None:
    appliance, disk = argv_of(make_spec(IMAGE), make_qemu()), disk_argv()
    at = appliance.index("-kernel")
    assert disk[: at - 12] == appliance[: at - 12]
    assert after(disk, "-machine") == ["virt-10.0,gic-version=3,pflash0=code,pflash1=variables"]
    assert disk[at : at + 8] == [
        *("-blockdev", "driver=file,node-name=code-file,read-only=on,filename=/fw/CODE,,1.fd"),
        *("-blockdev", "driver=raw,node-name=code,read-only=on,file=code-file"),
        *("-blockdev", "driver=file,node-name=variables-file,filename=variables.fd"),
        *("-blockdev", "driver=raw,node-name=variables,file=variables-file"),
    ]
    behind = appliance.index("-append") + 2 + 6  # and the drive of the root file system
    network = "user,id=net,net=10.0.2.0/24,{}hostfwd=tcp:127.0.0.1:0-10.0.2.15:22"
    assert [word.replace(network.format("ipv6=off,"), network.format("")) for word in disk[at + 8 :]] == appliance[
        behind:
    ]


def test_the_drive_of_the_first_boot_is_there_only_then() -> None:
    more = [word for word in disk_argv(first_boot=True) if word not in disk_argv()]
    assert more == [
        "driver=file,node-name=cidata-file,aio=io_uring,read-only=on,filename=first-boot.iso",
        "driver=raw,node-name=cidata,read-only=on,file=cidata-file",
        "virtio-blk-pci,drive=cidata,serial=vmbuild-cidata",
    ]


def test_firmware_may_be_kept_as_qcow2() -> None:
    drives = after(disk_argv(firmware=replace(FIRMWARE, code_format="qcow2", variables_format="qcow2")), "-blockdev")
    assert drives[1].startswith("driver=qcow2,node-name=code,")
    assert drives[3].startswith("driver=qcow2,node-name=variables,")


def test_a_machine_that_boots_a_disk_is_the_same_wherever_its_files_are() -> None:
    def neutral(image: Path, firmware: Firmware) -> list[str]:
        spec = make_spec(image)
        spec = replace(spec, image=replace(spec.image, boot=DiskBoot(image / "disk.qcow2")))
        return neutral_argv(spec, replace(make_qemu(), firmware=firmware))

    assert neutral(IMAGE, FIRMWARE) == neutral(Path("/other"), Firmware(Path("/x"), Path("/y"), code_format="qcow2"))
