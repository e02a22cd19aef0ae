"""Files appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from vmbuild.errors import GuestImageError, HostError
from vmbuild.whole import hash_file, open_whole, write_whole


def test_file_takes_its_name_only_when_the_block_has_ended(tmp_path: Path) -> None:
    with open_whole(tmp_path / "out") as file:
        file.write(b"all of it")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out").read_bytes() == b"all of it"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [GuestImageError("no"), KeyboardInterrupt(), SystemExit(1), ValueError()])
def test_exception_leaves_nothing_and_passes_unchanged(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, open_whole(tmp_path / "out") as file:
        file.write(b"half")
        raise error
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []


def test_exception_leaves_the_older_file_as_it_was(tmp_path: Path) -> None:
    write_whole(tmp_path / "out", b"old")
    with pytest.raises(KeyboardInterrupt), open_whole(tmp_path / "out") as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("out", b"old")]


def test_a_newer_file_replaces_the_older(tmp_path: Path) -> None:
    write_whole(tmp_path / "out", b"a longer old one")
    write_whole(tmp_path / "out", b"new")
    assert (tmp_path / "out").read_bytes() == b"new"


@pytest.mark.parametrize("mode", [0o644, 0o600, 0o755])
def test_mode_is_what_was_asked_for(tmp_path: Path, mode: int) -> None:
    write_whole(tmp_path / "out", b"", mode=mode)
    assert (tmp_path / "out").stat().st_mode & 0o7777 == mode


def test_missing_folder_is_the_hosts_fault(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"cannot write .*out: No such file") as caught:
        write_whole(tmp_path / "missing" / "out", b"")
    assert str(tmp_path / "missing") in caught.value.resolution


def test_full_disk_is_the_hosts_fault(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="No space left"):
        write_whole(Path("/dev/full"), bytes(4 * 1024 * 1024))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small tmpfs")
def test_full_disk_leaves_nothing(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], check=True)
    try:
        with pytest.raises(HostError, match=r"cannot write .*out: No space left"):
            write_whole(tmp_path / "out", bytes(4 * 1024 * 1024))
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_what_fails_elsewhere_is_not_this_files_fault(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="elsewhere"), open_whole(tmp_path / "out") as file:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "elsewhere")
    assert list(tmp_path.iterdir()) == []


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("target")
    write_whole(tmp_path / "link", b"data")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"data"


def test_a_pipe_stays_one(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_whole(tmp_path / "pipe", b"data")
        assert os.read(reader, 10) == b"data"
    finally:
        os.close(reader)
    assert (tmp_path / "pipe").is_fifo()


def test_the_umask_counts(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        write_whole(tmp_path / "out", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o7777 == 0o600


def test_folder_in_the_way_is_the_hosts_fault_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(HostError):
        write_whole(tmp_path / "out", b"data")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_hash_file_is_the_sha256_of_the_content(tmp_path: Path) -> None:
    data = bytes(range(256)) * 4096
    (tmp_path / "data").write_bytes(data)
    assert hash_file(tmp_path / "data") == hashlib.sha256(data).hexdigest()
