"""The authorities of a host: found where administrators put them, and nothing else travels."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from tests.machine.registry import make_authority
from vmbuild.authorities import find
from vmbuild.errors import UsageError


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A folder with a CA's certificate `ca.pem`, a server's, and its private key."""
    folder = tmp_path / "Corp"
    folder.mkdir()
    make_authority(folder)
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    "place",
    [
        "usr/local/share/ca-certificates/corp.crt",
        "usr/local/share/ca-certificates/deeper/corp.crt",
        "etc/pki/ca-trust/source/anchors/corp.pem",
        "etc/ca-certificates/trust-source/anchors/corp.CRT",
        "etc/pki/trust/anchors/corp.pem",
    ],
)
def test_what_an_administrator_added_is_found(made: Path, root: Path, place: str) -> None:
    pem = (made / "ca.pem").read_text()
    put(root / place, pem)
    (found,) = find(["auto"], {}, root=root)
    assert (found.name, found.pem) == ("Test CA Corp", pem)


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NODE_EXTRA_CA_CERTS"])
def test_what_programs_are_told_of_is_found(made: Path, root: Path, variable: str) -> None:
    assert [each.name for each in find(["auto"], {variable: str(made / "ca.pem")}, root=root)] == ["Test CA Corp"]


def test_each_is_there_once_and_the_public_ones_are_not(made: Path, root: Path, tmp_path: Path) -> None:
    other = tmp_path / "Public"
    other.mkdir()
    public = make_authority(other)
    packaged = make_authority(put(tmp_path / "Packaged" / "x", "").parent).read_bytes()
    put(root / "usr/share/ca-certificates/mozilla/p.crt", packaged)
    bundle = put(tmp_path / "bundle.pem", (made / "ca.pem").read_bytes() + public.read_bytes() + packaged)
    put(root / "usr/local/share/ca-certificates/corp.crt", (made / "ca.pem").read_bytes())
    found = find(["auto"], {"SSL_CERT_FILE": str(bundle)}, [public], root)
    assert [each.name for each in found] == ["Test CA Corp"]


def test_a_private_key_stays_where_it_is(made: Path, root: Path) -> None:
    both = put(made / "both.pem", (made / "server.key").read_bytes() + (made / "ca.pem").read_bytes() + b"a secret\n")
    for found in (find([str(both)], {}, root=root), find(["auto"], {"SSL_CERT_FILE": str(both)}, root=root)):
        (only,) = found
        assert only.pem == (made / "ca.pem").read_text()
    (only,) = find([str(both)], {}, root=root)
    assert "PRIVATE" not in only.pem
    assert "secret" not in only.pem


def test_a_der_file_becomes_pem(made: Path, root: Path) -> None:
    pem = (made / "ca.pem").read_text()
    der = put(root / "usr/local/share/ca-certificates/corp.crt", ssl.PEM_cert_to_DER_cert(pem))
    assert [each.pem for each in find(["auto"], {}, root=root)] == [pem]
    assert [each.pem for each in find([str(der)], {}, root=root)] == [pem]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x30\x82 no certificate",
        b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        b"-----BEGIN CERTIFICATE-----\n!!!!\n-----END CERTIFICATE-----\n",
        b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
    ],
)
def test_nonsense_is_passed_over_but_not_when_it_was_named(root: Path, content: bytes) -> None:
    place = put(root / "usr/local/share/ca-certificates/x.crt", content)
    assert find(["auto"], {"SSL_CERT_FILE": str(place)}, root=root) == []
    with pytest.raises(UsageError, match="holds no certificate"):
        find([str(place)], {}, root=root)


def test_a_file_that_is_not_there_is_told_when_it_was_named(root: Path) -> None:
    assert find(["auto"], {"SSL_CERT_FILE": str(root / "none")}, root=root) == []
    with pytest.raises(UsageError, match="No such file"):
        find([str(root / "none")], {}, root=root)


@pytest.mark.parametrize("choice", [[], ["off"]])
def test_off_is_off(made: Path, root: Path, choice: list[str]) -> None:
    assert find(choice, {"SSL_CERT_FILE": str(made / "ca.pem")}, root=root) == []


def test_files_may_come_beside_what_is_found(made: Path, root: Path) -> None:
    found = find(["auto", str(made / "server.pem")], {"SSL_CERT_FILE": str(made / "ca.pem")}, root=root)
    assert [each.name for each in found] == ["Test CA Corp", "localhost"]
