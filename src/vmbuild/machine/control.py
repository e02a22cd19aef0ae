"""Orders to the guest around the saving and restoring of its memory, by a virtio port of their own.

SSH will not do: a restored guest has to be given its keys first. The other side is usr/lib/vmbuild/control.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vmbuild.deadline import Deadline
from vmbuild.errors import MachineError
from vmbuild.machine.files import MachineFiles
from vmbuild.machine.serial import read_lines


def make_pipes(files: MachineFiles) -> None:
    """Make the two pipes that QEMU's `pipe` character device wants to find."""
    for path in (files.control_in, files.control_out):
        path.unlink(missing_ok=True)
        os.mkfifo(path, 0o600)


def send(files: MachineFiles, words: str) -> None:
    """Give the guest an order, which waits in the pipe for a guest that does not run yet. Raises MachineError."""
    with _open(files.control_in, os.O_WRONLY) as orders:
        os.write(orders, f"{words}\n".encode())


def wait_for(files: MachineFiles, answer: str, deadline: Deadline) -> None:
    """Wait for the guest's answer. Raises MachineError when it is another one, or does not come in time."""
    for line in listen(files, answer, deadline):
        if line == answer:
            return


def listen(
    files: MachineFiles,
    last: str,
    deadline: Deadline,
    *,
    check_alive: Callable[[], None] = lambda: None,
    pause_s: float = 0.02,
) -> Iterator[str]:
    """Yield what the guest says, line by line, `last` at the end.

    `check_alive` is asked whenever there was nothing to hear for `pause_s` seconds. Raises MachineError when the guest
    says `failed`, does not come to the end in time, or its QEMU is gone.
    """
    with _open(files.control_out, os.O_RDONLY) as answers:
        rest, line = b"", ""
        while line != last:
            if deadline.passed:
                raise MachineError(f"the guest did not answer `{last}`")
            try:
                data = os.read(answers, 4096)
            except BlockingIOError:
                check_alive()
                select.select([answers], [], [], deadline.remaining_s(pause_s))
                continue
            if not data:  # nobody holds the other end
                raise MachineError(f"QEMU ended before the guest answered `{last}`")
            *lines, rest = (rest + data).split(b"\n")
            for line in (whole.decode(errors="replace") for whole in lines):
                word, _, reason = line.partition(" ")
                if word == "failed":
                    raise MachineError(
                        f"the guest could not become `{last}`", details=" ".join(read_lines(reason.encode()))
                    )
                yield line
                if line == last:
                    break


@contextmanager
def _open(path: os.PathLike[str], flags: int) -> Iterator[int]:
    try:
        handle = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise MachineError("the machine does not take orders", details=f"{path}: {error.strerror}") from error
    try:
        yield handle
    finally:
        os.close(handle)
