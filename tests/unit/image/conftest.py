"""A web server on 127.0.0.1 that misbehaves on demand, and a reporter that remembers."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.unit.listener import Listener
from vmbuild.image import tries


class Dropped(Exception):
    """Raised by a behaviour to close the connection without another word."""


class Answer(BaseHTTPRequestHandler):
    """One request; behaviours write to it."""

    protocol_version = "HTTP/1.1"
    site: Site

    def do_GET(self) -> None:
        self.site.requests.append((self.path, self.headers.get("Range", "")))
        behaviours = self.site.behaviours.get(self.path, [])
        behave = behaviours.pop(0) if behaviours else self.site.default
        try:
            behave(self)
        except (Dropped, ConnectionError):
            self.close_connection = True

    def reply(self, status: int, body: bytes = b"", *, length: int | None = None, content_range: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        self.write(body)

    def write(self, body: bytes) -> None:
        self.wfile.write(body)
        self.wfile.flush()
        self.site.count(len(body))

    def serve_file(self) -> None:
        """Serve the file as a good server does, ranges included."""
        body = self.site.files.get(self.path)
        if body is None:
            return self.reply(404)
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(match[1]) if match else 0
        if match and start >= len(body):
            return self.reply(416)
        if match:
            return self.reply(206, body[start:], content_range=f"bytes {start}-{len(body) - 1}/{len(body)}")
        return self.reply(200, body)

    def log_message(self, format: str, *args: object) -> None:
        pass


Behaviour = Callable[[Answer], None]


@dataclass
class Site:
    """The files a server has, what it does to the next requests for a path, and what it was asked."""

    files: dict[str, bytes] = field(default_factory=dict)
    behaviours: dict[str, list[Behaviour]] = field(default_factory=dict)
    default: Behaviour = Answer.serve_file
    requests: list[tuple[str, str]] = field(default_factory=list)
    url: str = ""
    served_bytes: int = 0
    released: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, amount: int) -> None:
        with self._lock:
            self.served_bytes += amount

    def asked(self, path: str) -> list[str]:
        """Return the Range headers of the requests for a path, empty for a whole file."""
        return [ranges for asked, ranges in self.requests if asked == path]


def status(code: int) -> Behaviour:
    """Answer with this status and no body."""
    return lambda answer: answer.reply(code)


def drop_after(amount: int) -> Behaviour:
    """Promise the rest of the file, send some bytes of it, close."""

    def behave(answer: Answer) -> None:
        body = answer.site.files[answer.path]
        match = re.fullmatch(r"bytes=(\d+)-", answer.headers.get("Range", ""))
        start = int(match[1]) if match else 0
        content_range = f"bytes {start}-{len(body) - 1}/{len(body)}" if match else ""
        piece = body[start : start + amount]
        answer.reply(206 if match else 200, piece, length=len(body) - start, content_range=content_range)
        raise Dropped

    return behave


def hang_after(amount: int) -> Behaviour:
    """Send some bytes, then nothing until the site is released."""

    def behave(answer: Answer) -> None:
        body = answer.site.files[answer.path]
        answer.reply(200, body[:amount], length=len(body))
        answer.site.released.wait(30)
        raise Dropped

    return behave


def without_ranges(answer: Answer) -> None:
    """Serve the whole file whatever range was asked for."""
    answer.reply(200, answer.site.files[answer.path])


def redirect(place: str) -> Behaviour:
    """Send whoever asks to another place."""

    def behave(answer: Answer) -> None:
        answer.send_response(302)
        answer.send_header("Location", place)
        answer.send_header("Content-Length", "0")
        answer.end_headers()

    return behave


def send(body: bytes) -> Behaviour:
    """Serve this instead of the file."""
    return lambda answer: answer.reply(200, body)


def close_delimited(amount: int) -> Behaviour:
    """Send some bytes without having said how many will come."""

    def behave(answer: Answer) -> None:
        answer.send_response(200)
        answer.end_headers()
        answer.write(answer.site.files[answer.path][:amount])
        raise Dropped

    return behave


@pytest.fixture
def site() -> Iterator[Site]:
    """Yield a server's site."""
    made = Site()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundAnswer", (Answer,), {"site": made}))
    server.daemon_threads = True
    made.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again at once, and past any proxy of the host."""
    monkeypatch.setattr(tries, "BACKOFF_S", 0.001)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def listener() -> Listener:
    """Return a reporter that remembers."""
    return Listener()


@dataclass(frozen=True)
class Keys:
    """A throw-away GnuPG home with the keys of an archive and of a stranger."""

    home: Path

    def sign(self, text: str, *signers: str) -> bytes:
        users = [option for signer in signers for option in ("--local-user", f"{signer}@test.invalid")]
        return self.gpg(*users, "--clearsign", stdin=text.encode())

    def export(self, signer: str) -> Path:
        path = self.home / f"{signer}.keyring.gpg"
        path.write_bytes(self.gpg("--export", f"{signer}@test.invalid"))
        return path

    def gpg(self, *argv: str, stdin: bytes = b"") -> bytes:
        common = [
            "gpg",
            "--homedir",
            str(self.home),
            "--batch",
            "--quiet",
            "--passphrase",
            "",
            "--pinentry-mode=loopback",
        ]
        return subprocess.run([*common, *argv], input=stdin, capture_output=True, check=True).stdout


@pytest.fixture(scope="session")
def keys() -> Iterator[Keys]:
    """Yield keys of `archive`, `old` (unknown to the catalogue), `stranger` and `expired`."""
    if shutil.which("gpg") is None:
        pytest.skip("gpg is not installed")
    with tempfile.TemporaryDirectory(prefix="gpg-", dir="/tmp") as folder:  # a short path: gpg-agent has a socket there
        made = Keys(Path(folder))
        made.home.chmod(0o700)
        for name in ("archive", "old", "stranger"):
            made.gpg("--quick-gen-key", f"{name}@test.invalid", "ed25519", "sign", "never")
        past = ("--faked-system-time", "20200101T000000!")
        made.gpg(*past, "--quick-gen-key", "expired@test.invalid", "ed25519", "sign", "1d")
        yield made
        subprocess.run(["gpgconf", "--homedir", folder, "--kill", "all"], check=False)
