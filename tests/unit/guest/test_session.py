from __future__ import annotations

import io

import pytest

from tests.unit.guest.fakes import FakeSession, Reply
from vmbuild.deadline import Deadline
from vmbuild.errors import GuestError
from vmbuild.guest.session import Session, WrongHostKeyError, capture, send


class CountingSink(io.BytesIO):
    """Remembers how large the pieces were."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def write(self, data: bytes, /) -> int:  # type: ignore[override]
        self.sizes.append(len(data))
        return super().write(data)


def test_send_feeds_all_bytes_and_again_when_asked_again() -> None:
    feed = send(b"\0abc\n")
    for _ in range(2):
        sink = io.BytesIO()
        feed(sink)
        assert sink.getvalue() == b"\0abc\n"


def test_capture_returns_standard_output_alone() -> None:
    session = FakeSession((("say",), Reply(stdout=b"h\xc3\xa9\n", stderr=b"noise")))
    deadline = Deadline.after(7)
    assert capture(session, ["say", "it"], feed=send(b"in"), deadline=deadline) == "hé\n"
    (call,) = session.calls
    assert (call.argv, call.stdin, call.deadline) == (("say", "it"), b"in", deadline)


def test_capture_survives_bytes_that_are_no_text() -> None:
    assert capture(FakeSession((("say",), Reply(stdout=b"a\xffb"))), ["say"]) == "a\ufffdb"


def test_capture_of_a_failure_tells_program_code_and_both_outputs() -> None:
    session = FakeSession((("make",), Reply(9, b"half", b"why")))
    with pytest.raises(GuestError) as caught:
        capture(session, ["make", "all"])
    assert caught.value.brief == "make failed in the guest with exit code 9"
    for part in ("$ make all", "half", "why"):
        assert part in caught.value.details


def test_a_broken_connection_passes_through_capture() -> None:
    error = GuestError("gone")
    with pytest.raises(GuestError) as caught:
        capture(FakeSession((("say",), Reply(error=error))), ["say"])
    assert caught.value is error


def test_a_wrong_host_key_is_an_error_of_the_guest() -> None:
    assert issubclass(WrongHostKeyError, GuestError)
    assert WrongHostKeyError("x").exit_code == 6


def test_the_fake_is_a_session() -> None:
    session: Session = FakeSession()
    with pytest.raises(AssertionError, match="nobody told"):
        session.run(["unheard-of"])
