"""Charts of several runs: candidates against one P, and the runs of a schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from kl.output.digits import rounded
from kl.output.report.drawing.axes import LEFT, RIGHT, bottom_axis, key, left_axis
from kl.output.report.drawing.scales import Linear, Log
from kl.output.report.drawing.svg import WIDTH, Chart, circle, line, polygon, polyline, text

_SMALLEST = 1e-12  # nats; an axis of only zeros has some length
_LOG_FROM = 20.0  # times between the smallest and the largest, from which on a linear axis hides the small ones
_ROW = 22
_NAME_END = 186
_LONGEST_NAME = 28


class Bar(NamedTuple):
    """A mean with its interval, in nats, under a name; ``None`` is not known."""

    name: str
    value: float | None
    low: float | None
    high: float | None


def candidates_chart(rows: Sequence[Bar]) -> Chart | None:
    """Dots with intervals, one row each, in the order given: the KL per token of candidates for one P."""
    known = [row.value for row in rows if row.value is not None]
    if not known:
        return None
    positive = [value for value in known if value > 0]
    highs = [row.high for row in rows if row.high is not None]
    start, stop = _NAME_END + 12, WIDTH - 66
    name = "KL(P‖Q), nats per token"
    if positive and max(positive) >= _LOG_FROM * min(positive):
        lows = [row.low for row in rows if row.low is not None and row.low > 0]
        least = 10.0 ** math.floor(math.log10(min([*positive, *lows])))
        name += " (logarithmic)"
        axis: Linear | Log = Log(least, max([*known, *highs]) * 1.1, start, stop)
    else:
        lows = [row.low for row in rows if row.low is not None]
        axis = Linear(min([0.0, *lows]), max([*known, *highs, _SMALLEST]) * 1.02, start, stop)
    bottom = 12 + _ROW * len(rows)
    body = "".join(_row(row, axis, 12 + _ROW * number + _ROW / 2) for number, row in enumerate(rows))
    body += bottom_axis(axis, axis.ticks(4), bottom, name)
    body += key([("whisker", "95 % interval over prompts")], 8, bottom + 54)
    told = "; ".join(f"{row.name} {_told(row)}" for row in rows)
    return Chart("candidates", "Candidates, the nearest to P first", f"Nats per token: {told}.", bottom + 62, body)


def _row(row: Bar, axis: Linear | Log, y: float) -> str:
    name = row.name if len(row.name) <= _LONGEST_NAME else f"{row.name[:14]}…{row.name[-13:]}"
    drawn = text(_NAME_END, y + 4, name, "", "end") + line(axis.start, y, axis.stop, y, "grid")
    if row.value is None:
        return drawn + text(WIDTH - 4, y + 4, "not known", "muted", "end")
    if row.low is not None and row.high is not None:
        drawn += line(axis(row.low), y, axis(row.high), y, "whisker")
        drawn += "".join(line(axis(end), y - 4, axis(end), y + 4, "whisker") for end in (row.low, row.high))
    x = axis(row.value)
    if row.value < axis.low:  # 0, for which a logarithmic axis has no place
        drawn += polygon([(x - 9, y), (x - 1, y - 5), (x - 1, y + 5)], "dot")
    else:
        drawn += circle(x, y, 4.5, "dot", f"{row.name}: {_told(row)}")
    return drawn + text(WIDTH - 4, y + 4, f"{row.value:.3g}", "muted", "end")


def _told(row: Bar) -> str:
    if row.value is None:
        return "not known"
    interval = "" if row.low is None or row.high is None else f" ({rounded(row.low)} to {rounded(row.high)})"
    return f"{rounded(row.value)}{interval}"


def history_chart(rows: Sequence[Bar]) -> Chart | None:
    """The KL per token of run after run, with a band for the intervals; a run without a value leaves a gap."""
    known = [row for row in rows if row.value is not None]
    if not known:
        return None
    lows = [row.low for row in known if row.low is not None]
    tops = [max(row.value or 0.0, row.high or 0.0) for row in known]
    top, bottom = 26, 176
    axis = Linear(min([0.0, *lows]), max([*tops, _SMALLEST]) * 1.02, bottom, top)
    place = Linear(0, max(len(rows) - 1, 1), LEFT, RIGHT)
    body = left_axis(axis, axis.ticks(4), "KL(P‖Q), nats per token")
    for part in _without_gaps(rows):
        whole = [(place(n), axis(row.low), axis(row.high)) for n, row in part if row.low is not None and row.high]
        if len(whole) == len(part) > 1:
            upper, lower = [(x, high) for x, _, high in whole], [(x, low) for x, low, _ in whole]
            body += polygon([*upper, *reversed(lower)], "band")
        points = [(place(n), axis(row.value or 0.0)) for n, row in part]
        body += polyline(points, "line")
        body += "".join(
            circle(x, y, 3, "dot", f"{row.name}: {_told(row)}") for (x, y), (_, row) in zip(points, part, strict=True)
        )
    body += text(LEFT, bottom + 18, rows[0].name, "muted") + text(RIGHT, bottom + 18, rows[-1].name, "muted", "end")
    body += key([("line", "a run"), ("band", "95 % interval over prompts")], LEFT, bottom + 42)
    last = known[-1]
    about = f"{len(known):,} runs, {rows[0].name} to {rows[-1].name}; the last one known: {_told(last)} nats per token."
    return Chart("history", "KL per token, run after run", about, bottom + 50, body)


def _without_gaps(rows: Sequence[Bar]) -> list[list[tuple[int, Bar]]]:
    """The runs with a value, by their number, divided where one has none."""
    parts: list[list[tuple[int, Bar]]] = [[]]
    for number, row in enumerate(rows):
        if row.value is None:
            parts.append([])
        else:
            parts[-1].append((number, row))
    return [part for part in parts if part]
