"""The recipe of a renewal: a machine that nobody uses goes on in a new QEMU, which has translated nothing yet.

QEMU gives the host back what its guest does not use, but never the code that it has translated for it: after a large
build that is a third of what it holds. The guest stands still for a few seconds and notices nothing but the time. Who
is connected to it would be cut off: then it is not done. A build that nobody follows goes on.
"""

from __future__ import annotations

import os

from vmbuild import process, record, start
from vmbuild.deadline import Deadline
from vmbuild.errors import MachineError
from vmbuild.guest import resources
from vmbuild.lock import attempt
from vmbuild.machine import lifetime, ports
from vmbuild.machine.files import MachineFiles
from vmbuild.machine.qmp import Qmp
from vmbuild.machine.resources import translated_bytes
from vmbuild.machine.serial import is_attached
from vmbuild.model import GIB, MIB, Freed, Home
from vmbuild.reach import at_rest, existing, running_session
from vmbuild.report import Reporter, SilentReporter

WORTH_BYTES = 64 * MIB
"""With less translated code a machine is left alone: the next build would only have to translate it again."""

LARGE_BYTES = GIB
"""A QEMU that never held as much has had small builds, which begin sooner with what is there: it is left alone."""

LOOK_S = 4.0
"""How long at a time a machine is watched: it is idle when its guest did next to nothing in all of it."""

IDLE = 0.5
"""Of one CPU: a guest with nothing to do uses a tenth, on a host with much to do more."""

PATIENCE_S = 300.0
"""How long a machine may take to become idle; after that the next build sees to it."""

LEAVE_S = 5.0
"""How long a connection may still be seen that has ended."""

ANSWER_S = 10.0
SAVE_S = 600.0
WAKE_S = 120.0


def trim_memory(name: str, home: Home, report: Reporter) -> Freed:
    """Give the host back the memory that a machine can do without: cached files, and QEMU's translated code.

    Raises MachineError when it does not run, or somebody uses it.
    """
    files = at_rest(name, home)
    before = _rss_bytes(files)
    report.step(f"Looking who uses the machine {name}")
    _refuse(files, _wait_unused(files, Deadline.after(LEAVE_S)))
    report.step("Giving back what the guest keeps of files")
    with running_session(name, home) as session:
        resources.drop_cache(session)
    with lifetime.lock(files, report):
        report.step(f"Going on with the machine {name} in a new QEMU")
        _refuse(files, _wait_unused(files, Deadline.after(LEAVE_S)) or renew(files, home))
    return Freed("memory", name, max(0, before - _rss_bytes(files)))


def _rss_bytes(files: MachineFiles) -> int:
    lifetime.check_running(files)
    return lifetime.status(files).rss_bytes or 0


def _refuse(files: MachineFiles, user: str) -> None:
    if user:
        raise MachineError(
            f"the machine {files.name} is used by {user}, which would be cut off",
            resolution="End that first; `vmbuild env --unset` closes a Docker socket of this host.",
        )


def _wait_unused(files: MachineFiles, limit: Deadline) -> str:
    while True:
        with Qmp(files.qmp, Deadline.after(ANSWER_S)) as qmp:
            user = _user(qmp, qmp.hmp("info usernet"))
        if not user or limit.passed:
            return user
        limit.sleep(0.1)


def _user(qmp: Qmp, usernet: str) -> str:
    """Return who uses a machine, its `info usernet` given, to be read after `used by`; empty when nobody does."""
    if is_attached(qmp):
        return "a terminal on its console"
    count = ports.count_connections(usernet)
    return f"{count} network connection{'s' if count > 1 else ''}" if count else ""


def renew(files: MachineFiles, home: Home) -> str:
    """Let a machine go on in a new QEMU; return who uses it when somebody does, and leave it alone then.

    The caller holds its lock. Raises MachineError or HostError: it then runs on, or is suspended.
    """
    spec, qemu = start.fit_again(files, home)
    with Qmp(files.qmp, Deadline.after(ANSWER_S)) as monitor:
        user = "something that was not found out"
        try:
            monitor.execute("stop")
            usernet = monitor.hmp("info usernet")  # asked when the guest can begin nothing any more
            forwards, user = ports.parse_forwards(usernet), _user(monitor, usernet)
        finally:
            if user:
                monitor.execute("cont")
    if user:
        return user
    kept = lifetime.suspend(files, Deadline.after(SAVE_S))
    start.wake(kept, spec, qemu, files, Deadline.after(WAKE_S), SilentReporter(), forwards).close()
    return ""


def start_later(files: MachineFiles, home: Home) -> None:
    """Have a machine renewed when it is idle, in the background, where that gives much memory back.

    Not where it may remember a build's secrets: for a moment its memory is a file of this host.
    """
    if record.had_secrets(files.builds):
        return
    env = {**os.environ, "VMBUILD_CACHE_DIR": str(home.cache), "VMBUILD_STATE_DIR": str(home.state)}
    start.begin_later(
        ["trim", files.name, "--memory", "--when-idle"], files.renewal_log, env, lambda: _is_worth_it(files)
    )


def _is_worth_it(files: MachineFiles) -> bool:
    pid = lifetime.find_pid(files)
    if pid is None or (process.peak_rss_bytes(pid) or 0) < LARGE_BYTES:
        return False
    with Qmp(files.qmp, Deadline.after(ANSWER_S)) as qmp:
        return translated_bytes(qmp) >= WORTH_BYTES


def renew_when_idle(name: str, home: Home) -> bool:
    """Renew a machine as soon as nobody uses it; tell whether it was: not where that gives little back, or takes long.

    Raises MachineError or HostError.
    """
    files = existing(name, home)
    limit = Deadline.after(PATIENCE_S)
    while not limit.passed and _is_worth_it(files) and not record.had_secrets(files.builds):
        if not _is_idle(files) or _wait_unused(files, Deadline.after(0)):
            continue
        with running_session(name, home) as session:
            resources.drop_cache(session)
        if not _is_idle(files):
            continue
        with attempt(files.lock) as is_ours:
            if is_ours and not renew(files, home):
                return True
    return False


def _is_idle(files: MachineFiles) -> bool:
    """Watch a machine for a while; tell whether its guest did next to nothing. Raises MachineError once it is gone."""
    pid = lifetime.find_pid(files)
    before = pid and process.cpu_seconds(pid)
    if pid is None or process.wait_gone(pid, Deadline.after(LOOK_S)):
        raise MachineError(f"the machine {files.name} is not running")
    after = process.cpu_seconds(pid)
    return before is not None and after is not None and after - before <= IDLE * LOOK_S
