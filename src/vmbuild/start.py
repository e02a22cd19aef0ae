"""The recipe of a start: a guest image, a machine that boots it or goes on from a snapshot, a guest that is ready."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from vmbuild import dockerhost, passing, process, record, settle
from vmbuild.address import is_place
from vmbuild.deadline import Deadline
from vmbuild.errors import GuestError, HostError, MachineError
from vmbuild.guest.session import Session
from vmbuild.image import catalog, given, store
from vmbuild.machine import control, lifetime, ports, snapshot, suspension
from vmbuild.machine.facts import Facts, load_facts
from vmbuild.machine.files import MachineFiles
from vmbuild.machine.ports import Forward
from vmbuild.machine.probe import Qemu, probe_for
from vmbuild.machine.suspension import Suspension
from vmbuild.model import (
    GIB,
    MIB,
    DiskSpec,
    GuestImage,
    Home,
    ImageSpec,
    KernelBoot,
    MachineRequest,
    MachineSpec,
    MachineStatus,
    arch_name,
    format_size,
)
from vmbuild.reach import load_ssh, wait_ready, write_seed
from vmbuild.report import Reporter

WAKE_S = 20.0
"""So long, or a third of the time limit if that is more, a restored guest has before it is given up and booted."""

SPARE_BYTES = GIB
"""What is left to the host when a snapshot is made in the background."""


@contextmanager
def open_session(request: MachineRequest, home: Home, report: Reporter) -> Iterator[Session]:
    """Yield a session in a guest that is ready, starting the machine when it does not run."""
    passing.check_named(request)
    if is_place(request.image):
        passing.trust_here(request)
        request = replace(request, image=given.find_row(request.image, home.cache).name)
    files = MachineFiles.at(home.state, request.name)
    with lifetime.lock(files, report):
        # Held until the guest is ready: who comes meanwhile must not build on a start that may yet be given up.
        session, is_new = _first_session(request, files, home, report)
    try:
        if session is not None:
            dockerhost.reopen(files, report)
        session = session or wait_ready(files, Deadline.after(request.timeout_s), report)
        with lifetime.lock(files, report):
            passing.to_guest(session, request, report, is_new=is_new)
        yield session
    finally:
        if session is not None:
            session.close()


def _first_session(
    request: MachineRequest, files: MachineFiles, home: Home, report: Reporter
) -> tuple[Session | None, bool]:
    """Start the machine and wait for its guest, None when it runs already; tell whether the guest has just begun."""
    request = settle.settle(request, files, home.cache)
    if "disk" in request.demanded:
        lifetime.check_disk(files, request.disk_bytes)
    if _is_running(request, files, report):
        return None, False
    if (kept_here := suspension.find(files)) is not None:
        return go_on(kept_here, request, files, home, report), False
    shape = shape_of(request.name, request, home, report)
    record.forget_all(files.builds)
    lifetime.prepare(shape.spec, files, explicit_disk="disk" in request.given, firmware=shape.qemu.firmware)
    write_seed(files, f"vmbuild-{request.name}", passing.proxies(request))
    kept = snapshot.find(home.cache, shape.key) if shape.key else None
    if kept is not None:
        try:
            with _seen_to_work(files):
                return _restore(shape, kept, request, files, report), True
        except (MachineError, GuestError) as error:
            report.warn(f"the snapshot cannot be used ({error.brief}): booting instead")
    with _seen_to_work(files):
        report.step(f"Starting the machine {request.name}")
        lifetime.start(shape.spec, files, shape.qemu)
        session = wait_ready(files, Deadline.after(request.timeout_s), report)
    if kept is not None:  # the same machine boots: it was the snapshot's fault
        snapshot.remove(kept)
    if shape.key is not None:
        _start_making(shape, shape.key, request, home)
    return session, True


@contextmanager
def _seen_to_work(files: MachineFiles) -> Iterator[None]:
    """Stop a machine whose start nobody saw succeed: it would have to be found and ended."""
    try:
        yield
    except BaseException:
        lifetime.stop(files, Deadline.after(0))
        raise


@dataclass(frozen=True)
class Shape:
    """A machine as it is asked for, the QEMU for it, and the key of its snapshot; None where none will do."""

    spec: MachineSpec
    qemu: Qemu
    key: str | None


def shape_of(name: str, request: MachineRequest, home: Home, report: Reporter) -> Shape:
    """Return what a machine is asked to be, its guest image at hand. Raises GuestImageError or HostError."""
    image = fetch_image(request, home, report)
    spec = MachineSpec(name, request.cpus, request.memory_mib, request.disk_bytes, image)
    qemu = probe_for(image, home.cache)
    # With a real CPU under it a guest boots fast, and its memory is bound to that CPU. A disk's own system cannot be
    # parked.
    wanted = request.snapshots and qemu.accel == "tcg" and isinstance(image.boot, KernelBoot)
    return Shape(spec, qemu, snapshot.shape_key(spec, qemu) if wanted else None)


def _is_running(request: MachineRequest, files: MachineFiles, report: Reporter) -> bool:
    """Tell whether the machine runs, letting a paused one go on. Raises MachineError for one that does not answer."""
    now = lifetime.status(files)
    if now.state == "running":
        _warn_of_differences(request, now, report)
        if now.ssh_port is None:  # who woke it up was ended before it had
            ports.open_for_awake(files)
        return True
    if now.state == "paused" and files.suspension.exists():
        # Who suspended it was ended before QEMU was, or who let it go on before it ran: what was saved is all of it.
        lifetime.stop(files, Deadline.after(0))
        return False
    if now.state == "paused":
        report.step(f"Resuming the machine {request.name}")
        lifetime.resume(files)
        return True
    if now.state == "broken":
        raise MachineError(
            f"the machine {request.name} does not answer",
            resolution=f"End it with `vmbuild down {request.name}`, then run the command again.",
        )
    if now.state == "restoring":  # we hold the lock: whoever began this is gone
        lifetime.stop(files, Deadline.after(0))
    return False


def _restore(
    shape: Shape, kept: snapshot.Snapshot, request: MachineRequest, files: MachineFiles, report: Reporter
) -> Session:
    """Start a machine from its snapshot and wait for its guest. Raises MachineError or GuestError."""
    report.step(f"Restoring the machine {files.name}")
    with ThreadPoolExecutor(1) as beside:
        is_whole = beside.submit(snapshot.is_whole, kept)

        def check() -> None:
            if not is_whole.result():
                raise MachineError("it was changed since it was made")

        restore = lifetime.Restore(kept.ram, f"wake {round(time.time())}", check)
        lifetime.start(shape.spec, files, shape.qemu, restore=restore)
    return _wait_awake(files, Deadline.after(max(WAKE_S, request.timeout_s / 3)), report)


def _wait_awake(files: MachineFiles, limit: Deadline, report: Reporter, forwards: Sequence[Forward] = ()) -> Session:
    load_ssh()
    control.wait_for(files, "awake", limit)
    ports.open_for_awake(files, forwards)
    return wait_ready(files, limit, report)


def go_on(kept: Suspension, request: MachineRequest, files: MachineFiles, home: Home, report: Reporter) -> Session:
    """Let a suspended machine go on where it was. It is never booted instead: what runs in it would be lost.

    Raises UsageError when it is asked to be another, MachineError when this host cannot go on with it.
    """
    suspension.refuse_differences(kept, request)
    _warn_of_differences(request, lifetime.status(files), report)
    spec, qemu = fit_here(kept, request, home, report)
    write_seed(files, f"vmbuild-{files.name}", passing.proxies(request))
    report.step(f"Going on with the suspended machine {files.name}")
    session = wake(kept, spec, qemu, files, Deadline.after(request.timeout_s), report)
    if record.load_all(files.builds):
        report.step(f"A build goes on in it: `vmbuild attach {files.name}` shows and finishes it")
    return session


def wake(
    kept: Suspension,
    spec: MachineSpec,
    qemu: Qemu,
    files: MachineFiles,
    limit: Deadline,
    report: Reporter,
    forwards: Sequence[Forward] = (),
) -> Session:
    """Start a machine from its suspension, its ports as they were, and wait for its guest.

    Raises MachineError or GuestError.
    """
    with ThreadPoolExecutor(1) as beside:
        check = beside.submit(suspension.check, files, kept).result
        order = f"go_on {round(time.time())}"
        discard = partial(suspension.discard, files)
        restore = lifetime.Restore(files.memory, order, check, at_last=discard, fast=kept.fast, is_own=True)
        lifetime.start(spec, files, qemu, restore=restore)
    return _wait_awake(files, limit, report, forwards)


def fit_here(kept: Suspension, request: MachineRequest, home: Home, report: Reporter) -> tuple[MachineSpec, Qemu]:
    """Return the machine that can go on from a suspension on this host, and the QEMU for it. Raises MachineError."""
    image = _image_of(kept, request, home, report)
    qemu = probe_for(image, home.cache)
    return suspension.fit(kept.facts, _as_it_was(kept.facts, request.name, image), qemu, kept.qemu), qemu


def fit_again(files: MachineFiles, home: Home) -> tuple[MachineSpec, Qemu]:
    """Return the machine that one that runs here could go on as, and the QEMU for it. Raises MachineError for none."""
    facts = load_facts(files)
    image = store.find_digest(_spec_of(facts, home), facts.image_digest, home.cache) if facts is not None else None
    if facts is None or image is None:
        raise MachineError(f"the guest image of the machine {files.name} is not in the cache any more")
    qemu = probe_for(image, home.cache)
    return suspension.fit(facts, _as_it_was(facts, files.name, image), qemu), qemu


def _as_it_was(facts: Facts, name: str, image: GuestImage) -> MachineSpec:
    return MachineSpec(name, facts.cpus, facts.memory_mib, facts.disk_bytes, image)


def _spec_of(facts: Facts, home: Home) -> ImageSpec:
    # By its name only: the facts may be a bundle's, whose maker must not have a file of this host or a URL taken.
    return catalog.load_image(facts.image, catalog.find_folders(home.cache))


def _image_of(kept: Suspension, request: MachineRequest, home: Home, report: Reporter) -> GuestImage:
    """Return the guest image that a suspended machine needs, assembled if the cache has it not."""
    spec = _spec_of(kept.facts, home)
    found = store.find_digest(spec, kept.facts.image_digest, home.cache)
    return found or fetch_image(replace(request, image=spec.name, arch=None), home, report)


def _start_making(shape: Shape, key: str, request: MachineRequest, home: Home) -> None:
    """Have the snapshot made that the next start of such a machine wants, in the background and out of the way."""

    def is_wanted() -> bool:
        return _has_room(request, home) and snapshot.may_try(home.cache, key)

    env = {**asking_for(request, home.cache), "VMBUILD_ARCH": arch_name(shape.spec.image.arch)}
    begin_later(["images", "snapshot", "--in-background"], home.cache / "snapshot.log", env, is_wanted)


def begin_later(words: Sequence[str], log: Path, env: Mapping[str, str], is_wanted: Callable[[], bool]) -> None:
    """Have another vmbuild do something in the background, beside its log, where that is wanted.

    Not in CI: a job has no CPU time to spare, and its next build comes at once or never. What cannot be begun costs
    nothing: the machine is up, and it can wait for another time.
    """
    if os.environ.get("CI"):
        return
    argv = [sys.executable, "-m", "vmbuild", *words]
    with suppress(HostError, MachineError, OSError):
        if is_wanted():
            with process.starting(argv, cwd=log.parent, log=log, env=env):
                pass


def asking_for(request: MachineRequest, cache: Path) -> dict[str, str]:
    """Return this process's environment, in which another vmbuild asks for such a machine."""
    passed = request.pass_on
    settings = {
        "CPUS": str(request.cpus),
        "MEMORY": f"{request.memory_mib}M",
        "IMAGE": request.image,
        "TIMEOUT": f"{request.timeout_s}s",
        "MIRROR": request.mirror,
        "SECURITY_MIRROR": request.security_mirror,
        "CACHE_DIR": str(cache),
        "PROXY": _switch(passed.proxy),
        "CA": _listed(passed.authorities),
        "REGISTRY_MIRRORS": _listed(passed.registry_mirrors),
        "INSECURE_REGISTRIES": _listed(passed.insecure_registries),
        "HOST_PORTS": _listed(passed.host_ports),
        "LOGINS": _switch(passed.logins),
    }
    return {**os.environ, **{f"VMBUILD_{name}": value for name, value in settings.items()}}


def _switch(is_on: bool) -> str:
    return "on" if is_on else "off"


def _listed(values: Sequence[object]) -> str:
    return ",".join(map(str, values)) or "off"


def _has_room(request: MachineRequest, home: Home) -> bool:
    """Tell whether the host has memory and disk for another such machine: the user's own must not run out of either."""
    needed = request.memory_mib * MIB + SPARE_BYTES
    memory = process.available_memory_bytes()
    return (memory is None or memory > needed) and shutil.disk_usage(home.cache).free > needed


def fetch_image(request: MachineRequest, home: Home, report: Reporter, *, refresh: bool = False) -> GuestImage:
    """Return the guest image from the cache, made first where it is not there, or with `refresh` of what is new."""
    if is_place(request.image):
        passing.trust_here(request)
    spec = settle.choose_image(request, home.cache)
    if not refresh and (found := store.find(spec, home.cache)) is not None:
        return found
    passing.trust_here(request)
    with store.renewing(spec, home.cache, report) if refresh else nullcontext():
        if isinstance(spec, DiskSpec):
            from vmbuild import provision

            return provision.ensure(spec, request, home, report)
        mirrors = {"debian": request.mirror, "debian-security": request.security_mirror}
        return store.ensure(spec, mirrors, home.cache, report)


def _warn_of_differences(request: MachineRequest, now: MachineStatus, report: Reporter) -> None:
    asked = {
        "cpus": str(request.cpus),
        "memory": format_size(request.memory_mib * MIB),
        "disk": format_size(request.disk_bytes),
        "image": request.image,
    }
    has = {
        "cpus": str(now.cpus),
        "memory": format_size((now.memory_mib or 0) * MIB),
        "disk": format_size(now.disk_virtual_bytes or 0),
        "image": now.image,
    }
    if request.disk_bytes < (now.disk_virtual_bytes or 0):  # it has grown: that will do
        del asked["disk"]
    for key in sorted(request.given & asked.keys()):
        if asked[key] != has[key]:
            report.warn(
                f"the machine {request.name} runs with {key} {has[key]}; "
                f"{asked[key]} takes effect after `vmbuild down {request.name}`"
            )
