"""Start, find and stop a machine. What it is now is what its process and QMP say, never a stored flag."""

from __future__ import annotations

import shlex
import shutil
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from vmbuild import process
from vmbuild.deadline import Deadline
from vmbuild.errors import HostError, MachineError, SuspendedError, UsageError, VmbuildError
from vmbuild.lock import hold
from vmbuild.machine import control, migration, ports, resources, serial, suspension
from vmbuild.machine.argv import qemu_argv
from vmbuild.machine.facts import Facts, describe, load_facts, write_facts
from vmbuild.machine.files import MachineFiles
from vmbuild.machine.firmware import Firmware
from vmbuild.machine.probe import Qemu
from vmbuild.machine.qmp import Qmp
from vmbuild.machine.suspension import Suspension
from vmbuild.model import GIB, MIB, DiskBoot, MachineSpec, MachineStatus, arch_name, format_size
from vmbuild.report import Reporter
from vmbuild.whole import writing_in

START_S = 60.0
"""How long QEMU may take to open its monitor: it allocates and loads first."""

BOX_BYTES = 64 * GIB
"""What the drives of bulk data hold, virtually: more than a build context or a container image is."""

LOAD_S = 600.0
"""How long a saved memory may take to be read: it may be large, and the host's disk slow."""

ROOM_BYTES = 64 * MIB
"""With less on the host's disk a machine that ran out of it would only stop again."""

ANSWER_S = 10.0
"""How long a QEMU that runs may take to answer on its monitor."""

END_SAVING_S = 60.0
"""How long a saving that was given up may take to end by itself."""

ENDING_S = 10.0
"""How long a QEMU that was killed may take to give its memory back, and with it the lock on its disk."""

QUIT_S = 5.0
"""How long each rude way to end QEMU may take before a ruder one is tried."""


STATES = {"running": "running", "inmigrate": "restoring"}
"""What QEMU's run states (RunState in its qapi/run-state.json) are called here; all others are `paused`."""


def lock(files: MachineFiles, report: Reporter) -> AbstractContextManager[None]:
    """Hold a machine's lock: only one command starts or stops it at a time. Raises HostError."""
    return hold(files.lock, report, f"works on the machine {files.name}")


def prepare(spec: MachineSpec, files: MachineFiles, *, explicit_disk: bool, firmware: Firmware | None = None) -> None:
    """Make the machine's folder and disk, or grow the disk where its size was chosen. Never shrinks it.

    A machine that boots a disk needs the firmware. Raises UsageError when the disk that it has is of another kind.
    """
    with writing_in(files.folder):
        files.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _check_kind(spec, files)
        if firmware is not None and not files.variables.exists():
            part = files.variables.with_name("variables.part")
            shutil.copyfile(firmware.variables, part)
            part.chmod(0o600)
            part.replace(files.variables)
    if not files.disk.exists():
        part = files.disk.with_name("disk.part")
        _make_disk(spec, part)
        part.replace(files.disk)
        return
    if explicit_disk and spec.disk_bytes > disk_size(files):
        _grow(files.disk, spec.disk_bytes)


def _check_kind(spec: MachineSpec, files: MachineFiles) -> None:
    """Only a machine that boots its disk has variables of a firmware; they are made before the disk is."""
    if files.disk.exists() and files.variables.exists() != isinstance(spec.image.boot, DiskBoot):
        raise UsageError(
            f"the disk of the machine {files.name} is of another kind of guest image than {spec.image.name}",
            resolution=f"Give this one another --name, or `vmbuild destroy {files.name}` (what is on it is lost).",
        )


def _make_disk(spec: MachineSpec, path: Path) -> None:
    boot = spec.image.boot
    if not isinstance(boot, DiskBoot):
        process.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(spec.disk_bytes)])
        return
    # The format is said: a disk whose bytes chose it could lead to files of this host.
    process.run(["qemu-img", "convert", "-f", "qcow2", "-O", "qcow2", str(boot.disk), str(path)])
    if spec.disk_bytes > _virtual_size(path):
        _grow(path, spec.disk_bytes)


def _grow(disk: Path, size: int) -> None:
    process.run(["qemu-img", "resize", "-q", "-f", "qcow2", str(disk), str(size)])


def check_disk(files: MachineFiles, wanted_bytes: int) -> None:
    """Raise UsageError when the machine has a disk that is larger than wanted."""
    size = disk_size(files) if files.disk.exists() else 0
    if wanted_bytes < size:
        raise UsageError(
            f"the disk of the machine {files.name} is {format_size(size)} large and cannot shrink",
            resolution=f"Ask for more, or make a new one: `vmbuild destroy {files.name}` (what is on it is lost).",
        )


def disk_size(files: MachineFiles) -> int:
    """Return a disk's virtual size in bytes, as the guest sees it."""
    return _virtual_size(files.disk)


def _virtual_size(path: Path) -> int:
    """Read it from qcow2's header, bytes 24 to 31."""
    with path.open("rb") as disk:
        return int.from_bytes(disk.read(32)[24:32], "big")


def check_foreign_disk(files: MachineFiles) -> None:
    """See that a disk from elsewhere is a qcow2 that leads to no other file of this host. Raises MachineError.

    Source: QEMU, docs/interop/qcow2.txt, "Header".
    """
    with files.disk.open("rb") as disk:
        header = disk.read(80).ljust(80, b"\0")
    version, backing, features = (int.from_bytes(header[at : at + 8], "big") for at in (0, 8, 72))
    has_data_file = version & 0xFFFFFFFF >= 3 and features & 4
    if header[:4] != b"QFI\xfb" or backing or has_data_file:
        raise MachineError("the disk in the bundle is not one that vmbuild makes", details=header[:16].hex())


@dataclass(frozen=True)
class Restore:
    """What a guest goes on from instead of booting: a file that `save` wrote, and the first order it then gets.

    `check` raises when the file is not what was saved; it is asked before the guest runs. `at_last` is called when
    nothing can fail any more that could be tried again. `fast` tells how it was saved, None: as this QEMU would.
    `is_own` says that it is this machine's own memory: its console's log goes on as well.
    """

    state: Path
    order: str
    check: Callable[[], None]
    at_last: Callable[[], None] = lambda: None
    fast: bool | None = None
    is_own: bool = False


def start(
    spec: MachineSpec, files: MachineFiles, qemu: Qemu, *, restore: Restore | None = None, first_boot: bool = False
) -> None:
    """Start QEMU, detached from this process and its terminal; return when it answers on its monitor.

    `first_boot` gives it the drive that tells a disk from elsewhere what to become.

    Raises MachineError with QEMU's own words when it does not start.
    """
    _clear_runtime(files)
    if files.console_log.exists() and not (restore and restore.is_own):
        files.console_log.replace(files.console_log.with_suffix(".log.1"))
    _make_boxes(files)
    facts = describe(spec, qemu, disk_size(files))
    write_facts(files, facts)
    argv = qemu_argv(spec, qemu, files, facts.uuid, first_boot=first_boot, is_restored=restore is not None)
    try:
        with ExitStack() as started:
            with writing_in(files.folder):
                control.make_pipes(files)
                exit_code = started.enter_context(process.starting(argv, cwd=files.folder, log=files.qemu_log))
            _wait_for_answer(spec, files, argv, exit_code)
            if restore is not None:
                _load(files, restore, Deadline.after(LOAD_S))
    except BaseException:
        _clear_runtime(files)
        raise
    if restore is not None:
        restore.at_last()
        with Qmp(files.qmp, Deadline.after(ANSWER_S)) as qmp:
            qmp.execute("cont")


def _make_boxes(files: MachineFiles) -> None:
    """Make the drives of bulk data anew, empty and sparse: of one size, which a saved guest remembers."""
    with writing_in(files.folder):
        for path in (files.inbox, files.outbox):
            path.unlink(missing_ok=True)
            with path.open("xb") as box:
                path.chmod(0o600)
                box.truncate(BOX_BYTES)


def _load(files: MachineFiles, restore: Restore, limit: Deadline) -> None:
    control.send(files, restore.order)  # before it runs: nobody may be there any more to say it afterwards
    with Qmp(files.qmp, limit) as qmp:
        migration.load(qmp, restore.state, limit, fast=restore.fast)
        restore.check()


def _wait_for_answer(
    spec: MachineSpec, files: MachineFiles, argv: list[str], exit_code: Callable[[], int | None]
) -> None:
    limit = Deadline.after(START_S)
    while not _answers(files):
        code = exit_code()
        if code is not None or limit.passed:
            raise _explain(spec, argv, code, files.qemu_log.read_text(errors="replace"))
        limit.sleep(0.02)


def _answers(files: MachineFiles) -> bool:
    if not files.qmp.exists():
        return False
    try:
        with Qmp(files.qmp, Deadline.after(ANSWER_S)) as qmp:
            return bool(qmp.execute("query-status"))
    except MachineError:
        return False


def _clear_runtime(files: MachineFiles) -> None:
    """Remove what a QEMU left that was killed, or that ran before the host was restarted.

    Raises MachineError when this machine's QEMU lives: without these files nobody would find it again.
    """
    pid = find_pid(files)
    if pid is not None:
        raise MachineError(f"the machine {files.name} still runs", details=f"process {pid}")
    last = _read_pid(files)
    if last is not None and not process.command_line(last):  # killed a moment ago: it holds the disk while it ends
        process.wait_gone(last, Deadline.after(ENDING_S))
    for path in files.runtime:
        path.unlink(missing_ok=True)


def _explain(spec: MachineSpec, argv: list[str], code: int | None, words: str) -> MachineError:
    causes = (
        ("cannot set up guest memory", f"The host cannot give {spec.memory_mib} MiB: ask for less with --memory."),
        ("Cannot allocate memory", f"The host cannot give {spec.memory_mib} MiB: ask for less with --memory."),
        ("No space left", "The host's disk is full: make room and run the command again."),
        ('Failed to get "write" lock', "Another QEMU uses the machine's disk: end it, then run `vmbuild up` again."),
        ("Could not set up host forwarding", "No port of 127.0.0.1 could be opened: close programs that hold many."),
        ("io_uring", "This host forbids io_uring: delete the folder `qemu` in the cache and run the command again."),
    )
    advice = next((text for sign, text in causes if sign in words), "`vmbuild doctor` checks this host.")
    ending = "it did not answer in time" if code is None else f"exit code {code}"
    return MachineError(
        "QEMU did not start", details=f"{words.strip()}\n{ending}\n$ {shlex.join(argv)}", resolution=advice
    )


def find_pid(files: MachineFiles) -> int | None:
    """Return the id of the machine's QEMU: the process in its pid file, if it is ours and alive."""
    return _pid_by(files, load_facts(files))


def _pid_by(files: MachineFiles, facts: Facts | None) -> int | None:
    pid = _read_pid(files)
    if pid is None or facts is None:
        return None
    return pid if facts.uuid in process.command_line(pid) and process.is_alive(pid) else None


def _read_pid(files: MachineFiles) -> int | None:
    try:
        return int(files.pid.read_text())
    except (FileNotFoundError, ValueError):
        return None


def status(files: MachineFiles) -> MachineStatus:
    """Return what the machine is now.

    `running`, `paused`, `restoring`, `suspended`, `stopped`, or `broken` (QEMU is there but silent).
    """
    facts = load_facts(files)
    pid = _pid_by(files, facts)
    answer = _ask(files) if pid is not None else Answer("suspended" if files.suspension.exists() else "stopped")
    disk = files.disk.stat() if files.disk.exists() else None
    return MachineStatus(
        name=files.name,
        state=answer.state,
        arch=arch_name(facts.arch) if facts else None,
        pid=pid,
        ssh_port=answer.ssh_port,
        cpus=facts.cpus if facts else None,
        memory_mib=facts.memory_mib if facts else None,
        memory_now_mib=answer.memory_mib,
        disk_virtual_bytes=disk_size(files) if disk else None,
        disk_actual_bytes=disk.st_blocks * 512 if disk else None,
        image=facts.image if facts else None,
        image_digest=facts.image_digest if facts else None,
        rss_bytes=process.rss_bytes(pid) if pid is not None else None,
        started_at=facts.started_at if facts and pid is not None else None,
        restored="-incoming" in process.command_line(pid) if pid is not None else None,
        folder=files.folder,
    )


@dataclass(frozen=True)
class Answer:
    """What a QEMU says of itself; nothing but `broken` when it does not answer."""

    state: str
    ssh_port: int | None = None
    memory_mib: int | None = None


def _ask(files: MachineFiles) -> Answer:
    try:
        with Qmp(files.qmp, Deadline.after(ANSWER_S)) as qmp:
            state = STATES.get(qmp.execute("query-status")["status"], "paused")
            forwards = ports.parse_forwards(qmp.hmp("info usernet"))
            port = next((each.host_port for each in forwards if each.guest_port == ports.SSH), None)
            with suppress(MachineError):  # a guest without the balloon's driver
                return Answer(state, port, resources.memory_now_mib(qmp))
            return Answer(state, port)
    except MachineError:
        return Answer("broken")


def resume(files: MachineFiles) -> None:
    """Let a paused machine go on. Raises HostError when the host's disk is full, which is why QEMU pauses one."""
    patience = Deadline.after(END_SAVING_S)
    limit = Deadline.after(END_SAVING_S + ANSWER_S)
    with Qmp(files.qmp, limit) as qmp:
        if qmp.execute("query-status")["status"] == "io-error" and shutil.disk_usage(files.folder).free < ROOM_BYTES:
            raise _disk_full(files)
        migration.give_up(qmp, patience, limit)
        suspension.discard(files)  # half a memory, or one that will be older than the disk
        qmp.execute("cont")


def save(files: MachineFiles, path: Path, deadline: Deadline) -> bool:
    """Pause the machine and write its memory and devices to a file; tell whether the fast way.

    Raises MachineError or HostError.
    """
    with Qmp(files.qmp, deadline) as qmp:
        return migration.save(qmp, path, deadline)


def suspend(files: MachineFiles, deadline: Deadline) -> Suspension:
    """Save the machine beside its disk and end it. Whatever fails, it goes on. Raises MachineError or HostError."""
    facts = load_facts(files)
    check_alive(files)
    assert facts is not None  # noqa: S101 - it is alive
    if not facts.hardware:
        raise MachineError(
            f"the machine {files.name} was started by an older vmbuild, which did not note what it is made of",
            resolution=f"`vmbuild down {files.name}` and `vmbuild up`; it can be suspended then.",
        )
    try:
        with Qmp(files.qmp, Deadline.after(ANSWER_S)) as qmp:
            version = ".".join(str(qmp.execute("query-version")["qemu"][part]) for part in ("major", "minor", "micro"))
        fast = save(files, files.memory, deadline)
        made = suspension.publish(files, facts, version, fast=fast)
    except BaseException as error:
        with suppress(VmbuildError):
            resume(files)
        if isinstance(error, MachineError) and "No space left" in error.details:
            raise HostError(
                f"the host's disk has no room for the memory of the machine {files.name}",
                details=error.details,
                resolution=f"Make room in {files.folder}; the machine goes on meanwhile.",
            ) from error
        raise
    stop(files, Deadline.after(0))
    return made


def check_running(files: MachineFiles) -> None:
    """Raise MachineError when the machine's QEMU is gone, HostError when it waits for room on the host's disk."""
    check_alive(files)
    with suppress(MachineError), Qmp(files.qmp, Deadline.after(ANSWER_S)) as qmp:
        if qmp.execute("query-status")["status"] == "io-error":
            raise _disk_full(files)


def _disk_full(files: MachineFiles) -> HostError:
    return HostError(
        f"the machine {files.name} is paused because the host's disk is full",
        resolution=f"Make room in {files.folder} and run `vmbuild up`: it goes on where it stopped, nothing is lost.",
    )


def check_alive(files: MachineFiles) -> None:
    """Raise MachineError with the console's last lines when the machine's QEMU is gone."""
    if find_pid(files) is None:
        if files.suspension.exists():
            raise SuspendedError(
                f"the machine {files.name} is suspended",
                resolution=f"`vmbuild up --name {files.name}` goes on with it; `vmbuild attach` shows a build in it.",
            )
        raise MachineError(
            f"the machine {files.name} is not running",
            details=serial.tail(files.console_log),
            resolution="The lines above are its console's last; `vmbuild up` starts it.",
        )


def stop(files: MachineFiles, deadline: Deadline, *, ask: Callable[[Deadline], None] | None = None) -> None:
    """End the machine: ask the guest, then QEMU, then terminate, then kill, each with a limit. Twice is harmless.

    `ask` powers the guest off before the deadline and may fail: it is only the kindest way.
    """
    pid = find_pid(files)
    if pid is not None and ask is not None and _ask(files).state == "running":
        with suppress(VmbuildError):
            ask(deadline)
            process.wait_gone(pid, deadline)
    if pid is not None and process.is_alive(pid):
        with suppress(MachineError), Qmp(files.qmp, Deadline.after(QUIT_S)) as qmp:
            qmp.execute("quit")
        if not process.wait_gone(pid, Deadline.after(QUIT_S)):
            process.stop(pid, grace_s=QUIT_S)
    _clear_runtime(files)


def wait_off(files: MachineFiles, deadline: Deadline) -> bool:
    """Wait until the guest has powered itself off; tell whether it has."""
    pid = find_pid(files)
    return pid is None or process.wait_gone(pid, deadline)


def destroy(files: MachineFiles) -> None:
    """Delete a stopped machine. Raises MachineError when it runs."""
    if find_pid(files) is not None:
        raise MachineError(f"the machine {files.name} is running", resolution="Stop it first: `vmbuild down`.")
    doomed = files.folder.with_name(f".{files.name}.{uuid.uuid4().hex}")
    files.folder.rename(doomed)
    shutil.rmtree(doomed)


def list_machines(state: Path) -> list[MachineStatus]:
    """Return what every machine of a state folder is now, by name."""
    return [status(files) for files in find_machines(state)]


def find_machines(state: Path) -> list[MachineFiles]:
    """Return the files of every machine of a state folder, by name."""
    return [MachineFiles(path) for path in sorted((state / "machines").glob("[!.]*")) if path.is_dir()]
