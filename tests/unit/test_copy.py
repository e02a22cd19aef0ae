"""Files into a guest and out of it: the guest's own scripts, run here, over drives and without."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zstandard

from tests.unit.guest.drives import DriveSession, make_channel, needs_tools
from tests.unit.guest.fakes import FakeSession, Reply
from tests.unit.listener import Listener
from vmbuild import copy
from vmbuild.copy import Place
from vmbuild.errors import GuestError, HostError, UsageError
from vmbuild.guest import copying
from vmbuild.guest.channel import Channel
from vmbuild.guest.extract import Stream
from vmbuild.guest.session import Session
from vmbuild.guest.transfer import DiskFullError
from vmbuild.model import MIB, Home
from vmbuild.report import SilentReporter

pytestmark = needs_tools
Cp = Callable[..., Listener]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("box:/etc/hosts", Place("box", "/etc/hosts")),
        (":file", Place("default", "file")),
        (":", Place("default", ".")),
        ("box:", Place("box", ".")),
        ("./a:b", Place(None, "./a:b")),
        ("/a:b", Place(None, "/a:b")),
        ("file", Place(None, "file")),
        ("-", Place(None, "-")),
        ("a/b:c", Place(None, "a/b:c")),
        ("box:a:b", Place("box", "a:b")),
        ("_x:y", Place(None, "_x:y")),
    ],
)
def test_a_place_is_of_a_machine_or_of_the_host(text: str, place: Place) -> None:
    assert Place.parse(text, "default") == place


@pytest.mark.parametrize(
    ("path", "name"), [("/a/b/", "b"), ("/", ""), (".", ""), ("a/.", ""), ("..", ""), ("a", "a"), ("/a/..", "")]
)
def test_the_name_of_a_place(path: str, name: str) -> None:
    assert Place(None, path).name == name


@pytest.fixture(params=["drives", "ssh", "busy drives"])
def cp(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cp:
    """Copy between this host and a guest that is this host too."""
    folder = tmp_path / "drives"
    channel = make_channel(folder, 0 if request.param == "ssh" else 256 * MIB)
    guest = DriveSession(folder)
    if request.param == "busy drives":
        busy = make_channel(tmp_path / "none", 0)
        channel = Channel(channel.inbox, channel.outbox, busy.lock)
        channel.inbox.unlink()
        channel.outbox.unlink()
    return make_cp(guest, channel, monkeypatch)


def make_cp(guest: Session, channel: Channel, monkeypatch: pytest.MonkeyPatch) -> Cp:
    @contextmanager
    def running_session(name: str, home: Home) -> Iterator[Session]:
        assert name == "box"
        yield guest

    monkeypatch.setattr(copy, "running_session", running_session)
    monkeypatch.setattr(copy, "existing", lambda *_: None)
    monkeypatch.setattr(copy, "channel_of", lambda *_: channel)

    def cp(source: str | Path, target: str | Path, stdin: bytes = b"", stdout: io.BytesIO | None = None) -> Listener:
        report = Listener()
        begin, end = (Place.parse(str(each), "box") for each in (source, target))
        home = Home(Path("/"), Path("/"))
        copy.copy(begin, end, home, report, stdin=io.BytesIO(stdin), stdout=stdout or io.BytesIO())
        return report

    return cp


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder as people have it."""
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub" / "tool").write_text("tool")
    (tree / "sub" / "tool").chmod(0o755)
    (tree / "large").write_bytes(os.urandom(3 * MIB + 7))
    (tree / "a name, with: signs'\n").write_text("x")
    (tree / "link").symlink_to("sub/tool")
    return tree


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def same(one: Path, other: Path) -> bool:
    return names(one) == names(other) and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names(one) if (one / name).is_file()
    )


@pytest.mark.parametrize("way", ["in", "out"])
def test_a_file_gets_its_own_name_or_another(cp: Cp, way: str, tree: Path, tmp_path: Path) -> None:
    target = tmp_path / "there"
    target.mkdir()
    begin, end = ("", ":") if way == "in" else (":", "")
    cp(f"{begin}{tree}/large", f"{end}{target}")
    cp(f"{begin}{tree}/large", f"{end}{target}/other")
    cp(f"{begin}{tree}/sub/tool", f"{end}{target}/other")
    assert (target / "large").read_bytes() == (tree / "large").read_bytes()
    assert (target / "other").read_text() == "tool"
    assert names(target) == ["large", "other"]
    assert os.access(target / "other", os.X_OK)


@pytest.mark.parametrize("way", ["in", "out"])
def test_a_folder_is_made_or_goes_into_one_or_fills_one(cp: Cp, way: str, tree: Path, tmp_path: Path) -> None:
    begin, end = ("", ":") if way == "in" else (":", "")
    cp(f"{begin}{tree}", f"{end}{tmp_path}/new")
    assert same(tree, tmp_path / "new")
    cp(f"{begin}{tree}", f"{end}{tmp_path}/new")
    assert same(tree, tmp_path / "new" / "tree")
    (tmp_path / "filled").mkdir()
    (tmp_path / "filled" / "mine").write_text("mine")
    cp(f"{begin}{tree}/.", f"{end}{tmp_path}/filled")
    assert set(names(tmp_path / "filled")) == {"mine", *names(tree)}
    assert str((tmp_path / "filled" / "link").readlink()) == "sub/tool"


@pytest.mark.parametrize("way", ["in", "out"])
def test_what_is_named_is_followed_when_it_is_a_link(cp: Cp, way: str, tree: Path, tmp_path: Path) -> None:
    begin, end = ("", ":") if way == "in" else (":", "")
    cp(f"{begin}{tree}/link", f"{end}{tmp_path}/copied")
    assert (tmp_path / "copied").read_text() == "tool" and not (tmp_path / "copied").is_symlink()


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("{tree}/nothing", ":{tmp}"),
        (":{tree}/nothing", "{tmp}"),
        ("{tree}", ":{tree}/large"),
        (":{tree}", "{tree}/large"),
        ("{tree}/large", ":{tmp}/nothing/x"),
        (":{tree}/large", "{tmp}/nothing/x"),
        ("{tree}/large", ":{tmp}/nothing/"),
        (":{tree}/large", "{tmp}/nothing/"),
        ("{tree}", "{tmp}/x"),
        (":{tree}", ":{tmp}/x"),
        ("-", ":{tree}/large"),
        (":{tree}/large", "/dev/null"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(
    source: str, target: str, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cp = make_cp(DriveSession(tmp_path / "d"), make_channel(tmp_path / "d", 0), monkeypatch)
    before = names(tmp_path)
    with pytest.raises(UsageError):
        cp(*(text.format(tree=tree, tmp=tmp_path) for text in (source, target)))
    assert names(tmp_path) == before


def test_a_name_that_looks_like_an_option_is_none(cp: Cp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("-rf").write_text("kept")
    cp(":-rf", "./out")
    cp("./out", ":-n")
    assert Path("-n").read_text() == Path("out").read_text() == "kept"


def test_a_tar_stream_goes_in_and_comes_out(cp: Cp, tree: Path, tmp_path: Path) -> None:
    stdout = io.BytesIO()
    cp(f":{tree}/sub", "-", stdout=stdout)
    (tmp_path / "there").mkdir()
    cp("-", f":{tmp_path}/there", stdin=stdout.getvalue())
    assert same(tree / "sub", tmp_path / "there")


def test_what_leads_outside_is_left_out_and_said(cp: Cp, tmp_path: Path) -> None:
    (tmp_path / "guest").mkdir()
    for name in ("one", "two"):
        (tmp_path / "guest" / name).symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "guest" / "pipe")
    report = cp(f":{tmp_path}/guest", tmp_path / "host")
    assert list((tmp_path / "host").iterdir()) == []
    assert any("1 more" in text for text in report.warnings) and any("pipe" in text for text in report.warnings)


def test_the_drives_are_empty_again(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    channel = make_channel(tmp_path / "d", 256 * MIB)
    cp = make_cp(DriveSession(tmp_path / "d"), channel, monkeypatch)
    report = cp(f":{tree}", tmp_path / "out")
    assert channel.outbox.stat().st_blocks == 0
    assert report.advanced >= 3 * MIB
    cp(tree, f":{tmp_path}/in")
    assert channel.inbox.stat().st_blocks == 0


def test_a_full_guest_is_said_as_that(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = FakeSession(
        (("sh", "-c", copying.LOOK), Reply(stdout=b"folder\n")),
        (("sh",), Reply(2, stderr=b"tar: x: Cannot write: No space left on device")),
    )
    cp = make_cp(guest, make_channel(tmp_path / "d", 0), monkeypatch)
    with pytest.raises(DiskFullError):
        cp(tree / "large", ":/there")
    guest.table = (guest.table[0], (("sh",), Reply(2, stderr=b"tar: x: Cannot open: Read-only file system")))
    with pytest.raises(GuestError, match="unpack what was copied"):
        cp(tree / "large", ":/there")


TOTAL = b"Total bytes written: %d (2.0KiB, 1.0MiB/s)\n"
NO_TAR = b"no tar at all".ljust(2000, b"!")


@pytest.mark.parametrize(
    "reply",
    [
        Reply(0, stdout=b"no zstd at all", stderr=TOTAL % 2000),
        Reply(0, stdout=zstandard.compress(NO_TAR), stderr=TOTAL % 2000),
        Reply(0, stdout=zstandard.compress(NO_TAR)),
        Reply(0, stderr=b"tar: Exiting with failure status due to previous errors"),
        Reply(127, stderr=b"tar: not found"),
    ],
    ids=["noise", "no tar", "no total", "tar failed", "no tar program"],
)
def test_a_guest_that_sends_nonsense_leaves_nothing(
    reply: Reply, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = FakeSession((("sh", "-c", copying.LOOK), Reply(stdout=b"folder\n")), (("sh",), reply))
    cp = make_cp(guest, make_channel(tmp_path / "d", 0), monkeypatch)
    with pytest.raises(GuestError):
        cp(":/x", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".vmbuild~*"))


def read_all(stream: Stream) -> bytes:
    return b"".join(iter(lambda: stream.read(1000), b""))


def test_a_tree_has_the_same_bytes_whichever_way(tree: Path, tmp_path: Path) -> None:
    found = []
    for size in (0, 256 * MIB):
        channel = make_channel(tmp_path / str(size), size)
        with copying.packed(DriveSession(tmp_path / str(size)), channel, str(tree), SilentReporter()) as stream:
            found.append(read_all(stream))
    assert found[0] == found[1]
    with tarfile.open(fileobj=io.BytesIO(found[0])) as tar:
        names = tar.getnames()
    assert names == sorted(names) and {".", "./large"} <= set(names)


@pytest.mark.parametrize("less", [-5, 5])
def test_what_is_not_as_long_as_the_guest_says_is_damaged(tmp_path: Path, less: int) -> None:
    """tar was killed, and the program behind it ended well."""
    guest = FakeSession((("sh",), Reply(0, zstandard.compress(NO_TAR), TOTAL % (2000 - less))))
    with (
        pytest.raises(GuestError, match="not as long"),
        copying.packed(guest, make_channel(tmp_path / "d", 0), "/x", SilentReporter()) as stream,
    ):
        read_all(stream)


def test_a_drive_that_is_shorter_than_the_guest_says_is_damaged(tmp_path: Path) -> None:
    guest = FakeSession((("sh",), Reply(0, stderr=TOTAL % (2 * MIB))))
    with (
        pytest.raises(GuestError, match="not as long"),
        copying.packed(guest, make_channel(tmp_path / "d", MIB), "/x", SilentReporter()) as stream,
    ):
        read_all(stream)


@pytest.mark.parametrize("size", [0, MIB], ids=["ssh", "drives"])
def test_a_guest_that_does_not_say_how_much_it_packed(tmp_path: Path, size: int) -> None:
    guest = FakeSession((("sh",), Reply(0)))
    with (
        pytest.raises(GuestError, match="how large"),
        copying.packed(guest, make_channel(tmp_path / "d", size), "/x", SilentReporter()),
    ):
        pass


def test_a_folder_where_nobody_may_write_is_the_hosts_fault(
    cp: Cp, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(HostError, match="cannot write in"):
        cp(f":{tree}", tmp_path / "out")
