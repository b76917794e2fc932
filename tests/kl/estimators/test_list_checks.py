"""Lists that no bound can be taken from are refused, each with its place and what to do."""

import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kl.estimators.align import align
from kl.estimators.bounds import cells, lower_bounds
from kl.estimators.list_checks import CandidateListError, listed_mass, part_appended
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
