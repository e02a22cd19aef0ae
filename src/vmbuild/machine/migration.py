"""A machine's memory and devices -> a file, and back: QEMU's migration, with a file in the place of another host.

Source: QEMU, docs/devel/migration/mapped-ram.rst and qapi/migration.json.
"""

from __future__ import annotations

import os
from pathlib import Path

from vmbuild.deadline import Deadline
from vmbuild.errors import HostError, MachineError
from vmbuild.machine.qmp import Qmp

CHANNELS = 2
"""Threads that carry memory pages, beside the one that carries the devices."""

SAVED_S, LOADED_S = 0.02, 0.005
"""Pauses between two questions. A start reads its snapshot in a tenth of a second; a saving takes longer."""

NO_LIMIT = 1 << 40
"""Bytes a second; QEMU's default of 128 MiB a second is meant for a network."""

FAST = ("mapped-ram", "multifd")
"""Each page at its own place in a sparse file, many at a time (QEMU 9.0). Without: one plain stream."""

NEWER = "Install QEMU 9.0 or newer."

UNDER_WAY = ("setup", "active", "device", "pre-switchover", "cancelling")
"""The states (MigrationStatus in qapi/migration.json) of a saving that has not ended."""


def save(qmp: Qmp, path: Path, deadline: Deadline) -> bool:
    """Pause the machine and write its state to a file; tell whether the fast way. It stays paused until `cont`.

    Raises MachineError when QEMU cannot, HostError when the file cannot be written.
    """
    qmp.execute("stop")
    fast = _prepare(qmp)
    _go(qmp, "migrate", path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, fast)
    _wait(qmp, deadline, "saved")
    return fast


def load(qmp: Qmp, path: Path, deadline: Deadline, *, fast: bool | None) -> None:
    """Give a machine that was started with `-incoming defer` the state in a file. It goes on with `cont`.

    `fast` tells how it was saved; None: as this QEMU would. Raises MachineError when the state does not fit, is
    damaged, or is not there.
    """
    fast = _prepare(qmp, fast)
    try:
        _go(qmp, "migrate-incoming", path, os.O_RDONLY, fast)
    except HostError as error:
        raise MachineError(error.brief) from error
    _wait(qmp, deadline, "restored", LOADED_S)


def give_up(qmp: Qmp, patience: Deadline, deadline: Deadline) -> None:
    """See a saving end that nobody wants any more, so that the machine may go on. Harmless when there is none.

    One that is cancelled kills QEMU 10.0 now and then, and the machine with it (seen: 3 of 70); so that is only
    done to one that does not end by itself in time.
    """
    while qmp.execute("query-migrate").get("status", "none") in UNDER_WAY and not deadline.passed:
        if patience.passed:
            qmp.execute("migrate_cancel")
        deadline.sleep(0.05)


def _prepare(qmp: Qmp, fast: bool | None = None) -> bool:
    """Set QEMU's migration up, the fast way where it has it and nothing else is wanted; tell which way."""
    known = {each["capability"] for each in qmp.execute("query-migrate-capabilities")}
    if fast and not known.issuperset(FAST):
        raise MachineError("the state was saved by a newer QEMU: this one has no mapped-ram", resolution=NEWER)
    if fast is None:
        fast = known.issuperset(FAST)
    if fast:
        capabilities = [{"capability": name, "state": True} for name in FAST]
        qmp.execute("migrate-set-capabilities", capabilities=capabilities)
        qmp.execute("migrate-set-parameters", **{"multifd-channels": CHANNELS})
    qmp.execute("migrate-set-parameters", **{"max-bandwidth": NO_LIMIT})
    return fast


def _go(qmp: Qmp, command: str, path: Path, flags: int, fast: bool) -> None:
    """Start. Only the fast way takes a file's name in every QEMU that has it; an open file goes with all."""
    try:
        handle = os.open(path, flags | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise HostError(f"cannot open {path}: {error.strerror}") from error
    try:
        if fast:
            qmp.execute(command, uri=f"file:{path}")
        else:
            qmp.send_file("state", handle)
            qmp.execute(command, uri="fd:state")
    finally:
        os.close(handle)


def _wait(qmp: Qmp, deadline: Deadline, what: str, pause_s: float = SAVED_S) -> None:
    while True:
        found = qmp.execute("query-migrate")
        status = found.get("status", "none")
        if status == "completed":
            return
        if status in ("failed", "cancelled"):
            raise MachineError(f"the machine's state could not be {what}", details=str(found.get("error-desc", "")))
        deadline.sleep(pause_s)
        if deadline.passed:  # QEMU is not asked again: it could not answer in time either
            raise MachineError(f"the machine's state was not {what} in time")
