"""A machine's memory and devices -> a file, and back: QEMU's migration, with a file in the place of another host.

Source: QEMU, docs/devel/migration/mapped-ram.rst and qapi/migration.json.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from vmbuild.deadline import Deadline
from vmbuild.errors import HostError, MachineError
from vmbuild.machine.qmp import Qmp

CHANNELS = 2
"""Threads that carry memory pages, beside the one that carries the devices."""

NO_LIMIT = 1 << 40
"""Bytes a second; QEMU's default of 128 MiB a second is meant for a network."""

FAST = ("mapped-ram", "multifd")
"""Each page at its own place in a sparse file, many at a time (QEMU 9.0). Without: one plain stream."""


def save(qmp: Qmp, path: Path, deadline: Deadline) -> None:
    """Pause the machine and write its state to a file. It stays paused, and goes on with `cont`.

    Raises MachineError when QEMU cannot, HostError when the file cannot be written.
    """
    qmp.execute("stop")
    is_fast = _prepare(qmp)
    _go(qmp, "migrate", path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, is_fast)
    _wait(qmp, deadline, "saved")


def load(qmp: Qmp, path: Path, deadline: Deadline, check: Callable[[], None]) -> None:
    """Give a machine that was started with `-incoming defer` the state in a file, and let it go on.

    `check` is asked before it does, and raises when the state is not to be trusted. Raises MachineError when
    the state does not fit, is damaged, or is not there.
    """
    is_fast = _prepare(qmp)
    try:
        _go(qmp, "migrate-incoming", path, os.O_RDONLY, is_fast)
    except HostError as error:
        raise MachineError(error.brief) from error
    _wait(qmp, deadline, "restored")
    check()
    qmp.execute("cont")


def _prepare(qmp: Qmp) -> bool:
    """Set QEMU's migration up; tell whether it has the fast way."""
    known = {each["capability"] for each in qmp.execute("query-migrate-capabilities")}
    is_fast = known.issuperset(FAST)
    if is_fast:
        capabilities = [{"capability": name, "state": True} for name in FAST]
        qmp.execute("migrate-set-capabilities", capabilities=capabilities)
        qmp.execute("migrate-set-parameters", **{"multifd-channels": CHANNELS})
    qmp.execute("migrate-set-parameters", **{"max-bandwidth": NO_LIMIT})
    return is_fast


def _go(qmp: Qmp, command: str, path: Path, flags: int, is_fast: bool) -> None:
    """Start. Only the fast way takes a file's name in every QEMU that has it; an open file goes with all."""
    try:
        handle = os.open(path, flags | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise HostError(f"cannot open {path}: {error.strerror}") from error
    try:
        if is_fast:
            qmp.execute(command, uri=f"file:{path}")
        else:
            qmp.send_file("state", handle)
            qmp.execute(command, uri="fd:state")
    finally:
        os.close(handle)


def _wait(qmp: Qmp, deadline: Deadline, what: str) -> None:
    while True:
        found = qmp.execute("query-migrate")
        status = found.get("status", "none")
        if status == "completed":
            return
        if status in ("failed", "cancelled"):
            raise MachineError(f"the machine's state could not be {what}", details=str(found.get("error-desc", "")))
        if deadline.passed:
            raise MachineError(f"the machine's state was not {what} in time")
        deadline.sleep(0.02)
