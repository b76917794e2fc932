"""Charts of several runs: dots where the values are, and nothing drawn of what is not known."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from kl.output.report.comparisons import Bar, candidates_chart, history_chart
from kl.output.report.drawing.svg import Chart

SVG = "{http://www.w3.org/2000/svg}"


def elements(chart: Chart | None, tag: str, kind: str) -> list[ElementTree.Element]:
    """The elements of a kind, from the text of the file."""
    assert chart is not None
    root = ElementTree.fromstring(chart.svg())
    return [found for found in root.iter(f"{SVG}{tag}") if found.get("class") == kind]


def places(chart: Chart | None, tag: str = "circle", kind: str = "dot", at: str = "cx") -> list[float]:
    return [float(found.get(at, "nan")) for found in elements(chart, tag, kind)]


def test_equal_steps_of_kl_are_equal_steps_along_the_axis() -> None:
    a, b, c = places(
        candidates_chart(
            [Bar(name, value, value / 2, value * 1.5) for name, value in zip("abc", (0.2, 0.3, 0.4), strict=True)]
        )
    )
    assert b - a == pytest.approx(c - b, abs=0.15)
    assert a < b


def test_values_far_apart_stand_on_a_logarithmic_axis_and_zero_left_of_it() -> None:
    bars = [
        Bar("same", 0.0, 0.0, 0.0),
        Bar("int8", 0.002, -0.001, 0.005),
        Bar("int4", 0.02, 0.01, 0.03),
        Bar("int3", 0.2, 0.1, 0.3),
    ]
    chart = candidates_chart(bars)
    a, b, c = places(chart)
    assert b - a == pytest.approx(c - b, abs=0.15)
    (arrow,) = elements(chart, "polygon", "dot")
    assert max(float(pair.split(",")[0]) for pair in arrow.get("points", "").split()) < a
    # The lower end of int8's interval is below 0: its line ends where the axis does.
    lefts = sorted(places(chart, "line", "whisker", "x1"))
    assert lefts[0] == min(places(chart, "line", "axis", "x1"))


def test_a_name_is_text_whatever_it_holds_and_a_run_without_a_value_says_so() -> None:
    chart = candidates_chart([Bar("<script>&", 0.1, None, None), Bar("b", None, None, None)])
    texts = [found.text for found in elements(chart, "text", "")] + [
        found.text for found in elements(chart, "text", "muted")
    ]
    assert "not known" in texts
    assert chart is not None
    assert "&lt;script&gt;&amp;" in chart.svg()
    assert places(chart, "line", "whisker", "x1") == []


def test_a_history_has_a_gap_where_a_run_has_no_value() -> None:
    bars = [Bar(f"2026-11-0{day}", None if day == 3 else 0.1 * day, 0.05 * day, 0.2 * day) for day in range(1, 6)]
    chart = history_chart(bars)
    assert len(places(chart)) == 4
    assert len(elements(chart, "polyline", "line")) == 3  # two parts, and the key
    assert len(elements(chart, "polygon", "band")) == 2


def test_nothing_known_is_no_chart() -> None:
    assert candidates_chart([Bar("a", None, None, None)]) is None
    assert history_chart([Bar("a", None, None, None)]) is None
