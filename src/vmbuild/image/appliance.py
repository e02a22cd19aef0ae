"""A catalogue row -> kernel, initramfs and squashfs root: the guest image that boots without firmware or systemd."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

from vmbuild import process
from vmbuild.errors import GuestImageError
from vmbuild.image import kernel, rootfs
from vmbuild.image.packages import Package, package_path
from vmbuild.image.tree import File, Link, TreeWriter
from vmbuild.model import ApplianceSpec
from vmbuild.report import Reporter

T = TypeVar("T")

SQFSTAR = (
    "sqfstar", "-comp", "lz4", "-b", "128K", "-root-mode", "0755", "-no-xattrs", "-quiet", "-no-progress",
    "-mkfs-time", "0", "-all-time", "0",
)  # fmt: skip
"""The same packages give the same image: all times are fixed, as sqfstar 4.5 stamps the root folder with the present
whatever `-root-time` says."""
FOLDERS = (("tmp", 0o1777), ("root", 0o700), ("disk", 0o755), ("proc", 0o755), ("sys", 0o755))
"""What packages do not bring, or not with this mode."""

BUSYBOX = "usr/bin/busybox"
CERTIFICATES = "usr/share/ca-certificates/mozilla/"


@dataclass(frozen=True)
class KernelFiles:
    """What a kernel package holds, by use."""

    image: bytes
    folder: str
    modules: dict[str, kernel.Module]
    builtin: frozenset[str]
    tables: list[File]

    @property
    def release(self) -> str:
        """The kernel release, as `uname -r` says it."""
        return PurePosixPath(self.folder).name


def assemble(
    spec: ApplianceSpec, packages: Sequence[Package], downloads: Path, folder: Path, report: Reporter
) -> dict[str, str]:
    """Write `kernel`, `initrd` and `root.squashfs` into a folder. Returns facts for the manifest (kernel release).

    Raises GuestImageError when a package lacks what the guest needs, HostError when sqfstar is missing or fails.
    """
    report.step("Reading the kernel")
    files = read_kernel(spec, packages, downloads)
    (folder / "kernel").write_bytes(files.image)
    (folder / "initrd").write_bytes(_initramfs(spec, files, _busybox(packages, downloads)))
    report.step("Writing the root file system")
    with process.feed([*SQFSTAR, str(folder / "root.squashfs")]) as pipe, TreeWriter(pipe) as tree:
        for entry in _own_entries(spec, packages, downloads, files):
            tree.add_link(entry) if isinstance(entry, Link) else tree.add_file(entry)
        for path, mode in FOLDERS:
            tree.add_folder(path, mode)
        keep = rootfs.keep_all_but(
            [*spec.exclude, "./boot", f"./{files.folder}", f"./usr/lib/linux-image-{files.release}"]
        )
        rootfs.add_packages(tree, packages, downloads, keep, report)
        for applet in (spec.guest_files / "applets").read_text().split():
            tree.add_link(Link(f"usr/bin/{applet}", "busybox"))
    return {"kernel_release": files.release}


def read_kernel(spec: ApplianceSpec, packages: Sequence[Package], downloads: Path) -> KernelFiles:
    """Return the kernel image and modules out of the one package that has them."""
    package = _only([p for p in packages if p.name.startswith("linux-image-") and p.name != spec.kernel], "kernel")
    files = rootfs.read_files(package_path(package, downloads), ["boot/vmlinuz", "usr/lib/modules/"])
    image = _only([path for path in files if path.startswith("boot/vmlinuz")], "kernel image")
    listing = _only([path for path in files if path.endswith("/modules.builtin")], "module folder")
    folder = str(PurePosixPath(listing).parent)
    read = [kernel.read_module(path, files[path]) for path in sorted(files) if ".ko" in path]
    builtin = kernel.builtin_modules(files[listing].decode())
    keep = rootfs.keep_all_but([f"{folder}/kernel/{part}" for part in SKIPPED_MODULES])
    kept = [module.name for module in read if keep(module.path)]
    needed = kernel.load_order({module.name: module for module in read}, kept, builtin)
    modules = {module.name: module for module in needed}
    own = [File(path, files[path]) for path in files if path.startswith(f"{folder}/modules.")]
    return KernelFiles(files[image], folder, modules, builtin, own + kernel.module_tables(folder, modules, builtin))


SKIPPED_MODULES = (
    "drivers/gpu",
    "drivers/infiniband",
    "drivers/media",
    "drivers/net/ethernet",
    "drivers/nvme/target",
    "drivers/scsi",
    "drivers/target",
    "drivers/usb",
    "sound",
)
"""Hardware that no machine of ours has; kept all the same where a kept module depends on it."""


def _only(found: list[T], what: str) -> T:
    if len(found) != 1:
        raise GuestImageError(f"expected one {what} among the packages, found {len(found)}")
    return found[0]


def _busybox(packages: Sequence[Package], downloads: Path) -> bytes:
    package = _only([p for p in packages if p.name == "busybox-static"], "busybox-static")
    return _only(list(rootfs.read_files(package_path(package, downloads), [BUSYBOX]).values()), BUSYBOX)


def _initramfs(spec: ApplianceSpec, files: KernelFiles, busybox: bytes) -> bytes:
    needed = kernel.load_order(files.modules, spec.modules, files.builtin)
    return kernel.pack_initramfs(
        [
            File("init", (spec.guest_files / "initramfs").read_bytes(), 0o755),
            File("bin/busybox", busybox, 0o755),
            Link("bin/sh", "busybox"),
            File("modules/order", "".join(f"{module.name}\n" for module in needed).encode()),
            *(File(f"modules/{module.name}.ko", module.data) for module in needed),
        ]
    )


def _own_entries(
    spec: ApplianceSpec, packages: Sequence[Package], downloads: Path, files: KernelFiles
) -> list[File | Link]:
    entries: list[File | Link] = [*guest_files(spec.guest_files / "root")]
    links = tomllib.loads((spec.guest_files / "links.toml").read_text())
    entries += [Link(path, target) for path, target in links.items()]
    entries += [*files.tables, *(File(module.path, module.data) for module in files.modules.values())]
    entries.append(File("etc/ssl/certs/ca-certificates.crt", _certificates(packages, downloads)))
    return entries


def guest_files(folder: Path) -> list[File]:
    """Return the files that go into the guest as they are; those under usr/lib/vmbuild are programs."""
    found = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        found.append(File(name, path.read_bytes(), 0o755 if name.startswith("usr/lib/vmbuild/") else 0o644))
    return found


def _certificates(packages: Sequence[Package], downloads: Path) -> bytes:
    """Return the bundle that update-ca-certificates would write in its postinst."""
    package = _only([p for p in packages if p.name == "ca-certificates"], "ca-certificates")
    found = rootfs.read_files(package_path(package, downloads), [CERTIFICATES])
    if not found:
        raise GuestImageError(f"the package ca-certificates has nothing in {CERTIFICATES}")
    return b"".join(found[path] for path in sorted(found))
