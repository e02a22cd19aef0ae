"""Container images into a board's Docker, over the system's own `ssh`, from where a broken transfer stopped."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vmbuild import process
from vmbuild.deadline import Deadline
from vmbuild.errors import DeliveryError, HostError, UsageError
from vmbuild.model import MIB
from vmbuild.outputs import board_of
from vmbuild.report import Meter

RUNS = {
    **dict.fromkeys(("aarch64", "arm64"), ("linux/arm64", "linux/arm/v7", "linux/arm/v6")),
    **dict.fromkeys(("armv8l", "armv7l"), ("linux/arm/v7", "linux/arm/v6")),
    "armv6l": ("linux/arm/v6",),
}
"""The platforms that a board runs, by what its `uname -m` says, the best first."""

PIECE_BYTES = MIB
CHUNK_BYTES = 256 * 1024
TRIES = 5
BACKOFF_S = 1.0
CONNECTION_BROKE = 255
"""ssh's own exit code. Source: ssh(1)."""

DAMAGED = 65
CUT_SHORT = 66
DOCKER = "docker version --format '{{.Server.Version}}' >/dev/null"
FOLDER = 'd=$HOME/.cache/vmbuild; mkdir -p "$d" && chmod 700 "$d"'

ASK = f"""{FOLDER} && uname -m && {{ [ ! -e "$d/$1" ] || wc -c <"$d/$1"; }}"""
# What arrives twice lands in the same place: a connection that seemed broken may still have had bytes on the way.
TAKE = f"""{FOLDER} && f=$d/$1 && dd ibs=65536 obs={PIECE_BYTES} seek="$2" conv=notrunc of="$f" || exit
[ "$(wc -c <"$f")" -ge "$3" ] || exit {CUT_SHORT}
[ "$(sha256sum <"$f" | cut -c 1-64)" = "$1" ] || {{ rm -f "$f"; exit {DAMAGED}; }}
docker load <"$f" || exit
rm -f "$f" """


@dataclass(frozen=True)
class Board:
    """A board that is reached as `ssh://[USER@]HOST[:PORT]`, and the platforms that it runs, the best first."""

    address: str
    platforms: tuple[str, ...] = ()

    def argv(self, script: str, *words: str) -> list[str]:
        """Return the argv that runs a shell script on the board."""
        found = board_of(self.address)
        assert found is not None  # noqa: S101 - outputs.check_engine has seen it
        target, port = found
        options = ["-o", "ServerAliveInterval=15", "-o", "ConnectTimeout=20", *(["-p", port] if port else [])]
        return ["ssh", *options, "--", target, shlex.join(["sh", "-c", script, "vmbuild", *words])]


def check(address: str, platforms: Sequence[str]) -> None:
    """See that a board can be reached, has Docker, and runs one of these platforms.

    Raises DeliveryError, or UsageError when it runs none of them.
    """
    words = _run(Board(address), f"uname -m; {DOCKER}").split()
    choose_platform(address, words[0] if words else "", platforms)


def choose_platform(address: str, machine: str, platforms: Sequence[str]) -> str:
    """Return the platform that a board runs best, by what its `uname -m` says. Raises UsageError when it runs none."""
    for name in RUNS.get(machine, ()):
        if name in platforms:
            return name
    raise UsageError(
        f"{address} is {machine or 'nothing known'}, which does not run {', '.join(platforms)}",
        resolution="Build for the board's platform with --platform.",
    )


@dataclass(frozen=True)
class Parcel:
    """A docker archive that lies on the host, by the hexadecimal part of its SHA-256."""

    path: Path
    digest: str
    size: int


def ask_machine(address: str) -> str:
    """Return what a board's `uname -m` says. Raises DeliveryError."""
    return _run(Board(address), "uname -m").strip()


def load(address: str, parcel: Parcel, meter: Meter) -> None:
    """Send an archive to a board and load it there. Raises DeliveryError.

    What arrives is kept on the board until it is loaded, under the archive's digest: this and the next command go on
    where one before was interrupted.
    """
    board, progress = Board(address), _Progress(meter)
    failed = furthest = 0
    while True:
        try:
            begin = _ask_how_far(board, parcel)
            failed, furthest = (0, begin) if begin > furthest else (failed, furthest)
            return _send(board, parcel, begin, progress)
        except _Interrupted as error:
            failed += 1
            if failed >= TRIES:
                raise _failed(board, error.cause) from error
            Deadline.after(BACKOFF_S * 2**failed).sleep(BACKOFF_S * 2**failed)


class _Progress:
    """Moves a meter by how far a transfer is; what is sent again moves it once."""

    def __init__(self, meter: Meter) -> None:
        self._meter, self._shown = meter, 0

    def reach(self, position: int) -> None:
        if position > self._shown:
            self._meter.advance(position - self._shown)
            self._shown = position


class _Interrupted(Exception):
    def __init__(self, cause: process.CommandError) -> None:
        super().__init__(cause.brief)
        self.cause = cause


def _ask_how_far(board: Board, parcel: Parcel) -> int:
    """Return from where on the board misses the archive: a whole number of pieces, as `dd` counts them."""
    try:
        words = process.run(board.argv(ASK, parcel.digest)).split()
    except process.CommandError as error:
        raise _judge(board, error) from error
    has = int(words[1]) if len(words) > 1 and words[1].isdigit() else 0
    return 0 if has > parcel.size else has // PIECE_BYTES * PIECE_BYTES


def _send(board: Board, parcel: Parcel, begin: int, progress: _Progress) -> None:
    try:
        with (
            process.feed(board.argv(TAKE, parcel.digest, str(begin // PIECE_BYTES), str(parcel.size))) as pipe,
            parcel.path.open("rb") as file,
        ):
            file.seek(begin)
            while data := file.read(CHUNK_BYTES):
                pipe.write(data)
                progress.reach(file.tell())
    except process.CommandError as error:
        raise _judge(board, error) from error


def _judge(board: Board, error: process.CommandError) -> Exception:
    """Return what a failure means: one that another try may mend, or one for good."""
    if error.code in (CONNECTION_BROKE, DAMAGED, CUT_SHORT) and not re.search(
        r"Permission denied|Host key verification|Could not resolve|REMOTE HOST IDENTIFICATION", error.output
    ):
        return _Interrupted(error)
    return _failed(board, error)


def _run(board: Board, script: str) -> str:
    try:
        return process.run(board.argv(script)).decode(errors="replace")
    except process.CommandError as error:
        raise _failed(board, error) from error


def _failed(board: Board, error: HostError) -> DeliveryError:
    target, port = board_of(board.address) or ("", "")
    command = shlex.join(["ssh", *(["-p", port] if port else []), target, "docker", "version"])
    return DeliveryError(
        f"{board.address} did not take the container image", details=error.details, resolution=f"Try `{command}`."
    )
