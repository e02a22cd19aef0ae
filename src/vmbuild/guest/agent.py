"""An SSH agent for a guest's programs that has no keys: the host answers each request, in a thread beside the build.

The other side is usr/lib/vmbuild/agent. Source of the numbers: draft-miller-ssh-agent.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue

from vmbuild.errors import GuestError, VmbuildError
from vmbuild.guest.session import Session, Sink

PROGRAM = "/usr/lib/vmbuild/agent"
REQUEST_IDENTITIES, SIGN_REQUEST = 11, 13
FAILURE = b"\x05"
MOST_BYTES = 256 * 1024

READY_S = 30.0
AGAIN_S = 0.5
"""So long after a connection has broken it is looked whether there is another."""

END_S = 10.0

Ask = Callable[[bytes], bytes]
"""Has a request answered by the host's agent, both without their length. Fails with an answer too."""


@contextmanager
def lent(session: Session, socket: str, ask: Ask) -> Iterator[None]:
    """Have an agent listen on a socket of the guest while the block runs. Raises GuestError when it cannot.

    What a guest may ask is which keys there are, and for signatures: it cannot add keys, remove or lock them.
    """
    lending = _Lending(session, socket, ask)
    lending.start()
    try:
        lending.wait_ready()
        yield
    finally:
        lending.end()


class _Lending:
    """Runs the guest's side again and again, over as many connections as the build takes."""

    def __init__(self, session: Session, socket: str, ask: Ask) -> None:
        self._session, self._argv, self._ask = session, [PROGRAM, socket], ask
        self._ready, self._ended = threading.Event(), threading.Event()
        self._ended_at = 0.0
        self._link: _Link | None = None
        self._why = ""
        self._thread = threading.Thread(target=self._run, name="agent", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wait_ready(self) -> None:
        if not self._ready.wait(READY_S) or self._why:
            raise GuestError(
                "the guest cannot use the host's SSH agent",
                details=self._why,
                resolution="A machine of an older vmbuild has not what that needs: `vmbuild down`, then try again.",
            )

    def end(self) -> None:
        self._ended_at = time.monotonic()
        self._ended.set()
        if self._link is not None:
            self._link.end()
        self._thread.join(2 * END_S)

    def _run(self) -> None:
        while not self._ended.is_set():
            self._link = link = _Link(self._ask, self._ready)
            errors = bytearray()
            try:
                run = self._session.run
                run(self._argv, feed=link.feed, on_stdout=link.take, on_stderr=errors.extend, on_tick=self._tick)
            except VmbuildError as error:  # a connection that broke is made again by who follows the build
                errors.extend(error.brief.encode())
            finally:
                link.end()
            if not self._ready.is_set():
                self._why = errors.decode(errors="replace") or "it ended at once"
                self._ready.set()
                return
            self._ended.wait(AGAIN_S)

    def _tick(self) -> None:
        if self._ended.is_set() and time.monotonic() > self._ended_at + END_S:
            raise GuestError("the agent in the guest does not end")


class _Link:
    """One run of the guest's side: takes its requests, feeds it the answers."""

    def __init__(self, ask: Ask, ready: threading.Event) -> None:
        self._ask, self._ready = ask, ready
        self._heard = bytearray()
        self._answers: SimpleQueue[bytes | None] = SimpleQueue()

    def end(self) -> None:
        self._answers.put(None)

    def feed(self, sink: Sink) -> None:
        while (answer := self._answers.get()) is not None:
            sink.write(len(answer).to_bytes(4) + answer)

    def take(self, data: bytes) -> None:
        self._heard.extend(data)
        while len(self._heard) >= 4:
            size = int.from_bytes(self._heard[:4])
            if size > MOST_BYTES:
                raise GuestError(f"the guest asks the SSH agent something of {size} bytes")
            if len(self._heard) < 4 + size:
                return
            message = bytes(self._heard[4 : 4 + size])
            del self._heard[: 4 + size]
            if not message:
                self._ready.set()
            else:
                self._answers.put(self._ask(message) if message[0] in (REQUEST_IDENTITIES, SIGN_REQUEST) else FAILURE)
