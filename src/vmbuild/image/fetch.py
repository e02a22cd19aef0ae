"""A URL to a verified file: parallel, resumable, digest-checked."""

from __future__ import annotations

import errno
import hashlib
import os
import queue
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from vmbuild.errors import GuestImageError, HostError
from vmbuild.image.tries import NETWORK_ADVICE, NotFound, Stopped, Transient, Unreachable, tries
from vmbuild.model import MIB, format_size
from vmbuild.report import Meter, Reporter
from vmbuild.whole import hash_file

if TYPE_CHECKING:
    from vmbuild.image import http

__all__ = [
    "NETWORK_ADVICE",
    "Download",
    "NotFound",
    "Unreachable",
    "WrongDigest",
    "ask_size",
    "fetch_all",
    "fetch_bytes",
]

STOP_GRACE_S = 1.0
"""How long an interrupt waits for the workers; one that is stuck in a read dies with the process."""


@dataclass(frozen=True)
class Download:
    """A file to fetch: where from, where to, and what it must be (None: not known).

    `digest` is hexadecimal, by `algorithm` (a name of hashlib's); `size` is in bytes.
    """

    url: str
    path: Path
    digest: str | None
    size: int | None
    algorithm: str = "sha256"


class WrongDigest(GuestImageError):
    """The file that came is not the file that was asked for."""


def fetch_all(downloads: Sequence[Download], report: Reporter, *, label: str, workers: int = 6) -> None:
    """Bring every file into place, verified; files that are there already cost nothing.

    What is interrupted stays beside its target as `.part` and is resumed by the next call, in any process.
    Raises NotFound, Unreachable or WrongDigest (all GuestImageError), HostError when the disk is full.
    """
    missing = {download.path: download for download in downloads if not _is_there(download)}
    if not missing:
        return
    sizes = [download.size for download in missing.values()]
    total = None if None in sizes else sum(size for size in sizes if size is not None)
    from vmbuild.image import http

    with report.meter(label, total) as meter, http.Session(workers) as session:
        _work_off(_Crew(session, meter, list(missing.values())), workers)


def fetch_bytes(url: str, *, limit_bytes: int = 32 * MIB, only_tls: bool = False) -> bytes:
    """Return a small file, past any cache on the way.

    Raises NotFound, Unreachable, GuestImageError when it is too big or, with `only_tls`, when the server sends us on to
    another that anybody on the way could speak for.
    """
    from vmbuild.image import http

    with http.Session() as session:
        for attempt in tries(url, threading.Event()):
            with attempt, http.open_url(session, url, {"Cache-Control": "max-age=0"}) as response:
                if only_tls and (weak := http.weak_address(response)):
                    raise GuestImageError(f"{url} leads to {weak}, which is not protected by TLS")
                body = b"".join(http.read_body(response, limit_bytes))
                if len(body) > limit_bytes:
                    raise GuestImageError(f"{url} is larger than {format_size(limit_bytes)}")
                return body
    raise AssertionError("tries ends by an exception")


def ask_size(url: str) -> int | None:
    """Return the size in bytes that a server announces for a file. Raises NotFound, Unreachable."""
    from vmbuild.image import http

    with http.Session() as session:
        for attempt in tries(url, threading.Event()):
            with attempt, http.open_url(session, url, {}) as response:
                given = response.headers.get("Content-Length", "")
                return int(given) if given.isdecimal() else None
    raise AssertionError("tries ends by an exception")


@dataclass
class _Crew:
    """What the workers of one fetch_all share."""

    session: http.Session
    meter: Meter
    todo: list[Download]
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    done: queue.Queue[BaseException | None] = field(default_factory=queue.Queue)

    def work(self) -> None:
        while not self.stop.is_set():
            with self.lock:
                if not self.todo:
                    return
                download = self.todo.pop(0)
            try:
                _fetch(self, download)
                self.done.put(None)
            except BaseException as error:  # the caller's thread raises it
                self.done.put(error)


def _work_off(crew: _Crew, workers: int) -> None:
    """Run the workers until all is done; daemon threads, so that nobody waits for one that is stuck in a read."""
    count = len(crew.todo)
    threads = [threading.Thread(target=crew.work, daemon=True) for _ in range(min(workers, count))]
    for thread in threads:
        thread.start()
    try:
        for _ in range(count):
            error = crew.done.get()
            if error is not None:
                raise error
    finally:
        crew.stop.set()
        limit = time.monotonic() + STOP_GRACE_S
        for thread in threads:
            thread.join(max(0.0, limit - time.monotonic()))


class _Progress:
    """Moves the shared meter forward by one file's bytes; a file that starts over moves it only once."""

    def __init__(self, crew: _Crew, limit: int | None) -> None:
        self._crew = crew
        self._limit = limit
        self._position = 0

    def reach(self, position: int) -> None:
        position = position if self._limit is None else min(position, self._limit)
        if position > self._position:
            with self._crew.lock:
                self._crew.meter.advance(position - self._position)
            self._position = position


def _is_there(download: Download) -> bool:
    """Tell whether the file is there with the right content: a cache that was restored may hold other bytes."""
    try:
        if download.size not in (None, download.path.stat().st_size):
            return False
        return download.digest in (None, hash_file(download.path, download.algorithm))
    except FileNotFoundError:
        return False


def _fetch(crew: _Crew, download: Download) -> None:
    with _disk_errors(download), _locked(download.path, crew.stop):
        progress = _Progress(crew, download.size)
        if not _is_there(download):  # another process may have brought it while we waited for the lock
            _bring(crew, download, progress)
        progress.reach(download.path.stat().st_size)


def _bring(crew: _Crew, download: Download, progress: _Progress) -> None:
    part = _part(download)
    for last in (False, True):
        _receive_all(crew, download, progress)
        with part.open("rb+") as file:
            os.fsync(file.fileno())  # a name promises content, even after a power cut
            actual = hashlib.file_digest(file, download.algorithm).hexdigest()
        if download.digest in (None, actual):
            part.replace(download.path)
            return
        part.unlink()
        if last:
            raise _wrong_digest(download, actual)


def _receive_all(crew: _Crew, download: Download, progress: _Progress) -> None:
    part = _part(download)
    for attempt in tries(download.url, crew.stop, lambda: _size(part)):
        with attempt:
            if download.digest is None:
                part.unlink(missing_ok=True)  # without a digest nobody would notice two versions glued together
            if not part.exists() or _size(part) != download.size:
                _receive(crew, download, progress)
            return


def _receive(crew: _Crew, download: Download, progress: _Progress) -> None:
    """Ask for what is missing and append it; write anew when the server cannot resume."""
    from vmbuild.image import http

    part, start = _part(download), _size(_part(download))
    with http.open_url(crew.session, download.url, {"Range": f"bytes={start}-"} if start else {}) as response:
        resumed = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        if response.status_code != (206 if resumed else 200):
            part.unlink(missing_ok=True)
            raise Transient(f"the server cannot resume (status {response.status_code})")
        with part.open("ab" if resumed else "wb") as file:
            position = file.tell()
            for chunk in http.read_body(response, None if download.size is None else download.size - position):
                file.write(chunk)
                position += len(chunk)
                progress.reach(position)
                if crew.stop.is_set():
                    raise Stopped
    # a server that announced this length has another file: that is for the digest to say
    if download.size is not None and position < download.size and "Content-Length" not in response.headers:
        raise Transient(f"the server ended after {position} of {download.size} bytes")


def _part(download: Download) -> Path:
    return download.path.with_name(download.path.name + ".part")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@contextmanager
def _locked(path: Path, stop: threading.Event) -> Iterator[None]:
    """Hold `<path>.lock`; it is removed only once `path` is there, when whoever still waits for it has no work left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(path.name + ".lock"), thread_local=False)
    while not lock.is_locked:
        try:
            lock.acquire(blocking=False)
        except Timeout:
            if stop.wait(0.1):
                raise Stopped from None
    try:
        yield
        Path(lock.lock_file).unlink(missing_ok=True)
    finally:
        lock.release()


@contextmanager
def _disk_errors(download: Download) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise HostError(f"cannot write {download.path}: {error.strerror}", details=str(error)) from error
        folder = download.path.parent
        need = "unknown" if download.size is None else format_size(download.size - _size(_part(download)))
        raise HostError(
            f"the disk is full: cannot write {download.path}",
            details=f"still needed for this file: {need}, free: {format_size(shutil.disk_usage(folder).free)}",
            resolution=f"Make room in {folder} and run the command again; it resumes where it stopped.",
        ) from error


def _wrong_digest(download: Download, actual: str) -> WrongDigest:
    name = download.algorithm.upper().replace("SHA", "SHA-")
    return WrongDigest(
        f"{download.url} is not the file that was asked for",
        details=f"expected {name} {download.digest}\nactual {name}   {actual}",
        resolution="Run the command again in some minutes (a mirror may be in the middle of an update, a proxy may "
        "have altered the file), or set VMBUILD_MIRROR to another mirror.",
    )
