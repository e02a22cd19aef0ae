from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from vmbuild import record
from vmbuild.record import BuildRecord

FIRST = BuildRecord("/w/first", ("a:1", "b"), "out/a.tar", "iid", None, False, "/home/me", 12, 3.5, 100.0)
SECOND = replace(FIRST, folder="/w/second", started_at=200.0, output="-")

TIMELESS = json.dumps({**asdict(FIRST), "started_at": "long ago"})
NEWER = json.dumps({**asdict(FIRST), "new": 1})


def test_builds_are_remembered_and_forgotten(tmp_path: Path) -> None:
    builds = tmp_path / "builds"
    assert record.load_all(builds) == []
    for each in (SECOND, FIRST, FIRST):
        record.save(builds, each)
    assert record.load_all(builds) == [FIRST, SECOND]
    record.lock_file(builds, FIRST).touch()
    for _ in range(2):
        record.forget(builds, FIRST)
    assert record.load_all(builds) == [SECOND]
    assert [path.name for path in builds.iterdir()] == ["second.json"]


def test_all_of_a_machine_are_forgotten_at_once(tmp_path: Path) -> None:
    for _ in range(2):
        record.forget_all(tmp_path / "builds")
        assert record.load_all(tmp_path / "builds") == []
        record.save(tmp_path / "builds", FIRST)


def test_what_makes_no_sense_is_passed_over(tmp_path: Path) -> None:
    record.save(tmp_path, FIRST)
    for number, text in enumerate(("", "[]", "{}", '{"tags": 1}', NEWER, TIMELESS)):
        (tmp_path / f"{number}.json").write_text(text)
    assert record.load_all(tmp_path) == [FIRST]


def test_paths_are_as_its_command_meant_them() -> None:
    assert FIRST.output_place == "/home/me/out/a.tar"
    assert SECOND.output_place == "-"
    assert replace(FIRST, output=None).output_place is None
    assert replace(FIRST, output="/abs.tar").output_place == "/abs.tar"
    assert FIRST.place(FIRST.iidfile) == Path("/home/me/iid")
    assert FIRST.place(None) is None
    assert FIRST.id == "first"


@pytest.mark.parametrize(
    "folder", ["", "w", "/", "/w/", "/w/..", "/w/a b", "/w/a\n", "/w/-x", "/w/\0", 5, None], ids=repr
)
def test_a_folder_that_could_name_other_files_is_none(folder: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        BuildRecord.from_data({**asdict(FIRST), "folder": folder})


def test_a_record_is_what_was_written(tmp_path: Path) -> None:
    assert BuildRecord.from_data(json.loads(json.dumps(asdict(FIRST)))) == FIRST
