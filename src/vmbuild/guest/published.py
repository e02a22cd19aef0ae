"""The ports that containers publish, as Docker tells them on a socket of this host."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from vmbuild.errors import GuestError

ANSWER_S = 30.0
MAX_ANSWER = 16 * 1024 * 1024
"""The most that is read of one answer: the guest is not trusted with this host's memory."""

EVENTS = "/events?filters=" + quote(json.dumps({"type": ["container"], "event": ["start", "die"]}))


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_s: float | None = ANSWER_S) -> None:
        super().__init__("docker", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def read_published(path: Path) -> set[int]:
    """Return the TCP ports that running containers publish in the guest. Raises GuestError."""
    connection = _Connection(path)
    try:
        connection.request("GET", "/containers/json")
        return parse_published(json.loads(connection.getresponse().read(MAX_ANSWER)))
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise GuestError("Docker does not say what its containers publish", details=repr(error)) from error
    finally:
        connection.close()


def parse_published(containers: Any) -> set[int]:
    """Return the ports of an answer of `/containers/json`. Raises ValueError for nonsense."""
    try:
        ports = [port for each in containers for port in each.get("Ports") or () if port.get("Type") == "tcp"]
        return {int(port["PublicPort"]) for port in ports if port.get("PublicPort")}
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"no list of containers: {error!r}") from error


def watch_published(path: Path) -> Iterator[set[int]]:
    """Yield what is published now, and again after each start and end of a container, until Docker goes away.

    Raises GuestError when it cannot be asked.
    """
    connection = _Connection(path, None)  # it may be long until something happens
    try:
        connection.request("GET", EVENTS)
        events = connection.getresponse()  # it listens from here on: nothing that starts now is missed
        yield read_published(path)
        while events.readline(MAX_ANSWER):
            yield read_published(path)
    except (OSError, http.client.HTTPException) as error:
        raise GuestError("Docker does not tell its events any more", details=repr(error)) from error
    finally:
        connection.close()
