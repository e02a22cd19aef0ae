"""The recipe: what it does in which order, and what is left when something fails. The guest is a table of answers."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.building import IMAGE, Guest
from tests.unit.guest.fakes import FakeSession, Reply
from tests.unit.listener import Listener
from tests.unit.machine.conftest import make_qemu, make_spec
from vmbuild import build, operate, start
from vmbuild.deadline import Deadline
from vmbuild.errors import BuildError, GuestError, MachineError, UsageError
from vmbuild.follow import Watch
from vmbuild.guest import docker, job, ready
from vmbuild.machine import lifetime
from vmbuild.machine.files import MachineFiles
from vmbuild.model import BuildRequest, Home, MachineRequest, MachineStatus
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

    def do(asked: BuildRequest, *, stdin: bytes = b"", code: int = 0, log: bytes = b"") -> Guest:
        guest = Guest(code, log)

        @contextmanager
        def open_session(*_: object) -> Iterator[FakeSession]:
            yield guest

        monkeypatch.setattr(build, "open_session", open_session)
        streams = {"stdin": io.BytesIO(stdin), "stdout": io.BytesIO()}
        build.build(REQUEST, asked, home, SilentReporter(), **streams, watch=Watch())
        return guest

    return do


def test_the_unfinished_archive_is_no_part_of_the_context(run: Callable[..., Guest], context: Path) -> None:
    guest = run(BuildRequest(str(context), output=str(context / "out.tar")))
    assert guest.sent_names() == ["Dockerfile"]
    assert (context / "out.tar").stat().st_size > 0


def test_a_place_that_cannot_be_written_costs_no_build(run: Callable[..., Guest], context: Path) -> None:
    for output in (str(context), str(context / "none" / "out.tar")):
        with pytest.raises(UsageError, match="cannot write the archive"):
            run(BuildRequest(str(context), output=output))
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
    assert built.argv[8:10] == ("/w/stdin", docker.BUILDX)


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
