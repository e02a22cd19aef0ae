"""The guest's Docker socket on the host, carried by OpenSSH's client: its argv, and the ping that proves it."""

from __future__ import annotations

import re
import socket
from pathlib import Path

from vmbuild.deadline import Deadline
from vmbuild.model import Endpoint

REMOTE = "/run/docker.sock"

OPTIONS = (
    *("BatchMode=yes", "IdentitiesOnly=yes", "IdentityAgent=none", "PreferredAuthentications=publickey"),
    *("StrictHostKeyChecking=yes", "GlobalKnownHostsFile=none", "UpdateHostKeys=no", "CheckHostIP=no"),
    *("ControlMaster=no", "ControlPath=none", "Compression=no", "LogLevel=ERROR"),
    *("ExitOnForwardFailure=yes", "StreamLocalBindMask=0177", "StreamLocalBindUnlink=yes"),
)
"""The user's own configuration has no say: what is left is authenticated by the machine's keys alone."""

OPENS_NO_SOCKETS = re.compile(rb"SSH-2\.0-dropbear_20([01]\d|2[0-3])\.")
"""How dropbear greets that is older than 2024.84, as Debian 12's: it forwards to ports, not to sockets."""

PING = b"GET /_ping HTTP/1.0\r\n\r\n"


def ssh_argv(endpoint: Endpoint, alias: str, known_hosts: Path, local: Path) -> list[str]:
    """Return the argv that carries each connection to the socket `local` to Docker's, until the guest is gone.

    It runs in the folder of `local` and of the keys: all are named relative to it, because ssh reads signs in paths.
    """
    return [
        *("ssh", "-F", "none", "-N", "-T"),
        *(word for option in OPTIONS for word in ("-o", option)),
        *("-o", f"UserKnownHostsFile=./{known_hosts.name}"),
        *("-o", f"HostKeyAlias={alias}"),
        *("-i", f"./{endpoint.client_key.name}"),
        *("-p", str(endpoint.port)),
        *("-L", f"./{local.name}:{REMOTE}"),
        f"{endpoint.user}@{endpoint.host}",
    ]


def can_carry(endpoint: Endpoint, deadline: Deadline) -> bool:
    """Tell whether the guest's SSH server opens a socket for ssh; when nothing is heard of it, ssh shall say why."""
    limit_s = max(deadline.remaining_s(), 0.001)
    try:
        with socket.create_connection((endpoint.host, endpoint.port), limit_s) as client, client.makefile("rb") as said:
            return not OPENS_NO_SOCKETS.match(said.readline(255))
    except OSError:
        return True


def known_hosts_line(alias: str, host_public_key: str) -> str:
    """Return the line that pins a host key under a name, which is no address: a forwarded port changes."""
    kind, key, *_ = host_public_key.split()
    return f"{alias} {kind} {key}\n"


def answers(path: Path, deadline: Deadline) -> bool:
    """Tell whether Docker answers on a Unix socket."""
    heard = bytearray()
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(max(deadline.remaining_s(), 0.001))
            client.connect(str(path))
            client.sendall(PING)
            while len(heard) < 64 * 1024 and (data := client.recv(4096)):
                heard += data
    except OSError:
        return False
    return heard.startswith(b"HTTP/1.") and heard.endswith(b"OK")
