"""What is put into the guest, both ways that it can go."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import IO, Any, cast

import pytest

from tests.unit.guest.drives import DriveSession, make_channel, needs_tools
from tests.unit.guest.fakes import FakeSession, HostSession, Reply
from tests.unit.listener import Listener
from vmbuild.errors import GuestError
from vmbuild.guest.channel import Channel
from vmbuild.guest.context import open_context
from vmbuild.guest.docker import Workspace
from vmbuild.guest.session import CHUNK_BYTES, send
from vmbuild.guest.transfer import unpack_context, unpack_stdin, unpack_tree, write_file, write_large_file, write_stdin
from vmbuild.model import MIB
from vmbuild.report import SilentReporter

WORK = Workspace("/w")


@pytest.fixture(params=[0, 64 * MIB], ids=["ssh", "drives"])
def way(request: pytest.FixtureRequest, tmp_path: Path) -> Channel:
    """Both ways that a context can go."""
    return make_channel(tmp_path / "drives", request.param)


def unpack_for_real(folder: Path, source: Path, way: Channel) -> tuple[Path, int, int]:
    """Send a folder the way a build does, through this host's shell, zstd and tar; return where it arrived."""
    work = Workspace(str(folder))
    Path(work.context).mkdir(parents=True)
    report = Listener()
    session = DriveSession(way.inbox.parent)
    sent = unpack_context(session, work.context, open_context(source, None, io.BytesIO()).write_tar, way, report)
    return Path(work.context), sent, report.advanced


@pytest.fixture
def source(tmp_path: Path) -> Path:
    found = tmp_path / "source"
    found.mkdir()
    (found / "Dockerfile").write_text("FROM scratch\n")
    return found


@needs_tools
def test_a_context_arrives_as_it_was(tmp_path: Path, source: Path, way: Channel) -> None:
    (source / "sub").mkdir()
    (source / "sub" / ("n" * 200)).write_bytes(b"deep")
    (source / "run").write_bytes(b"#!")
    (source / "run").chmod(0o751)
    (source / "dangling").symlink_to("nowhere")
    (source / "grüße").write_bytes(b"utf8")
    (source / "hard").hardlink_to(source / "run")
    there, sent, told = unpack_for_real(tmp_path / "work", source, way)
    assert (there / "sub" / ("n" * 200)).read_bytes() == b"deep"
    assert (there / "run").stat().st_mode & 0o777 == 0o751
    assert (there / "dangling").readlink() == Path("nowhere")
    assert (there / "grüße").read_bytes() == b"utf8"
    assert (there / "hard").read_bytes() == b"#!"
    assert told >= sent > 1024


@needs_tools
def test_a_name_that_is_no_utf8_arrives(tmp_path: Path, source: Path, way: Channel) -> None:
    (source / os.fsdecode(b"caf\xe9")).write_bytes(b"x")
    there, _, _ = unpack_for_real(tmp_path / "work", source, way)
    assert b"caf\xe9" in {os.fsencode(path.name) for path in there.iterdir()}


@needs_tools
@pytest.mark.parametrize("when", [4_000_000_000, -1000], ids=["future", "before 1970"])
def test_a_strange_time_is_no_failure(tmp_path: Path, source: Path, way: Channel, when: int) -> None:
    """A guest's clock is often behind the host's; tar then warns of every file that was just written."""
    os.utime(source / "Dockerfile", (when, when))
    there, _, _ = unpack_for_real(tmp_path / "work", source, way)
    assert (there / "Dockerfile").read_text() == "FROM scratch\n"


@needs_tools
def test_a_stream_that_is_no_tar_is_an_error(tmp_path: Path, way: Channel) -> None:
    work = Workspace(str(tmp_path))
    Path(work.context).mkdir()
    with pytest.raises(GuestError):
        unpack_context(
            DriveSession(way.inbox.parent), work.context, send(b"no tar at all" * 500), way, SilentReporter()
        )


def test_a_full_disk_while_unpacking_is_told_with_a_way_out(way: Channel) -> None:
    session = FakeSession((("sh",), Reply(2, stderr=b"tar: a: Cannot write: No space left on device\n")))
    for unpack in (
        lambda: unpack_context(session, WORK.context, send(b"x"), way, SilentReporter()),
        lambda: unpack_tree(session, WORK.context, send(b"x"), way),
        lambda: write_file(session, "/w/f", send(b"x")),
    ):
        with pytest.raises(GuestError, match="disk is full") as caught:
            unpack()
        assert "--disk" in caught.value.resolution


SIZES = [0, 1, 500, 5000, MIB, 3 * MIB + 7]


@pytest.fixture(params=["ssh", "drives", "stale", "no drive", "small", "full"])
def any_way(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[DriveSession, Channel]:
    """A guest, and a channel to it that is open, closed, or turns out to be closed when something was read already."""
    folder = tmp_path / "drives"
    sizes = {"ssh": 0, "small": 2 * MIB}
    made = make_channel(folder, sizes.get(request.param, 64 * MIB))
    if request.param == "stale":
        make_channel(tmp_path / "stale")
        return DriveSession(tmp_path / "stale"), made
    if request.param == "no drive":
        return DriveSession(tmp_path / "none"), made
    if request.param == "full":
        if not Path("/dev/full").exists():
            pytest.skip("needs a device that is always full")
        made = Channel(Path("/dev/full"), made.outbox, made.lock)
    return DriveSession(folder), made


class Pipe(io.RawIOBase):
    """Standard input: it gives less than is asked for, and nothing twice."""

    def __init__(self, data: bytes) -> None:
        self._rest = memoryview(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), 60_000, len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size


@needs_tools
@pytest.mark.parametrize("size", SIZES)
def test_standard_input_arrives_whole_whichever_way(
    any_way: tuple[DriveSession, Channel], size: int, tmp_path: Path
) -> None:
    session, channel = any_way
    data, report, path = os.urandom(size), Listener(), tmp_path / "a 'file"
    path.write_bytes(b"what was there before" * 1000)
    assert write_stdin(session, str(path), cast(IO[bytes], Pipe(data)), channel, report) == size
    assert path.read_bytes() == data
    assert report.advanced >= size


@needs_tools
def test_a_tar_on_standard_input_arrives_whole_whichever_way(
    any_way: tuple[DriveSession, Channel], tmp_path: Path
) -> None:
    session, channel = any_way
    data, out = os.urandom(3 * MIB + 7), io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        info = tarfile.TarInfo("file")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    (tmp_path / "there").mkdir()
    tar_bytes = out.getvalue()
    sent = unpack_stdin(session, str(tmp_path / "there"), cast(IO[bytes], Pipe(tar_bytes)), channel, Listener())
    assert sent == len(tar_bytes)
    assert (tmp_path / "there" / "file").read_bytes() == data


def test_large_standard_input_takes_the_drive_and_small_does_not(tmp_path: Path) -> None:
    session, channel = DriveSession(tmp_path / "drives"), make_channel(tmp_path / "drives")
    for size, words in ((CHUNK_BYTES - 1, "write"), (CHUNK_BYTES, "take")):
        write_stdin(session, str(tmp_path / "file"), io.BytesIO(bytes(size)), channel, SilentReporter())
        assert session.calls[-1].argv[3] == words
        assert (session.calls[-1].stdin == b"") is (words == "take")
    assert channel.inbox.stat().st_blocks == 0


@needs_tools
@pytest.mark.parametrize("size", SIZES)
def test_a_large_file_arrives_whole_whichever_way(
    any_way: tuple[DriveSession, Channel], size: int, tmp_path: Path
) -> None:
    session, channel = any_way
    data, path = os.urandom(size), tmp_path / "a 'file"
    write_large_file(session, str(path), send(data), channel)
    assert path.read_bytes() == data


def test_a_large_file_takes_the_drive(tmp_path: Path) -> None:
    session, channel = DriveSession(tmp_path / "drives"), make_channel(tmp_path / "drives")
    write_large_file(session, str(tmp_path / "file"), send(b"data"), channel)
    assert [call.argv[3] for call in session.calls] == ["take"]
    assert channel.inbox.stat().st_blocks == 0


def test_a_large_file_for_which_the_guest_has_no_room(tmp_path: Path) -> None:
    session = FakeSession((("sh",), Reply(1, stderr=b"dd: error writing '/w/f': No space left on device\n")))
    with pytest.raises(GuestError, match="disk is full"):
        write_large_file(session, "/w/f", send(b"x"), make_channel(tmp_path / "drives"))
    assert len(session.calls) == 1


def test_standard_input_for_which_the_guest_has_no_room(tmp_path: Path) -> None:
    channel, stdin = make_channel(tmp_path / "drives"), io.BytesIO(bytes(MIB))
    session = FakeSession((("sh",), Reply(1, stderr=b"dd: error writing '/w/stdin': No space left on device\n")))
    with pytest.raises(GuestError, match="disk is full"):
        write_stdin(session, "/w/stdin", stdin, channel, SilentReporter())
    assert len(session.calls) == 1


def test_a_file_is_written_under_any_name(tmp_path: Path) -> None:
    for name in ("plain", "a b", "$(false)'\"", "-n"):
        write_file(HostSession(), str(tmp_path / name), send(b"\0data"))
        assert (tmp_path / name).read_bytes() == b"\0data"
