"""Bulk bytes by way of two drives: the guest's own scripts, run here on files."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.unit.guest.drives import DriveSession, make_channel
from tests.unit.guest.fakes import FakeSession, Reply
from tests.unit.listener import Listener
from vmbuild.errors import GuestError
from vmbuild.guest import channel
from vmbuild.guest.channel import Channel, UnpackError, receive, send_in, unpack
from vmbuild.guest.session import Feed, send
from vmbuild.lock import attempt
from vmbuild.model import MIB
from vmbuild.report import Reporter, SilentReporter

pytestmark = pytest.mark.skipif(not Path("/usr/bin/tar").exists(), reason="GNU tar, which the guest has, is not here")

SILENT = SilentReporter()


def packed(**files: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.fixture
def drives(tmp_path: Path) -> Channel:
    return make_channel(tmp_path / "drives")


@pytest.fixture
def guest(tmp_path: Path) -> DriveSession:
    return DriveSession(tmp_path / "drives")


@pytest.fixture
def place(tmp_path: Path) -> str:
    (tmp_path / "place").mkdir()
    return str(tmp_path / "place")


def put(drives: Channel, guest: FakeSession, place: str, feed: Feed, report: Reporter = SILENT) -> int | None:
    take = partial(unpack, guest, folder=place, option="--no-same-owner", report=report)
    return send_in(drives, feed, take, report)


def test_a_tar_arrives_and_the_inbox_is_empty_again(drives: Channel, guest: DriveSession, place: str) -> None:
    large = os.urandom(9 * MIB + 5)
    report = Listener()
    tar = packed(large=large, small=b"x")
    assert put(drives, guest, place, send(tar), report) == len(tar)
    assert Path(place, "large").read_bytes() == large
    assert report.meters == [("context", None), ("unpack", len(tar))]
    assert report.advanced >= 2 * len(tar)
    assert (drives.inbox.stat().st_blocks, drives.inbox.stat().st_size) == (0, 64 * MIB)


def test_what_is_left_of_a_longer_one_does_no_harm(drives: Channel, guest: DriveSession, place: str) -> None:
    with drives.inbox.open("r+b") as box:
        box.write(packed(old=b"o" * 500_000) * 20)
    put(drives, guest, place, send(packed(new=b"n")))
    assert [path.name for path in Path(place).iterdir()] == ["new"]


def test_an_inbox_that_the_guest_sees_otherwise_is_not_used(tmp_path: Path, drives: Channel, place: str) -> None:
    stale = make_channel(tmp_path / "stale")
    stale.inbox.write_bytes(packed(old=b"o") + bytes(100_000))
    assert put(drives, DriveSession(tmp_path / "stale"), place, send(packed(new=b"n"))) is None
    assert list(Path(place).iterdir()) == []


def test_this_way_may_be_closed(tmp_path: Path, drives: Channel, guest: DriveSession, place: str) -> None:
    feed = send(packed(new=b"n" * MIB))
    assert put(make_channel(tmp_path / "none", 0), guest, place, feed) is None
    assert put(drives, DriveSession(tmp_path / "no-drive"), place, feed) is None
    assert put(make_channel(tmp_path / "small", MIB), DriveSession(tmp_path / "small"), place, feed) is None
    with attempt(drives.lock):
        assert put(drives, guest, place, feed) is None
    assert list(Path(place).iterdir()) == []
    assert put(drives, guest, place, feed) is not None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_host_without_room_leaves_it_to_the_other_way(tmp_path: Path, place: str) -> None:
    full = Channel(Path("/dev/full"), tmp_path / "outbox", tmp_path / "lock")
    assert put(full, DriveSession(tmp_path), place, send(packed(new=b"n"))) is None


def test_what_is_no_tar_is_an_error_with_its_words(drives: Channel, guest: DriveSession, place: str) -> None:
    with pytest.raises(UnpackError) as caught:
        put(drives, guest, place, send(b"no tar at all" * 5000))
    assert "tar" in caught.value.details
    assert drives.inbox.stat().st_blocks == 0


def test_a_feed_that_fails_passes_and_leaves_nothing(drives: Channel, guest: DriveSession, place: str) -> None:
    def fail(sink: Any) -> None:
        sink.write(b"x" * MIB)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        put(drives, guest, place, fail)
    assert guest.calls == []
    assert drives.inbox.stat().st_blocks == 0


def files(folder: Path, *sizes: int) -> list[tuple[str, int]]:
    made = []
    for number, size in enumerate(sizes):
        path = folder / f"blob{number}"
        path.write_bytes(os.urandom(size))
        made.append((str(path), size))
    return made


def digests(paths: Sequence[tuple[str, int]]) -> list[str]:
    return [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path, _ in paths]


class Taker:
    """Hashes what it is given."""

    def __init__(self) -> None:
        self.digests: list[str] = []

    def __call__(self, number: int, content: Iterator[bytes]) -> None:
        assert number == len(self.digests)
        digest = hashlib.sha256()
        for data in content:
            digest.update(data)
        self.digests.append(digest.hexdigest())


def test_files_come_out_whole_and_in_order(tmp_path: Path, drives: Channel, guest: DriveSession) -> None:
    wanted, taker = files(tmp_path, 0, 1, MIB - 1, MIB, MIB + 1, 5 * MIB, 3 * MIB + 700), Taker()
    for _ in range(2):
        taker.digests.clear()
        assert receive(drives, guest, wanted, taker)
        assert taker.digests == digests(wanted)
        assert (drives.outbox.stat().st_blocks, drives.outbox.stat().st_size) == (0, 64 * MIB)


def test_the_way_out_may_be_closed(tmp_path: Path, drives: Channel, guest: DriveSession) -> None:
    wanted, taker = files(tmp_path, MIB), Taker()
    assert not receive(make_channel(tmp_path / "none", 0), guest, wanted, taker)
    assert not receive(make_channel(tmp_path / "small", MIB), guest, wanted, taker)
    assert not receive(drives, DriveSession(tmp_path / "no-drive"), wanted, taker)
    with attempt(drives.lock):
        assert not receive(drives, guest, wanted, taker)
    assert taker.digests == []


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path, drives: Channel, guest: DriveSession) -> None:
    wanted = [*files(tmp_path, 5), (str(tmp_path / "missing"), 5)]
    with pytest.raises(GuestError, match="missing"):
        receive(drives, guest, wanted, Taker())


@pytest.mark.parametrize("said", [b"0 6\n", b"1 5\n", b"nonsense\n", b"0 5\n1 5\n", b"0 -5\n"], ids=repr)
def test_a_guest_that_lies_of_sizes_is_not_believed(tmp_path: Path, drives: Channel, said: bytes) -> None:
    session = FakeSession((("sh",), Reply(stdout=said)))
    with pytest.raises(GuestError, match="the guest says"):
        receive(drives, session, [("/blob", 5)], Taker())


def test_a_guest_that_says_too_little_is_an_error(drives: Channel) -> None:
    with pytest.raises(GuestError, match="could not give out /blob"):
        receive(drives, FakeSession((("sh",), Reply())), [("/blob", 5)], Taker())


def test_the_exit_codes_are_those_of_the_scripts() -> None:
    assert f"|| exit {channel.NO_DRIVE}" in channel.OPEN
    assert f"|| exit {channel.NO_DRIVE}" in channel.WRITE
    assert f"|| exit {channel.STALE}" in channel.OPEN
