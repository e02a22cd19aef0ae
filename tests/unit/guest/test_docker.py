from __future__ import annotations

import io
import os
import shutil
import tarfile
from contextlib import suppress
from pathlib import Path

import pytest
import zstandard

from tests.unit.guest.drives import DriveSession, make_channel
from tests.unit.guest.fakes import CountingMeter, FakeSession, HostSession, Reply
from tests.unit.listener import Listener
from vmbuild.errors import BuildError, GuestError
from vmbuild.guest import job
from vmbuild.guest.channel import Channel
from vmbuild.guest.context import open_context
from vmbuild.guest.docker import (
    BUILDX,
    TAR,
    BuildLog,
    Workspace,
    build_argv,
    configure_tree,
    explain_failure,
    image_for,
    image_id,
    import_image,
    pack_tree,
    start_build,
    unpack_context,
    unpack_tree,
    workspace,
    write_file,
)
from vmbuild.guest.session import send
from vmbuild.model import MIB, BuildRequest
from vmbuild.report import SilentReporter

FAILED_RUN = """#5 [build 2/2] RUN exit 3
#5 ERROR: process "/bin/sh -c exit 3" did not complete successfully: exit code: 3
------
 > [build 2/2] RUN exit 3:
------
Dockerfile:2
--------------------
   1 |     FROM debian:trixie-slim
   2 | >>> RUN exit 3
--------------------
ERROR: failed to solve: process "/bin/sh -c exit 3" did not complete successfully: exit code: 3
"""
NO_REGISTRY = """#2 ERROR: failed to do request: Head "https://registry-1.docker.io/v2/": dial tcp: no such host
ERROR: failed to solve: debian:x: failed to resolve source metadata for docker.io/library/debian:x: failed to do
"""


@pytest.mark.parametrize(
    "text", [FAILED_RUN, FAILED_RUN.replace("\n", "\r\n"), f"\x1b[31m{FAILED_RUN}\x1b[0m\x1b[?25h"]
)
def test_a_failing_run_is_told_with_step_line_and_exit_code(text: str) -> None:
    error = explain_failure(text, 1)
    assert error.brief == "RUN exit 3 failed with exit code 3"
    assert error.details == "step build 2/2, Dockerfile:2"


def test_no_registry_leads_to_base() -> None:
    error = explain_failure(NO_REGISTRY, 1)
    assert "debian:x" in error.brief
    assert "vmbuild base" in error.resolution


@pytest.mark.parametrize(
    ("text", "brief"),
    [
        (
            "ERROR: failed to solve: dockerfile parse error on line 2: unknown instruction: RUNN\n",
            "unknown instruction",
        ),
        ('ERROR: failed to build: failed to calculate checksum: "/nope": not found\n', "/nope"),
        ("something else\n", "exit code 9"),
    ],
)
def test_other_failures_are_told_in_docker_s_words(text: str, brief: str) -> None:
    error = explain_failure(text, 9)
    assert isinstance(error, BuildError)
    assert brief in error.brief


def test_a_full_disk_is_told_with_a_way_out() -> None:
    assert "prune" in explain_failure("ERROR: failed to solve: write /x: no space left on device\n", 1).resolution


def test_argv_has_every_option() -> None:
    job = BuildRequest(
        context=".",
        tags=("a:1", "b:2"),
        build_args=("K=V",),
        labels=("l=1",),
        target="one",
        platform="linux/arm64",
        no_cache=True,
        pull=True,
        progress="rawjson",
    )
    argv = build_argv(job, Workspace("/w"), "/w/context", "/w/context/Dockerfile")
    text = " ".join(argv)
    for part in (
        "--platform linux/arm64",
        "--progress rawjson",
        "--metadata-file /w/metadata.json",
        "--tag a:1 --tag b:2",
        "--build-arg K=V",
        "--label l=1",
        "--target one",
        "--file /w/context/Dockerfile",
        "--no-cache",
        "--pull",
    ):
        assert part in text
    assert argv[-1] == "/w/context"


def test_argv_has_nothing_that_was_not_asked_for() -> None:
    text = " ".join(build_argv(BuildRequest(context="."), Workspace("/w"), "/w/context", None))
    for part in ("--tag", "--build-arg", "--label", "--target", "--file", "--no-cache", "--pull"):
        assert part not in text


WORK = Workspace("/w")


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (BuildRequest("."), ()),
        (BuildRequest(".", tags=("a:1", "b")), ("--tag", "a:1", "--tag", "b")),
        (BuildRequest(".", build_args=("A=b c", "D")), ("--build-arg", "A=b c", "--build-arg", "D")),
        (BuildRequest(".", labels=("l=$x",)), ("--label", "l=$x")),
        (BuildRequest(".", target="t"), ("--target", "t")),
        (BuildRequest(".", no_cache=True), ("--no-cache",)),
        (BuildRequest(".", pull=True), ("--pull",)),
    ],
)
def test_each_option_is_words_of_its_own_before_the_context(job: BuildRequest, words: tuple[str, ...]) -> None:
    plain = build_argv(BuildRequest("."), WORK, "/w/context", None)
    assert plain[-1] == "/w/context"
    assert build_argv(job, WORK, "/w/context", None) == [*plain[:-1], *words, "/w/context"]


@pytest.mark.parametrize(
    ("flag", "job"), [("--platform", BuildRequest(".", platform="p")), ("--progress", BuildRequest(".", progress="p"))]
)
def test_what_is_always_said_takes_its_value_from_the_job(flag: str, job: BuildRequest) -> None:
    argv = build_argv(job, WORK, "/c", "/f")
    assert argv[argv.index(flag) + 1] == "p"
    assert argv[argv.index("--file") + 1] == "/f"
    assert argv[:2] == [BUILDX, "build"]


LAST = "ERROR: failed to solve: "
TTY = (
    "\x1b[?25l\x1b[1A\x1b[0G[+] Building 0.9s (5/5) FINISHED\r\n => ERROR [2/2] RUN exit 3   0.5s\r\n\x1b[?25h"
    + FAILED_RUN[FAILED_RUN.index("------") :].replace("\n", "\r\n")
)


def test_a_terminal_s_output_means_the_same() -> None:
    error = explain_failure(TTY, 1)
    assert error.brief == "RUN exit 3 failed with exit code 3"
    assert error.details == "step build 2/2, Dockerfile:2"


def test_the_last_of_several_failures_counts() -> None:
    error = explain_failure(FAILED_RUN + FAILED_RUN.replace("exit 3", "exit 4").replace("code: 3", "code: 4"), 1)
    assert error.brief == "RUN exit 4 failed with exit code 4"


def test_a_step_of_several_lines() -> None:
    text = FAILED_RUN.replace("RUN exit 3:", "RUN <<EOF (set -e...):").replace("-c exit 3", "-c set -e\nexit 3\n")
    assert explain_failure(text, 1).brief == "RUN <<EOF (set -e...) failed with exit code 3"


def test_a_dockerfile_by_any_name_is_named_with_its_line() -> None:
    text = FAILED_RUN.replace("Dockerfile:2", "Containerfile.arm:2")
    assert explain_failure(text, 1).details == "step build 2/2, Containerfile.arm:2"


@pytest.mark.parametrize("prefix", ["ERROR: failed to solve: ", "ERROR: failed to build: failed to solve: ", "ERROR: "])
def test_every_buildx_s_way_to_begin_an_error_is_left_out(prefix: str) -> None:
    assert explain_failure(f"{prefix}the reason\n", 1).brief == "the reason"


@pytest.mark.parametrize(
    "what",
    [
        "debian:x: failed to resolve source metadata for docker.io/library/debian:x: not found",
        'x: failed to do request: Head "https://registry-1.docker.io/v2/": dial tcp 1.2.3.4:443: i/o timeout',
        "x: dial tcp: lookup registry-1.docker.io on 10.0.2.3:53: no such host",
    ],
)
def test_an_unreachable_registry_leads_to_base_images(what: str) -> None:
    assert "vmbuild base debian:trixie-slim" in explain_failure(LAST + what + "\n", 1).resolution


MISSING = """------
 > [2/2] COPY nope /:
------
Dockerfile:2
--------------------
   1 |     FROM debian:trixie-slim
   2 | >>> COPY nope /
--------------------
ERROR: failed to solve: failed to compute cache key: failed to calculate checksum of ref a::b: "/nope": not found
"""
PARSE = """Dockerfile:3
--------------------
   3 | >>> RUNN ls
--------------------
ERROR: failed to solve: dockerfile parse error on line 3: unknown instruction: RUNN (did you mean RUN?)
"""


@pytest.mark.parametrize(("text", "brief", "line"), [(MISSING, '"/nope": not found', 2), (PARSE, "RUNN", 3)])
def test_a_wrong_dockerfile_is_told_with_its_line(text: str, brief: str, line: int) -> None:
    error = explain_failure(text, 1)
    assert brief in error.brief
    assert not error.brief.startswith("failed to solve")
    assert f"Dockerfile:{line}" in error.details
    assert error.resolution == ""
    assert error.exit_code == 7


def test_output_that_says_nothing_is_shown() -> None:
    error = explain_failure("Segmentation fault\n", 139)
    assert error.brief == "docker build ended with exit code 139"
    assert "Segmentation fault" in error.details


@pytest.mark.parametrize(
    ("output", "code", "words"),
    [
        ("#5 [2/2] RUN make\n", 255, "killed in the guest"),
        ("ERROR: failed to solve: write /var/lib/docker/x: no space left on device\n", 1, "disk is full"),
        ("ERROR: Cannot connect to the Docker daemon at unix:///var/run/docker.sock.\n", 1, "went away"),
        (
            "ERROR: failed to receive status: rpc error: code = Unavailable desc = error reading from server: EOF\n",
            1,
            "went away",
        ),
    ],
)
def test_a_guest_at_fault_is_told_from_a_dockerfile_at_fault(output: str, code: int, words: str) -> None:
    error = explain_failure(output, code)
    assert words in error.brief
    assert error.exit_code == GuestError.exit_code
    assert error.resolution


def read_log(code: int, *pieces: bytes, quiet: bool = False) -> bytes:
    """Return what a build's log passes on, the build having ended with this code."""
    heard = bytearray()
    log = BuildLog(heard.extend, quiet=quiet)
    for piece in pieces:
        log.take(piece)
    assert log.size == sum(map(len, pieces))
    if code == 0:
        log.check(code)
    else:
        with pytest.raises(BuildError, match="RUN exit 3 failed with exit code 3"):
            log.check(code)
    return bytes(heard)


def test_a_build_is_started_as_a_job_of_its_workspace() -> None:
    session = FakeSession(((job.PROGRAM,), Reply()))
    start_build(session, WORK, ["buildx", "build"], stdin=None, terminal=(80, 24))
    start_build(session, WORK, ["buildx"], stdin="/w/stdin", terminal=None)
    first, second = (call.argv[1:] for call in session.calls)
    assert first == ("start", "/w", "80", "24", "buildx", "build")
    assert second[:4] == ("start", "/w", "0", "0")
    assert second[-2:] == ("/w/stdin", "buildx")


def test_a_quiet_build_says_nothing_unless_it_fails() -> None:
    assert read_log(0, b"words", quiet=True) == b""
    assert read_log(0, b"wo", b"rds") == b"words"
    assert read_log(1, FAILED_RUN.encode(), quiet=True).decode() == FAILED_RUN


def test_only_the_end_of_a_long_output_is_kept() -> None:
    noise = b"x" * 80 + b"\n"
    assert len(read_log(1, noise * 10_000, FAILED_RUN.encode())) == 810_000 + len(FAILED_RUN)
    assert len(read_log(1, noise * 10_000, FAILED_RUN.encode(), quiet=True)) < 100_000


def test_the_metadata_names_the_container_image() -> None:
    def found(text: str) -> tuple[str, str]:
        return image_id(FakeSession((("cat", "/w/metadata.json"), Reply(stdout=text.encode()))), WORK)

    both = '{"containerimage.config.digest": "sha256:c", "containerimage.digest": "sha256:d"}'
    assert found(both) == ("sha256:d", both)
    assert found('{"containerimage.config.digest": "sha256:c"}')[0] == "sha256:c"


def in_a_workspace(*more: tuple[tuple[str, ...], Reply]) -> FakeSession:
    return FakeSession(
        *more,
        (("sh", "-c"), Reply(stdout=b"/var/lib/vmbuild/work/abc\n")),
        ((job.PROGRAM, "stop"), Reply()),
        (("rm",), Reply()),
    )


@pytest.mark.parametrize("error", [None, BuildError("b"), GuestError("g"), KeyboardInterrupt(), ZeroDivisionError()])
def test_a_workspace_is_removed_on_every_way_out(error: BaseException | None) -> None:
    session = in_a_workspace()
    with suppress(BaseException if error else ZeroDivisionError), workspace(session) as work:
        assert work.context == "/var/lib/vmbuild/work/abc/context"
        assert session.ran("rm") == []
        if error is not None:
            raise error
    (removed,) = session.ran("rm")
    assert removed.argv == ("rm", "-rf", "/var/lib/vmbuild/work/abc")
    assert removed.deadline.at is not None


def test_a_workspace_that_cannot_be_removed_does_not_hide_why() -> None:
    session = in_a_workspace((("rm",), Reply(error=GuestError("the connection to the guest broke"))))
    with pytest.raises(BuildError, match="the reason"), workspace(session):
        raise BuildError("the reason")


def test_a_workspace_that_cannot_be_made_is_an_error_of_the_guest() -> None:
    session = FakeSession((("sh",), Reply(1, stderr=b"Read-only file system")))
    with pytest.raises(GuestError) as caught, workspace(session):
        pytest.fail("there is no workspace")
    assert "Read-only" in caught.value.details
    assert session.ran("rm") == []


needs_tools = pytest.mark.skipif(
    not (Path(TAR).exists() and shutil.which("zstd")), reason="GNU tar and zstd, which the guest has, are not here"
)


@pytest.fixture(params=[0, 64 * MIB], ids=["ssh", "drives"])
def way(request: pytest.FixtureRequest, tmp_path: Path) -> Channel:
    """Both ways that a context can go."""
    return make_channel(tmp_path / "drives", request.param)


def unpack_for_real(folder: Path, source: Path, way: Channel) -> tuple[Path, int, int]:
    """Send a folder the way a build does, through this host's shell, zstd and tar; return where it arrived."""
    work = Workspace(str(folder))
    Path(work.context).mkdir(parents=True)
    report = Listener()
    session = DriveSession(way.inbox.parent)
    sent = unpack_context(session, work, open_context(source, None, io.BytesIO()).write_tar, way, report)
    return Path(work.context), sent, report.advanced


@pytest.fixture
def source(tmp_path: Path) -> Path:
    found = tmp_path / "source"
    found.mkdir()
    (found / "Dockerfile").write_text("FROM scratch\n")
    return found


@needs_tools
def test_a_context_arrives_as_it_was(tmp_path: Path, source: Path, way: Channel) -> None:
    (source / "sub").mkdir()
    (source / "sub" / ("n" * 200)).write_bytes(b"deep")
    (source / "run").write_bytes(b"#!")
    (source / "run").chmod(0o751)
    (source / "dangling").symlink_to("nowhere")
    (source / "grüße").write_bytes(b"utf8")
    (source / "hard").hardlink_to(source / "run")
    there, sent, told = unpack_for_real(tmp_path / "work", source, way)
    assert (there / "sub" / ("n" * 200)).read_bytes() == b"deep"
    assert (there / "run").stat().st_mode & 0o777 == 0o751
    assert (there / "dangling").readlink() == Path("nowhere")
    assert (there / "grüße").read_bytes() == b"utf8"
    assert (there / "hard").read_bytes() == b"#!"
    assert told >= sent > 1024


@needs_tools
def test_a_name_that_is_no_utf8_arrives(tmp_path: Path, source: Path, way: Channel) -> None:
    (source / os.fsdecode(b"caf\xe9")).write_bytes(b"x")
    there, _, _ = unpack_for_real(tmp_path / "work", source, way)
    assert b"caf\xe9" in {os.fsencode(path.name) for path in there.iterdir()}


@needs_tools
@pytest.mark.parametrize("when", [4_000_000_000, -1000], ids=["future", "before 1970"])
def test_a_strange_time_is_no_failure(tmp_path: Path, source: Path, way: Channel, when: int) -> None:
    """A guest's clock is often behind the host's; tar then warns of every file that was just written."""
    os.utime(source / "Dockerfile", (when, when))
    there, _, _ = unpack_for_real(tmp_path / "work", source, way)
    assert (there / "Dockerfile").read_text() == "FROM scratch\n"


@needs_tools
def test_a_stream_that_is_no_tar_is_an_error(tmp_path: Path, way: Channel) -> None:
    work = Workspace(str(tmp_path))
    Path(work.context).mkdir()
    with pytest.raises(GuestError):
        unpack_context(DriveSession(way.inbox.parent), work, send(b"no tar at all" * 500), way, SilentReporter())


def test_a_full_disk_while_unpacking_is_told_with_a_way_out(way: Channel) -> None:
    session = FakeSession((("sh",), Reply(2, stderr=b"tar: a: Cannot write: No space left on device\n")))
    for unpack in (
        lambda: unpack_context(session, WORK, send(b"x"), way, SilentReporter()),
        lambda: unpack_tree(session, WORK, send(b"x"), way),
        lambda: write_file(session, "/w/f", send(b"x")),
    ):
        with pytest.raises(GuestError, match="disk is full") as caught:
            unpack()
        assert "--disk" in caught.value.resolution


def test_a_file_is_written_under_any_name(tmp_path: Path) -> None:
    for name in ("plain", "a b", "$(false)'\"", "-n"):
        write_file(HostSession(), str(tmp_path / name), send(b"\0data"))
        assert (tmp_path / name).read_bytes() == b"\0data"


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        (Reply(stdout=b"linux/arm64 sha256:abc\n"), "sha256:abc"),
        (Reply(stdout=b"linux/arm64/v8 sha256:abc\n"), "sha256:abc"),
        (Reply(stdout=b"linux/arm/v7 sha256:abc\n"), None),
        (Reply(stdout=b"linux/amd64 sha256:abc\n"), None),
        (Reply(1, stderr=b"No such image"), None),
    ],
)
def test_a_container_image_counts_for_its_platform_only(reply: Reply, found: str | None) -> None:
    assert image_for(FakeSession((("docker", "image", "inspect"), reply)), "debian:x", "linux/arm64") == found


@pytest.mark.parametrize(("variant", "found"), [(b"/v7", "sha256:abc"), (b"/v6", None), (b"", None)])
def test_a_container_image_of_32_bits_counts_for_its_variant_only(variant: bytes, found: str | None) -> None:
    reply = Reply(stdout=b"linux/arm" + variant + b" sha256:abc\n")
    assert image_for(FakeSession((("docker", "image", "inspect"), reply)), "debian:x", "linux/arm/v7") == found


def test_an_import_goes_by_way_of_a_file() -> None:
    session = FakeSession((("sh", "-c"), Reply()), (("docker", "import"), Reply(stdout=b"sha256:abc\n")))
    assert import_image(session, WORK, send(b"layer"), "debian:x", "linux/arm64") == "sha256:abc"
    written, imported = session.calls
    assert (written.stdin, written.argv[-1]) == (b"layer", WORK.layer)
    assert imported.argv[-2:] == (WORK.layer, "debian:x")
    assert imported.argv[imported.argv.index("--platform") + 1] == "linux/arm64"
    assert 'CMD ["bash"]' in imported.argv


def test_configuring_counts_packages_and_shows_the_last_words_of_a_failure() -> None:
    meter = CountingMeter()
    said = b"Setting up a (1) ...\nSetting up b (2) ...\n"
    configure_tree(FakeSession((("/usr/lib/vmbuild/second-stage", WORK.context), Reply(stdout=said))), WORK, meter)
    assert meter.total == 2
    with pytest.raises(GuestError, match="exit code 5") as caught:
        configure_tree(FakeSession(((), Reply(5, stdout=said, stderr=b"dpkg: error"))), WORK, meter)
    assert "dpkg: error" in caught.value.details


@needs_tools
def test_a_tree_comes_back_as_it_is(tmp_path: Path) -> None:
    work = Workspace(str(tmp_path))
    Path(work.context).mkdir()
    (Path(work.context) / "file").write_bytes(b"x")
    packed = bytearray()
    pack_tree(HostSession(), work, packed.extend)
    plain = zstandard.ZstdDecompressor().decompressobj().decompress(bytes(packed))
    with tarfile.open(fileobj=io.BytesIO(plain)) as tar:
        assert tar.getnames() == [".", "./file"]


def test_a_tree_that_cannot_be_packed_is_an_error() -> None:
    with pytest.raises(GuestError) as caught:
        pack_tree(FakeSession((("sh",), Reply(0, b"half", b"tar: x: Cannot open"))), WORK, bytearray().extend)
    assert "Cannot open" in caught.value.details


def test_what_was_said_long_before_the_end_is_forgotten() -> None:
    """Only so much output is kept in memory, however much a build says."""
    log = BuildLog(bytearray().extend, quiet=False)
    log.take(FAILED_RUN.encode())
    log.take(b"noise\n" * 20_000)
    with pytest.raises(BuildError, match="docker build ended with exit code 9"):
        log.check(9)
