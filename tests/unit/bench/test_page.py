"""The page of a report: whole, safe, and in need of nothing."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from tests.unit.bench.examples import make_failed, make_report, make_result
from vmbuild.bench import charts, page
from vmbuild.bench.sampler import Sample

VOID = {"meta", "link", "br", "line", "path"}


class Checker(HTMLParser):
    """Sees that every element that begins also ends, and gathers what can be read."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.open == []
    return checker


def test_a_page_is_whole_and_needs_nothing() -> None:
    text = page.render(make_report())
    assert read(text).links == ["data:,"]
    assert "<script" not in text
    assert not re.search(r"https?://|url\(|@import", text)
    assert "prefers-color-scheme:dark" in text
    assert "width=device-width" in text


def test_what_others_wrote_is_text() -> None:
    checker = read(page.render(make_report()))
    words = "".join(checker.text)
    assert 'RUN echo "<b>&" && make -j$(nproc)' in words
    assert "<fast>" in words


def test_it_says_what_was_found() -> None:
    words = "".join(read(page.render(make_report())).text)
    assert "Against user, vm took 48% less time (ratio 0.52, 95 % interval 0.49 to 0.56)." in words
    assert "1 disturbed by other load" in words
    assert "All workloads" not in words


def test_no_clear_difference_is_called_so() -> None:
    words = "".join(read(page.render(make_report(make_result(ours=20, theirs=20)))).text)
    assert "No clear difference between vm and user" in words


@pytest.mark.parametrize("side", ["vm", "user"])
def test_what_one_side_cannot_build_is_said_with_its_last_words(side: str) -> None:
    words = "".join(read(page.render(make_report(make_failed(side), make_result("other")))).text)
    assert f"{side.capitalize()} could not build it." in words
    assert f"{side}, warming up: the build failed after 61.2 s" in words
    assert "word 0\nword <&>" in words
    assert f"hello, linux/arm64: {side} could not build it." in words  # in the overview, where it has no ratio
    assert "All 3 runs" in words


def test_several_workloads_have_one_chart_before_all() -> None:
    report = make_report(make_result("one"), make_result("two", 50, 40))
    words = "".join(read(page.render(report)).text)
    assert words.index("All workloads") < words.index("one for linux/arm64") < words.index("two for linux/arm64")


@pytest.mark.parametrize(
    ("most", "ticks"),
    [(0, [0, 1]), (1.0, [0, 0.25, 0.5, 0.75, 1.0]), (7.3, [0, 2, 4, 6, 8]), (431, [0, 200, 400, 600])],
)
def test_axes_have_round_marks(most: float, ticks: list[float]) -> None:
    assert charts.nice_ticks(most) == ticks


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (3.14, "s", "3.1 s"),
        (431.2, "s", "431 s"),
        (725, "s", "12 min 05 s"),
        (5e8, "B", "477 MiB"),
        (3e9, "B", "2.79 GiB"),
    ],
)
def test_amounts_are_short(value: float, unit: str, text: str) -> None:
    assert charts.amount(value, unit) == text


def test_smoothing_keeps_the_mean_and_the_times() -> None:
    samples = [Sample(float(at), 200.0 * (at % 2), at) for at in range(20)]
    found = charts.smooth(samples)
    assert [(each.at_s, each.memory_bytes) for each in found] == [(float(at), at) for at in range(20)]
    assert max(each.cpu_percent for each in found) <= 150
    assert sum(each.cpu_percent for each in found) / 20 == pytest.approx(100, abs=5)
