"""What `env`, `docker`, `exec`, `shell` and `cp` make of their words, and what shells make of theirs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import termios
import tty
from pathlib import Path
from typing import Any

import pytest

from tests.unit.guest.fakes import FakeSession, HostSession, Reply
from vmbuild import copy, dockerhost, operate
from vmbuild.cli import dockerhost as command
from vmbuild.cli.program import run
from vmbuild.copy import Place
from vmbuild.dockerhost import DockerHost
from vmbuild.guest import terminal

Record = list[tuple[tuple[Any, ...], dict[str, Any]]]
NASTY = '/tmp/it\'s a $HOME `x` \\n"q"/docker.sock'


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("CACHE", "STATE"):
        monkeypatch.setenv(f"VMBUILD_{key}_DIR", str(tmp_path / key.lower()))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("VMBUILD_NAME", raising=False)
    for name in (*command.CONTRADICTING, "DOCKER_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SHELL", "/bin/bash")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dockerhost, "open_socket", lambda name, *_: DockerHost(name, Path(NASTY)))


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Record:
    """What was run in the guest, none of it in truth."""
    calls: Record = []

    def fake(*args: Any, **options: Any) -> int:
        calls.append((args, options))
        return 42

    monkeypatch.setattr(operate, "run_in_guest", fake)
    return calls


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    assert run(["env", *argv]) == 0
    return capsys.readouterr().out


def test_a_shell_takes_it_whatever_the_path_is(capsys: pytest.CaptureFixture[str]) -> None:
    script = 'eval "$0"; printf %s "$DOCKER_HOST"; [ "$TESTCONTAINERS_DOCKER_SOCKET_OVERRIDE" = /var/run/docker.sock ]'
    done = subprocess.run(["sh", "-c", script, printed(capsys)], capture_output=True, check=True, text=True)
    assert done.stdout == f"unix://{NASTY}"


def test_a_shell_forgets_it(capsys: pytest.CaptureFixture[str]) -> None:
    script = 'DOCKER_HOST=x; eval "$0"; [ -z "${DOCKER_HOST+x}" ]'
    subprocess.run(["sh", "-c", script, printed(capsys, "--unset")], check=True)


@pytest.mark.skipif(not shutil.which("fish"), reason="no fish here")
def test_fish_takes_it(capsys: pytest.CaptureFixture[str]) -> None:
    script = f"{printed(capsys, '--shell', 'fish')}\nprintf %s $DOCKER_HOST"
    done = subprocess.run(["fish", "-N", "-c", script], capture_output=True, check=True, text=True)
    assert done.stdout == f"unix://{NASTY}"


def test_the_words_of_each_shell(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dockerhost, "open_socket", lambda name, *_: DockerHost(name, Path("/r/d.sock")))
    monkeypatch.setenv("DOCKER_CONTEXT", "other")
    monkeypatch.setenv("BUILDX_BUILDER", "another")
    assert printed(capsys).splitlines() == [
        "unset DOCKER_CONTEXT",
        "unset BUILDX_BUILDER",
        "export DOCKER_HOST=unix:///r/d.sock",
        "export TESTCONTAINERS_DOCKER_SOCKET_OVERRIDE=/var/run/docker.sock",
        "export TESTCONTAINERS_HOST_OVERRIDE=127.0.0.1",
        "export TESTCONTAINERS_CONNECTION_MODE=docker_host",
        '# eval "$(vmbuild env)"',
    ]
    assert printed(capsys, "--shell", "fish", "box").splitlines() == [
        "set -e DOCKER_CONTEXT;",
        "set -e BUILDX_BUILDER;",
        "set -gx DOCKER_HOST 'unix:///r/d.sock';",
        "set -gx TESTCONTAINERS_DOCKER_SOCKET_OVERRIDE '/var/run/docker.sock';",
        "set -gx TESTCONTAINERS_HOST_OVERRIDE '127.0.0.1';",
        "set -gx TESTCONTAINERS_CONNECTION_MODE 'docker_host';",
        "# vmbuild env box | source",
    ]
    assert printed(capsys, "--shell", "powershell").splitlines()[:3] == [
        "Remove-Item -ErrorAction Ignore Env:\\DOCKER_CONTEXT",
        "Remove-Item -ErrorAction Ignore Env:\\BUILDX_BUILDER",
        "$Env:DOCKER_HOST = 'unix:///r/d.sock'",
    ]


@pytest.mark.parametrize(
    ("shell", "word"), [("/usr/bin/fish", "set -gx"), ("/bin/zsh", "export"), ("/usr/bin/pwsh", "$Env:")]
)
def test_the_users_shell_is_taken_where_none_is_given(
    shell: str, word: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHELL", shell)
    assert word in printed(capsys)


def test_json_has_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads(printed(capsys, "--json", "--name", "box"))
    assert (told["machine"], told["socket"], told["environment"]["DOCKER_HOST"]) == ("box", NASTY, f"unix://{NASTY}")


def test_docker_passes_everything_on(ran: Record) -> None:
    assert run(["docker", "ps", "--format", "{{.ID}}"]) == 42
    assert run(["docker", "--name", "box", "--", "run", "--name", "x", "-h", "y"]) == 42
    assert [args[:2] for args, _ in ran] == [
        ("default", ["docker", "ps", "--format", "{{.ID}}"]),
        ("box", ["docker", "run", "--name", "x", "-h", "y"]),
    ]


def test_shell_is_ssh_without_a_command(ran: Record) -> None:
    assert run(["shell", "box"]) == run(["ssh", "--name", "box"]) == 42
    assert [(args[0], list(args[1])) for args, _ in ran] == [("box", []), ("box", [])]


def test_exec_says_what_it_passes_on(ran: Record) -> None:
    assert run(["exec", "ls", "-i"]) == run(["exec", "-i", "--", "cat"]) == 42
    assert run(["exec", "-t", "top"]) == 42
    assert [options for _, options in ran] == [
        {"interactive": False, "has_terminal": False},
        {"interactive": True, "has_terminal": False},
        {"interactive": False, "has_terminal": True},
    ]


@pytest.mark.parametrize(
    "argv", [["exec"], ["exec", "-e", "a b=c", "x"], ["exec", "-e", "=c", "x"], ["exec", "-e", "1a", "x"]]
)
def test_exec_refuses_what_makes_no_sense(ran: Record, argv: list[str]) -> None:
    assert run(argv) == 2
    assert ran == []


def run_placed(argv: list[str], folder: str = ".", variables: tuple[str, ...] = ()) -> tuple[int, str]:
    out = bytearray()
    code = HostSession().run(terminal.place_command(argv, folder, variables), on_stdout=out.extend)
    return code, out.decode()


def test_exec_sets_folder_and_variables(tmp_path: Path) -> None:
    folder = tmp_path / "- a 'folder'"
    folder.mkdir()
    assert run_placed(["pwd"], str(folder)) == (0, f"{folder}\n")
    code, out = run_placed(["sh", "-c", 'printf "%s|" "$A" "$B" "$@"', "-", "-", "x y"], variables=("A=1 'q'", "B="))
    assert (code, out) == (0, "1 'q'||-|x y|")


def test_exec_ends_with_dockers_codes(tmp_path: Path) -> None:
    assert run_placed(["sh", "-c", "exit 7"])[0] == 7
    assert run_placed(["there-is-no-such-program"])[0] == 127
    assert run_placed(["true"], str(tmp_path / "nothing"))[0] == 125


def test_a_bare_variable_is_the_hosts(ran: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "x=y")
    monkeypatch.delenv("NOT_SET", raising=False)
    run(["exec", "-e", "TOKEN", "-e", "NOT_SET", "-e", "C=3", "true"])
    assert ran[0][0][1] == terminal.place_command(["true"], ".", ["TOKEN=x=y", "C=3"])


def attach(monkeypatch: pytest.MonkeyPatch, is_terminal: bool, **options: Any) -> Any:
    """Return the call that `terminal.attach` makes, standard input holding a few bytes."""
    reader, writer = os.pipe()
    os.write(writer, b"input")
    os.close(writer)

    class Stdin:
        def isatty(self) -> bool:
            return is_terminal

        def fileno(self) -> int:
            return reader

    monkeypatch.setattr("sys.stdin", Stdin())
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal, raising=False)
    monkeypatch.setattr(tty, "setraw", lambda _: None)
    monkeypatch.setattr(termios, "tcgetattr", lambda _: [])
    monkeypatch.setattr(termios, "tcsetattr", lambda *_: None)
    session = FakeSession((("x",), Reply()))
    terminal.attach(session, ["x"], **options)
    os.close(reader)
    return session.calls[0]


@pytest.mark.parametrize(
    ("is_terminal", "options", "stdin", "has_terminal"),
    [
        (True, {}, b"input", True),
        (False, {}, b"input", False),
        (True, {"interactive": False, "has_terminal": False}, b"", False),
        (True, {"interactive": True, "has_terminal": False}, b"input", False),
        (False, {"interactive": False, "has_terminal": True}, b"", True),
        (True, {"interactive": True, "has_terminal": True}, b"input", True),
    ],
)
def test_what_a_program_gets_of_this_terminal(
    monkeypatch: pytest.MonkeyPatch, is_terminal: bool, options: dict[str, Any], stdin: bytes, has_terminal: bool
) -> None:
    call = attach(monkeypatch, is_terminal, **options)
    assert (call.stdin, call.terminal is not None) == (stdin, has_terminal)


def test_its_size_is_the_terminals_own_and_not_the_environments(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (30, 100))
    with monkeypatch.context() as patch, os.fdopen(master, "rb"), os.fdopen(slave, "w") as terminal_:
        patch.setattr("sys.stdout", terminal_)
        found = attach(patch, is_terminal=True).terminal
    assert found == (100, 30)
    with monkeypatch.context() as patch, (tmp_path / "out").open("w") as file:
        patch.setattr("sys.stdout", file)
        found = attach(patch, is_terminal=True).terminal
    assert found == (80, 24)


def test_cp_reads_its_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[tuple[Place, Place]] = []
    monkeypatch.setattr(copy, "copy", lambda begin, end, *_, **__: ends.append((begin, end)))
    assert run(["cp", "--name", "box", ":a", "b"]) == run(["cp", "./b", "other:c"]) == 0
    assert ends == [(Place("box", "a"), Place(None, "b")), (Place(None, "./b"), Place("other", "c"))]


def test_cp_refuses_a_machine_that_is_not_there() -> None:
    assert run(["cp", "file", "nobody:file"]) == 2
