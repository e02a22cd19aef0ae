"""Kernel modules, their order and tables, and the initramfs."""

from __future__ import annotations

import lzma
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from tests.unit.image.debs import MODULES, RELEASE, module
from vmbuild.errors import GuestImageError
from vmbuild.image.kernel import (
    Module,
    builtin_modules,
    load_order,
    module_tables,
    pack_initramfs,
    read_module,
)
from vmbuild.image.tree import File, Link

NONE: frozenset[str] = frozenset()


def modules(**made: bytes) -> dict[str, Module]:
    """Return modules by name, read from ELF files as a kernel package has them."""
    read = [read_module(f"{MODULES}/kernel/{name}.ko", data) for name, data in made.items()]
    return {item.name: item for item in read}


def names(order: list[Module]) -> list[str]:
    return [item.name for item in order]


@pytest.mark.parametrize("wide", [True, False], ids=["ELF64", "ELF32"])
def test_modinfo_is_read(wide: bool) -> None:
    data = module(
        "virtio-blk",
        ["virtio", "virtio-ring"],
        soft="pre: crc32c post: late-one",
        aliases=["virtio:d00000002v*", "of:N*T*Cx=y"],
        wide=wide,
    )
    read = read_module(f"{MODULES}/kernel/virtio-blk.ko", data)
    assert read == Module(
        path=f"{MODULES}/kernel/virtio-blk.ko",
        name="virtio_blk",
        depends=("virtio", "virtio_ring"),
        aliases=("virtio:d00000002v*", "of:N*T*Cx=y"),
        soft_depends=("crc32c",),
        followers=("late_one",),
        data=data,
    )


def test_module_without_dependencies_has_none() -> None:
    read = read_module("virtio.ko", module("virtio"))
    assert (read.depends, read.soft_depends, read.aliases) == ((), (), ())


def test_compressed_module_is_decompressed() -> None:
    data = module("overlay", ["fs"])
    read = read_module("kernel/overlay.ko.xz", lzma.compress(data))
    assert (read.path, read.name, read.depends, read.data) == ("kernel/overlay.ko", "overlay", ("fs",), data)


def test_builtin_modules_are_named_as_modules_are() -> None:
    assert builtin_modules("kernel/fs/ext4.ko\nkernel/lib/crc-16.ko\n") == {"ext4", "crc_16"}


def test_each_module_comes_once_and_after_what_it_depends_on() -> None:
    found = modules(
        net=module("net", ["virtio", "failover"]),
        blk=module("blk", ["virtio"]),
        virtio=module("virtio", ["ring"]),
        ring=module("ring"),
        failover=module("failover", ["ring"]),
        unasked=module("unasked"),
    )
    assert names(load_order(found, ["net", "blk", "net"], NONE)) == ["ring", "virtio", "failover", "net", "blk"]


def test_wanted_name_may_be_written_with_dashes() -> None:
    assert names(load_order(modules(virtio_blk=module("virtio-blk")), ["virtio-blk"], NONE)) == ["virtio_blk"]


def test_soft_dependency_comes_too_where_the_kernel_has_it() -> None:
    found = modules(ext4=module("ext4", soft="pre: crc32c absent"), crc32c=module("crc32c"))
    assert names(load_order(found, ["ext4"], NONE)) == ["crc32c", "ext4"]


def test_soft_dependencies_in_a_circle_end() -> None:
    found = modules(a=module("a", soft="pre: b"), b=module("b", soft="pre: c"), c=module("c", soft="pre: a"))
    assert sorted(names(load_order(found, ["a"], NONE))) == ["a", "b", "c"]


@pytest.mark.parametrize("wanted", [["b"], ["b", "a"], ["a"]])
def test_module_comes_after_what_it_depends_on_even_where_that_softly_wants_it(wanted: list[str]) -> None:
    found = modules(a=module("a", soft="post: b"), b=module("b", ["a"]))
    assert names(load_order(found, wanted, NONE)) == ["a", "b"]


def test_builtin_is_left_out_wanted_or_needed() -> None:
    found = modules(ext4=module("ext4", ["jbd2", "mbcache"]), mbcache=module("mbcache"))
    assert names(load_order(found, ["ext4", "squashfs"], frozenset({"jbd2", "squashfs"}))) == ["mbcache", "ext4"]


@pytest.mark.parametrize("wanted", ["absent", "ext4"])
def test_unknown_module_is_named(wanted: str) -> None:
    with pytest.raises(GuestImageError, match="no module absent"):
        load_order(modules(ext4=module("ext4", ["absent"])), [wanted], NONE)


TABLED = {
    "virtio": module("virtio", aliases=["virtio-bus"]),
    "virtio_ring": module("virtio-ring", ["virtio"]),
    "virtio_blk": module("virtio-blk", ["virtio", "virtio_ring"], aliases=["virtio:d00000002v*", "block-*"]),
    "ext4": module("ext4", ["jbd2"], aliases=["fs-ext4"]),
    "jbd2": module("jbd2", soft="pre: builtin_crc"),
}


def dep_relation(table: bytes) -> dict[str, list[str]]:
    """Return what each path in a modules.dep needs, sorted; a table that names a path twice fails."""
    rows = [line.partition(":") for line in table.decode().splitlines()]
    assert len({path for path, _, _ in rows}) == len(rows)
    return {path: sorted(needs.split()) for path, _, needs in rows}


def test_module_tables_literally() -> None:
    tables = {item.path: item.data.decode() for item in module_tables(MODULES, modules(**TABLED), NONE)}
    assert tables == {
        f"{MODULES}/modules.dep": "kernel/virtio.ko:\n"
        "kernel/virtio_ring.ko: kernel/virtio.ko\n"
        "kernel/virtio_blk.ko: kernel/virtio_ring.ko kernel/virtio.ko\n"
        "kernel/ext4.ko: kernel/jbd2.ko\n"
        "kernel/jbd2.ko:\n",
        f"{MODULES}/modules.alias": "alias virtio-bus virtio\n"
        "alias virtio:d00000002v* virtio_blk\n"
        "alias block-* virtio_blk\n"
        "alias fs-ext4 ext4\n",
    }


@pytest.mark.parametrize("soft", ["pre: b", "post: b"])
def test_modprobe_by_the_table_loads_nothing_before_what_it_depends_on(soft: str) -> None:
    """Modprobe loads a line of modules.dep from its end (modules.dep(5)), then the module itself."""
    found = modules(a=module("a", soft=soft), b=module("b", [] if "pre" in soft else ["a"]), c=module("c", ["b"]))
    table = module_tables(MODULES, found, NONE)[0].data.decode()
    for path, _, needs in (line.partition(":") for line in table.splitlines()):
        loaded: list[str] = []
        for name in [Path(need).stem for need in [path, *needs.split()][::-1]]:
            assert set(found[name].depends) <= set(loaded), f"{name} is loaded too early in {path}:{needs}"
            loaded.append(name)


@pytest.mark.skipif(shutil.which("depmod") is None, reason="depmod (kmod) is not installed")
def test_module_tables_say_what_depmod_says(tmp_path: Path) -> None:
    found = modules(**TABLED)
    for item in found.values():
        (tmp_path / item.path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / item.path).write_bytes(item.data)
    # depmod looks in lib/modules, or since kmod 32 in usr/lib/modules: one is a link to the other, as on Debian.
    (tmp_path / "lib").symlink_to("usr/lib")
    subprocess.run(["depmod", "--basedir", tmp_path, RELEASE], check=True)
    ours = {Path(item.path).name: item.data for item in module_tables(MODULES, found, NONE)}
    theirs = {name: (tmp_path / MODULES / name).read_bytes() for name in ours}
    assert dep_relation(ours["modules.dep"]) == dep_relation(theirs["modules.dep"])
    aliases = [line for line in theirs["modules.alias"].splitlines() if not line.startswith(b"#")]
    assert sorted(ours["modules.alias"].splitlines()) == sorted(aliases)


ENTRIES: list[File | Link] = [
    File("init", b"#!/bin/sh\n", 0o755),
    File("bin/busybox", b"x" * 4097, 0o755),
    Link("bin/sh", "busybox"),
    File("modules/deep/order", b"ext4\n"),
    File("empty", b"", 0o600),
]


def test_initramfs_is_what_cpio_reads(tmp_path: Path) -> None:
    if shutil.which("cpio") is None:
        pytest.skip("cpio is not installed")
    archive = pack_initramfs(ENTRIES)
    listed = subprocess.run(["cpio", "-t", "--quiet"], input=archive, capture_output=True, check=True).stdout
    expected = ["bin", "modules", "modules/deep", "init", "bin/busybox", "bin/sh", "modules/deep/order", "empty"]
    assert listed.decode().split() == expected
    subprocess.run(["cpio", "-i", "--quiet"], input=archive, capture_output=True, check=True, cwd=tmp_path)
    assert (tmp_path / "bin/busybox").read_bytes() == b"x" * 4097
    assert (tmp_path / "bin/sh").readlink() == Path("busybox")
    modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("init", "empty", "modules/deep")}
    assert modes == {"init": 0o755, "empty": 0o600, "modules/deep": 0o755}


def test_initramfs_headers_are_newc_by_the_byte() -> None:
    """The kernel's buffer format (Documentation/driver-api/early-userspace/buffer-format.rst)."""
    archive = pack_initramfs([File("a/b", b"12345", 0o755)])
    folder, file, trailer = archive[:112], archive[112:236], archive[236:]
    assert (
        folder
        == (
            b"070701"
            + b"00000001"
            + b"000041ED"
            + b"00000000" * 2
            + b"00000001"
            + b"00000000" * 6
            + b"00000002"
            + b"0" * 8
        )
        + b"a\0"
    )
    assert (
        file
        == (
            b"070701" + b"00000002" + b"000081ED" + b"00000000" * 2 + b"00000001" + b"00000000"
            b"00000005" + b"00000000" * 4 + b"00000004" + b"0" * 8
        )
        + b"a/b\0"
        + b"\0\0"
        + b"12345\0\0\0"
    )
    assert trailer.endswith(b"TRAILER!!!\0\0\0\0")
    assert len(archive) % 4 == 0
