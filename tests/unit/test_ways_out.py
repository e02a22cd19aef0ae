"""The options of the ways out, and what a build does with several of them at once."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import pytest

from tests.machine.registry import make_authority
from tests.unit.building import CONFIG_DIGEST, MANIFEST, Guest
from tests.unit.listener import Listener
from tests.unit.registry.server import FakeRegistry
from vmbuild import build, deliver, follow, record
from vmbuild.cli import program
from vmbuild.cli.ways_out import BuildCommand, output_options, read_outputs
from vmbuild.errors import DeliveryError, GuestError, UsageError
from vmbuild.follow import Watch
from vmbuild.guest import docker
from vmbuild.machine.files import MachineFiles
from vmbuild.model import BuildRequest, BuildResult, Home, MachineRequest, PassOn
from vmbuild.outputs import Kind, Output, parse_output
from vmbuild.record import BuildRecord
from vmbuild.registry import transport
from vmbuild.report import SilentReporter
from vmbuild.trust import trusted_too


@pytest.fixture
def home(tmp_path: Path) -> Home:
    MachineFiles.at(tmp_path / "state", "box").folder.mkdir(parents=True)
    return Home(tmp_path / "cache", tmp_path / "state")


def read(*argv: str) -> tuple[tuple[str, ...], tuple[str, ...], str]:
    """Return outputs, attestations and context of a command line."""
    found: list[tuple[tuple[str, ...], tuple[str, ...], str]] = []

    @click.command(cls=BuildCommand)
    @click.argument("context", default=".")
    @output_options
    def command(context: str, **flags: object) -> None:
        outputs, attests = read_outputs(flags)
        found.append((tuple(each.text for each in outputs), attests, context))

    command.main(list(argv), standalone_mode=False)
    return found[0]


@pytest.mark.parametrize(
    ("argv", "outputs", "context"),
    [
        ([], (), "."),
        (["--load", "ctx"], ("type=load,dest=auto",), "ctx"),
        (["ctx", "--load"], ("type=load,dest=auto",), "ctx"),
        (["--load=podman", "docker"], ("type=load,dest=podman",), "docker"),
        (["--load", "ssh://pi@b:1", "ctx"], ("type=load,dest=ssh://pi@b:1",), "ctx"),
        (["--load=ssh://b", "--load", "."], ("type=load,dest=ssh://b", "type=load,dest=auto"), "."),
        (["--push", "."], ("type=registry",), "."),
        (["--push", "-o", "a.tar"], ("type=docker,dest=a.tar", "type=registry"), "."),
        (["--push", "-o", "type=image"], ("type=registry",), "."),
        (["--push", "-o", "type=registry,name=a/b"], ("type=registry,name=a/b",), "."),
        (["-o", "a.tar", "-o", "type=oci,dest=b"], ("type=docker,dest=a.tar", "type=oci,dest=b"), "."),
        (["--", "--load"], (), "--load"),
    ],
)
def test_a_command_line_says_where_the_container_image_goes(
    argv: list[str], outputs: tuple[str, ...], context: str
) -> None:
    assert read(*argv) == (outputs, (), context)


@pytest.mark.parametrize(
    ("argv", "attests"),
    [
        (["--provenance", "true"], ("type=provenance",)),
        (["--provenance=mode=max"], ("type=provenance,mode=max",)),
        (["--provenance=false", "--sbom=false"], ()),
        (["--sbom", "generator=r.io/scan", "--provenance=1"], ("type=sbom,generator=r.io/scan", "type=provenance")),
        (["--attest", "type=provenance,mode=min"], ("type=provenance,mode=min",)),
        (["--attest", "type=sbom,disabled=true"], ()),
    ],
)
def test_attestations_are_written_as_buildx_does(argv: list[str], attests: tuple[str, ...]) -> None:
    assert read(*argv)[1] == attests


@pytest.mark.parametrize("argv", [["--attest", "mode=max"], ["--sbom", "true", "--attest", "type=sbom"]])
def test_attestations_that_make_no_sense(argv: list[str]) -> None:
    with pytest.raises(UsageError):
        read(*argv)


@pytest.mark.parametrize(
    "argv",
    [
        ["--load=rkt"],
        ["-o", "type=new"],
        ["--push"],
        ["-o", "a", "-o", "type=oci,dest=a"],
        ["--sbom", "true", "--attest", "type=x"],
    ],
    ids=str,
)
def test_a_wrong_value_costs_no_machine(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "build", None)
    assert program.run(["build", *argv, "."]) == UsageError.exit_code


def test_buildx_is_told_of_attestations_and_names() -> None:
    work = docker.Workspace("/w")
    plain = docker.build_argv(BuildRequest(".", platforms=("linux/arm64",)), work, "/c", None)
    assert plain[plain.index("--provenance") + 1] == "false"
    asked = BuildRequest(
        ".", tags=("a:1",), attests=("type=provenance,mode=max",), outputs=(Output(Kind.IMAGE, names=("b:2",)),)
    )
    argv = docker.build_argv(asked, work, "/c", None)
    assert "--provenance" not in argv
    assert argv[argv.index("--attest") + 1] == "type=provenance,mode=max"
    assert [argv[at + 1] for at, word in enumerate(argv) if word == "--tag"] == ["a:1", "b:2"]


# A build with several ways out. Its container image has no layers.


@pytest.fixture
def ran(home: Home, tmp_path: Path) -> Iterator[Ran]:
    made = Ran(home, tmp_path)
    yield made
    assert not list(made.files.folder.glob("blobs-*"))  # whatever became of it


class Ran:
    def __init__(self, home: Home, cwd: Path) -> None:
        self.guest, self.home, self.cwd, self.report = Guest(), home, cwd, Listener()
        self.files = MachineFiles.at(home.state, "box")

    def build(self, *outputs: str, tags: tuple[str, ...] = ("a:1",)) -> BuildResult:
        texts = tuple(parse_output(text).text for text in outputs)
        made = BuildRecord("/w/first", tags, texts, "iid", "meta", False, str(self.cwd), 12, 3.5, 100.0)
        record.save(self.files.builds, made)
        running = follow.Running(made, self.files, self.guest)
        return follow.to_the_end(running, self.home, self.report, stdout=io.BytesIO(), watch=Watch())


def members(path: Path) -> set[str]:
    with tarfile.open(path) as tar:
        return set(tar.getnames())


def test_all_outputs_are_made_of_one_build(ran: Ran, tmp_path: Path) -> None:
    outputs = ("d.tar", "type=oci,dest=o.tar", "type=tar,dest=t.tar", "files/", "type=oci,dest=lay,tar=false")
    result = ran.build(*outputs, "type=image")
    assert [each.where for each in result.outputs] == ["d.tar", "o.tar", "t.tar", "files/", "lay"]
    assert result.output_bytes == sum(each.size_bytes for each in result.outputs)
    assert "manifest.json" in members(tmp_path / "d.tar")
    assert f"blobs/sha256/{CONFIG_DIGEST}" in members(tmp_path / "o.tar")
    assert members(tmp_path / "t.tar") == set()
    assert (tmp_path / "files").is_dir()
    assert (tmp_path / "lay" / "blobs" / "sha256" / CONFIG_DIGEST).exists()
    reads = [call.argv[1] for call in ran.guest.ran("cat") if call.argv[1].endswith(CONFIG_DIGEST)]
    assert len(reads) == 1


def test_a_push_is_what_the_id_and_the_metadata_tell_of(ran: Ran, tmp_path: Path) -> None:
    with FakeRegistry().serving() as registry:
        result = ran.build("type=registry", tags=(f"{registry.host}/a:1", f"{registry.host}/a:2", f"{registry.host}/b"))
    assert set(registry.manifests) == {("a", "1"), ("a", "2"), ("b", "latest")}
    assert registry.manifests["a", "1"] == ("application/vnd.oci.image.manifest.v1+json", MANIFEST)
    assert result.image_id == (tmp_path / "iid").read_text() == result.outputs[0].digest
    facts = json.loads((tmp_path / "meta").read_text())
    assert facts["containerimage.digest"] == result.image_id
    assert facts["image.name"] == ",".join(result.tags)


def test_a_push_that_fails_leaves_what_was_written(ran: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeRegistry().serving() as registry:
        registry.statuses = [403]
        with pytest.raises(DeliveryError):
            ran.build("type=registry", "d.tar", "files/", tags=(f"{registry.host}/a:1",))
    assert (tmp_path / "d.tar").exists()
    assert (tmp_path / "files").exists()
    assert ran.guest.removed() == ["/w/first"]


def test_a_failure_before_leaves_nothing(ran: Ran, tmp_path: Path) -> None:
    ran.guest.table = tuple(row for row in ran.guest.table if row[0] != ("cat",))
    with pytest.raises((GuestError, AssertionError)):
        ran.build("d.tar", "files/")
    assert not (tmp_path / "d.tar").exists()
    assert not (tmp_path / "files").exists()


@pytest.mark.parametrize(
    ("output", "kind"),
    [("none/files/", UsageError), ("none/a.tar", UsageError), ("type=oci,dest=f,tar=false", UsageError)],
)
def test_a_place_that_cannot_be_written_is_found_before(tmp_path: Path, output: str, kind: type[Exception]) -> None:
    (tmp_path / "f").touch()
    with pytest.raises(kind, match="cannot write"):
        deliver.check_all([parse_output(output)], (), ("linux/arm64",), str(tmp_path))


@pytest.fixture
def push(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Build and push to a registry that lets nobody in, which is to be found before a machine is started."""

    @contextmanager
    def open_session(*_: object) -> Iterator[Guest]:
        raise AssertionError("a machine was started")
        yield Guest()

    monkeypatch.setattr(build, "open_session", open_session)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Dockerfile").write_text("FROM scratch\n")

    def push(registry: FakeRegistry, pass_on: PassOn) -> None:
        asked = BuildRequest(".", tags=(f"{registry.host}/a:1",), outputs=(Output(Kind.REGISTRY),))
        build.build(
            MachineRequest("box", 2, 2048, 1 << 30, "debian-13-arm64", pass_on=pass_on),
            *(asked, home, SilentReporter()),
            stdin=io.BytesIO(),
            stdout=io.BytesIO(),
            watch=Watch(),
        )

    return push


def test_a_registry_is_asked_before_a_machine_is(push: Callable[..., None]) -> None:
    with FakeRegistry("basic").serving() as registry, pytest.raises(DeliveryError, match="does not let you push"):
        push(registry, PassOn())


def test_it_is_asked_with_the_authorities_of_the_settings(
    push: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "https_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(transport, "is_loopback", lambda _: False)
    authority = make_authority(tmp_path)
    with FakeRegistry("basic").serving(tmp_path / "server.pem") as registry:
        for pass_on, words in (
            (PassOn(authorities=(str(authority),)), "does not let you push"),
            (PassOn(authorities=("off",)), "did not take"),
        ):
            with pytest.raises(DeliveryError, match=words):
                push(registry, pass_on)
    assert trusted_too() == ""


def test_who_attaches_pushes_with_the_authorities_of_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority, trusted = make_authority(tmp_path), list[str]()
    monkeypatch.setenv("VMBUILD_CA", str(authority))
    monkeypatch.setattr(follow, "attach", lambda *_, **__: trusted.append(trusted_too()))
    assert program.run(["attach"]) == 0
    monkeypatch.setenv("VMBUILD_CA", "off")
    assert program.run(["attach"]) == 0
    assert trusted == [authority.read_text(), ""]


def test_a_foreign_place_is_mapped_unless_there_is_none() -> None:
    for text in ("type=registry,name=a/b", "type=load,dest=docker", "-", "type=image"):
        assert deliver.kept_inside(parse_output(text), lambda _: "inside") == parse_output(text)
    assert deliver.kept_inside(Output(Kind.LOCAL, "/etc"), lambda _: "inside") == Output(Kind.LOCAL, "inside")
