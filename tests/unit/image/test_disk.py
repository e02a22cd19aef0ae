"""A disk from elsewhere: what is taken, and what would lead the host's own files into a guest."""

from __future__ import annotations

import gzip
import lzma
import struct
import subprocess
from pathlib import Path

import pytest
import zstandard

from tests.unit.image.disks import content_of, qcow2_disk, raw_disk
from vmbuild import process
from vmbuild.errors import GuestImageError, HostError
from vmbuild.image import disk


def put(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(data)
    return path


def img(*argv: str) -> None:
    subprocess.run(["qemu-img", *argv], check=True, capture_output=True)


@pytest.mark.parametrize("pack", [bytes, lzma.compress, gzip.compress, zstandard.compress])
def test_a_compressed_disk_is_unpacked_with_its_holes(tmp_path: Path, pack: object) -> None:
    assert callable(pack)
    content = raw_disk(8 * 1024 * 1024)
    path = put(tmp_path, pack(content))
    found = disk.unpack(path, tmp_path / "out")
    assert found.read_bytes() == content
    if pack is not bytes:
        assert found == tmp_path / "out"
        assert found.stat().st_blocks * 512 < 1024 * 1024
    assert disk.check_disk(found) == "raw"


@pytest.mark.parametrize("pack", [lzma.compress, gzip.compress, zstandard.compress])
def test_a_damaged_one_is_told(tmp_path: Path, pack: object) -> None:
    assert callable(pack)
    packed = bytearray(pack(raw_disk()))
    packed[len(packed) // 2 :] = bytes(1000)
    with pytest.raises(GuestImageError, match="cannot be unpacked"):
        disk.unpack(put(tmp_path, bytes(packed)), tmp_path / "out")


@pytest.mark.parametrize("pack", [lzma.compress, gzip.compress, zstandard.compress])
def test_two_files_in_one_are_read_as_one(tmp_path: Path, pack: object) -> None:
    assert callable(pack)
    first, second = raw_disk(), raw_disk(seed=2)
    path = put(tmp_path, pack(first) + pack(second))
    assert disk.unpack(path, tmp_path / "out").read_bytes() == first + second


@pytest.mark.parametrize("pack", [lzma.compress, gzip.compress, zstandard.compress])
def test_one_that_was_cut_short_is_told(tmp_path: Path, pack: object) -> None:
    assert callable(pack)
    with pytest.raises(GuestImageError, match="cannot be unpacked"):
        disk.unpack(put(tmp_path, pack(raw_disk())[:-20]), tmp_path / "out")


def test_one_that_never_ends_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "MAX_BYTES", 1024 * 1024)
    with pytest.raises(GuestImageError, match="larger than"):
        disk.unpack(put(tmp_path, gzip.compress(bytes(4 * 1024 * 1024))), tmp_path / "out")


@pytest.mark.parametrize("options", [(), ("-c",), ("-o", "compat=0.10"), ("-o", "extended_l2=on")])
def test_a_qcow2_is_taken_and_made_anew(tmp_path: Path, options: tuple[str, ...]) -> None:
    content = raw_disk()
    path = put(tmp_path, qcow2_disk(tmp_path / "make", content, *options))
    assert disk.check_disk(path) == "qcow2"
    disk.convert(path, "qcow2", tmp_path / "new")
    assert content_of(tmp_path / "new", tmp_path) == content


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file of the host that no guest may see."""
    path = tmp_path / "secret"
    path.write_bytes(b"secret" * 1000)
    return path


def test_a_backing_file_is_refused(tmp_path: Path, secret: Path) -> None:
    path = tmp_path / "disk"
    img("create", "-f", "qcow2", "-b", str(secret), "-F", "raw", str(path))
    with pytest.raises(GuestImageError, match="backing file") as caught:
        disk.check_disk(path)
    assert "whole in itself" in caught.value.resolution
    with pytest.raises(GuestImageError, match="another file"):
        disk.convert(path, "qcow2", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_external_data_file_is_refused(tmp_path: Path, secret: Path) -> None:
    path = tmp_path / "disk"
    img("create", "-f", "qcow2", "-o", f"data_file={tmp_path / 'data'},data_file_raw=on", str(path), "1M")
    (tmp_path / "data").unlink()
    (tmp_path / "data").symlink_to(secret)
    with pytest.raises(GuestImageError, match="another file"):
        disk.check_disk(path)


def test_an_encrypted_one_is_refused(tmp_path: Path) -> None:
    header = bytearray(qcow2_disk(tmp_path / "make"))
    header[32:36] = struct.pack(">I", 2)
    with pytest.raises(GuestImageError, match="encrypted"):
        disk.check_disk(put(tmp_path, bytes(header)))


def test_a_size_that_nobody_has_is_refused(tmp_path: Path) -> None:
    header = bytearray(qcow2_disk(tmp_path / "make"))
    header[24:32] = struct.pack(">Q", 1 << 60)
    with pytest.raises(GuestImageError, match="its size is"):
        disk.check_disk(put(tmp_path, bytes(header)))


@pytest.mark.parametrize("form", ["vmdk", "vdi", "vhdx", "vpc", "qed"])
def test_other_formats_are_refused(tmp_path: Path, form: str) -> None:
    (tmp_path / "raw").write_bytes(raw_disk())
    img("convert", "-f", "raw", "-O", form, str(tmp_path / "raw"), str(tmp_path / "disk"))
    with pytest.raises(GuestImageError, match="no disk that vmbuild takes"):
        disk.check_disk(tmp_path / "disk")


@pytest.mark.parametrize("data", [b"", b"<!DOCTYPE html><title>404</title>", b"root:x:0:0" * 100, bytes(4096)])
def test_what_is_no_disk_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(GuestImageError, match="no disk that vmbuild takes"):
        disk.check_disk(put(tmp_path, data))


def test_a_vmdk_descriptor_with_a_boot_mark_is_refused(tmp_path: Path, secret: Path) -> None:
    text = f'# Disk DescriptorFile\nversion=1\nRW 10 FLAT "{secret}" 0\n'.encode()
    with pytest.raises(GuestImageError, match="VMDK"):
        disk.check_disk(put(tmp_path, text.ljust(510) + b"\x55\xaa" + bytes(512)))


def test_a_raw_disk_is_never_read_as_another_format(tmp_path: Path, secret: Path) -> None:
    """A guest could have written a qcow2's header into its raw disk; what is raw by its first bytes stays raw."""
    content = raw_disk()
    path = put(tmp_path, content)
    disk.convert(path, disk.check_disk(path), tmp_path / "new")
    assert content_of(tmp_path / "new", tmp_path) == content


def test_a_damaged_qcow2_is_told(tmp_path: Path) -> None:
    path = put(tmp_path, qcow2_disk(tmp_path / "make")[:70_000])
    with pytest.raises(GuestImageError, match="cannot be converted") as caught:
        disk.convert(path, "qcow2", tmp_path / "new")
    assert "exceeding the end of the file" in caught.value.details
    assert not (tmp_path / "new").exists()


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(argv: list[str], **_: object) -> bytes:
        if "convert" in argv:
            raise process.CommandError(argv, 1, "qemu-img: error while writing at byte 0: No space left on device")
        return b"{}"

    monkeypatch.setattr(process, "run", full)
    with pytest.raises(HostError, match="the disk is full"):
        disk.convert(put(tmp_path, raw_disk()), "raw", tmp_path / "new")
