"""A report as one page of HTML that needs nothing else: no network, no script, no font."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from html import escape

from vmbuild.bench import charts
from vmbuild.bench.result import Failure, Report, Result, Row, phase_rows, summary_rows
from vmbuild.bench.style import CSS

HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
"""


def render(report: Report) -> str:
    """Return the page of a report."""
    title = "Full machine and user-mode emulation"
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(report.made_at))
    body = [
        f"<h1>{title}</h1>",
        f"<p>The same builds, in turns. Measured {made} with vmbuild {escape(report.version)}.</p>",
        _overview(report.results) if len(report.results) > 1 else "",
        *(_result(each) for each in report.results),
        "<h2>The host</h2>",
        f"<div class=card>{_facts({**report.host, 'command': report.command})}</div>",
        _how_to_read(),
    ]
    style = f"<title>{title}</title>\n<style>{CSS}</style></head>"
    return f"{HEAD}{style}\n<body><main>\n" + "\n".join(filter(None, body)) + "\n</main></body></html>\n"


def _overview(results: Sequence[Result]) -> str:
    """Return the ratio of whole builds of every workload, on one axis."""
    sides = max((result.sides for result in results), key=len)
    rows = []
    for result in results:
        total = summary_rows(result)[0]
        rows.append(Row(total.key, total.kind, result.title, "s", total.summaries, total.ratios))
    chart = charts.forest(rows, results[0]) + "".join(
        f"<p class=small>{escape(result.title)}: {escape(failure.side)} could not build it.</p>"
        for result in results
        for failure in result.failures
    )
    heading = f"<h3>Time: {escape(sides[0])} / other, below 1 it took less</h3>"
    return f"<h2>All workloads</h2><div class=card>{heading}{chart}</div>"


def _result(result: Result) -> str:
    total, cpu, memory = summary_rows(result)
    phases = phase_rows(result)
    described = f"<p>{escape(result.description)}</p>" if result.description else ""
    return "\n".join(
        [
            f"<h2>{escape(result.name)} for {escape(result.platform)}</h2>{described}",
            f"<p class=verdict>{_verdict(total, result)}</p>",
            *(_failure(each) for each in result.failures),
            charts.legend(result),
            f"<div class=tiles>{''.join(_tile(row, result) for row in (total, cpu, memory))}</div>",
            f"<div class=card><h3>Time of each phase</h3>{charts.bars(phases, result)}</div>",
            f"<div class=card><h3>Ratios: {escape(result.sides[0])} / other, below 1 it took less</h3>"
            f"{charts.forest([total, cpu, memory, *phases], result)}</div>",
            f"<div class=card>{charts.timeline(result)}"
            "<p class=small>The run of each side that took the middle time, as the host sees it: all processes of the "
            "build, the machine's QEMU among them.</p></div>",
            _runs(result),
            _side_facts(result),
        ]
    )


def _verdict(total: Row, result: Result) -> str:
    """Return what the comparison says, in one sentence for each side."""
    first = escape(result.sides[0])
    sentences = [f"{escape(failure.side)} could not build it" for failure in result.failures]
    for side in result.sides[1:]:
        ratio = total.ratios.get(side)
        if ratio is None:
            continue
        if ratio.low <= 1 <= ratio.high:
            what = f"no clear difference between {first} and {escape(side)}"
        else:
            word = "less" if ratio.value < 1 else "more"
            what = f"against {escape(side)}, {first} took {abs(1 - ratio.value):.0%} {word} time"
        sentences.append(f"{what} (ratio {ratio.value:.2f}, 95 % interval {ratio.low:.2f} to {ratio.high:.2f})")
    text = "; ".join(sentences)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _failure(failure: Failure) -> str:
    return (
        f"<details class=card open><summary>{escape(failure.side)}, {failure.run}: the build failed after "
        f"{charts.amount(failure.seconds, 's')}</summary><pre>{escape(chr(10).join(failure.words))}</pre></details>"
    )


def _tile(row: Row, result: Result) -> str:
    first, *others = result.sides
    main = row.summaries.get(first)
    value = charts.amount(main.median, row.unit) if main else "none"
    rest = [
        f"{escape(side)} {charts.amount(found.median, row.unit)}"
        for side in others
        if (found := row.summaries.get(side))
    ]
    return (
        f'<div class="card tile"><h3>{escape(row.title)}</h3>'
        f"<div class=big>{value} <small>{escape(first)}</small></div>"
        f"<div class=small>{'<br>'.join(rest)}</div></div>"
    )


def _runs(result: Result) -> str:
    """Return every run, in the order in which they were made."""
    lines = []
    for run in result.runs:
        index = result.sides.index(run.side)
        mark = f"<span class=warn>{run.other_cpu_s:.1f} s</span>" if run.disturbed else f"{run.other_cpu_s:.1f} s"
        cells = (
            f"<i class='dot s{index}'></i>{escape(run.side)} {run.number}",
            charts.amount(run.seconds, "s"),
            charts.amount(run.cpu_s, "s"),
            charts.amount(run.peak_memory_bytes, "B"),
            charts.amount(run.archive_bytes, "B"),
            mark,
        )
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in ("run", "time", "CPU", "memory", "archive", "others' CPU"))
    disturbed = sum(run.disturbed for run in result.runs)
    note = f" <span class=warn>({disturbed} disturbed by other load)</span>" if disturbed else ""
    return (
        f"<details class=card><summary>All {len(result.runs)} runs{note}</summary><div class=scroll>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div></details>"
    )


def _side_facts(result: Result) -> str:
    common = {
        "CPUs": str(result.cpus),
        "memory of the machine": charts.amount(result.memory_mib * 1024 * 1024, "B"),
        "build arguments": ", ".join(f"{key}={value}" for key, value in result.build_args.items()) or "none",
        "Dockerfile, SHA-256": result.dockerfile_sha256,
    }
    told = {f"{side}: {key}": value for side in result.sides for key, value in result.side_facts.get(side, {}).items()}
    return f"<details class=card><summary>What ran</summary>{_facts({**common, **told})}</details>"


def _facts(found: Mapping[str, str]) -> str:
    rows = "".join(f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in found.items())
    return f"<table class=facts><tbody>{rows}</tbody></table>"


def _how_to_read() -> str:
    return (
        "<h2>How to read this</h2><p>Bars are medians, the thin line on each goes from the least to the most. A ratio "
        "is the first side's median by the other's: below 1 the first is faster, or takes less. Its interval is the "
        "percentile bootstrap at 95 %; of few runs it is no wider than their extremes. CPU time and memory are those "
        "of all processes of a build, as the host counts them; memory that is a file's, such as program code, does not "
        "count. A run counts as disturbed when others took more than a tenth of the host's CPU time meanwhile.</p>"
    )
