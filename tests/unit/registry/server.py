"""A registry in this process that does as it is told: wants tokens, breaks lines, finds layers too large."""

from __future__ import annotations

import hashlib
import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit


class FakeRegistry:
    """What it has, what it was asked, and how it misbehaves.

    `auth` is `none`, `basic` or `bearer`; `breaks` says after how many bytes each next upload breaks off; `most` is the
    largest body it takes; `statuses` are answers to the next requests, whatever these are.
    """

    def __init__(self, auth: str = "none") -> None:
        self.auth = auth
        self.blobs: dict[str, bytes] = {}
        self.repositories: dict[str, set[str]] = {}
        self.manifests: dict[tuple[str, str], tuple[str, bytes]] = {}
        self.uploads: dict[str, bytearray] = {}
        self.asked: list[str] = []
        self.authorizations: list[str] = []
        self.tokens: list[tuple[str, dict[str, list[str]]]] = []
        self.breaks: list[int] = []
        self.statuses: list[int] = []
        self.most = 1 << 40
        self.elsewhere = ""
        self.port = 0

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    @contextmanager
    def serving(self, certificate: Path | None = None) -> Iterator[FakeRegistry]:
        """Serve over plain HTTP, or TLS with a certificate whose key lies beside it."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: _Handler(self, *args))
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate, certificate.with_suffix(".key"))
            server.socket = context.wrap_socket(server.socket, server_side=True)
        self.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, registry: FakeRegistry, *args: Any) -> None:
        self.registry = registry
        super().__init__(*args)

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def _answer(self) -> None:
        registry = self.registry
        url = urlsplit(self.path)
        registry.asked.append(f"{self.command} {self.path}")
        registry.authorizations.append(self.headers.get("Authorization", ""))
        if url.path == "/token":
            return self._token(url.query)
        size = int(self.headers.get("Content-Length") or 0)
        if size > registry.most:
            self.close_connection = True
            return self._say(413)
        if registry.statuses:
            self.rfile.read(size)
            return self._say(registry.statuses.pop(0))
        if not self._is_let_in():
            self.rfile.read(size)
            return self._challenge()
        if "/uploads/" in url.path:
            return self._upload(url.path, parse_qs(url.query), size)
        body = self.rfile.read(size)
        _, _, rest = url.path.partition("/v2/")
        if "/manifests/" in rest:
            name, _, reference = rest.partition("/manifests/")
            registry.manifests[name, reference] = (self.headers["Content-Type"], body)
            return self._say(201)
        name, _, digest = rest.partition("/blobs/")
        return self._say(200 if digest in registry.repositories.get(name, set()) else 404)

    def _is_let_in(self) -> bool:
        given = self.headers.get("Authorization", "")
        return self.registry.auth == "none" or given in ("Basic bWU6cHc=", "Bearer good")

    def _challenge(self) -> None:
        kind = 'Basic realm="x"'
        if self.registry.auth == "bearer":
            kind = f'Bearer realm="http://{self.registry.host}/token",service="reg"'
        self._say(401, {"WWW-Authenticate": kind})

    def _token(self, query: str) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        text = self.rfile.read(size).decode() if size else query
        self.registry.tokens.append((self.headers.get("Authorization", ""), parse_qs(text)))
        self._say(200, {}, json.dumps({"token": "good"}).encode())

    def _upload(self, path: str, query: dict[str, list[str]], size: int) -> None:
        registry = self.registry
        name, _, number = path.partition("/v2/")[2].partition("/blobs/uploads/")
        if self.command == "POST":
            mounted = query.get("mount", [""])[0]
            if mounted and mounted in registry.repositories.get(query["from"][0], set()):
                registry.repositories.setdefault(name, set()).add(mounted)
                return self._say(201)
            number = str(len(registry.uploads))
            registry.uploads[number] = bytearray()
            return self._say(202, {"Location": f"{registry.elsewhere}/v2/{name}/blobs/uploads/{number}?state=s"})
        has = registry.uploads[number]
        location = {"Location": f"{registry.elsewhere}/v2/{name}/blobs/uploads/{number}?state=s"}
        if self.command == "GET":
            return self._say(204, {**location, "Range": f"0-{max(len(has) - 1, 0)}"})
        if self.command == "DELETE":
            return self._say(204)
        if self.command == "PATCH":
            given = self.headers.get("Content-Range")
            assert given is None or int(given.partition("-")[0]) == len(has)
            if registry.breaks:
                has += self.rfile.read(registry.breaks.pop(0))
                self.close_connection = True
                self.connection.close()
                return None
            has += self.rfile.read(size)
            return self._say(202, location)
        digest = f"sha256:{hashlib.sha256(has).hexdigest()}"
        if query["digest"] != [digest]:
            return self._say(400)
        registry.blobs[digest] = bytes(has)
        registry.repositories.setdefault(name, set()).add(digest)
        return self._say(201)

    def _say(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
