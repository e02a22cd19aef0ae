"""What a build is given: how it comes into the guest, and what its job is started with."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.unit.building import Guest
from tests.unit.guest.fakes import FakeSession, Reply
from tests.unit.listener import Listener
from vmbuild import build, host_agent, record
from vmbuild.errors import BuildError, GuestError, UsageError
from vmbuild.follow import Watch
from vmbuild.guest import agent, cache, secrets, sync
from vmbuild.inputs import Cache, Inputs, NamedContext, Secret, SshSource
from vmbuild.machine.files import MachineFiles
from vmbuild.model import BuildRequest, Home, MachineRequest

REQUEST = MachineRequest("box", 2, 2048, 1 << 30, "debian-13-arm64")
SECRETS = (Secret("one", b"hidden-1"), Secret('t"w,o', b"hidden-2"))


class World:
    """A machine's guest in which builds succeed, and who listens to them."""

    def __init__(self, folder: Path) -> None:
        self.home = Home(folder / "cache", folder / "state")
        self.files = MachineFiles.at(self.home.state, "box")
        self.files.folder.mkdir(parents=True)
        self.guest = Guest()
        self.report = Listener()
        self.recorded: list[str] = []

    def build(self, context: Path, inputs: Inputs, **asked: Any) -> tuple[str, ...]:
        """Build, and return the words that buildx was started with."""
        streams = {"stdin": io.BytesIO(), "stdout": io.BytesIO()}
        request = BuildRequest(str(context), inputs=inputs, **asked)
        build.build(REQUEST, request, self.home, self.report, **streams, watch=Watch())
        return self.started()

    def started(self) -> tuple[str, ...]:
        """Return the words of the job that was started."""
        (call,) = [call for call in self.guest.calls if "start" in call.argv]
        return call.argv


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(tmp_path)

    @contextmanager
    def open_session(*_: object) -> Iterator[FakeSession]:
        yield made.guest

    save = record.save

    def remember(builds: Path, each: record.BuildRecord) -> None:
        save(builds, each)
        made.recorded.append((builds / f"{each.id}.json").read_text())

    monkeypatch.setattr(build, "open_session", open_session)
    monkeypatch.setattr(record, "save", remember)
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, *files: str) -> Path:
        made = tmp_path / name
        made.mkdir()
        for file in files:
            (made / file).write_text(f"FROM {file}\n")
        return made

    return make


def after(words: tuple[str, ...], flag: str) -> list[str]:
    return [value for word, value in pairwise(words) if word == flag]


def test_secrets_are_fed_to_the_guest_and_are_in_no_argv_and_no_record(world: World, folder: Any) -> None:
    words = world.build(folder("context", "Dockerfile"), Inputs(secrets=SECRETS))
    assert words[:4] == (secrets.PROGRAM, "put", "/run/vmbuild/held/w", "/w/held")
    assert after(words, "--secret") == [
        "id=one,src=/run/vmbuild/held/w/0",
        '"id=t""w,o",src=/run/vmbuild/held/w/1',
    ]
    fed = [call for call in world.guest.calls if b"hidden" in call.stdin]
    assert [call.stdin for call in fed] == [b"8 0\nhidden-18 1\nhidden-2.\n"]
    assert not any("hidden" in word for call in world.guest.calls for word in call.argv)
    (text,) = world.recorded
    assert "hidden" not in text
    assert json.loads(text)["has_secrets"] is True


def test_a_build_without_them_is_started_as_ever(world: World, folder: Any) -> None:
    words = world.build(folder("context", "Dockerfile"), Inputs())
    assert words[1] == "start"
    assert json.loads(world.recorded[0])["has_secrets"] is False


def test_a_machine_of_an_older_vmbuild_is_told(world: World, folder: Any) -> None:
    world.guest.table = (((secrets.PROGRAM,), Reply(127, stderr=b"not found")), *world.guest.table)
    with pytest.raises(GuestError) as caught:
        world.build(folder("context", "Dockerfile"), Inputs(secrets=SECRETS))
    assert "vmbuild down" in caught.value.resolution
    assert world.guest.removed() == ["/w"]


def test_an_empty_secret_is_told(world: World, folder: Any) -> None:
    world.build(folder("context", "Dockerfile"), Inputs(secrets=(Secret("x", b""),)))
    assert world.report.warnings == ["the secret x is empty"]


def test_each_context_has_a_copy_that_stays_and_its_own_dockerignore(world: World, folder: Any) -> None:
    more = folder("more", "kept", "left")
    (more / ".dockerignore").write_text("left\n")
    layout = folder("layout", "index.json", "left")
    (layout / ".dockerignore").write_text("left\n")
    contexts = (
        NamedContext("more", str(more)),
        NamedContext("image", None, "docker-image://debian"),
        NamedContext("lay", str(layout), "oci-layout://", ":1"),
    )
    words = world.build(folder("context", "Dockerfile"), Inputs(contexts=contexts))
    keys = [call.argv[3] for call in world.guest.ran(sync.PROGRAM, "claim")]
    assert len(set(keys)) == 3
    assert after(words, "--build-context") == [
        f"more={sync.ROOT}/{keys[1]}",
        "image=docker-image://debian",
        f"lay=oci-layout://{sync.ROOT}/{keys[2]}:1",
    ]
    listings = [json.loads((world.files.contexts / f"{key}.json").read_text()) for key in keys]
    assert "kept" in str(listings[1])
    assert "left" not in str(listings[1])
    assert "left" in str(listings[2])


def test_a_context_that_another_build_uses_gets_a_place_of_its_own(world: World, folder: Any) -> None:
    busy = ((sync.PROGRAM, "claim"), Reply(stdout=b"busy\n"))
    world.guest.table = (busy, (("mkdir",), Reply()), *world.guest.table)
    contexts = (NamedContext("a", str(folder("a"))), NamedContext("b", str(folder("b"))))
    words = world.build(folder("context", "Dockerfile"), Inputs(contexts=contexts))
    assert after(words, "--build-context") == ["a=/w/context.0", "b=/w/context.1"]
    assert [call.argv[1] for call in world.guest.ran("mkdir")] == ["/w/context.0", "/w/context.1"]
    assert words[-1] == "/w/context"


def test_a_local_cache_goes_in_and_comes_out(
    world: World, folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brought: list[tuple[str, Path]] = []
    monkeypatch.setattr(cache, "bring_home", lambda *args: brought.append(args[1:3]))
    monkeypatch.chdir(tmp_path)
    have = folder("have", "index.json")
    inputs = Inputs(
        cache_from=(
            Cache((("type", "local"), ("tag", "x")), str(have)),
            Cache((("type", "local"),), "none"),
            Cache((("type", "registry"), ("ref", "r"))),
        ),
        cache_to=(
            Cache((("type", "local"), ("mode", "max")), "new"),
            Cache((("type", "local"), ("compression", "zstd")), "other"),
            Cache((("type", "inline"),)),
        ),
    )
    words = world.build(folder("context", "Dockerfile"), inputs)
    key = world.guest.ran(sync.PROGRAM, "claim")[1].argv[3]
    assert after(words, "--cache-from") == [f"type=local,tag=x,src={sync.ROOT}/{key}", "type=registry,ref=r"]
    assert after(words, "--cache-to") == [
        "type=local,mode=max,compression=uncompressed,dest=/w/cache.0",
        "type=local,compression=zstd,dest=/w/cache.1",
        "type=inline",
    ]
    assert brought == [("/w/cache.0", tmp_path / "new"), ("/w/cache.1", tmp_path / "other")]
    assert world.report.warnings == ["there is no build cache in none"]


def test_an_agent_is_lent_from_before_the_build_until_its_end(
    world: World, folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []

    @contextmanager
    def opened(source: SshSource) -> Iterator[agent.Ask]:
        heard.append(f"open {source.id}")
        yield lambda request: request
        heard.append(f"close {source.id}")

    @contextmanager
    def lent(_: object, socket: str, ask: agent.Ask) -> Iterator[None]:
        heard.append(f"lend {socket} after {len(world.guest.ran(secrets.PROGRAM))}")
        yield
        heard.append(f"end {socket}, removed {world.guest.removed()}")

    monkeypatch.setattr(host_agent, "opened", opened)
    monkeypatch.setattr(agent, "lent", lent)
    sources = (SshSource("default"), SshSource("git", ("/k1", "/k2")))
    words = world.build(folder("context", "Dockerfile"), Inputs(ssh=sources))
    first, second = "/run/vmbuild/held/w/agent.0", "/run/vmbuild/held/w/agent.1"
    assert after(words, "--ssh") == [f"default={first}", f"git={second}"]
    assert words[0] == secrets.PROGRAM  # so that their folder is wiped with the build's end
    assert heard == [
        *("open default", "open git", f"lend {first} after 0", f"lend {second} after 0"),
        *(f"end {second}, removed ['/w']", f"end {first}, removed ['/w']", "close git", "close default"),
    ]
    told = json.loads(world.recorded[0])
    assert (told["agents"], told["has_secrets"]) == (["default", "git=/k1,/k2"], False)


def test_a_key_that_is_none_costs_no_machine(world: World, folder: Any, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("no key")
    with pytest.raises(UsageError, match="key"):
        world.build(folder("context", "Dockerfile"), Inputs(ssh=(SshSource("x", (str(tmp_path / "key"),)),)))
    assert world.guest.calls == []


def test_options_come_before_the_context(world: World, folder: Any) -> None:
    words = world.build(folder("context", "Dockerfile"), Inputs(options=("--network", "none")))
    assert words[-3:-1] == ("--network", "none")


@pytest.mark.parametrize(
    ("context", "dockerfile", "words"),
    [
        ("http://localhost:80/x.git#main", None, ["http://10.0.2.2:80/x.git#main"]),
        ("git@127.0.0.1:x.git", "sub/Dockerfile", ["--file", "sub/Dockerfile", "git@10.0.2.2:x.git"]),
        ("http://127.0.0.1/x.tar", "-", ["--file", "-", "http://10.0.2.2/x.tar"]),
    ],
)
def test_the_host_s_loopback_is_the_host_s(
    world: World, context: Any, dockerfile: str | None, words: list[str]
) -> None:
    assert list(world.build(context, Inputs(), dockerfile=dockerfile)[-len(words) :]) == words


def test_a_dockerfile_of_the_host_with_a_context_from_elsewhere(world: World, tmp_path: Path) -> None:
    path = tmp_path / "Here"
    path.write_text("FROM here\n")
    url: Any = "https://example.org/x.git"
    assert world.build(url, Inputs(), dockerfile=str(path))[-3:] == ("--file", "/w/Dockerfile", url)
    assert [call.stdin for call in world.guest.shells("/w/Dockerfile")] == [b"FROM here\n"]


def test_a_dockerfile_from_elsewhere_with_a_folder(world: World, folder: Any) -> None:
    words = world.build(folder("context", "a"), Inputs(), dockerfile="http://127.0.0.1/Dockerfile")
    assert after(words, "--file") == ["http://10.0.2.2/Dockerfile"]


def test_a_build_that_fails_is_wiped_too(world: World, folder: Any) -> None:
    world.guest.code = 1
    with pytest.raises(BuildError):
        world.build(folder("context", "Dockerfile"), Inputs(secrets=SECRETS))
    assert world.guest.removed() == ["/w"]  # `job stop` wipes what the workspace leads to
