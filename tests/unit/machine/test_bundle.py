"""A machine packed as one file: what comes out is what went in, or nothing does."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import resource
import shutil
import subprocess
import tarfile
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import pytest
import zstandard

from vmbuild.errors import HostError, MachineError, VmbuildError
from vmbuild.machine import bundle
from vmbuild.machine.bundle import data_bytes, pack, packing_rate, read_facts, unpack
from vmbuild.machine.sealed import SealedWriter
from vmbuild.model import KIB, MIB
from vmbuild.report import SilentMeter

FACTS: dict[str, object] = {"name": "box", "cpus": 2, "argv": ["qemu", "-M", "virt,ü"], "nothing": None}
SILENT = SilentMeter()
MAGIC = bytes.fromhex("502a4d18")


class Count:
    """A meter that adds up."""

    total = 0

    def advance(self, amount: int) -> None:
        self.total += amount


def make_file(path: Path, size: int, pieces: dict[int, bytes]) -> Path:
    """Write a file of holes with a little in it."""
    with path.open("wb") as file:
        file.truncate(size)
        for at, data in pieces.items():
            file.seek(at)
            file.write(data)
    return path


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.fixture
def parts(tmp_path: Path) -> dict[str, Path]:
    """A memory and a disk, small, and every kind of end that a file can have."""
    folder = tmp_path / "parts"
    folder.mkdir()
    page, odd = noise(4 * KIB), noise(70 * KIB + 1, 1)
    return {
        "memory": make_file(folder / "memory", 64 * MIB, {0: page, 9 * MIB - 4 * KIB: 2 * page, 40 * MIB + 5: odd}),
        "disk": make_file(folder / "disk", 3 * MIB + 12345, {MIB: bytes(MIB), 3 * MIB + 12340: b"ended"}),
        "odd": make_file(folder / "odd", 1, {0: b"x"}),
        "empty": make_file(folder / "empty", 0, {}),
        "hole-2": make_file(folder / "hole", 5 * MIB + 1, {}),
    }


@pytest.fixture
def packed(tmp_path: Path, parts: dict[str, Path]) -> Path:
    """A bundle of those parts."""
    pack(tmp_path / "box.bundle", FACTS, parts, SILENT)
    return tmp_path / "box.bundle"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where to unpack."""
    (tmp_path / "unpacked").mkdir()
    return tmp_path / "unpacked"


def unpack_anew(path: Path, folder: Path) -> dict[str, object]:
    """Unpack where nothing is left of the last time."""
    shutil.rmtree(folder)
    folder.mkdir()
    return unpack(path, folder, SILENT)


def test_what_comes_out_is_what_went_in(packed: Path, parts: dict[str, Path], folder: Path) -> None:
    assert unpack(packed, folder, SILENT) == FACTS
    assert {path.name for path in folder.iterdir()} == set(parts)
    for name, path in parts.items():
        assert (folder / name).read_bytes() == path.read_bytes(), name
        assert (folder / name).stat().st_mode & 0o777 == 0o600


def test_holes_stay_holes_and_zeros_become_some(packed: Path, parts: dict[str, Path], folder: Path) -> None:
    unpack(packed, folder, SILENT)
    used = {name: (folder / name).stat().st_blocks * 512 for name in parts}
    assert used["memory"] <= 256 * KIB
    assert used["disk"] <= 64 * KIB < parts["disk"].stat().st_blocks * 512
    assert used["hole-2"] <= 4 * KIB
    assert packed.stat().st_size < 128 * KIB


def test_a_full_part_is_whole(tmp_path: Path, folder: Path) -> None:
    data = noise(MIB) + bytes(MIB // 2) + noise(3 * MIB + 77)
    (tmp_path / "full").write_bytes(data)
    pack(tmp_path / "bundle", {}, {"full": tmp_path / "full"}, SILENT)
    assert unpack(tmp_path / "bundle", folder, SILENT) == {}
    assert (folder / "full").read_bytes() == data


def test_a_bundle_without_parts_has_its_facts(tmp_path: Path, folder: Path) -> None:
    pack(tmp_path / "bundle", FACTS, {}, SILENT)
    assert read_facts(tmp_path / "bundle") == unpack(tmp_path / "bundle", folder, SILENT) == FACTS


def test_meters_count_what_is_no_hole(tmp_path: Path, parts: dict[str, Path], folder: Path) -> None:
    read, written = Count(), Count()
    pack(tmp_path / "bundle", FACTS, parts, read)
    unpack(tmp_path / "bundle", folder, written)
    assert read.total == 3 * MIB + MIB + 12345 + 1 + MIB  # of the disk, a piece was zeros and no hole
    assert read.total == sum(data_bytes(path) for path in parts.values())
    assert written.total == read.total - MIB


def test_a_bundle_is_its_owners_alone(packed: Path) -> None:
    assert packed.stat().st_mode & 0o777 == 0o600


def test_members_are_named_by_part_and_place(packed: Path) -> None:
    pieces = [("memory", 0), ("memory", 8), ("memory", 9), ("memory", 40), ("disk", 3), ("odd", 0)]
    assert members(packed) == ["bundle.json", *(f"{part}/{at * MIB:016x}" for part, at in pieces)]


def members(path: Path) -> list[str]:
    with zstandard.open(path) as plain, tarfile.open(fileobj=io.BytesIO(plain.read())) as tar:
        return tar.getnames()


@pytest.mark.skipif(not (shutil.which("zstd") and shutil.which("tar")), reason="needs the programs zstd and tar")
def test_other_programs_can_list_it(packed: Path) -> None:
    subprocess.run(["zstd", "-q", "-t", str(packed)], check=True)
    plain = subprocess.run(["zstd", "-q", "-dc", str(packed)], check=True, capture_output=True).stdout
    listed = subprocess.run(["tar", "-t"], input=plain, check=True, capture_output=True)
    assert listed.stdout.decode().split() == members(packed)
    assert listed.stderr == b""


def test_facts_are_in_the_head(tmp_path: Path, packed: Path) -> None:
    head = packed.read_bytes().index(bytes.fromhex("28b52ffd"), 4)
    (tmp_path / "head").write_bytes(packed.read_bytes()[: head + 64])
    assert read_facts(tmp_path / "head") == read_facts(packed) == FACTS


def regions(size: int) -> Iterator[int]:
    """Yield places all over a file, and every one of its head and of its seal."""
    yield from range(400)
    yield from range(400, size - 100, max(1, size // 150))
    yield from range(size - 100, size)


def test_a_changed_byte_is_refused_wherever_it_is(tmp_path: Path, packed: Path, folder: Path) -> None:
    whole = packed.read_bytes()
    for at in regions(len(whole)):
        changed = bytearray(whole)
        changed[at] ^= 1 << at % 8
        (tmp_path / "changed").write_bytes(changed)
        with pytest.raises(MachineError, match=r"changed is damaged|changed is no bundle|newer") as caught:
            unpack_anew(tmp_path / "changed", folder)
        assert caught.value.details, at
        assert caught.value.resolution, at


def test_changed_facts_are_refused_without_a_look_at_the_rest(tmp_path: Path, packed: Path) -> None:
    whole = packed.read_bytes()
    for at in range(whole.index(bytes.fromhex("28b52ffd"), 4)):
        changed = bytearray(whole)
        changed[at] ^= 0x10
        (tmp_path / "changed").write_bytes(changed)
        try:
            assert read_facts(tmp_path / "changed") == FACTS  # a bit of the frame's header that means nothing
        except MachineError as error:
            assert error.details


def test_a_part_of_a_bundle_is_refused(tmp_path: Path, packed: Path, folder: Path) -> None:
    whole = packed.read_bytes()
    for size in regions(len(whole)):
        (tmp_path / "part").write_bytes(whole[:size])
        with pytest.raises(MachineError, match=r"part is damaged|part is no bundle"):
            unpack_anew(tmp_path / "part", folder)


def test_a_copy_that_broke_off_is_refused_before_anything_is_written(
    tmp_path: Path, packed: Path, folder: Path
) -> None:
    (tmp_path / "part").write_bytes(packed.read_bytes()[:-1])
    with pytest.raises(MachineError, match="damaged") as caught:
        unpack(tmp_path / "part", folder, SILENT)
    assert "does not end in a seal" in caught.value.details
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("more", [b"\0", b"\n", bytes(1000), b"whole"], ids=["zero", "line", "zeros", "another"])
def test_whatever_is_appended_is_refused(packed: Path, folder: Path, more: bytes) -> None:
    whole = packed.read_bytes()
    packed.write_bytes(whole + (whole if more == b"whole" else more))
    with pytest.raises(MachineError, match="damaged"):
        unpack(packed, folder, SILENT)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        bytes(10000),
        noise(10000),
        zstandard.compress(noise(10000)),
        MAGIC + bytes(36),
    ],
    ids=["empty", "text", "zeros", "noise", "zstd", "seal"],
)
def test_a_file_that_is_something_else_is_no_bundle(tmp_path: Path, folder: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(MachineError, match="file is no bundle"):
        read_facts(tmp_path / "file")
    with pytest.raises(MachineError, match="file is no bundle"):
        unpack(tmp_path / "file", folder, SILENT)


def test_what_is_no_file_is_the_hosts_fault(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "missing", tmp_path, tmp_path / "pipe"):
        with pytest.raises(HostError, match="cannot read") as caught:
            read_facts(path)
        assert str(path) in caught.value.resolution


def seal(path: Path, plain: bytes, *, window_log: int = 20) -> None:
    """Write what someone else may have made: any tar stream, in an envelope that is right."""
    options = zstandard.ZstdCompressionParameters.from_level(3, window_log=window_log, write_checksum=True)
    frames = zstandard.ZstdCompressor(compression_params=options).compressobj()
    data = frames.compress(plain) + frames.flush()
    path.write_bytes(data + MAGIC + (32).to_bytes(4, "little") + hashlib.sha256(data).digest())


def member(name: str, data: bytes, *, kind: bytes = tarfile.REGTYPE, size: int | None = None) -> bytes:
    header = tarfile.TarInfo(name)
    header.type, header.size = kind, len(data) if size is None else size
    return header.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


def head(**other: object) -> bytes:
    content = {"format": 1, "facts": {}, "parts": {"memory": 2 * MIB + 5, "disk": MIB}, **other}
    return member("bundle.json", json.dumps(content).encode())


END = bytes(1024)
FIRST, SECOND, LAST = (f"memory/{at * MIB:016x}" for at in range(3))
FULL = b"x" * MIB


def test_what_is_right_by_hand_is_a_bundle(tmp_path: Path, folder: Path) -> None:
    plain = head() + member(FIRST, FULL) + member(f"disk/{0:016x}", FULL) + member(LAST, b"12345") + END
    seal(tmp_path / "bundle", plain)
    assert unpack(tmp_path / "bundle", folder, SILENT) == {}
    assert (folder / "memory").read_bytes() == FULL + bytes(MIB) + b"12345"


@pytest.mark.parametrize(
    "plain",
    [
        head() + member("../x", FULL) + END,
        head() + member(f"../{0:016x}", FULL) + END,
        head() + member(f"/{FIRST}", FULL) + END,
        head() + member(f"memory/../{FIRST}", FULL) + END,
        head() + member(f"other/{0:016x}", FULL) + END,
        head() + member("memory", FULL) + END,
        head() + member("memory/0", FULL) + END,
        head() + member(f"memory/{'A' * 16}", FULL) + END,
        head() + member(f"memory/{3 * MIB:016x}", FULL) + END,
        head() + member("memory/fffffffffff00000", FULL) + END,
        head() + member(f"memory/{512:016x}", FULL) + END,
        head() + member(FIRST, FULL + b"x") + END,
        head() + member(FIRST, FULL[1:]) + END,
        head() + member(FIRST, b"") + END,
        head() + member(LAST, b"123456") + END,
        head() + member(LAST, b"1234") + END,
        head() + member(FIRST, FULL) * 2 + END,
        head() + member(SECOND, FULL) + member(FIRST, FULL) + END,
        head() + member(FIRST, b"", kind=tarfile.SYMTYPE) + END,
        head() + member(FIRST, FULL, kind=tarfile.LNKTYPE) + END,
        head() + member(FIRST, FULL, kind=tarfile.GNUTYPE_SPARSE) + END,
        head() + member(FIRST, FULL, kind=tarfile.GNUTYPE_LONGNAME) + END,
        head() + member(FIRST, FULL, kind=tarfile.XHDTYPE) + END,
        head() + member(FIRST, b"", size=10**15) + END,
        head() + member(FIRST, b"", size=-1) + END,
        head() + member("bundle.json", b"{}") + END,
        head() + head() + END,
        head() + noise(512) + END,
        head() + member("ü/é", FULL) + END,
        head() + member(FIRST, FULL),
        head() + member(FIRST, FULL)[:-1],
        head() + END[:512],
        head() + END[:512] + member(FIRST, FULL) + END,
        head() + END + b"\0",
        head() + END + member(FIRST, FULL) + END,
        head(),
        head()[:600],
        head(format=0),
        head(format="1"),
        head(format=None),
        head(facts=[]) + END,
        head(parts=["memory"]) + END,
        head(parts={"memory": -1}) + END,
        head(parts={"memory": 1.0}) + END,
        head(parts={"memory": 2**63}) + END,
        head(parts={"../memory": 1}) + END,
        head(parts={"Memory": 1}) + END,
        head(parts={"": 1}) + END,
        head(parts={"memory\n": 1}) + END,
        head(parts={"m" * 100: 1}) + END,
        head(parts={f"part-{number}": 1 for number in range(1000)}) + END,
        head(facts={"much": "x" * MIB}) + END,
        member("bundle.json", b"[]") + END,
        member("bundle.json", b"") + END,
        member("bundle.json", b"\xff") + END,
        member("bundle.json", b"[" * 500_000) + END,
        member("bundle.json", b"", size=10**15) + END,
    ],
)
def test_what_pack_would_not_have_written_is_refused(tmp_path: Path, folder: Path, plain: bytes) -> None:
    seal(tmp_path / "bundle", plain)
    with pytest.raises(MachineError, match="bundle is damaged") as caught:
        unpack(tmp_path / "bundle", folder, SILENT)
    assert caught.value.details
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "unpacked"}
    assert {path.name for path in folder.iterdir()} <= {"memory", "disk"}


def test_a_tar_of_something_else_is_no_bundle(tmp_path: Path, folder: Path) -> None:
    seal(tmp_path / "bundle", member("hello", b"") + head() + END)
    with pytest.raises(MachineError, match="is no bundle"):
        unpack(tmp_path / "bundle", folder, SILENT)


@pytest.mark.parametrize("number", [2, 10**30])
def test_a_newer_format_is_told_as_such(tmp_path: Path, folder: Path, number: int) -> None:
    seal(tmp_path / "bundle", head(format=number, facts="of another kind", parts=None))
    for read in (read_facts, lambda path: unpack(path, folder, SILENT)):
        with pytest.raises(MachineError, match="was made by a newer vmbuild") as caught:
            read(tmp_path / "bundle")
        assert f"format {number}" in caught.value.details
        assert "Update vmbuild" in caught.value.resolution


def test_a_frame_that_asks_for_much_memory_is_refused(tmp_path: Path, folder: Path) -> None:
    seal(tmp_path / "bundle", head() + END, window_log=27)
    with pytest.raises(MachineError, match="damaged") as caught:
        unpack(tmp_path / "bundle", folder, SILENT)
    assert "memory" in caught.value.details


@pytest.mark.parametrize("name", ["", "../x", "a/b", "Memory", "2nd", "m" * 64, "a b"])
def test_no_part_can_have_a_name_that_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(b"data")
    with pytest.raises(ValueError, match="no bundle can hold"):
        pack(tmp_path / "bundle", {}, {name: tmp_path / "file"}, SILENT)
    assert not (tmp_path / "bundle").exists()


def test_no_facts_can_be_more_than_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no bundle can hold"):
        pack(tmp_path / "bundle", {"much": "x" * MIB}, {}, SILENT)


def test_a_part_that_cannot_be_read_is_the_hosts_fault(tmp_path: Path, packed: Path) -> None:
    older = packed.read_bytes()
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(HostError, match="cannot read"):
            pack(packed, {}, {"memory": path}, SILENT)
    assert packed.read_bytes() == older


def test_a_part_that_becomes_shorter_is_told(tmp_path: Path) -> None:
    part = make_file(tmp_path / "part", 3 * MIB, {0: FULL, 2 * MIB: FULL})

    class Cut:
        def advance(self, amount: int) -> None:
            os.truncate(part, 2 * MIB + 10)

    with pytest.raises(HostError, match="became shorter"):
        pack(tmp_path / "bundle", {}, {"part": part}, Cut())
    assert {path.name for path in tmp_path.iterdir()} == {"part"}


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let no file grow beyond a size, which is how a full disk feels."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_older_bundle(tmp_path: Path, packed: Path) -> None:
    older = packed.read_bytes()
    (tmp_path / "much").write_bytes(noise(3 * MIB))
    before = {path.name for path in tmp_path.iterdir()}
    with files_of_at_most(2 * MIB), pytest.raises(HostError, match=r"cannot write .*box\.bundle"):
        pack(packed, {}, {"much": tmp_path / "much"}, SILENT)
    assert packed.read_bytes() == older
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_full_device_is_the_hosts_fault(parts: dict[str, Path]) -> None:
    with pytest.raises(HostError, match="No space left"):
        pack(Path("/dev/full"), FACTS, parts, SILENT)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("a defect")])
def test_an_interrupted_pack_leaves_the_older_bundle(tmp_path: Path, packed: Path, error: BaseException) -> None:
    older = packed.read_bytes()
    (tmp_path / "much").write_bytes(noise(3 * MIB))
    before = {path.name for path in tmp_path.iterdir()}

    class Interrupt(Count):
        def advance(self, amount: int) -> None:
            super().advance(amount)
            if self.total >= 2 * MIB:
                raise error

    with pytest.raises(type(error)):
        pack(packed, {}, {"much": tmp_path / "much"}, Interrupt())
    assert packed.read_bytes() == older
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_full_disk_while_unpacking_is_the_hosts_fault(packed: Path, folder: Path) -> None:
    with files_of_at_most(2 * MIB), pytest.raises(HostError, match=f"cannot write in {folder}"):
        unpack(packed, folder, SILENT)


def test_no_file_that_is_there_is_written_over(packed: Path, folder: Path) -> None:
    (folder / "disk").symlink_to(packed)
    with pytest.raises(HostError, match=f"cannot write in {folder}: File exists"):
        unpack(packed, folder, SILENT)


def test_a_missing_folder_is_the_hosts_fault(packed: Path, folder: Path) -> None:
    with pytest.raises(HostError, match=r"cannot write in .*No such file"):
        unpack(packed, folder / "missing", SILENT)


@contextmanager
def memory_of_at_most(size: int) -> Iterator[None]:
    """Fail when more is held at any time; what C code keeps for itself is not counted."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < size
    finally:
        tracemalloc.stop()


def test_memory_is_bounded_however_much_there_is(tmp_path: Path, folder: Path) -> None:
    part = tmp_path / "part"
    with part.open("wb") as file:
        file.writelines(FULL for _ in range(64))
    with memory_of_at_most(24 * MIB):
        pack(tmp_path / "bundle", {}, {"part": part}, SILENT)
    with memory_of_at_most(24 * MIB):  # a bundle of a few KiB
        unpack(tmp_path / "bundle", folder, SILENT)
    assert (folder / "part").stat().st_size == 64 * MIB


def test_holes_cost_nothing(tmp_path: Path, folder: Path) -> None:
    huge = make_file(tmp_path / "huge", 2 * 1024 * 1024 * MIB, {1024 * 1024 * MIB: b"x"})
    read = Count()
    pack(tmp_path / "bundle", {}, {"huge": huge}, read)
    assert unpack(tmp_path / "bundle", folder, SILENT) == {}
    assert read.total == MIB
    assert (folder / "huge").stat().st_size == huge.stat().st_size


def test_rate_is_measured_and_leaves_nothing(tmp_path: Path, parts: dict[str, Path], folder: Path) -> None:
    for limit in (1, MIB, 2 * MIB, 64 * MIB):
        assert 0 < packing_rate(parts["memory"], folder, limit) < float("inf")
    assert 0 < packing_rate(parts["odd"], folder) < float("inf")
    assert list(folder.iterdir()) == []


def test_rate_of_nothing_is_infinite(tmp_path: Path, parts: dict[str, Path], folder: Path) -> None:
    assert packing_rate(parts["empty"], folder) == packing_rate(parts["hole-2"], folder) == float("inf")


def test_rate_is_measured_all_over_and_within_the_limit(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = make_file(tmp_path / "full", 20 * MIB, {at * MIB: bytes([at + 1]) * MIB for at in range(20)})
    seen: list[int] = []

    class Watching(SealedWriter):
        def write_frame(self, pieces: object) -> None:
            seen.extend(piece[0] for piece in cast(Iterator[bytes], pieces))

    monkeypatch.setattr(bundle, "SealedWriter", Watching)
    packing_rate(full, folder, 4 * MIB)
    assert seen == [1, 6, 11, 16]


@pytest.mark.parametrize("into", ["missing", "parts/memory"])
def test_rate_where_nothing_can_be_written_is_the_hosts_fault(
    tmp_path: Path, parts: dict[str, Path], into: str
) -> None:
    with pytest.raises(HostError, match="cannot write in"):
        packing_rate(parts["memory"], tmp_path / into)
    with pytest.raises(VmbuildError, match="cannot read"):
        packing_rate(tmp_path / "missing", tmp_path)
