"""The recipe: fetch a guest image, run a machine, work in its guest.

Read this first: every command is one function here, its steps in order; no step calls the next.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from vmbuild.deadline import Deadline
from vmbuild.errors import GuestError, MachineError, UsageError
from vmbuild.guest import archive, clock, context, docker, ready, seed, ssh, terminal
from vmbuild.guest.session import Session, send
from vmbuild.image import base as base_image
from vmbuild.image import catalog, store
from vmbuild.machine import lifetime, serial
from vmbuild.machine.files import MachineFiles
from vmbuild.machine.probe import probe
from vmbuild.model import (
    MIB,
    PLATFORMS,
    BuildRequest,
    BuildResult,
    Endpoint,
    GuestImage,
    Home,
    MachineRequest,
    MachineSpec,
    MachineStatus,
    format_size,
)
from vmbuild.report import Reporter
from vmbuild.whole import write_whole

POWER_OFF_S = 60.0
"""How long a guest may take to power off: Docker alone has ten seconds, on a busy host more."""

LOG_IN_S = 20.0
"""How long a guest that is asked to power off may take to let us in."""


def up(request: MachineRequest, home: Home, report: Reporter) -> MachineStatus:
    """Start the machine, or find it running; return when Docker answers."""
    with open_session(request, home, report):
        return status(request.name, home)


@contextmanager
def open_session(request: MachineRequest, home: Home, report: Reporter) -> Iterator[Session]:
    """Yield a session in a guest that is ready, starting the machine when it does not run."""
    files = MachineFiles.at(home.state, request.name)
    with lifetime.lock(files, report):
        # Held until the guest is ready: who comes meanwhile must not build on a start that may yet be given up.
        session = _first_session(request, files, home, report)
    try:
        session = session or _wait_ready(request, files, report)
        clock.set_clock(session, time.time())
        yield session
    finally:
        if session is not None:
            session.close()


def _first_session(request: MachineRequest, files: MachineFiles, home: Home, report: Reporter) -> Session | None:
    """Start the machine and wait for its guest; None when it runs already."""
    if not _ensure_running(request, files, home, report):
        return None
    try:
        return _wait_ready(request, files, report)
    except BaseException:  # nobody has seen this machine work: leave nothing behind that has to be found and ended
        lifetime.stop(files, Deadline.after(POWER_OFF_S))
        raise


def _wait_ready(request: MachineRequest, files: MachineFiles, report: Reporter) -> Session:
    return ready.wait_ready(
        lambda limit: _connect(files, limit),
        lambda: lifetime.check_running(files),
        Deadline.after(request.timeout_s),
        report,
    )


def _ensure_running(request: MachineRequest, files: MachineFiles, home: Home, report: Reporter) -> bool:
    """Start the machine unless it runs; tell whether it was started here."""
    now = lifetime.status(files)
    if now.state == "running":
        _warn_of_differences(request, now, report)
        return False
    if now.state == "paused":
        report.step(f"Resuming the machine {request.name}")
        lifetime.resume(files)
        return False
    if now.state == "broken":
        raise MachineError(
            f"the machine {request.name} does not answer",
            resolution=f"End it with `vmbuild down {request.name}`, then run the command again.",
        )
    image = fetch_image(request, home, report)
    spec = MachineSpec(request.name, request.cpus, request.memory_mib, request.disk_bytes, image)
    qemu = probe(image.arch, home.cache)
    lifetime.prepare(spec, files, explicit_disk="disk" in request.given)
    seed.write_seed(
        files.seed,
        hostname=f"vmbuild-{request.name}",
        client_key=files.client_key,
        host_key=files.host_key,
        environment=seed.proxies(os.environ),
    )
    report.step(f"Starting the machine {request.name}")
    lifetime.start(spec, files, qemu)
    return True


def fetch_image(request: MachineRequest, home: Home, report: Reporter) -> GuestImage:
    """Return the guest image from the cache, assembling it first where it is not there."""
    mirrors = {"debian": request.mirror, "debian-security": request.security_mirror}
    return store.ensure(catalog.load_image(request.image), mirrors, home.cache, report)


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
    for key in sorted(request.given & asked.keys()):
        if asked[key] != has[key]:
            report.warn(
                f"the machine {request.name} runs with {key} {has[key]}; "
                f"{asked[key]} takes effect after `vmbuild down {request.name}`"
            )


def _connect(files: MachineFiles, limit: Deadline) -> Session:
    return ssh.SshSession.connect(_endpoint(files), limit, lambda: lifetime.check_running(files))


def _endpoint(files: MachineFiles) -> Endpoint:
    now = lifetime.status(files)
    if now.ssh_port is None:
        raise MachineError(f"the machine {now.name} forwards no SSH port", resolution="Run `vmbuild down` and `up`.")
    return Endpoint("127.0.0.1", now.ssh_port, "root", files.client_key, files.host_public_key)


@contextmanager
def running_session(name: str, home: Home) -> Iterator[Session]:
    """Yield a session in a machine that runs already. Raises MachineError when it does not."""
    files = MachineFiles.at(home.state, name)
    if lifetime.status(files).state != "running":
        raise MachineError(
            f"the machine {name} is not running", resolution=f"Start it with `vmbuild up --name {name}`."
        )
    session = _connect(files, Deadline.after(30))
    try:
        yield session
    finally:
        session.close()


def build(
    request: MachineRequest, job: BuildRequest, home: Home, report: Reporter, *, stdin: BinaryIO, stdout: BinaryIO
) -> BuildResult:
    """Build a container image in the guest and bring it back. Raises BuildError when a step of the Dockerfile fails."""
    begun = time.monotonic()
    source = None if _is_remote(job.context) else context.open_context(Path(job.context), job.dockerfile, stdin)
    archive.check_output(job.output)
    _forget_old_results(job)
    size = 0
    with open_session(request, home, report) as session, docker.workspace(session) as work:
        placed = _place_context(source, session, work, report) if source else _leave_context(job, stdin, session, work)
        # Not before the context has gone: the unfinished archive may lie in the context's folder.
        with archive.open_output(job.output, stdout) as out:
            report.step("Building")
            argv = docker.build_argv(job, work, placed.where, placed.dockerfile)
            docker.run_build(session, argv, report.output, stdin=placed.stdin, terminal=job.terminal, quiet=job.quiet)
            image_id, metadata = docker.image_id(session, work)
            if job.output is not None:
                report.step("Bringing the container image back")
                known = base_image.known_layers(home.cache)
                size = archive.write_archive(session, image_id, job.tags, out, known, report)
    _write_result_files(job, image_id, metadata)
    return BuildResult(image_id, job.tags, job.output, size, placed.sent_bytes, time.monotonic() - begun)


@dataclass(frozen=True)
class Placed:
    """A context as the guest sees it: where it is, its Dockerfile, and the file that is the build's standard input."""

    where: str
    dockerfile: str | None
    stdin: str | None = None
    sent_bytes: int = 0


def _place_context(source: context.Context, session: Session, work: docker.Workspace, report: Reporter) -> Placed:
    """Send a folder of the host into the guest."""
    report.step("Sending the build context")
    with report.meter("context", None) as meter:
        sent = docker.unpack_context(session, work, source.write_tar, meter)
    if source.dockerfile_inside is not None:
        return Placed(work.context, f"{work.context}/{source.dockerfile_inside}", None, sent)
    docker.write_file(session, work.dockerfile, send(source.dockerfile_content))
    # The host has left out what stays at home; BuildKit would ask the context's .dockerignore again.
    docker.write_file(session, f"{work.dockerfile}.dockerignore", send(b"# nothing more\n"))
    return Placed(work.context, work.dockerfile, None, sent)


def _leave_context(job: BuildRequest, stdin: BinaryIO, session: Session, work: docker.Workspace) -> Placed:
    """Leave a context to Docker that is Docker's to fetch; what it wants to read on standard input goes before it."""
    if "-" not in (job.context, job.dockerfile):
        return Placed(job.context, job.dockerfile)
    sent = docker.write_stdin(session, work, stdin)
    return Placed(job.context, job.dockerfile, work.stdin, sent)


def _is_remote(text: str) -> bool:
    """Tell whether a context is Docker's to fetch: standard input, a URL, or Git's short forms."""
    return text == "-" or "://" in text or text.startswith(("git@", "github.com/"))


def _forget_old_results(job: BuildRequest) -> None:
    """Remove what an earlier build wrote: a build that fails must not leave another's id to be read."""
    for path in filter(None, (job.iidfile, job.metadata_file)):
        if not path.parent.is_dir():
            raise UsageError(f"cannot write {path}", resolution="Name a file in a folder that exists.")
        if path.is_file() and not path.is_symlink():
            path.unlink()


def _write_result_files(job: BuildRequest, image_id: str, metadata: str) -> None:
    for path, text in ((job.iidfile, image_id), (job.metadata_file, metadata)):
        if path is not None:
            write_whole(path, text.encode())


def base(request: MachineRequest, reference: str, home: Home, report: Reporter, *, platform: str, force: bool) -> str:
    """Make a Debian base image in the guest from signed packages; return its id. Needs no registry."""
    spec = catalog.load_base(reference)
    if platform not in PLATFORMS:
        raise UsageError(
            f"vmbuild cannot make a base image for {platform}", resolution=f"Choose one of: {', '.join(PLATFORMS)}."
        )
    with open_session(request, home, report) as session:
        if not force and (found := docker.image_for(session, spec.repo_tag, platform)):
            return found
        mirrors = {"debian": request.mirror, "debian-security": request.security_mirror}
        plan = base_image.plan(spec, PLATFORMS[platform], mirrors, home.cache, report)
        with docker.workspace(session) as work:
            if not base_image.is_kept(plan):
                report.step(f"Unpacking {len(plan.packages)} packages in the guest")
                docker.unpack_tree(session, work, lambda sink: base_image.write_plan(plan, sink, report))
                report.step("Configuring the packages in the guest")
                with report.meter("configure", len(plan.packages), unit="packages") as meter:
                    docker.configure_tree(session, work, meter)
                report.step("Bringing the base image back, for the next machine")
                with base_image.layer_writer(plan) as write:
                    docker.pack_tree(session, work, write)
            report.step(f"Loading {spec.repo_tag}")
            return docker.import_image(session, work, base_image.feed_layer(plan), spec.repo_tag, platform)


def run_in_guest(name: str, argv: Sequence[str], home: Home) -> int:
    """Run a command in the guest on this process's terminal or pipes, or a shell; return its exit code."""
    with running_session(name, home) as session:
        return terminal.attach(session, argv)


def down(name: str, home: Home, report: Reporter) -> bool:
    """Stop the machine, keeping its disk; tell whether it ran."""
    files = _existing(name, home)
    with lifetime.lock(files, report):
        if lifetime.status(files).state == "stopped":
            return False
        report.step(f"Stopping the machine {name}")
        lifetime.stop(files, Deadline.after(POWER_OFF_S), ask=lambda limit: _power_off(files, limit))
        return True


def _power_off(files: MachineFiles, deadline: Deadline) -> None:
    """Ask the guest to power off. Raises MachineError or GuestError when it cannot be asked."""
    session = ready.connect_when_up(
        lambda limit: _connect(files, limit), lambda: lifetime.check_running(files), Deadline.after(LOG_IN_S)
    )
    try:
        with suppress(GuestError):  # the answer may be lost with the connection
            session.run(["poweroff"], deadline=deadline)
    finally:
        session.close()


def destroy(name: str, home: Home, report: Reporter) -> bool:
    """Stop the machine without asking and delete its folder: disk, keys, logs. Tell whether there was one."""
    files = MachineFiles.at(home.state, name)
    if not files.folder.exists():
        return False
    with lifetime.lock(files, report):
        if not files.folder.exists():  # another destroy was first
            return False
        report.step(f"Destroying the machine {name}")
        lifetime.stop(files, Deadline.after(POWER_OFF_S))
        lifetime.destroy(files)
    return True


def status(name: str, home: Home) -> MachineStatus:
    """Return what the machine is now. Raises UsageError when there is none by this name."""
    return lifetime.status(_existing(name, home))


def list_machines(home: Home) -> list[MachineStatus]:
    """Return every machine of this user."""
    return lifetime.list_machines(home.state)


def _existing(name: str, home: Home) -> MachineFiles:
    files = MachineFiles.at(home.state, name)
    if not files.folder.exists():
        raise UsageError(
            f"there is no machine named {name}",
            resolution=f"Make it with `vmbuild up --name {name}`, or see `vmbuild list`.",
        )
    return files


def console(name: str, home: Home) -> None:
    """Connect this terminal to the machine's serial console."""
    files = _existing(name, home)
    lifetime.check_alive(files)
    serial.attach_console(files.console)


def logs(name: str, home: Home, lines: int, follow: bool) -> Iterator[str]:
    """Yield the last lines of the console's log, then, with `follow`, each new one."""
    return serial.follow(_existing(name, home).console_log, lines, follow)


@dataclass(frozen=True)
class ImageRow:
    """A guest image of the catalogue; digest and size only where it is assembled already."""

    name: str
    kind: str
    arch: str
    description: str
    digest: str | None
    size_bytes: int | None
    origin: Path


def list_images(home: Home) -> list[ImageRow]:
    """Return every guest image of the catalogue, and what of it is in the cache."""
    rows = []
    for spec in catalog.list_images():
        found = store.find(spec, home.cache)
        digest, size = (found.digest, found.size_bytes) if found else (None, None)
        origin = spec.folder / f"{spec.name}.toml"
        rows.append(ImageRow(spec.name, spec.kind, str(spec.arch), spec.description, digest, size, origin))
    return rows


def verify_images(home: Home) -> list[store.Check]:
    """Hash every cached guest image again."""
    return store.verify(home.cache)
