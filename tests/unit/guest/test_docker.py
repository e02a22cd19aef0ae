from __future__ import annotations

from contextlib import suppress

import pytest

from tests.unit.guest.fakes import CountingMeter, FakeSession, Reply
from vmbuild.errors import BuildError, GuestError
from vmbuild.guest import job
from vmbuild.guest.docker import (
    BUILDX,
    BUILDX_CONFIG,
    BuildLog,
    Workspace,
    build_argv,
    configure_tree,
    explain_failure,
    image_id,
    start_build,
    workspace,
)
from vmbuild.model import BuildRequest

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
        platforms=("linux/arm64", "linux/arm/v7"),
        no_cache=True,
        pull=True,
        progress="rawjson",
    )
    argv = build_argv(job, Workspace("/w"), "/w/context", "/w/context/Dockerfile")
    text = " ".join(argv)
    for part in (
        "--platform linux/arm64,linux/arm/v7",
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
    ("flag", "job"),
    [("--platform", BuildRequest(".", platforms=("p",))), ("--progress", BuildRequest(".", progress="p"))],
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
    env = ("env", f"BUILDX_CONFIG={BUILDX_CONFIG}")
    assert first == ("start", "/w", "80", "24", *env, "buildx", "build")
    assert second[:4] == ("start", "/w", "0", "0")
    assert second[-4:] == ("/w/stdin", *env, "buildx")


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


def test_configuring_counts_packages_and_shows_the_last_words_of_a_failure() -> None:
    meter = CountingMeter()
    said = b"Setting up a (1) ...\nSetting up b (2) ...\n"
    configure_tree(FakeSession((("/usr/lib/vmbuild/second-stage", WORK.context), Reply(stdout=said))), WORK, meter)
    assert meter.total == 2
    with pytest.raises(GuestError, match="exit code 5") as caught:
        configure_tree(FakeSession(((), Reply(5, stdout=said, stderr=b"dpkg: error"))), WORK, meter)
    assert "dpkg: error" in caught.value.details


def test_what_was_said_long_before_the_end_is_forgotten() -> None:
    """Only so much output is kept in memory, however much a build says."""
    log = BuildLog(bytearray().extend, quiet=False)
    log.take(FAILED_RUN.encode())
    log.take(b"noise\n" * 20_000)
    with pytest.raises(BuildError, match="docker build ended with exit code 9"):
        log.check(9)
