"""The error table: every kind of failure has an exit code of its own and words for it."""

from __future__ import annotations

import pytest

from vmbuild.errors import BROKEN_PIPE, EXIT_CODES, INTERRUPTED, HostError, UsageError, VmbuildError

KINDS: list[type[VmbuildError]] = VmbuildError.__subclasses__()


@pytest.mark.parametrize("kind", KINDS, ids=[kind.__name__ for kind in KINDS])
def test_every_kind_is_in_the_table(kind: type[VmbuildError]) -> None:
    assert EXIT_CODES[kind.exit_code] == kind.meaning
    assert kind.meaning != VmbuildError.meaning


def test_no_two_kinds_share_an_exit_code() -> None:
    codes = [VmbuildError.exit_code, *(kind.exit_code for kind in KINDS)]
    assert len(set(codes)) == len(codes)
    assert set(EXIT_CODES) == {0, *codes, INTERRUPTED, BROKEN_PIPE}


def test_the_codes_are_those_that_scripts_rely_on() -> None:
    names = {kind.__name__: kind.exit_code for kind in KINDS if kind.__module__ == "vmbuild.errors"}
    assert names == {
        "UsageError": 2,
        "HostError": 3,
        "GuestImageError": 4,
        "MachineError": 5,
        "GuestError": 6,
        "BuildError": 7,
        "DeliveryError": 8,
        "SuspendedError": 75,
    }


def test_an_error_has_three_parts_and_reads_as_its_brief() -> None:
    error = HostError("the disk is full", details="/x: 0 B free", resolution="Make room.")
    assert (str(error), error.details, error.resolution) == ("the disk is full", "/x: 0 B free", "Make room.")


def test_details_and_resolution_may_be_left_out() -> None:
    error = UsageError("brief")
    assert (error.details, error.resolution) == ("", "")
