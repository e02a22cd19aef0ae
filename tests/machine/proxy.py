"""A real forward proxy on the host's loopback: it asks for a password, and knows hosts that nobody else knows."""

from __future__ import annotations

import select
import socket
import socketserver
import threading
from base64 import b64encode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit


@dataclass
class Proxy:
    """A proxy that runs. `seen` are the hosts that it was asked for, `refused` counts who had not the password."""

    port: int
    login: tuple[str, str]
    hosts: Mapping[str, int]
    seen: list[str] = field(default_factory=list)
    refused: int = 0

    @property
    def url(self) -> str:
        """Its address with the login, as it stands in `http_proxy`."""
        return f"http://{':'.join(self.login)}@127.0.0.1:{self.port}"


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
    proxy: Proxy


class _Handler(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        client, proxy = cast(socket.socket, self.request), cast(_Server, self.server).proxy
        head, _, rest = _read_head(client).partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        method, target, _ = first.split(" ", 2)
        wanted = "Basic " + b64encode(":".join(proxy.login).encode()).decode()
        if f"proxy-authorization: {wanted}".lower() not in (line.lower() for line in lines):
            proxy.refused += 1
            client.sendall(b"HTTP/1.1 407 No\r\nProxy-Authenticate: Basic\r\nContent-Length: 0\r\n\r\n")
            return
        url = urlsplit(f"//{target}" if method == "CONNECT" else target)
        proxy.seen.append(url.hostname or "")
        port = proxy.hosts.get(url.hostname or "")
        if port is None:
            client.sendall(b"HTTP/1.1 502 Unknown\r\nContent-Length: 0\r\n\r\n")
            return
        with socket.create_connection(("127.0.0.1", port), 20) as server:
            if method == "CONNECT":
                client.sendall(b"HTTP/1.1 200 Yes\r\n\r\n")
                server.sendall(rest)
            else:
                kept = [line for line in lines if not line.lower().startswith(("proxy-", "connection:"))]
                path = url.path + (f"?{url.query}" if url.query else "")
                text = "\r\n".join([f"{method} {path} HTTP/1.1", *kept, "Connection: close", "", ""])
                server.sendall(text.encode("latin-1") + rest)
            _relay(client, server)


def _read_head(client: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        piece = client.recv(65536)
        if not piece:
            raise ConnectionError("the client has gone")
        data += piece
    return data


def _relay(client: socket.socket, server: socket.socket) -> None:
    """Pass on what both say until one of them ends, or nobody says anything for a minute."""
    other = {client: server, server: client}
    while ready := select.select([client, server], [], [], 60)[0]:
        for source in ready:
            data = source.recv(65536)
            if not data:
                return
            other[source].sendall(data)


@contextmanager
def running(login: tuple[str, str], hosts: Mapping[str, int]) -> Iterator[Proxy]:
    """Run a proxy until the block is left. `hosts` are the names that it knows, each a port of this host's loopback."""
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.proxy = Proxy(server.server_address[1], login, hosts)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.proxy
        server.shutdown()
