"""Lists that no bound can be taken from are refused, each with its place and what to do."""

import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kl.estimators.align import align, with_hidden
from kl.estimators.bounds import cells, lower_bounds
from kl.estimators.comparison import compare
from kl.estimators.list_checks import (
    CandidateListError,
    common_floors,
    listed_mass,
    part_appended,
    rounding_step,
    truncated,
    trusted,
)
from kl.records import Candidate
from tests.kl.pairs import candidates, gaussian_pair, top_lists, true_divergences

GOOD = candidates(a=-0.5, b=-1.5)


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ((), "is empty"),
        (candidates(a=-0.5, b=None), "has None at 'b', entry 1"),
        (candidates(a=math.nan), "has nan at 'a', entry 0"),
        (candidates(a=-0.5, b=-9999.0), r"has -9999\.0 at 'b', entry 1"),
        (candidates(a=-0.5, b=-math.inf), "has -inf at 'b', entry 1"),
        (candidates(b=-4.0, a=-0.5), r"does not fall: -4\.0 stands before -0\.5 at 'a', entry 1"),
        (candidates(a=math.log(0.93), b=math.log(0.93)), r"adds up to 1\.8600, not one distribution"),
        (candidates(a=math.inf), "adds up to inf"),
    ],
)
@pytest.mark.parametrize("side", ["P", "Q"])
def test_a_bad_list_is_refused_with_position_side_and_value(bad, problem, side):
    lists = [GOOD, GOOD, bad]
    sides = (lists, [GOOD] * 3) if side == "P" else ([GOOD] * 3, lists)
    with pytest.raises(CandidateListError, match=f"position 2: the list of {side} {problem}") as caught:
        align(*sides)
    assert (caught.value.position, caught.value.side) == (2, side)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize(
    "fine",
    [
        candidates(a=0.0),
        candidates(a=math.log(0.5), b=math.log(0.5)),
        candidates(a=1e-7),
        candidates(a=math.log(0.605), b=math.log(0.4)),
        (Candidate("x", math.log(0.6), 5), Candidate("x", math.log(0.6), 5)),
        candidates(a=-0.1, b=-999.0),
    ],
    ids=["certain", "equal", "rounded above 1", "two decimals", "one token twice", "hardly possible"],
)
def test_what_rounding_makes_of_a_list_is_let_through(fine):
    assert align([fine], [fine]).coverage_p[0] == pytest.approx(listed_mass(fine))


def test_other_numbers_of_sampled_tokens_are_refused():
    with pytest.raises(ValueError, match="1 sampled tokens for 2 lists"):
        align([GOOD] * 2, [GOOD] * 2, [None])


class TestAppended:
    RARE = Candidate("z", -9.0)

    def parted(self, lists, sampled):
        found = part_appended(lists, sampled)
        return [len(top) for top in found.lists], found.added

    def test_a_list_longer_than_the_others_loses_its_sampled_end(self):
        lists = [GOOD, (*GOOD, self.RARE), GOOD]
        assert self.parted(lists, [GOOD[0], self.RARE, GOOD[0]]) == ([2, 2, 2], [None, self.RARE, None])

    def test_a_sampled_end_in_a_list_as_long_as_another_stays(self):
        assert self.parted([GOOD, GOOD], [GOOD[0], GOOD[1]]) == ([2, 2], [None, None])

    def test_with_nothing_to_compare_with_the_doubtful_end_goes(self):
        assert self.parted([(*GOOD, self.RARE)], [self.RARE]) == ([2], [self.RARE])

    def test_an_end_more_probable_than_all_that_is_left_is_in_its_place(self):
        whole = candidates(yes=math.log(0.7), no=math.log(0.3))
        assert self.parted([whole], [whole[1]]) == ([2], [None])

    def test_an_only_entry_stays(self):
        assert self.parted([(self.RARE,)], [self.RARE]) == ([1], [None])

    def test_an_unknown_sampled_token_says_nothing(self):
        lists = [(*GOOD, self.RARE), GOOD]
        assert self.parted(lists, [None, None]) == ([3, 2], [None, None])
        assert self.parted([(*GOOD, self.RARE)] * 2, [None, self.RARE]) == ([3, 2], [None, self.RARE])

    def test_other_ids_of_one_text_are_in_doubt_too(self):
        other = self.RARE._replace(token_id=7)
        assert self.parted([(*GOOD, other)], [self.RARE._replace(token_id=3)]) == ([2], [other])

    @given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.sampled_from([8, 30]), st.integers(1, 10))
    @settings(max_examples=60, deadline=None)
    def test_bounds_are_certified_whatever_token_was_added(self, seed, k, vocabulary, n):
        logp, logq = gaussian_pair(seed, n, vocabulary, 0.7, zipf=0.5)
        drawn = np.random.default_rng(seed).integers(0, vocabulary, n)
        sampled = [Candidate(f"t{i}", float(row[i]), int(i)) for i, row in zip(drawn, logp, strict=True)]
        lists = [part_appended(with_sampled(top_lists(logs, k), sampled, logs), sampled).lists for logs in (logp, logq)]
        low = lower_bounds(cells(align(*lists)))
        for found, true in zip(low, true_divergences(logp, logq), strict=True):
            assert (found <= true + 1e-9).all()


def with_sampled(lists, sampled, logs):
    """As a server writes them that adds the sampled token where it is not among the k best."""
    own = [token._replace(logprob=float(row[token.token_id])) for token, row in zip(sampled, logs, strict=True)]
    return [top if token in top else (*top, token) for top, token in zip(lists, own, strict=True)]


# Lists whose values are no probabilities.

FLAT = (-1.0, -2.0, -3.0, -4.0, -5.0, -6.0)  # holds .58


def valued(*logprobs):
    return tuple(Candidate(f"t{i}", value, i) for i, value in enumerate(logprobs))


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        pytest.param(FLAT, 6, id="whole"),
        pytest.param((*FLAT, -100.0), 6, id="clipped once"),
        pytest.param((*FLAT, -100.0, -100.0, -100.0), 6, id="clipped often"),
        pytest.param((*FLAT, -100.0, -500.0), 6, id="clipped at two values"),
        pytest.param((*FLAT, -17.3, -18.1), 6, id="contradicted by the mass left"),
        pytest.param((*FLAT, -17.3), 7, id="one alone, which may be wrong: judged by both lists"),
        pytest.param((*FLAT, -63.21, -63.21), 6, id="shared, far below what lists reach"),
        pytest.param((-1e-9, -22.0, -35.5, -41.7), 4, id="peaked"),
        pytest.param((-1e-9, -22.0, -61.7), 3, id="peaked, one real value far below"),
        pytest.param((-1e-9, -22.0, -100.0), 2, id="peaked and clipped"),
        pytest.param((-0.5, -1.5, -2.25, -2.25, -2.25), 5, id="ties of bfloat16"),
        pytest.param((0.0, -5.6, -12.99), 3, id="two decimals: what is left is their rounding"),
        pytest.param((-0.01, -5.6, -100.0), 2, id="two decimals and clipped"),
    ],
)
def test_a_floor_is_taken_out_of_a_list_and_nothing_of_one_that_is_whole(values, kept):
    found = trusted(valued(*values))
    assert len(found.candidates) == kept
    assert (found.n_clipped, found.is_degenerate) == (len(values) - kept, False)
    assert found.floor == (None if kept == len(values) else values[kept])


def test_a_value_that_several_lists_end_with_several_times_is_a_floor():
    floor = math.log(1e-10)
    clipped = [valued(-1e-9, -20.5, floor, floor, floor), valued(-1e-8, -18.7, -22.1, *[floor] * 4)]
    others = [valued(*FLAT), valued(-1e-9, -20.0, -20.5)]
    assert common_floors([*clipped, *others]) == {floor}
    assert [len(trusted(top, floors=common_floors(clipped)).candidates) for top in clipped] == [2, 3]
    assert common_floors([clipped[0], *others]) == frozenset()  # as ties may be
    ties = [valued(-0.5, -1.5, -4.25, -4.25, -4.25), valued(-0.6, -1.5, -4.25, -4.25, -4.25)]
    assert common_floors(ties) == frozenset()
    assert common_floors([*clipped, *[valued(*FLAT)] * 30]) == frozenset(), "by chance, at two positions of many"


def test_only_values_that_are_multiples_are_rounded():
    certain = [valued(-1e-3 * rank / 7) for rank in range(1, 31)]
    assert rounding_step(certain) == 0, "near 0, which is a multiple of every step"
    single = np.round(-np.linspace(0.31, 9.4, 30), 2).astype(np.float32)
    assert rounding_step([valued(*map(float, single))]) == 0.01
    assert rounding_step([valued(*map(float, single), -9.50213)]) == 0
    assert rounding_step([valued(*map(float, single[:19]), 0.0)]) == 0, "too few to tell"


@pytest.mark.parametrize(
    ("values", "n_dropped", "is_degenerate"),
    [
        ((0.0,), 19, True),
        ((-1e-7,), 1, True),
        ((0.0,), 0, False),  # a list of one
        ((-0.01,), 19, False),  # the others are not known
        ((0.0, -100.0, -100.0), 0, True),
        ((-1e-7, *[-16.1] * 4), 0, True),
        ((-1e-7, -16.1, -16.1, -16.1, -17.0), 0, False),
        ((-0.5, -1.0, -100.0), 0, False),
        ((-30.0,), 0, True),  # a most probable token has a millionth at least
    ],
)
def test_one_token_with_everything_and_marks_for_the_rest_are_no_distribution(values, n_dropped, is_degenerate):
    assert trusted(valued(*values), n_dropped).is_degenerate is is_degenerate


def renormalised(values, n):
    mass = math.fsum(math.exp(value) for value in values[:n])
    return trusted(valued(*(value - math.log(mass) for value in values[:n])))


def test_lists_that_leave_nothing_where_something_must_be_left_are_of_a_truncated_law():
    cut = [renormalised(FLAT, n) for n in (6, 3, 2, 1)]
    assert truncated(cut) == [True] * 4
    raw = [trusted(valued(*FLAT)), trusted(valued(-0.5, -1.5, -3.0)), None]
    assert truncated(raw) == [False] * 3
    peaked = [trusted(valued(-1e-9, -21.0, -22.0)), trusted(valued(math.log(0.6), math.log(0.4), -21.0, -22.0))]
    assert truncated(peaked) == [False] * 2
    assert truncated([*raw, *raw, cut[0]]) == [False] * 7  # one of several, by chance
    assert truncated([*raw[:2], *cut]) == [False, False, True, True, True, True]


@given(st.integers(0, 10**6), st.integers(5, 12), st.data())
@settings(max_examples=200)
def test_bounds_hold_where_values_that_the_mass_contradicts_were_taken_out(seed, k, data):
    logp, logq = gaussian_pair(seed, 1, 60, 0.7)
    (top_p,), (top_q,) = top_lists(logp, k), top_lists(logq, k)
    wrong = data.draw(st.sets(st.integers(0, k - 1), min_size=2, max_size=k - 1))
    spoilt = [c._replace(logprob=-41.7 - i) if i in wrong else c for i, c in enumerate(top_p)]
    found_p = trusted(tuple(sorted(spoilt, key=lambda c: -c.logprob)))
    assert found_p.n_clipped == len(wrong)
    known = align([found_p.candidates], [top_q])
    hidden_p, hidden_q = (np.array([item.largest_hidden or 0.0]) for item in (found_p, trusted(top_q)))
    lower = lower_bounds(cells(with_hidden(known, hidden_p, hidden_q)))
    kl, reverse, _, tv = true_divergences(logp, logq)
    assert lower.kl[0] <= kl[0] + 1e-6
    assert lower.reverse_kl[0] <= reverse[0] + 1e-6
    assert lower.tv[0] <= tv[0] + 1e-6


def test_marks_are_taken_out_of_lists_that_are_compared_and_degenerate_ones_refused():
    whole, clipped = valued(*FLAT), (*valued(*FLAT), Candidate("x", -100.0, 90), Candidate("y", -100.0, 91))
    assert compare([clipped], [whole], prior=None).kl_lower[0] == pytest.approx(0, abs=1e-9)
    with pytest.raises(CandidateListError, match="position 0: the list of Q gives one token everything"):
        compare([whole], [(Candidate("a", 0.0, 1), *[Candidate("b", -100.0, i) for i in (2, 3)])])
