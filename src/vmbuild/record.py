"""Builds that run in a guest, as the host remembers them: a machine's `vmbuild attach` goes by this."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from vmbuild.errors import UsageError
from vmbuild.outputs import Kind, Output, parse_output
from vmbuild.plain import read_plain
from vmbuild.whole import write_whole, writing_in

_FOLDER = re.compile(r"(/[a-zA-Z0-9]+)+")


@dataclass(frozen=True)
class BuildRecord:
    """A build that was started, and what its command asked to be done with what comes of it.

    `folder` is the build's workspace in the guest, `outputs` are as `outputs.parse_output` reads them. Paths are as the
    user wrote them, relative to `cwd`. `boot_s` is the guest's time since boot at its start, `started_at` is in POSIX
    seconds. No build argument is kept here, and of its secrets only that it has some. `agents` are the SSH agents that
    it was lent, as they are written on a command line; `caches` are the folders where the caches go that it makes, in
    the order of their numbers in the guest.
    """

    folder: str
    tags: tuple[str, ...]
    outputs: tuple[str, ...]
    iidfile: str | None
    metadata_file: str | None
    quiet: bool
    cwd: str
    context_bytes: int
    boot_s: float
    started_at: float
    has_secrets: bool = False
    agents: tuple[str, ...] = ()
    caches: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """What tells it from the machine's other builds."""
        return self.folder.rpartition("/")[2]

    @property
    def ways_out(self) -> tuple[Output, ...]:
        """What is to be done with the container image."""
        return tuple(map(parse_output, self.outputs))

    def place(self, path: str | None) -> Path | None:
        """Return a path of this record as this host finds it."""
        return Path(self.cwd) / path if path else None

    @classmethod
    def from_data(cls, data: object) -> BuildRecord:
        """Return the record that was written as JSON. Raises TypeError or ValueError for anything else."""
        made = read_plain(cls, _renewed(data))
        if not _FOLDER.fullmatch(made.folder):  # its end names files on this host
            raise ValueError(f"a build cannot have the folder {made.folder!r}")
        try:
            made = replace(made, outputs=tuple(each.text for each in made.ways_out))
        except UsageError as error:
            raise ValueError(error.brief) from error
        return made


def _renewed(data: object) -> object:
    """Return a record's data as this version writes it: there was one output once, an archive."""
    if not isinstance(data, dict) or "output" not in data or "outputs" in data:
        return data
    rest = {key: value for key, value in data.items() if key != "output"}
    place = data["output"]
    return {**rest, "outputs": [] if place is None else [Output(Kind.DOCKER, place).text]}


def save(builds: Path, record: BuildRecord) -> None:
    """Remember a build. Raises HostError."""
    with writing_in(builds):
        builds.mkdir(mode=0o700, exist_ok=True)
        if record.has_secrets:
            _mark(builds).touch(mode=0o600)
    write_whole(_place(builds, record), json.dumps(asdict(record)).encode(), mode=0o600)


def forget(builds: Path, record: BuildRecord) -> None:
    """Forget a build. Harmless when it is forgotten."""
    _place(builds, record).unlink(missing_ok=True)
    lock_file(builds, record).unlink(missing_ok=True)


def forget_all(builds: Path) -> None:
    """Forget every build of a machine: it is booted, and nothing of before runs in it."""
    shutil.rmtree(builds, ignore_errors=True)


def load_all(builds: Path) -> list[BuildRecord]:
    """Return the builds that are remembered, the oldest first."""
    found = []
    for path in builds.glob("[!.]*.json"):
        try:
            found.append(BuildRecord.from_data(json.loads(path.read_text())))
        except (OSError, ValueError, TypeError):  # forgotten meanwhile, or another vmbuild's
            continue
    return sorted(found, key=lambda record: record.started_at)


def had_secrets(builds: Path) -> bool:
    """Tell whether a build of a machine has had secrets since the machine was booted."""
    return _mark(builds).exists()


def lock_file(builds: Path, record: BuildRecord) -> Path:
    """Return the lock that is held by who brings the container image back."""
    return builds / f".{record.id}.lock"


def _mark(builds: Path) -> Path:
    return builds / ".had-secrets"


def _place(builds: Path, record: BuildRecord) -> Path:
    return builds / f"{record.id}.json"
