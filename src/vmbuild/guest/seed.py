"""What a guest is told before it first listens: a tar on a read-only drive, for one machine and one boot."""

from __future__ import annotations

import io
import os
import tarfile
import time
from collections.abc import Mapping
from pathlib import Path

from vmbuild.address import seen_from_guest
from vmbuild.guest import keys
from vmbuild.whole import write_whole

UNIT_BYTES = 64 * 1024
"""Drives have whole sectors, and a seed that grows by a letter need not become another drive."""

PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")


def proxies(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the proxy variables of an environment as they are right in a guest: the host's loopback is elsewhere."""
    return {name: seen_from_guest(environment[name]) for name in PROXIES if environment.get(name)}


def write_seed(path: Path, *, hostname: str, client_key: Path, host_key: Path, environment: Mapping[str, str]) -> None:
    """Write the seed drive, making both key pairs first where they are missing.

    `environment` reaches dockerd: the proxies of the host. Raises HostError when the host cannot write it.
    """
    keys.ensure_key(client_key, "vmbuild host")
    keys.ensure_key(host_key, "vmbuild guest")
    files = {
        "authorized_keys": client_key.with_name(client_key.name + ".pub").read_bytes(),
        "entropy": os.urandom(64),
        "dropbear_ed25519_host_key": keys.dropbear_key(host_key),
        "ssh_host_ed25519_key": host_key.read_bytes(),  # OpenSSH's, in a disk from elsewhere
        "environment": environment_text(environment).encode(),
        "hostname": f"{hostname}\n".encode(),
        "time": f"{int(time.time())}\n".encode(),
    }
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o600
            tar.addfile(info, io.BytesIO(data))
    content = packed.getvalue()
    write_whole(path, content + bytes(-len(content) % UNIT_BYTES), mode=0o600)


def environment_text(environment: Mapping[str, str]) -> str:
    """Return variables as a shell, and systemd, read them from a file."""
    return "".join(f"{name}={quote(value)}\n" for name, value in environment.items())


def quote(value: str) -> str:
    """Return a value as a shell reads it from a file of variables."""
    return "'" + value.replace("'", "'\\''") + "'"
