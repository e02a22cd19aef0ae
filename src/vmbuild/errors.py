"""What can go wrong, in the user's words.

An expected failure is a `VmbuildError`; its class decides the exit code. Anything else is a bug and keeps its
traceback.
"""

from __future__ import annotations

from typing import ClassVar


class VmbuildError(Exception):
    """An expected failure: what went wrong, the facts, and what to do about it.

    `brief` is one sentence without a full stop, `details` is any length (command, exit code, output),
    `resolution` says what the user can do.
    """

    exit_code: ClassVar[int] = 1
    meaning: ClassVar[str] = "a defect in vmbuild"

    def __init__(self, brief: str, *, details: str = "", resolution: str = "") -> None:
        super().__init__(brief)
        self.brief = brief
        self.details = details
        self.resolution = resolution


class UsageError(VmbuildError):
    """The command line, a setting or a file that the user wrote is wrong."""

    exit_code = 2
    meaning = "wrong usage: an option, a setting, a Dockerfile or context that is not there"


class HostError(VmbuildError):
    """The host lacks something: a program, disk space, a permission."""

    exit_code = 3
    meaning = "the host: a program is missing, the disk is full, a file cannot be written"


class GuestImageError(VmbuildError):
    """A guest image could not be fetched, verified or assembled."""

    exit_code = 4
    meaning = "the guest image: a download, a signature, a digest or the assembly failed"


class MachineError(VmbuildError):
    """QEMU did not start, or ended, or does not answer."""

    exit_code = 5
    meaning = "the machine: QEMU did not start, ended, or does not answer"


class GuestError(VmbuildError):
    """The guest runs but something in it does not: SSH, Docker, a command."""

    exit_code = 6
    meaning = "the guest: SSH or Docker inside the machine does not answer"


class BuildError(VmbuildError):
    """`docker build` in the guest failed; the Dockerfile is to blame, not vmbuild."""

    exit_code = 7
    meaning = "the build failed: a step of the Dockerfile did"


class OutOfMemoryError(BuildError):
    """The guest's kernel killed a process of the build for want of memory."""


class StalledError(BuildError):
    """The build stands still: it says nothing, and its machine does nothing."""


class DeliveryError(VmbuildError):
    """The container image could not be handed on: a registry did not take it, or an engine, or a board."""

    exit_code = 8
    meaning = "the way out: a registry, a container engine or a board did not take the container image"


class SuspendedError(VmbuildError):
    """The machine was suspended, and what ran in it can be continued."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: not done, try again
    meaning = "suspended: `vmbuild up`, or `vmbuild resume` where a bundle was asked for, goes on with the build"


class TimeIsUp(Exception):
    """The time that a build was given is used up but for what suspending it takes."""


class HungUp(KeyboardInterrupt):
    """The terminal is gone, as when a connection to the host breaks. A build that runs goes on."""


class ReaderGone(Exception):
    """Nobody reads the output any more."""


INTERRUPTED = 130
BROKEN_PIPE = 141
"""What a shell says of a program that SIGPIPE has ended, as it does most others."""

EXIT_CODES: dict[int, str] = {
    0: "success",
    **{
        kind.exit_code: kind.meaning
        for kind in (
            VmbuildError,
            UsageError,
            HostError,
            GuestImageError,
            MachineError,
            GuestError,
            BuildError,
            DeliveryError,
            SuspendedError,
        )
    },
    INTERRUPTED: "interrupted, with Ctrl-C or SIGTERM",
    BROKEN_PIPE: "whoever read the output has gone",
}
