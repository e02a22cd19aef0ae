"""A machine's raw drives without a machine: the guest's scripts run here, on the files themselves."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.unit.guest.fakes import HostSession
from vmbuild.guest import channel
from vmbuild.guest.channel import Channel
from vmbuild.guest.transfer import TAR
from vmbuild.model import MIB

needs_tools = pytest.mark.skipif(
    not (Path(TAR).exists() and shutil.which("zstd")), reason="GNU tar and zstd, which the guest has, are not here"
)


class DriveSession(HostSession):
    """Runs the programs on this host, where a folder holds what are the guest's drives."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._drives = f'drive() {{ [ -e "{folder}/$1.raw" ] && echo "{folder}/$1.raw"; }}\n'

    def run(self, argv: Sequence[str], **options: Any) -> int:
        return super().run([word.replace(channel.FIND, self._drives) for word in argv], **options)


def make_channel(folder: Path, size_bytes: int = 64 * MIB) -> Channel:
    """Return a channel whose drives are in a folder, empty; without drives when the size is 0."""
    folder.mkdir(parents=True, exist_ok=True)
    made = Channel(folder / "inbox.raw", folder / "outbox.raw", folder / "lock")
    for path in (made.inbox, made.outbox) if size_bytes else ():
        with path.open("wb") as box:
            box.truncate(size_bytes)
    return made
