from __future__ import annotations

import base64
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

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


def test_dropbears_key_is_the_same_key(tmp_path: Path) -> None:
    ensure_key(tmp_path / "key", "me")
    private = Ed25519PrivateKey.from_private_bytes(dropbear_key(tmp_path / "key")[19:51])
    wanted = base64.b64decode((tmp_path / "key.pub").read_text().split()[1])[-32:]
    assert private.public_key().public_bytes_raw() == wanted


def test_the_public_key_is_one_line_with_its_comment(tmp_path: Path) -> None:
    ensure_key(tmp_path / "key", "vmbuild host")
    text = (tmp_path / "key.pub").read_text()
    assert text.startswith("ssh-ed25519 ")
    assert text.endswith(" vmbuild host\n")
    assert text.count("\n") == 1


def test_two_keys_differ(tmp_path: Path) -> None:
    for name in ("one", "two"):
        ensure_key(tmp_path / name, "me")
    assert (tmp_path / "one").read_bytes() != (tmp_path / "two").read_bytes()


def test_a_key_is_never_readable_by_others_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        ensure_key(tmp_path / "key", "me")
    finally:
        os.umask(old)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert {path.name for path in tmp_path.iterdir()} == {"key", "key.pub"}


def test_what_an_interrupted_run_left_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "key.part").write_bytes(b"half")
    (tmp_path / "key.part").chmod(0o666)
    (tmp_path / "key.pub").write_bytes(b"half")
    ensure_key(tmp_path / "key", "me")
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert dropbear_key(tmp_path / "key")
    assert (tmp_path / "key.pub").read_text().startswith("ssh-ed25519 ")


def test_a_link_at_the_place_of_the_half_written_key_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "key.part").symlink_to(tmp_path / "elsewhere")
    ensure_key(tmp_path / "key", "me")
    assert not (tmp_path / "elsewhere").exists()
    assert not (tmp_path / "key").is_symlink()
