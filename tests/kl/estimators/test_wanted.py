"""Tokens that Q was asked for by name: what is known of them, and that bounds stay certified."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kl.estimators.align import align
from kl.estimators.bounds import bucket, cells, lower_bounds
from kl.estimators.censored import SpreadEvidence, pooled_prior
from kl.estimators.diagnostic import diagnose
from kl.estimators.divergence import measure, sampled_token
from kl.estimators.list_checks import CandidateListError
from kl.estimators.outliers import find_outliers
from kl.records import Candidate
from tests.kl.pairs import candidates, gaussian_pair, log_softmax, top_lists, true_divergences

NAMES = ("kl", "reverse_kl", "js", "tv")


def wanted_lists(lists_p, lists_q, logq, sampled=()):
    """Q's values of P's tokens, and of sampled ones, that Q does not list."""
    found = []
    for t, (top_p, top_q) in enumerate(zip(lists_p, lists_q, strict=True)):
        ids = {item.token_id for item in top_p} | set(sampled[t : t + 1])
        others = [_valued(number, logq[t]) for number in ids - {item.token_id for item in top_q}]
        found.append(tuple(sorted(others, key=lambda item: -item.logprob)))
    return found


def _valued(number, logs):
    return Candidate(f"t{number}", float(logs[number]), int(number))


def _relabelled(lists, name_of):
    """The same lists under other texts, without ids."""
    return [tuple(Candidate(name_of(item.token_id), item.logprob) for item in top) for top in lists]


def _seen_to_collide(lists):
    """The tokens of every four of which a list shows that they are several; what no list shows cannot be known."""
    groups = set()
    for top in lists:
        first = {}
        for item in top:
            group = item.token_id // 4
            if first.setdefault(group, item.logprob) != item.logprob:
                groups.add(group)
    return {number for group in groups for number in range(4 * group, 4 * group + 4)}


@st.composite
def cases(draw):
    """Whole distributions: peaked, flat, tied or degenerate, P or Q cut to a few tokens; and lists of any length."""
    vocabulary = draw(st.integers(2, 40))
    logp, logq = gaussian_pair(
        draw(st.integers(0, 2**32 - 1)),
        20,
        vocabulary,
        draw(st.sampled_from([0.0, 0.05, 0.5, 2.0, 8.0])),
        zipf=draw(st.sampled_from([0.0, 1.0, 3.0])),
        spread=draw(st.sampled_from([0.1, 1.5, 6.0])),
    )
    step = draw(st.sampled_from([0.0, 0.0, 0.5, 2.0]))
    if step:
        logp, logq = (log_softmax(np.round(logs / step) * step) for logs in (logp, logq))
    for cut in draw(st.sampled_from([(), ("p",), ("q",), ("p", "q")])):
        logs = logp if cut == "p" else logq  # all but a few tokens next to nothing, as after top-p
        kept = np.argsort(-logs, axis=1) < draw(st.integers(1, 5))
        logs = log_softmax(np.where(kept, logs, logs - 40.0))
        logp, logq = (logs, logq) if cut == "p" else (logp, logs)
    return logp, logq, draw(st.integers(1, vocabulary)), draw(st.integers(1, vocabulary))


@given(cases(), st.sampled_from(["ids", "texts", "colliding texts", "hidden texts"]), st.integers(0, 2**32 - 1))
@settings(max_examples=120, deadline=None)
def test_bounds_hold_with_wanted_tokens_and_are_no_lower(case, identity, seed):
    logp, logq, k_p, k_q = case
    rng = np.random.default_rng(seed)
    lists_p, lists_q = top_lists(logp, k_p), top_lists(logq, k_q)
    sampled = rng.integers(0, logp.shape[1], len(logp)).tolist() if seed % 2 else []
    wanted = wanted_lists(lists_p, lists_q, logq, sampled)
    # A service may have no value for some of them.
    wanted = [tuple(item for item in top if rng.random() < 0.8) for top in wanted]
    if identity != "ids":
        names = {number: f"w{number}" for number in range(logp.shape[1])}
        if identity == "colliding texts":
            both = [(*top, *others) for top, others in zip(lists_q, wanted, strict=True)]
            names |= {number: f"w{number // 4}-" for number in _seen_to_collide([*lists_p, *both])}
        elif identity == "hidden texts":
            names |= {number: "\ufffd" for number in range(0, logp.shape[1], 3)}
        lists_p, lists_q, wanted = (_relabelled(lists, names.__getitem__) for lists in (lists_p, lists_q, wanted))
    without, beside = align(lists_p, lists_q), align(lists_p, lists_q, wanted_q=wanted)
    cell, cell_without = cells(beside), cells(without)
    low, fewer = lower_bounds(cell), lower_bounds(cell_without)
    for name, values, grouped, less, true in zip(
        NAMES, low, bucket(cell), fewer, true_divergences(logp, logq), strict=True
    ):
        assert (values <= true + 1e-6).all(), name
        assert (grouped <= values + 1e-9).all(), name
        if identity in ("ids", "texts"):  # what collides in a wanted token may open a listed one
            same = cell.slack == cell_without.slack  # more values may all be multiples of a step
            assert (values >= less - 1e-9)[same].all(), name
    measured = measure(beside, pooled_prior(SpreadEvidence.of(beside)))
    estimates = [*measured.censored, measured.upper_plausible]
    assert all((values[~np.isnan(values)] >= 0).all() and not np.isinf(values).any() for values in estimates)


@pytest.mark.parametrize("k_q", [1, 4, 12])
def test_what_p_lists_is_known_and_only_the_tails_are_left(k_q):
    logp, logq = gaussian_pair(3, 40, 60, 1.5)
    lists_p, lists_q = top_lists(logp, 12), top_lists(logq, k_q)
    aligned = align(lists_p, lists_q, wanted_q=wanted_lists(lists_p, lists_q, logq))
    assert aligned.overlap.tolist() == [12] * 40
    assert not len(aligned.alone_p.at)
    np.testing.assert_allclose(aligned.log_cap_q, np.sort(logq, axis=1)[:, -k_q])
    order = np.argsort(-logp, axis=1)[:, :12]
    np.testing.assert_allclose(aligned.shared_logq, np.take_along_axis(logq, order, axis=1))
    union = [{*top} | {*np.argsort(-row)[:k_q]} for top, row in zip(order.tolist(), logq, strict=True)]
    mass = [np.exp(row[[*known]]).sum() for known, row in zip(union, logq, strict=True)]
    np.testing.assert_allclose(aligned.coverage_q, mass)
    np.testing.assert_allclose(aligned.coverage_q - aligned.wanted_mass_q, np.exp(np.sort(logq)[:, -k_q:]).sum(axis=1))
    assert aligned.n_listed_q.tolist() == [len(known) for known in union]
    assert (aligned.n_wanted_q == aligned.n_listed_q - k_q).all()


def test_a_whole_list_of_p_leaves_nothing_open():
    logp, logq = gaussian_pair(5, 10, 15, 1.0)
    lists_p, lists_q = top_lists(logp, 15), top_lists(logq, 2)
    aligned = align(lists_p, lists_q, wanted_q=wanted_lists(lists_p, lists_q, logq))
    for low, true in zip(lower_bounds(cells(aligned, slack=1e-9)), true_divergences(logp, logq), strict=True):
        np.testing.assert_allclose(low, true, atol=1e-6)


def test_no_wanted_token_is_the_same_as_none_asked():
    logp, logq = gaussian_pair(7, 30, 50, 0.8)
    lists_p, lists_q = top_lists(logp, 10), top_lists(logq, 10)
    plain, asked = align(lists_p, lists_q), align(lists_p, lists_q, wanted_q=[()] * 30)
    prior = pooled_prior(SpreadEvidence.of(plain))
    for one, other in zip(measure(plain, prior).censored, measure(asked, prior).censored, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_cap_is_that_of_the_k_best_unless_a_wanted_value_is_above_it():
    p = candidates(a=-0.5, b=-2.0, c=-3.0)
    q = candidates(a=-0.7, d=-1.6)
    aligned = align([p, p], [q, q], wanted_q=[candidates(b=-4.0, c=-9.0), candidates(b=-1.5)])
    assert aligned.log_cap_q.tolist() == [-1.6, -1.5]  # of two askings that disagree, the larger value is safe
    assert aligned.n_wanted_q.tolist() == [2, 1]
    assert aligned.overlap.tolist() == [3, 2]


def test_a_sampled_token_outside_both_lists_is_known_and_bounds_p():
    p = candidates(a=-0.5, b=-2.0)
    q = candidates(a=-0.7, d=-1.6)
    sampled = Candidate("z", -5.0)
    aligned = align([p], [q], [sampled], wanted_q=[candidates(b=-4.0, z=-6.5)])
    found = sampled_token(aligned)
    assert (found.k1[0], bool(found.censored[0])) == (1.5, False)
    cell = cells(aligned)
    assert cell.n_b.tolist() == [2]
    # Of one that Q may give at most its cap, only a limit of k1 is known.
    hidden = sampled_token(align([p], [q], [sampled], wanted_q=[candidates(b=-4.0)]))
    assert (round(float(hidden.k1[0]), 9), bool(hidden.censored[0])) == (-3.4, True)


def test_an_entry_that_names_no_token_is_open_mass_and_no_cap():
    p = candidates(a=-0.5, b=-2.0, c=-3.0)
    q = candidates(a=-0.7, d=-1.6)
    wanted = (Candidate("\ufffd", -3.0), Candidate("c", -4.0))
    aligned = align([p], [q], wanted_q=[wanted])
    assert aligned.open_q[0] == pytest.approx(np.exp(-3.0))
    assert not np.isfinite(aligned.log_open_q).any()
    assert (aligned.n_wanted_q[0], aligned.overlap[0]) == (1, 2)
    assert aligned.wanted_mass_q[0] == pytest.approx(np.exp(-3.0) + np.exp(-4.0))
    assert aligned.coverage_q[0] == pytest.approx(np.exp([-0.7, -1.6, -3.0, -4.0]).sum())


def test_a_text_that_two_tokens_have_names_neither():
    p = candidates(a=-0.5, b=-2.0, c=-3.0)
    q = (Candidate("a", -0.7), Candidate("b", -1.6))
    aligned = align([p], [q], wanted_q=[(Candidate("b", -3.0), Candidate("c", -4.0))])
    assert aligned.overlap[0] == 2  # a and c
    assert aligned.log_open_q[0].tolist() == [-1.6]
    assert aligned.open_q[0] == pytest.approx(np.exp(-1.6) + np.exp(-3.0))


@pytest.mark.parametrize("stop", ["</s>", "<|turn_over|>"])
@pytest.mark.parametrize("by", ["bytes", "text"])
def test_a_stop_is_matched_by_its_role_though_q_s_vocabulary_has_its_name(stop, by):
    def listed(**probabilities):
        return tuple(
            Candidate(text, float(np.log(value)), None, text.encode() if by == "bytes" else None)
            for text, value in probabilities.items()
        )

    p, q = listed(**{stop: 0.9, " a": 0.05, " b": 0.02}), listed(**{"<|im_end|>": 0.9, " a": 0.05, " b": 0.02})
    for wanted in ((), listed(**{stop: 1e-9})):
        aligned = align([p], [q], p[:1], None, [True], None, [wanted])
        assert aligned.choices[0].key == by
        assert aligned.overlap[0] == 3
        assert aligned.logq_sampled[0] == pytest.approx(np.log(0.9))
        assert lower_bounds(cells(aligned)).kl[0] == pytest.approx(0, abs=1e-9)
    # A name that Q lists is Q's own.
    own = align([p], [(*q, *listed(**{stop: 0.01}))], p[:1], None, [True])
    assert own.logq_sampled[0] == pytest.approx(np.log(0.01))


def test_the_verdict_on_the_vocabularies_counts_what_q_lists():
    logp, logq = gaussian_pair(11, 20, 40, 1.0)
    lists_p, lists_q = top_lists(logp, 8), top_lists(logq, 8)
    asked = wanted_lists(lists_p, lists_q, logq)
    plain, beside = diagnose(align(lists_p, lists_q)), diagnose(align(lists_p, lists_q, wanted_q=asked))
    assert (beside.n_shared, beside.n_listed, beside.n_top_absent) == (
        plain.n_shared,
        plain.n_listed,
        plain.n_top_absent,
    )
    assert beside.shared_mass_p == pytest.approx(plain.shared_mass_p)
    assert beside.keys_q == plain.keys_q


def test_values_far_below_the_list_are_no_outliers_of_its_order():
    logp, logq = gaussian_pair(13, 60, 400, 0.3)
    lists_p, lists_q = top_lists(logp, 20), top_lists(logq, 20)
    wanted = [
        tuple(item._replace(logprob=item.logprob - 3.0) for item in top) for top in wanted_lists(lists_p, lists_q, logq)
    ]
    aligned = align(lists_p, lists_q, wanted_q=wanted)
    prior = pooled_prior(SpreadEvidence.of(align(lists_p, lists_q)))
    assert not [item for item in find_outliers(aligned, prior) if item.certain and item.side == "Q"]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (candidates(b=None), "unknown values"),
        (candidates(b=-3.0, c=-2.0), "does not fall"),
        (candidates(b=-0.1), "adds up to 1.60"),
    ],
    ids=["unknown", "rising", "above 1"],
)
def test_what_cannot_be_used_is_refused(wanted, message):
    p, q = candidates(a=-0.5, b=-2.0), candidates(a=-0.7, d=-1.6)
    with pytest.raises(CandidateListError, match=message):
        align([p], [q], wanted_q=[wanted])


def test_one_list_for_each_position():
    p = candidates(a=-0.5, b=-2.0)
    with pytest.raises(ValueError, match="2 lists of wanted tokens for 1 lists"):
        align([p], [p], wanted_q=[(), ()])


def test_q_s_own_tokens_are_not_taken_for_p_s():
    """The tokens that P chose are low under Q on average; those that Q lists are not, and stay what they seemed."""
    logp, logq = gaussian_pair(17, 400, 300, 2.0)
    lists_p, lists_q = top_lists(logp, 20), top_lists(logq, 20)
    plain, beside = align(lists_p, lists_q), align(lists_p, lists_q, wanted_q=wanted_lists(lists_p, lists_q, logq))
    true = true_divergences(logp, logq)
    errors = []
    for aligned in (plain, beside):
        found = measure(aligned, pooled_prior(SpreadEvidence.of(aligned))).censored
        errors.append(
            [np.sqrt(np.mean((found.kl - true[0]) ** 2)), np.sqrt(np.mean((found.reverse_kl - true[1]) ** 2))]
        )
    assert errors[1][0] < 0.6 * errors[0][0]
    assert errors[1][1] < 1.05 * errors[0][1]
