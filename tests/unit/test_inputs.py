"""What a build is given: read as buildx reads it, and refused before anything is started."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmbuild import inputs
from vmbuild.address import HOST
from vmbuild.errors import UsageError
from vmbuild.inputs import Cache, NamedContext, Secret, SshSource


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[str]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("agent.sock")
        yield str(tmp_path / "agent.sock")


ENVIRONMENT = {"TOKEN": "from-env", "BOTH": "env"}


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("id=x,src=file", b"from-file"),
        ("id=x,source=file", b"from-file"),
        ("type=file,id=x,src=file", b"from-file"),
        ("id=x,env=TOKEN", b"from-env"),
        ("id=x,type=env,src=TOKEN", b"from-env"),
        ("id=TOKEN", b"from-env"),
        ("id=TOKEN,type=env", b"from-env"),
        ("id=BOTH", b"env"),
        ("id=BOTH,type=file", b"file-named-both"),
        ("id=file", b"from-file"),
        ('id=x,"src=with,comma"', b"odd"),
        ("id=x,env=NOT_THERE", b""),
    ],
)
def test_a_secret_is_read_from_where_buildx_would(in_folder: Path, text: str, content: bytes) -> None:
    (in_folder / "file").write_bytes(b"from-file")
    (in_folder / "with,comma").write_bytes(b"odd")
    (in_folder / "BOTH").write_bytes(b"file-named-both")
    assert inputs.read_secret(text, ENVIRONMENT).content == content


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("src=file", "no id"),
        ("id=x", "cannot read the secret x"),
        ("id=x,src=nowhere", "nowhere"),
        ("id=x,sorce=file", "sorce"),
        ("id=x,type=magic", "file or env, not magic"),
        ("x", "KEY=VALUE"),
        ('id=x,"src=file', "unexpected end"),
        ("id=x,src=large", "500 KiB"),
    ],
)
def test_a_secret_that_makes_no_sense_is_refused(in_folder: Path, text: str, why: str) -> None:
    (in_folder / "large").write_bytes(bytes(500 * 1024 + 1))
    with pytest.raises(UsageError) as caught:
        inputs.read_secret(text, {})
    assert why in caught.value.brief


def test_a_secret_does_not_show_itself() -> None:
    shown = repr(inputs.Inputs(secrets=(Secret("x", b"hidden"),)))
    assert "hidden" not in shown
    assert "'x'" in shown


def test_an_agent_or_keys(in_folder: Path, agent: str) -> None:
    (in_folder / "key").touch()
    (in_folder / "other").touch()
    environment = {"SSH_AUTH_SOCK": agent}
    assert inputs.read_ssh("default", environment) == SshSource("default")
    assert inputs.read_ssh("x=", environment) == SshSource("x")
    assert inputs.read_ssh(f"x={agent}", {}) == SshSource("x", (agent,))
    keys = inputs.read_ssh("x=key,other", {})
    assert keys == SshSource("x", (str(in_folder / "key"), str(in_folder / "other")))
    assert inputs.read_ssh(keys.text, {}) == keys


@pytest.mark.parametrize(
    ("text", "environment", "why"),
    [
        ("default", {}, "SSH_AUTH_SOCK does not say where"),
        ("default", {"SSH_AUTH_SOCK": "key"}, "does not name a socket"),
        ("default", {"SSH_AUTH_SOCK": "none"}, "cannot use none"),
        ("x=nowhere", {}, "cannot use"),
        ("x=agent.sock,key", {}, "both together"),
    ],
)
@pytest.mark.usefixtures("agent")
def test_keys_that_are_not_there_are_refused(in_folder: Path, text: str, environment: dict[str, str], why: str) -> None:
    (in_folder / "key").touch()
    with pytest.raises(UsageError) as caught:
        inputs.read_ssh(text, environment)
    assert why in caught.value.brief


@pytest.mark.parametrize(
    ("text", "context"),
    [
        ("src=folder", NamedContext("src", "folder")),
        ("alpine=docker-image://alpine:3", NamedContext("alpine", None, "docker-image://alpine:3")),
        ("base=target:one", NamedContext("base", None, "target:one")),
        ("x=https://example.org/x.git#main", NamedContext("x", None, "https://example.org/x.git#main")),
        ("x=http://127.0.0.1:80/x.tar", NamedContext("x", None, f"http://{HOST}:80/x.tar")),
        ("x=git@localhost:a/b.git", NamedContext("x", None, f"git@{HOST}:a/b.git")),
        ("x=oci-layout://layout:1@sha256:0", NamedContext("x", "layout", "oci-layout://", ":1@sha256:0")),
        ("x=oci-layout://layout", NamedContext("x", "layout", "oci-layout://", "")),
    ],
)
def test_a_context_with_a_name(in_folder: Path, text: str, context: NamedContext) -> None:
    (in_folder / "folder").mkdir()
    (in_folder / "layout").mkdir()
    (in_folder / "layout" / "index.json").touch()
    assert inputs.read_context(text) == context


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("folder", "NAME=VALUE"),
        ("=folder", "NAME=VALUE"),
        ("x=", "NAME=VALUE"),
        ("x y=folder", "no spaces"),
        ("x=nowhere", "not a folder: nowhere"),
        ("x=oci-layout://nowhere:1", "no OCI layout"),
    ],
)
def test_a_context_that_is_not_there_is_refused(text: str, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        inputs.read_context(text)
    assert why in caught.value.brief


def test_caches() -> None:
    assert inputs.read_cache_from("me/app:cache") == Cache((("type", "registry"), ("ref", "me/app:cache")))
    assert inputs.read_cache_from("type=local,src=dir,tag=x") == Cache((("type", "local"), ("tag", "x")), "dir")
    assert inputs.read_cache_to("type=inline") == Cache((("type", "inline"),))
    registry = inputs.read_cache_to("type=registry,ref=host/x,mode=max")
    assert registry == Cache((("type", "registry"), ("ref", "host/x"), ("mode", "max")))
    assert inputs.read_cache_to("type=local,mode=max,dest=new/dir") == Cache(
        (("type", "local"), ("mode", "max")), "new/dir"
    )


@pytest.mark.parametrize(
    ("read", "text", "why"),
    [
        (inputs.read_cache_from, "type=gha", "not gha"),
        (inputs.read_cache_from, "ref=x", "its type is one of"),
        (inputs.read_cache_from, "type=local", "src=FOLDER"),
        (inputs.read_cache_to, "type=local,src=x", "dest=FOLDER"),
        (inputs.read_cache_to, "type=registry", "has a ref"),
        (inputs.read_cache_to, "type=local,dest=file/below", "is no folder"),
        (inputs.read_cache_to, "a,b", "KEY=VALUE"),
    ],
)
def test_a_cache_that_makes_no_sense_is_refused(
    in_folder: Path, read: Callable[[str], Cache], text: str, why: str
) -> None:
    (in_folder / "file").touch()
    with pytest.raises(UsageError) as caught:
        read(text)
    assert why in caught.value.brief


def test_hosts() -> None:
    given = ["a:1.2.3.4,b=::1", "c:host-gateway", "d:[::2]"]
    assert inputs.read_hosts(given) == ["a:1.2.3.4", "b:::1", f"c:{HOST}", "d:[::2]"]
    for wrong in ("a", "a:", ":1.2.3.4"):
        with pytest.raises(UsageError, match="HOST:ADDRESS"):
            inputs.read_hosts([wrong])


def test_limits() -> None:
    for good in ("nofile=1024", "nofile=1024:2048", "core=-1", "core=0:-1"):
        assert inputs.check_ulimit(good) == good
    for wrong in ("nofile", "files=3", "nofile=2:1", "nofile=-1:1", "nofile=1:2:3", "nofile=x"):
        with pytest.raises(UsageError, match="--ulimit"):
            inputs.check_ulimit(wrong)


def test_annotations() -> None:
    for good in ("a=b", "org.x.y=1=2", "index:a=b", "manifest[linux/arm64],manifest-descriptor:a=b"):
        assert inputs.check_annotation(good) == good
    for wrong in ("a", "=b", "image:a=b", "index:=b"):
        with pytest.raises(UsageError, match="--annotation"):
            inputs.check_annotation(wrong)


def test_fields_are_written_as_they_are_read(in_folder: Path) -> None:
    (in_folder / "x").write_text("x")
    text = inputs.write_fields([("id", 'a,"b"'), ("src", "x")])
    assert inputs.read_secret(text, {}) == Secret('a,"b"', b"x")
