"""Whose login a push uses: Docker's file, its credential helpers, and nothing said of either."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vmbuild.errors import HostError
from vmbuild.registry.logins import Login, find_login

HELPER = """#!/bin/sh
read -r key
echo "$0 $1 $key" >>"{log}"
case $key in
broken) echo "it is locked, secret=hunter2" >&2; exit 1 ;;
odd) echo '[1]' ;;
token) echo '{{"ServerURL":"x","Username":"<token>","Secret":"tok"}}' ;;
*known*) echo '{{"ServerURL":"x","Username":"helped","Secret":"pw"}}' ;;
*) echo "credentials not found in native keychain"; exit 1 ;;
esac
"""


def auth(text: str) -> dict[str, str]:
    return {"auth": base64.b64encode(text.encode()).decode()}


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a credential helper named `fake` writes what it was asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "docker-credential-fake"
    program.write_text(HELPER.format(log=tmp_path / "log"))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return tmp_path / "log"


@pytest.fixture
def find(tmp_path: Path) -> Callable[..., Login | None]:
    def do(registry: str, config: Any) -> Login | None:
        (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        return find_login(registry, {"DOCKER_CONFIG": str(tmp_path)})

    return do


@pytest.mark.parametrize(
    ("registry", "key"),
    [
        ("r.io", "r.io"),
        ("r.io", "https://r.io"),
        ("r.io:5000", "https://r.io:5000/v2/"),
        ("docker.io", "https://index.docker.io/v1/"),
    ],
)
def test_a_login_in_the_file(find: Callable[..., Login | None], registry: str, key: str) -> None:
    assert find(registry, {"auths": {"other.io": auth("a:b"), key: auth("me:p:w")}}) == Login("me", "p:w")
    assert find("else.io", {"auths": {key: auth("me:pw")}}) is None


def test_other_forms_of_it(find: Callable[..., Login | None]) -> None:
    assert find("r.io", {"auths": {"r.io": {"username": "me", "password": "pw"}}}) == Login("me", "pw")
    assert find("r.io", {"auths": {"r.io": {"identitytoken": "t"}}}) == Login("", "", "t")
    nothings: list[Any] = [{}, {"auths": {"r.io": {}}}, {"auths": []}, {"auths": {"r.io": {"auth": "%"}}}, "[]"]
    for nothing in nothings:
        assert find("r.io", nothing) is None


def test_the_file_is_where_docker_has_it(tmp_path: Path) -> None:
    (tmp_path / ".docker").mkdir()
    (tmp_path / ".docker" / "config.json").write_text(json.dumps({"auths": {"r.io": auth("me:pw")}}))
    assert find_login("r.io", {"HOME": str(tmp_path)}) == Login("me", "pw")
    assert find_login("r.io", {"HOME": str(tmp_path / "none")}) is None


def test_a_helper_is_asked(find: Callable[..., Login | None], log: Path) -> None:
    assert find("known.io", {"credsStore": "fake"}) == Login("helped", "pw")
    assert find("known.io", {"credHelpers": {"known.io": "fake"}, "credsStore": "none"}) == Login("helped", "pw")
    assert find("token", {"credHelpers": {"token": "fake"}}) == Login("", "", "tok")
    assert [line.split()[1:] for line in log.read_text().splitlines()] == [["get", "known.io"]] * 2 + [["get", "token"]]


def test_a_store_that_has_none_leaves_it_to_the_file(find: Callable[..., Login | None], log: Path) -> None:
    assert find("r.io", {"credsStore": "fake", "auths": {"r.io": auth("me:pw")}}) == Login("me", "pw")
    assert find("r.io", {"credsStore": "fake", "auths": {"r.io": {}}}) is None


@pytest.mark.parametrize("key", ["broken", "odd"])
def test_a_helper_that_fails_is_said_without_its_words(find: Callable[..., Login | None], log: Path, key: str) -> None:
    with pytest.raises(HostError) as caught:
        find(key, {"credHelpers": {key: "fake"}})
    error = caught.value
    assert "docker-credential-fake" in error.brief
    assert "hunter2" not in f"{error.brief}{error.details}{error.resolution}"
    assert error.__suppress_context__


@pytest.mark.parametrize("name", ["../evil", "a b", "-x", ""])
def test_a_helper_is_a_name(find: Callable[..., Login | None], name: str) -> None:
    with pytest.raises(HostError):
        find("r.io", {"credHelpers": {"r.io": name}})


def test_a_file_that_cannot_be_read_is_said(find: Callable[..., Login | None]) -> None:
    with pytest.raises(HostError, match="cannot read"):
        find("r.io", "{")


def test_a_login_does_not_show_itself() -> None:
    assert "secret" not in repr(Login("secret", "secret", "secret"))
