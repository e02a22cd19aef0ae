"""The recipe of a suspended machine that is carried to another host: packed as a bundle, unpacked, gone on with."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from vmbuild import deliver, follow, operate, record
from vmbuild.errors import HostError, MachineError, SuspendedError, TimeIsUp, UsageError
from vmbuild.guard import Guard, Limits
from vmbuild.guest import keys
from vmbuild.machine import bundle, facts, lifetime, suspension
from vmbuild.machine.files import MachineFiles
from vmbuild.machine.suspension import Suspension
from vmbuild.model import BuildResult, Home, MachineRequest
from vmbuild.plain import read_plain
from vmbuild.reach import existing
from vmbuild.record import BuildRecord
from vmbuild.report import Reporter
from vmbuild.start import fit_here, open_session
from vmbuild.whole import writing_in

T = TypeVar("T")
SUFFIX = ".vmbundle"
PARTS = ("memory", "disk")


def check_limits(limits: Limits, seconds_left: float) -> None:
    """See that a bundle can be written, and that there is time for more than that. Raises UsageError."""
    if limits.ends_at is None:
        return
    if seconds_left <= limits.reserve_s:
        raise UsageError(
            f"the time limit leaves nothing for the build: {limits.reserve_s:.0f} s are kept to suspend it",
            resolution="Give a longer --time-limit, or a shorter --reserve.",
        )
    _check_target(limits.suspend_to)


def check_secrets(limits: Limits, *, has_secrets: bool) -> None:
    """See that a build with secrets is not to be carried away when its time is up, unasked. Raises UsageError."""
    if has_secrets and limits.suspend_to is not None and not limits.with_secrets:
        raise _with_secrets(
            "Leave --suspend-to out: --time-limit alone suspends the machine here, where `vmbuild up` goes on with it. "
            "Or add --with-secrets: whoever can read the bundle has them then."
        )


def holds_secrets(name: str, home: Home) -> bool:
    """Tell whether a build in a machine has secrets."""
    return any(each.has_secrets for each in record.load_all(MachineFiles.at(home.state, name).builds))


def _with_secrets(resolution: str) -> UsageError:
    return UsageError(
        "a build with secrets is not carried to another host",
        details="Its secrets are in the guest's memory, and a bundle holds that.",
        resolution=resolution,
    )


def _check_target(target: Path | None) -> None:
    if target is not None and not target.parent.is_dir():
        raise UsageError(f"cannot write a bundle to {target}", resolution="Name a file or a folder that exists.")


def within(limits: Limits, name: str, home: Home, report: Reporter, work: Callable[[Guard], T]) -> T:
    """Do a build's work within its limits. Raises SuspendedError when the time is up and it was suspended instead."""
    try:
        return work(Guard(limits, MachineFiles.at(home.state, name)))
    except TimeIsUp:
        report.step("The time limit is near")
    suspend(name, limits.suspend_to, home, report, with_secrets=limits.with_secrets)
    if limits.suspend_to is None:
        raise SuspendedError(
            f"the build is suspended in the machine {name}",
            resolution=f"`vmbuild up --name {name}` goes on with it, `vmbuild attach {name}` finishes it.",
        )
    raise SuspendedError(
        f"the build is suspended in {limits.suspend_to}",
        resolution=f"`vmbuild resume {limits.suspend_to}` goes on with it, here or on another host.",
    )


def suspend(name: str, target: Path | None, home: Home, report: Reporter, *, with_secrets: bool = False) -> Suspension:
    """Suspend a machine, and pack it as a bundle if a place for one is given; `with_secrets` also where it holds some.

    Raises UsageError for a place that there is not, MachineError or HostError.
    """
    _check_target(target)
    if target is not None and existing(name, home).variables.exists():
        raise UsageError(
            f"the machine {name} boots a disk with a firmware, and cannot be packed as a bundle",
            resolution=f"`vmbuild suspend {name}` without a place saves it here.",
        )
    if target is not None and not with_secrets and holds_secrets(name, home):
        raise _with_secrets(
            f"`vmbuild suspend {name}` without a place keeps it here; `vmbuild attach {name}` finishes the build."
        )
    if target is not None and record.had_secrets(MachineFiles.at(home.state, name).builds):
        report.warn(
            f"builds with secrets have run in the machine {name}: its memory, and with it the bundle, may have "
            f"something of them yet; `vmbuild down {name}` and `up` forget it"
        )
    saved = operate.suspend(name, home, report)
    if target is not None:
        files = existing(name, home)
        with lifetime.lock(files, report):
            if suspension.find(files) != saved:  # the lock was free for a moment
                raise MachineError(f"the machine {name} went on before it was packed")
            if holds_secrets(name, home):  # or one was started when we had looked
                if not with_secrets:
                    raise _with_secrets(f"The machine is suspended here: `vmbuild up --name {name}` goes on with it.")
                report.warn(f"the bundle holds the secrets of a build: whoever can read {target} has them")
            report.step(f"Packing the machine {name}")
            keys.forget_key(files.host_key)  # the guest has it in its memory: from here on it is nobody's
            _pack(files, saved, target, report)
    return saved


def _pack(files: MachineFiles, saved: Suspension, target: Path, report: Reporter) -> None:
    """Pack a suspended machine. Its log-in key stays at home, and so does where its builds were asked for."""
    builds = [
        asdict(replace(each, cwd="", agents=tuple(agent.partition("=")[0] for agent in each.agents)))
        for each in record.load_all(files.builds)
    ]
    parts = dict(zip(PARTS, (files.memory, files.disk), strict=True))
    about = {"name": files.name, "suspension": asdict(saved), "builds": builds}
    with report.meter("pack", sum(map(bundle.data_bytes, parts.values()))) as meter:
        try:
            bundle.pack(target, about, parts, meter)
        except HostError as error:
            raise HostError(
                error.brief,
                details=error.details,
                resolution=f"Nothing is lost: `vmbuild up --name {files.name}` goes on with it, here.",
            ) from error


def bundle_place(text: str, name: str) -> Path:
    """Return the file that a bundle of a machine is written to, for a file or a folder."""
    path = Path(text).expanduser()
    return path / f"{name}{SUFFIX}" if path.is_dir() or text.endswith("/") else path


def name_for(path: Path, request: MachineRequest) -> str:
    """Return the name that the machine in a bundle gets: the one that was asked for, else the one it had."""
    return _About.read(_find_bundle(path)).name_for(request)


def resume(
    path: Path,
    request: MachineRequest,
    limits: Limits,
    home: Home,
    report: Reporter,
    *,
    stdout: BinaryIO,
    trusted: bool = False,
) -> BuildResult | None:
    """Go on with the machine in a bundle, and finish the build in it as its command would have.

    What that asked to be pushed or loaded is so only when the bundle is `trusted`.

    Returns None for a machine in which no build runs. Raises MachineError for a bundle that is damaged or that this
    host cannot go on with, UsageError where there is a machine by its name.
    """
    path = _find_bundle(path)
    about = _About.read(path)
    # What the machine in a bundle is, no setting chooses; `resume` has no such options either.
    given = request.given - {"arch", "image"}
    request = replace(request, name=about.name_for(request), arch=None, given=given)
    files = MachineFiles.at(home.state, request.name)
    with lifetime.lock(files, report):
        if not _is_here(files, about):
            # Before gigabytes are unpacked, or a guest image is assembled for nothing.
            suspension.refuse_differences(about.suspension, request)
            fit_here(about.suspension, request, home, report)
            _unpack(path, about, files, report, trusted=trusted)
    with open_session(request, home, report):
        pass
    if not about.builds:
        return None

    def finish(guard: Guard) -> BuildResult | None:
        build_id = about.builds[-1].id
        return follow.attach(request.name, build_id, home, report, stdout=stdout, watch=guard)

    return within(limits, request.name, home, report, finish)


def _find_bundle(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = sorted(path.glob(f"*{SUFFIX}"))
    if len(found) == 1:
        return found[0]
    raise UsageError(
        f"{path} holds {len(found)} bundles", details="\n".join(map(str, found)), resolution="Name the bundle itself."
    )


class _About:
    """What a bundle says of itself."""

    def __init__(self, data: dict[str, Any]) -> None:
        self._name = data["name"]
        if not isinstance(self._name, str):
            raise TypeError(f"a machine cannot be named {self._name!r}")
        self.suspension = read_plain(Suspension, data["suspension"])
        cwd = str(Path.cwd())
        self.builds = [replace(BuildRecord.from_data(each), cwd=cwd) for each in data["builds"]]

    def name_for(self, request: MachineRequest) -> str:
        return request.name if "name" in request.given else self._name

    @classmethod
    def read(cls, path: Path) -> _About:
        try:
            return cls(bundle.read_facts(path))
        except (TypeError, KeyError, ValueError) as error:
            raise MachineError(f"the bundle {path} makes no sense to this vmbuild", details=repr(error)) from error


def _is_here(files: MachineFiles, about: _About) -> bool:
    """Tell whether the machine of the bundle is still suspended here. Raises UsageError for another of that name."""
    if not files.folder.exists():
        return False
    if lifetime.status(files).state == "suspended" and suspension.find(files) == about.suspension:
        return True
    raise UsageError(
        f"there is a machine named {files.name} already",
        resolution=f"Give the one in the bundle another name with --name, or `vmbuild destroy {files.name}` first.",
    )


def _unpack(path: Path, about: _About, files: MachineFiles, report: Reporter, *, trusted: bool) -> None:
    """Make a machine of a bundle: whole, or not at all."""
    report.step(f"Unpacking {path}")
    with _beside(files) as made:
        with report.meter("unpack", None) as meter:
            bundle.unpack(path, made.folder, meter)
        found = sorted(each.name for each in made.folder.iterdir())
        if found != sorted(PARTS):
            raise MachineError(f"the bundle {path} holds no machine", details=f"its parts: {', '.join(found)}")
        (made.folder / "disk").replace(made.disk)
        lifetime.check_foreign_disk(made)
        if not suspension.is_whole(made, about.suspension):
            raise MachineError(f"the bundle {path} holds another memory than it tells of")
        facts.write_facts(made, about.suspension.facts)
        for each in about.builds:
            record.save(made.builds, _kept_inside(each, report, trusted=trusted))
        suspension.write_note(made, about.suspension)
        with writing_in(files.folder.parent):
            made.folder.replace(files.folder)


def _kept_inside(build: BuildRecord, report: Reporter, *, trusted: bool) -> BuildRecord:
    """Return a foreign build that writes nothing outside the current folder: whose bundle it is, nobody can tell.

    Nor does it push or load anything, unless it is trusted. An SSH agent it never gets.
    """

    def keep(path: str) -> str:
        if Path(build.cwd) in Path(os.path.normpath(Path(build.cwd) / path)).parents:
            return path
        name = Path(os.path.normpath(f"/{path}")).name or "output"
        report.warn(f"the build in the bundle wants to write {path}: here it is {name} in this folder")
        return name

    if build.agents:
        report.warn("the build in the bundle was lent an SSH agent: yours it does not get")
    iidfile, metadata = (path and keep(path) for path in (build.iidfile, build.metadata_file))
    ways = [deliver.kept_inside(each, keep) for each in build.ways_out]
    if not trusted:
        for each in filter(lambda way: way.leaves_host, ways):
            report.warn(f"the build in the bundle wants to {each.deed}: that is left out (resume --trusted does it)")
        ways = [each for each in ways if not each.leaves_host]
    texts = tuple(each.text for each in ways)
    caches = tuple(map(keep, build.caches))
    return replace(build, outputs=texts, iidfile=iidfile, metadata_file=metadata, agents=(), caches=caches)


@contextmanager
def _beside(files: MachineFiles) -> Iterator[MachineFiles]:
    """Yield the files of a machine that has no name yet; what is left of an earlier one like it goes."""
    parent = files.folder.parent
    with writing_in(parent):
        for left in parent.glob(f".{files.name}~*"):
            shutil.rmtree(left, ignore_errors=True)
        made = Path(tempfile.mkdtemp(prefix=f".{files.name}~", dir=parent))
    try:
        yield MachineFiles(made)
    finally:
        shutil.rmtree(made, ignore_errors=True)
