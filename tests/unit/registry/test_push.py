"""A push: what is sent and what is not, who is told the login, and lines that break."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.machine.registry import make_authority
from tests.unit.guest.fakes import CountingMeter
from tests.unit.registry.server import FakeRegistry
from vmbuild.errors import DeliveryError
from vmbuild.registry import push, transport
from vmbuild.registry.logins import Login
from vmbuild.registry.push import Part, Repository, Target
from vmbuild.registry.transport import Transport, connected, is_loopback
from vmbuild.trust import trust_also

LOGIN = Login("me", "pw")
SIZE = 3_000_000


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRegistry]:
    monkeypatch.setattr(transport, "BACKOFF_S", 0.001)
    monkeypatch.setattr(push, "BACKOFF_S", 0.001)
    with FakeRegistry().serving() as made:
        yield made


@pytest.fixture
def blob(tmp_path: Path) -> tuple[Part, Path]:
    data = random.Random(1).randbytes(SIZE)
    (tmp_path / "blob").write_bytes(data)
    return Part(hashlib.sha256(data).hexdigest(), SIZE), tmp_path / "blob"


def upload(registry: FakeRegistry, blob: tuple[Part, Path], login: Login | None = None, *beside: str) -> int:
    """Push a blob and return how much of it the meter saw."""
    meter = CountingMeter()
    with connected(registry.host, login, insecure=False) as connection:
        Repository(connection, "team/app", beside).upload(*blob, meter)
    return meter.total


def has(registry: FakeRegistry, blob: tuple[Part, Path]) -> bool:
    return registry.blobs.get(f"sha256:{blob[0].digest}") == blob[1].read_bytes()


def test_a_blob_is_sent_in_one_piece(registry: FakeRegistry, blob: tuple[Part, Path]) -> None:
    assert upload(registry, blob) == SIZE
    assert has(registry, blob)
    assert [line.split("?")[0] for line in registry.asked] == [
        "POST /v2/team/app/blobs/uploads/",
        "PATCH /v2/team/app/blobs/uploads/0",
        "PUT /v2/team/app/blobs/uploads/0",
    ]


def test_what_the_registry_has_is_not_missing(registry: FakeRegistry, blob: tuple[Part, Path]) -> None:
    upload(registry, blob)
    other = Part("0" * 64, 5)
    with connected(registry.host, None, insecure=False) as connection:
        assert Repository(connection, "team/app").missing([blob[0], other]) == [other]
        assert Repository(connection, "other").missing([blob[0]]) == [blob[0]]


def test_what_lies_beside_is_taken_from_there(registry: FakeRegistry, blob: tuple[Part, Path]) -> None:
    upload(registry, blob)
    with connected(registry.host, None, insecure=False) as connection:
        other = Repository(connection, "team/other", ["team/app"])
        assert other.upload(*blob, CountingMeter()) == 0
        assert other.missing([blob[0]]) == []


def test_an_upload_that_breaks_goes_on_where_it_was(registry: FakeRegistry, blob: tuple[Part, Path]) -> None:
    registry.breaks = [1_000_000, 1_000_000]
    assert upload(registry, blob) == SIZE
    assert has(registry, blob)
    assert [line.split()[0] for line in registry.asked] == ["POST", "PATCH", "GET", "PATCH", "GET", "PATCH", "PUT"]


def test_a_line_that_always_breaks_is_given_up(registry: FakeRegistry, blob: tuple[Part, Path]) -> None:
    registry.breaks = [0] * 50
    with pytest.raises(DeliveryError, match="did not take the container image"):
        upload(registry, blob)
    assert len(registry.breaks) == 50 - transport.TRIES


def test_a_layer_that_is_too_large_is_sent_in_parts(
    registry: FakeRegistry, blob: tuple[Part, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push, "PART_BYTES", 1_000_001)
    registry.most = 1_000_001
    assert upload(registry, blob) == SIZE
    assert has(registry, blob)
    assert len([line for line in registry.asked if line.startswith("PATCH")]) == 4
    registry.most = 1000
    with pytest.raises(DeliveryError):
        upload(registry, blob)


@pytest.mark.parametrize("auth", ["basic", "bearer"])
def test_a_login_is_used_when_it_is_asked_for(registry: FakeRegistry, blob: tuple[Part, Path], auth: str) -> None:
    registry.auth = auth
    assert upload(registry, blob, LOGIN) == SIZE
    assert has(registry, blob)
    assert registry.authorizations[0] == ""
    if auth == "bearer":
        assert registry.tokens == [("Basic bWU6cHc=", {"service": ["reg"], "scope": ["repository:team/app:pull,push"]})]
        assert registry.authorizations[-1] == "Bearer good"


def test_an_identity_token_is_exchanged(registry: FakeRegistry, blob: tuple[Part, Path]) -> None:
    registry.auth = "bearer"
    upload(registry, blob, Login("", "", "long-lived"))
    ((header, form),) = registry.tokens
    assert header == ""
    assert (form["grant_type"], form["refresh_token"]) == (["refresh_token"], ["long-lived"])


def test_who_may_not_push_is_told_before_the_build(registry: FakeRegistry) -> None:
    registry.auth = "basic"
    with connected(registry.host, None, insecure=False) as connection, pytest.raises(DeliveryError) as caught:
        Repository(connection, "team/app").check()
    assert "does not let you push" in caught.value.brief
    assert f"docker login {registry.host}" in caught.value.resolution
    registry.auth = "none"
    with connected(registry.host, None, insecure=False) as connection:
        Repository(connection, "team/app").check()
    assert [line.split()[0] for line in registry.asked[-2:]] == ["POST", "DELETE"]
    registry.statuses = [403]
    with connected(registry.host, LOGIN, insecure=False) as connection, pytest.raises(DeliveryError, match="let you"):
        Repository(connection, "team/app").check()


def test_no_login_goes_to_where_a_registry_sends_its_layers(registry: FakeRegistry, blob: tuple[Part, Path]) -> None:
    registry.auth = "basic"
    with FakeRegistry().serving() as other:
        registry.elsewhere = other.elsewhere = f"http://localhost:{other.port}"
        other.uploads["0"] = bytearray()
        upload(registry, blob, LOGIN)
    assert has(other, blob)
    assert set(other.authorizations) == {""}


@pytest.fixture
def private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRegistry]:
    """A registry whose authority is `ca.pem`, on what counts as another host."""
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "https_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(transport, "is_loopback", lambda _: False)
    make_authority(tmp_path)
    with FakeRegistry().serving(tmp_path / "server.pem") as made:
        yield made
    trust_also("")


def test_an_authority_of_the_settings_is_trusted(private: FakeRegistry, tmp_path: Path) -> None:
    def push() -> None:
        with connected(private.host, None, insecure=False) as connection:
            Repository(connection, "a").put_manifest("1", "m", b"{}")

    with pytest.raises(DeliveryError, match="not take") as caught:
        push()
    assert "no TLS connection came about" in caught.value.details
    assert private.asked == []
    trust_also((tmp_path / "ca.pem").read_text())
    push()
    assert private.manifests == {("a", "1"): ("m", b"{}")}


def test_another_authority_is_not_enough(private: FakeRegistry, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    trust_also(make_authority(tmp_path / "other").read_text())
    with connected(private.host, None, insecure=False) as connection, pytest.raises(DeliveryError, match="not take"):
        Repository(connection, "a").check()


def test_netrc_is_not_asked(registry: FakeRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login other password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with connected(registry.host, None, insecure=False) as connection:
        Repository(connection, "a").check()
    assert set(registry.authorizations) == {""}


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_registry_that_is_busy_is_asked_again(registry: FakeRegistry, status: int) -> None:
    registry.statuses = [status] * (transport.TRIES - 1)
    with connected(registry.host, None, insecure=False) as connection:
        Repository(connection, "a").put_manifest("1", "m", b"{}")
    assert registry.manifests == {("a", "1"): ("m", b"{}")}
    registry.statuses = [status] * transport.TRIES
    with connected(registry.host, None, insecure=False) as connection, pytest.raises(DeliveryError, match="not take"):
        Repository(connection, "a").put_manifest("1", "m", b"{}")


def test_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "BACKOFF_S", 0.001)
    with connected("127.0.0.1:1", None, insecure=False) as connection, pytest.raises(DeliveryError) as caught:
        Repository(connection, "a").check()
    assert "refused" in caught.value.details


@pytest.mark.parametrize(
    ("name", "found"),
    [
        *((name, True) for name in ("localhost", "localhost:5000", "127.0.0.1:5000", "[::1]:5000")),
        ("localhost.example.org", False),
        ("127.0.0.1.example.org", False),
        ("10.0.0.1:5000", False),
        ("docker.io", False),
    ],
)
def test_only_this_host_may_go_without_tls(name: str, found: bool) -> None:
    assert is_loopback(name) is found
    assert Transport(name, None)._loose is found


def test_a_reference_has_three_parts() -> None:
    assert Target.parse("localhost:5000/team/app:1") == Target("localhost:5000", "team/app", "1")
    assert Target.parse("docker.io/library/a:latest").scope == "repository:library/a:pull,push"
