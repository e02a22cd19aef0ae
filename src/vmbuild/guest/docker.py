"""Docker in the guest: its argv, and what its output means."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from vmbuild.deadline import Deadline
from vmbuild.errors import BuildError, GuestError, VmbuildError
from vmbuild.guest import job, secrets
from vmbuild.guest.session import Output, Session, capture
from vmbuild.guest.transfer import disk_full
from vmbuild.model import BuildRequest
from vmbuild.outputs import Kind
from vmbuild.report import Meter

BUILDX = "/usr/libexec/docker/cli-plugins/docker-buildx"
"""Called without the docker client before it: one emulated program start less."""

BUILDX_CONFIG = "/var/lib/vmbuild/buildx"
"""On the machine's disk: what buildx calls itself there tells BuildKit, after a boot too, which context it has already
(buildx, build/opt.go, tryNodeIdentifier)."""

WORK = "/var/lib/vmbuild/work"
CLIENT_CONFIG = "config.json"
"""Docker's configuration, as its clients look for it in a folder."""

TAIL_BYTES = 64 * 1024

KILLED = 255
"""What a session gives for a program that a signal ended, and no exit code of buildx's own."""

_OLDER = "A machine of an older vmbuild has not what that needs: `vmbuild down`, then try again."
_LOGS = "See `vmbuild logs`, and /var/log/docker.log in the guest (`vmbuild ssh`); then run the command again."


@dataclass(frozen=True)
class Workspace:
    """A folder in the guest that holds one build: its context and what comes out of it."""

    folder: str

    @property
    def context(self) -> str:
        """Where the context is unpacked."""
        return f"{self.folder}/context"

    @property
    def dockerfile(self) -> str:
        """Where a Dockerfile lies that is not part of the context."""
        return f"{self.folder}/Dockerfile"

    @property
    def stdin(self) -> str:
        """Where the host's standard input lies that a build reads."""
        return f"{self.folder}/stdin"

    @property
    def archive(self) -> str:
        """Where a base image's archive lies before Docker has it."""
        return f"{self.folder}/base.tar"

    @property
    def metadata(self) -> str:
        """Where BuildKit's metadata is written."""
        return f"{self.folder}/metadata.json"


def make_workspace(session: Session) -> Workspace:
    """Make a workspace. Raises GuestError."""
    script = f"umask 077; mkdir -p {WORK} && work=$(mktemp -d {WORK}/XXXXXX) && mkdir $work/context && echo $work"
    return Workspace(capture(session, ["sh", "-c", script]).strip())


def remove_workspace(session: Session, work: Workspace) -> None:
    """Remove a workspace, ending first what runs in it. Raises GuestError when the guest cannot be asked."""
    job.stop(session, work.folder)
    session.run(["rm", "-rf", work.folder], deadline=Deadline.after(60))


@contextmanager
def workspace(session: Session) -> Iterator[Workspace]:
    """Make a workspace and remove it at the end, whatever happens."""
    work = make_workspace(session)
    try:
        yield work
    finally:
        with suppress(VmbuildError):  # a guest that is gone or stopped must not hide why
            remove_workspace(session, work)


def build_argv(
    asked: BuildRequest, work: Workspace, context: str, dockerfile: str | None, given: Sequence[str] = ()
) -> list[str]:
    """Return buildx's argv for a build; `context`, `dockerfile` and what it is given are as the guest sees them."""
    argv = [BUILDX, "build", "--platform", ",".join(asked.platforms), "--progress", asked.progress]
    argv += ["--metadata-file", work.metadata]
    if not any("type=provenance" in each.split(",") for each in asked.attests):
        argv += ["--provenance", "false"]
    argv += ["--output", "type=image,compression=uncompressed"]  # gzip in emulated Go makes 2 MB/s
    names = (*asked.tags, *(name for each in asked.outputs if each.kind is Kind.IMAGE for name in each.names))
    for flag, values in (
        ("--tag", names),
        ("--attest", asked.attests),
        ("--build-arg", asked.build_args),
        ("--label", asked.labels),
    ):
        for value in values:
            argv += [flag, value]
    argv += ["--target", asked.target] if asked.target else []
    argv += ["--file", dockerfile] if dockerfile else []
    argv += ["--no-cache"] if asked.no_cache else []
    argv += ["--pull"] if asked.pull else []
    return [*argv, *given, context]


def start_build(
    session: Session,
    work: Workspace,
    argv: Sequence[str],
    *,
    stdin: str | None,
    terminal: tuple[int, int] | None,
    client: str | None = None,
    held: Mapping[str, bytes] | None = None,
) -> None:
    """Start a build, whose standard input is a file in the guest; it goes on without us. Raises GuestError.

    `held` are files, by their names, that the guest keeps in memory and wipes when the build ends; `client` is one
    more, the content of its client's configuration.
    """
    own = []
    if client is not None:
        held = {**(held or {}), CLIENT_CONFIG: client.encode()}
        own = [f"DOCKER_CONFIG={secrets.folder_of(work.folder)}"]
    argv = ["env", f"BUILDX_CONFIG={BUILDX_CONFIG}", *own, *argv]
    if stdin is not None:
        argv = ["sh", "-c", 'exec "$@" <"$0"', stdin, *argv]
    if held is None:
        job.start(session, work.folder, argv, terminal)
    else:
        before, feed = secrets.put_before(work.folder), secrets.feed_of(held)
        try:
            job.start(session, work.folder, argv, terminal, before=before, feed=feed)
        except GuestError as error:
            raise GuestError(
                "the guest cannot keep what the build is given in memory", details=error.details, resolution=_OLDER
            ) from error


class BuildLog:
    """What a build writes: passed on as it comes, unless quiet, and its end kept to tell why it failed."""

    def __init__(self, output: Output, *, quiet: bool) -> None:
        self.size = 0
        self._output = output
        self._quiet = quiet
        self._tail = bytearray()

    def take(self, data: bytes) -> None:
        """Take what it wrote next."""
        self.size += len(data)
        self._tail.extend(data)
        del self._tail[:-TAIL_BYTES]
        if not self._quiet:
            self._output(data)

    def check(self, code: int) -> None:
        """Raise BuildError that names the step and its exit code, GuestError when the guest is at fault."""
        if code == 0:
            return
        if self._quiet:
            self._output(bytes(self._tail))
        raise explain_failure(self._tail.decode(errors="replace"), code)


def image_id(session: Session, work: Workspace) -> tuple[str, str]:
    """Return the built container image's id (`sha256:...`) and the whole metadata as JSON text."""
    text = capture(session, ["cat", work.metadata])
    metadata = json.loads(text)
    return str(metadata.get("containerimage.digest") or metadata["containerimage.config.digest"]), text


_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_EXIT = re.compile(r'process "(?P<process>.*?)" did not complete successfully: exit code: (?P<code>\d+)', re.DOTALL)
_STEP = re.compile(r"^ > \[(?P<where>[^\]]*)\] (?P<what>.*?):?$", re.MULTILINE)
_LINE = re.compile(r"^(?P<where>\S.*:\d+)\n-{3,}$", re.MULTILINE)
_ERROR = re.compile(r"^ERROR: (?:failed to (?:solve|build): )*(?P<what>.*)$", re.MULTILINE)


def explain_failure(output: str, code: int) -> BuildError | GuestError:
    """Return the error that BuildKit's last output tells, as buildx 0.13 to 0.2x print it."""
    text = _ESCAPE.sub("", output).replace("\r", "")
    steps, exits, errors = (list(pattern.finditer(text)) for pattern in (_STEP, _EXIT, _ERROR))
    lines = _LINE.findall(text)
    if exits and steps:
        brief = f"{steps[-1]['what']} failed with exit code {exits[-1]['code']}"
        where = f"step {steps[-1]['where']}" + (f", {lines[-1]}" if lines else "")
        return BuildError(brief, details=where)
    if not errors and code == KILLED:
        return GuestError("docker build was killed in the guest", details=text[-2000:], resolution=_LOGS)
    what = errors[-1]["what"] if errors else f"docker build ended with exit code {code}"
    if "no space left on device" in what:
        return disk_full(what)
    if re.search(
        r"Cannot connect to the Docker daemon|/run/docker\.sock|transport is closing|error reading from server", what
    ):
        return GuestError("Docker in the guest went away", details=what, resolution=_LOGS)
    return BuildError(what, details=lines[-1] if lines else text[-2000:], resolution=_advice(what))


def _advice(what: str) -> str:
    if re.search(r"docker/dockerfile(-upstream)?:", what):
        return (
            "The Dockerfile's `# syntax=` line asks for a front end from a registry. Without one, leave the line out: "
            "Docker in the guest reads the stable syntax itself."
        )
    if re.search(r"failed to resolve source metadata|failed to do request|dial tcp|no such host|i/o timeout", what):
        return (
            "The guest could not reach the registry. For a Debian base image, `vmbuild base debian:trixie-slim` "
            "makes one from signed packages, without a registry."
        )
    return ""


def configure_tree(session: Session, work: Workspace, meter: Meter) -> None:
    """Run the second stage of an unpacked Debian tree, one unit of the meter a package.

    Raises GuestError with dpkg's last words.
    """
    tail = bytearray()

    def listen(data: bytes) -> None:
        meter.advance(data.count(b"Setting up "))
        tail.extend(data)
        del tail[:-TAIL_BYTES]

    code = session.run(["/usr/lib/vmbuild/second-stage", work.context], on_stdout=listen, on_stderr=listen)
    if code != 0:
        raise GuestError(
            f"configuring the packages failed with exit code {code}", details=tail.decode(errors="replace")
        )
