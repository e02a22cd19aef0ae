"""What is passed on: found, said without secrets, and for a build only what it names."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.machine.registry import make_authority
from tests.unit.guest.fakes import FakeSession
from tests.unit.listener import Listener
from vmbuild import authorities, passing
from vmbuild.guest import passed
from vmbuild.guest.context import Context
from vmbuild.guest.passed import Outcome, Passed
from vmbuild.model import BuildRequest, MachineRequest, PassOn

ALL = PassOn(proxy=True, authorities=("auto",), logins=True)
REQUEST = MachineRequest("box", 2, 2048, 1 << 30, "debian-13-arm64", pass_on=ALL)
NAMES = (
    *("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"),
    *("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NODE_EXTRA_CA_CERTS"),
)


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host that has nothing to pass on; returns where docker's configuration may be put."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(authorities, "FOLDERS", ())
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    (tmp_path / "docker").mkdir()
    return tmp_path / "docker" / "config.json"


@pytest.fixture
def wanted(monkeypatch: pytest.MonkeyPatch) -> list[Passed]:
    """What guests were asked to have; they all have port 22 for themselves, and took the proxies at their start."""
    found: list[Passed] = []

    def take(_: object, asked: Passed, *, is_new: bool) -> Outcome:
        found.append(asked)
        return Outcome(bool(asked.proxies), tuple({22} & asked.ports))

    monkeypatch.setattr(passed, "apply", take)
    return found


def tell(request: MachineRequest, listener: Listener) -> None:
    """Let a guest have what is passed on."""
    passing.to_guest(FakeSession(), request, listener, is_new=True)


def source(text: str) -> Context:
    return Context(Path("/none"), None, text.encode())


def test_nothing_is_nothing_to_say(wanted: list[Passed]) -> None:
    listener = Listener()
    tell(REQUEST, listener)
    assert wanted == [Passed()]
    assert listener.heard == []


def test_all_is_said_in_one_line_without_a_password(
    wanted: list[Passed], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("https_proxy", "http://me:s3cret@127.0.0.1:3128")
    monkeypatch.setenv("no_proxy", "localhost,corp.example")
    (tmp_path / "Corp").mkdir()
    choice = PassOn(
        proxy=True,
        authorities=(str(make_authority(tmp_path / "Corp")),),
        registry_mirrors=("http://localhost:5000", "https://m.example"),
        insecure_registries=("127.0.0.1:5001", "r.example"),
        host_ports=(22,),
    )
    listener = Listener()
    tell(replace(REQUEST, pass_on=choice), listener)
    assert listener.heard == [
        "Passing on to the guest: proxy http://10.0.2.2:3128; 1 CA certificate (Test CA Corp); "
        "registry mirror http://localhost:5000, https://m.example; insecure registry 127.0.0.1:5001, r.example; "
        "the host's localhost:22, 5000, 5001",
        "warning: Docker in the machine box is in use, and began with other proxies or certificates: "
        "it takes these when nothing runs in it, or after `vmbuild down box`",
        "warning: localhost:22 is the guest's own: something in it listens there",
    ]
    assert wanted[0].proxies["https_proxy"] == "http://me:s3cret@10.0.2.2:3128"
    assert wanted[0].authorities == (tmp_path / "Corp" / "ca.pem").read_text()
    assert wanted[0].ports == {22, 5000, 5001}


def test_off_is_off(wanted: list[Passed], environment: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("http_proxy", "http://p.example:1")
    monkeypatch.setenv("SSL_CERT_FILE", str(make_authority(tmp_path)))
    environment.write_text(json.dumps({"auths": {"docker.io": {"auth": "x"}}, "proxies": {"default": {"a": "b"}}}))
    off = replace(REQUEST, pass_on=PassOn())
    tell(off, Listener())
    assert wanted == [Passed()]
    assert passing.client_config(off, BuildRequest("."), source(""), Listener()) is None


@pytest.mark.parametrize(
    ("dockerfile", "ports"),
    [
        ("FROM localhost:5000/x", (5000,)),
        ("  from --platform=linux/arm64 127.0.0.1:5000/x AS y", (5000,)),
        ("# syntax=localhost:5000/dockerfile:1\nFROM scratch", (5000,)),
        ("ARG R=localhost:5000\nFROM $R/x", (5000,)),
        ("COPY --from=localhost:5000/x /a /b\nRUN --mount=type=bind,from=127.0.0.1:5001/x true", (5000, 5001)),
        ("HEALTHCHECK CMD curl localhost:8080/\nRUN curl http://localhost:8081/\nENV A=localhost:8082", ()),
        ("ARG URL=http://localhost:8081/x", ()),
        ("FROM localhost:99999/x\nFROM localhost:0/x\nFROM localhost/x\nFROM notlocalhost:5000/x", ()),
        ("FROM my.localhost:5000/x", ()),
    ],
)
def test_registries_on_localhost_that_a_dockerfile_names_are_the_hosts(dockerfile: str, ports: tuple[int, ...]) -> None:
    assert passing.for_build(REQUEST, BuildRequest("."), source(dockerfile)).pass_on.host_ports == ports


@dataclass(frozen=True)
class More:
    """What a request may have in it besides: values of their own."""

    caches: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class LargerRequest(BuildRequest):
    more: More = More()


def test_and_those_that_the_command_names() -> None:
    asked = LargerRequest(
        "http://localhost:8000/x.git",
        tags=("localhost:5001/x:1",),
        build_args=("REGISTRY=localhost:5002", "http_proxy=http://localhost:3128"),
        labels=("at=localhost:8081/",),
        more=More((("type=registry,ref=127.0.0.1:5003/c", "docker-image://localhost:5004/y"),)),
    )
    assert passing.for_build(REQUEST, asked, source("")).pass_on.host_ports == (5001, 5002, 5003, 5004)


def test_a_dockerfile_in_the_context_is_read_there(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_bytes(b"# \xff\nFROM localhost:5000/x\n")
    found = passing.for_build(REQUEST, BuildRequest(str(tmp_path)), Context(tmp_path, "Dockerfile"))
    assert found.pass_on.host_ports == (5000,)


def test_a_dockerfile_that_nobody_has_seen_leaves_what_the_command_names() -> None:
    asked = BuildRequest("-", tags=("localhost:5000/x",))
    assert passing.for_build(REQUEST, asked, None).pass_on.host_ports == (5000,)


def config(asked: BuildRequest, dockerfile: str = "", listener: Listener | None = None, **choice: Any) -> Any:
    request = replace(REQUEST, pass_on=replace(ALL, **choice))
    made = passing.client_config(request, asked, source(dockerfile), listener or Listener())
    return None if made is None else (json.loads(made.content), made.has_logins)


def test_steps_get_the_hosts_proxies_as_the_guest_sees_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://localhost:3128")
    monkeypatch.setenv("NO_PROXY", "corp.example")
    proxies = {"httpProxy": "http://10.0.2.2:3128", "noProxy": "corp.example"}
    assert config(BuildRequest(".")) == ({"proxies": {"default": proxies}, "auths": {}}, False)
    assert config(BuildRequest("."), proxy=False) is None


def test_what_docker_was_told_of_proxies_comes_first(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://a:1")
    monkeypatch.setenv("https_proxy", "http://a:1")
    environment.write_text(
        json.dumps({"proxies": {"default": {"httpProxy": "http://[::1]:2", "ftpProxy": "http://f"}}})
    )
    (found, _) = config(BuildRequest("."))
    assert found["proxies"]["default"] == {
        "httpProxy": "http://10.0.2.2:2",
        "httpsProxy": "http://a:1",
        "ftpProxy": "http://f",
    }


@pytest.mark.parametrize("told", [[], {"default": 3}, "x"])
def test_nonsense_of_proxies_is_nothing(environment: Path, told: object) -> None:
    environment.write_text(json.dumps({"proxies": told}))
    assert config(BuildRequest(".")) is None


def test_logins_are_said_by_their_registries_alone(environment: Path) -> None:
    auths = {
        "https://index.docker.io/v1/": {"auth": "c2VjcmV0"},
        "a.example": {"auth": "x"},
        "b.example": {"auth": "y"},
    }
    environment.write_text(json.dumps({"auths": auths}))
    listener = Listener()
    found, has_logins = config(BuildRequest(".", tags=("a.example/x",)), "FROM c.example/x", listener)
    assert has_logins
    assert set(found["auths"]) == {"https://index.docker.io/v1/", "a.example"}
    assert listener.heard == ["Logged in for this build: a.example, docker.io"]
    assert config(BuildRequest("."), logins=False) is None


def test_a_build_that_may_be_carried_away_does_without(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment.write_text(json.dumps({"auths": {"docker.io": {"auth": "c2VjcmV0"}}}))
    listener = Listener()
    assert config(BuildRequest("."), "", listener, carried=True) is None
    (warning,) = listener.warnings
    assert "does without your login to docker.io" in warning
    monkeypatch.setenv("http_proxy", "http://me:s3cret@p:1")
    listener = Listener()
    config(BuildRequest("."), "", listener, carried=True)
    assert any("the proxy's password" in each for each in listener.warnings)
    assert "s3cret" not in "".join(listener.warnings)
