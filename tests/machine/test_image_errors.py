"""A mirror that lies, stops halfway or breaks off: the real mirror of this host, seen through a proxy of ours."""

from __future__ import annotations

import http.server
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import requests

from tests.machine.conftest import Cli, wait_until
from vmbuild.image.catalog import load_image
from vmbuild.image.mirrors import mirror_urls
from vmbuild.model import ApplianceSpec

pytestmark = pytest.mark.machine

RETRIED_BYTES = 1_000_000
"""What may be sent twice because a connection broke; much less than what the test expects to be kept."""


@dataclass
class Served:
    """How many bytes of packages were sent."""

    amount: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, amount: int) -> None:
        with self._lock:
            self.amount += amount


@dataclass
class Mirror:
    """A proxy in front of this host's Debian mirrors; `fault` says what it does to what passes.

    A request counts where `served` pointed when it began, so what is still under way for a client that was killed
    does not count for the next one.
    """

    url: str = ""
    fault: str = ""
    served: Served = field(default_factory=Served)
    upstream: dict[str, str] = field(default_factory=dict)

    @property
    def options(self) -> tuple[str, ...]:
        """The options that make vmbuild use it."""
        return ("--mirror", f"{self.url}/debian", "--security-mirror", f"{self.url}/debian-security")


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    found = Mirror()
    spec = load_image("debian-13-arm64")
    assert isinstance(spec, ApplianceSpec)
    for repository in spec.repositories:
        found.upstream[repository.mirror] = mirror_urls(repository, {})[0]

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            served = found.served
            _, name, rest = self.path.split("/", 2)
            sent = {"Range": self.headers["Range"]} if "Range" in self.headers else {}
            answer = requests.get(f"{found.upstream[name]}/{rest}", headers=sent, timeout=60)
            body = bytearray(answer.content)
            package = rest.endswith(".deb")
            if found.fault == "unsigned" and rest.endswith("InRelease"):
                body = body.replace(b"Codename: trixie", b"Codename: sid...")
            if found.fault == "wrong-bytes" and package:
                body[len(body) // 2] ^= 1
            self.send_response(answer.status_code)
            self.send_header("Content-Length", str(len(body)))
            if "Content-Range" in answer.headers:
                self.send_header("Content-Range", answer.headers["Content-Range"])
            self.end_headers()
            if found.fault == "truncated" and package:
                body = body[: len(body) // 2]
                self.close_connection = True
            for start in range(0, len(body), 65536):
                if found.fault == "slow" and package:
                    time.sleep(0.02)
                piece = body[start : start + 65536]
                self.wfile.write(piece)
                served.count(len(piece) if package else 0)

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    found.url = f"http://127.0.0.1:{server.server_port}"
    yield found
    server.shutdown()
    server.server_close()


@pytest.fixture
def empty(tmp_path: Path) -> Cli:
    """The program with an empty cache."""
    (tmp_path / "state").mkdir()
    return Cli(tmp_path / "cache", tmp_path / "state", "none")


def assembled(cli: Cli) -> list[Path]:
    return list((cli.cache / "images").glob("[!.]*/manifest.json"))


def package_bytes(cli: Cli) -> int:
    """Return how much of packages lies in the cache, half-fetched ones included."""
    files = (path for path in (cli.cache / "packages").rglob("*") if path.is_file() and path.suffix != ".lock")
    return sum(path.stat().st_size for path in files)


@pytest.mark.parametrize(
    ("fault", "words"), [("unsigned", "signature"), ("wrong-bytes", "SHA-256"), ("truncated", "connection broke")]
)
def test_a_mirror_that_cannot_be_trusted(empty: Cli, mirror: Mirror, fault: str, words: str) -> None:
    mirror.fault = fault
    done = empty.run("up", *mirror.options)
    assert done.code == 4, done.err
    assert words in done.err
    assert assembled(empty) == []
    assert not list(empty.state.glob("machines/none/disk.qcow2"))


def test_killed_while_downloading_it_goes_on_where_it_was(empty: Cli, mirror: Mirror) -> None:
    mirror.fault = "slow"
    program = empty.start("images", "fetch", *mirror.options)
    wait_until(lambda: mirror.served.amount > 30_000_000, "some packages are there", 120)
    program.send_signal(signal.SIGKILL)
    program.communicate()
    assert assembled(empty) == []

    kept = package_bytes(empty)
    assert kept > 10_000_000, "what was on its way is on the disk"

    mirror.fault = ""
    mirror.served = Served()
    image = empty.ok("images", "fetch", "--json", *mirror.options).json()
    assert mirror.served.amount <= package_bytes(empty) - kept + RETRIED_BYTES
    manifest = json.loads(assembled(empty)[0].read_text())
    assert {"docker.io", "busybox-static"} <= {package["name"] for package in manifest["packages"]}
    assert assembled(empty)[0].parent.name == image["digest"]
    assert [check["problem"] for check in empty.ok("images", "verify", "--json").json()] == [""]

    with (assembled(empty)[0].parent / "root.squashfs").open("r+b") as root:
        root.seek(1_000_000)
        byte = root.read(1)
        root.seek(1_000_000)
        root.write(bytes([byte[0] ^ 1]))
    assert empty.run("images", "verify").code == 4


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small tmpfs")
def test_a_full_disk_is_said_and_nothing_half_made_is_used(empty: Cli) -> None:
    empty.cache.mkdir()
    argv = ["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", str(empty.cache)]
    mounted = subprocess.run(argv, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:  # root of a container, mostly
        pytest.skip(f"this host does not permit to mount a tmpfs: {mounted.stderr.strip()}")
    try:
        done = empty.run("images", "fetch")
        assert done.code == 3, done.err
        assert "full" in done.err
        assert assembled(empty) == []
        subprocess.run(["mount", "-o", "remount,size=900m", str(empty.cache)], check=True)
        empty.ok("images", "fetch")
        assert len(assembled(empty)) == 1
    finally:
        subprocess.run(["umount", str(empty.cache)], check=True)
