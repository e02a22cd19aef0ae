"""The root tree as a tar stream: every path once, where a merged-/usr system has it."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable

import pytest

from tests.unit.image.debs import Entry, device, file, folder, hardlink, pack_tar, symlink
from vmbuild.image.tree import File, Link, TreeWriter, merged_path, read_members


def written(*entries: Entry, own: Iterable[File | Link] = (), drop: str = "") -> dict[str, tarfile.TarInfo]:
    """Return what a tree of our own entries and one package holds, by path; fails when a path comes twice."""
    return {info.name: info for info, _ in written_members(*entries, own=own, drop=drop)}


def written_members(
    *entries: Entry, own: Iterable[File | Link] = (), drop: str = ""
) -> list[tuple[tarfile.TarInfo, bytes | None]]:
    out = io.BytesIO()
    tree = TreeWriter(out)
    for item in own:
        tree.add_link(item) if isinstance(item, Link) else tree.add_file(item)
    with tarfile.open(fileobj=io.BytesIO(pack_tar(entries))) as tar:
        tree.add_members(read_members(tar), lambda path: path != drop)
    tree.close()
    out.seek(0)
    with tarfile.open(fileobj=out) as tar:
        found = [(info, content.read() if content else None) for info, content in read_members(tar)]
    names = [info.name for info, _ in found]
    assert len(names) == len(set(names))
    return found


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("./bin/sh", "usr/bin/sh"),
        ("./sbin/init", "usr/sbin/init"),
        ("./lib/aarch64/libc.so", "usr/lib/aarch64/libc.so"),
        ("./bin/", "bin"),
        ("./usr/bin/sh", "usr/bin/sh"),
        ("./binary/sh", "binary/sh"),
        ("./opt/bin/sh", "opt/bin/sh"),
        ("/etc/passwd", "etc/passwd"),
        ("etc/passwd", "etc/passwd"),
        ("./", ""),
        (".", ""),
    ],
)
def test_merged_path(name: str, path: str) -> None:
    assert merged_path(name) == path


def test_top_level_folders_are_links_into_usr_whatever_a_package_says() -> None:
    tree = written(folder("./"), folder("./bin/"), folder("./lib/"), file("./bin/sh"))
    assert {name: tree[name].linkname for name in ("bin", "sbin", "lib")} == {
        "bin": "usr/bin",
        "sbin": "usr/sbin",
        "lib": "usr/lib",
    }
    assert all(tree[name].issym() for name in ("bin", "sbin", "lib"))
    assert tree["usr/bin/sh"].isreg()
    assert not {"", ".", "bin/sh"} & set(tree)


def test_who_comes_first_wins() -> None:
    members = written_members(
        file("./etc/hosts", b"package"),
        file("./bin/sh", b"one", 0o700),
        file("./usr/bin/sh", b"two"),
        symlink("./etc/mtab", "package"),
        own=[File("etc/hosts", b"ours", 0o600), Link("etc/mtab", "ours")],
    )
    tree = {info.name: (info, data) for info, data in members}
    assert tree["etc/hosts"][1] == b"ours"
    assert tree["etc/hosts"][0].mode == 0o600
    assert tree["usr/bin/sh"][1] == b"one"
    assert tree["etc/mtab"][0].linkname == "ours"


def test_hard_link_follows_its_target_into_usr() -> None:
    tree = written(file("./bin/perl", b"x"), hardlink("./bin/perl5", "./bin/perl"), hardlink("./usr/p", "usr/bin/perl"))
    assert tree["usr/bin/perl5"].islnk()
    assert (tree["usr/bin/perl5"].linkname, tree["usr/p"].linkname) == ("usr/bin/perl", "usr/bin/perl")


def test_symbolic_link_keeps_its_target_as_written() -> None:
    tree = written(symlink("./bin/sh", "/bin/dash"), symlink("./usr/x", "../bin/sh"))
    assert (tree["usr/bin/sh"].linkname, tree["usr/x"].linkname) == ("/bin/dash", "../bin/sh")


def test_own_entries_bring_the_folders_above_them_first_and_once() -> None:
    own: list[File | Link] = [File("usr/lib/vmbuild/boot", b""), Link("usr/lib/vmbuild/deep/link", "x")]
    members = written_members(own=own)
    names = [info.name for info, _ in members if info.name not in ("bin", "sbin", "lib")]
    assert names == ["usr", "usr/lib", "usr/lib/vmbuild", own[0].path, "usr/lib/vmbuild/deep", own[1].path]
    assert all(info.mode == 0o755 for info, _ in members if info.isdir())


def test_empty_folder_has_its_mode() -> None:
    out = io.BytesIO()
    tree = TreeWriter(out)
    tree.add_folder("tmp", 0o1777)
    tree.close()
    with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as tar:
        assert tar.getmember("tmp").isdir()
        assert tar.getmember("tmp").mode == 0o1777


def test_owner_and_setuid_bit_are_kept_and_names_of_owners_are_not() -> None:
    tree = written(file("./usr/bin/sudo", b"x", 0o4755), file("./var/mail", b"", 0o2775, owner=(8, 12)))
    assert tree["usr/bin/sudo"].mode == 0o4755
    assert (tree["var/mail"].mode, tree["var/mail"].uid, tree["var/mail"].gid) == (0o2775, 8, 12)
    assert {info.uname + info.gname for info in tree.values()} == {""}


def test_device_node_passes() -> None:
    null = written(device("./dev/null", 1, 3))["dev/null"]
    assert (null.ischr(), null.devmajor, null.devminor, null.mode) == (True, 1, 3, 0o666)


def test_content_passes_whole() -> None:
    big = bytes(range(256)) * 1000
    found = written_members(file("./a", b""), file("./b", big), own=[File("c", big)])
    assert {info.name: data for info, data in found if info.isreg()} == {"a": b"", "b": big, "c": big}


def test_keep_is_asked_with_the_path_in_the_tree() -> None:
    assert "usr/lib/firmware" not in written(file("./lib/firmware"), drop="usr/lib/firmware")
    assert "usr/lib/firmware" in written(file("./lib/firmware"), drop="lib/firmware")
    # what was dropped may still come from elsewhere
    assert "usr/lib/b" in written(file("./lib/a"), file("./lib/b"), drop="usr/lib/a")


def test_path_longer_than_a_tar_header_passes() -> None:
    path = "/".join(["a-folder-with-a-name"] * 12)
    assert path in written(own=[File(path, b"")])
