from __future__ import annotations

import json
from pathlib import Path

import pytest

from vmbuild import ui
from vmbuild.model import MachineStatus


def test_a_log_shows_that_work_goes_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with ui.TerminalReporter().meter("download", 10 * 2**20) as meter:
        for _ in range(10):
            now += 2
            meter.advance(2**20)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4  # after 6, 12 and 18 seconds, and at the end
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
