"""Axes, keys and labels of charts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kl.output.report.drawing.scales import Counting, Linear, Log, label
from kl.output.report.drawing.svg import WIDTH, line, polyline, rect, text

LEFT, RIGHT = 52, WIDTH - 14  # of the area in which a chart with two axes is drawn
_LETTER = 6.2  # width of one, about


def bottom_axis(axis: Linear | Log | Counting, ticks: Sequence[float], y: float, name: str = "") -> str:
    """An axis along the bottom, its name below."""
    drawn = line(axis.start, y, axis.stop, y, "axis")
    for value in ticks:
        x = axis(value)
        drawn += line(x, y, x, y + 4, "axis") + text(x, y + 16, label(value), "muted", "middle")
    return drawn + (text((axis.start + axis.stop) / 2, y + 33, name, "muted", "middle") if name else "")


def left_axis(axis: Linear | Log, ticks: Sequence[float], name: str, say: Callable[[float], str] = label) -> str:
    """Lines across the drawing with their values on the left, the name above the highest."""
    drawn = "".join(
        line(LEFT, axis(value), RIGHT, axis(value), "grid")
        + text(LEFT - 5, axis(value) + 4, say(value), "muted", "end")
        for value in ticks
    )
    return drawn + text(4, axis.stop - 8, name, "muted")


def key(entries: Sequence[tuple[str, str]], x: float, y: float) -> str:
    """What the kinds of lines and areas mean, side by side."""
    drawn = ""
    for kind, words in entries:
        is_area = kind in ("band", "bar")
        drawn += rect(x, y - 9, 18, 9, kind) if is_area else polyline([(x, y - 4), (x + 18, y - 4)], kind)
        drawn += text(x + 23, y, words, "muted")
        x += 23 + _LETTER * len(words) + 16
    return drawn


def anchor(x: float) -> str:
    """How a label stands at a place so that it does not leave the drawing."""
    return "start" if x < LEFT + 14 else "end" if x > RIGHT - 14 else "middle"


def rows_of(labels: Sequence[tuple[float, str]]) -> list[int]:
    """In which row above the drawing each label, by rising place, has room."""
    ends: list[float] = []
    rows: list[int] = []
    for x, words in labels:
        width = _LETTER * len(words) + 6
        begin = {"start": x, "middle": x - width / 2, "end": x - width}[anchor(x)]
        row = next((number for number, end in enumerate(ends) if end <= begin), len(ends))
        ends[row : row + 1] = [begin + width]
        rows.append(row)
    return rows


def spaced(labels: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """The labels of one line, moved aside where one would cover another."""
    moved: list[tuple[float, str]] = []
    free = 4.0
    for x, words in sorted(labels):
        half = _LETTER * len(words) / 2
        place = max(min(x, WIDTH - half - 4), free + half)
        moved.append((place, words))
        free = place + half + 10
    end = WIDTH - 4.0
    for number, (x, words) in reversed([*enumerate(moved)]):  # back, where they left the drawing
        half = _LETTER * len(words) / 2
        moved[number] = min(x, end - half), words
        end = moved[number][0] - half - 10
    return moved
