"""The charts: their figures are those of the run, and a name is text."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from xml.etree import ElementTree

import polars as pl
import pytest

from kl.output.report.charts import report_charts
from kl.output.report.drawing.axes import spaced
from kl.output.report.drawing.scales import Counting, Linear, Log, label
from kl.output.report.drawing.svg import WIDTH, Chart
from kl.output.report.spread import edge, spread_of
from kl.statistics.dataset import summarise_dataset
from kl.statistics.summary import RunFacts
from kl.tables.responses import ResponseInfo, summarise_responses

Build = Callable[..., pl.DataFrame]
SVG = "{http://www.w3.org/2000/svg}"
FIVE = [
    ("a", "p0", 0, [1.0, 0.5]),
    ("b", "p1", 0, [2.0, 0.0]),
    ("<script>&", "p2", 0, [1.0, 1e-9]),
    ("d", "p3", 0, [2.0, None]),
    ("e", "p4", 0, [3.0, 3.0]),
]


def drawn(tokens: pl.DataFrame, *info: ResponseInfo) -> dict[str, Chart]:
    summary = summarise_dataset(tokens.lazy(), info, RunFacts("p", "q", "censored", 20, None, (), None))
    rows = summarise_responses(tokens.lazy(), info)
    return {chart.name: chart for chart in report_charts(summary, tokens.lazy(), rows.lazy())}


def test_spread_of_the_token_kl_by_hand(token_table: Build):
    tokens = token_table(FIVE).with_columns(entropy_p=pl.lit(0.26))
    found = spread_of(tokens.lazy())
    # 0 and 1e-9 are below the smallest bin; .5, 1 (twice), 2 (twice), 3 (twice)
    assert found.sizes["n"].to_list() == [2, 1, 2, 2, 2]
    assert found.sizes["bin"].to_list() == [-1, 45, 48, 50, 51]
    assert edge(45) < 0.5 < edge(46)
    assert edge(51) < 3 < edge(52)
    assert found.entropies.select("column", "n").group_by("column").sum().rows() == [(5, 9)]
    first, second = found.positions.rows(named=True)
    assert (first["first"], first["n"], first["mean"], first["lower"]) == (0, 5, pytest.approx(1.8), pytest.approx(0.9))
    # 1, 2, 1, 2, 3: variance .7, standard error sqrt(.7/5), t(.975, 4) = 2.77645
    assert first["ci_high"] == pytest.approx(1.8 + 2.77645 * (0.7 / 5) ** 0.5, abs=1e-4)
    assert (second["n"], second["mean"], second["ci_low"]) == (4, pytest.approx(3.5 / 4), None)  # four prompts


def test_positions_that_were_sampled_count_by_their_weight(token_table: Build):
    tokens = token_table([("a", "p0", 0, [1.0, 3.0])]).with_columns(pi=pl.Series([0.25, 1.0]))
    assert spread_of(tokens.lazy()).sizes["weight"].to_list() == [4.0, 1.0]


def test_nothing_is_called_certain_of_positions_that_were_not_drawn(token_table: Build):
    tokens = token_table([("a", "p0", 0, [1.0, None])]).with_columns(
        pi=pl.lit(0.5), selected=pl.Series([True, False]), kl_exact=pl.lit(None, dtype=pl.Float64)
    )
    assert drawn(tokens)["certainty"].description.startswith("Nats per token: lower bound 0.5, ")


def test_an_exact_kl_of_some_positions_is_not_marked(token_table: Build):
    whole = token_table([("a", "p0", 0, [1.0, 1.0])]).with_columns(kl_exact=pl.lit(1.25))
    assert "exact 1.25" in drawn(whole)["certainty"].description
    part = whole.with_columns(kl_exact=pl.Series([1.25, None]))
    assert "exact" not in drawn(part)["certainty"].description


def test_charts_say_the_figures_of_the_run_and_escape_names(token_table: Build):
    charts = drawn(token_table(FIVE).with_columns(entropy_p=pl.lit(0.3)))
    assert list(charts) == ["certainty", "distribution", "by-position", "by-prompt", "entropy"]
    for chart in charts.values():
        for standalone in (True, False):
            root = ElementTree.fromstring(chart.svg(standalone=standalone))
            assert root.get("role") == "img"
            named = [root.find(f"{SVG}{part}") for part in ("title", "desc")]
            assert root.get("aria-labelledby") == " ".join(part.get("id") for part in named)
            assert all(part.text for part in named)
            assert (root.find(f"{SVG}style") is not None) is standalone
    assert "estimate 1.39," in charts["certainty"].description  # 12.5 / 9
    assert "<script>& 0.5" in charts["by-prompt"].description
    bars = re.findall(r"<title>([^<]*)</title>", charts["distribution"].body)
    assert bars[0] == "below 10⁻⁶ nats: 2"
    assert "median 1, " in charts["distribution"].description


def test_an_infinite_kl_has_its_own_bar(token_table: Build):
    infinite = (pl.col("source_file") == "e") & (pl.col("position") == 0)
    tokens = token_table(FIVE).with_columns(
        kl_estimate=pl.when(~infinite).then("kl_estimate"),
        reason=pl.when(infinite).then(pl.lit("infinite")).otherwise("reason"),
        error=pl.when(infinite).then(pl.lit("Q excludes a token that P allows")).otherwise("error"),
    )
    charts = drawn(tokens)
    assert "At 1 more positions the KL is infinite" in charts["distribution"].description
    assert "limit" not in charts["certainty"].description  # an infinite mean has none
    assert "∞" in charts["by-prompt"].body
    assert "e infinite" in charts["by-prompt"].description


def test_an_infinite_kl_at_a_drawn_position_stands_for_others_as_any_does(token_table: Build):
    tokens = token_table([("a", "p", 0, [0.5, None])]).with_columns(
        pi=pl.Series([1.0, 0.25]),
        reason=pl.Series([None, "infinite"]),
        error=pl.Series([None, "Q excludes a token that P allows"]),
    )
    body = ElementTree.fromstring(drawn(tokens)["distribution"].svg())
    heights = [float(bar.get("height", 0)) for bar in body.iter(f"{SVG}rect") if bar.find(f"{SVG}title") is not None]
    assert heights[1] == pytest.approx(4 * heights[0], rel=0.01)


def test_nothing_measured_draws_nothing(token_table: Build):
    assert drawn(token_table([("a", "p", 0, [None])])) == {}
    assert drawn(token_table([])) == {}


def test_models_that_are_equal_are_drawn_too(token_table: Build):
    charts = drawn(token_table([(name, name, 0, [0.0, 0.0]) for name in "abcde"]))
    for chart in charts.values():
        assert "nan" not in ElementTree.tostring(ElementTree.fromstring(chart.svg())).decode()


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (Linear(0, 1.0, 10, 20), [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (Log(1e-4, 10, 0, 100), [1e-4, 1e-3, 1e-2, 0.1, 1, 10]),
        (Log(0.3, 4, 0, 100), [0.5, 1, 2]),
    ],
)
def test_ticks_are_round(scale: Linear | Log, expected: list[float]):
    assert scale.ticks() == pytest.approx(expected)


def test_scales_clamp_and_name_their_values():
    assert Log(0.1, 10, 0, 100)(1) == pytest.approx(50)
    assert Log(0.1, 10, 0, 100)(0.001) == 0
    assert Counting(7, 0, 30)(1) == pytest.approx(10)  # log 2 of log 8
    assert [label(value) for value in (0, 0.25, 1e-6, 2e-5, 1500)] == ["0", "0.25", "10⁻⁶", "2·10⁻⁵", "1,500"]


@pytest.mark.parametrize("at", [0.0, 0.5, 1.0])
def test_labels_of_near_places_stand_side_by_side_and_inside(at: float):
    words = ["certain 0.1776", "estimate 0.2031", "plausible limit 0.2715"]
    moved = spaced([(at * WIDTH + number, text) for number, text in enumerate(words)])
    assert [text for _, text in moved] == words
    ends = [(x - 3 * len(text), x + 3 * len(text)) for x, text in moved]  # letters are 6 wide or more
    assert ends[0][0] >= 0
    assert ends[-1][1] <= WIDTH
    assert all(before[1] < after[0] for before, after in itertools.pairwise(ends))
