"""What a guest sends as a tar stream, and what of it becomes files on the host."""

from __future__ import annotations

import io
import os
import stat
import tarfile
from pathlib import Path

import pytest

from vmbuild.errors import GuestError, HostError
from vmbuild.guest.extract import Left, extract, place, stays_inside


def member(name: str, kind: bytes = tarfile.REGTYPE, *, link: str = "", mode: int = 0o644) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode, info.mtime = kind, link, mode, 1_000_000_000
    return info


def tar_of(*members: tuple[tarfile.TarInfo, bytes]) -> io.BytesIO:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for info, data in members:
            info.size = len(data) if info.type == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(data))
    out.seek(0)
    return out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "inside" / "made"
    made.mkdir(parents=True)
    return made


def unpack(folder: Path, *members: tarfile.TarInfo) -> Left:
    return extract(tar_of(*((each, b"data") for each in members)), folder)


def outside(folder: Path) -> list[str]:
    """Return all that is beside the folder."""
    return [str(path) for path in folder.parent.parent.rglob("*") if not path.is_relative_to(folder.parent)]


def test_files_folders_and_links_come_as_they_are(folder: Path) -> None:
    left = unpack(
        folder,
        member("./", tarfile.DIRTYPE, mode=0o755),
        member("./a/", tarfile.DIRTYPE, mode=0o700),
        member("./a/tool", mode=0o755),
        member("./a/link", tarfile.SYMTYPE, link="tool"),
        member("./up", tarfile.SYMTYPE, link="a/tool"),
        member("./a/back", tarfile.SYMTYPE, link="../a/tool"),
        member("./hard", tarfile.LNKTYPE, link="./a/tool"),
    )
    assert left == Left()
    assert (folder / "a/tool").read_bytes() == b"data"
    assert (folder / "a/tool").stat().st_mtime == 1_000_000_000
    assert os.access(folder / "a/tool", os.X_OK)
    assert [str((folder / name).readlink()) for name in ("a/link", "up", "a/back")] == ["tool", "a/tool", "../a/tool"]
    assert (folder / "hard").samefile(folder / "a/tool")
    assert stat.S_IMODE((folder / "a").stat().st_mode) == 0o700


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "a/..", "x/" * 3000 + "y"])
def test_a_name_outside_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(GuestError, match="outside"):
        unpack(folder, member(name))
    assert outside(folder) == []


@pytest.mark.parametrize(
    "target",
    [
        *("/etc/passwd", "..", "../../x", "a/../../x", "a/..", "./../x", "self/..", "/"),
        *("b/../../../x", "../made/../x"),
    ],
)
def test_a_link_that_could_lead_outside_is_left_out(folder: Path, target: str) -> None:
    left = unpack(folder, member("self", tarfile.SYMTYPE, link="."), member("evil", tarfile.SYMTYPE, link=target))
    assert left.links == ["evil"]
    assert sorted(path.name for path in folder.iterdir()) == ["self"]


def test_nothing_is_written_through_a_link(folder: Path) -> None:
    with pytest.raises(GuestError, match="twice"):
        unpack(folder, member("to", tarfile.SYMTYPE, link="sub"), member("to/file"), member("sub/file"))
    assert outside(folder) == []


def test_a_link_to_a_link_stays_inside_too() -> None:
    assert stays_inside("self/self/x", 0)
    assert not stays_inside("self/../x", 3)
    assert stays_inside("../../x", 2)
    assert not stays_inside("../../x", 1)


def test_a_hard_link_leads_to_nothing_that_was_not_sent(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    with pytest.raises(GuestError, match="outside"):
        unpack(folder, member("evil", tarfile.LNKTYPE, link=str(tmp_path / "secret")))
    assert unpack(folder, member("lost", tarfile.LNKTYPE, link="nowhere")).links == ["lost"]


def test_devices_and_pipes_are_left_out(folder: Path) -> None:
    kinds = {"null": tarfile.CHRTYPE, "disk": tarfile.BLKTYPE, "pipe": tarfile.FIFOTYPE}
    left = unpack(folder, *(member(name, kind) for name, kind in kinds.items()))
    assert left.special == list(kinds)
    assert list(folder.iterdir()) == []


def test_nobody_becomes_another_or_lets_others_write(folder: Path) -> None:
    unpack(folder, member("tool", mode=0o6777), member("d", tarfile.DIRTYPE, mode=0o1777))
    assert stat.S_IMODE((folder / "tool").stat().st_mode) == 0o755
    assert stat.S_IMODE((folder / "d").stat().st_mode) == 0o755


def test_a_folder_that_cannot_be_entered_is_filled_all_the_same(folder: Path) -> None:
    unpack(folder, member("d", tarfile.DIRTYPE, mode=0o000), member("d/file"))
    assert (folder / "d/file").read_bytes() == b"data"


@pytest.mark.parametrize("names", [("a", "a"), ("a", "a/b")])
def test_one_place_twice_is_refused(folder: Path, names: tuple[str, str]) -> None:
    with pytest.raises(GuestError, match="twice"):
        unpack(folder, *map(member, names))


def test_a_file_in_the_place_of_the_folder_itself_is_refused(folder: Path) -> None:
    with pytest.raises(GuestError, match="no name"):
        unpack(folder, member("./."))


def test_a_stream_that_ends_early_is_damaged(folder: Path) -> None:
    data = tar_of((member("a"), bytes(5000))).getvalue()[:2000]
    with pytest.raises(GuestError, match="damaged"):
        extract(io.BytesIO(data), folder)


def test_noise_is_damaged(folder: Path) -> None:
    with pytest.raises(GuestError, match="damaged"):
        extract(io.BytesIO(b"\x01" * 4096), folder)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_that_wants_all_the_memory_is_refused(folder: Path, kind: bytes) -> None:
    info = member("x", kind)
    info.size = 1 << 33
    endless = io.BytesIO(info.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 20))
    with pytest.raises(GuestError, match="damaged"):
        extract(endless, folder)


def test_a_sparse_file_cannot_fill_the_disk(folder: Path) -> None:
    headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(1 << 50)}
    info = member("huge")
    info.pax_headers = headers
    out = io.BytesIO()
    data = b"0\n".ljust(512, b"\0")
    info.size = len(data)
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(data))
    out.seek(0)
    assert extract(out, folder).special == ["huge"]


def test_placing_fills_folders_that_are_there_and_follows_no_link(tmp_path: Path) -> None:
    source, target, elsewhere = (tmp_path / name for name in ("source", "target", "elsewhere"))
    for path in (source / "sub", target / "sub", elsewhere, source / "new"):
        path.mkdir(parents=True)
    (source / "sub/file").write_text("new")
    (target / "sub/file").symlink_to(elsewhere / "file")
    (target / "kept").write_text("kept")
    place(source, target)
    assert (target / "sub/file").read_text() == "new" and not (target / "sub/file").is_symlink()
    assert (target / "kept").read_text() == "kept"
    assert (target / "new").is_dir()
    assert list(elsewhere.iterdir()) == []


def test_placing_refuses_a_link_in_a_folders_place(tmp_path: Path) -> None:
    for name in ("source/sub", "target", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "source/sub/file").write_text("new")
    (tmp_path / "target/sub").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HostError, match="no folder"):
        place(tmp_path / "source", tmp_path / "target")
    assert list((tmp_path / "elsewhere").iterdir()) == []
