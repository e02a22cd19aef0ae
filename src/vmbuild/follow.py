"""The recipe of a build that runs: follow it to its end, bring its container image home, leave nothing behind.

It runs in the guest by itself. Who followed it may be gone, or have lost the connection: another goes on from there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from vmbuild import deliver, record, renew, supply
from vmbuild.deadline import Deadline
from vmbuild.errors import (
    BuildError,
    GuestError,
    HungUp,
    MachineError,
    OutOfMemoryError,
    StalledError,
    SuspendedError,
    TimeIsUp,
    UsageError,
    VmbuildError,
)
from vmbuild.guest import archive, cache, docker, job, oom, resources
from vmbuild.guest.blobs import HostBlobs
from vmbuild.guest.session import ConnectionLostError, Session, WrongHostKeyError, capture
from vmbuild.image import base as base_image
from vmbuild.lock import attempt, hold
from vmbuild.machine import lifetime, serial
from vmbuild.machine.files import MachineFiles
from vmbuild.model import MIB, BuildResult, Delivered, Home, MachineStatus, format_size
from vmbuild.outputs import Kind
from vmbuild.reach import channel_of, existing, running_session
from vmbuild.record import BuildRecord
from vmbuild.report import Reporter
from vmbuild.whole import write_whole

RECONNECT_S = 120.0
"""How long a guest may take to let us in again that does not answer any more."""

LEFT_RUNNING = (HungUp, SuspendedError, TimeIsUp)
"""After these a build goes on in its guest, now or later."""


class Watch:
    """Someone who looks on while a build runs, and ends the looking on by raising."""

    def heard(self) -> None:
        """Take notice that the build wrote something."""

    def tick(self) -> None:
        """Look; called at least twice a second."""


@dataclass(frozen=True)
class Running:
    """A build that runs in a guest, and the connection over which it is followed."""

    record: BuildRecord
    files: MachineFiles
    session: Session

    @property
    def work(self) -> docker.Workspace:
        """The build's workspace in the guest."""
        return docker.Workspace(self.record.folder)


def attach(
    name: str, build_id: str | None, home: Home, report: Reporter, *, stdout: BinaryIO, watch: Watch
) -> BuildResult | None:
    """Show a build that runs in a machine, from its beginning, and finish it as its command would have.

    Returns None when the command that started it still does that. Raises UsageError when there is no such build.
    """
    files = existing(name, home)
    with running_session(name, home) as session:
        running = Running(_choose(files, session, build_id), files, session)
        with attempt(record.lock_file(files.builds, running.record)) as is_ours:
            if is_ours:
                with supply.agents_lent(session, running.work.folder, running.record.agents, report):
                    return _end_to_end(running, home, report, stdout, watch)
        report.step("The command that started this build follows it too, and finishes it")
        _follow(running, report, watch)
        return None


def _choose(files: MachineFiles, session: Session, build_id: str | None) -> BuildRecord:
    found = record.load_all(files.builds)
    for each in [each for each in found if not job.exists(session, each.folder)]:
        record.forget(files.builds, each)  # it ended with a machine that went down
        found.remove(each)
    wanted = [each for each in found if build_id in (None, each.id)]
    if not wanted:
        what = f"no build {build_id}" if build_id else "no build"
        raise UsageError(f"the machine {files.name} has {what} to attach to", details="\n".join(map(_describe, found)))
    if len(wanted) > 1:
        raise UsageError(
            f"{len(wanted)} builds run in the machine {files.name}",
            details="\n".join(map(_describe, wanted)),
            resolution="Choose one with --build ID, the first word of its line.",
        )
    return wanted[0]


def _describe(each: BuildRecord) -> str:
    since = time.strftime("%H:%M:%S", time.localtime(each.started_at))
    return f"{each.id}  {', '.join(each.tags) or '(no tag)'}, since {since}"


def to_the_end(running: Running, home: Home, report: Reporter, *, stdout: BinaryIO, watch: Watch) -> BuildResult:
    """Follow a build and bring its container image home. Raises BuildError when a step of the Dockerfile fails."""
    with hold(record.lock_file(running.files.builds, running.record), report, "follows this build"):
        return _end_to_end(running, home, report, stdout, watch)


def _end_to_end(running: Running, home: Home, report: Reporter, stdout: BinaryIO, watch: Watch) -> BuildResult:
    _check_places(running.record)
    with _ended_after(running, home):
        return _finish(running, home, report, stdout, watch)


def _check_places(asked: BuildRecord) -> None:
    """See that what comes of a build can be written, before its end hangs on that. Raises UsageError or HostError."""
    deliver.check_places(asked.ways_out, asked.cwd)
    for path in filter(None, (asked.place(asked.iidfile), asked.place(asked.metadata_file))):
        if not path.parent.is_dir():
            raise UsageError(f"cannot write {path}", resolution="Make its folder; the build goes on meanwhile.")


@contextmanager
def _ended_after(running: Running, home: Home) -> Iterator[None]:
    """End a build, and remove what it leaves, however the block is left; but for what leaves a build running."""
    try:
        yield
    except LEFT_RUNNING:
        raise
    except BaseException:
        with suppress(VmbuildError):  # a machine that is gone, or stands still, keeps the build
            _end(running)
        raise
    with suppress(VmbuildError):  # the build is done, whatever becomes of its machine now
        _end(running)
        resources.give_back_later(running.session)
        renew.start_later(running.files, home)


def _end(running: Running) -> None:
    docker.remove_workspace(running.session, running.work)
    record.forget(running.files.builds, running.record)


def _finish(running: Running, home: Home, report: Reporter, stdout: BinaryIO, watch: Watch) -> BuildResult:
    asked, session = running.record, running.session
    with ExitStack() as until_written:
        files = until_written.enter_context(deliver.open_files(asked.ways_out, asked.cwd, stdout))
        report.step("Building")
        with _explaining_memory(running), _explaining_stall(running):
            _follow(running, report, watch)
        image_id, metadata = docker.image_id(session, running.work)
        for number, folder in enumerate(asked.caches):
            report.step("Bringing the build cache back")
            place = supply.cache_place(asked.folder, number)
            cache.bring_home(session, place, Path(asked.cwd) / folder, channel_of(running.files), report)
        delivered = _deliver(running, image_id, files, until_written, home, report)
    if (pushed := next((each for each in delivered if each.kind == Kind.REGISTRY), None)) is not None:
        image_id, metadata = pushed.digest, deliver.pushed_metadata(metadata, pushed)
    for path, text in ((asked.place(asked.iidfile), image_id), (asked.place(asked.metadata_file), metadata)):
        if path is not None:
            write_whole(path, text.encode())
    seconds = time.time() - asked.started_at
    first, size = (delivered[0].where if delivered else None), sum(each.size_bytes for each in delivered)
    return BuildResult(image_id, asked.tags, first, size, asked.context_bytes, seconds, delivered)


def _deliver(
    running: Running, image_id: str, files: deliver.Files, until_written: ExitStack, home: Home, report: Reporter
) -> tuple[Delivered, ...]:
    """Send the container image all its ways: first those that end on the host's disk, which stay if others fail."""
    asked, known = running.record, base_image.known_layers(home.cache)
    channel = channel_of(running.files)
    ways = [way for way in asked.ways_out if way.kind is not Kind.IMAGE]
    if not ways:
        return ()
    report.step("Bringing the container image back")
    if len(ways) == 1 and ways[0].is_plain_archive:
        size = archive.write_archive(running.session, image_id, asked.tags, files[ways[0]], known, report, channel)
        return (Delivered(ways[0].kind, ways[0].dest, image_id, size),)
    with deliver.room_beside(running.files.folder / f"blobs-{asked.id}") as room:
        blobs = HostBlobs(running.session, channel, known, room / "blobs", report)
        delivery = deliver.Delivery(blobs, room, image_id, asked.tags, asked.cwd, report)
        done = {way: delivery.to_file(way, files[way]) for way in files}
        until_written.close()
        for way in sorted((way for way in ways if way not in files), key=lambda way: way.leaves_host):
            done[way] = delivery.onward(way)
    return tuple(done[way] for way in ways)


def _follow(running: Running, report: Reporter, watch: Watch) -> None:
    """Pass on what a build writes until it ends, over as many connections as that takes."""
    log = docker.BuildLog(report.output, quiet=running.record.quiet)

    def take(data: bytes) -> None:
        watch.heard()
        log.take(data)

    while True:
        try:
            code = job.follow(running.session, running.record.folder, log.size, take, watch.tick)
        except ConnectionLostError:
            report.warn("the connection to the guest was lost; the build goes on, connecting again")
            _reconnect(running.session)
        else:
            return log.check(code)


def _reconnect(session: Session) -> None:
    """Connect again. Raises GuestError when the guest does not let us in, MachineError when it is gone."""
    limit = Deadline.after(RECONNECT_S)
    while True:
        try:
            return session.reopen(limit)
        except WrongHostKeyError:
            raise
        except GuestError:
            if limit.passed:
                raise
            limit.sleep(0.5)


@contextmanager
def _explaining_stall(running: Running) -> Iterator[None]:
    """Say of a build that stands still what its guest does, and said last."""
    try:
        yield
    except StalledError as error:
        processes = "The guest cannot be asked what it does."
        with suppress(GuestError, MachineError):
            processes = capture(running.session, ["ps", "-o", "pid,ppid,stat,rss,args"], deadline=Deadline.after(30))
        last = serial.tail(running.files.console_log)
        raise BuildError(error.brief, details=f"{processes}\n{last}", resolution=error.resolution) from error


@contextmanager
def _explaining_memory(running: Running) -> Iterator[None]:
    """Say of a build that failed what its own output does not: a process was killed for want of memory."""
    try:
        yield
    except (BuildError, GuestError) as error:
        victim: oom.Victim | None = None
        with suppress(GuestError, MachineError):
            victim = next(reversed(oom.find_victims(running.session, running.record.boot_s)), None)
        if victim is None:
            raise
        raise _out_of_memory(error, victim, lifetime.status(running.files)) from error


def _out_of_memory(error: VmbuildError, victim: oom.Victim, machine: MachineStatus) -> OutOfMemoryError:
    most = machine.memory_mib or 0
    has = machine.memory_now_mib or most
    more = f"`vmbuild resize {machine.name} --memory {most}M`"
    if has >= most:
        more = f"`vmbuild down {machine.name}`, then this command with --memory {2 * most}M"
    return OutOfMemoryError(
        error.brief,
        details=f"{error.details}\nThe guest ran out of memory: its kernel killed {victim.process}, which held "
        f"{format_size(victim.memory_mib * MIB)} of the machine's {format_size(has * MIB)}.",
        resolution=f"Run fewer jobs at once (`make -j1`), or give the machine more: {more}; --oom-retry does it.",
    )
