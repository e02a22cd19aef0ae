"""The options of a build that say what it is given: what becomes of them, and what is refused at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from vmbuild import build, carry, follow, record
from vmbuild.cli.program import run
from vmbuild.cli.ways_in import NAMES, OPTIONS
from vmbuild.guard import Guard
from vmbuild.inputs import Cache, Inputs, NamedContext, Secret, SshSource
from vmbuild.machine.files import MachineFiles
from vmbuild.model import BuildRequest, BuildResult, Home
from vmbuild.record import BuildRecord


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for key in ("CACHE", "STATE"):
        monkeypatch.setenv(f"VMBUILD_{key}_DIR", str(tmp_path / key.lower()))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("content")
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Inputs]:
    """Run a build with these options and return what it was given."""
    seen: list[Inputs] = []

    def fake(_: object, asked: BuildRequest, *args: object, **streams: object) -> BuildResult:
        seen.append(asked.inputs)
        return BuildResult("sha256:abc", (), None, 0, 0, 1.0)

    monkeypatch.setattr(build, "build", fake)

    def do(*argv: str) -> Inputs:
        assert run(["build", *argv]) == 0
        return seen[-1]

    return do


def test_every_option_is_taken() -> None:
    def command() -> None: ...

    for option in OPTIONS:
        option(command)
    names = {parameter.name for parameter in command.__click_params__}  # type: ignore[attr-defined]
    assert names == set(NAMES)


def test_nothing_is_given_by_itself(given: Callable[..., Inputs]) -> None:
    assert given() == Inputs()


def test_what_is_given(given: Callable[..., Inputs], monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("TOKEN", "t")
    found = given(
        *("--secret", "id=a,src=file", "--secret", "id=TOKEN", "--ssh", "default=file"),
        *("--build-context", "x=folder", "--build-context", "y=docker-image://z"),
        *("--cache-from", "z", "--cache-to", "type=inline"),
    )
    assert found.secrets == (Secret("a", b"content"), Secret("TOKEN", b"t"))
    assert found.ssh == (SshSource("default", (str(home / "file"),)),)
    assert found.contexts == (NamedContext("x", "folder"), NamedContext("y", None, "docker-image://z"))
    assert found.cache_from == (Cache((("type", "registry"), ("ref", "z"))),)
    assert found.cache_to == (Cache((("type", "inline"),)),)


def test_the_last_context_by_a_name_is_meant(given: Callable[..., Inputs]) -> None:
    found = given("--build-context", "x=folder", "--build-context", "x=target:y")
    assert found.contexts == (NamedContext("x", None, "target:y"),)


def test_the_rest_is_passed_on(given: Callable[..., Inputs]) -> None:
    found = given(
        *("--no-cache-filter", "one", "--add-host", "a:1.1.1.1,b=2.2.2.2", "--network", "none", "--shm-size", "128m"),
        *("--ulimit", "nofile=1:2", "--cgroup-parent", "/x", "--allow", "network.host", "--annotation", "a=b"),
    )
    assert found.options == (
        *("--no-cache-filter", "one", "--add-host", "a:1.1.1.1", "--add-host", "b:2.2.2.2", "--ulimit", "nofile=1:2"),
        *("--allow", "network.host", "--annotation", "a=b"),
        *("--network", "none", "--shm-size", "134217728", "--cgroup-parent", "/x"),
    )


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (("--secret", "id=x,src=none"), "cannot read the secret x"),
        (("--secret", "id=x,src=file", "--secret", "id=x,env=y"), "more than once"),
        (("--ssh", "a=file", "--ssh", "a=file"), "more than once"),
        (("--build-context", "x=none"), "not a folder"),
        (("--cache-to", "type=local,dest=file"), "cannot write a cache"),
        (("--network", "bridge"), "choose default or none or host"),
        (("--allow", "everything"), "choose network.host or security.insecure"),
        (("--shm-size", "much"), "size for --shm-size"),
        (("--ulimit", "files=1"), "--ulimit files=1"),
        (("--add-host", "x"), "HOST:ADDRESS"),
        (("--annotation", "x"), "KEY=VALUE"),
        (("--secret", "id=x,src=file", "--time-limit", "1h", "--suspend-to", "b"), "not carried to another host"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_makes_no_sense_costs_no_machine(
    argv: tuple[str, ...], why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "build", lambda *_, **__: pytest.fail("a build began"))
    assert run(["build", *argv]) == 2
    assert why in " ".join(capsys.readouterr().err.split())


def test_a_build_with_secrets_may_be_suspended_here(given: Callable[..., Inputs]) -> None:
    assert given("--secret", "id=x,src=file", "--time-limit", "1h").secrets


def test_a_build_that_is_followed_anew_is_looked_at_for_secrets_too(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = BuildRecord("/w/a", (), (), None, None, False, str(home), 0, 1.0, 1.0)
    builds = MachineFiles.at(home / "state", "default").builds
    builds.mkdir(parents=True)
    monkeypatch.setattr(follow, "attach", lambda *_, watch, **__: isinstance(watch, Guard) and None)
    argv = ["attach", "--time-limit", "1h", "--suspend-to", "b"]
    record.save(builds, plain)
    assert not carry.holds_secrets("default", Home(home / "cache", home / "state"))
    assert run(argv) == 0
    record.save(builds, replace(plain, has_secrets=True))
    assert run(argv) == 2
    assert "not carried to another host" in " ".join(capsys.readouterr().err.split())
    assert run([*argv, "--with-secrets"]) == 0
    assert run(argv[:3]) == 0
