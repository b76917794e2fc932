"""Matching the tokens of two lists."""

import math

import numpy as np
import pytest

from kl.estimators.align import align
from kl.estimators.token_bytes import byte_functions
from kl.estimators.token_keys import KeyChoice, choose_key, listed
from kl.records import END_TOKENS, Candidate
from tests.kl.pairs import candidates, gaussian_pair, top_lists


def with_ids(**entries):
    return tuple(Candidate(token, logprob, token_id) for token, (logprob, token_id) in entries.items())


def choice(p, q):
    return choose_key(p, q, *byte_functions(p, q))


def pairs_of(aligned, t=0):
    """(P's, Q's) log-probabilities of the matched tokens of one position."""
    row = aligned.index_q[t]
    return [(float(aligned.logp[t, i]), float(aligned.logq[t, row[i]])) for i in np.flatnonzero(row >= 0)]


class TestListed:
    def test_sorts_by_falling_logprob(self):
        assert [c.token for c in listed(candidates(b=-2.0, a=-0.5)).candidates] == ["a", "b"]

    def test_a_logprob_of_zero_is_a_certain_token(self):
        assert listed(candidates(a=0.0)).candidates == candidates(a=0.0)

    @pytest.mark.parametrize("sentinel", [-1000.0, -9999.0, -(2.0**100), -math.inf])
    def test_a_sentinel_is_dropped_and_counted(self, sentinel):
        side = listed(candidates(a=-0.5, masked=sentinel, b=-2.0))
        assert [c.token for c in side.candidates] == ["a", "b"]
        assert side.n_dropped == 1

    def test_a_very_unlikely_token_is_kept(self):
        assert len(listed(candidates(a=-0.5, b=-999.0)).candidates) == 2

    @pytest.mark.parametrize("unknown", [None, math.nan])
    def test_an_unknown_logprob_ends_the_list_because_nothing_below_bounds_it(self, unknown):
        side = listed(candidates(a=-0.5, b=unknown, c=-9.0))
        assert [c.token for c in side.candidates] == ["a"]
        assert side.n_dropped == 2


class TestChooseKey:
    def test_ids_of_one_tokenizer(self):
        p = [with_ids(a=(-0.5, 1), b=(-2.0, 2))]
        q = [with_ids(b=(-0.7, 2), a=(-1.5, 1))]
        assert choice(p, q) == KeyChoice("id", 2, 0)

    def test_equal_texts_with_other_ids_are_other_tokenizers(self):
        p = [with_ids(a=(-0.5, 1), b=(-2.0, 2))]
        q = [with_ids(a=(-0.5, 7), b=(-2.0, 9))]
        assert choice(p, q) == KeyChoice("text", 2, 2)

    def test_one_mismatch_in_a_hundred_is_tolerated_and_two_are_not(self):
        p = [tuple(Candidate(f"t{i}", -0.1 - i, i) for i in range(100))]
        q = [tuple(c._replace(token_id=500) if c.token == "t3" else c for c in p[0])]
        assert choice(p, q).key == "id"
        q = [tuple(c._replace(token_id=501) if c.token == "t5" else c for c in q[0])]
        assert choice(p, q) == KeyChoice("text", 100, 2)

    def test_equal_ids_with_other_texts_and_no_text_in_common_are_other_tokenizers(self):
        assert choice([with_ids(a=(-0.5, 1))], [with_ids(x=(-0.5, 1))]).key == "text"

    def test_ids_that_no_text_proves_are_not_used(self):
        assert choice([with_ids(a=(-0.5, 1))], [with_ids(x=(-0.5, 4))]) == KeyChoice("text", 0, 0)

    def test_unclear_texts_are_no_evidence(self):
        p = [(Candidate("\ufffd", -0.5, 1), Candidate("", -1.0, 2), Candidate("a", -2.0, 3))]
        q = [(Candidate("\ufffd", -0.5, 9), Candidate("", -1.0, 8), Candidate("a", -2.0, 3))]
        assert choice(p, q) == KeyChoice("id", 1, 0)

    def test_raw_pieces_are_compared_as_text(self):
        p = [with_ids(**{"▁the": (-0.5, 1), "a": (-2.0, 2)})]
        q = [with_ids(**{" the": (-0.7, 1), "a": (-1.5, 2)})]
        assert choice(p, q) == KeyChoice("id", 2, 0)

    def test_one_missing_id_makes_ids_unusable(self):
        p = [with_ids(a=(-0.5, 1))]
        assert choice(p, [candidates(a=-0.5)]).key == "text"

    def test_bytes_on_both_sides_come_before_text(self):
        p = [(Candidate("a", -0.5, token_bytes=b"a"),)]
        assert choice(p, p).key == "bytes"
        assert choice(p, [candidates(a=-0.5)]).key == "text"


class TestKeys:
    def test_an_empty_text_with_an_id_is_a_token_like_others(self):
        p = [(Candidate("", -0.9, 0), Candidate("a", -1.5, 7), Candidate("<ctrl95>", -2.0, 95))]
        q = [(Candidate("", -0.7, 0), Candidate("a", -1.9, 7), Candidate("<ctrl63>", -2.5, 63))]
        aligned = align(p, q)
        assert pairs_of(aligned) == [(-0.9, -0.7), (-1.5, -1.9)]
        assert aligned.open_p[0] == aligned.open_q[0] == 0.0

    def test_blanks_are_never_stripped(self):
        aligned = align([candidates(**{" a": -0.5, "b\n": -2.0})], [candidates(**{"a": -0.5, "b": -2.0})])
        assert aligned.overlap[0] == 0

    @pytest.mark.parametrize(("raw", "text"), [("▁the", " the"), ("Ġthe", " the"), ("Ġ", " ")])
    def test_raw_pieces_meet_text(self, raw, text):
        for p, q in (({raw: -0.5}, {text: -0.7}), ({text: -0.5}, {raw: -0.7})):
            assert pairs_of(align([candidates(**p)], [candidates(**q)])) == [(-0.5, -0.7)]

    def test_a_side_with_real_blanks_shows_no_pieces(self):
        side = [candidates(**{" the": -0.5, "▁": -2.0})]
        aligned = align(side, [candidates(**{" ": -0.5})])
        assert (aligned.overlap[0], aligned.open_p[0]) == (0, 0.0)

    def test_partial_characters_meet_by_bytes(self):
        p = [(Candidate("\ufffd", -0.5, token_bytes=b"\xe2"), Candidate("\ufffd", -1.5, token_bytes=b"\x82"))]
        q = [(Candidate("\ufffd", -0.7, token_bytes=b"\x82"),)]
        assert pairs_of(align(p, q)) == [(-1.5, -0.7)]


class TestEndTokens:
    def test_each_sides_own_end_token_is_one_key(self):
        aligned = align([candidates(**{"<|im_end|>": -0.5, "a": -1.0})], [candidates(**{"</s>": -0.7, "a": -0.9})])
        assert pairs_of(aligned) == [(-0.5, -0.7), (-1.0, -0.9)]

    @pytest.mark.parametrize("end", sorted(END_TOKENS - {"</s>"}))
    def test_every_end_token_has_this_role_in_text_and_as_a_raw_piece(self, end):
        q = [candidates(**{"</s>": -0.7, "a": -0.9})]
        assert pairs_of(align([candidates(**{end: -0.5, "a": -1.0})], q)) == [(-0.5, -0.7), (-1.0, -0.9)]
        assert pairs_of(align([candidates(**{end: -0.5, "▁the": -1.0})], q)) == [(-0.5, -0.7)]

    def test_the_same_end_token_is_matched_by_itself(self):
        p = [candidates(**{"<eos>": -0.5, "<end_of_turn>": -2.0})]
        q = [candidates(**{"<end_of_turn>": -0.4, "<eos>": -3.0})]
        assert sorted(pairs_of(align(p, q))) == [(-2.0, -0.4), (-0.5, -3.0)]

    def test_ids_need_no_roles(self):
        p = [with_ids(**{"<eos>": (-0.5, 1), "a": (-1.0, 3)})]
        q = [with_ids(**{"</s>": (-0.5, 2), "a": (-1.0, 3)})]
        assert pairs_of(align(p, q)) == [(-1.0, -1.0)]

    def test_a_sampled_end_token_is_found_by_its_role(self):
        p, q = candidates(**{"<|im_end|>": -0.5}), candidates(**{"</s>": -0.7})
        aligned = align([p], [q], [p[0]], [None])
        assert (aligned.logp_sampled[0], aligned.logq_sampled[0]) == (-0.5, -0.7)


class TestSeveralTokensOfOneKey:
    def test_unclear_texts_become_open_mass_on_both_sides(self):
        p = [candidates(a=np.log(0.5), **{"\ufffd": np.log(0.25), "": np.log(0.125)})]
        q = [candidates(a=np.log(0.5), **{"\ufffd": np.log(0.25)})]
        aligned = align(p, q)
        assert aligned.open_p[0] == pytest.approx(0.375)
        assert aligned.open_q[0] == pytest.approx(0.25)
        assert aligned.coverage_p[0] == pytest.approx(0.875)
        assert (aligned.n_listed_p[0], aligned.n_listed_q[0], aligned.overlap[0]) == (3, 2, 1)
        assert np.exp(aligned.log_cap_p[0]) == pytest.approx(0.125)

    def test_a_repeated_text_is_added_up_and_open_on_both_sides(self):
        p = [(Candidate("x", np.log(0.4)), Candidate("x", np.log(0.3)), Candidate("y", np.log(0.2)))]
        q = [candidates(x=np.log(0.6), y=np.log(0.1))]
        aligned = align(p, q)
        assert aligned.open_p[0] == pytest.approx(0.7)
        assert aligned.open_q[0] == pytest.approx(0.6)
        assert aligned.n_duplicate_keys[0] == 1
        assert pairs_of(aligned) == [(pytest.approx(np.log(0.2)), pytest.approx(np.log(0.1)))]

    def test_a_text_repeated_by_q_is_open_for_p_too(self):
        q = [(Candidate("x", np.log(0.4)), Candidate("x", np.log(0.3)))]
        aligned = align([candidates(x=np.log(0.6), y=np.log(0.2))], q)
        assert aligned.overlap[0] == 0
        assert aligned.open_p[0] == pytest.approx(0.6)
        assert aligned.open_q[0] == pytest.approx(0.7)

    def test_an_entry_repeated_to_the_bit_counts_once(self):
        p = [(Candidate("x", np.log(0.4)), Candidate("x", np.log(0.4)))]
        aligned = align(p, [candidates(y=-0.1)])
        assert aligned.open_p[0] == pytest.approx(0.4)
        assert aligned.n_duplicate_keys[0] == 1

    def test_one_id_listed_twice_is_one_token(self):
        p = [(Candidate("x", np.log(0.4), 5), Candidate("x", np.log(0.4), 5))]
        aligned = align(p, [with_ids(x=(np.log(0.3), 5))])
        assert aligned.open_p[0] == 0.0
        assert aligned.coverage_p[0] == pytest.approx(0.4)
        assert aligned.n_duplicate_keys[0] == 1
        assert pairs_of(aligned) == [(np.log(0.4), np.log(0.3))]

    def test_one_id_with_two_values_cannot_be_trusted(self):
        p = [(Candidate("x", np.log(0.4), 5), Candidate("x", np.log(0.3), 5))]
        aligned = align(p, [with_ids(x=(np.log(0.3), 5))])
        assert aligned.overlap[0] == 0
        assert aligned.open_p[0] == pytest.approx(0.7)

    def test_a_list_of_unclear_tokens_only_has_no_columns_to_match(self):
        aligned = align([candidates(**{"\ufffd": -0.5})], [candidates(**{"\ufffd": -0.7})])
        assert aligned.overlap[0] == 0
        assert aligned.top_open[0]


class TestSampledToken:
    def test_outside_qs_list_is_unknown_and_clear(self):
        p = candidates(a=-0.5)
        aligned = align([p], [candidates(b=-0.5)], [p[0]], [None])
        assert np.isnan(aligned.logq_sampled[0])
        assert aligned.sampled_clear[0]

    def test_below_ps_list_keeps_its_own_value_and_leaves_the_cap(self):
        aligned = align([candidates(a=-0.5, b=-1.5)], [candidates(z=-0.5)], [Candidate("z", -7.0)], [None])
        assert (aligned.logp_sampled[0], aligned.logq_sampled[0]) == (-7.0, -0.5)
        assert aligned.log_cap_p[0] == -1.5

    def test_what_q_drew_itself_is_not_taken_for_what_p_sampled(self):
        p, q = candidates(a=-0.5), candidates(b=-0.5)
        assert np.isnan(align([p], [q], [p[0]], [Candidate("c", -0.1)]).logq_sampled[0])
        assert align([p], [q], [p[0]], [Candidate("a", -4.0)]).logq_sampled[0] == -4.0

    def test_an_unclear_sampled_token_says_nothing(self):
        p = candidates(**{"\ufffd": -0.5})
        aligned = align([p], [candidates(**{"\ufffd": -0.7})], [p[0]], [Candidate("\ufffd", -0.7)])
        assert np.isnan(aligned.logq_sampled[0])
        assert not aligned.sampled_clear[0]

    def test_a_sampled_token_without_id_is_found_through_its_listed_text(self):
        p = with_ids(a=(-0.5, 1), b=(-1.5, 2))
        aligned = align([p], [with_ids(b=(-0.7, 2))], [Candidate("b", -1.5)], [None])
        assert aligned.logq_sampled[0] == -0.7


def test_lists_of_unequal_length_are_padded():
    logp, logq = gaussian_pair(3, 4, 10, 1.0)
    lists_p = [top[: 2 + t] for t, top in enumerate(top_lists(logp, 10))]
    lists_q = [top[: 9 - 2 * t] for t, top in enumerate(top_lists(logq, 10))]
    aligned = align(lists_p, lists_q)
    assert aligned.n_listed_p.tolist() == [2, 3, 4, 5]
    assert aligned.n_listed_q.tolist() == [9, 7, 5, 3]
    for t in range(4):
        ids_q = [c.token_id for c in lists_q[t]]
        found = [ids_q.index(c.token_id) if c.token_id in ids_q else -1 for c in lists_p[t]]
        assert aligned.index_q[t, : len(found)].tolist() == found
        assert (aligned.index_q[t, len(found) :] == -1).all()


@pytest.mark.parametrize(
    ("lists_p", "lists_q", "message"),
    [
        ([candidates(a=-0.5)], [], "1 lists of P but 0 of Q"),
        ([candidates(a=-0.5)], [()], "position 0: the list of Q is empty"),
    ],
)
def test_lists_that_cannot_be_paired_are_refused(lists_p, lists_q, message):
    with pytest.raises(ValueError, match=message):
        align(lists_p, lists_q)


class TestStops:
    """Where P ended its turn, its token is that of Q which is known to, whatever P calls it."""

    @staticmethod
    def aligned(own, top_p, top_q, is_stop=True):
        return align([top_p], [top_q], [own], None, [is_stop])

    @pytest.mark.parametrize("name", ["<|eot|>", "<turn|>", "[EOS]", ""])
    def test_a_name_that_q_does_not_list_is_q_s_known_one(self, name):
        own = Candidate(name, -0.5)
        top_p, top_q = (own, *candidates(a=-1.5)), (*candidates(a=-0.7), Candidate("</s>", -1.0))
        stop = self.aligned(own, top_p, top_q)
        assert pairs_of(stop) == [(-0.5, -1.0), (-1.5, -0.7)]
        assert (stop.logp_sampled[0], stop.logq_sampled[0]) == (-0.5, -1.0)
        assert pairs_of(self.aligned(own, top_p, top_q, is_stop=False)) == [(-1.5, -0.7)]

    def test_a_text_that_the_response_was_to_stop_at_is_that_text(self):
        own = Candidate("###", -0.5)
        stop = self.aligned(own, (own, *candidates(a=-1.5)), (*candidates(a=-0.7), Candidate("</s>", -1.0)))
        assert pairs_of(stop) == [(-1.5, -0.7)]

    def test_a_name_that_q_lists_is_the_same_token(self):
        own = Candidate("<|eot|>", -0.5)
        stop = self.aligned(own, (own,), (Candidate("</s>", -0.7), Candidate("<|eot|>", -1.0)))
        assert pairs_of(stop) == [(-0.5, -1.0)]

    def test_a_known_end_that_both_list_is_not_the_unknown_one(self):
        own, known = Candidate("<|eot|>", -0.5), Candidate("</s>", -2.0)
        assert pairs_of(self.aligned(own, (own, known), (known._replace(logprob=-0.7),))) == [(-2.0, -0.7)]

    def test_of_several_known_ends_none_is_chosen(self):
        own = Candidate("<|eot|>", -0.5)
        assert pairs_of(self.aligned(own, (own,), (Candidate("</s>", -0.7), Candidate("<|im_end|>", -1.0)))) == []
