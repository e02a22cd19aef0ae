"""Container images into an engine of the host: Docker, Podman or containerd, whichever answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import IO

from vmbuild import process
from vmbuild.deadline import Deadline
from vmbuild.errors import DeliveryError, HostError, UsageError
from vmbuild.outputs import ANY_ENGINE

PROBE_S = 30.0


@dataclass(frozen=True)
class Engine:
    """A program of the host that takes container images: how it tells that it works, and how it loads an archive.

    `has_indexes` is a question whose answer has a word in it when the engine keeps several platforms under one name;
    None of them: it always does.
    """

    program: str
    probe: tuple[str, ...]
    load: tuple[str, ...]
    has_indexes: tuple[tuple[str, ...], str] | None


ROWS = {
    row.program: row
    for row in (
        Engine(
            "docker",
            ("version", "--format", "{{.Server.Version}}"),
            ("load",),
            (("info", "--format", "{{.DriverStatus}}"), "io.containerd.snapshotter"),
        ),
        Engine("podman", ("info", "--format", "{{.Version.Version}}"), ("load",), (("--version",), "never")),
        Engine("nerdctl", ("info", "--format", "{{.ServerVersion}}"), ("load", "--all-platforms"), None),
        Engine("ctr", ("version",), ("images", "import", "--all-platforms", "-"), None),
    )
}
"""The engines, in the order in which they are asked. Source: their manuals; moby, daemon/info.go (DriverStatus)."""


def choose(dest: str, platforms: int) -> Engine:
    """Return the engine that takes a container image of so many platforms.

    Raises DeliveryError when none answers, UsageError when it cannot keep several platforms.
    """
    wanted = list(ROWS) if dest == ANY_ENGINE else [dest]
    failures = []
    for name in wanted:
        try:
            process.run([name, *ROWS[name].probe], deadline=Deadline.after(PROBE_S))
        except HostError as error:
            failures.append(f"{name}: {error.brief}\n{error.details}".strip())
            continue
        _check_platforms(ROWS[name], platforms)
        return ROWS[name]
    raise DeliveryError(
        f"nothing answers on this host that could load the container image ({', '.join(wanted)})",
        details="\n".join(failures),
        resolution="Start one of them, or write an archive with -o FILE.",
    )


def _check_platforms(engine: Engine, platforms: int) -> None:
    if platforms < 2 or engine.has_indexes is None:
        return
    question, word = engine.has_indexes
    answer = process.run([engine.program, *question], deadline=Deadline.after(PROBE_S))
    if word.encode() not in answer:
        raise UsageError(
            f"{engine.program} on this host keeps one platform for each name, and {platforms} are asked for",
            resolution="Build one platform with --load, or write an archive with -o FILE.",
        )


def load(engine: Engine, write: Callable[[IO[bytes]], int]) -> int:
    """Load an archive that is written to a pipe; return its bytes. Raises DeliveryError."""
    size = 0
    try:
        with process.feed([engine.program, *engine.load]) as pipe:
            size = write(pipe)
    except process.CommandError as error:
        raise DeliveryError(f"{engine.program} did not load the container image", details=error.details) from error
    return size
