"""What is done with a machine that is there: every command is one function here, its steps in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress

from vmbuild import dockerhost
from vmbuild.deadline import Deadline
from vmbuild.errors import GuestError, MachineError, SuspendedError, UsageError
from vmbuild.guest import ready, resources, terminal
from vmbuild.machine import lifetime, serial, suspension
from vmbuild.machine.files import MachineFiles
from vmbuild.machine.resources import CLOSE_ENOUGH_MIB, LEAST_MEMORY_MIB, grow_disk, set_memory
from vmbuild.machine.suspension import Suspension
from vmbuild.model import MIB, Home, MachineRequest, MachineStatus, format_size
from vmbuild.reach import at_rest, check_state, connect, existing, running_session
from vmbuild.report import Reporter
from vmbuild.start import open_session

POWER_OFF_S = 60.0
"""How long a guest may take to power off: Docker alone has ten seconds, on a busy host more."""

SAVE_S = 1800.0
"""How long saving a machine's memory may take: as long as the host's disk needs."""

USAGE_S = 5.0
"""How long a guest may take to let us in that is only asked how it does."""

RESIZE_S = 10.0
"""How long a guest may take to give memory back before the user is told that it does not."""

LOG_IN_S = 20.0
"""How long a guest that is asked to power off may take to let us in."""


def up(request: MachineRequest, home: Home, report: Reporter) -> MachineStatus:
    """Start the machine, or find it running; return when Docker answers."""
    with open_session(request, home, report):
        return status(request.name, home)


def run_in_guest(
    name: str, argv: Sequence[str], home: Home, *, interactive: bool = True, has_terminal: bool | None = None
) -> int:
    """Run a command in the guest on this process's terminal or pipes, or a shell; return its exit code.

    `has_terminal` gives it a terminal, None: where this process has one; `interactive` passes standard input on.
    """
    with running_session(name, home) as session:
        return terminal.attach(session, argv, interactive=interactive, has_terminal=has_terminal)


def place_command(argv: Sequence[str], folder: str, variables: Sequence[str]) -> list[str]:
    """Return an argv that runs another in a folder of the guest, with variables (KEY=VALUE) set."""
    return terminal.place_command(argv, folder, variables)


def down(name: str, home: Home, report: Reporter) -> bool:
    """Stop the machine, keeping its disk; tell whether it ran."""
    files = existing(name, home)
    with lifetime.lock(files, report):
        state = lifetime.status(files).state
        if state == "suspended":
            report.step(f"Giving up what ran in the suspended machine {name}")
            suspension.discard(files)
            return True
        if state == "stopped":
            return False
        report.step(f"Stopping the machine {name}")
        lifetime.stop(files, Deadline.after(POWER_OFF_S), ask=lambda limit: _power_off(files, limit))
        suspension.discard(files)  # of one whose suspending was cut short
        return True


def suspend(name: str, home: Home, report: Reporter) -> Suspension:
    """Save the machine as it is, a build in it or not, and end it: it takes no CPU time and no memory.

    Raises MachineError when it does not run, HostError when the host's disk is full; it then goes on.
    """
    files = existing(name, home)
    with lifetime.lock(files, report):
        if (found := suspension.find(files)) is not None and lifetime.status(files).state in ("suspended", "paused"):
            lifetime.stop(files, Deadline.after(0))  # of one whose suspending was cut short behind the note
            return found
        report.step(f"Suspending the machine {name}")
        return lifetime.suspend(files, Deadline.after(SAVE_S))


def _power_off(files: MachineFiles, deadline: Deadline) -> None:
    """Ask the guest to power off. Raises MachineError or GuestError when it cannot be asked."""
    session = ready.connect_when_up(
        lambda limit: connect(files, limit), lambda: lifetime.check_running(files), Deadline.after(LOG_IN_S)
    )
    try:
        with suppress(GuestError):  # the answer may be lost with the connection
            session.run(["poweroff"], deadline=deadline)
    finally:
        session.close()


def exists(name: str, home: Home) -> bool:
    """Tell whether there is a machine by this name."""
    return MachineFiles.at(home.state, name).folder.exists()


def destroy(name: str, home: Home, report: Reporter) -> bool:
    """Stop the machine without asking and delete its folder: disk, keys, logs. Tell whether there was one."""
    if not exists(name, home):
        return False
    files = MachineFiles.at(home.state, name)
    with lifetime.lock(files, report):
        if not files.folder.exists():  # another destroy was first
            return False
        report.step(f"Destroying the machine {name}")
        lifetime.stop(files, Deadline.after(0))
        dockerhost.forget(files)
        lifetime.destroy(files)
    return True


def status(name: str, home: Home) -> MachineStatus:
    """Return what the machine is now. Raises UsageError when there is none by this name."""
    return lifetime.status(existing(name, home))


def usage(name: str, home: Home) -> resources.Usage | None:
    """Return what the machine's guest uses now, None when it does not run or does not answer."""
    try:
        with running_session(name, home, USAGE_S) as session:
            return resources.read_usage(session)
    except (MachineError, GuestError, SuspendedError):
        return None


def resize(
    name: str, home: Home, report: Reporter, *, cpus: int | None, memory_mib: int | None, disk_bytes: int | None
) -> None:
    """Change a running machine's CPUs, memory and disk. Raises UsageError for what it cannot become while it runs."""
    files = at_rest(name, home)
    lifetime.check_running(files)
    now = lifetime.status(files)
    _check_size(now, cpus, memory_mib)
    if disk_bytes is not None:
        lifetime.check_disk(files, disk_bytes)
    check_state(files, now)
    if memory_mib is not None:  # by the balloon, so without logging in, which is slow in a guest that is busy
        report.step(f"Setting the memory to {format_size(memory_mib * MIB)}")
        has = set_memory(files, memory_mib, Deadline.after(RESIZE_S))
        if has > memory_mib + CLOSE_ENOUGH_MIB:
            report.warn(f"the guest uses more: it has {format_size(has * MIB)} now, and gives back what it can")
    if cpus is None and disk_bytes is None:
        return
    with running_session(name, home) as session:
        if cpus is not None:
            report.step(f"Setting the CPUs to {cpus}")
            resources.set_cpus(session, cpus)
        if disk_bytes is not None:
            report.step(f"Growing the disk to {format_size(disk_bytes)}")
            grow_disk(files, disk_bytes)
            resources.grow_file_system(session)


def _check_size(now: MachineStatus, cpus: int | None, memory_mib: int | None) -> None:
    most = format_size((now.memory_mib or 0) * MIB)
    again = f"For more: `vmbuild down {now.name}`, then `vmbuild up --name {now.name}` with another"
    if cpus is not None and not 1 <= cpus <= (now.cpus or 1):
        raise UsageError(f"the machine {now.name} can have 1 to {now.cpus} CPUs", resolution=f"{again} --cpus.")
    if memory_mib is not None and not LEAST_MEMORY_MIB <= memory_mib <= (now.memory_mib or 0):
        raise UsageError(
            f"the machine {now.name} can have {LEAST_MEMORY_MIB} MiB to {most} of memory",
            resolution=f"{again} --memory.",
        )


def trim(name: str, home: Home) -> int:
    """Give the host back what the machine's disk does not use any more; return the bytes that were freed."""
    before = status(name, home).disk_actual_bytes or 0
    with running_session(name, home) as session:
        resources.trim(session)
    return max(0, before - (status(name, home).disk_actual_bytes or 0))


def list_machines(home: Home) -> list[MachineStatus]:
    """Return every machine of this user."""
    return lifetime.list_machines(home.state)


def console(name: str, home: Home, report: Reporter) -> None:
    """Connect this terminal to the machine's serial console."""
    files = at_rest(name, home)
    lifetime.check_alive(files)
    report.step("Connecting to the serial console; Ctrl-] detaches")
    serial.attach_console(files.console)


def logs(name: str, home: Home, lines: int, follow: bool) -> Iterator[str]:
    """Yield the last lines of the console's log, then, with `follow`, each new one."""
    return serial.follow(existing(name, home).console_log, lines, follow)
