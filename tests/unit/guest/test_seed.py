from __future__ import annotations

import os
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

from vmbuild.errors import HostError
from vmbuild.guest.keys import dropbear_key
from vmbuild.guest.seed import UNIT_BYTES, proxies, write_seed

NASTY = {
    "plain": "http://proxy:3128/",
    "quotes": "it's \"quoted\" ''",
    "shell": "$(touch never) `touch never` ${HOME} $$ ; & | > never",
    "space": "  two  spaces\ttab ",
    "line": "one\ntwo\n",
    "back": "a\\b\\'c\\",
    "empty": "",
    "glob": "*.example.com,[::1],!x,#y",
    "utf8": "grüße",
}


def write(folder: Path, environment: dict[str, str] | None = None, hostname: str = "vmbuild-default") -> Path:
    path = folder / "seed.tar"
    write_seed(
        path,
        hostname=hostname,
        client_key=folder / "client",
        host_key=folder / "host",
        environment=environment or {},
    )
    return path


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        found = {}
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None, f"{member.name} is no file"
            found[member.name] = file.read()
    return found


def test_it_tells_the_guest_all_it_needs_and_nothing_else(tmp_path: Path) -> None:
    before = int(time.time())
    found = members(write(tmp_path))
    assert set(found) == {
        *("authorized_keys", "dropbear_ed25519_host_key", "ssh_host_ed25519_key"),
        *("entropy", "environment", "hostname", "time"),
    }
    assert found["ssh_host_ed25519_key"] == (tmp_path / "host").read_bytes()
    assert len(found["entropy"]) == 64
    assert found["entropy"] != members(write(tmp_path))["entropy"]
    assert found["authorized_keys"] == (tmp_path / "client.pub").read_bytes()
    assert found["dropbear_ed25519_host_key"] == dropbear_key(tmp_path / "host")
    assert found["hostname"] == b"vmbuild-default\n"
    assert before <= int(found["time"]) <= time.time()
    assert found["environment"] == b""


def test_the_private_client_key_never_travels(tmp_path: Path) -> None:
    data = write(tmp_path).read_bytes()
    secret = (tmp_path / "client").read_bytes()
    guests_own = (tmp_path / "host").read_bytes()
    assert guests_own in data
    assert b"PRIVATE KEY" not in data.replace(guests_own, b"")
    assert secret not in data
    assert dropbear_key(tmp_path / "client")[19:51] not in data


def test_both_private_keys_and_the_seed_are_the_owners_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        write(tmp_path)
    finally:
        os.umask(old)
    for name in ("seed.tar", "client", "host"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600, name
    with tarfile.open(tmp_path / "seed.tar") as tar:
        assert {member.mode for member in tar} == {0o600}


@pytest.mark.parametrize("name", NASTY)
def test_a_shell_reads_each_value_as_it_was(tmp_path: Path, name: str) -> None:
    (tmp_path / "environment").write_bytes(members(write(tmp_path, {name: NASTY[name]}))["environment"])
    script = f'. ./environment; printf %s. "${name}"'
    out = subprocess.check_output(["/bin/sh", "-c", script], cwd=tmp_path)
    assert out.decode() == NASTY[name] + "."
    assert not (tmp_path / "never").exists()


def test_every_value_of_several_is_set(tmp_path: Path) -> None:
    (tmp_path / "environment").write_bytes(members(write(tmp_path, NASTY))["environment"])
    script = ". ./environment; " + "; ".join(f'printf "%s\\0" "${name}"' for name in NASTY)
    out = subprocess.check_output(["/bin/sh", "-c", script], cwd=tmp_path)
    assert out.decode().split("\0")[:-1] == list(NASTY.values())


def test_it_is_written_anew_and_whole_each_time_with_the_same_keys(tmp_path: Path) -> None:
    first = members(write(tmp_path, {"x": "y" * 150_000}, "one"))
    path = write(tmp_path, {}, "two")
    second = members(path)
    assert second["hostname"] == b"two\n"
    assert second["environment"] == b""
    assert path.stat().st_size == UNIT_BYTES
    for name in ("authorized_keys", "dropbear_ed25519_host_key"):
        assert first[name] == second[name]
    assert {found.name for found in tmp_path.iterdir()} == {"seed.tar", "client", "client.pub", "host", "host.pub"}


def test_a_left_over_part_is_not_written_into(tmp_path: Path) -> None:
    """Someone else's link at the place of the half-written file must not lead the keys elsewhere."""
    (tmp_path / "seed.tar.part").symlink_to(tmp_path / "elsewhere")
    path = write(tmp_path)
    assert not path.is_symlink()
    assert not (tmp_path / "elsewhere").exists()


def test_a_folder_that_is_not_there_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"cannot write .*No such file"):
        write_seed(
            tmp_path / "none" / "seed",
            hostname="h",
            client_key=tmp_path / "client",
            host_key=tmp_path / "host",
            environment={},
        )
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("value", "seen"),
    [
        ("http://127.0.0.1:3128", "http://10.0.2.2:3128"),
        ("http://user:pass@localhost:3128/", "http://user:pass@10.0.2.2:3128/"),
        ("http://[::1]:3128", "http://10.0.2.2:3128"),
        ("http://proxy.example:3128", "http://proxy.example:3128"),
        ("http://localhost.example:3128", "http://localhost.example:3128"),
    ],
)
def test_a_proxy_on_the_hosts_loopback_is_elsewhere_for_the_guest(value: str, seen: str) -> None:
    assert proxies({"https_proxy": value, "OTHER": "x", "http_proxy": ""}) == {"https_proxy": seen}


def test_no_proxy_is_left_alone() -> None:
    assert proxies({"no_proxy": "localhost,127.0.0.1"}) == {"no_proxy": "localhost,127.0.0.1"}
