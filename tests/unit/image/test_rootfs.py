"""Packages opened and merged natively: what is in a .deb, or a plain word that it cannot be read."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from tests.unit.image.debs import compress, file, folder, hardlink, pack_ar, pack_deb, pack_tar, put_package, symlink
from tests.unit.listener import Listener
from vmbuild.errors import GuestImageError
from vmbuild.image.packages import package_path
from vmbuild.image.rootfs import add_packages, keep_all_but, open_part, read_files
from vmbuild.image.tree import TreeWriter

# Enough, and dull enough, that each compressor has something to do and cannot hide a cut.
DATA = b"".join(b"%08d" % number for number in range(20_000))


@pytest.fixture
def deb(tmp_path: Path) -> Path:
    """Return where a package may be written."""
    return tmp_path / "it.deb"


@pytest.mark.parametrize("suffix", [".xz", ".zst", ".gz", ""])
def test_parts_are_read_however_they_are_compressed(deb: Path, suffix: str) -> None:
    deb.write_bytes(pack_deb({"control": b"Package: it\n"}, [folder("./"), file("./etc/it", DATA)], suffix))
    assert read_files(deb, ["etc/"]) == {"etc/it": DATA}
    assert read_files(deb, [""], part="control") == {"control": b"Package: it\n"}


def test_read_files_returns_regular_files_under_the_prefixes_by_their_path_in_the_tree(deb: Path) -> None:
    entries = [
        folder("./lib/"),
        file("./lib/modules/a.ko", b"a"),
        file("./usr/lib/modules/b.ko", b"b"),
        file("./boot/vmlinuz-6.12", b"k"),
        file("./boot/config-6.12", b"c"),
        symlink("./boot/vmlinuz", "vmlinuz-6.12"),
        hardlink("./boot/vmlinuz-again", "./boot/vmlinuz-6.12"),
    ]
    deb.write_bytes(pack_deb({}, entries))
    expected = {"usr/lib/modules/a.ko": b"a", "usr/lib/modules/b.ko": b"b", "boot/vmlinuz-6.12": b"k"}
    assert read_files(deb, ["boot/vmlinuz", "usr/lib/modules/"]) == expected


def test_missing_part_is_said(deb: Path) -> None:
    deb.write_bytes(pack_ar({"debian-binary": b"2.0\n", "control.tar.xz": compress(pack_tar([]), ".xz")}))
    with pytest.raises(GuestImageError, match=r"it\.deb cannot be read"), open_part(deb, "data"):
        pass


def damaged(whole: bytes, suffix: str, how: str) -> bytes:
    """Return a data part, or something that claims to be one, that cannot be read."""
    packed = compress(whole, suffix)
    middle = len(packed) // 2
    if how == "cut":
        return packed[:middle]
    if how == "flipped":
        return packed[:middle] + bytes(byte ^ 0xFF for byte in packed[middle : middle + 64]) + packed[middle + 64 :]
    return b"\0not at all what it says" * 50


@pytest.mark.parametrize("how", ["cut", "flipped", "replaced"])
@pytest.mark.parametrize("suffix", [".xz", ".zst", ".gz"])
def test_corrupt_part_is_a_guest_image_error(deb: Path, suffix: str, how: str) -> None:
    part = damaged(pack_tar([file("./etc/it", DATA)]), suffix, how)
    deb.write_bytes(pack_ar({"debian-binary": b"2.0\n", f"data.tar{suffix}": part}))
    with pytest.raises(GuestImageError, match=r"it\.deb cannot be read") as caught:
        read_files(deb, [""])
    assert "Delete it" in caught.value.resolution


def test_empty_archive_is_a_guest_image_error(deb: Path) -> None:
    deb.write_bytes(pack_ar({}))
    with pytest.raises(GuestImageError, match=r"it\.deb cannot be read"):
        read_files(deb, [""])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<html>404</html>",
        b"!<arch>\n" + b"x" * 60,
        b"!<arch>\nshort",
    ],
)
def test_file_that_is_no_package_is_a_guest_image_error(deb: Path, data: bytes) -> None:
    deb.write_bytes(data)
    with pytest.raises(GuestImageError, match=r"it\.deb cannot be read"):
        read_files(deb, [""])


def test_cut_package_is_a_guest_image_error(deb: Path) -> None:
    whole = pack_deb({}, [file("./etc/it", DATA)])
    deb.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(GuestImageError, match=r"it\.deb cannot be read"):
        read_files(deb, [""])


def test_packages_are_merged_in_order_and_counted(tmp_path: Path, listener: Listener) -> None:
    packages = [
        put_package(tmp_path, "one", [folder("./etc"), file("./etc/both", b"one"), file("./usr/share/doc/one", b"")]),
        put_package(tmp_path, "two", [folder("./etc"), file("./etc/both", b"two"), file("./bin/two", b"2")]),
    ]
    out = io.BytesIO()
    tree = TreeWriter(out)
    add_packages(tree, iter(packages), tmp_path, keep_all_but(["./usr/share/doc"]), listener)
    tree.close()
    with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as tar:
        assert sorted(tar.getnames()) == ["bin", "etc", "etc/both", "lib", "sbin", "usr/bin/two"]
        both = tar.extractfile("etc/both")
        assert both is not None and both.read() == b"one"
    assert listener.meters == [("extract", 2)]
    assert listener.advanced == 2


def test_corrupt_package_stops_the_merge_and_is_named(tmp_path: Path, listener: Listener) -> None:
    package = put_package(tmp_path, "one", [file("./etc/it", DATA)])
    path = package_path(package, tmp_path)
    path.write_bytes(path.read_bytes()[:-200])
    tree = TreeWriter(io.BytesIO())
    with pytest.raises(GuestImageError, match=str(path)):
        add_packages(tree, [package], tmp_path, lambda _: True, listener)
    assert listener.advanced == 0
    tree.close()


@pytest.mark.parametrize(
    ("path", "kept"),
    [
        ("usr/share/doc", False),
        ("usr/share/doc/it/README", False),
        ("usr/share/docker", True),
        ("usr/share/doc-base/it", True),
        ("usr/share", True),
        ("usr/share/man/man1/it.1", False),
        ("usr/local/usr/share/doc/it", True),
        ("etc/it", True),
    ],
)
def test_keep_all_but_drops_folders_not_prefixes_of_names(path: str, kept: bool) -> None:
    assert keep_all_but(["./usr/share/doc", "./usr/share/man/"])(path) is kept


def test_keep_all_but_nothing_keeps_all() -> None:
    assert keep_all_but([])("usr/share/doc/it")
