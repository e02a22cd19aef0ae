"""The recipe of a machine as a Docker host: the guest's Docker on a private socket of the host, while it runs."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vmbuild import process
from vmbuild.deadline import Deadline
from vmbuild.errors import GuestError, HostError, MachineError, VmbuildError
from vmbuild.guest import forward, relay
from vmbuild.lock import hold
from vmbuild.machine import lifetime
from vmbuild.machine.facts import load_facts
from vmbuild.machine.files import MachineFiles
from vmbuild.model import Home
from vmbuild.reach import at_rest, connect, endpoint_of, existing
from vmbuild.report import Reporter
from vmbuild.whole import write_whole, writing_in

ANSWER_S = 30.0
"""How long Docker may take to answer on the socket: the machine may be starting, or the host be busy."""

MAX_PATH = 100
"""sockaddr_un holds 108 bytes on Linux and 104 on macOS, the closing zero included (unix(7))."""


@dataclass(frozen=True)
class DockerHost:
    """Where a machine's Docker is found on this host: a Unix socket that only this user can open."""

    machine: str
    socket: Path


def open_socket(name: str, home: Home, report: Reporter) -> DockerHost:
    """Return the machine's Docker socket, opened if it is not, and again whenever the machine comes up from now on.

    Raises MachineError when the machine does not run, GuestError when its Docker does not answer.
    """
    files = at_rest(name, home)
    lifetime.check_running(files)
    with writing_in(files.folder):
        files.docker_wanted.touch(mode=0o600)
    return DockerHost(name, _ensure(files, report))


def reopen(files: MachineFiles, report: Reporter) -> None:
    """Open the socket of a machine that has come up, if it was wanted; a failure costs a warning, not the machine."""
    if not files.docker_wanted.exists():
        return
    try:
        _ensure(files, report)
    except VmbuildError as error:
        report.warn(f"the Docker socket of the machine {files.name} is not open: {error.brief}")


def forget(files: MachineFiles) -> None:
    """Remove what lies outside the machine's folder."""
    with suppress(OSError):
        _alias(files).unlink(missing_ok=True)


def _ensure(files: MachineFiles, report: Reporter) -> Path:
    path = _reachable(files)
    with hold(files.folder / ".docker.lock", report, f"opens the Docker socket of the machine {files.name}"):
        pid = _find_pid(files)
        if pid is not None and forward.answers(path, Deadline.after(ANSWER_S)):
            return path
        if pid is not None:
            process.stop(pid)
        _start(files, path)
    return path


def _find_pid(files: MachineFiles) -> int | None:
    """Return the id of the program behind the socket, if it is ours, alive, and of this start of the machine."""
    try:
        pid = int(files.docker_pid.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return pid if _mark(files) in process.command_line(pid) and process.is_alive(pid) else None


def _mark(files: MachineFiles) -> str:
    facts = load_facts(files)
    if facts is None:
        raise MachineError(f"the machine {files.name} is not running")
    return f"vmbuild-{facts.uuid}"


def _start(files: MachineFiles, path: Path) -> None:
    with process.starting(_argv(files), cwd=files.folder, log=files.docker_log, pid_file=files.docker_pid) as exit_code:
        limit = Deadline.after(ANSWER_S)
        while not forward.answers(path, limit):
            if exit_code() is not None or limit.passed:
                raise GuestError(
                    "the guest's Docker does not answer on this host",
                    details=files.docker_log.read_text(errors="replace"),
                    resolution=f"`vmbuild up --name {files.name}` waits until Docker is ready.",
                )
            limit.sleep(0.05)


def _argv(files: MachineFiles) -> list[str]:
    mark = _mark(files)
    if process.has_program("ssh"):
        endpoint = endpoint_of(files)
        if forward.can_carry(endpoint, Deadline.after(ANSWER_S)):
            line = forward.known_hosts_line(mark, endpoint.host_public_key.read_text())
            write_whole(files.known_hosts, line.encode())
            return forward.ssh_argv(endpoint, mark, files.known_hosts, files.docker_socket)
    return [sys.executable, "-m", "vmbuild", "env", "--name", files.name, "--serve", mark]


def _reachable(files: MachineFiles) -> Path:
    """Return a path of the socket that a client can use: through a link where the machine's folder is too deep."""
    if len(os.fsencode(files.docker_socket)) <= MAX_PATH:
        return files.docker_socket
    alias = _alias(files)
    if not alias.is_symlink() or alias.readlink() != files.folder:
        with writing_in(alias.parent):
            with suppress(FileExistsError):
                alias.parent.mkdir(mode=0o700)
            _check_private(alias.parent)
            alias.unlink(missing_ok=True)
            alias.symlink_to(files.folder)
    _check_private(alias.parent)
    return alias / files.docker_socket.name


def _alias(files: MachineFiles) -> Path:
    name = hashlib.sha256(os.fsencode(files.folder)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"vmbuild-{os.getuid()}" / name


def _check_private(folder: Path) -> None:
    """See that a folder that everybody could have made is ours alone. Raises HostError."""
    found = folder.lstat()
    if not folder.is_dir() or folder.is_symlink() or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise HostError(
            f"{folder} is not a folder of yours alone",
            resolution="Remove it, or set TMPDIR to a folder of your own.",
        )


def serve(name: str, home: Home, mark: str) -> None:
    """Be the program behind the socket where OpenSSH's client cannot be, until this start of the machine has ended."""
    files = existing(name, home)
    session = connect(files, Deadline.after(ANSWER_S))
    try:
        relay.serve(session, Path(files.docker_socket.name), lambda: _mark(files) == mark and _is_alive(files))
    finally:
        session.close()


def _is_alive(files: MachineFiles) -> bool:
    return lifetime.find_pid(files) is not None
