from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from vmbuild import record
from vmbuild.outputs import Kind, Output
from vmbuild.record import BuildRecord

FIRST = BuildRecord(
    "/w/first", ("a:1", "b"), ("type=docker,dest=out/a.tar",), "iid", None, False, "/home/me", 12, 3.5, 100.0
)
SECOND = replace(FIRST, folder="/w/second", started_at=200.0, outputs=("type=docker,dest=-",))

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
    assert FIRST.ways_out == (Output(Kind.DOCKER, "out/a.tar"),)
    assert SECOND.ways_out == (Output(Kind.DOCKER, "-"),)
    assert replace(FIRST, outputs=()).ways_out == ()
    assert FIRST.place(FIRST.iidfile) == Path("/home/me/iid")
    assert FIRST.place(None) is None
    assert FIRST.id == "first"


@pytest.mark.parametrize(
    "folder", ["", "w", "/", "/w/", "/w/..", "/w/a b", "/w/a\n", "/w/-x", "/w/\0", 5, None], ids=repr
)
def test_a_folder_that_could_name_other_files_is_none(folder: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        BuildRecord.from_data({**asdict(FIRST), "folder": folder})


@pytest.mark.parametrize(("place", "outputs"), [(None, ()), ("a,b.tar", ('type=docker,"dest=a,b.tar"',))])
def test_an_older_record_had_one_archive(place: str | None, outputs: tuple[str, ...]) -> None:
    data = {key: value for key, value in asdict(FIRST).items() if key != "outputs"}
    assert BuildRecord.from_data(json.loads(json.dumps({**data, "output": place}))) == replace(FIRST, outputs=outputs)


@pytest.mark.parametrize("outputs", [["type=new,dest=x"], ["type=load,dest=-o"], [1], "x"], ids=repr)
def test_an_output_that_nobody_knows_is_none(outputs: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        BuildRecord.from_data({**asdict(FIRST), "outputs": outputs})


def test_a_record_is_what_was_written(tmp_path: Path) -> None:
    assert BuildRecord.from_data(json.loads(json.dumps(asdict(FIRST)))) == FIRST
