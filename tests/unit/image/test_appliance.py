"""Tiny packages assembled into a guest image for real, and read back."""

from __future__ import annotations

import gc
import lzma
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.unit.image.debs import MODULES, RELEASE, Entry, file, folder, module, put_package, symlink
from tests.unit.listener import Listener
from vmbuild import process
from vmbuild.errors import GuestImageError, HostError
from vmbuild.image import appliance
from vmbuild.image.appliance import assemble, guest_files, read_kernel
from vmbuild.image.catalog import load_image
from vmbuild.image.packages import Package, package_path
from vmbuild.model import ApplianceSpec, Arch
from vmbuild.process import CommandError

needs_squashfs = pytest.mark.skipif(
    not (shutil.which("sqfstar") and shutil.which("unsquashfs")), reason="squashfs-tools >= 4.5 is not installed"
)

KERNEL: list[Entry] = [
    folder("./"),
    file(f"./boot/vmlinuz-{RELEASE}", b"the kernel"),
    file(f"./boot/config-{RELEASE}", b"CONFIG"),
    file(f"./usr/lib/linux-image-{RELEASE}/board.dtb", b"dtb"),
    file(f"./{MODULES}/modules.builtin", b"kernel/fs/squashfs.ko\n"),
    file(f"./{MODULES}/modules.order", b"order"),
    file(f"./{MODULES}/kernel/drivers/virtio.ko", module("virtio")),
    file(f"./{MODULES}/kernel/drivers/blk.ko.xz", lzma.compress(module("blk", ["virtio"], aliases=["virtio:d2*"]))),
    file(f"./{MODULES}/kernel/drivers/gpu/card.ko", module("card")),
    file(f"./{MODULES}/kernel/drivers/usb/core.ko", module("core")),
    file(f"./{MODULES}/kernel/net/dongle.ko", module("dongle", ["core"])),
]


@dataclass
class Parts:
    """What goes into a guest image: its row, and packages that lie in `downloads`."""

    spec: ApplianceSpec
    packages: list[Package]
    downloads: Path

    def put(self, name: str, *entries: Entry) -> None:
        self.packages = [package for package in self.packages if package.name != name]
        self.packages.append(put_package(self.downloads, name, entries))

    def drop(self, name: str) -> None:
        self.packages = [package for package in self.packages if package.name != name]


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """Run finalisers after the test that left them: in the middle of ast.parse they crash CPython 3.11's pytest."""
    yield
    gc.collect()


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    """Return what a small guest image is made from."""
    guest = tmp_path / "guest"
    texts = {
        "initramfs": "#!/bin/sh\n# stage one\n",
        "applets": "sh\nls\n[\ntool\n",
        "links.toml": '"etc/mtab" = "/proc/self/mounts"\n"usr/sbin/modprobe" = "../bin/busybox"\n',
        "root/etc/hosts": "127.0.0.1 ours\n",
        "root/usr/lib/vmbuild/boot": "#!/bin/sh\n# boot\n",
    }
    for name, text in texts.items():
        (guest / name).parent.mkdir(parents=True, exist_ok=True)
        (guest / name).write_text(text)
    spec = ApplianceSpec(
        name="test",
        arch=Arch.ARM64,
        description="",
        folder=tmp_path,
        repositories=(),
        keyrings=(),
        packages=(),
        without=(),
        exclude=("./usr/share/doc",),
        kernel="linux-image-test",
        kernel_repositories=(),
        modules=("blk", "squashfs"),
        guest_files=guest,
        machine_type="virt",
        cpu_model="max",
        kernel_args=(),
    )
    made = Parts(spec, [], tmp_path / "downloads")
    made.put("linux-image-test", folder("./"))
    made.put(f"linux-image-{RELEASE}", *KERNEL)
    made.put("busybox-static", file("./bin/busybox", b"busybox", 0o755), symlink("./bin/bb", "busybox"))
    made.put(
        "ca-certificates",
        file("./usr/share/ca-certificates/mozilla/B.crt", b"-B-\n"),
        file("./usr/share/ca-certificates/mozilla/A.crt", b"-A-\n"),
    )
    made.put(
        "tool",
        folder("./"),
        folder("./usr/"),
        folder("./usr/bin/"),
        file("./usr/bin/tool", b"tool", 0o4755),
        file("./etc/hosts", b"not ours"),
        file("./usr/share/doc/tool/README", b"read"),
        folder("./var/mail/", 0o2775),
        file("./var/mail/box", b"", owner=(8, 12)),
    )
    return made


@dataclass(frozen=True)
class Made:
    """An assembled guest image."""

    folder: Path
    facts: dict[str, str]

    def listing(self) -> dict[str, str]:
        """Return `mode owner` or `mode owner -> target` by path, out of the squashfs."""
        lines = self._unsquashfs("-lln").decode().splitlines()
        rows = [re.fullmatch(r"(\S{10}) (\S+) .*? squashfs-root/?(\S*)( -> \S+)?", line) for line in lines]
        return {row[3]: f"{row[1]} {row[2]}{row[4] or ''}" for row in rows if row}

    def read(self, path: str) -> bytes:
        return self._unsquashfs("-cat", path)

    def _unsquashfs(self, option: str, *paths: str) -> bytes:
        argv = ["unsquashfs", option, str(self.folder / "root.squashfs"), *paths]
        return subprocess.run(argv, check=True, capture_output=True).stdout

    def initrd(self) -> dict[str, tuple[int, bytes]]:
        """Return mode and content of each entry of the initramfs (newc: thirteen fields of eight digits)."""
        data, at, found = (self.folder / "initrd").read_bytes(), 0, {}
        while at < len(data):
            assert data[at : at + 6] == b"070701"
            fields = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
            body = (at + 110 + fields[11] + 3) & ~3
            found[data[at + 110 : at + 109 + fields[11]].decode()] = (fields[1], data[body : body + fields[6]])
            at = (body + fields[6] + 3) & ~3
        return found


def make(parts: Parts, folder: Path, listener: Listener) -> Made:
    folder.mkdir()
    return Made(folder, assemble(parts.spec, parts.packages, parts.downloads, folder, listener))


@needs_squashfs
def test_guest_image_end_to_end(parts: Parts, tmp_path: Path, listener: Listener) -> None:
    made = make(parts, tmp_path / "out", listener)
    assert sorted(path.name for path in made.folder.iterdir()) == ["initrd", "kernel", "root.squashfs"]
    assert (made.folder / "kernel").read_bytes() == b"the kernel"
    assert made.facts == {"kernel_release": RELEASE}
    assert listener.steps == ["Reading the kernel", "Writing the root file system"]

    tree = made.listing()
    expected = {
        "bin": "lrwxrwxrwx 0/0 -> usr/bin",
        "etc/mtab": "lrwxrwxrwx 0/0 -> /proc/self/mounts",
        "usr/sbin/modprobe": "lrwxrwxrwx 0/0 -> ../bin/busybox",
        "etc/hosts": "-rw-r--r-- 0/0",
        "usr/lib/vmbuild/boot": "-rwxr-xr-x 0/0",
        "usr/bin/busybox": "-rwxr-xr-x 0/0",
        "usr/bin/sh": "lrwxrwxrwx 0/0 -> busybox",
        "usr/bin/[": "lrwxrwxrwx 0/0 -> busybox",
        "usr/bin/tool": "-rwsr-xr-x 0/0",  # the package's, not the applet
        "var/mail": "drwxrwsr-x 0/0",
        "var/mail/box": "-rw-r--r-- 8/12",
        "tmp": "drwxrwxrwt 0/0",
        "root": "drwx------ 0/0",
        "disk": "drwxr-xr-x 0/0",
        "proc": "drwxr-xr-x 0/0",
        "sys": "drwxr-xr-x 0/0",
        "usr": "drwxr-xr-x 0/0",
    }
    assert {path: tree.get(path) for path in expected} == expected
    assert not [path for path in tree if path.startswith(("boot", "usr/share/doc", "usr/lib/linux-image"))]
    assert made.read("etc/hosts") == b"127.0.0.1 ours\n"
    assert made.read("etc/ssl/certs/ca-certificates.crt") == b"-A-\n-B-\n"
    assert made.read("usr/bin/tool") == b"tool"


@needs_squashfs
def test_root_has_the_modules_that_a_machine_can_use_and_their_tables(
    parts: Parts, tmp_path: Path, listener: Listener
) -> None:
    made = make(parts, tmp_path / "out", listener)
    inside = {path.removeprefix(f"{MODULES}/") for path in made.listing() if path.startswith(f"{MODULES}/")}
    assert {path for path in inside if ".ko" in path} == {
        "kernel/drivers/virtio.ko",
        "kernel/drivers/blk.ko",
        "kernel/drivers/usb/core.ko",  # left out but for dongle, which needs it
        "kernel/net/dongle.ko",
    }
    assert {path for path in inside if path.startswith("modules.")} == {
        "modules.alias",
        "modules.builtin",
        "modules.dep",
        "modules.order",
    }
    assert made.read(f"{MODULES}/kernel/drivers/blk.ko") == module("blk", ["virtio"], aliases=["virtio:d2*"])
    assert b"kernel/drivers/blk.ko: kernel/drivers/virtio.ko\n" in made.read(f"{MODULES}/modules.dep")
    assert made.read(f"{MODULES}/modules.alias") == b"alias virtio:d2* blk\n"


@needs_squashfs
def test_initramfs_loads_what_the_row_asks_for(parts: Parts, tmp_path: Path, listener: Listener) -> None:
    inside = make(parts, tmp_path / "out", listener).initrd()
    assert inside == {
        "bin": (0o040755, b""),
        "modules": (0o040755, b""),
        "init": (0o100755, b"#!/bin/sh\n# stage one\n"),
        "bin/busybox": (0o100755, b"busybox"),
        "bin/sh": (0o120777, b"busybox"),
        "modules/order": (0o100644, b"virtio\nblk\n"),  # squashfs is built in
        "modules/virtio.ko": (0o100644, module("virtio")),
        "modules/blk.ko": (0o100644, module("blk", ["virtio"], aliases=["virtio:d2*"])),
        "TRAILER!!!": (0, b""),
    }


@needs_squashfs
def test_same_parts_give_the_same_guest_image_at_any_time(parts: Parts, tmp_path: Path, listener: Listener) -> None:
    one = make(parts, tmp_path / "one", listener)
    time.sleep(1.1)  # file systems are stamped with whole seconds
    two = make(parts, tmp_path / "two", listener)
    for part in ("kernel", "initrd", "root.squashfs"):
        assert (one.folder / part).read_bytes() == (two.folder / part).read_bytes()
    assert one.listing() == two.listing()


@needs_squashfs
def test_corrupt_package_ends_the_assembly(parts: Parts, tmp_path: Path, listener: Listener) -> None:
    [tool] = [package for package in parts.packages if package.name == "tool"]
    path = package_path(tool, parts.downloads)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(GuestImageError, match=str(path)):
        make(parts, tmp_path / "out", listener)


@needs_squashfs
def test_failed_assembly_says_nothing_behind_the_users_back(
    parts: Parts, tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception that a finaliser ignores is printed on the user's terminal."""
    ignored: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: ignored.append(unraisable.exc_value))
    parts.drop("ca-certificates")
    with pytest.raises(GuestImageError):
        make(parts, tmp_path / "out", listener)
    gc.collect()
    assert ignored == []


@needs_squashfs
def test_root_folder_is_roots_alone(parts: Parts, tmp_path: Path, listener: Listener) -> None:
    assert make(parts, tmp_path / "out", listener).listing()[""] == "drwxr-xr-x 0/0"


def test_missing_sqfstar_is_the_hosts_fault(
    parts: Parts, tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="sqfstar is not installed") as caught:
        make(parts, tmp_path / "out", listener)
    assert "squashfs-tools" in caught.value.resolution


def test_program_that_ends_early_is_told_whatever_the_pipe_still_buffers() -> None:
    with pytest.raises(CommandError, match="sh failed with exit code 1"):  # noqa: SIM117
        with process.feed(["sh", "-c", "exit 1"]) as pipe:
            for _ in range(10_000):
                pipe.write(bytes(1000))


@pytest.mark.parametrize("read_first", [0, 1_000_000])
def test_failing_sqfstar_is_the_hosts_fault_and_its_words_are_told(
    parts: Parts, tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch, read_first: int
) -> None:
    fake = tmp_path / "bin" / "sqfstar"
    fake.parent.mkdir()
    fake.write_text(f"#!/bin/sh\nhead -c {read_first} >/dev/null\necho 'No space left on device' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(fake.parent), prepend=":")
    parts.put("large", file("./usr/large", bytes(1_000_000)))
    with pytest.raises(HostError, match="sqfstar failed with exit code 1") as caught:
        make(parts, tmp_path / "out", listener)
    assert "No space left on device" in caught.value.details


# --- what a package lacks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["busybox-static", "ca-certificates", f"linux-image-{RELEASE}"])
def test_missing_package_is_a_guest_image_error(parts: Parts, tmp_path: Path, listener: Listener, name: str) -> None:
    parts.drop(name)
    with pytest.raises(GuestImageError, match="expected one"):
        make(parts, tmp_path / "out", listener)


@pytest.mark.parametrize("name", ["busybox-static", "ca-certificates"])
def test_package_without_its_files_is_a_guest_image_error(
    parts: Parts, tmp_path: Path, listener: Listener, name: str
) -> None:
    parts.put(name, folder("./"))
    with pytest.raises(GuestImageError):
        make(parts, tmp_path / "out", listener)


def test_two_kernels_are_one_too_many(parts: Parts) -> None:
    parts.put("linux-image-6.13-test", *KERNEL)
    with pytest.raises(GuestImageError, match="expected one kernel among the packages, found 2"):
        read_kernel(parts.spec, parts.packages, parts.downloads)


@pytest.mark.parametrize("lacking", [f"boot/vmlinuz-{RELEASE}", f"{MODULES}/modules.builtin"])
def test_kernel_package_without_its_files_is_a_guest_image_error(parts: Parts, lacking: str) -> None:
    parts.put(f"linux-image-{RELEASE}", *(one for one in KERNEL if one[0].name != f"./{lacking}"))
    with pytest.raises(GuestImageError, match="expected one"):
        read_kernel(parts.spec, parts.packages, parts.downloads)


def test_module_that_the_kernel_lacks_is_a_guest_image_error(parts: Parts, tmp_path: Path, listener: Listener) -> None:
    parts.spec = replace(parts.spec, modules=("blk", "absent"))
    with pytest.raises(GuestImageError, match="no module absent"):
        make(parts, tmp_path / "out", listener)


# --- the shipped guest files ----------------------------------------------------------------------------------------


def test_shipped_programs_can_be_run_and_settings_cannot() -> None:
    spec = load_image("debian-13-arm64")
    modes = {item.path: item.mode for item in guest_files(spec.guest_files / "root")}
    assert modes["usr/lib/vmbuild/boot"] == 0o755
    assert modes["etc/passwd"] == 0o644
    for path, mode in modes.items():
        runnable = (spec.guest_files / "root" / path).read_bytes().startswith(b"#!")
        assert (path, mode) == (path, 0o755 if runnable else 0o644)


def test_shipped_skipped_folders_are_written_without_slashes_at_their_ends() -> None:
    assert not [part for part in appliance.SKIPPED_MODULES if part.startswith("/") or part.endswith("/")]
