"""One run: a program from its start to its end, every line with its time, and what it took of the host."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from vmbuild import process
from vmbuild.bench.phases import Line, read_words
from vmbuild.bench.sampler import Sampler, Taken
from vmbuild.errors import BuildError

TAIL_LINES = 40


@dataclass(frozen=True)
class Measured:
    """A run that ended well: when it began and ended, in POSIX seconds, what it wrote and what it took."""

    begun: float
    ended: float
    lines: tuple[Line, ...]
    taken: Taken


@dataclass(frozen=True)
class Command:
    """A program to measure. `apart` are processes of the run that are not its children.

    When it writes the line `ready`, `on_ready` is called with its process id, and it is told to go on.
    """

    argv: Sequence[str]
    env: Mapping[str, str] | None = None
    apart: Callable[[], Iterable[int]] = tuple
    ready: str | None = None
    on_ready: Callable[[int], None] = lambda _: None


class RunFailedError(BuildError):
    """A program that was measured failed, after so many seconds and with these last lines."""

    def __init__(self, command: Command, code: int, seconds: float, lines: Sequence[Line]) -> None:
        self.seconds = seconds
        self.words = tuple(line[:400] for line in list(read_words(lines))[-TAIL_LINES:])
        super().__init__(
            f"a run of the comparison failed with exit code {code}",
            details="\n".join([f"$ {command.argv[0]} ...", *self.words]),
        )


def measure(command: Command) -> Measured:
    """Run a program and measure it. Raises RunFailedError when it fails."""
    sampler = Sampler(command.apart)
    begun = time.time()
    lines: list[Line] = []
    with process.talking(command.argv, env=command.env) as talk:
        sampler.start(talk.pid)
        for text in talk.lines():
            if text == command.ready:
                command.on_ready(talk.pid)
                talk.say("go")
            else:
                lines.append(Line(time.time(), text))
        code = talk.wait()
        ended = time.time()
        taken = sampler.stop()
    if code != 0:
        raise RunFailedError(command, code, ended - begun, lines)
    return Measured(begun, ended, tuple(lines), taken)
