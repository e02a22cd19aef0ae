"""A bootable arm64 disk like the ones that distributions publish for clouds, put together from Debian packages.

No cloud disk can be downloaded where these tests run. This one has what matters of them: UEFI, a boot loader, systemd,
OpenSSH, a root partition that ends where the disk ends. One has cloud-init and GRUB, the other a root password and
systemd-boot.
Packages are unpacked natively and configured in a machine of vmbuild's own; it takes minutes, so disks are kept.

By hand: `python -m tests.machine.disks CACHE [debian:bookworm-slim]` prints the paths of both disks.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vmbuild.deadline import Deadline
from vmbuild.guest import docker, transfer
from vmbuild.guest.session import Session, Sink, capture
from vmbuild.image import base, catalog, kernel, rootfs
from vmbuild.image.debian import open_indexes
from vmbuild.image.fetch import fetch_all
from vmbuild.image.packages import Package, package_downloads, package_path, resolve_closure
from vmbuild.image.tree import File, Link
from vmbuild.lock import hold
from vmbuild.machine.files import MachineFiles
from vmbuild.machine.sparse import create_sparse, write_sparse
from vmbuild.model import GIB, MIB, Arch, Home, MachineRequest
from vmbuild.reach import channel_of
from vmbuild.report import Reporter, SilentReporter
from vmbuild.start import open_session

RECIPE = 2
"""Raise it when this module would make other disks from the same packages."""

PASSWORD = "correct-horse"  # noqa: S105 - of a disk that lives for a test
ROOT_BYTES = 1600 * MIB
"""The root partition as published: with room for a first boot, not for Docker, so that it must grow."""

ESP_BYTES = 64 * MIB
ESP_AT = MIB
ROOT_AT = ESP_AT + ESP_BYTES
ROOT_PARTUUID = "5b6a0d1e-5a52-4b0c-8d1b-6f1d5ce0a001"
ARGS = f"root=PARTUUID={ROOT_PARTUUID} ro console=tty0 console=ttyAMA0,115200"

TRIXIE, BOOKWORM = "debian:trixie-slim", "debian:bookworm-slim"
"""The base images whose repositories the disks are made of."""

PACKAGES = (
    "apt",
    "ca-certificates",
    "cloud-guest-utils",
    "cloud-init",
    "dbus",
    "debian-archive-keyring",
    "fdisk",
    "grub2-common",
    "iproute2",
    "kmod",
    "libpam-systemd",
    "linux-image-cloud-arm64",
    "netplan.io",
    "openssh-server",
    "sudo",
    "systemd-resolved",
    "systemd-sysv",
    "udev",
)
WITHOUT = ("initramfs-tools",)
"""Its initramfs would take minutes to make under emulation; a small one of ours mounts the root."""

LOADERS = {
    "grub": ("grub-efi-arm64-signed", "usr/lib/grub/arm64-efi-signed/grubaa64.efi.signed"),
    "systemd-boot": ("systemd-boot-efi", "usr/lib/systemd/boot/efi/systemd-bootaa64.efi"),
}
"""The package of each boot loader that is a program of one piece, and where in it that lies."""

# As Debian's own disks have it: the one on the EFI partition leads to the one that update-grub writes.
GRUB_ON_ESP = b"search --set=root --label cloudroot\nset prefix=($root)/boot/grub\nconfigfile $prefix/grub.cfg\n"
GRUB_FIRST = """set timeout=0
search --set=root --label cloudroot
linux /boot/vmlinuz-@RELEASE@ @ARGS@
initrd /boot/initrd.img-@RELEASE@
boot
"""
GRUB_DEFAULTS = """GRUB_DEFAULT=0
GRUB_TIMEOUT=5
GRUB_DISTRIBUTOR=Debian
GRUB_CMDLINE_LINUX_DEFAULT=""
GRUB_CMDLINE_LINUX="console=tty0 console=ttyAMA0,115200"
"""

INIT = """#!/bin/busybox sh
busybox=/bin/busybox
$busybox mkdir -p /proc /sys /dev /root
$busybox mount -t proc proc /proc
$busybox mount -t sysfs sys /sys
$busybox mount -t devtmpfs dev /dev
while read -r module; do $busybox insmod "/modules/$module.ko"; done </modules/order
until drive=$($busybox findfs LABEL=cloudroot); do :; done
$busybox mount -t ext4 -o ro "$drive" /root || exec $busybox poweroff -f
for tree in proc sys dev; do $busybox mount --move /$tree /root/$tree; done
exec $busybox switch_root /root /usr/sbin/init
"""

FSTAB = """LABEL=cloudroot / ext4 rw,discard,errors=remount-ro 0 1
LABEL=ESP /boot/efi vfat umask=0077 0 1
"""

FINISH = f"""
set -e
root=$1
rm -f $root/usr/sbin/policy-rc.d $root/etc/apt/apt.conf.d/docker-* $root/etc/dpkg/dpkg.cfg.d/docker
rm -f $root/etc/ssh/ssh_host_* $root/var/lib/dpkg/vmbuild-arch
cat >$root/etc/fstab <<END
{FSTAB}END
cat >$root/etc/default/grub <<END
{GRUB_DEFAULTS}END
echo cloud >$root/etc/hostname
printf '127.0.0.1 localhost\\n127.0.1.1 cloud\\n' >$root/etc/hosts
: >$root/etc/machine-id
ln -sf ../run/systemd/resolve/stub-resolv.conf $root/etc/resolv.conf
mkdir -p $root/proc $root/sys $root/dev $root/run $root/boot/efi
"""

WITHOUT_CLOUD_INIT = f"""
set -e
root=$1
chroot $root dpkg --purge --force-depends cloud-init grub2-common grub-common
rm -rf $root/etc/cloud $root/var/lib/cloud $root/boot/grub $root/boot/initrd.img-* $root/etc/default/grub*
printf 'root:%s\\n' {PASSWORD!r} | chroot $root chpasswd
printf '[Match]\\nName=en*\\n[Network]\\nDHCP=yes\\n' >$root/etc/systemd/network/80-dhcp.network
ln -sf /usr/lib/systemd/system/systemd-networkd.service \
    $root/etc/systemd/system/multi-user.target.wants/systemd-networkd.service
chroot $root ssh-keygen -A
"""

FORMAT = """
set -e
drive=$(for block in /sys/block/vd*; do
    [ "$(cat $block/serial)" = vmbuild-outbox ] && echo /dev/${block##*/}
done)
export MKE2FS_CONFIG="$1/etc/mke2fs.conf" # a release's e2fsck need not be at ease with what a later one's mke2fs makes
/usr/sbin/mkfs.ext4 -q -F -L cloudroot -d "$1" "$drive" "$2k" >&2
sync
blockdev --flushbufs "$drive"
"""


@dataclass(frozen=True)
class Disks:
    """Both disks, raw files: with cloud-init, and without but with a root password on the serial console."""

    cloud_init: Path
    plain: Path


@dataclass(frozen=True)
class Plan:
    """What goes onto the disks, and where they are kept."""

    spec: catalog.BaseSpec
    packages: tuple[Package, ...]
    tools: dict[str, Package]
    downloads: Path
    disks: Disks


def make_disks(home: Home, report: Reporter | None = None, base: str = TRIXIE) -> Disks:
    """Return the disks of a cache, made first where they are missing. `home.state` gets a machine for the making."""
    report = report or SilentReporter()
    plan = make_plan(home.cache, report, base)
    if not plan.disks.plain.exists():  # it is made last
        with hold(plan.disks.plain.with_name("lock"), report, "makes the test disks"):
            _make(plan, home, report)
    return plan.disks


def make_plan(cache: Path, report: Reporter, base: str = TRIXIE) -> Plan:
    """Return what the disks are made of, packages fetched."""
    slim = catalog.load_base(base)
    mirrors = {"debian": "auto", "debian-security": "auto"}
    indexes = open_indexes(slim.repositories, Arch.ARM64, mirrors, slim.keyrings, cache / "indexes", report)
    packages = resolve_closure(indexes, [*PACKAGES, *slim.packages], without=WITHOUT, essential=True)
    names = ["busybox-static", *(package for package, _ in LOADERS.values())]
    tools = {name: next(p for p in resolve_closure(indexes, [name]) if p.name == name) for name in names}
    fetch_all(package_downloads([*packages, *tools.values()], cache / "packages"), report, label="download")
    facts = [str(RECIPE), FINISH, WITHOUT_CLOUD_INIT, INIT, ARGS, *(p.sha256 for p in (*packages, *tools.values()))]
    digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
    folder = cache / "test-disks" / digest
    disks = Disks(folder / "cloud-init.raw", folder / "plain.raw")
    return Plan(slim, packages, tools, cache / "packages", disks)


def _make(plan: Plan, home: Home, report: Reporter) -> None:
    request = MachineRequest("disk-maker", 2, 2048, 20 * GIB, "debian-13-arm64", snapshots=False)
    files = MachineFiles.at(home.state, request.name)
    folder = plan.disks.plain.parent
    with open_session(request, home, report) as session, docker.workspace(session) as work:
        report.step(f"Unpacking {len(plan.packages)} packages")
        channel = channel_of(files)
        sources = "".join(
            f"Types: deb\nURIs: {one.public_url}\nSuites: {one.suite}\nComponents: main\n"
            "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n\n"
            for one in plan.spec.repositories
        )
        transfer.unpack_tree(
            session,
            work.context,
            lambda sink: base.write_base(plan.spec, plan.packages, plan.downloads, sources, sink, report),
            channel,
        )
        capture(session, ["sh", "-c", STAND_IN, "stand-in", work.context])
        report.step("Configuring them")
        with report.meter("configure", len(plan.packages), unit="packages") as meter:
            docker.configure_tree(session, work, meter)
        boot = _read_boot(plan)
        capture(session, ["mkdir", "-p", f"{work.context}/boot/grub"])
        _put(session, f"{work.context}/boot/grub/grub.cfg", boot.grub)
        _put(session, f"{work.context}/boot/initrd.img-{boot.release}", boot.initrd)
        variants = (
            (FINISH, plan.disks.cloud_init, "grub"),
            (WITHOUT_CLOUD_INIT, plan.disks.plain, "systemd-boot"),
        )
        for script, path, loader in variants:
            report.step(f"Writing {path.name}")
            capture(session, ["sh", "-c", script, "finish", work.context])
            capture(session, ["sh", "-c", FORMAT, "format", work.context, str(ROOT_BYTES // 1024)])
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                _write_disk(_esp_files(plan, boot, loader), files.outbox, Path(scratch) / "disk")
                (Path(scratch) / "disk").replace(path)
        _power_off(session)


STAND_IN = """
cat >>"$1/var/lib/dpkg/status" <<END

Package: test-initramfs
Status: install ok installed
Maintainer: nobody
Architecture: all
Version: 1
Provides: linux-initramfs-tool
Description: stands in for the tools that make an initramfs
END
: >"$1/var/lib/dpkg/info/test-initramfs.list"
"""


def _put(session: Session, path: str, data: bytes) -> None:
    def feed(sink: Sink) -> None:
        sink.write(data)

    transfer.write_file(session, path, feed)


def _power_off(session: Session) -> None:
    session.run(["sh", "-c", "sync; poweroff -f &"], deadline=Deadline.after(10))


def _write_disk(esp: dict[str, bytes], root: Path, disk: Path) -> None:
    """Lay out the disk: root is partition 1 and last, the EFI partition 15 and first, as Debian's own have it."""
    size = ROOT_AT + ROOT_BYTES + MIB
    with create_sparse(disk, size) as file, root.open("rb") as source:
        for at in range(0, ROOT_BYTES, MIB):
            write_sparse(file, ROOT_AT + at, source.read(MIB))
    _write_table(disk)
    _write_esp(esp, disk)


def _write_table(disk: Path) -> None:
    table = f"""label: gpt
{disk}1 : start={ROOT_AT // 512}, size={ROOT_BYTES // 512}, type=B921B045-1DF0-41C3-AF44-4C6F280D3FAE, \
uuid={ROOT_PARTUUID}
{disk}15 : start={ESP_AT // 512}, size={ESP_BYTES // 512}, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B
"""
    _run("sfdisk", "-q", str(disk), stdin=table.encode())


@dataclass(frozen=True)
class Boot:
    """What is booted: the kernel and its release, an initramfs, and GRUB's first configuration."""

    release: str
    kernel: bytes
    initrd: bytes
    grub: bytes


def _read_boot(plan: Plan) -> Boot:
    (package,) = (p for p in plan.packages if p.name.startswith("linux-image-6") or "-cloud-arm64" in p.name[12:])
    files = rootfs.read_files(package_path(package, plan.downloads), ["boot/vmlinuz", "usr/lib/modules/"])
    (path,) = (path for path in files if path.startswith("boot/vmlinuz"))
    release = path.removeprefix("boot/vmlinuz-")
    grub = GRUB_FIRST.replace("@RELEASE@", release).replace("@ARGS@", ARGS)
    return Boot(release, files[path], _initrd(plan, files), grub.encode())


def _esp_files(plan: Plan, boot: Boot, loader: str) -> dict[str, bytes]:
    package, name = LOADERS[loader]
    program = rootfs.read_files(package_path(plan.tools[package], plan.downloads), [name])[name]
    if loader == "grub":
        return {"EFI/BOOT/BOOTAA64.EFI": program, "EFI/debian/grub.cfg": GRUB_ON_ESP}
    entry = f"title Debian\nlinux /vmlinuz\ninitrd /initrd.img\noptions {ARGS}\n"
    return {
        "EFI/BOOT/BOOTAA64.EFI": program,
        "loader/loader.conf": b"timeout 0\n",
        "loader/entries/debian.conf": entry.encode(),
        "vmlinuz": boot.kernel,
        "initrd.img": boot.initrd,
    }


def _write_esp(content: dict[str, bytes], disk: Path) -> None:
    with tempfile.TemporaryDirectory(dir=disk.parent) as scratch:
        esp = Path(scratch) / "esp"
        with esp.open("wb") as file:
            file.truncate(ESP_BYTES)
        _run("mformat", "-i", str(esp), "-F", "-v", "ESP", "::")
        parents = {str(parent) for path in content for parent in Path(path).parents} - {"."}
        for folder in sorted(parents):
            _run("mmd", "-i", str(esp), f"::{folder}")
        for path, data in content.items():
            (Path(scratch) / "file").write_bytes(data)
            _run("mcopy", "-i", str(esp), str(Path(scratch) / "file"), f"::{path}")
        with disk.open("r+b") as whole, esp.open("rb") as file:
            for at in range(0, ESP_BYTES, MIB):
                write_sparse(whole, ESP_AT + at, file.read(MIB))


def _initrd(plan: Plan, files: dict[str, bytes]) -> bytes:
    (listing,) = (data for path, data in files.items() if path.endswith("/modules.builtin"))
    modules = {m.name: m for m in (kernel.read_module(path, files[path]) for path in files if ".ko" in path)}
    needed = kernel.load_order(modules, ["virtio_pci", "virtio_blk", "ext4"], kernel.builtin_modules(listing.decode()))
    path = "usr/bin/busybox"
    busybox = rootfs.read_files(package_path(plan.tools["busybox-static"], plan.downloads), [path])[path]
    return kernel.pack_initramfs(
        [
            File("init", INIT.encode(), 0o755),
            File("bin/busybox", busybox, 0o755),
            Link("bin/sh", "busybox"),
            File("modules/order", "".join(f"{module.name}\n" for module in needed).encode()),
            *(File(f"modules/{module.name}.ko", module.data) for module in needed),
        ]
    )


def _run(*argv: str, stdin: bytes = b"") -> None:
    subprocess.run(_found(argv), input=stdin, check=True, stdout=subprocess.DEVNULL)


def _found(argv: Sequence[str]) -> list[str]:
    """An ordinary user's PATH has no sbin."""
    places = [Path(folder) / argv[0] for folder in ("/usr/sbin", "/sbin")]
    return [next((str(place) for place in places if place.exists()), argv[0]), *argv[1:]]


if __name__ == "__main__":
    from vmbuild.ui import TerminalReporter

    cache = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as state:
        print(make_disks(Home(cache, Path(state)), TerminalReporter(), *sys.argv[2:]))
