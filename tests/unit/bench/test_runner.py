"""One run, from its start to its end."""

from __future__ import annotations

import time

import pytest

from vmbuild.bench.runner import Command, RunFailedError, measure


def test_every_line_has_its_time() -> None:
    before = time.time()
    found = measure(Command(["sh", "-c", "echo one; sleep 0.3; echo two >&2"]))
    one, two = found.lines
    assert (one.text, two.text) == ("one", "two")
    assert two.at - one.at > 0.25
    assert before <= found.begun <= one.at <= two.at <= found.ended
    assert found.taken.seconds >= 0.3


def test_a_program_that_waits_is_told_to_go_on_by_who_prepared_it() -> None:
    seen: list[int] = []
    command = Command(
        ["sh", "-c", "echo $$; echo ready; read -r word; echo got $word"], None, tuple, "ready", seen.append
    )
    found = measure(command)
    assert [line.text for line in found.lines] == [str(seen[0]), "got go"]


def test_a_run_that_fails_says_its_last_words() -> None:
    with pytest.raises(RunFailedError, match="exit code 3") as caught:
        measure(Command(["sh", "-c", "seq 100; exit 3"]))
    assert "\n100" in caught.value.details
    assert "\n50\n" not in caught.value.details
    assert caught.value.words[-1] == "100"
    assert 0 < caught.value.seconds < 20


def test_what_it_started_ends_with_an_interruption() -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        measure(Command(["sh", "-c", "sleep 60 & echo ready; wait"], None, tuple, "ready", interrupt))
    assert time.monotonic() - begun < 20
