"""The recipe of what a build is given besides its context: an agent, secrets, contexts with names, caches.

First all that is the host's is looked at, before a machine is started; then it is brought into the guest.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from vmbuild import host_agent
from vmbuild.errors import HostError, UsageError
from vmbuild.guest import agent, context, secrets, sync, transfer
from vmbuild.guest.channel import Channel
from vmbuild.guest.context import Context
from vmbuild.guest.session import Session, capture
from vmbuild.inputs import Cache, Inputs, NamedContext, SshSource, read_ssh, write_fields
from vmbuild.report import Reporter

MAIN = "context"
"""The main context in a build's workspace, where it cannot have a place that stays (`docker.Workspace`)."""


@dataclass(frozen=True)
class Given:
    """What a build has been given: words for buildx, and files that the guest keeps in memory while it runs.

    `held` is None where it keeps nothing, agents neither. `agents` and `caches` are what a record remembers: the
    agents that were lent, and the folders of the host where the caches go that the build makes.
    """

    argv: tuple[str, ...] = ()
    held: Mapping[str, bytes] | None = field(default=None, repr=False)
    agents: tuple[str, ...] = ()
    caches: tuple[str, ...] = ()


@dataclass(frozen=True)
class Way:
    """How a build's context travels: into which guest, over which drives, for which workspace."""

    session: Session
    workspace: str
    listings: Path
    channel: Channel
    report: Reporter


@contextmanager
def prepared(asked: Inputs, report: Reporter) -> Iterator[Supplies]:
    """Yield what a build is to be given, the host's side of it ready. Raises UsageError for what is not there."""
    for secret in asked.secrets:
        if not secret.content:
            report.warn(f"the secret {secret.id} is empty")
    with ExitStack() as stack:
        asks = [(source, stack.enter_context(host_agent.opened(source))) for source in asked.ssh]
        caches = [cache for cache in asked.cache_from if _is_there(cache, report)]
        yield Supplies(asked, asks, caches)


def _is_there(cache: Cache, report: Reporter) -> bool:
    """Tell whether a cache is there: the first build of a kind has none yet, which is no fault (as with buildx)."""
    if cache.folder is None or Path(cache.folder, "index.json").is_file():
        return True
    report.warn(f"there is no build cache in {cache.folder}")
    return False


class Supplies:
    """What a build is to be given."""

    def __init__(self, asked: Inputs, asks: list[tuple[SshSource, agent.Ask]], caches: list[Cache]) -> None:
        self._asked, self._asks, self._caches = asked, asks, caches

    def bring(self, way: Way, until_begun: ExitStack, until_ended: ExitStack) -> Given:
        """Bring it into the guest. Raises GuestError, UsageError for a file that cannot be read."""
        asked, argv = self._asked, list[str]()
        for number, (source, ask) in enumerate(self._asks):
            socket = agent_socket(way.workspace, number)
            until_ended.enter_context(agent.lent(way.session, socket, ask))
            argv += ["--ssh", f"{source.id}={socket}"]
        held = secrets.folder_of(way.workspace)
        for number, secret in enumerate(asked.secrets):
            argv += ["--secret", write_fields([("id", secret.id), ("src", f"{held}/{number}")])]
        for number, each in enumerate(asked.contexts):
            argv += ["--build-context", f"{each.name}={_bring_context(each, number, way, until_begun)}"]
        for number, cache in enumerate(self._caches):
            argv += ["--cache-from", write_fields(_import_fields(cache, number, way, until_begun))]
        folders = list(dict.fromkeys(cache.folder for cache in asked.cache_to if cache.folder is not None))
        for cache in asked.cache_to:
            argv += ["--cache-to", write_fields(_export_fields(cache, folders, way))]
        files = {str(number): secret.content for number, secret in enumerate(asked.secrets)}
        agents = tuple(source.text for source in asked.ssh)
        return Given((*argv, *asked.options), files if files or agents else None, agents, tuple(folders))


def cache_place(workspace: str, number: int) -> str:
    """Return where one of the caches lies that the build of a workspace makes."""
    return f"{workspace}/cache.{number}"


def agent_socket(workspace: str, number: int) -> str:
    """Return where one of its agents listens for the build of a workspace."""
    return f"{secrets.folder_of(workspace)}/agent.{number}"


@contextmanager
def agents_lent(session: Session, workspace: str, sources: Sequence[str], report: Reporter) -> Iterator[None]:
    """Lend a build that runs already the agents that it was started with, where there are any now."""
    with ExitStack() as stack:
        for number, text in enumerate(sources):
            try:
                ask = stack.enter_context(host_agent.opened(read_ssh(text, os.environ)))
            except (UsageError, HostError) as error:
                report.warn(f"{error.brief}: the build goes on without")
            else:
                stack.enter_context(agent.lent(session, agent_socket(workspace, number), ask))
        yield


def _bring_context(named: NamedContext, number: int, way: Way, until_begun: ExitStack) -> str:
    if named.folder is None:
        return named.before
    folder = Path(named.folder)
    whole = bool(named.before)  # an OCI layout, of which nothing stays at home
    source = Context(folder, None) if whole else context.open_folder(folder)
    return f"{named.before}{bring_folder(source, f'context.{number}', way, until_begun)[0]}{named.after}"


def bring_folder(source: Context, name: str, way: Way, until_begun: ExitStack) -> tuple[str, int]:
    """Bring the guest's copy of a folder up to date, else send all of it; return its place and what travelled.

    `name` is its place in the workspace where it cannot have one that stays.
    """
    copy = until_begun.enter_context(sync.claimed(way.session, source, way.workspace, way.listings))
    if copy is not None:
        try:
            return copy.folder, sync.update(way.session, source, copy, way.channel, way.report)
        except transfer.DiskFullError:  # what is kept for later builds must not be what this one fails for
            sync.clear(way.session)
    place = f"{way.workspace}/{name}"
    if name != MAIN:
        capture(way.session, ["mkdir", place])
    return place, transfer.unpack_context(way.session, place, source.write_tar, way.channel, way.report)


def _import_fields(cache: Cache, number: int, way: Way, until_begun: ExitStack) -> list[tuple[str, str]]:
    if cache.folder is None:
        return list(cache.fields)
    place, _ = bring_folder(Context(Path(cache.folder), None), f"from.{number}", way, until_begun)
    return [*cache.fields, ("src", place)]


def _export_fields(cache: Cache, folders: list[str], way: Way) -> list[tuple[str, str]]:
    if cache.folder is None:
        return list(cache.fields)
    place = cache_place(way.workspace, folders.index(cache.folder))
    how = [] if any(key == "compression" for key, _ in cache.fields) else [("compression", "uncompressed")]
    return [*cache.fields, *how, ("dest", place)]
