"""Logins as docker keeps them: which of them a build gets, and what a helper is asked."""

from __future__ import annotations

import json
import os
import shutil
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest

from tests.unit.conftest import PROGRAMS
from tests.unit.listener import Listener
from vmbuild import docker_config, logins
from vmbuild.report import SilentReporter

AUTH = {"auth": "dTpw"}


def find(config: dict[str, Any], text: str | None = "") -> dict[str, Any]:
    return logins.find(config, text, SilentReporter())


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on PATH with the helper `fake`; `asked` in it is what it was asked."""
    shutil.copy(PROGRAMS / "docker-credential-fake", tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "logins.json").write_text(
        json.dumps({"reg.example": ["u", "pä:ss"], "other.example": ["o", "o"], "token.example": ["<token>", "t0k"]})
    )
    return tmp_path


def asked(folder: Path) -> list[str]:
    path = folder / "asked"
    return path.read_text().splitlines() if path.exists() else []


def test_only_who_is_named_is_meant_and_docker_hub() -> None:
    hosts = ("https://index.docker.io/v1/", "reg.example", "reg.example:5000", "https://v2.example/v2/", "un.example")
    config = {"auths": dict.fromkeys(hosts, AUTH)}
    text = "FROM reg.example:5000/x\nARG R=v2.example"
    assert list(find(config, text)) == ["https://index.docker.io/v1/", "reg.example:5000", "https://v2.example/v2/"]


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("FROM reg.example/x", True),
        ("docker-image://reg.example/x", True),
        ("type=registry,ref=reg.example/c:1,mode=max", True),
        ("reg.example", True),
        ("FROM a.reg.example/x", False),
        ("FROM reg.example.org/x", False),
        ("FROM reg.example:5000/x", False),
        ("FROM reg-example/x", False),
    ],
)
def test_a_host_is_a_whole_word(text: str, meant: bool) -> None:
    assert logins.is_meant("reg.example", text) is meant


def test_where_nobody_can_know_all_that_are_named_are_meant(helper: Path) -> None:
    found = find({"auths": {"a.example": AUTH, "reg.example": {}}, "credsStore": "fake"}, None)
    assert set(found) == {"a.example", "reg.example"}
    assert asked(helper) == ["get a.example", "get reg.example"]  # what the store alone knows is not asked for


def test_every_kind_of_login_is_taken_and_nothing_else() -> None:
    stored = {"auth": "dTpw", "identitytoken": "i", "registrytoken": "r", "email": "e@x", "other": "y", "username": ""}
    found = find({"auths": {"docker.io": stored, "x": "nonsense", "y": {}}}, "x y")
    assert found == {"docker.io": {"auth": "dTpw", "identitytoken": "i", "registrytoken": "r"}}


def test_a_store_is_asked_for_what_is_meant_alone(helper: Path) -> None:
    found = find({"credsStore": "fake"}, "FROM reg.example/x AS a\nFROM token.example/y")
    assert found == {
        "reg.example": {"auth": b64encode("u:pä:ss".encode()).decode()},
        "token.example": {"identitytoken": "t0k"},
    }
    assert asked(helper) == ["list ", "get reg.example", "get token.example"]


def test_a_helper_of_one_registry(helper: Path) -> None:
    found = find(
        {"credHelpers": {"reg.example": "fake", "un.example": "fake"}, "auths": {"reg.example": AUTH}},
        "reg.example un.example",
    )
    assert list(found) == ["reg.example"]
    assert found["reg.example"] != AUTH
    assert "list " not in asked(helper)


def test_what_a_helper_has_not_may_stand_in_the_file(helper: Path) -> None:
    assert find({"credsStore": "fake", "auths": {"un.example": AUTH}}, "un.example") == {"un.example": AUTH}


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (None, "docker-credential-bad is not installed"),
        ("echo s3cret; exit 3", "docker-credential-bad failed with exit code 3"),
        ("echo s3cret", "answered with nonsense"),
        ("echo '[1]'", ""),
    ],
)
def test_a_helper_that_fails_costs_a_warning_that_tells_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str | None, words: str
) -> None:
    if program is not None:
        path = tmp_path / "docker-credential-bad"
        path.write_text(f"#!/bin/sh\n{program}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    listener = Listener()
    assert logins.find({"credHelpers": {"reg.example": "bad"}}, "reg.example", listener) == {}
    assert words in "".join(listener.warnings)
    assert "s3cret" not in "".join(listener.warnings)


@pytest.mark.parametrize("name", ["../evil", "a/b", "", "-x", "a b"])
def test_a_helper_has_a_plain_name(name: str) -> None:
    listener = Listener()
    assert logins.find({"credHelpers": {"reg.example": name or "/"}}, "reg.example", listener) == {}
    assert "cannot be the name" in "".join(listener.warnings)


@pytest.mark.parametrize(
    ("key", "host"),
    [
        ("https://index.docker.io/v1/", "docker.io"),
        ("registry-1.docker.io", "docker.io"),
        ("docker.io", "docker.io"),
        ("https://reg.example:5000/v2/", "reg.example:5000"),
        ("localhost:5000", "localhost:5000"),
    ],
)
def test_a_key_means_a_host(key: str, host: str) -> None:
    assert logins.host_of(key) == host


def test_the_configuration_is_where_docker_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert docker_config.config_folder({}) == tmp_path / ".docker"
    assert docker_config.config_folder({"DOCKER_CONFIG": "/x"}) == Path("/x")
    assert logins.read_config(tmp_path / "none", SilentReporter()) == {}


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]"])
def test_a_configuration_of_nonsense_stops_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    assert logins.read_config(tmp_path, SilentReporter()) == {}
    assert find({"auths": [], "credHelpers": 3, "credsStore": None}, "x") == {}
