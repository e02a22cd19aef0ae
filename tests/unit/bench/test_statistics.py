"""What several runs say together."""

from __future__ import annotations

import pytest

from vmbuild.bench.statistics import Ratio, Summary, compare, summarise


def test_a_summary_has_median_and_extremes() -> None:
    assert summarise([5.0, 1.0, 3.0, 4.0]) == Summary(3.5, 1.0, 5.0)
    with pytest.raises(ValueError, match="no values"):
        summarise([])


def test_runs_that_do_not_vary_have_no_interval() -> None:
    assert compare([2.0, 2.0], [4.0, 4.0]) == Ratio(0.5, 0.5, 0.5)


def test_the_interval_holds_the_ratio_and_lies_between_the_extremes() -> None:
    ours, theirs = [9.0, 10.0, 11.0], [18.0, 20.0, 22.0]
    found = compare(ours, theirs)
    assert found is not None
    assert min(ours) / max(theirs) <= found.low < found.value == 0.5 < found.high <= max(ours) / min(theirs)


def test_more_runs_narrow_the_interval_and_it_is_always_the_same() -> None:
    few = compare([9.0, 10.0, 11.0], [10.0])
    many = compare([9.0, 10.0, 11.0, *[10.0] * 20], [10.0])
    assert few is not None and many is not None
    assert many.high - many.low < few.high - few.low
    assert few == compare([9.0, 10.0, 11.0], [10.0])


def test_one_outlier_moves_the_median_little() -> None:
    found = compare([10.0, 10.0, 10.0, 10.0, 99.0], [10.0] * 5)
    assert found is not None
    assert found.value == 1.0


@pytest.mark.parametrize(("ours", "theirs"), [([], [1.0]), ([1.0], []), ([1.0], [0.0])])
def test_there_is_no_ratio_to_nothing(ours: list[float], theirs: list[float]) -> None:
    assert compare(ours, theirs) is None
