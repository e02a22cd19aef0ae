"""A context that stays in the guest: only what changed travels, and what arrives is what is here."""

from __future__ import annotations

import io
import os
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.unit.guest.drives import DriveSession, make_channel
from tests.unit.listener import Listener
from vmbuild.errors import GuestError, UsageError
from vmbuild.guest import listing, sync, transfer
from vmbuild.guest.channel import Channel
from vmbuild.guest.context import Context, open_context
from vmbuild.guest.transfer import TAR
from vmbuild.image.catalog import find_catalog
from vmbuild.lock import attempt
from vmbuild.model import MIB

PROGRAM = find_catalog() / "guest" / "root" / sync.PROGRAM[1:]
BIG = bytes(3 * MIB)

pytestmark = pytest.mark.skipif(
    not all((Path(TAR).exists(), shutil.which("zstd"), shutil.which("perl"))),
    reason="GNU tar, zstd and perl, which the guest has, are not here",
)


class Guest(DriveSession):
    """Runs the guest's side here, in a folder of its own."""

    def __init__(self, drives: Path, root: Path) -> None:
        super().__init__(drives)
        self.root = root

    def run(self, argv: Sequence[str], **options: Any) -> int:
        words = {sync.PROGRAM: str(PROGRAM), sync.ROOT: str(self.root)}
        return super().run([words.get(word, word) for word in argv], **options)


class World:
    """A context on the host, the guest that keeps a copy of it, and what is known here of that."""

    def __init__(self, folder: Path, channel: Channel) -> None:
        self.source = folder / "source"
        self.source.mkdir()
        (self.source / "Dockerfile").write_text("FROM scratch\n")
        self.listings = folder / "listings"
        self.channel = channel
        self.guest = Guest(channel.inbox.parent, folder / "contexts")
        self.builds = folder / "work"
        self.builds.mkdir()

    def build(self, name: str = "first") -> int | None:
        """Send the context for a build that begins and ends; return what travelled, None where there is no copy."""
        with sync.claimed(self.guest, self.context(), self.work(name), self.listings) as copy:
            return None if copy is None else self.update(copy)

    def context(self) -> Context:
        return open_context(self.source, None, io.BytesIO())

    def update(self, copy: sync.Copy) -> int:
        return sync.update(self.guest, self.context(), copy, self.channel, Listener())

    def work(self, name: str) -> str:
        (self.builds / name).mkdir(exist_ok=True)
        return str(self.builds / name)

    def copies(self) -> list[Path]:
        return sorted(path for path in self.guest.root.iterdir() if path.is_dir() and not path.is_symlink())

    def there(self) -> dict[str, tuple[object, ...]]:
        (copy,) = self.copies()
        return look_through(copy)

    def here(self) -> dict[str, tuple[object, ...]]:
        return look_through(self.source)


def look_through(folder: Path) -> dict[str, tuple[object, ...]]:
    """Return what a tree holds: kind and mode, time in nanoseconds, and content or target."""
    found = dict[str, tuple[object, ...]]()
    for path in folder.rglob("*"):
        facts = path.lstat()
        content = str(path.readlink()).encode() if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        time_ns = 0 if path.is_symlink() else facts.st_mtime_ns
        found[str(path.relative_to(folder))] = (stat.filemode(facts.st_mode), time_ns, content)
    return found


@pytest.fixture(params=[0, 64 * MIB], ids=["ssh", "drives"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    yield World(tmp_path, make_channel(tmp_path / "drives", request.param))


def put(world: World, name: str, content: bytes = b"x", *, age_s: float = 60) -> Path:
    path = world.source / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    when = time.time() - age_s
    os.utime(path, (when, when))
    return path


def settle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take every time for long past, as it is when a minute lies between two builds."""
    monkeypatch.setattr(listing, "RACY_NS", -(10**12))


def test_a_second_build_sends_what_changed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(monkeypatch)
    put(world, "big", BIG)
    put(world, "sub/deep/small")
    first = world.build()
    assert first is not None and first > len(BIG)
    assert world.there() == world.here()
    read: list[str] = []
    real = Path.open

    def noting(self: Path, *args: Any, **options: Any) -> Any:
        read.append(self.name)
        return real(self, *args, **options)

    monkeypatch.setattr(Path, "open", noting)
    put(world, "sub/deep/small", b"y")
    second = world.build()
    assert second is not None and second < 30_000
    assert "big" not in read, "what looks the same is not even read"
    assert world.there() == world.here()


def test_nothing_changed_and_nothing_travels(world: World) -> None:
    put(world, "big", BIG)
    world.build()
    sent = world.build()
    assert sent is not None and sent < 30_000
    assert world.there() == world.here()


def test_what_was_touched_is_told_and_does_not_travel(world: World) -> None:
    """A fresh clone has other times; so has a file that was written again with what it had."""
    path = put(world, "big", BIG)
    put(world, "with space\nand line")
    world.build()
    os.utime(path, ns=(1_500_000_000_123_456_789, 1_500_000_000_123_456_789))
    path.chmod(0o750)
    os.utime(world.source / "with space\nand line", (-5, -5))
    sent = world.build()
    assert sent is not None and sent < 30_000
    assert world.there() == world.here()


def test_what_is_gone_goes(world: World) -> None:
    put(world, "folder/a")
    put(world, "folder/b")
    put(world, "whole/tree/of/files")
    world.build()
    (world.source / "folder/a").unlink()
    shutil.rmtree(world.source / "whole")
    world.build()
    assert world.there() == world.here()


def test_what_became_something_else(world: World) -> None:
    put(world, "folder/a")
    put(world, "file")
    (world.source / "link").symlink_to("file")
    world.build()
    shutil.rmtree(world.source / "folder")
    (world.source / "folder").symlink_to("/etc")
    (world.source / "file").unlink()
    put(world, "file/inside")
    (world.source / "link").unlink()
    put(world, "link", b"a file now")
    world.build()
    assert world.there() == world.here()
    (world.source / "folder").unlink()
    put(world, "folder/passwd", b"mine")
    world.build()
    assert world.there() == world.here()
    assert Path("/etc/passwd").read_bytes() != b"mine"


def test_hard_links_have_the_right_content(world: World) -> None:
    put(world, "one", b"same")
    (world.source / "two").hardlink_to(world.source / "one")
    world.build()
    (world.source / "two").unlink()
    put(world, "two", b"else")
    world.build()
    (world.source / "one").write_bytes(b"new!")
    world.build()
    assert world.there() == world.here()


def test_a_file_that_changes_within_one_tick_of_the_clock_is_seen(world: World) -> None:
    path = put(world, "quick", b"old")
    facts = path.stat()
    world.build()
    path.write_bytes(b"new")
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    world.build()
    assert world.there() == world.here()


def test_a_copy_that_was_not_finished_is_sent_anew(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    put(world, "big", BIG)
    put(world, "gone")
    world.build()
    (world.source / "gone").unlink()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(transfer, "unpack_context", interrupt)
        with pytest.raises(KeyboardInterrupt):
            world.build()
    sent = world.build()
    assert sent is not None and sent > len(BIG)
    assert world.there() == world.here()


def test_a_guest_that_lost_it_gets_all_of_it(world: World) -> None:
    put(world, "big", BIG)
    world.build()
    shutil.rmtree(world.guest.root)
    sent = world.build()
    assert sent is not None and sent > len(BIG)
    assert world.there() == world.here()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"stamp": 1}', '{"stamp": "S", "entries": {"a": [1]}}'])
def test_a_listing_that_is_none_is_as_good_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "l").write_text(text)
    assert listing.load_listing(tmp_path / "l", "S") == {}


def test_a_copy_that_a_build_reads_is_left_alone(world: World) -> None:
    put(world, "a")
    world.build("first")
    Path(world.work("first"), "keeper").write_text(f"{os.getpid()}\n")
    before = world.there()
    put(world, "a", b"newer")
    assert world.build("second") is None
    assert world.there() == before
    Path(world.work("first"), "exit").write_text("0\n")
    assert world.build("second") is not None
    assert world.there() == world.here()


def test_a_copy_that_another_command_prepares_is_left_alone(world: World) -> None:
    put(world, "a")
    with sync.claimed(world.guest, world.context(), world.work("first"), world.listings) as copy:
        assert copy is not None
        assert world.build("second") is None
    # Its command was ended before a build began, or the build has ended and is gone.
    assert world.build("second") is not None


def test_the_oldest_that_nobody_uses_goes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync, "MOST", 2)
    first = world.source
    for number, name in enumerate(("one", "two", "three")):
        world.source = first.parent / name
        shutil.copytree(first, world.source)
        world.build(name)
        if name == "one":
            Path(world.work(name), "keeper").write_text(f"{os.getpid()}\n")
        assert len(world.copies()) == min(number + 1, 2)
        time.sleep(0.02)
    sync.clear(world.guest)
    assert len(world.copies()) == 1, "a build reads it"


def test_a_build_that_takes_several_loses_none_of_its_own(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync, "MOST", 2)
    old, other, new = (world.source.parent / name for name in ("old", "other", "new"))
    for folder in (old, other, new):
        shutil.copytree(world.source, folder)
    for world.source in (old, other):
        world.build()
        time.sleep(0.02)
    with ExitStack() as until_begun:
        taken = []
        for world.source in (old, new):
            claim = sync.claimed(world.guest, world.context(), world.work("both"), world.listings)
            copy = until_begun.enter_context(claim)
            assert copy is not None
            taken.append(world.guest.root / copy.key)
        assert world.copies() == sorted(taken)


def test_a_file_that_cannot_be_read_is_named(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(world, "secret")
    world.build()
    os.utime(path, (5, 5))
    real = Path.open

    def refuse(self: Path, *args: Any, **options: Any) -> Any:
        if self == path:
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *args, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UsageError, match=r"secret.*Permission denied") as caught:
        world.build()
    assert ".dockerignore" in caught.value.resolution


def test_what_the_guest_cannot_change_is_an_error(world: World) -> None:
    put(world, "a")
    world.build()
    (world.source / "a").chmod(0o700)
    with sync.claimed(world.guest, world.context(), world.work("first"), world.listings) as copy:
        assert copy is not None
        (world.copies()[0] / "a").unlink()
        with pytest.raises(GuestError, match="could not be changed") as caught:
            world.update(copy)
    assert "No such file" in caught.value.details


def test_nobody_else_waits_for_the_lock_when_it_is_over(world: World) -> None:
    world.build()
    (lock,) = world.listings.glob("*.lock")
    with attempt(lock) as is_free:
        assert is_free
