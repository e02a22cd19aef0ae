"""What a guest gets of the host's ways into the network: real registries and a real proxy on the host's loopback."""

from __future__ import annotations

import json
import os
import shutil
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.machine import proxy as proxies
from tests.machine import registry as registries
from tests.machine.conftest import BASE, Cli, Done
from tests.machine.proxy import Proxy
from tests.machine.registry import Registry

pytestmark = pytest.mark.machine

LOGIN = ("reader", "s3cret-word")
PROXY_LOGIN = ("somebody", "pr0xy-word")
PROGRAMS = Path(__file__).parents[1] / "programs"


@dataclass(frozen=True)
class World:
    """A machine that was started behind a proxy, and what there is around it."""

    cli: Cli
    proxy: Proxy
    plain: Registry
    private: Registry
    folder: Path

    def run(self, *args: str, **env: str) -> Done:
        """Run the program behind the proxy, whatever its exit code."""
        given: dict[str, Any] = {**self.env(), **env}
        return self.cli.run(*args, **given)

    def build(self, dockerfile: str, **env: str) -> str:
        """Build a Dockerfile that has no need of a context; return what the program said."""
        done = self.run("build", "-t", "out:1", str(self.context(dockerfile)), **env)
        assert done.code == 0, done.err
        return done.err

    def context(self, dockerfile: str) -> Path:
        """Return a context with this Dockerfile."""
        place = self.folder / "context"
        place.mkdir(exist_ok=True)
        (place / "Dockerfile").write_text(dockerfile)
        return place

    def env(self) -> dict[str, str]:
        """Return the environment of a host behind the proxy, which trusts the private registry's authority."""
        names = ("http_proxy", "https_proxy")
        empty = {name: "" for name in ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "no_proxy")}
        own = {"DOCKER_CONFIG": str(self.folder / "docker"), "VMBUILD_CA": str(self.private.authority)}
        return {**empty, **dict.fromkeys(names, self.proxy.url), **own}

    def configure(self, config: object) -> None:
        """Write docker's configuration of the host."""
        (self.folder / "docker").mkdir(exist_ok=True)
        (self.folder / "docker" / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def world(cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One machine, a plain registry, and one with TLS and a login: `private.test`, as the proxy alone knows."""
    folder = tmp_path_factory.mktemp("passed-on")
    named = cli.named("passed")
    with (
        registries.running(folder / "plain") as plain,
        registries.running(folder / "private", tls=True, login=LOGIN, names=("private.test",)) as private,
        proxies.running(PROXY_LOGIN, {"private.test": private.port, "plain.test": plain.port}) as proxy,
    ):
        made = World(named, proxy, plain, private, folder)
        made.configure({})
        done = made.run("up")
        assert done.code == 0, done.err
        assert f"proxy http://127.0.0.1:{proxy.port}" in done.err.replace("10.0.2.2", "127.0.0.1")
        assert "1 CA certificate (Test CA private)" in done.err
        assert PROXY_LOGIN[1] not in done.err
        archive = folder / "tiny.tar"
        context = made.context("FROM scratch\nCOPY Dockerfile /\nLABEL tiny=yes\n")
        named.ok("build", "-o", str(archive), str(context))
        plain.copy_in(f"docker-archive:{archive}", "library/tiny:1")
        plain.copy_in(f"docker-archive:{archive}", "team/tiny:1")
        private.copy_in(f"docker-archive:{archive}", "team/tiny:1")
        yield made
        named.run("destroy", "--yes", "passed")


def test_a_registry_on_localhost_is_the_hosts(world: World) -> None:
    said = world.build(f"ARG HERE={world.plain.host}\nFROM ${{HERE}}/team/tiny:1\nLABEL x=1\n")
    assert f"the host's localhost:{world.plain.port}" in said
    assert "/v2/team/tiny/manifests/1 " in world.plain.log()
    assert "plain.test" not in world.proxy.seen


def test_what_the_guest_listens_on_stays_its_own(world: World) -> None:
    done = world.run("up", VMBUILD_HOST_PORTS="22")
    assert "localhost:22 is the guest's own" in done.err


def test_a_mirror_serves_docker_hub_on_a_machine_that_runs(world: World) -> None:
    dockerfile = "FROM tiny:1\nLABEL x=2\n"
    before = world.plain.log().count("/v2/library/tiny/manifests/")
    said = world.build(dockerfile, VMBUILD_REGISTRY_MIRRORS=f"http://localhost:{world.plain.port}")
    assert f"registry mirror http://localhost:{world.plain.port}" in said
    assert world.plain.log().count("/v2/library/tiny/manifests/") > before
    assert world.run("up").code == 0  # without the setting it goes
    assert "localhost" not in world.cli.guest("cat /etc/docker/daemon.json")


def test_a_syntax_line_asks_the_mirror_for_its_front_end(world: World) -> None:
    """There is none: the build says what it wanted, and what to do without."""
    dockerfile = "# syntax=docker/dockerfile:1\nFROM scratch\nCOPY Dockerfile /\n"
    mirror = f"http://localhost:{world.plain.port}"
    assert "/v2/docker/dockerfile/" not in world.plain.log()
    done = world.run("build", "-q", str(world.context(dockerfile)), VMBUILD_REGISTRY_MIRRORS=mirror)
    assert done.code == 7
    assert "/v2/docker/dockerfile/manifests/1?ns=docker.io" in world.plain.log()
    what, _, advice = done.err.partition("The Dockerfile's `# syntax=` line asks for a front end from a registry.")
    assert "docker.io/docker/dockerfile:1" in what.rpartition("ERROR")[2]
    assert "leave the line out" in advice
    world.build(dockerfile.partition("\n")[2])


def test_an_insecure_registry_behind_the_proxy(world: World) -> None:
    dockerfile = "FROM plain.test/team/tiny:1\nLABEL x=3\n"
    assert world.run("build", str(world.context(dockerfile))).code == 7
    world.build(dockerfile, VMBUILD_INSECURE_REGISTRIES="plain.test")  # at once, though BuildKit remembers it otherwise
    assert "plain.test" in world.proxy.seen


def test_tls_of_a_private_authority_and_a_login(world: World) -> None:
    dockerfile = "FROM private.test/team/tiny:1\nLABEL x=4\n"
    auth = b64encode(":".join(LOGIN).encode()).decode()
    world.configure({"auths": {"private.test": {"auth": auth}, "other.test": {"auth": auth}}})
    refused = world.run("build", str(world.context(dockerfile)), VMBUILD_LOGINS="off")
    assert refused.code == 7
    assert "401" in refused.err or "authoriz" in refused.err or "no basic auth" in refused.err
    said = world.build(dockerfile)
    assert "Logged in for this build: private.test\n" in said
    assert "private.test" in world.proxy.seen
    assert LOGIN[1] not in said


def test_a_push_trusts_the_private_authority(world: World) -> None:
    """`private.test` is no loopback, so that its certificate is asked for; the proxy knows where it is."""
    auth = b64encode(":".join(LOGIN).encode()).decode()
    world.configure({"auths": {"private.test": {"auth": auth}}})
    argv = ("build", str(world.context("FROM scratch\nCOPY Dockerfile /\n")), "-t", "private.test/team/new:1", "--push")
    refused = world.run(*argv, VMBUILD_CA="off")
    assert refused.code == 8
    assert "certificate" in refused.err
    assert "team/new" not in world.private.repositories()
    done = world.run(*argv)
    assert done.code == 0, done.err
    assert "team/new" in world.private.repositories()
    assert LOGIN[1] not in done.err


def test_a_credential_helper_is_asked(world: World, tmp_path: Path) -> None:
    """The registry on localhost, which a helper has a login for; nothing of it is left in the guest."""
    host = world.private.host
    world.configure({"credsStore": "fake"})
    shutil.copy(PROGRAMS / "docker-credential-fake", tmp_path)
    (tmp_path / "logins.json").write_text(json.dumps({host: LOGIN, "other.test": ["a", "b"]}))
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    said = world.build(f"FROM {host}/team/tiny:1\nLABEL x=5\n", PATH=path)
    assert f"Logged in for this build: {host}\n" in said
    assert (tmp_path / "asked").read_text().split("\n") == ["list ", f"get {host}", ""]
    assert world.cli.guest("ls -A /run/vmbuild/held").strip() == ""
    left = world.cli.guest(f"grep -rl {LOGIN[1]} /var/lib/vmbuild /run/vmbuild /tmp /root /var/log 2>/dev/null || true")
    assert left.strip() == ""
    assert LOGIN[1] not in "".join(path.read_text() for path in world.cli.state.rglob("*.json"))


ASK = """\
at=${http_proxy#http://} login=$(printf %s "${at%@*}" | base64) at=${at##*@}
exec 3<>"/dev/tcp/${at%:*}/${at#*:}"
printf '%s\\r\\n' 'GET http://plain.test/v2/ HTTP/1.1' 'Host: plain.test' "Proxy-Authorization: Basic $login" '' >&3
head -n 1 <&3 | grep 200
"""


def test_a_step_goes_through_the_proxy_and_the_image_does_not_tell(world: World) -> None:
    world.cli.ok("base", BASE)
    (world.context(f"FROM {BASE}\nCOPY ask /\nRUN bash /ask\n") / "ask").write_text(ASK)
    seen = world.proxy.seen.count("plain.test")
    done = world.run("build", "-t", "out:1", str(world.folder / "context"))
    assert done.code == 0, done.err
    assert world.proxy.seen.count("plain.test") == seen + 1
    assert PROXY_LOGIN[1] not in world.cli.guest("docker inspect out:1; docker history --no-trunc out:1")
    off = world.run("build", "--no-cache", str(world.folder / "context"), VMBUILD_PROXY="off")
    assert off.code == 7


def test_another_proxy_waits_until_docker_is_not_in_use(world: World) -> None:
    in_docker = "tr '\\0' '\\n' </proc/$(cat /run/docker.pid)/environ | grep ^http_proxy="
    assert world.run("up").code == 0
    assert str(world.proxy.port) in world.cli.guest(in_docker)
    world.cli.guest("docker run -d --rm --name sleeper out:1 sleep 1000")
    done = world.run("up", http_proxy="http://other.test:1")
    assert "takes these when nothing runs in it" in done.err
    assert str(world.proxy.port) in world.cli.guest(in_docker)
    world.cli.guest("docker kill sleeper && docker wait sleeper 2>/dev/null || true")
    done = world.run("up", http_proxy="http://other.test:1")
    assert "takes these" not in done.err
    assert world.cli.guest(in_docker) == "http_proxy=http://other.test:1\n"
