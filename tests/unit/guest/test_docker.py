from __future__ import annotations

import pytest

from vmbuild.errors import BuildError
from vmbuild.guest.docker import Workspace, build_argv, explain_failure
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
