"""What several runs say together: median, extremes, and a ratio with the interval that it may be in."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

RESAMPLES = 10_000
CONFIDENCE = 0.95
SEED = 20_000
"""Fixed, so that the same runs always give the same interval."""


@dataclass(frozen=True)
class Summary:
    """Median, least and most of several values."""

    median: float
    least: float
    most: float


@dataclass(frozen=True)
class Ratio:
    """One side's median by the other's, and its bootstrap confidence interval."""

    value: float
    low: float
    high: float


def summarise(values: Sequence[float]) -> Summary:
    """Return what values say together. Raises ValueError when there are none."""
    if not values:
        raise ValueError("no values")
    return Summary(median(values), min(values), max(values))


def compare(ours: Sequence[float], theirs: Sequence[float]) -> Ratio | None:
    """Return the ratio of two medians, None where the other is zero or one has no values.

    The interval is the percentile bootstrap (Efron and Tibshirani, 1993, chapter 13): both sides are drawn anew, with
    replacement, RESAMPLES times. With few runs it can be no wider than the ratios of their extremes.
    """
    if not ours or not theirs or min(theirs) <= 0:
        return None
    draw = random.Random(SEED)  # noqa: S311 - no secret
    drawn = sorted(
        median(draw.choices(ours, k=len(ours))) / median(draw.choices(theirs, k=len(theirs))) for _ in range(RESAMPLES)
    )
    edge = round((1 - CONFIDENCE) / 2 * RESAMPLES)
    return Ratio(median(ours) / median(theirs), drawn[edge], drawn[-1 - edge])
