"""From records to the token table."""

import math
import time
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from kl.estimators.censored import SpreadPrior, pooled_prior
from kl.estimators.divergence import exact_kl, exact_of_padded
from kl.records import Candidate, Position, Prompt, Response, Score, ScoreFailure, Turn
from kl.tables.outliers import without_outliers
from kl.tables.pairs import pair_up
from kl.tables.schemas import TOKENS
from kl.tables.tokens import (
    Asked,
    align_response,
    identity,
    measure_paired,
    measure_response,
    response_diagnostic,
    response_spread,
)
from tests.kl.pairs import candidates, gaussian_pair, top_lists, true_divergences


def response_of(tops, sampled=None):
    chosen = [top[0] for top in tops] if sampled is None else sampled
    positions = tuple(Position(token, top) for token, top in zip(chosen, tops, strict=True))
    text = "".join(token.token for token in chosen)
    return Response("sub/a.json", 2, Prompt((Turn("user", "hi"),)), "p-model", text, positions)


def scores_of(tops):
    return [Score(f"key{t}", top) for t, top in enumerate(tops)]


PRIOR = SpreadPrior(0.3)


def measured(tops_p, scores, estimator="censored", prior=PRIOR, **more):
    return measure_response(response_of(tops_p), scores, estimator=estimator, prior=prior, **more)


@pytest.fixture(scope="module")
def pair():
    return gaussian_pair(3, 30, 400, 0.4)


@pytest.fixture(scope="module")
def tops(pair):
    return top_lists(pair[0], 20), top_lists(pair[1], 20)


OF_P = (*("source_file", "prompt_id", "response_idx", "position", "token", "token_id", "is_stop"), "logprob_p")
MEASURES = [name for name in TOKENS if name not in (*OF_P, "selected", "pi", "flags", "reason", "error")]


def assert_not_measured(row):
    assert {name for name in MEASURES if row[name] is not None} == set()


class TestTable:
    def test_has_the_stored_columns_and_one_row_per_position(self, tops):
        frame = measured(tops[0], scores_of(tops[1]))
        assert frame.schema == TOKENS
        assert frame["position"].to_list() == list(range(30))
        assert set(frame["source_file"]) == {"sub/a.json"}
        assert set(frame["response_idx"]) == {2}
        assert set(frame["prompt_id"]) == {Prompt((Turn("user", "hi"),)).prompt_id}
        assert frame["token_id"].to_list() == [top[0].token_id for top in tops[0]]
        assert set(frame["align_key"]) == {"id"}
        assert frame["pi"].to_list() == [1.0] * 30

    def test_measured_rows_have_everything_that_two_lists_determine(self, tops):
        frame = measured(tops[0], scores_of(tops[1]))
        exact = {"kl_exact", "reverse_kl_exact", "js_exact", "tv_exact"}
        open_columns = {*exact, "entropy_p_upper", "flags", "kl_set_aside", "reason", "error"}
        depends = {"kl_upper_plausible", "logprob_q", "k3", "delta_p"}
        nulls = {name for name in frame.columns if frame[name].null_count()}
        assert open_columns <= nulls <= open_columns | depends
        assert frame["entropy_p_upper"].null_count() == 30
        assert measured(tops[0], scores_of(tops[1]), vocabulary=400)["entropy_p_upper"].null_count() == 0

    def test_order_of_bounds_and_estimates_holds_in_every_row(self, tops):
        for estimator in ("censored", "floor", "lower", "bucket"):
            frame = measured(tops[0], scores_of(tops[1]), estimator)
            assert (frame["kl_lower"] <= frame["kl_censored"]).all()
            assert (frame["kl_bucket"] <= frame["kl_lower"] + 1e-9).all()
            assert (frame["kl_estimate"] <= frame["kl_upper_plausible"]).all(ignore_nulls=True)
            assert (frame["kl_estimate"] == frame[f"kl_{estimator}"].clip(lower_bound=0.0)).all()

    def test_masses_by_hand(self):
        top_p = candidates(a=math.log(0.5), b=math.log(0.25), c=math.log(0.125))
        top_q = candidates(a=math.log(0.5), d=math.log(0.25))
        row = measured([top_p], scores_of([top_q])).row(0, named=True)
        assert row["coverage_p"] == pytest.approx(0.875)
        assert row["rest_mass_q"] == pytest.approx(0.25)
        assert row["p_mass_missing_in_q"] == pytest.approx(0.375)
        assert row["q_mass_missing_in_p"] == pytest.approx(0.25)
        assert (row["k_p"], row["k_q"], row["overlap"]) == (3, 2, 1)
        assert row["same_top_token"] is True
        assert row["logprob_q"] == pytest.approx(math.log(0.5))
        assert row["k1_censored"] is False
        assert row["delta_p"] == 0.0

    def test_an_exact_value_stands_beside_the_estimate(self, pair, tops):
        kl = exact_kl(*pair)
        frame = measured(tops[0], scores_of(tops[1]), exact_kl=np.where(np.arange(30) < 10, kl, np.nan))
        plain = measured(tops[0], scores_of(tops[1]))
        assert frame["kl_estimate"].equals(plain["kl_estimate"])
        assert frame["kl_exact"].to_list() == [*kl.tolist()[:10], *[None] * 20]
        assert frame["kl_censored"].equals(plain["kl_censored"])
        assert (frame["kl_lower"] <= true_divergences(*pair)[0] + 1e-6).all()

    def test_every_exact_divergence_stands_beside_its_bound(self, pair, tops):
        asked = Asked(response_of(tops[0]), scores_of(tops[1]))
        trusted = without_outliers(pair_up([asked.answered]), PRIOR)
        exact = exact_of_padded(*pair)
        exact.reverse_kl[4] = np.inf
        frame = measure_paired(identity([asked]), trusted, estimator="censored", prior=PRIOR, exact=exact)
        for name, true in zip(("kl", "reverse_kl", "js", "tv"), true_divergences(*pair), strict=True):
            found = frame[f"{name}_exact"]
            assert [t for t, value in enumerate(found) if value is None] == ([4] if name == "reverse_kl" else [])
            assert found.fill_null(true[4]).to_list() == pytest.approx(true.tolist(), abs=1e-9)
            assert (frame[f"{name}_lower"] <= found + 1e-9).all()

    def test_values_do_not_depend_on_missing_neighbours(self, tops):
        scores = scores_of(tops[1])
        gaps = [None if t % 3 else score for t, score in enumerate(scores)]
        whole, part = measured(tops[0], scores), measured(tops[0], gaps)
        for name in MEASURES:
            if TOKENS[name] == pl.Float64:
                np.testing.assert_allclose(part[name].gather_every(3), whole[name].gather_every(3), rtol=1e-12)

    def test_the_last_position_of_a_response_that_says_so_is_its_stop(self, tops):
        response = response_of(tops[0][:3])
        for has_stop in (False, True):
            frame = measure_response(
                replace(response, has_stop=has_stop), scores_of(tops[1][:3]), estimator="censored", prior=PRIOR
            )
            assert frame["is_stop"].to_list() == [False, False, has_stop]
            assert frame["error"].null_count() == 3

    def test_codes_of_a_position_are_sorted_and_stand_at_it_whether_it_is_measured_or_not(self, tops):
        scores = [*scores_of(tops[1][:2]), None]
        frame = measured(tops[0][:3], scores, flags={0: {"truncated-p", "clipped-q"}, 2: {"retokenised"}})
        assert frame["flags"].to_list() == ["clipped-q,truncated-p", None, "retokenised"]

    def test_no_positions_give_no_rows(self):
        frame = measured([], [])
        assert frame.schema == TOKENS
        assert frame.height == 0


class TestMissing:
    def test_an_unanswered_position_keeps_its_row(self, tops):
        frame = measured(tops[0][:2], [None, scores_of(tops[1])[1]])
        row = frame.row(0, named=True)
        assert row["reason"] == "not-scored"
        assert row["logprob_p"] == pytest.approx(tops[0][0][0].logprob)
        assert_not_measured(row)
        assert frame["reason"][1] is None
        assert frame["kl_estimate"][1] is not None

    def test_a_failure_keeps_its_reason_and_its_words(self, tops):
        failure = ScoreFailure("key", "blocked", "Q refused the prompt (SAFETY).")
        row = measured(tops[0][:1], [failure]).row(0, named=True)
        assert (row["reason"], row["error"]) == ("blocked", "Q refused the prompt (SAFETY).")
        assert_not_measured(row)

    @pytest.mark.parametrize(
        ("top_p", "top_q", "reason"),
        [
            ((), candidates(a=-0.5), "empty-list-p"),
            (candidates(a=-0.5), (), "empty-list-q"),
            (candidates(a=-0.5), candidates(a=-9999.0), "empty-list-q"),
            (candidates(a=None, b=-9.0), candidates(a=-0.5), "empty-list-p"),
            (candidates(a=-0.1, b=-0.1), candidates(a=-0.5), "mass-above-1-p"),
            (candidates(a=-0.5), candidates(a=0.5), "mass-above-1-q"),
        ],
    )
    def test_a_list_without_use_is_missing_and_never_zero(self, tops, top_p, top_q, reason):
        tops_p = [tops[0][0], (*top_p,), tops[0][2]]
        response = response_of(tops_p, [Candidate("x", -0.5)] * 3)
        scores = scores_of([tops[1][0], top_q, tops[1][2]])
        frame = measure_response(response, scores, estimator="censored", prior=PRIOR)
        assert frame["reason"].to_list() == [None, reason, None]
        assert len(frame["error"][1]) > 20
        assert_not_measured(frame.row(1, named=True))
        assert frame["kl_estimate"].is_not_null().to_list() == [True, False, True]

    def test_nothing_usable_at_all(self, tops):
        frame = measured(tops[0], [None] * 30)
        assert frame.schema == TOKENS
        assert set(frame["reason"]) == {"not-scored"}
        assert response_spread(response_of(tops[0]), [None] * 30).variance.shape == (0,)
        assert response_diagnostic(response_of(tops[0]), [None] * 30).n_positions == 0
        assert align_response(response_of(tops[0]), [None] * 30) is None

    def test_a_mass_above_one_by_float32_rounding_is_measured(self):
        top = candidates(a=math.log(0.6 + 1e-6), b=math.log(0.4))
        assert measured([top], scores_of([top]))["kl_lower"].to_list() == [0.0]

    def test_short_lists_have_bounds_and_say_why_there_is_no_estimate(self, pair):
        tops_p, tops_q = top_lists(pair[0], 3), top_lists(pair[1], 3)
        frame = measured(tops_p, scores_of(tops_q))
        assert frame["kl_estimate"].null_count() == frame["kl_upper_plausible"].null_count() == 30
        assert frame["kl_lower"].null_count() == 0
        assert set(frame["reason"]) == {"short-list"}
        assert "P lists 3 and Q 3" in frame["error"][0]
        lower = measured(tops_p, scores_of(tops_q), "lower")
        assert lower["kl_estimate"].equals(frame["kl_lower"].alias("kl_estimate"))
        assert lower["reason"].null_count() == 30

    def test_too_few_shared_tokens_and_no_prior_are_not_determined(self):
        top_p = candidates(**{f"p{i}": math.log(0.15) for i in range(6)})
        top_q = candidates(**{f"q{i}": math.log(0.15) for i in range(6)})
        row = measured([top_p], scores_of([top_q]), prior=None).row(0, named=True)
        assert row["reason"] == "not-determined"
        assert row["kl_estimate"] is None
        assert row["kl_lower"] > 1

    def test_an_infinite_exact_value_is_not_written(self, tops):
        frame = measured(tops[0][:2], scores_of(tops[1][:2]), exact_kl=np.array([np.inf, 0.25]))
        assert frame["reason"].to_list() == ["infinite", None]
        assert frame["kl_exact"].to_list() == [None, 0.25]
        assert frame["kl_estimate"][0] is None
        assert frame["kl_estimate"][1] is not None
        assert frame["kl_lower"].null_count() == 0


class TestSampling:
    def test_positions_left_out_keep_their_row_and_probability(self, tops):
        selected, pi = np.arange(30) % 3 == 0, np.full(30, 1 / 3)
        scores = [score if keep else None for score, keep in zip(scores_of(tops[1]), selected, strict=True)]
        frame = measured(tops[0], scores, selected=selected, pi=pi)
        assert frame["selected"].to_list() == selected.tolist()
        assert frame["pi"].to_list() == pi.tolist()
        assert frame["reason"].null_count() == 30
        assert_not_measured(frame.row(1, named=True))
        assert frame["kl_estimate"].is_not_null().to_list() == selected.tolist()

    def test_a_selected_position_without_answer_is_missing(self, tops):
        frame = measured(tops[0][:2], [None, None], selected=np.array([True, False]), pi=np.full(2, 0.5))
        assert frame["reason"].to_list() == ["not-scored", None]

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            ({"selected": np.ones(30, dtype=bool)}, "pi is not given"),
            ({"pi": np.zeros(30)}, r"pi\[0\]=0.0"),
            ({"pi": np.full(30, np.nan)}, r"pi\[0\]=nan"),
            ({"pi": np.ones(29)}, "30 positions, pi has 29"),
            ({"exact_kl": np.ones(31)}, "30 positions, exact_kl has 31"),
            ({"estimator": "renorm"}, "Known: censored, floor, lower, bucket"),
        ],
    )
    def test_arguments_that_do_not_fit_are_refused(self, tops, more, message):
        with pytest.raises(ValueError, match=message):
            measured(tops[0], scores_of(tops[1]), **more)

    def test_a_score_too_few_is_refused(self, tops):
        with pytest.raises(ValueError, match="30 positions, scores has 29"):
            measured(tops[0], scores_of(tops[1])[:-1])


class TestTokens:
    def test_dropped_candidates_of_both_stages_are_counted(self):
        top = candidates(a=-0.5, b=-1.5, masked=-(2.0**100))
        score = Score("key", top, n_dropped=4)
        assert measured([candidates(a=-0.5, b=-1.5)], [score])["n_dropped"].to_list() == [5]

    def test_a_sampled_token_below_both_lists_is_censored_at_qs_cap(self):
        top_p, top_q = candidates(a=-0.5, b=-1.5), candidates(a=-0.6, b=-1.4)
        response = response_of([top_p], [Candidate("z", -7.0)])
        row = measure_response(response, scores_of([top_q]), estimator="lower", prior=None).row(0, named=True)
        assert row["logprob_p"] == -7.0
        assert row["logprob_q"] is None
        assert row["logratio_k1"] == pytest.approx(-5.6)
        assert row["k1_censored"] is True
        assert row["k3"] is None

    def test_a_sampled_token_without_logprob_is_found_in_the_list(self):
        top = candidates(a=-0.5, b=-1.5)
        response = response_of([top], [Candidate("b", None)])
        frame = measure_response(response, scores_of([top]), estimator="lower", prior=None)
        assert frame["logprob_p"].to_list() == [-1.5]
        assert frame["logratio_k1"].to_list() == [0.0]

    @pytest.mark.parametrize(
        ("top_p", "top_q", "same"),
        [
            (candidates(a=-0.5, b=-1.5), candidates(a=-0.6, b=-1.5), True),
            (candidates(a=-0.5, b=-1.5), candidates(b=-0.6, a=-1.5), False),
            (candidates(a=-0.9, b=-0.9), candidates(b=-0.6, a=-1.5), True),
            (candidates(a=-0.5), candidates(b=-0.6), False),
            (candidates(**{"\ufffd": -0.5, "b": -1.5}), candidates(b=-0.6), None),
            (candidates(**{"a": -0.9, "\ufffd": -0.9}), candidates(b=-0.6), None),
            (candidates(**{"a": -0.9, "\ufffd": -0.9}), candidates(a=-0.6), True),
            (candidates(a=-0.5), candidates(**{"b": -0.9, "\ufffd": -0.9}), None),
            (candidates(a=-0.5), candidates(**{"b": -0.6, "\ufffd": -0.9}), False),
        ],
        ids=["same", "other", "tie", "disjoint", "unclear", "unclear tie", "same in a tie", "q unclear", "below"],
    )
    def test_same_top_token(self, top_p, top_q, same):
        assert measured([top_p], scores_of([top_q]))["same_top_token"].to_list() == [same]

    def test_unclear_tokens_leave_valid_bounds(self):
        top_p = candidates(**{"\ufffd": math.log(0.5), "a": math.log(0.4)})
        top_q = candidates(**{"\ufffd": math.log(0.45), "a": math.log(0.4)})
        row = measured([top_p], scores_of([top_q]), "lower").row(0, named=True)
        assert row["kl_lower"] == pytest.approx(0.0, abs=1e-9)
        assert (row["ambiguous_mass_p"], row["ambiguous_mass_q"]) == (pytest.approx(0.5), pytest.approx(0.45))

    def test_a_token_that_q_may_hold_open_is_censored_at_its_largest_open_entry(self):
        top_q = candidates(**{"": math.log(0.6), "b": math.log(0.1)})
        response = response_of([candidates(a=math.log(0.5), b=math.log(0.2))])
        row = measure_response(response, scores_of([top_q]), estimator="lower", prior=None).row(0, named=True)
        assert row["k1_censored"]
        assert row["logratio_k1"] == pytest.approx(math.log(0.5 / 0.6))

    def test_nothing_is_said_by_the_usual_shortcut_where_an_entry_is_open(self):
        row = measured([candidates(a=-0.5, **{"": -1.5})], scores_of([candidates(a=-0.5, b=-1.5)]), "floor")
        assert row["kl_floor"].to_list() == [None]
        assert row["reason"].to_list() == ["short-list"]
        assert row["kl_lower"][0] == pytest.approx(0.0, abs=1e-9)

    def test_masses_above_1_and_rounded_values_are_marked_at_their_positions(self, tops):
        raised = [tuple(c._replace(logprob=c.logprob + 1e-4) for c in candidates(a=math.log(0.7), b=math.log(0.3)))]
        top_p, top_q = [*tops[0][:2], *raised], [*tops[1][:2], candidates(a=math.log(0.7), b=math.log(0.3))]
        frame = measured(top_p, scores_of(top_q), "lower")
        assert frame["flags"].to_list() == [None, None, "mass-above-1-p"]
        assert frame["coverage_p"][2] == pytest.approx(1.0001)
        assert frame["kl_lower"][2] == pytest.approx(0.0, abs=1e-12)
        rounded = [tuple(c._replace(logprob=round(c.logprob, 2)) for c in top) for top in tops[1]]
        frame = measured(tops[0], scores_of(rounded))
        assert set(frame["flags"]) == {"rounded-q"}

    def test_the_estimate_of_equal_models_is_near_0_where_a_side_hides_entries(self, tops):
        hidden = [
            tuple(c._replace(token="" if at in (0, 3, 7) else c.token, token_id=None) for at, c in enumerate(top))
            for top in tops[0]
        ]
        shown = [tuple(c._replace(token_id=None) for c in top) for top in tops[0]]
        for pair in ((hidden, shown), (shown, hidden)):
            frame = measured(pair[0], scores_of(pair[1]), prior=SpreadPrior(1e-6))
            assert frame["kl_lower"].max() <= 1e-9
            assert frame["kl_estimate"].max() <= 1e-3


def wrong_last(top, logprob, unnamed=()):
    """The list with another last value, and without the names of some entries."""
    hidden = tuple(c._replace(token="", token_id=None) if at in unnamed else c for at, c in enumerate(top))
    return (*hidden[:-1], hidden[-1]._replace(logprob=logprob))


@pytest.mark.parametrize("logprob", [-9.0, -25.0, -40.0])
@pytest.mark.parametrize("unnamed", [(), (2,), (2, 7)], ids=str)
@pytest.mark.parametrize("side", ["P", "Q"])
def test_a_wrong_last_value_is_set_aside_whatever_else_the_list_does_not_name(logprob, unnamed, side):
    logs = np.log([[0.35, 0.2, 0.12, 0.08, 0.05, 0.04, 0.03, 0.02, 0.02, 0.01]])
    (right,) = top_lists(logs, 8)
    wrong = wrong_last(right, logprob, unnamed)
    lists = (wrong, right) if side == "P" else (right, wrong)
    (row,) = measured([lists[0]], scores_of([lists[1]])).rows(named=True)
    assert row["reason"] == "outlier"
    assert row["kl_lower"] is None
    assert row["error"].startswith(f"{side}'s log-probability of ")
    assert f"{logprob:.4g}" in row["error"]


@pytest.mark.parametrize("unnamed", [(), (2,)], ids=str)
def test_impossible_last_values_that_both_lists_have_are_no_caps(unnamed):
    """Which of the lists is wrong, no comparison of the two says; neither value counts."""
    logp, logq = gaussian_pair(5, 30, 400, 0.3)
    tops = [
        [wrong_last(top, -40.0 - side, unnamed) for top in top_lists(logs, 8)] for side, logs in enumerate((logp, logq))
    ]
    table = measured(tops[0], scores_of(tops[1]), prior=None)
    assert table["reason"].drop_nulls().to_list() == []
    assert table["flags"].str.starts_with("clipped-p,clipped-q").all()
    assert (table["kl_lower"].to_numpy() <= exact_kl(logp, logq) + 1e-9).all()
    assert (table["kl_estimate"].to_numpy() < exact_kl(logp, logq) + 1.0).all()


def test_two_phases_give_what_the_pool_gives(pair, tops):
    response, scores = response_of(tops[0]), scores_of(tops[1])
    prior = pooled_prior(response_spread(response, scores))
    assert prior is not None
    assert prior.variance == pytest.approx(0.16, rel=0.2)
    frame = measure_response(response, scores, estimator="censored", prior=prior)
    assert frame["kl_estimate"].mean() == pytest.approx(true_divergences(*pair)[0].mean(), rel=0.1)


def test_time_grows_with_the_number_of_positions_only():
    logp, logq = gaussian_pair(1, 250, 500, 0.4)
    tops_p, tops_q = top_lists(logp, 20), top_lists(logq, 20)

    def seconds(repeats):
        response, scores = response_of(tops_p * repeats), scores_of(tops_q * repeats)
        start = time.process_time()
        measure_response(response, scores, estimator="censored", prior=SpreadPrior(0.2))
        return time.process_time() - start

    seconds(1)
    # Eight times the positions in eight times the time, with room for a busy machine; quadratic would be 64.
    assert min(seconds(8) for _ in range(3)) < 24 * min(seconds(1) for _ in range(3))


# What Q was asked for by name.


def with_wanted(tops_p, tops_q, logq):
    """Q's scores with its values of all tokens that P lists."""
    found = []
    for t, (top_p, top_q) in enumerate(zip(tops_p, tops_q, strict=True)):
        listed = {item.token_id for item in top_q}
        others = [item._replace(logprob=float(logq[t, item.token_id])) for item in top_p if item.token_id not in listed]
        wanted = tuple(sorted(others, key=lambda item: -item.logprob))
        found.append(Score(f"key{t}", top_q, wanted=wanted))
    return found


class TestWanted:
    def test_nothing_that_p_lists_is_missing_and_bounds_are_closer(self, pair, tops):
        plain, asked = measured(tops[0], scores_of(tops[1])), measured(tops[0], with_wanted(*tops, pair[1]))
        assert asked["overlap"].to_list() == [20] * 30
        assert asked["p_mass_missing_in_q"].to_list() == [0.0] * 30
        assert plain["p_mass_missing_in_q"].sum() > 0
        true = true_divergences(*pair)[0]
        assert (asked["kl_lower"].to_numpy() <= true + 1e-6).all()
        assert (asked["kl_lower"] >= plain["kl_lower"] - 1e-9).all()
        assert (asked["kl_estimate"] - true).pow(2).mean() < (plain["kl_estimate"] - true).pow(2).mean()
        assert (asked["q_mass_missing_in_p"] == plain["q_mass_missing_in_p"]).all()
        assert (asked["coverage_q"] > plain["coverage_q"]).any()

    def test_scores_with_and_without_wanted_tokens_stand_side_by_side(self, pair, tops):
        plain, both = measured(tops[0], scores_of(tops[1])), with_wanted(*tops, pair[1])
        some = [*both[:10], *scores_of(tops[1])[10:]]
        mixed = measured(tops[0], some)
        assert mixed["overlap"][:10].to_list() == [20] * 10
        assert mixed["kl_lower"][10:].to_list() == plain["kl_lower"][10:].to_list()

    def test_a_sampled_token_outside_both_lists_has_its_k1(self, pair, tops):
        sampled = [Candidate(f"t{399 - t}", float(pair[0][t, 399 - t]), 399 - t) for t in range(30)]
        scores = with_wanted([(*top, one) for top, one in zip(tops[0], sampled, strict=True)], tops[1], pair[1])
        frame = measure_response(response_of(tops[0], sampled), scores, estimator="censored", prior=PRIOR)
        k1 = [pair[0][t, 399 - t] - pair[1][t, 399 - t] for t in range(30)]
        assert frame["logratio_k1"].to_list() == pytest.approx(k1)
        assert not frame["k1_censored"].any()
        assert (frame["kl_lower"].to_numpy() <= true_divergences(*pair)[0] + 1e-6).all()

    @pytest.mark.parametrize("mark", [None, -9999.0, math.nan, -100.0], ids=str)
    def test_a_mark_in_place_of_a_value_is_no_value(self, pair, tops, mark):
        scores = with_wanted(*tops, pair[1])
        lost = [item.wanted[-1:] for item in scores]
        marked = [replace(item, wanted=tuple(c._replace(logprob=mark) for c in item.wanted)) for item in scores]
        frame = measured(tops[0], marked)
        plain = measured(tops[0], scores_of(tops[1]))
        assert frame["kl_lower"].to_list() == plain["kl_lower"].to_list()
        assert frame["n_dropped"].to_list() == [len(item.wanted) for item in scores]
        assert any(lost)

    def test_a_listed_token_that_is_wanted_too_counts_once(self, pair, tops):
        scores = with_wanted(*tops, pair[1])
        twice = [
            replace(item, wanted=(item.top[3]._replace(logprob=item.top[3].logprob - 0.01), *item.wanted))
            for item in scores
        ]
        assert measured(tops[0], twice)["kl_lower"].to_list() == measured(tops[0], scores)["kl_lower"].to_list()

    def test_more_than_all_probability_is_refused_at_its_position_alone(self, pair, tops):
        scores = with_wanted(*tops, pair[1])
        at = next(t for t, item in enumerate(scores) if item.wanted)
        wanted = (scores[at].wanted[0]._replace(logprob=-0.1), *scores[at].wanted[1:])
        scores[at] = replace(scores[at], wanted=wanted)
        frame = measured(tops[0], scores)
        assert frame["reason"][at] == "mass-above-1-q"
        assert "those of the tokens that it was asked for add up to 1." in frame["error"][at]
        assert frame["reason"].null_count() == 29

    def test_it_is_part_of_a_response_s_diagnostic_only_where_it_is_listed(self, pair, tops):
        plain = response_diagnostic(response_of(tops[0]), scores_of(tops[1]))
        asked = response_diagnostic(response_of(tops[0]), with_wanted(*tops, pair[1]))
        assert (asked.overlap, asked.top_absent) == (plain.overlap, plain.top_absent)
