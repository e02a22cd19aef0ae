from __future__ import annotations

import base64
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from vmbuild.guest.keys import dropbear_key, ensure_key
from vmbuild.guest.seed import write_seed


def test_a_key_pair_that_openssh_reads(tmp_path: Path) -> None:
    key = tmp_path / "key"
    ensure_key(key, "me")
    assert key.stat().st_mode & 0o777 == 0o600
    if shutil.which("ssh-keygen") is None:
        pytest.skip("ssh-keygen is not installed")
    public = subprocess.check_output(["ssh-keygen", "-y", "-f", str(key)], text=True).split()[:2]
    assert public == (tmp_path / "key.pub").read_text().split()[:2]


def test_a_key_is_made_once(tmp_path: Path) -> None:
    ensure_key(tmp_path / "key", "me")
    before = (tmp_path / "key").read_bytes()
    ensure_key(tmp_path / "key", "me")
    assert (tmp_path / "key").read_bytes() == before


def test_dropbears_format_ends_with_the_public_key(tmp_path: Path) -> None:
    ensure_key(tmp_path / "key", "me")
    data = dropbear_key(tmp_path / "key")
    assert data[:15] == b"\0\0\0\x0bssh-ed25519"
    assert data[15:19] == b"\0\0\0\x40"
    assert len(data) == 19 + 64
    public = base64.b64decode((tmp_path / "key.pub").read_text().split()[1])
    assert data[-32:] == public[-32:]


def test_the_seed_tells_one_guest_its_keys(tmp_path: Path) -> None:
    values = {"http_proxy": "http://u:p'w@h:1/", "X": "a b$(touch /tmp/never)`x`"}
    client, host = tmp_path / "client", tmp_path / "host"
    for _ in range(2):  # a second start writes it anew, with the same keys
        write_seed(tmp_path / "seed", hostname="h", client_key=client, host_key=host, environment=values)
    assert (tmp_path / "seed").stat().st_mode & 0o777 == 0o600
    with tarfile.open(tmp_path / "seed") as tar:
        tar.extractall(tmp_path / "out", filter="data")
    out = tmp_path / "out"
    assert (out / "authorized_keys").read_text() == (tmp_path / "client.pub").read_text()
    assert (out / "dropbear_ed25519_host_key").read_bytes() == dropbear_key(host)
    assert (out / "hostname").read_text() == "h\n"
    shell = f'. {out}/environment; printf "%s\\n" "$http_proxy" "$X"'
    assert subprocess.check_output(["sh", "-c", shell], text=True).splitlines() == list(values.values())
