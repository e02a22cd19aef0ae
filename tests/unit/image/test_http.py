"""Whom a download trusts: a real server with a certificate that a private authority signed."""

from __future__ import annotations

import http.server
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.machine.registry import make_authority
from vmbuild.image.http import Session, open_url
from vmbuild.image.tries import Unreachable
from vmbuild.trust import trust_also


class Hello(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "5")
        self.end_headers()
        self.wfile.write(b"hello")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server whose authority is `ca.pem`; afterwards nobody trusts that any more."""
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "http_proxy", "https_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    make_authority(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hello) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"https://localhost:{server.server_address[1]}/"
        trust_also("")
        server.shutdown()


def get(url: str) -> bytes:
    with Session() as session, open_url(session, url, {}) as response:
        return response.content


def test_an_authority_is_trusted_only_when_it_was_given(url: str, tmp_path: Path) -> None:
    with pytest.raises(Unreachable) as caught:
        get(url)
    assert "certificate is not trusted" in caught.value.details
    trust_also((tmp_path / "ca.pem").read_text())
    assert get(url) == b"hello"
    trust_also("")
    with pytest.raises(Unreachable):
        get(url)


def test_another_authority_is_not_enough(url: str, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    trust_also(make_authority(tmp_path / "other").read_text())
    with pytest.raises(Unreachable):
        get(url)


def test_it_comes_beside_the_bundle_of_the_environment(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    trust_also(make_authority(tmp_path / "other").read_text())
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "ca.pem"))
    assert get(url) == b"hello"
