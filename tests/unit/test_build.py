"""The recipe: what it does in which order, and what is left when something fails. The guest is a table of answers."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.building import IMAGE, Guest
from tests.unit.guest.fakes import FakeSession, Reply
from tests.unit.listener import Listener
from tests.unit.machine.conftest import make_qemu, make_spec
from vmbuild import build, operate, process, record, settle, start
from vmbuild.cli import program
from vmbuild.deadline import Deadline
from vmbuild.errors import BuildError, GuestError, MachineError, OutOfMemoryError, UsageError
from vmbuild.follow import Watch
from vmbuild.guest import docker, job, ready, secrets
from vmbuild.machine import lifetime
from vmbuild.machine.files import MachineFiles
from vmbuild.model import BuildRequest, Home, MachineRequest, MachineStatus, PassOn
from vmbuild.outputs import Kind, Output
from vmbuild.record import BuildRecord
from vmbuild.report import SilentReporter

REQUEST = MachineRequest("box", 2, 2048, 1 << 30, "debian-13-arm64")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    MachineFiles.at(tmp_path / "state", "box").folder.mkdir(parents=True)
    return Home(tmp_path / "cache", tmp_path / "state")


@pytest.fixture
def context(tmp_path: Path) -> Path:
    folder = tmp_path / "context"
    folder.mkdir()
    (folder / "Dockerfile").write_text("FROM scratch\n")
    return folder


@pytest.fixture
def run(home: Home, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Guest]:
    """Run a build in a guest and return the guest."""

    def do(
        asked: BuildRequest, *, stdin: bytes = b"", code: int = 0, log: bytes = b"", request: MachineRequest = REQUEST
    ) -> Guest:
        guest = Guest(code, log)

        @contextmanager
        def open_session(*_: object) -> Iterator[FakeSession]:
            yield guest

        monkeypatch.setattr(build, "open_session", open_session)
        streams = {"stdin": io.BytesIO(stdin), "stdout": io.BytesIO()}
        build.build(request, asked, home, SilentReporter(), **streams, watch=Watch())
        return guest

    return do


def test_the_unfinished_archive_is_no_part_of_the_context(run: Callable[..., Guest], context: Path) -> None:
    guest = run(BuildRequest(str(context), outputs=(Output(Kind.DOCKER, str(context / "out.tar")),)))
    assert guest.sent_names() == ["Dockerfile"]
    assert (context / "out.tar").stat().st_size > 0


def test_a_place_that_cannot_be_written_costs_no_build(run: Callable[..., Guest], context: Path) -> None:
    for output in (str(context), str(context / "none" / "out.tar")):
        with pytest.raises(UsageError, match="cannot write the archive"):
            run(BuildRequest(str(context), outputs=(Output(Kind.DOCKER, output),)))
    with pytest.raises(UsageError, match="cannot write"):
        run(BuildRequest(str(context), iidfile=context / "none" / "iid"))


@pytest.mark.parametrize(
    ("place", "dockerfile"), [("-", None), ("https://example.org/x.git", "-")], ids=["context", "Dockerfile"]
)
def test_standard_input_goes_before_the_build(run: Callable[..., Guest], place: str, dockerfile: str | None) -> None:
    guest = run(BuildRequest(place, dockerfile=dockerfile, terminal=(80, 24), progress="tty"), stdin=b"FROM scratch")
    (sent,) = guest.shells("write")
    assert (sent.argv[-1], sent.stdin) == ("/w/stdin", b"FROM scratch")
    (built,) = guest.ran(job.PROGRAM, "start")
    assert built.argv[2:5] == ("/w", "80", "24")
    assert built.argv[8:11] == ("/w/stdin", "env", f"BUILDX_CONFIG={docker.BUILDX_CONFIG}")


def test_a_dockerfile_elsewhere_brings_its_own_rules(run: Callable[..., Guest], context: Path, tmp_path: Path) -> None:
    (context / ".dockerignore").write_text("dist\n")
    (context / "dist").write_text("needed")
    (tmp_path / "api.Dockerfile").write_text("FROM scratch\nCOPY dist /\n")
    (tmp_path / "api.Dockerfile.dockerignore").write_text("other\n")
    guest = run(BuildRequest(str(context), dockerfile=str(tmp_path / "api.Dockerfile")))
    assert "dist" in guest.sent_names()
    # BuildKit takes the file beside the Dockerfile for all of the rules, and asks the context's no more.
    rules = [call.stdin for call in guest.shells("write") if call.argv[-1] == "/w/Dockerfile.dockerignore"]
    assert [line for line in rules[0].decode().splitlines() if not line.startswith("#")] == []


def test_a_failed_build_leaves_no_older_id(run: Callable[..., Guest], context: Path, tmp_path: Path) -> None:
    asked = BuildRequest(str(context), iidfile=tmp_path / "iid", metadata_file=tmp_path / "meta")
    run(asked)
    assert (tmp_path / "iid").read_text() == IMAGE
    assert json.loads((tmp_path / "meta").read_text()) == {"containerimage.digest": IMAGE}
    with pytest.raises(BuildError):
        run(asked, code=1)
    assert not (tmp_path / "iid").exists()
    assert not (tmp_path / "meta").exists()


def test_a_login_is_in_memory_for_the_time_of_a_build_and_nowhere_else(
    run: Callable[..., Guest], home: Home, context: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"auths": {"docker.io": {"auth": "c2VjcmV0"}}}))
    records = []
    monkeypatch.setattr(record, "save", lambda _, made: records.append(made))
    guest = run(BuildRequest(str(context)), request=replace(REQUEST, pass_on=PassOn(logins=True)))
    (built,) = guest.ran(secrets.PROGRAM, "put", "/run/vmbuild/held/w", "/w/held", job.PROGRAM, "start")
    assert "DOCKER_CONFIG=/run/vmbuild/held/w" in built.argv
    size, _, rest = built.stdin.partition(b" config.json\n")
    assert rest[int(size) :] == b".\n"
    assert json.loads(rest[: int(size)]) == {"proxies": {}, "auths": {"docker.io": {"auth": "c2VjcmV0"}}}
    assert [call for call in guest.calls if b"c2VjcmV0" in call.stdin] == [built]
    assert "c2VjcmV0" not in " ".join(word for call in guest.calls for word in call.argv)
    assert [made.has_secrets for made in records] == [True]
    assert "c2VjcmV0" not in repr(records)


def test_a_build_without_a_login_has_no_configuration(run: Callable[..., Guest], context: Path) -> None:
    guest = run(BuildRequest(str(context)))
    assert guest.ran(job.PROGRAM, "start")
    assert guest.ran(secrets.PROGRAM) == []
    assert not any("DOCKER_CONFIG" in word for call in guest.calls for word in call.argv)


KILLED = b"Out of memory: Killed process 8 (cc1) total-vm:1kB, anon-rss:731136kB, file-rss:1kB\n"


@pytest.mark.parametrize(
    ("log", "most", "words"),
    [
        (b"[   99.000000] " + KILLED, 1024, "`vmbuild down box`, then this command with --memory 2048M"),
        (b"[   99.000000] " + KILLED, 4096, "`vmbuild resize box --memory 4096M`"),
        (b"[   10.000000] " + KILLED, 1024, ""),
    ],
    ids=["in this build", "in a machine made smaller", "before it"],
)
def test_a_build_that_ran_out_of_memory_is_told_so(
    run: Callable[..., Guest], context: Path, monkeypatch: pytest.MonkeyPatch, log: bytes, most: int, words: str
) -> None:
    monkeypatch.setattr(
        lifetime, "status", lambda _: MachineStatus("box", "running", memory_mib=most, memory_now_mib=1024)
    )
    with pytest.raises(BuildError) as caught:
        run(BuildRequest(str(context)), code=1, log=log)
    if words:
        assert "killed cc1, which held 714.0 MiB of the machine's 1.0 GiB" in caught.value.details
        assert words in caught.value.resolution
    else:
        assert "memory" not in caught.value.details


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"cpus": 3}, "1 to 2 CPUs"),
        ({"memory_mib": 4096}, "256 MiB to 2.0 GiB"),
        ({"memory_mib": 100}, "256 MiB to 2.0 GiB"),
        ({"disk_bytes": 1 << 20}, "cannot shrink"),
    ],
    ids=str,
)
def test_what_a_running_machine_cannot_become_is_refused(
    home: Home, machine: MachineFiles, wanted: dict[str, int], words: str
) -> None:
    asked = {"cpus": None, "memory_mib": None, "disk_bytes": None, **wanted}
    with pytest.raises(UsageError, match=words):
        operate.resize("box", home, SilentReporter(), **asked)
    lifetime.stop(machine, Deadline.after(0))
    with pytest.raises(MachineError, match="not running"):
        operate.resize("box", home, SilentReporter(), **asked)


def test_memory_changes_without_logging_in(home: Home, machine: MachineFiles) -> None:
    """Nobody answers on the fake QEMU's SSH port."""
    operate.resize("box", home, SilentReporter(), cpus=None, memory_mib=512, disk_bytes=None)
    assert lifetime.status(machine).memory_now_mib == 512


@pytest.fixture
def machine(home: Home, programs: Path) -> Iterator[MachineFiles]:
    """A machine of the fake QEMU that runs."""
    files = MachineFiles.at(home.state, "box")
    lifetime.prepare(make_spec(home.state), files, explicit_disk=False)
    files.seed.write_bytes(bytes(512))
    lifetime.start(make_spec(home.state), files, make_qemu())
    yield files
    if files.folder.exists():
        operate.destroy("box", home, SilentReporter())


def test_what_a_running_machine_cannot_become_is_said(
    home: Home, machine: MachineFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ready, "wait_ready", lambda *_: FakeSession((("sh",), Reply())))
    report = Listener()
    asked = replace(REQUEST, disk_bytes=5 << 30, memory_mib=4096, given=frozenset({"disk", "memory", "cpus"}))
    with start.open_session(asked, home, report):
        pass
    assert ["disk 1.0 GiB; 5.0 GiB" in text or "memory 2.0 GiB; 4.0 GiB" in text for text in report.warnings] == [
        True
    ] * 2


def test_a_running_machine_survives_one_who_waits_in_vain(
    home: Home, machine: MachineFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def give_up(*_: object) -> None:
        raise GuestError("not ready")

    monkeypatch.setattr(ready, "wait_ready", give_up)
    with pytest.raises(GuestError), start.open_session(REQUEST, home, SilentReporter()):
        pass
    assert lifetime.status(machine).state == "running"


def test_destroyed_by_two_it_is_gone_once(home: Home, machine: MachineFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    original, answers = lifetime.lock, list[bool]()

    @contextmanager
    def lock(files: MachineFiles, report: SilentReporter) -> Iterator[None]:
        monkeypatch.setattr(lifetime, "lock", original)
        answers.append(operate.destroy("box", home, SilentReporter()))  # the other one was quicker
        with original(files, report):
            yield

    monkeypatch.setattr(lifetime, "lock", lock)
    answers.append(operate.destroy("box", home, SilentReporter()))
    assert answers == [True, False]


# --oom-retry


class Host:
    """A machine and its host as `build` sees them; it remembers what was done to them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, guest: Guest) -> None:
        self.guest = guest
        self.most, self.now = 1024, 1024
        self.spare: int | None = 64 << 30
        self.codes = [1, 0]
        self.done: list[str] = []
        self.report = Listener()
        monkeypatch.setattr(build, "open_session", self._open_session)
        monkeypatch.setattr(operate, "resize", self._resize)
        monkeypatch.setattr(operate, "down", self._down)
        monkeypatch.setattr(process, "available_memory_bytes", lambda: self.spare)
        monkeypatch.setattr(lifetime, "status", lambda _: self._status())

    def _status(self) -> MachineStatus:
        return MachineStatus("box", "running", memory_mib=self.most, memory_now_mib=self.now)

    @contextmanager
    def _open_session(self, request: MachineRequest, *_: object) -> Iterator[FakeSession]:
        self.done.append(f"build with {request.memory_mib}")
        self.most = self.now = max(self.now, request.memory_mib)
        self.guest.code = self.codes.pop(0)
        yield self.guest

    def _resize(self, name: str, *_: object, memory_mib: int, **same: object) -> None:
        assert set(same.values()) == {None}
        self.done.append(f"resize {name} to {memory_mib}")
        self.now = memory_mib

    def _down(self, name: str, *_: object) -> None:
        self.done.append(f"down {name}")
        self.now = 0

    def build(self, asked: BuildRequest, home: Home) -> None:
        streams = {"stdin": io.BytesIO(), "stdout": io.BytesIO()}
        request = replace(REQUEST, memory_mib=self.now)
        build.build(request, asked, home, self.report, **streams, watch=Watch())


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(monkeypatch, Guest(log=b"[   99.000000] " + KILLED))


@pytest.fixture
def asked(context: Path) -> BuildRequest:
    return BuildRequest(str(context), oom_retry=True)


def test_a_machine_that_was_made_smaller_gets_its_memory_back_and_builds_again(
    home: Home, host: Host, asked: BuildRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = [MachineStatus("box", "running", memory_mib=4096, memory_now_mib=1024)] * 2
    monkeypatch.setattr(lifetime, "status", lambda _: states.pop())
    host.build(asked, home)
    assert host.done == ["build with 1024", "resize box to 4096", "build with 4096"]
    (warning,) = host.report.warnings
    assert "out of memory, building again with 4.0 GiB" in warning
    assert host.guest.removed() == ["/w", "/w"]


def test_a_machine_that_has_all_it_can_is_started_again_with_twice_as_much(
    home: Home, host: Host, asked: BuildRequest
) -> None:
    host.codes = [1, 1, 0]
    host.build(asked, home)
    assert host.done == ["build with 1024", "down box", "build with 2048", "down box", "build with 4096"]


@pytest.mark.parametrize("short", [1, 16])
def test_a_balloon_that_keeps_a_few_pages_is_not_asked_for_ever(
    home: Home, host: Host, asked: BuildRequest, monkeypatch: pytest.MonkeyPatch, short: int
) -> None:
    monkeypatch.setattr(
        lifetime,
        "status",
        lambda _: MachineStatus("box", "running", memory_mib=host.most, memory_now_mib=host.most - short),
    )
    host.build(asked, home)
    assert host.done == ["build with 1024", "down box", "build with 2048"]


@pytest.mark.parametrize("reason", ["memory", "another build", "not asked"])
def test_there_is_no_more_where_none_can_be_had(
    home: Home, host: Host, asked: BuildRequest, context: Path, reason: str
) -> None:
    host.codes = [1, 1]
    expected = ["build with 1024"]
    if reason == "memory":
        host.spare = (2048 << 20) - 1
        expected += ["down box", "build with 2048"]
    if reason == "another build":
        files = MachineFiles.at(home.state, "box")
        record.save(files.builds, BuildRecord("/w/other", (), (), None, None, False, str(context), 1, 1.0, 1.0))
    if reason == "not asked":
        asked = replace(asked, oom_retry=False)
    with pytest.raises(OutOfMemoryError, match="docker build ended with exit code 1") as caught:
        host.build(asked, home)
    assert host.done == expected
    assert "killed cc1" in caught.value.details


def test_a_machine_grows_no_further_than_its_architecture_allows(
    home: Home, host: Host, asked: BuildRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settle, "limit_memory", lambda memory_mib, _: min(memory_mib, 1500))
    host.codes = [1, 1]
    with pytest.raises(OutOfMemoryError):
        host.build(asked, home)
    assert host.done == ["build with 1024", "down box", "build with 1500"]


def test_a_host_that_does_not_say_what_it_has_is_tried(home: Home, host: Host, asked: BuildRequest) -> None:
    host.spare = None
    host.build(asked, home)
    assert host.done == ["build with 1024", "down box", "build with 2048"]


def test_a_build_that_failed_otherwise_is_not_built_again(home: Home, host: Host, asked: BuildRequest) -> None:
    host.guest.table = ((("dmesg",), Reply()), *host.guest.table)
    with pytest.raises(BuildError) as caught:
        host.build(asked, home)
    assert not isinstance(caught.value, OutOfMemoryError)
    assert host.done == ["build with 1024"]


@pytest.mark.parametrize("argv", [["-"], ["-f", "-", "."]], ids=" ".join)
def test_what_can_be_read_once_cannot_be_built_again(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = list[object]()
    monkeypatch.setattr(build, "build", lambda *arguments, **_: calls.append(arguments))
    assert program.run(["build", "--oom-retry", *argv]) == UsageError.exit_code
    assert "cannot be built again" in " ".join(capsys.readouterr().err.split())
    assert calls == []


def test_a_machine_grows_for_its_build(
    home: Home, machine: MachineFiles, asked: BuildRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The same with a machine of the fake QEMU: ended, and started with more."""

    class Flaky(Guest):
        def run(self, argv: Sequence[str], **options: Any) -> int:
            self.code = 1 if lifetime.status(machine).memory_mib == 2048 else 0
            return super().run(argv, **options)

    guest = Flaky(log=b"[   99.000000] " + KILLED)
    monkeypatch.setenv("CI", "true")
    monkeypatch.setattr(start, "fetch_image", lambda *_: make_spec(tmp_path).image)
    monkeypatch.setattr(start, "probe_for", lambda *_: make_qemu())
    monkeypatch.setattr(ready, "wait_ready", lambda *_: guest)
    monkeypatch.setattr(operate, "_power_off", lambda *_: lifetime.stop(machine, Deadline.after(0)))
    monkeypatch.setattr(process, "available_memory_bytes", lambda: 64 << 30)
    streams = {"stdin": io.BytesIO(), "stdout": io.BytesIO()}
    build.build(REQUEST, asked, home, SilentReporter(), **streams, watch=Watch())
    now = lifetime.status(machine)
    assert (now.state, now.memory_mib) == ("running", 4096)
    assert guest.removed() == ["/w", "/w"]
