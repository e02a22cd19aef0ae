"""What a guest is told before it first listens: a tar on a read-only drive, for one machine and one boot."""

from __future__ import annotations

import io
import tarfile
import time
from collections.abc import Mapping
from pathlib import Path

from vmbuild.address import seen_from_guest
from vmbuild.guest import keys
from vmbuild.whole import open_whole

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
        "dropbear_ed25519_host_key": keys.dropbear_key(host_key),
        "environment": "".join(f"{name}={_quote(value)}\n" for name, value in environment.items()).encode(),
        "hostname": f"{hostname}\n".encode(),
        "time": f"{int(time.time())}\n".encode(),
    }
    with open_whole(path, mode=0o600) as out, tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o600
            tar.addfile(info, io.BytesIO(data))


def _quote(value: str) -> str:
    return "'" + value.replace("'", "'\\''") + "'"
