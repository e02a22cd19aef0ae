"""Files that are mostly holes."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from vmbuild.machine.sparse import HOLE_BYTES, PIECE_BYTES, create_sparse, is_zero, piece_places, write_sparse


def places(path: Path, size: int | None = None) -> list[int]:
    with path.open("rb") as file:
        return list(piece_places(file.fileno(), os.fstat(file.fileno()).st_size if size is None else size))


@pytest.mark.parametrize("pattern", list(itertools.product((False, True), repeat=4)))
def test_zeros_become_holes_and_the_rest_is_as_it_was(tmp_path: Path, pattern: tuple[bool, ...]) -> None:
    piece = b"".join((b"x" if full else b"\0") * HOLE_BYTES for full in pattern) + b"\0end"
    with create_sparse(tmp_path / "file", 2 * PIECE_BYTES) as file:
        write_sparse(file, PIECE_BYTES - HOLE_BYTES, piece)
    before, after = bytes(PIECE_BYTES - HOLE_BYTES), bytes(PIECE_BYTES - len(piece) + HOLE_BYTES)
    assert (tmp_path / "file").read_bytes() == before + piece + after
    assert (tmp_path / "file").stat().st_blocks * 512 <= (sum(pattern) + 1) * HOLE_BYTES


def test_a_new_file_is_its_owners_alone_and_new(tmp_path: Path) -> None:
    with create_sparse(tmp_path / "file", 5):
        pass
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "file").read_bytes() == bytes(5)
    with pytest.raises(FileExistsError), create_sparse(tmp_path / "file", 5):
        pass


def test_pieces_are_found_by_their_data(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with create_sparse(path, 10 * PIECE_BYTES + 5) as file:
        for at in (PIECE_BYTES + 7, 4 * PIECE_BYTES - 1, 10 * PIECE_BYTES + 4):
            write_sparse(file, at, b"x")
    assert places(path) == [PIECE_BYTES, 3 * PIECE_BYTES, 10 * PIECE_BYTES]
    assert places(path, 10 * PIECE_BYTES) == [PIECE_BYTES, 3 * PIECE_BYTES]  # it has grown since its size was asked


@pytest.mark.parametrize("size", [0, 1, 3 * PIECE_BYTES])
def test_a_hole_has_no_pieces(tmp_path: Path, size: int) -> None:
    with create_sparse(tmp_path / "file", size):
        pass
    assert places(tmp_path / "file") == []


def test_what_cannot_be_searched_is_not_taken_for_a_hole() -> None:
    reader, writer = os.pipe()
    with pytest.raises(OSError, match="Illegal seek"):
        list(piece_places(reader, 1))
    os.close(reader)
    os.close(writer)


def test_zeros_are_known_at_every_length() -> None:
    assert all(is_zero(bytes(size)) for size in (0, 1, HOLE_BYTES, PIECE_BYTES))
    assert not is_zero(bytes(PIECE_BYTES - 1) + b"x")
