"""Sessions without a machine: one that answers from a table, one that runs commands on this host."""

from __future__ import annotations

import io
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vmbuild.deadline import NEVER, Deadline
from vmbuild.guest.session import Feed, Output, Tick


@dataclass(frozen=True)
class Reply:
    """What a program in the guest answers; `error` is raised instead."""

    code: int = 0
    stdout: bytes = b""
    stderr: bytes = b""
    error: BaseException | None = None


@dataclass(frozen=True)
class Call:
    """One program that was asked for, and all that was fed to it."""

    argv: tuple[str, ...]
    stdin: bytes
    terminal: tuple[int, int] | None
    deadline: Deadline


class FakeSession:
    """Answers each argv with the first row of its table whose words begin it; nothing fits: a test that is wrong."""

    def __init__(self, *table: tuple[tuple[str, ...], Reply]) -> None:
        self.table = table
        self.calls: list[Call] = []
        self.closed = 0
        self.reopened = 0

    def run(
        self,
        argv: Sequence[str],
        *,
        feed: Feed | None = None,
        on_stdout: Output | None = None,
        on_stderr: Output | None = None,
        terminal: tuple[int, int] | None = None,
        deadline: Deadline = NEVER,
        on_tick: Tick | None = None,
    ) -> int:
        stdin = io.BytesIO()
        if feed is not None:
            feed(stdin)
        self.calls.append(Call(tuple(argv), stdin.getvalue(), terminal, deadline))
        if on_tick is not None:
            on_tick()
        for words, reply in self.table:
            if tuple(argv[: len(words)]) == words:
                if reply.error is not None:
                    raise reply.error
                _say(on_stdout, reply.stdout)
                _say(on_stderr, reply.stderr)
                return reply.code
        raise AssertionError(f"nobody told what {argv} answers")

    def reopen(self, deadline: Deadline) -> None:
        self.reopened += 1

    def close(self) -> None:
        self.closed += 1

    def ran(self, *words: str) -> list[Call]:
        """Return the calls whose argv begins with these words."""
        return [call for call in self.calls if call.argv[: len(words)] == words]


class HostSession(FakeSession):
    """Runs the programs on this host, so that a shell script meant for the guest meets a real shell and real tools."""

    def run(
        self,
        argv: Sequence[str],
        *,
        feed: Feed | None = None,
        on_stdout: Output | None = None,
        on_stderr: Output | None = None,
        terminal: tuple[int, int] | None = None,
        deadline: Deadline = NEVER,
        on_tick: Tick | None = None,
    ) -> int:
        stdin = io.BytesIO()
        if feed is not None:
            feed(stdin)
        self.calls.append(Call(tuple(argv), stdin.getvalue(), terminal, deadline))
        done = subprocess.run(list(argv), input=stdin.getvalue(), capture_output=True, check=False, timeout=60)
        _say(on_stdout, done.stdout)
        _say(on_stderr, done.stderr)
        return done.returncode


class CountingMeter:
    """Adds up what it is told."""

    def __init__(self) -> None:
        self.total = 0

    def advance(self, amount: int) -> None:
        self.total += amount


def _say(output: Callable[[bytes], None] | None, data: bytes) -> None:
    if output is not None and data:
        output(data)
