"""The file system of a container image: what its layers say together, and what they may not do to the host."""

from __future__ import annotations

import gzip
import io
import json
import os
import stat
import tarfile
from pathlib import Path
from typing import Any

import pytest
import zstandard

from tests.unit.guest.images import Host, hard_link, link, make_layer
from tests.unit.listener import Listener
from vmbuild.errors import GuestError, HostError, UsageError
from vmbuild.guest import folder
from vmbuild.guest.flatten import MOST_FOLDERS, Tree
from vmbuild.report import SilentReporter


class Layers:
    """Layers as files, and what they make together."""

    def __init__(self, place: Path) -> None:
        self.place = place
        place.mkdir()
        self.target = place / "target"
        self.report = Listener()

    def tree(self, *layers: bytes) -> Tree:
        paths = [self.place / str(number) for number in range(len(layers))]
        for path, data in zip(paths, layers, strict=True):
            path.write_bytes(data)
        return Tree(paths)

    def tar(self, *layers: bytes) -> dict[str, Any]:
        """Return the members of the tar: content of files, the target of links."""
        out = io.BytesIO()
        size = folder.write_tar([("", self.tree(*layers))], out, SilentReporter())
        assert size == len(out.getvalue())
        out.seek(0)
        with tarfile.open(fileobj=out) as tar:
            return {each.name: _content(tar, each) for each in tar}

    def files(self, *layers: bytes) -> dict[str, Any]:
        """Return what lies in the folder then."""
        folder.write_folder([("", self.tree(*layers))], self.target, self.report)
        return listing(self.target)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Any:
    file = tar.extractfile(member) if member.isreg() else None
    if file is not None:
        return file.read().decode()
    return None if member.isdir() else member.linkname


def listing(target: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in target.rglob("*"):
        name = str(path.relative_to(target))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_file():
            found[name] = path.read_text()
        else:
            found[name] = None
    return found


@pytest.fixture
def layers(tmp_path: Path) -> Layers:
    return Layers(tmp_path / "work")


def test_upper_layers_replace_and_add(layers: Layers) -> None:
    lower = make_layer(("d", None), ("d/a", "old"), ("d/b", "kept"), ("f", "file"), ("g", None), ("g/x", "gone"))
    upper = make_layer(("d", None), ("d/a", "new"), ("f", None), ("f/c", "3"), ("g", "now a file"))
    expected = {"d": None, "d/a": "new", "d/b": "kept", "f": None, "f/c": "3", "g": "now a file"}
    assert layers.tar(lower, upper) == expected
    assert layers.files(lower, upper) == expected


@pytest.mark.parametrize("pack", [lambda data: data, gzip.compress, zstandard.compress], ids=["plain", "gzip", "zstd"])
def test_whiteouts_hide_what_is_below_and_nothing_of_their_own_layer(layers: Layers, pack: Any) -> None:
    lower = make_layer(
        ("d", None), ("d/a", "1"), ("d/b", "2"), ("o", None), ("o/x", "3"), ("o/s", None), ("o/s/y", "4")
    )
    upper = make_layer(("d/.wh.a", ""), ("o/new", "5"), ("o/.wh..wh..opq", ""), ("n", None), ("n/.wh.none", ""))
    assert layers.tar(pack(lower), pack(upper)) == {"d": None, "d/b": "2", "o": None, "o/new": "5", "n": None}
    again = make_layer((".wh.d", ""), ("d", None), ("d/z", "6"))
    assert layers.tar(lower, upper, again) == {"d": None, "d/z": "6", "o": None, "o/new": "5", "n": None}


def test_hard_links_outlive_their_first_name(layers: Layers) -> None:
    lower = make_layer(("a", "same"), ("b", hard_link("a")), ("c", hard_link("./b")))
    assert layers.tar(lower) == {"a": "same", "b": "a", "c": "a"}
    assert layers.tar(lower, make_layer((".wh.a", ""))) == {"b": "same", "c": "b"}
    out = io.BytesIO()
    owned = {"data": b"1", "mode": 0o4750, "uid": 7}
    folder.write_tar([("", layers.tree(make_layer(("a", owned), ("b", hard_link("a")))))], out, SilentReporter())
    out.seek(0)
    with tarfile.open(fileobj=out) as tar:
        assert [(each.mode, each.uid, each.size) for each in tar] == [(0o4750, 7, 1), (0o4750, 7, 0)]
    layers.files(lower, make_layer((".wh.a", "")))
    assert (layers.target / "b").samefile(layers.target / "c")


def test_a_link_into_a_lower_layer(layers: Layers) -> None:
    assert layers.tar(make_layer(("a", "1")), make_layer(("b", hard_link("/a")))) == {"a": "1", "b": "a"}
    with pytest.raises(GuestError, match="links b to what is not there"):
        layers.tree(make_layer(("b", hard_link("../a"[1:]))))


def test_what_a_tar_keeps(layers: Layers) -> None:
    owned = {"uid": 1234, "gid": 5, "mode": 0o4755, "data": b"x", "pax_headers": {"SCHILY.xattr.user.a": "b"}}
    device = {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3}
    out = io.BytesIO()
    tree = layers.tree(make_layer(("x", owned), ("null", device), ("pipe", {"type": tarfile.FIFOTYPE})))
    folder.write_tar([("linux_arm64", tree), ("linux_arm_v7", tree)], out, SilentReporter())
    out.seek(0)
    with tarfile.open(fileobj=out) as tar:
        member = tar.getmember("linux_arm_v7/x")
        assert (member.uid, member.gid, member.mode, member.mtime) == (1234, 5, 0o4755, 1000)
        assert member.pax_headers["SCHILY.xattr.user.a"] == "b"
        assert tar.getmember("linux_arm64/null").devminor == 3
        assert tar.getmember("linux_arm64").isdir()


def test_files_become_the_users(layers: Layers) -> None:
    special = {"type": tarfile.BLKTYPE, "devmajor": 1, "devminor": 3}
    files = layers.files(
        make_layer(
            ("d", None), ("d/x", {"uid": 1234, "mode": 0o6751, "data": b"x"}), ("dev", special), ("l", link("/x"))
        )
    )
    assert files == {"d": None, "d/x": "x", "l": "-> /x"}
    found = (layers.target / "d" / "x").stat()
    assert (found.st_uid, stat.S_IMODE(found.st_mode), found.st_mtime) == (os.getuid(), 0o751, 1000)
    assert (layers.target / "d").stat().st_mtime == 1000
    assert layers.report.warnings == [f"1 devices are not in {layers.target}: they cannot be files of a user"]


def test_a_folder_keeps_what_else_is_in_it(layers: Layers) -> None:
    (layers.target / "d").mkdir(parents=True)
    (layers.target / "d" / "mine").write_text("mine")
    (layers.target / "d" / "x").write_text("old")
    assert layers.files(make_layer(("d", None), ("d/x", "new"))) == {"d": None, "d/mine": "mine", "d/x": "new"}
    assert [path.name for path in layers.place.iterdir() if path.name.startswith(".")] == []


# What layers are not to do.

OUTSIDE = [
    [("l", link("/")), ("l/etc", None), ("l/etc/x", "evil")],
    [("l", link("../..")), ("l/x", "evil")],
    [("a", link("b")), ("b", link("a")), ("a/x", "evil")],
    [("l", link("/outside")), ("h", hard_link("l")), ("h/x", "evil")],
]


@pytest.mark.parametrize("entries", OUTSIDE, ids=["absolute", "above", "round", "linked twice"])
def test_nothing_is_written_through_a_link(layers: Layers, tmp_path: Path, entries: Any) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    before = sorted(Path("/etc").iterdir())
    layers.files(make_layer(*entries))
    assert list(outside.iterdir()) == []
    assert sorted(Path("/etc").iterdir()) == before
    assert {path.name for path in tmp_path.iterdir()} == {"outside", "work"}


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/../x", "a/" * (MOST_FOLDERS + 1) + "x"])
def test_a_name_that_leads_out_is_refused(layers: Layers, name: str) -> None:
    with pytest.raises(GuestError, match="has an entry named"):
        layers.tree(make_layer((name, "evil")))


def test_an_absolute_name_is_one_of_the_tree(layers: Layers) -> None:
    assert layers.files(make_layer(("/etc/x", "1"), ("./b", "2"))) == {"etc": None, "etc/x": "1", "b": "2"}


def test_a_folder_behind_a_link_is_that_of_the_tree(layers: Layers) -> None:
    lower = make_layer(("usr", None), ("usr/lib", None), ("lib", link("usr/lib")))
    assert layers.tar(lower, make_layer(("lib/x", "1"))) == {
        "usr": None,
        "usr/lib": None,
        "usr/lib/x": "1",
        "lib": "usr/lib",
    }


def test_links_that_the_user_has_there_are_replaced_not_followed(layers: Layers, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "x").write_text("precious")
    layers.target.mkdir()
    (layers.target / "d").symlink_to(outside)
    (layers.target / "f").symlink_to(outside / "x")
    assert layers.files(make_layer(("d", None), ("d/x", "evil"), ("f", "evil"))) == {
        "d": None,
        "d/x": "evil",
        "f": "evil",
    }
    assert (outside / "x").read_text() == "precious"


def test_a_folder_of_the_user_is_no_file(layers: Layers) -> None:
    (layers.target / "d" / "mine").mkdir(parents=True)
    with pytest.raises(HostError, match="d is a file in the container image"):
        layers.files(make_layer(("d", "file")))
    assert (layers.target / "d" / "mine").is_dir()


@pytest.mark.parametrize(
    "data", [b"no tar" * 200, gzip.compress(make_layer(("a", "1" * 9999)))[:-30]], ids=["no tar", "cut"]
)
def test_a_damaged_layer_is_said(layers: Layers, data: bytes) -> None:
    with pytest.raises(GuestError):
        layers.files(data)
    assert not layers.target.exists()


@pytest.mark.parametrize("seconds", ["nan", "inf", "-inf", "-5", "1e300"])
def test_a_time_that_is_none_is_another(layers: Layers, seconds: str) -> None:
    layer = make_layer(("d", {"type": tarfile.DIRTYPE}), ("d/a", {"pax_headers": {"mtime": seconds}, "data": b"1"}))
    assert layers.tar(layer) == {"d": None, "d/a": "1"}
    assert layers.files(layer) == {"d": None, "d/a": "1"}


def test_a_layer_that_leads_round_is_refused(layers: Layers) -> None:
    layer = make_layer(("a", {"pax_headers": {"size": "-1024"}}), ("b", "1"))
    with pytest.raises(GuestError):
        layers.tree(layer)


def test_a_folder_that_cannot_be_written_is_known_before(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for target in (tmp_path / "file", tmp_path / "none" / "folder"):
        with pytest.raises(UsageError, match="cannot write to the folder"):
            folder.check_folder(target)
    folder.check_folder(tmp_path / "new")
    folder.check_folder(tmp_path)


def test_a_layout_keeps_the_container_images_that_it_has(tmp_path: Path) -> None:
    host, target = Host(tmp_path / "blobs"), tmp_path / "layout"
    one, two, three = (host.image(make_layer(("a", str(number)))) for number in range(3))
    for image, tags in ((one, ["a:1"]), (two, ["a:2", "b"]), (three, ["a:1"])):
        folder.write_layout(image, tags, target, host.blobs.path)
    entries = json.loads((target / "index.json").read_text())["manifests"]
    names = {each["annotations"]["io.containerd.image.name"]: each["digest"][7:] for each in entries}
    assert names == {
        "docker.io/library/a:1": three.digest,
        "docker.io/library/a:2": two.digest,
        "docker.io/library/b:latest": two.digest,
    }
    assert len(entries) == 3
    assert (target / "blobs" / "sha256" / one.blobs[1].digest).exists()
