"""Loading into an engine of the host, and into a board over ssh: fake programs on PATH, which do as the real ones."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest

from tests.unit.guest.fakes import CountingMeter
from vmbuild import board, load
from vmbuild.board import PIECE_BYTES, Parcel
from vmbuild.errors import DeliveryError, UsageError

ENGINE = """#!/bin/sh
echo "$*" >>{folder}/{name}.log
case "$*" in
*DriverStatus*) echo "[[{store} x]]" ;;
load*|*import*) cat >{folder}/{name}.got || exit; [ ! -e {folder}/refuse ] || {{ echo "no space left" >&2; exit 1; }} ;;
version*|info*) [ ! -e {folder}/{name}.down ] || {{ echo "cannot connect" >&2; exit 1; }}; echo 26.1 ;;
esac
"""

SSH = """#!/bin/sh
echo "$*" >>{folder}/ssh.log
while [ "$1" != -- ]; do shift; done
shift 2
export HOME={folder}/home
read -r most <{folder}/breaks 2>/dev/null && sed -i 1d {folder}/breaks
case "$most" in
"") exec sh -c "$1" ;;
*) head -c "$most" | sh -c "$1"; echo "client_loop: send disconnect: Broken pipe" >&2; exit 255 ;;
esac
"""


class Programs:
    """Fake programs in a folder that is the whole of PATH before the host's own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "home").mkdir()

    def add(self, name: str, text: str, **values: str) -> None:
        path = self.folder / name
        path.write_text(text.format(folder=self.folder, name=name, **values))
        path.chmod(0o755)

    def engine(self, name: str, store: str = "overlay2") -> None:
        self.add(name, ENGINE, store=store)

    def log(self, name: str) -> list[str]:
        return (self.folder / f"{name}.log").read_text().splitlines()

    def got(self, name: str) -> bytes:
        return (self.folder / f"{name}.got").read_bytes()

    def break_after(self, *sizes: int | str) -> None:
        """Break the next connections after so many bytes of what is sent; an empty text breaks none."""
        (self.folder / "breaks").write_text("".join(f"{size}\n" for size in sizes))


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    made = Programs(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(board, "BACKOFF_S", 0.001)
    for name in load.ROWS:  # whatever this host has
        made.engine(name)
        (tmp_path / f"{name}.down").touch()
    return made


def up(programs: Programs, *names: str) -> None:
    for name in names:
        (programs.folder / f"{name}.down").unlink()


def test_whichever_answers_first_is_taken(programs: Programs) -> None:
    up(programs, "podman", "ctr")
    assert load.choose("auto", 1).program == "podman"
    assert load.choose("ctr", 1).program == "ctr"
    up(programs, "docker")
    assert load.choose("auto", 1).program == "docker"


def test_nothing_answers(programs: Programs) -> None:
    with pytest.raises(DeliveryError, match="nothing answers on this host") as caught:
        load.choose("auto", 1)
    assert caught.value.details.count("cannot connect") == len(load.ROWS)
    up(programs, "podman")
    with pytest.raises(DeliveryError, match=r"\(docker\)"):
        load.choose("docker", 1)
    (programs.folder / "docker").unlink()
    with pytest.raises(DeliveryError) as caught:
        load.choose("docker", 1)
    assert "docker" in caught.value.details


@pytest.mark.parametrize(
    ("name", "store", "takes"),
    [
        ("docker", "overlay2", False),
        ("docker", "io.containerd.snapshotter.v1", True),
        ("podman", "", False),
        ("nerdctl", "", True),
        ("ctr", "", True),
    ],
)
def test_several_platforms_need_an_engine_that_keeps_them(
    programs: Programs, name: str, store: str, takes: bool
) -> None:
    programs.engine(name, store)
    up(programs, name)
    assert load.choose(name, 1).program == name
    if takes:
        assert load.choose(name, 2).program == name
    else:
        with pytest.raises(UsageError, match="keeps one platform for each name"):
            load.choose(name, 2)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("docker", "load"),
        ("podman", "load"),
        ("nerdctl", "load --all-platforms"),
        ("ctr", "images import --all-platforms -"),
    ],
)
def test_an_archive_is_loaded(programs: Programs, name: str, words: str) -> None:
    up(programs, name)
    assert load.load(load.ROWS[name], lambda pipe: pipe.write(b"archive")) == 7
    assert programs.got(name) == b"archive"
    assert programs.log(name) == [words]


def test_an_engine_that_refuses_is_quoted(programs: Programs) -> None:
    (programs.folder / "refuse").touch()
    with pytest.raises(DeliveryError, match="docker did not load") as caught:
        load.load(load.ROWS["docker"], lambda pipe: pipe.write(b"archive"))
    assert "no space left" in caught.value.details


# A board.

ADDRESS = "ssh://pi@board:2222"


@pytest.fixture
def parcel(tmp_path: Path) -> Parcel:
    data = random.Random(2).randbytes(5 * PIECE_BYTES + 5)
    (tmp_path / "parcel").write_bytes(data)
    return Parcel(tmp_path / "parcel", hashlib.sha256(data).hexdigest(), len(data))


@pytest.fixture
def pi(programs: Programs) -> Programs:
    """A board with Docker, behind a fake ssh."""
    programs.add("ssh", SSH)
    programs.add("uname", "#!/bin/sh\necho aarch64\n")
    up(programs, "docker")
    return programs


def send(parcel: Parcel) -> int:
    meter = CountingMeter()
    board.load(ADDRESS, parcel, meter)
    return meter.total


def left(pi: Programs) -> list[str]:
    return [path.name for path in (pi.folder / "home").rglob("*") if path.is_file()]


def begins(pi: Programs, parcel: Parcel) -> list[str]:
    """Return from which piece on each sending was."""
    ends = [line.split()[-3:] for line in pi.log("ssh")]
    return [words[1] for words in ends if words[0] == parcel.digest and words[2] == str(parcel.size)]


def test_a_board_loads_what_is_sent(pi: Programs, parcel: Parcel) -> None:
    assert send(parcel) == parcel.size
    assert pi.got("docker") == parcel.path.read_bytes()
    assert left(pi) == []
    assert any(" -p 2222 -- pi@board " in line for line in pi.log("ssh"))


def test_a_transfer_goes_on_where_it_broke(pi: Programs, parcel: Parcel) -> None:
    pi.break_after("", 2 * PIECE_BYTES + 9, "", PIECE_BYTES + 1)
    assert send(parcel) == parcel.size
    assert pi.got("docker") == parcel.path.read_bytes()
    assert begins(pi, parcel) == ["0", "2", "3"]


def test_the_next_command_goes_on_too(pi: Programs, parcel: Parcel) -> None:
    pi.break_after("", 3 * PIECE_BYTES, *["0"] * 2 * board.TRIES)
    with pytest.raises(DeliveryError, match="did not take the container image") as caught:
        send(parcel)
    assert "Broken pipe" in caught.value.details
    assert left(pi) == [parcel.digest]
    (pi.folder / "breaks").unlink()
    (pi.folder / "ssh.log").unlink()
    assert send(parcel) == parcel.size
    assert pi.got("docker") == parcel.path.read_bytes()
    assert begins(pi, parcel) == ["3"]


def test_what_lies_there_damaged_is_sent_anew(pi: Programs, parcel: Parcel) -> None:
    folder = pi.folder / "home" / ".cache" / "vmbuild"
    folder.mkdir(parents=True)
    (folder / parcel.digest).write_bytes(b"\0" * 2 * PIECE_BYTES)
    assert send(parcel) == parcel.size
    assert pi.got("docker") == parcel.path.read_bytes()


def test_docker_on_the_board_refuses(pi: Programs, parcel: Parcel) -> None:
    (pi.folder / "refuse").touch()
    with pytest.raises(DeliveryError) as caught:
        send(parcel)
    assert "no space left" in caught.value.details
    assert "ssh -p 2222 pi@board docker version" in caught.value.resolution
    assert len([line for line in pi.log("docker") if line.startswith("load")]) == 1


@pytest.mark.parametrize(
    ("machine", "platforms", "best"),
    [
        ("aarch64", ["linux/arm/v7", "linux/arm64"], "linux/arm64"),
        ("aarch64", ["linux/arm/v6"], "linux/arm/v6"),
        ("armv7l", ["linux/arm64", "linux/arm/v6", "linux/arm/v7"], "linux/arm/v7"),
        ("armv6l", ["linux/arm/v7", "linux/arm/v6"], "linux/arm/v6"),
        ("armv6l", ["linux/arm/v7"], None),
        ("armv7l", ["linux/arm64"], None),
        ("x86_64", ["linux/arm64"], None),
        ("", ["linux/arm64"], None),
    ],
)
def test_a_board_gets_what_it_runs(machine: str, platforms: list[str], best: str | None) -> None:
    if best is not None:
        assert board.choose_platform(ADDRESS, machine, platforms) == best
    else:
        with pytest.raises(UsageError, match="does not run"):
            board.choose_platform(ADDRESS, machine, platforms)


def test_a_board_is_looked_at_before_the_build(pi: Programs) -> None:
    board.check(ADDRESS, ["linux/arm64"])
    (pi.folder / "docker.down").touch()
    with pytest.raises(DeliveryError) as caught:
        board.check(ADDRESS, ["linux/arm64"])
    assert "cannot connect" in caught.value.details
    up(pi, "docker")
    pi.add("uname", "#!/bin/sh\necho armv6l\n")
    with pytest.raises(UsageError, match="is armv6l, which does not run linux/arm64"):
        board.check(ADDRESS, ["linux/arm64"])


@pytest.mark.parametrize("words", ["Permission denied (publickey).", "Host key verification failed."])
def test_who_is_not_let_in_does_not_knock_again(programs: Programs, parcel: Parcel, words: str) -> None:
    programs.add("ssh", "#!/bin/sh\necho x >>{folder}/ssh.log\necho '{words}' >&2\nexit 255\n", words=words)
    with pytest.raises(DeliveryError) as caught:
        send(parcel)
    assert words in caught.value.details
    assert len(programs.log("ssh")) == 1
