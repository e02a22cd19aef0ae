"""The tries of one download: how many there are, how long between them, and what a failure is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from vmbuild.errors import GuestImageError

TRIES = 5
"""Tries in a row that brought nothing new before a download is given up."""
CONNECT_TRIES = 3
"""The same while nobody even answers: each such try may take `CONNECT_TIMEOUT_S`."""
BACKOFF_S = 0.5
"""Wait before the second try; it doubles with every further one."""

NETWORK_ADVICE = (
    "Check the network. Behind a proxy set http_proxy and https_proxy (and VMBUILD_CA when it re-signs TLS)."
)
MIRROR_ADVICE = f"{NETWORK_ADVICE} To use another Debian mirror, set VMBUILD_MIRROR."


class NotFound(GuestImageError):
    """The server answers, but does not have the file."""


class Unreachable(GuestImageError):
    """The server cannot be reached, or does not serve."""


class Transient(Exception):
    """A failure worth another try; `reached` tells whether the server had answered at all."""

    def __init__(self, cause: str, *, reached: bool = True) -> None:
        super().__init__(cause)
        self.reached = reached


class Stopped(Exception):
    """Another worker failed or the user interrupted."""


class Try:
    """One try: leaving the block by Transient does not raise, the loop over `tries` goes on."""

    failure: Transient | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        self.failure = error if isinstance(error, Transient) else None
        return self.failure is not None


def tries(url: str, stop: threading.Event, progress: Callable[[], int] = lambda: 0) -> Iterator[Try]:
    """Yield one Try after the other, with growing waits between.

    A try that took `progress` further than ever starts the count again, so a flaky line gets there in the end.
    Raises Unreachable when it gives up, Stopped when told to stop.
    """
    failed, best = 0, progress()
    while True:
        attempt = Try()
        yield attempt
        if attempt.failure is None:
            return
        reached = progress()
        failed = failed + 1 if reached <= best else 0
        best = max(best, reached)
        if failed >= (TRIES if attempt.failure.reached else CONNECT_TRIES):
            raise unreachable(url, str(attempt.failure)) from attempt.failure
        if stop.wait(BACKOFF_S * 2 ** max(0, failed - 1)):
            raise Stopped


def unreachable(url: str, cause: str) -> Unreachable:
    """Return the error for a URL that does not serve."""
    return Unreachable(f"cannot download {url}", details=cause, resolution=MIRROR_ADVICE)
