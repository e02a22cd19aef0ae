"""The recipe: fetch a guest image, run a machine, work in its guest.

Read this first, then `start`, how a machine comes up, and `operate`, what is done with one that is there. Every command
is one function, its steps in order; no step calls the next.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from vmbuild.errors import BuildError, GuestError, MachineError, UsageError, VmbuildError
from vmbuild.guest import archive, context, docker, oom, resources
from vmbuild.guest.session import Session, send
from vmbuild.image import base as base_image
from vmbuild.image import catalog
from vmbuild.machine import lifetime
from vmbuild.model import (
    MIB,
    PLATFORMS,
    BuildRequest,
    BuildResult,
    Home,
    MachineRequest,
    MachineStatus,
    format_size,
)
from vmbuild.report import Reporter
from vmbuild.start import existing, open_session
from vmbuild.whole import write_whole


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
            with _explaining_memory(session, request.name, home):
                docker.run_build(
                    session, argv, report.output, stdin=placed.stdin, terminal=job.terminal, quiet=job.quiet
                )
            image_id, metadata = docker.image_id(session, work)
            if job.output is not None:
                report.step("Bringing the container image back")
                known = base_image.known_layers(home.cache)
                size = archive.write_archive(session, image_id, job.tags, out, known, report)
        with suppress(GuestError):  # the build is done
            resources.trim_later(session)
    _write_result_files(job, image_id, metadata)
    return BuildResult(image_id, job.tags, job.output, size, placed.sent_bytes, time.monotonic() - begun)


@contextmanager
def _explaining_memory(session: Session, name: str, home: Home) -> Iterator[None]:
    """Say of a build that failed what its own output does not: a process was killed for want of memory."""
    begun = oom.read_clock(session)
    try:
        yield
    except (BuildError, GuestError) as error:
        victim: oom.Victim | None = None
        with suppress(GuestError, MachineError):
            victim = next(reversed(oom.find_victims(session, begun)), None)
        if victim is None:
            raise
        raise _out_of_memory(error, victim, lifetime.status(existing(name, home))) from error


def _out_of_memory(error: VmbuildError, victim: oom.Victim, machine: MachineStatus) -> BuildError:
    most = machine.memory_mib or 0
    has = machine.memory_now_mib or most
    more = f"`vmbuild resize {machine.name} --memory {most}M`"
    if has >= most:
        more = f"`vmbuild down {machine.name}`, then this command with --memory {2 * most}M"
    return BuildError(
        error.brief,
        details=f"{error.details}\nThe guest ran out of memory: its kernel killed {victim.process}, which held "
        f"{format_size(victim.memory_mib * MIB)} of the machine's {format_size(has * MIB)}.",
        resolution=f"Run fewer jobs at once (`make -j1`), or give the machine more: {more}.",
    )


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
