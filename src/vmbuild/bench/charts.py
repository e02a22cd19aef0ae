"""The charts of a report's page, as plain HTML and SVG: bars of each phase, ratios with their intervals, a timeline."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from vmbuild.bench.result import Result, Row, Run
from vmbuild.bench.sampler import Sample
from vmbuild.bench.statistics import Ratio
from vmbuild.model import GIB, MIB

WORTH_S = 0.5
"""What takes less on every side has a ratio, but says nothing."""

TICKS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Ratios that an axis may be marked at."""


def amount(value: float, unit: str) -> str:
    """Return a value as people read it: seconds, minutes, or bytes."""
    if unit == "B":
        return f"{value / GIB:.2f} GiB" if value >= GIB else f"{value / MIB:.0f} MiB"
    if value >= 600:
        return f"{value // 60:.0f} min {value % 60:02.0f} s"
    return f"{value:.0f} s" if value >= 100 else f"{value:.1f} s"


def ratio_text(ratio: Ratio | None) -> str:
    """Return a ratio and its interval as HTML."""
    if ratio is None:
        return ""
    value, low, high = (f"{each:.2f}" if each < 10 else f"{each:.1f}" for each in (ratio.value, ratio.low, ratio.high))
    return f"<b>{value}</b> <span class=small>{low} to {high}</span>"


def legend(result: Result) -> str:
    """Return what the colours mean, and what each side is."""
    items = []
    for index, side in enumerate(result.sides):
        facts = result.side_facts.get(side, {})
        items.append(f"<li><i class=s{index}></i>{escape(side)}: {escape(facts.get('what', ''))}</li>")
    return f"<ul class=legend>{''.join(items)}</ul>"


def bars(rows: Sequence[Row], result: Result) -> str:
    """Return the bars of rows: one for each side, a line over it from the least to the most."""
    most = max((each.most for row in rows for each in row.summaries.values()), default=0.0) or 1.0
    return "".join(_bar_row(row, result, most) for row in rows)


def _bar_row(row: Row, result: Result, most: float) -> str:
    drawn = "".join(_bar(index, row, side, most) for index, side in enumerate(result.sides))
    kind = "name step" if row.kind == "run" else "name"
    title = escape(row.title, quote=True)
    return f'<div class="row wide"><div class="{kind}" title="{title}">{title}</div><div class=bars>{drawn}</div></div>'


def _bar(index: int, row: Row, side: str, most: float) -> str:
    found = row.summaries.get(side)
    if found is None:
        return f'<div class="bar s{index}"><div class=track><span class=value style="left:0">none</span></div></div>'
    width, low, high = (100 * value / most for value in (found.median, found.least, found.most))
    text = amount(found.median, row.unit)
    whole = f"{side}: {text}, {amount(found.least, row.unit)} to {amount(found.most, row.unit)}"
    return (
        f'<div class="bar s{index}" title="{escape(whole, quote=True)}"><div class=track>'
        f'<span class=fill style="width:{width:.2f}%"></span>'
        f'<span class=span style="left:{low:.2f}%;width:{high - low:.2f}%"></span>'
        f'<span class=value style="left:{max(width, high):.2f}%">{text}</span></div></div>'
    )


def forest(rows: Sequence[Row], result: Result) -> str:
    """Return the ratios of rows on one logarithmic axis, 1 marked: left of it the first side is faster."""
    rows = [row for row in rows if _is_worth_it(row)]
    found = [ratio for row in rows for ratio in row.ratios.values()]
    if not found:
        return ""
    low = min(0.5, *(ratio.low for ratio in found)) / 1.1
    high = max(2.0, *(ratio.high for ratio in found)) * 1.1

    def place(value: float) -> float:
        return 100 * math.log(max(value, low) / low) / math.log(high / low)

    marks = [f'<span style="left:{place(tick):.2f}%">{tick:g}</span>' for tick in TICKS if low <= tick <= high]
    head = (
        f"<div class='row head'><div class=name></div><div class=axis>{''.join(marks)}</div>"
        "<div class=ratio></div></div>"
    )
    lines = [head]
    for row in rows:
        for index, side in enumerate(result.sides[1:], 1):
            if (ratio := row.ratios.get(side)) is not None:
                lines.append(_forest_row(row, side, index, ratio, place, many=len(result.sides) > 2))
    return f'<div class=forest style="--one:{place(1):.2f}%">{"".join(lines)}</div>'


def _is_worth_it(row: Row) -> bool:
    longest = max((each.median for each in row.summaries.values()), default=0.0)
    return row.kind != "rest" and (row.unit != "s" or longest >= WORTH_S)


def _forest_row(row: Row, side: str, index: int, ratio: Ratio, place: Callable[[float], float], *, many: bool) -> str:
    title = escape(f"{row.title} ({side})" if many else row.title, quote=True)
    low, at, high = place(ratio.low), place(ratio.value), place(ratio.high)
    kind = "name step" if row.kind == "run" else "name"
    return (
        f'<div class=row><div class="{kind}" title="{title}">{title}</div><div class="plot s{index if many else 0}">'
        f'<span class=line style="left:{low:.2f}%;width:{high - low:.2f}%"></span>'
        f'<span class=point style="left:{at:.2f}%"></span></div><div class=ratio>{ratio_text(ratio)}</div></div>'
    )


def timeline(result: Result) -> str:
    """Return CPU and memory over time, of the run of each side that took the middle time."""
    chosen = [_middle(result.of(side)) for side in result.sides]
    end = max((run.seconds for run in chosen if run), default=1.0)
    samples = [run.samples if run else () for run in chosen]
    cpu = [[(each.at_s, each.cpu_percent / 100) for each in smooth(line)] for line in samples]
    memory = [[(each.at_s, each.memory_bytes / MIB) for each in line] for line in samples]
    return (
        "<h3>CPUs in use</h3>"
        + _chart(cpu, end, lambda value: f"{value:g}")
        + "<h3>Memory, MiB</h3>"
        + _chart(memory, end, lambda value: f"{value:,.0f}")
    )


def smooth(samples: Sequence[Sample], width: int = 2) -> list[Sample]:
    """Return samples whose CPU is the mean of their neighbours': the kernel counts CPU time in ticks."""
    found = []
    for index, each in enumerate(samples):
        near = samples[max(0, index - width) : index + width + 1]
        mean = sum(one.cpu_percent for one in near) / len(near)
        found.append(Sample(each.at_s, mean, each.memory_bytes))
    return found


def _middle(runs: Sequence[Run]) -> Run | None:
    return sorted(runs, key=lambda run: run.seconds)[(len(runs) - 1) // 2] if runs else None


def _chart(lines: Sequence[Sequence[tuple[float, float]]], end: float, label: Callable[[float], str]) -> str:
    most = max((value for line in lines for _, value in line), default=0.0)
    ticks = nice_ticks(most)
    top = ticks[-1]
    rules = "".join(f'<line x1="0" x2="1000" y1="{_y(tick, top):.1f}" y2="{_y(tick, top):.1f}"/>' for tick in ticks)
    paths = "".join(f'<path class=s{index} d="{_path(line, end, top)}"/>' for index, line in enumerate(lines) if line)
    marks = "".join(f'<span style="top:{100 - 100 * tick / top:.1f}%">{label(tick)}</span>' for tick in ticks)
    times = [tick for tick in nice_ticks(end) if tick <= end]
    below = "".join(f'<span style="left:{100 * tick / end:.1f}%">{amount_of_time(tick)}</span>' for tick in times)
    return (
        f"<div class=chart><div class=y>{marks}</div>"
        f'<svg viewBox="0 0 1000 100" preserveAspectRatio="none" role=img>{rules}{paths}</svg>'
        f"<div class=x>{below}<span></span></div></div>"
    )


def amount_of_time(seconds: float) -> str:
    """Return a mark of a time axis."""
    return f"{seconds:g} s" if seconds < 600 else f"{seconds / 60:g} min"


def _y(value: float, top: float) -> float:
    return 100 - 100 * value / top


def _path(line: Sequence[tuple[float, float]], end: float, top: float) -> str:
    points = " L".join(f"{1000 * at / end:.1f} {_y(value, top):.1f}" for at, value in line)
    return f"M{points}"


def nice_ticks(most: float, count: int = 4) -> list[float]:
    """Return about so many round marks from 0 to at least `most`."""
    if most <= 0:
        return [0.0, 1.0]
    rough = most / count
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * scale for factor in (1, 2, 2.5, 5, 10) if factor * scale >= rough * 0.999)
    return [round(index * step, 10) for index in range(math.ceil(most / step - 1e-9) + 1)]
