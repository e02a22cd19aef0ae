"""Run, feed and stop programs of the host. The only importer of subprocess."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from vmbuild.deadline import NEVER, Deadline
from vmbuild.errors import HostError

PACKAGES = {
    "gpgv": "gpgv",
    "newuidmap": "uidmap",
    "qemu-aarch64-static": "qemu-user-static",
    "qemu-arm-static": "qemu-user-static",
    "qemu-img": "qemu-utils",
    "qemu-system-aarch64": "qemu-system-arm",
    "ssh-add": "openssh-client",
    "ssh-agent": "openssh-client",
    "sqfstar": "squashfs-tools",
}


LEAST_PRIORITY = 19
TALK_GRACE_S = 30.0
"""How long a program that was spoken with may take to clean up; a build takes what runs in its guest away."""


class CommandError(HostError):
    """A program of the host failed: its argv, exit code and output."""

    def __init__(self, argv: Sequence[str], code: int, output: str) -> None:
        super().__init__(
            f"{Path(argv[0]).name} failed with exit code {code}",
            details=f"$ {shlex.join(argv)}\n{output.strip()}\nexit code {code}",
        )
        self.code = code
        self.output = output


def find_program(name: str) -> str:
    """Return the path of a program on PATH. Raises HostError that names the Debian package when it is missing."""
    path = shutil.which(name)
    if path is None:
        package = PACKAGES.get(name, name)
        raise HostError(
            f"the program {name} is not installed",
            resolution=f"Install it (Debian, Ubuntu: apt install {package}) or run `vmbuild doctor`.",
        )
    return path


def has_program(name: str) -> bool:
    """Tell whether a program is on PATH."""
    return shutil.which(name) is not None


def run(
    argv: Sequence[str],
    *,
    stdin: bytes = b"",
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    deadline: Deadline = NEVER,
    expect: Sequence[int] = (0,),
) -> bytes:
    """Run a program to its end and return its standard output.

    Raises HostError when it is not there or takes too long, CommandError (a HostError) when its exit code is not
    among `expect`.
    """
    argv = [find_program(argv[0]), *argv[1:]]
    try:
        done = subprocess.run(
            argv,
            input=stdin,
            capture_output=True,
            cwd=cwd,
            env=dict(env) if env is not None else None,
            timeout=None if deadline.at is None else deadline.remaining_s(),
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise HostError(f"{Path(argv[0]).name} did not end in time", details=shlex.join(argv)) from error
    if done.returncode not in expect:
        output = (done.stderr + done.stdout).decode(errors="replace")
        raise CommandError(argv, done.returncode, output)
    return done.stdout


@contextmanager
def feed(argv: Sequence[str]) -> Iterator[IO[bytes]]:
    """Run a program that reads its standard input, yielding the pipe to write to.

    The program has ended well when the block is left; it is killed when the block is left by an exception.
    Raises CommandError when it fails.
    """
    argv = [find_program(argv[0]), *argv[1:]]
    with tempfile.TemporaryFile() as errors:  # a pipe would fill up while we write
        program = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=errors)
        assert program.stdin is not None  # noqa: S101 - it is a pipe
        try:
            with suppress(BrokenPipeError):  # its exit code says why it stopped reading
                yield program.stdin
            with suppress(BrokenPipeError):  # what the pipe still buffers is written now
                program.stdin.close()
        except BaseException:
            program.kill()
            with suppress(BrokenPipeError):
                program.stdin.close()
            raise
        finally:
            program.wait()
        errors.seek(0)
        words = errors.read().decode(errors="replace")
    if program.returncode != 0:
        raise CommandError(argv, program.returncode, words)


@contextmanager
def starting(
    argv: Sequence[str], *, cwd: Path, log: Path, env: Mapping[str, str] | None = None, pid_file: Path | None = None
) -> Iterator[Callable[[], int | None]]:
    """Start a program that outlives this process and its terminal, its output in `log`, its id in `pid_file`.

    Yield a function that tells its exit code, None while it runs. When the block, in which it is seen to work, is left
    by an exception, Ctrl-C included, the program is ended. Raises HostError when it is missing.
    """
    argv = [find_program(argv[0]), *argv[1:]]
    program: subprocess.Popen[bytes] | None = None
    try:
        with log.open("wb") as output:
            program = subprocess.Popen(
                argv, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        if pid_file is not None:
            pid_file.write_text(f"{program.pid}\n")
        yield program.poll
    except BaseException:
        if program is not None and program.poll() is None:
            stop(program.pid)
        raise


@contextmanager
def attached(argv: Sequence[str]) -> Iterator[str]:
    """Run a program that lasts as long as its standard input, and so never longer than we; yield its first line.

    Ctrl-C on our terminal does not reach it. Raises HostError when it is missing, CommandError when it ends at once.
    """
    argv = [find_program(argv[0]), *argv[1:]]
    with tempfile.TemporaryFile() as errors:
        program = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
        )
        assert program.stdin is not None and program.stdout is not None  # noqa: S101 - they are pipes
        with program.stdin, program.stdout:
            try:
                line = program.stdout.readline()
                if not line:
                    errors.seek(0)
                    raise CommandError(argv, program.wait(), errors.read().decode(errors="replace"))
                yield line.decode(errors="replace").strip()
            finally:
                program.stdin.close()
                _wait_or_kill(program)


def _wait_or_kill(program: subprocess.Popen[bytes]) -> None:
    try:
        program.wait(5)
    except subprocess.TimeoutExpired:
        program.kill()
        program.wait()


class Talk:
    """A program that is spoken with: its lines, both outputs together, as they come, and words for it to read."""

    def __init__(self, program: subprocess.Popen[bytes]) -> None:
        self._program = program
        self.pid = program.pid

    def lines(self) -> Iterator[str]:
        """Yield what it writes, line by line, until it ends."""
        assert self._program.stdout is not None  # noqa: S101 - it is a pipe
        for line in self._program.stdout:
            yield line.decode(errors="replace").rstrip("\r\n")

    def say(self, text: str) -> None:
        """Write a line to it; nothing where it reads no more."""
        assert self._program.stdin is not None  # noqa: S101 - it is a pipe
        with suppress(BrokenPipeError):
            self._program.stdin.write(text.encode() + b"\n")
            self._program.stdin.flush()

    def wait(self) -> int:
        """Wait for its end; return its exit code."""
        return self._program.wait()


@contextmanager
def talking(argv: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Iterator[Talk]:
    """Start a program in a session of its own and speak with it; it is ended, and what it started, with the block.

    Raises HostError when it is missing.
    """
    argv = [find_program(argv[0]), *argv[1:]]
    pipe = subprocess.PIPE
    program = subprocess.Popen(
        argv, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, env=env, cwd=cwd, start_new_session=True
    )
    try:
        yield Talk(program)
    finally:
        if program.poll() is None:
            for number in (signal.SIGTERM, signal.SIGKILL):  # the second also for what outlives the program
                with suppress(ProcessLookupError):
                    os.killpg(program.pid, number)
                with suppress(subprocess.TimeoutExpired):
                    program.wait(TALK_GRACE_S)
        for each in (program.stdin, program.stdout):
            with suppress(BrokenPipeError):
                each.close()  # type: ignore[union-attr] # they are pipes


def is_alive(pid: int) -> bool:
    """Tell whether a process exists and is not a zombie.

    One that was killed is a zombie before its last threads are gone; until then they hold its files and their locks.
    """
    state = _proc_column(pid, "state=")
    return state not in ("", "Z") or (state == "Z" and _has_threads(pid))


def _has_threads(pid: int) -> bool:
    try:
        return len(list(Path(f"/proc/{pid}/task").iterdir())) > 1
    except (FileNotFoundError, ProcessLookupError):
        return False


def command_line(pid: int) -> str:
    """Return the command line of a process, empty when there is none."""
    return _proc_column(pid, "args=")


def rss_bytes(pid: int) -> int | None:
    """Return the resident memory of a process, None when there is no such process."""
    text = _proc_column(pid, "rss=")
    return int(text) * 1024 if text.isdigit() else None


def peak_rss_bytes(pid: int) -> int | None:
    """Return the most resident memory that a process has had, None where nobody tells. Source: proc_pid_status(5)."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except OSError:
        return None
    found = re.search(r"^VmHWM:\s*(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def cpu_seconds(pid: int) -> float | None:
    """Return the CPU time that a process has had since it began, None when there is no such process."""
    text = _proc_column(pid, "time=")
    return parse_cpu_time(text) if text else None


def parse_cpu_time(text: str) -> float:
    """Return the seconds of a time as ps writes it: `[[DD-]HH:]MM:SS`, on macOS with hundredths."""
    days, _, clock = text.rpartition("-")
    seconds = 0.0
    for part in clock.split(":"):
        seconds = seconds * 60 + float(part)
    return int(days or 0) * 86_400 + seconds


def _proc_column(pid: int, column: str) -> str:
    proc = Path("/proc") / str(pid)
    if not Path("/proc/self/stat").exists():  # macOS
        done = subprocess.run(["ps", "-ww", "-o", column, "-p", str(pid)], capture_output=True, check=False)
        return done.stdout.decode(errors="replace").strip()
    try:
        if column == "args=":
            return proc.joinpath("cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        if column in ("state=", "time="):
            fields = proc.joinpath("stat").read_text(errors="replace").rpartition(")")[2].split()
            # state, and utime + stime: fields 3, 14 and 15 of proc_pid_stat(5)
            ticks = int(fields[11]) + int(fields[12])
            return fields[0] if column == "state=" else str(ticks / os.sysconf("SC_CLK_TCK"))
        pages = int(proc.joinpath("statm").read_text().split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return str(pages * os.sysconf("SC_PAGE_SIZE") // 1024)


def give_way(pid: int) -> None:
    """Let a process, and its session, have what CPU time the others leave. Does nothing where the host cannot.

    A session has a niceness of its own, that of its processes counts only among them (sched(7), "autogroup").
    """
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, LEAST_PRIORITY)
    with suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(str(LEAST_PRIORITY))


def available_memory_bytes() -> int | None:
    """Return the memory that programs could still get on this host, None where it does not say."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def stop(pid: int, *, grace_s: float = 5.0) -> None:
    """End a process: terminate, wait, kill. Harmless when it is gone already."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return
        if wait_gone(pid, Deadline.after(grace_s)):
            return


def wait_gone(pid: int, deadline: Deadline) -> bool:
    """Wait until a process is gone; tell whether it is."""
    while is_alive(pid):
        if deadline.passed:
            return False
        time.sleep(0.05)
    return True


def replace_with(argv: Sequence[str]) -> None:
    """Become another program (exec). Does not return. Raises HostError when the program is missing."""
    os.execv(find_program(argv[0]), list(argv))  # noqa: S606 - no shell is wanted
