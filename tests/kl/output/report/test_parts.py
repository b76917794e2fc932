"""What the page says and shows, before it is a page."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import polars as pl
import pytest

from kl.output.report.lists import both_lists
from kl.output.report.markup import link_to, tag
from kl.output.report.movers import Movers
from kl.output.report.payload import table_of, texts_of
from kl.output.report.selection import LISTS_SHOWN, LONGEST_SHOWN, TABLE_ROWS, TOKENS_SHOWN, select
from kl.output.report.verdict import verdict
from kl.output.report.visible import in_a_line, visible
from kl.statistics.dataset import summarise_dataset
from kl.statistics.intervals import Estimate, unknown_estimate
from kl.statistics.noise_floor import NoiseFloor
from kl.statistics.summary import RunFacts, Summary
from kl.tables.responses import summarise_responses
from tests.kl.output.report.made import made_run

Build = Callable[..., pl.DataFrame]
FIVE = [
    ("a", "p0", 0, [1.0, 1.0]),
    ("b", "p1", 0, [2.0, 2.0]),
    ("c", "p2", 0, [1.0, 2.0]),
    ("d", "p3", 0, [2.0, 3.0]),
    ("e", "p4", 0, [3.0, 3.0]),
]
SAME = [(name, name, 0, [0.0, 0.0]) for name in "abcde"]


def summary_of(tokens: pl.DataFrame, alignment: str = "ok") -> Summary:
    facts = RunFacts("p", "q", "censored", 20, 0.5, (), {"verdict": alignment})
    return summarise_dataset(tokens.lazy(), (), facts)


def scaled(build: Build, factor: float) -> Summary:
    return summary_of(build([(*head, [factor * value for value in kl]) for *head, kl in FIVE]))


def noise(*, above: bool | None, high: float | None = None) -> NoiseFloor:
    floor = Estimate(0.004, 0.001, 0.002, 0.006, 20, 0, 5, None, None)
    difference = replace(unknown_estimate("few"), ci_high=high)
    return NoiseFloor("p", ["p"], [], 20, 20, {}, None, floor, floor, floor, 1.0, difference, above)


def test_the_verdict_has_the_interval_and_what_is_certain(token_table: Build):
    found = verdict(summary_of(token_table(FIVE)))
    assert found.level == "differs"
    assert found.sentence == "Q differs from P by 2.00 nats a token (95 % interval 1.02 to 2.98, 5 prompts)."
    assert found.more[0] == "Whatever the lists hide, it is certainly more than 1 on these responses."


def test_what_is_certain_is_never_rounded_up(token_table: Build):
    tokens = token_table(FIVE).with_columns(kl_lower=pl.lit(0.43128))
    assert "certainly more than 0.4312 on" in verdict(summary_of(tokens)).more[0]


def test_a_bound_over_drawn_or_missing_positions_says_so(token_table: Build):
    drawn = token_table(FIVE).with_columns(pi=pl.lit(0.5), selected=pl.col("position") == 0)
    unknown = [pl.when("selected").then(name).alias(name) for name in ("kl_estimate", "kl_lower", "kl_upper_plausible")]
    sampled = verdict(summary_of(drawn.with_columns(unknown)))
    assert "certain" not in " ".join((sampled.sentence, *sampled.more))
    assert sampled.more[0].endswith("or more, by the positions that were drawn.")
    missing = verdict(summary_of(token_table([*FIVE, ("f", "p5", 0, [1.0, None])])))
    assert "at the positions measured" in missing.more[0]


def test_an_exact_kl_of_some_positions_limits_nothing(token_table: Build):
    some = token_table(SAME).with_columns(kl_exact=pl.when(pl.col("source_file") == "a").then(0.0))
    some = some.with_columns(kl_upper_plausible=pl.lit(0.5))
    assert "and at most 0.5 nats a token (plausible" in verdict(summary_of(some)).sentence


def test_too_few_prompts_have_no_interval(token_table: Build):
    found = verdict(summary_of(token_table(FIVE[:3])))
    assert found.level == "differs"
    assert "1.50 nats a token on these responses (3 prompts, at least 5 are needed for an interval)" in found.sentence


def test_equal_models_do_not_differ(token_table: Build):
    found = verdict(summary_of(token_table(SAME)))
    assert found.level == "same"
    assert found.sentence.startswith(
        "No difference between Q and P was found, and at most 0.000001 nats a token (plausible"
    )
    tokens = token_table(SAME).with_columns(kl_upper_plausible=pl.lit(None, dtype=pl.Float64))
    assert "how much it may be at most is not known" in verdict(summary_of(tokens)).sentence
    exact = token_table(SAME).with_columns(kl_exact=pl.lit(0.25))
    assert "and at most 0.25 nats a token (exact" in verdict(summary_of(exact)).sentence


def test_a_small_difference_may_be_the_services(token_table: Build):
    small = scaled(token_table, 0.001)
    assert verdict(small).level == "unclear"
    assert "which this run did not measure" in verdict(small).more[0]
    inside = verdict(replace(small, noise_floor=noise(above=False, high=0.003)))
    assert inside.level == "same"
    assert "beyond the service's own noise was found, and at most 0.003 nats a token above it" in inside.sentence
    assert "0.0040 nats a token; the difference is not above it" in " ".join(inside.more)
    assert verdict(replace(small, noise_floor=noise(above=None))).level == "unclear"
    above = verdict(replace(small, noise_floor=noise(above=True)))
    assert above.level == "differs"
    assert "the difference is above it" in " ".join(above.more)


def test_an_interval_down_to_zero_is_no_difference_for_other_prompts(token_table: Build):
    uneven = token_table([(name, name, 0, [0.02 if name != "a" else 5.0]) for name in "abcde"])
    found = verdict(summary_of(uneven))
    assert found.level == "unclear"
    assert "Other prompts may show no difference." in found.sentence


def test_an_infinite_kl_is_said_first(token_table: Build):
    first = (pl.col("source_file") == "a") & (pl.col("position") == 0)
    tokens = token_table(FIVE).with_columns(
        kl_estimate=pl.when(~first).then("kl_estimate"),
        reason=pl.when(first).then(pl.lit("infinite")),
        error=pl.when(first).then(pl.lit("Q excludes it")),
    )
    found = verdict(summary_of(tokens))
    assert found.sentence.startswith("Q differs from P without limit: at 1 of 10 positions P allows a token that Q")
    assert "certainly more than 1 " in found.more[0]


def test_bounds_without_an_estimate_are_a_verdict(token_table: Build):
    tokens = token_table(FIVE).with_columns(
        kl_estimate=pl.lit(None, dtype=pl.Float64), reason=pl.lit("short"), error=pl.lit("the list is too short")
    )
    assert verdict(summary_of(tokens)).sentence.startswith(
        "Q differs from P by certainly more than 1 nats a token; how"
    )


def test_what_was_not_measured_or_cannot_be_compared_is_no_verdict(token_table: Build):
    assert verdict(summary_of(token_table([("a", "p", 0, [None])]))).sentence.startswith("Nothing was measured")
    refused = verdict(summary_of(token_table(FIVE), "refuse"))
    assert refused.level == "unknown"
    assert "hardly speak of the same tokens" in refused.sentence


@pytest.mark.parametrize(
    ("token", "stated", "shown"),
    [
        (" the", None, " the"),
        ("a\nb", None, "a\nb"),
        ("\t\r", None, "⇥␍"),
        ("\u202eabc\u2066", None, "⟨U+202E⟩abc⟨U+2066⟩"),
        ("\u200b\u00a0\x00", None, "⟨U+200B⟩⟨U+00A0⟩⟨U+0000⟩"),
        ("\ufffd", b"\xe2\x80", "⟨E2 80⟩"),
        ("", b"\xf0", "⟨F0⟩"),
        ("\ufffd", "é".encode(), "é"),
        ("\ufffd", None, "\ufffd"),
        ("", None, "⟨empty⟩"),
        ("\u0301", None, "◌\u0301"),
        ("שלום", None, "שלום"),
        ("x" * 300, None, "x" * 200 + "…"),
    ],
)
def test_everything_in_a_token_is_seen(token: str, stated: bytes | None, shown: str):
    assert visible(token, stated) == shown


def test_blanks_are_signs_in_a_line():
    assert in_a_line(visible(" a\n")) == "␣a⏎"


def test_markup_escapes_all_that_is_not_its_own():
    assert tag("a", "<b>&", tag("i", "x"), href='"><script>') == (
        '<a href="&quot;&gt;&lt;script&gt;">&lt;b&gt;&amp;<i>x</i></a>'
    )
    assert link_to("a b/é#.json", 2, 17) == "#a%20b/%C3%A9%23.json/2/17"


def lists(p: list[tuple], q: list[tuple], key: str = "id", n_wanted: int = 0) -> pl.DataFrame:
    """Both lists of one position, an entry being (text, id, log-probability, bytes)."""
    schema = (("tokens", pl.String), ("token_ids", pl.Int64), ("logprobs", pl.Float64), ("bytes", pl.Binary))
    columns = {
        f"{side}_{name}": pl.Series([[entry[at] for entry in entries]], dtype=pl.List(kind))
        for side, entries in (("p", p), ("q", q))
        for at, (name, kind) in enumerate(schema)
    }
    frame = pl.DataFrame({"row": pl.Series([7], dtype=pl.UInt32)} | columns).with_columns(n_wanted_q=n_wanted)
    return both_lists(frame, pl.Series([key]))


def test_lists_are_matched_by_id_or_by_text_and_never_by_half_a_character():
    p = [("a", 1, -0.5, None), ("\ufffd", 2, -2.0, None), ("b", 3, -3.0, None), ("\ufffd", 4, -4.0, b"\xe2")]
    q = [("x", 1, -1.0, None), ("\ufffd", 9, -1.5, None), ("b", 8, -2.0, None), ("", 7, -3.0, b"\xe2")]
    by_id = lists(p, q)
    assert by_id.filter(pl.col("id_p") == 1).select("shown", "logprob_p", "logprob_q").row(0) == ("a", -0.5, -1.0)
    assert by_id.height == 7
    by_text = lists(p, q, "text").drop_nulls(["logprob_p", "logprob_q"])
    assert by_text.select("shown", "id_p", "id_q").rows() == [("b", 3, 8), ("⟨E2⟩", 4, 7)]


def test_a_repeated_token_counts_once_with_all_its_mass():
    merged = lists([("a", 1, -1.0, None), ("a", 1, -2.0, None)], [])
    (mass,) = merged.select(pl.col("logprob_p").exp()).to_series()
    assert (merged.height, mass) == (1, pytest.approx(0.503215, abs=1e-6))  # e^-1 + e^-2
    twice = lists([("a", 1, -1.0, None), ("a", 1, -1.0, None)], [])
    assert twice["logprob_p"].to_list() == [pytest.approx(-1.0)]  # one token that the source lists twice


@pytest.mark.parametrize(
    ("p", "q"),
    [
        (["Ġsea", "Ġa"], [" sea", " a"]),  # raw pieces of byte-level BPE, and texts
        (["x", "<|im_end|>"], ["x", "</s>"]),  # what ends the turn, by its role
    ],
)
def test_texts_are_matched_as_the_run_matches_them(p: list[str], q: list[str]):
    sides = [[(token, None, -1.0 - at, None) for at, token in enumerate(side)] for side in (p, q)]
    assert lists(*sides, key="text").drop_nulls(["logprob_p", "logprob_q"])["shown"].to_list() == p


def test_tokens_that_are_shown_alike_stay_two():
    long = ["x" * 300 + end for end in "ab"]
    assert lists([(long[0], None, -1.0, None)], [(long[1], None, -1.0, None)], key="text").height == 2
    assert lists([("\t", None, -1.0, None)], [("⇥", None, -1.0, None)], key="text").height == 2


def test_what_q_was_asked_for_by_name_limits_nothing():
    q = [("b", 2, -0.5, None), ("c", 3, -1.0, None), ("d", 4, -9.0, None)]  # d by name
    found = lists([("a", 1, -0.5, None), ("d", 4, -1.0, None)], q, n_wanted=1)
    assert found.select("cap_p", "cap_q").unique().rows() == [(-1.0, -1.0)]
    movers = Movers()
    movers.add(found.with_columns(weight=pl.lit(1.0)))
    assert {mover.token: mover.delta for mover in movers.ranked()[1]}["a"] == pytest.approx(-0.5)


def test_what_q_promotes_by_hand():
    movers = Movers()
    found = lists([("a", 1, -1.0, None), ("b", 2, -2.0, None)], [("b", 2, -0.5, None), ("c", 3, -3.0, None)])
    movers.add(found.with_columns(weight=pl.lit(1.0)))
    up, down = movers.ranked()
    # b: e^-2 → e^-.5, Δ 1.5; c: not listed by P, at most e^-2 there: −3 − (−2) < 0, so that nothing is certain
    assert [(mover.token, mover.delta, mover.n_bound) for mover in up] == [("b", pytest.approx(1.5), 0)]
    # a: Q's smallest value is −3, so that it fell by 2 at least
    assert [(mover.token, mover.delta, mover.n_bound) for mover in down] == [("a", pytest.approx(-2.0), 1)]
    assert (up[0].p, up[0].q, up[0].examples[0].row) == (pytest.approx(0.135335, abs=1e-6), pytest.approx(0.606531), 7)
    assert movers.n_positions == 1


def test_a_selection_is_bounded_and_holds_the_worst():
    run = made_run(12_000, 12, lists=False)
    rows = summarise_responses(run.tokens.lazy())
    chosen = select(run.tokens.lazy(), rows.lazy(), 20)
    assert chosen.table.height <= TABLE_ROWS
    assert chosen.tokens.height <= TOKENS_SHOWN
    assert 0.85 * LISTS_SHOWN < chosen.tokens["listed"].sum() <= LISTS_SHOWN
    worst = rows.sort("kl_mean_per_token", descending=True).head(20)
    assert chosen.windows["source_file"].to_list()[:20] == worst["source_file"].to_list()
    assert chosen.worst["kl_estimate"].to_list() == sorted(run.tokens["kl_estimate"], reverse=True)[:20]
    assert set(chosen.worst["row"]) <= set(chosen.tokens.filter("listed")["row"])
    sample = chosen.windows.filter(pl.col("why") == "sample")["source_file"].str.slice(-10, 5).cast(int).sort()
    assert sample.diff().max() <= 8  # 4,960 of 12,000, all along


def test_bounds_are_never_written_larger_than_they_are():
    run = made_run(3, 30, lists=False)
    rows = summarise_responses(run.tokens.lazy())
    chosen = select(run.tokens.lazy(), rows.lazy(), 20)
    written = [value for response in json.loads(texts_of(chosen, {}))["shown"] for value in response["lower"]]
    known = chosen.windows.join(chosen.tokens, on=["source_file", "response_idx"], maintain_order="left")["kl_lower"]
    assert all(0.998 * value <= text <= value * (1 + 1e-12) for text, value in zip(written, known, strict=True))
    table = table_of(chosen)
    known = chosen.table["kl_lower_sum"] / chosen.table["n_positions"]
    drawn = chosen.table.with_columns(n_selected=pl.lit(6), n_measured=pl.lit(6), n_missing=pl.lit(0))
    assert table_of(chosen._replace(table=drawn))["lower"] == [None] * 3  # of drawn positions it is an estimate
    assert all(text <= value * (1 + 1e-12) for text, value in zip(table["lower"], known, strict=True))


def test_a_long_response_is_shown_around_its_worst_position():
    run = made_run(1, 70_000, lists=False)
    at = run.tokens["kl_estimate"].arg_max()
    chosen = select(run.tokens.lazy(), summarise_responses(run.tokens.lazy()).lazy(), 20)
    first, end = chosen.windows.select("first", "end").row(0)
    assert first <= at < end
    assert end - first == LONGEST_SHOWN
    text = json.loads(texts_of(chosen, {}))["shown"][0]
    assert (text["first"], len(text["text"])) == (first, end - first)
