"""The edge: what becomes of a command line, an exception, and a result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from vmbuild import build, carry, operate, watch
from vmbuild.cli import cache, top
from vmbuild.cli.app import app
from vmbuild.cli.program import run
from vmbuild.errors import (
    EXIT_CODES,
    BuildError,
    GuestError,
    GuestImageError,
    HostError,
    MachineError,
    UsageError,
    VmbuildError,
)
from vmbuild.guard import Limits
from vmbuild.guest.resources import Usage
from vmbuild.machine.bundle import pack
from vmbuild.machine.facts import Facts
from vmbuild.machine.suspension import Suspension
from vmbuild.model import BuildRequest, BuildResult, Delivered, Home, MachineRequest, MachineStatus
from vmbuild.outputs import Kind, Output
from vmbuild.report import SilentMeter
from vmbuild.watch import Reading, Round

Record = list[tuple[Any, ...]]
FACTS = Facts("u", 2, 2048, 1 << 30, "debian-13-arm64", "d", 1.0, "virt-9.2", "tcg", "h")
SUSPENDED = Suspension(FACTS, "9.2", fast=True, digest="d", size_bytes=1, suspended_at=1.0)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for key in ("CACHE", "STATE"):
        monkeypatch.setenv(f"VMBUILD_{key}_DIR", str(tmp_path / key.lower()))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _delivered(job: BuildRequest) -> tuple[Delivered, ...]:
    return tuple(Delivered(each.kind, each.dest, "sha256:abc", 10) for each in job.outputs)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Record:
    """The calls of `build.build`, which here succeeds at once."""
    calls: Record = []

    def fake(request: MachineRequest, job: BuildRequest, *args: object, **streams: object) -> BuildResult:
        calls.append((request, job))
        return BuildResult("sha256:abc", job.tags, None, 10, 20, 1.5, _delivered(job))

    monkeypatch.setattr(build, "build", fake)
    return calls


def fail_with(error: BaseException) -> Callable[..., Any]:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    "kind", [UsageError, HostError, GuestImageError, MachineError, GuestError, BuildError, VmbuildError]
)
def test_an_error_becomes_its_exit_code_and_three_parts(
    kind: type[VmbuildError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(operate, "up", fail_with(kind("it broke [red]", details="the facts", resolution="do this")))
    assert run(["up"]) == kind.exit_code
    out, err = capsys.readouterr()
    assert out == ""
    for part in ("it broke [red]", "the facts", "do this"):
        assert part in err


def test_long_details_are_cut_to_their_end(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    details = "\n".join(f"line-{n}-" for n in range(100))
    monkeypatch.setattr(operate, "up", fail_with(HostError("x", details=details)))
    run(["up"])
    err = capsys.readouterr().err
    assert "line-99-" in err
    assert "line-10-" not in err


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(operate, "up", fail_with(KeyboardInterrupt()))
    assert run(["up"]) == 130
    assert capsys.readouterr().err.strip() == "interrupted"


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(operate, "up", fail_with(ZeroDivisionError("oops")))
    assert run(["up"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "defect in vmbuild" in err


@pytest.mark.parametrize("argv", [["nonsense"], ["build", "--nonsense"], ["up", "--cpus", "no"], ["build", "a", "b"]])
def test_wrong_usage_is_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(argv) == 2
    assert capsys.readouterr().err


def test_a_build_takes_dockers_options(built: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROM_ENV", "value")
    argv = ["build", "ctx", "-t", "a:1", "-t", "b:2", "-f", "D", "--build-arg", "A=1", "--build-arg", "FROM_ENV"]
    argv += ["--build-arg", "NOT_SET", "--label", "l=1", "--target", "one", "--no-cache", "--pull", "-o", "x.tar"]
    argv += ["--iidfile", "iid", "--metadata-file", "meta", "--progress", "rawjson", "--cpus", "3", "--name", "n"]
    assert run(argv) == 0
    request, job = built[0]
    assert (request.name, request.cpus) == ("n", 3)
    assert job == BuildRequest(
        context="ctx",
        tags=("a:1", "b:2"),
        dockerfile="D",
        build_args=("A=1", "FROM_ENV=value", "NOT_SET"),
        labels=("l=1",),
        target="one",
        no_cache=True,
        pull=True,
        progress="rawjson",
        outputs=(Output(Kind.DOCKER, "x.tar"),),
        iidfile=Path("iid"),
        metadata_file=Path("meta"),
    )


def test_quiet_prints_the_id_alone(built: Record, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["build", "-q", "."]) == 0
    assert capsys.readouterr() == ("sha256:abc\n", "")


def test_json_is_all_there_is_on_standard_output(built: Record, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["build", "--json", "-t", "a:1", "."]) == 0
    assert json.loads(capsys.readouterr().out)["tags"] == ["a:1"]


def test_nothing_but_the_archive_goes_to_standard_output(built: Record, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["build", "-o", "-", "-q", "."]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "argv",
    [["-f", "-", "-"], ["--progress", "loud", "."], ["--json", "-o", "-", "."]],
    ids=str,
)
def test_a_build_that_cannot_be_is_refused_early(built: Record, argv: list[str]) -> None:
    assert run(["build", *argv]) == 2
    assert built == []


def test_destroy_asks_for_nothing_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["destroy", "nobody"]) == 0
    assert "does not exist" in capsys.readouterr().err


def test_up_takes_a_name_as_the_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def up(request: MachineRequest, *_: object) -> MachineStatus:
        asked.append(request.name)
        return MachineStatus(request.name, "running")

    monkeypatch.setattr(operate, "up", up)
    assert run(["up", "box"]) == run(["up", "--name", "box"]) == 0
    assert asked == ["box", "box"]


@pytest.mark.parametrize("argv", [["up", "--timeout", "abc"], ["build", "--time-limit", "abc"]], ids=str)
def test_a_time_that_is_none_says_how_one_is_written(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(argv) == 2
    assert "45m" in capsys.readouterr().err


def test_destroy_does_not_ask_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operate, "destroy", fail_with(AssertionError("destroyed")))
    monkeypatch.setattr(operate, "exists", lambda *_: True)
    monkeypatch.setattr("sys.stdin", open("/dev/null"))  # noqa: PTH123, SIM115
    assert run(["destroy"]) == 2


def test_a_machine_that_is_not_there_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["status", "nobody"]) == 2
    assert "no machine named nobody" in capsys.readouterr().err
    assert run(["status", "one", "--name", "two"]) == 2


def test_no_machines_is_an_empty_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_status_is_a_table_or_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = MachineStatus("m", "running", pid=7, ssh_port=1234, rss_bytes=2**30, folder=Path("/x"))
    monkeypatch.setattr(operate, "status", lambda *_: now)
    monkeypatch.setattr(operate, "usage", lambda *_: Usage(2, 0.5, 2000, 300, 5 * 2**20, 61.5))
    assert run(["status"]) == 0
    rows = {" ".join(line.split()) for line in capsys.readouterr().out.splitlines()}
    assert {"rss bytes 1.0 GiB", "guest: memory used mib 300.0 MiB", "guest: uptime s 62 s"} <= rows
    assert run(["status", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["ssh_port"], told["guest"]["cpus_online"]) == (1234, 2)
    monkeypatch.setattr(operate, "usage", lambda *_: None)
    assert run(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["guest"] is None


def test_ssh_passes_everything_behind_the_dashes_and_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Record = []

    def fake(*args: Any) -> int:
        calls.append(args)
        return 42

    monkeypatch.setattr(operate, "run_in_guest", fake)
    assert run(["ssh", "--name", "m", "--", "ls", "--name", "-h"]) == 42
    assert calls[0][:2] == ("m", ("ls", "--name", "-h"))


def test_the_shipped_image_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["images", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["name"]: row["digest"] for row in rows}["debian-13-arm64"] is None


def test_config_shows_where_a_value_comes_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", "--json", "--memory", "1G"]) == 0
    assert json.loads(capsys.readouterr().out)["memory"] == {"value": 2**30, "origin": "--memory"}


def test_help_tells_every_exit_code_and_imports_nothing_heavy() -> None:
    script = "import sys; from vmbuild.cli.program import run; run(['--help']); "
    script += "print(sorted(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True)
    for code in EXIT_CODES:
        assert f"\n  {code} " in done.stdout
    for heavy in ("paramiko", "requests", "rich", "qemu", "debian", "cryptography"):
        assert f"'{heavy}'" not in done.stderr


def test_a_folder_that_is_gone_is_told(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "gone").mkdir()
    os.chdir(home / "gone")
    (home / "gone").rmdir()
    assert run(["config"]) == 3
    assert "folder" in capsys.readouterr().err


def test_a_machine_whose_facts_are_lost_is_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(operate, "list_machines", lambda _: [MachineStatus("m", "broken")])
    assert run(["list"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["m", "broken", "-", "-", "-", "-", "-"]


def test_a_negative_number_of_lines_is_wrong_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operate, "logs", fail_with(AssertionError("asked")))
    assert run(["logs", "--lines", "-5"]) == 2


def test_a_docker_archive_is_named_as_docker_names_it(built: Record, home: Path) -> None:
    assert run(["build", str(home), "-o", "type=docker,dest=out.tar"]) == 0
    assert built[0][1].outputs == (Output(Kind.DOCKER, "out.tar"),)


@pytest.mark.parametrize(
    "output", ["type=oci", "type=local", "type=new,dest=x", "dest=x", "type=oci,dest=x,compression=estargz"]
)
def test_what_cannot_be_written_is_refused(built: Record, output: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["build", "-o", output]) == UsageError.exit_code
    assert output in capsys.readouterr().err
    assert built == []


def test_rawjson_comes_alone(built: Record, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["build", str(home), "--progress", "rawjson"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("argv", "name"), [([], "box"), (["--name", "other"], "other")], ids=["its own", "another"])
def test_a_bundle_gone_on_with_makes_a_bundle_of_its_machine(
    argv: list[str], name: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[Limits] = []

    def fake(path: Path, request: MachineRequest, given: Limits, *args: object, **streams: object) -> None:
        limits.append(given)

    about = {"name": "box", "suspension": asdict(SUSPENDED), "builds": []}
    pack(home / "box.vmbundle", about, {}, SilentMeter())
    monkeypatch.setattr(carry, "resume", fake)
    assert run(["resume", "box.vmbundle", "--time-limit", "45m", "--suspend-to", str(home), *argv]) == 0
    assert limits[0].suspend_to == home / f"{name}.vmbundle"


def test_a_build_that_may_become_a_bundle_is_told_so(built: Record, home: Path) -> None:
    assert run(["build", "--time-limit", "45m"]) == 0
    assert run(["build", "--time-limit", "45m", "--suspend-to", str(home), "--logins", "off"]) == 0
    assert run(["build", "--time-limit", "45m", "--suspend-to", str(home), "--with-secrets"]) == 0
    choices = [request.pass_on for request, _ in built]
    assert [(choice.carried, choice.logins) for choice in choices] == [(False, True), (True, False), (False, True)]


def run_program(script: str) -> subprocess.CompletedProcess[str]:
    argv = ["sh", "-c", script, str(Path(sys.executable).with_name("vmbuild"))]
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("command", ["config", "config --json", "list --json"])
def test_a_full_disk_behind_standard_output_is_said(command: str) -> None:
    done = run_program(f'"$0" {command} >/dev/full')
    assert done.returncode == HostError.exit_code
    assert "standard output: No space left" in done.stderr
    assert "defect" not in done.stderr


@pytest.mark.parametrize("command", ["config", "config --json", "list", "images --json", "--help", "completion bash"])
def test_a_reader_who_has_gone_is_told_nothing_and_the_shell_the_usual(command: str) -> None:
    done = run_program(f'{{ "$0" {command}; echo $? >&2; }} | true')
    assert done.stderr == "141\n"


def test_a_closed_standard_input_is_an_empty_one() -> None:
    done = run_program('"$0" build ./none <&-')
    assert done.returncode == UsageError.exit_code
    assert "none is not a folder" in done.stderr


@pytest.mark.parametrize(
    ("command", "code"),
    [("destroy <&-", 0), ("status nobody >&-", 2), ("config >&-", 0), ("build ./none <&- >&- 2>&-", 2)],
)
def test_a_closed_stream_is_no_defect(command: str, code: int) -> None:
    done = run_program(f'"$0" {command}')
    assert (done.returncode, "Traceback" in done.stderr) == (code, False)


@pytest.mark.parametrize(("before", "code"), [("", 130), ("trap '' HUP; ", 0)], ids=["hang-up", "nohup"])
def test_a_terminal_that_goes_interrupts_unless_it_is_ignored(tmp_path: Path, before: str, code: int) -> None:
    (tmp_path / "program.py").write_text(
        "import os, signal, sys\nfrom vmbuild.cli import main, program\n"
        "program.run = lambda _: os.kill(os.getpid(), signal.SIGHUP) or 0\n"
        "try:\n    main()\nexcept KeyboardInterrupt:\n    sys.exit(130)\n"
    )
    done = subprocess.run(["sh", "-c", f'{before}exec "{sys.executable}" {tmp_path}/program.py'], check=False)
    assert done.returncode == code


def test_help_tells_every_command_in_full_and_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, command in app.commands.items():
        assert f"{name} {command.get_short_help_str(200)}" in text
    for code, meaning in EXIT_CODES.items():
        assert f"{code} {meaning}" in text


def test_help_of_a_group_tells_its_commands_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["images", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, command in cache.images.commands.items():
        assert f"{name} {command.get_short_help_str(200)}" in text


def test_help_tells_that_a_build_may_go_without_a_context(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["build", "--help"]) == 0
    assert "build [OPTIONS] [PATH|-|URL]" in capsys.readouterr().out


def test_a_console_that_is_not_there_is_not_connected_to(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["console", "nobody"]) == UsageError.exit_code
    assert "onnect" not in capsys.readouterr().err


def test_a_suspended_machine_is_gone_on_with_by_its_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(operate, "suspend", lambda *_: SUSPENDED)
    assert run(["suspend", "box"]) == 0
    assert "`vmbuild up --name box`" in capsys.readouterr().err


BUSY = MachineStatus(
    *("box", "running", 7, 40222, 4, 2048, 1024, 40 * 2**30, 3 * 2**29, "i", "d", 2**30),
    restored=True,
    folder=Path("/x"),
)
ROUND = Round(
    1000.0,
    (
        Reading(BUSY, 187.0, 153.4, Usage(2, 0.5, 1000, 300, 9 * 2**27, 61.5)),
        Reading(MachineStatus("hung", "broken"), None, None, None),
    ),
)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Record:
    """What was asked to be watched; the view ends with Ctrl-C after three rounds, its end is noted too."""
    calls: Record = []

    def fake(name: str | None, home: Home, delay_s: float) -> Iterator[Round]:
        calls.append((name, delay_s))
        try:
            yield from (ROUND, ROUND, ROUND)
            raise KeyboardInterrupt
        finally:
            calls.append(("closed",))

    monkeypatch.setattr(watch, "watch", fake)
    return calls


def test_top_shows_a_round_after_the_other_until_ctrl_c(watched: Record, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["top"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[:3] == [
        list(top.COLUMNS),
        ["box", "restored", "2/4", "153%", "0.50", "300M/1.0G", "1.0G", "1.1G/1.5G/40G", "3m07s", "40222"],
        ["hung", "broken", "-/-", "-", "-", "-/-", "-", "-/-/-", "-", "-"],
    ]
    assert lines == lines[:3] * 3
    assert watched == [(None, 2.0), ("closed",)]


def test_top_ends_after_so_many_rounds(watched: Record, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["top", "box", "-n", "2", "-d", "0.5", "--json"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    told = json.loads(first)
    assert told["at"] == 1000
    box, hung = told["machines"]
    assert (box["name"], box["ssh_port"], box["cpu_percent"], box["guest"]["cpus_online"]) == ("box", 40222, 153.4, 2)
    assert (hung["state"], hung["guest"]) == ("broken", None)
    assert watched == [("box", 0.5), ("closed",)]


@pytest.mark.parametrize(
    "argv", [["-d", "0"], ["-d", "nan"], ["-d", "inf"], ["-n", "-1"], ["a", "--name", "b"]], ids=str
)
def test_a_view_that_cannot_be_is_refused(watched: Record, argv: list[str]) -> None:
    assert run(["top", *argv]) == 2
    assert watched == []


def test_top_of_all_is_not_of_the_machine_in_the_environment(watched: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMBUILD_NAME", "box")
    assert run(["top", "-n", "1"]) == 0
    assert run(["top", "-n", "1", "--name", "other"]) == 0
    assert [call[0] for call in watched] == [None, "closed", "other", "closed"]


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.9, "0m00s"), (187, "3m07s"), (7_384, "2h03m"), (190_000, "2d04h"), (None, None)]
)
def test_times_in_a_narrow_column(seconds: float | None, shown: str | None) -> None:
    assert top._span(seconds) == shown


@pytest.mark.parametrize(
    ("size", "shown"), [(0, "0B"), (9 * 2**20, "9.0M"), (2**30 - 1, "1024M"), (40 * 2**30, "40G"), (None, None)]
)
def test_sizes_in_a_narrow_column(size: int | None, shown: str | None) -> None:
    assert top._short(size) == shown
