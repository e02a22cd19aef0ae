"""The recipe: fetch a guest image, run a machine, work in its guest.

Read this first, then `start`, how a machine comes up, and `operate`, what is done with one that is there. Every command
is one function, its steps in order; no step calls the next.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

from vmbuild import deliver, follow, operate, passing, process, record, settle, supply
from vmbuild.address import is_remote, seen_from_guest
from vmbuild.errors import OutOfMemoryError, UsageError, VmbuildError
from vmbuild.follow import Watch
from vmbuild.guest import bases, context, copying, docker, oom, transfer
from vmbuild.guest.channel import Channel
from vmbuild.guest.session import Session, send
from vmbuild.image import base as base_image
from vmbuild.image import catalog
from vmbuild.image.base import BasePlan
from vmbuild.lock import hold
from vmbuild.machine import lifetime
from vmbuild.machine.files import MachineFiles
from vmbuild.machine.resources import CLOSE_ENOUGH_MIB
from vmbuild.model import MIB, PLATFORMS, BaseResult, BuildRequest, BuildResult, Home, MachineRequest, format_size
from vmbuild.reach import channel_of
from vmbuild.record import BuildRecord
from vmbuild.report import Reporter
from vmbuild.start import open_session
from vmbuild.supply import Given, Way


def build(
    request: MachineRequest,
    asked: BuildRequest,
    home: Home,
    report: Reporter,
    *,
    stdin: BinaryIO,
    stdout: BinaryIO,
    watch: Watch,
) -> BuildResult:
    """Build a container image in the guest and bring it back. Raises BuildError when a step of the Dockerfile fails."""
    while True:
        try:
            return _build_once(request, asked, home, report, stdin, stdout, watch)
        except OutOfMemoryError as error:
            if not asked.oom_retry or (larger := _grow(request, home, report)) is None:
                raise
            report.warn(f"{error.brief}: out of memory, building again with {format_size(larger.memory_mib * MIB)}")
            request = larger


def _grow(request: MachineRequest, home: Home, report: Reporter) -> MachineRequest | None:
    """Give a machine more memory: what it was started with, else up to twice that. Returns None when there is none."""
    files = MachineFiles.at(home.state, request.name)
    now = lifetime.status(files)
    most, has = now.memory_mib or request.memory_mib, now.memory_now_mib or 0
    if 0 < has < most - CLOSE_ENOUGH_MIB:
        operate.resize(request.name, home, report, cpus=None, memory_mib=most, disk_bytes=None)
        return replace(request, memory_mib=most)
    spare = process.available_memory_bytes()
    larger = settle.limit_memory(2 * most, settle.machine_arch(request, files, home.cache))
    if larger <= most or (spare is not None and spare < most * MIB) or record.load_all(files.builds):
        return None  # machine or host has no more, or another build would go down with the machine
    operate.down(request.name, home, report)
    return replace(request, memory_mib=larger)


def _build_once(
    request: MachineRequest,
    asked: BuildRequest,
    home: Home,
    report: Reporter,
    stdin: BinaryIO,
    stdout: BinaryIO,
    watch: Watch,
) -> BuildResult:
    begun = time.time()
    files = MachineFiles.at(home.state, request.name)
    arch = settle.machine_arch(request, files, home.cache)
    asked = replace(asked, platforms=settle.choose_platforms(asked.platforms, arch))
    is_elsewhere = asked.context == "-" or is_remote(asked.context)
    source = None if is_elsewhere else context.open_context(Path(asked.context), asked.dockerfile, stdin)
    passing.trust_here(request)
    deliver.check_all(asked.outputs, asked.tags, asked.platforms, str(Path.cwd()))
    _forget_old_results(asked)
    request = passing.for_build(request, asked, source)
    client = passing.client_config(request, asked, source, report)
    with (
        supply.prepared(asked.inputs, report) as supplies,
        open_session(request, home, report) as session,
        ExitStack() as until_ended,
    ):
        work = docker.make_workspace(session)
        with _removed_on_failure(session, work), ExitStack() as until_begun:
            way = Way(session, work.folder, files.contexts, channel_of(files), report)
            placed = (
                _place_context(source, until_begun, work, way) if source else _leave_context(asked, stdin, work, way)
            )
            given = supplies.bring(way, until_begun, until_ended)
            started = _start(asked, placed, given, client, session, work, files, begun)
        return follow.to_the_end(follow.Running(started, files, session), home, report, stdout=stdout, watch=watch)


@contextmanager
def _removed_on_failure(session: Session, work: docker.Workspace) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with suppress(VmbuildError):  # a guest that is gone or stopped must not hide why
            docker.remove_workspace(session, work)
        raise


def _start(
    asked: BuildRequest,
    placed: Placed,
    given: Given,
    client: passing.ClientConfig | None,
    session: Session,
    work: docker.Workspace,
    files: MachineFiles,
    begun: float,
) -> BuildRecord:
    """Start a build and remember it."""
    started = BuildRecord(
        folder=work.folder,
        tags=asked.tags,
        outputs=tuple(each.text for each in asked.outputs),
        iidfile=str(asked.iidfile) if asked.iidfile else None,
        metadata_file=str(asked.metadata_file) if asked.metadata_file else None,
        quiet=asked.quiet,
        cwd=str(Path.cwd()),
        context_bytes=placed.sent_bytes,
        boot_s=oom.read_clock(session),
        started_at=begun,
        has_secrets=bool(given.held) or (client is not None and client.has_logins),
        agents=given.agents,
        caches=given.caches,
    )
    argv = docker.build_argv(asked, work, placed.where, placed.dockerfile, given.argv)
    config = client.content if client is not None else None
    docker.start_build(
        *(session, work, argv), stdin=placed.stdin, terminal=asked.terminal, client=config, held=given.held
    )
    record.save(files.builds, started)
    return started


@dataclass(frozen=True)
class Placed:
    """A context as the guest sees it: where it is, its Dockerfile, and the file that is the build's standard input."""

    where: str
    dockerfile: str | None
    stdin: str | None = None
    sent_bytes: int = 0


def _place_context(source: context.Context, until_begun: ExitStack, work: docker.Workspace, way: Way) -> Placed:
    """Send a folder of the host into the guest, or what changed of it."""
    session = way.session
    way.report.step("Sending the build context")
    where, sent = supply.bring_folder(source, supply.MAIN, way, until_begun)
    if source.dockerfile_url is not None:
        return Placed(where, seen_from_guest(source.dockerfile_url), None, sent)
    if source.dockerfile_inside is not None:
        return Placed(where, f"{where}/{source.dockerfile_inside}", None, sent)
    transfer.write_file(session, work.dockerfile, send(source.dockerfile_content))
    # The host has left out what stays at home; BuildKit would ask the context's .dockerignore again.
    transfer.write_file(session, f"{work.dockerfile}.dockerignore", send(b"# nothing more\n"))
    return Placed(where, work.dockerfile, None, sent)


def _leave_context(asked: BuildRequest, stdin: BinaryIO, work: docker.Workspace, way: Way) -> Placed:
    """Leave a context to Docker that is Docker's to fetch; what it wants to read on standard input goes before it."""
    session = way.session
    where, dockerfile = seen_from_guest(asked.context), asked.dockerfile and seen_from_guest(asked.dockerfile)
    if "-" in (where, dockerfile):
        way.report.step("Sending standard input")
        sent = transfer.write_stdin(session, work.stdin, stdin, way.channel, way.report)
        return Placed(where, dockerfile, work.stdin, sent)
    if dockerfile and Path(dockerfile).is_absolute() and Path(dockerfile).is_file():  # the host's, as buildx has it
        transfer.write_file(session, work.dockerfile, send(Path(dockerfile).read_bytes()))
        return Placed(where, work.dockerfile)
    return Placed(where, dockerfile)


def _forget_old_results(asked: BuildRequest) -> None:
    """Remove what an earlier build wrote: a build that fails must not leave another's id to be read."""
    for path in filter(None, (asked.iidfile, asked.metadata_file)):
        if not path.parent.is_dir():
            raise UsageError(f"cannot write {path}", resolution="Name a file in a folder that exists.")
        if path.is_file() and not path.is_symlink():
            path.unlink()


def base(
    request: MachineRequest,
    reference: str,
    home: Home,
    report: Reporter,
    *,
    platforms: Sequence[str],
    force: bool,
) -> BaseResult:
    """Make a Debian base image in the guest from signed packages, for each platform. Needs no registry.

    What the machine has of it for other platforms stays.
    """
    spec = catalog.load_base(reference)
    files = MachineFiles.at(home.state, request.name)
    platforms = settle.choose_platforms(platforms, settle.machine_arch(request, files, home.cache))
    with open_session(request, home, report) as session:
        found = bases.find(session, spec.repo_tag)
        have = found.manifests if found else {}
        missing = [name for name in platforms if force or name not in have]
        if found and not missing:
            return BaseResult(spec.repo_tag, platforms, found.image_id)
        mirrors = {"debian": request.mirror, "debian-security": request.security_mirror}
        layers = {}
        for name in missing:
            plan = base_image.plan(spec, PLATFORMS[name].debian, mirrors, home.cache, report)
            layers[name] = _make_layer(plan, session, channel_of(files), report)
        report.step(f"Loading {spec.repo_tag}")
        with docker.workspace(session) as work:
            write = partial(bases.write_archive, reference=spec.repo_tag, layers=layers, others=have)
            transfer.write_large_file(session, work.archive, write, channel_of(files))
            return BaseResult(spec.repo_tag, platforms, bases.load(session, work.archive, spec.repo_tag))


def _make_layer(plan: BasePlan, session: Session, channel: Channel, report: Reporter) -> bases.Layer:
    """Return a base image's layer, made in the guest when the host has not kept it."""
    with hold(plan.layer.with_name(f"{plan.layer.name}.lock"), report, f"makes {plan.spec.repo_tag}"):
        if not base_image.is_kept(plan):
            _configure_layer(plan, session, channel, report)
    return bases.Layer(plan.layer, base_image.digest_file(plan.layer).read_text(), base_image.hash_plain(plan.layer))


def _configure_layer(plan: BasePlan, session: Session, channel: Channel, report: Reporter) -> None:
    with docker.workspace(session) as work:
        report.step(f"Unpacking {len(plan.packages)} packages in the guest")
        tree = partial(base_image.write_plan, plan, report=report)
        transfer.unpack_tree(session, work.context, tree, channel)
        report.step("Configuring the packages in the guest")
        with report.meter("configure", len(plan.packages), unit="packages") as meter:
            docker.configure_tree(session, work, meter)
        report.step("Bringing the base image back, for the next machine")
        with copying.packed(session, channel, work.context, report) as stream:
            base_image.keep_layer(plan, stream.read)
