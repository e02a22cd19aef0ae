"""`MachineSpec` -> QEMU's argv. Pure: the same input gives the same list."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from vmbuild.machine.files import MachineFiles
from vmbuild.machine.probe import Qemu
from vmbuild.model import Arch, DiskBoot, KernelBoot, MachineSpec

MAX_TB_MIB = 512
"""The translated code of a compiler and its friends fits; a full buffer throws everything away (QEMU, accel/tcg)."""

CPU_OPTIONS = "pmu=off"
"""Performance counters, which QEMU would bring up to date whenever the guest enters its kernel or leaves it."""

SSH_FORWARD = ",hostfwd=tcp:127.0.0.1:0-10.0.2.15:22"


@dataclass(frozen=True)
class Row:
    """What is particular to an architecture. A limit that is None is QEMU's to find."""

    machine_options: str
    kvm_options: str
    max_cpus: int
    max_memory_mib: int | None


ROWS = {
    # GICv2 allows 8 CPUs, GICv3 512.
    # KVM has the host's only: a Raspberry Pi 4 has GICv2.
    Arch.ARM64: Row("gic-version=3", kvm_options="gic-version=host", max_cpus=512, max_memory_mib=None),
    # Above 3 GiB an armv7 guest needs the high memory region, and a kernel with LPAE. Debian's has 768 MiB to itself
    # (VMSPLIT_3G), of which each GiB that there is takes 8 for its page table: 16 GiB leave it most of that.
    Arch.ARMHF: Row(
        "gic-version=2,highmem=on", kvm_options="gic-version=host,highmem=on", max_cpus=8, max_memory_mib=16384
    ),
}


def qemu_argv(
    spec: MachineSpec,
    qemu: Qemu,
    files: MachineFiles,
    uuid: str,
    *,
    first_boot: bool = False,
    is_restored: bool = False,
) -> list[str]:
    """Return the argv that starts a machine in its folder: sockets are named relative to it.

    `first_boot` adds the drive that tells a disk from elsewhere what to become. One that `is_restored` waits for its
    memory: the kernel is in it, and QEMU need not read it and keep it for a reboot, which there is none of. Nobody
    reaches its guest before that is awake: see `ports.open_for_awake`.

    Not -daemonize: the sandbox comes first, and spawn=deny and elevateprivileges=deny each kill it (QEMU 10.0).
    """
    row, image = ROWS[spec.image.arch], spec.image
    options = row.kvm_options if qemu.accel == "kvm" else row.machine_options
    argv = [
        *(qemu.binary, "-nodefaults", "-no-user-config", "-no-reboot"),
        *("-display", "none"),
        *("-name", f"guest=vmbuild-{spec.name}"),
        *("-uuid", uuid),
        *("-pidfile", files.pid.name),
        *("-machine", f"{qemu.newest(image.machine_type)},{options}{_flash(image.boot)}"),
        *("-accel", _accel(spec, qemu)),
        *("-cpu", f"{image.cpu_model},{CPU_OPTIONS}" if qemu.accel == "tcg" else "host"),
        *("-smp", str(spec.cpus)),
        *("-m", f"{spec.memory_mib}M"),
        *("-rtc", "base=utc"),
        *_boot(image.boot, qemu, files, is_restored=is_restored),
        *_drive("disk", "qcow2", files.disk.name, qemu),
        *_drive("seed", "raw", files.seed.name, qemu, read_only=True),
        *_drive("inbox", "raw", files.inbox.name, qemu, read_only=True),
        *_drive("outbox", "raw", files.outbox.name, qemu),
        *(_drive("cidata", "raw", files.first_boot.name, qemu, read_only=True) if first_boot else []),
        *("-netdev", f"user,id=net,{_network(image.boot)}{'' if is_restored else SSH_FORWARD}"),
        *("-device", "virtio-net-pci,netdev=net,romfile="),
        *("-device", "virtio-rng-pci"),
        *("-device", "virtio-balloon-pci,id=balloon,free-page-reporting=on"),
        *("-chardev", _socket("console", files.console.name) + f",logfile={files.console_log.name},logappend=on"),
        *("-serial", "chardev:console"),
        *("-device", "virtio-serial-pci,id=ports"),
        *("-chardev", "pipe,id=control,path=control"),
        *("-device", "virtserialport,bus=ports.0,chardev=control,name=vmbuild.control"),
        *("-chardev", _socket("qmp", files.qmp.name)),
        *("-mon", "chardev=qmp,mode=control"),
    ]
    if is_restored:
        argv += ["-incoming", "defer"]
    if qemu.sandbox:
        argv += ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
    return argv


def neutral_argv(spec: MachineSpec, qemu: Qemu) -> list[str]:
    """Return the argv without what differs between places and tells the guest nothing: names, paths, host features."""
    image = replace(spec.image, boot=_anywhere(spec.image.boot))
    firmware = qemu.firmware and replace(qemu.firmware, code=Path("code"), code_format="raw")
    anywhere = replace(qemu, binary="", aio="", sandbox=False, firmware=firmware)
    return qemu_argv(replace(spec, name="", image=image), anywhere, MachineFiles(Path()), "")


def _anywhere(boot: KernelBoot | DiskBoot) -> KernelBoot | DiskBoot:
    if isinstance(boot, DiskBoot):
        return DiskBoot(Path("disk"))
    return replace(boot, kernel=Path("kernel"), initrd=Path("initrd"), root=Path("root"))


def _boot(boot: KernelBoot | DiskBoot, qemu: Qemu, files: MachineFiles, *, is_restored: bool) -> list[str]:
    if isinstance(boot, DiskBoot):
        return _firmware(qemu, files)
    kernel = ["-kernel", str(boot.kernel), "-initrd", str(boot.initrd), "-append", " ".join(boot.kernel_args)]
    return [*([] if is_restored else kernel), *_drive("root", "raw", str(boot.root), qemu, read_only=True)]


def _firmware(qemu: Qemu, files: MachineFiles) -> list[str]:
    """Return the two flash chips of a UEFI firmware: its code, and the machine's own variables."""
    assert qemu.firmware is not None  # noqa: S101 - who starts a disk has looked for it
    found = qemu.firmware
    code, variables = quote(str(found.code)), files.variables.name
    return [
        *("-blockdev", f"driver=file,node-name=code-file,read-only=on,filename={code}"),
        *("-blockdev", f"driver={found.code_format},node-name=code,read-only=on,file=code-file"),
        *("-blockdev", f"driver=file,node-name=variables-file,filename={variables}"),
        *("-blockdev", f"driver={found.variables_format},node-name=variables,file=variables-file"),
    ]


def _flash(boot: KernelBoot | DiskBoot) -> str:
    return ",pflash0=code,pflash1=variables" if isinstance(boot, DiskBoot) else ""


def _network(boot: KernelBoot | DiskBoot) -> str:
    """Return the options of the user-mode network.

    A disk's system would take an IPv6 address that is offered, and user-mode networking often cannot carry what it then
    sends; an appliance does not listen.
    """
    return "net=10.0.2.0/24,ipv6=off" if isinstance(boot, DiskBoot) else "net=10.0.2.0/24"


def _accel(spec: MachineSpec, qemu: Qemu) -> str:
    if qemu.accel != "tcg":
        return qemu.accel
    return f"tcg,thread=multi,tb-size={min(MAX_TB_MIB, spec.memory_mib // 4)}"


def _drive(name: str, image_format: str, path: str, qemu: Qemu, *, read_only: bool = False) -> list[str]:
    """Return a virtio-blk drive that the guest knows by the serial number `vmbuild-NAME`."""
    access = "read-only=on" if read_only else "discard=unmap,detect-zeroes=unmap"
    return [
        *("-blockdev", f"driver=file,node-name={name}-file,aio={qemu.aio},{access},filename={quote(path)}"),
        *("-blockdev", f"driver={image_format},node-name={name},{access},file={name}-file"),
        *("-device", f"virtio-blk-pci,drive={name},serial=vmbuild-{name}"),
    ]


def _socket(name: str, path: str) -> str:
    return f"socket,id={name},path={quote(path)},server=on,wait=off"


def quote(value: str) -> str:
    """Return a value as QEMU's option parser wants it: commas doubled."""
    return value.replace(",", ",,")
