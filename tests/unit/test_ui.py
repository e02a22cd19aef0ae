from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmbuild import ui
from vmbuild.errors import HostError
from vmbuild.model import MachineStatus


def test_a_log_shows_that_work_goes_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with ui.TerminalReporter().meter("download", 10 * 2**20) as meter:
        for _ in range(10):
            now += 2
            meter.advance(2**20)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5  # at the start, after 6, 12 and 18 seconds, and at the end
    assert lines[0] == "> download: 10.0 MiB"
    assert lines[-1] == "> download: 10.0 MiB of 10.0 MiB in 20 s, 512.0 KiB/s"


def test_quiet_leaves_only_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = ui.TerminalReporter(quiet=True)
    reporter.step("step")
    with reporter.meter("work", 1) as meter:
        meter.advance(1)
    reporter.warn("careful [x]")
    assert capsys.readouterr().err == "warning: careful [x]\n"


def test_output_passes_bytes_as_they_are(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    ui.TerminalReporter().output(b"\x1b[31m\xff[bold]\r")
    assert capfdbinary.readouterr().err == b"\x1b[31m\xff[bold]\r"


def test_values_become_plain_data(capsys: pytest.CaptureFixture[str]) -> None:
    ui.print_json([MachineStatus("m", "stopped", folder=Path("/x"))])
    assert json.loads(capsys.readouterr().out)[0]["folder"] == "/x"


def test_a_table_says_what_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    ui.print_table(("a", "b"), [("[x]", None)])
    assert capsys.readouterr().out.split() == ["a", "b", "[x]", "-"]


LONG = "/a/long/path" * 20
TRAPS = ["ends in a backslash \\", "tag:100:smile:", "\\[red]x[/]", "[/]", LONG]
"""What rich would read as markup or an emoji, or fold."""


@pytest.mark.parametrize("text", TRAPS)
def test_text_of_others_is_shown_as_it_is(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    ui.TerminalReporter().step(text)
    ui.TerminalReporter().warn(text)
    ui.say(text)
    assert capsys.readouterr().err == f"> {text}\nwarning: {text}\n{text}\n"
    ui.show_error(HostError(text, details=text, resolution=text))
    assert capsys.readouterr().err == f"error: {text}\n  {text}\n  {text}\n"


@pytest.mark.parametrize("text", TRAPS)
def test_a_pipe_gets_the_whole_table(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    ui.print_table(("a", "b"), [(text, text)])
    assert capsys.readouterr().out.splitlines()[1].split("  ") == [text, text]


def test_a_terminal_folds_what_a_table_cannot_hold(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    ui.print_table(("a", "b"), [("x", "y" * 200)])
    assert capsys.readouterr().out.count("y") == 200


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_with_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", Terminal())
    reporter = ui.TerminalReporter()
    with reporter.meter("download", 2 * 2**20) as meter:
        meter.advance(2**20)
    shown = ui.sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "download" in shown
    assert "\x1b[" in shown


def test_colour_that_is_forced_makes_no_log_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with ui.TerminalReporter().meter("download", 2**20) as meter:
        meter.advance(2**20)
    assert "\x1b[?25l" not in capsys.readouterr().err  # a bar hides the cursor


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr("sys.stderr", Terminal())
    ui.show_error(HostError("brief"))
    assert "\x1b[31m" not in ui.sys.stderr.getvalue()  # type: ignore[attr-defined]


ROUNDS: list[list[tuple[object, ...]]] = [[("box", 1)], [("box", 2), ("other", None)]]


def test_a_pipe_gets_a_table_a_round(capsys: pytest.CaptureFixture[str]) -> None:
    ui.show_rounds(("name", "n"), ROUNDS)
    words = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert words == [["name", "n"], ["box", "1"], ["name", "n"], ["box", "2"], ["other", "-"]]


def test_a_terminal_is_drawn_anew_and_keeps_the_last_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stdout", Terminal())

    def rounds() -> Iterator[list[tuple[str, int]]]:
        yield [("box", 1)]
        yield [("box", 2)]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ui.show_rounds(("name", "n"), rounds())
    shown = ui.sys.stdout.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[1A\x1b[2K" in shown  # up a line, and clear it
    assert shown.endswith("\x1b[?25h")  # the cursor is back


def test_a_dumb_terminal_is_treated_as_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr("sys.stdout", Terminal())
    ui.show_rounds(("name", "n"), ROUNDS)
    assert "\x1b[2K" not in ui.sys.stdout.getvalue()  # type: ignore[attr-defined]


def test_json_of_a_round_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    ui.print_json_line({"at": 1.5, "machines": [MachineStatus("m", "running")]})
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert out.startswith('{"at":1.5,"machines":[{"name":"m",')
