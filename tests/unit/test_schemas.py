"""What `--json` prints is what docs/schemas says, fact by fact."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest

from vmbuild import build, carry, dockerhost, follow, operate, ports, schemas, start, stock, watch
from vmbuild.cli.app import app
from vmbuild.cli.program import run
from vmbuild.dockerhost import DockerHost
from vmbuild.guest.resources import Usage
from vmbuild.image.store import Check
from vmbuild.machine.facts import Facts
from vmbuild.machine.ports import Forward
from vmbuild.machine.snapshot import Snapshot
from vmbuild.machine.suspension import Suspension
from vmbuild.model import (
    Arch,
    BaseResult,
    BuildResult,
    DiskBoot,
    Freed,
    GuestImage,
    KernelBoot,
    MachineStatus,
)
from vmbuild.watch import Reading, Round

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "schemas"
PLACE = Path("/x")

STATUS = MachineStatus("m", "running", 7, 1234, 2, 2048, 1024, 1 << 30, 5, "i", "d", 2**30, 1.5, False, "arm64", PLACE)
FACTS = Facts("u", 2, 2048, 1 << 30, "debian-13-arm64", "d", 1.0, "virt-9.2", "tcg", "h")
SUSPENDED = Suspension(FACTS, "9.2", fast=True, digest="d", size_bytes=1, suspended_at=1.0)
BUILT = BuildResult("sha256:abc", ("a:1",), "x.tar", 10, 20, 1.5)
IMAGE = GuestImage("i", "d", Arch.ARM64, "virt", "cortex-a76", KernelBoot(PLACE, PLACE, PLACE, ("a", "b")), 5)
SNAPSHOT = Snapshot("k", "i", "d", 2, 2048, "10.0", "d", 1, 1.0, PLACE)
USAGE = Usage(2, 0.5, 2000, 300, 5 * 2**20, 61.5)
STOPPED = MachineStatus("n", "stopped")

Case = tuple[str, list[str], Any, str, Any]
CASES: tuple[Case, ...] = (
    ("up", ["up"], operate, "up", STATUS),
    ("build", ["build", "."], build, "build", BUILT),
    ("build", ["build", "."], build, "build", BuildResult("sha256:abc", (), None, 0, 20, 1.5)),
    ("attach", ["attach"], follow, "attach", BUILT),
    ("attach", ["attach"], follow, "attach", None),
    ("resume", ["resume", "x", "--name", "m"], carry, "resume", BUILT),
    ("resume", ["resume", "x", "--name", "m"], carry, "resume", None),
    ("base", ["base", "debian:trixie-slim"], build, "base", BaseResult("debian:x", ("linux/arm64",), "sha256:a")),
    ("status", ["status"], operate, "status", STATUS),
    ("status", ["status"], operate, "status", STOPPED),
    ("trim", ["trim"], operate, "trim", 5),
    ("list", ["list"], operate, "list_machines", [STATUS, STOPPED]),
    ("list", ["list"], operate, "list_machines", []),
    ("suspend", ["suspend"], carry, "suspend", SUSPENDED),
    ("env", ["env"], dockerhost, "open_socket", DockerHost("m", PLACE)),
    ("env", ["env", "--unset"], dockerhost, "forget", None),
    ("forward", ["forward"], ports, "list_forwards", [Forward(8080, 80)]),
    ("images", ["images"], stock, "nothing", None),
    ("images --snapshots", ["images", "--snapshots"], stock, "list_snapshots", [SNAPSHOT]),
    ("images snapshot", ["images", "snapshot"], stock, "make_snapshot", SNAPSHOT),
    ("images fetch", ["images", "fetch"], start, "fetch_image", IMAGE),
    (
        *("images fetch", ["images", "fetch"], start, "fetch_image"),
        GuestImage("i", "d", Arch.ARMHF, "virt", "cortex-a15", DiskBoot(PLACE), 5),
    ),
    ("images verify", ["images", "verify"], stock, "verify_images", [Check("i", "d", "")]),
    ("prune", ["prune"], stock, "prune", [Freed("snapshot", "k", 5)]),
    ("doctor", ["doctor"], stock, "nothing", None),
    ("config", ["config"], stock, "nothing", None),
)
"""A command, its argv, and what the recipe behind it returns here; `nothing` leaves it as it is."""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("CACHE", "STATE"):
        monkeypatch.setenv(f"VMBUILD_{key}_DIR", str(tmp_path / key.lower()))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(carry, "name_for", lambda *_: "m")
    monkeypatch.setattr(operate, "usage", lambda *_: USAGE)


def only_what_is_told(schema: Any) -> Any:
    """Return a schema that also refuses a fact that it does not name: its readers may get more, a test may not."""
    if isinstance(schema, dict):
        closed = {key: only_what_is_told(each) for key, each in schema.items()}
        return {"additionalProperties": False, **closed} if isinstance(schema.get("properties"), dict) else closed
    return [only_what_is_told(each) for each in schema] if isinstance(schema, list) else schema


def load(command: str) -> Any:
    return json.loads((FOLDER / schemas.file_name(command)).read_text())


def check(command: str, told: Any) -> None:
    jsonschema.validate(told, only_what_is_told(load(command)), cls=jsonschema.Draft202012Validator)


@pytest.mark.parametrize("case", CASES, ids=[f"{n}-{case[0]}" for n, case in enumerate(CASES)])
def test_a_command_prints_what_its_schema_says(
    case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command, argv, module, name, value = case
    if name != "nothing":
        monkeypatch.setattr(module, name, lambda *_, **__: value)
    run([*argv, "--json"])
    check(command, json.loads(capsys.readouterr().out))


def test_each_round_of_top_is_a_line_of_its_schema(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def rounds(*_: object) -> Iterator[Round]:
        yield Round(1.0, (Reading(STATUS, 5.0, 12.5, USAGE), Reading(STOPPED, None, None, None)))
        yield Round(2.0, ())

    monkeypatch.setattr(watch, "watch", rounds)
    assert run(["top", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for line in lines:
        check("top", json.loads(line))


def commands(group: click.Group = app, before: str = "") -> dict[str, click.Command]:
    """Return every command by its whole name."""
    found: dict[str, click.Command] = {}
    for name, each in group.commands.items():
        found[before + name] = each
        if isinstance(each, click.Group):
            found |= commands(each, f"{before}{name} ")
    return found


def test_every_command_that_prints_json_has_a_schema_and_a_test() -> None:
    printing = {name for name, each in commands().items() if any(p.name == "as_json" for p in each.params)}
    assert printing | {"images --snapshots"} == set(schemas.PRINTED)
    assert {case[0] for case in CASES} | {"top"} == set(schemas.PRINTED)


def test_the_files_are_the_codes() -> None:
    subprocess.run([sys.executable, str(ROOT / "scripts/schemas"), "--check"], check=True)


@pytest.mark.parametrize("command", schemas.PRINTED)
def test_each_is_a_schema(command: str) -> None:
    jsonschema.Draft202012Validator.check_schema(load(command))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda told: told.pop("state"),
        lambda told: told.update(pid="7"),
        lambda told: told.update(news=1),
        lambda told: told["guest"].update(news=1),
    ],
)
def test_another_fact_is_seen(
    spoil: Callable[[Any], object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(operate, "status", lambda *_: STATUS)
    run(["status", "--json"])
    told = json.loads(capsys.readouterr().out)
    spoil(told)
    with pytest.raises(jsonschema.ValidationError):
        check("status", told)


def test_what_has_no_schema_is_said() -> None:
    with pytest.raises(TypeError, match="no schema"):
        schemas.describe(bytes)
