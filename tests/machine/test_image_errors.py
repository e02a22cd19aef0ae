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

pytestmark = pytest.mark.machine


@dataclass
class Mirror:
    """A proxy in front of this host's Debian mirrors; `fault` says what it does to what passes."""

    url: str = ""
    fault: str = ""
    bytes_of_packages: int = 0
    upstream: dict[str, str] = field(default_factory=dict)

    @property
    def options(self) -> tuple[str, ...]:
        """The options that make vmbuild use it."""
        return ("--mirror", f"{self.url}/debian", "--security-mirror", f"{self.url}/debian-security")


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    found = Mirror()
    for repository in load_image("debian-13-arm64").repositories:
        found.upstream[repository.mirror] = mirror_urls(repository, {})[0]

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
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
                self.wfile.write(body[start : start + 65536])
                found.bytes_of_packages += 65536 if package else 0

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
    wait_until(lambda: mirror.bytes_of_packages > 30_000_000, "some packages are there", 120)
    program.send_signal(signal.SIGKILL)
    program.communicate()
    assert assembled(empty) == []

    mirror.fault = ""
    mirror.bytes_of_packages = 0
    image = empty.ok("images", "fetch", "--json", *mirror.options).json()
    assert mirror.bytes_of_packages < 95_000_000
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
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", str(empty.cache)], check=True)
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
