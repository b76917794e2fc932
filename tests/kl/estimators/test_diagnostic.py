"""Whether two sets of lists speak of the same tokens."""

import pytest

from kl.estimators.align import align
from kl.estimators.diagnostic import AlignmentDiagnostic, diagnose
from kl.records import Candidate
from tests.kl.pairs import gaussian_pair, top_lists


def lists_sharing(n_shared, k=10):
    p = tuple(Candidate(f"p{i}" if i >= n_shared else f"s{i}", -0.5 - i) for i in range(k))
    q = tuple(Candidate(f"q{i}" if i >= n_shared else f"s{i}", -0.5 - i) for i in range(k))
    return [p], [q]


def diagnosed(n_shared):
    return diagnose(align(*lists_sharing(n_shared)))


@pytest.mark.parametrize(
    ("n_shared", "level"), [(10, "ok"), (5, "ok"), (4, "warn"), (2, "warn"), (1, "refuse"), (0, "refuse")]
)
def test_level_follows_the_overlap(n_shared, level):
    assert diagnosed(n_shared).overlap == n_shared / 10
    assert diagnosed(n_shared).verdict().level == level


def test_reasons_name_the_number_and_the_limit():
    (reason,) = diagnosed(4).verdict().reasons
    assert "40.0%" in reason
    assert "50%" in reason
    assert any("refused below 20%" in reason for reason in diagnosed(1).verdict().reasons)


def test_an_absent_top_token_is_warned_about_above_one_in_twenty():
    p, q = lists_sharing(9)
    absent = align([tuple(c._replace(token="new") if c.token == "s0" else c for c in p[0])], q)
    rare = AlignmentDiagnostic.total([diagnose(absent), *[diagnosed(9)] * 19])
    assert rare.top_absent == 0.05
    assert rare.verdict().level == "ok"
    verdict = (rare + diagnose(absent)).verdict()
    assert verdict.level == "warn"
    assert "not listed by Q at 9.5%" in verdict.reasons[0]


def test_other_tokenizers_are_warned_about_by_their_ids():
    logp, logq = gaussian_pair(0, 3, 50, 0.1)
    shifted = [tuple(c._replace(token_id=c.token_id + 1) for c in top) for top in top_lists(logq, 10)]
    found = diagnose(align(top_lists(logp, 10), shifted))
    assert found.id_mismatch == 1.0
    assert found.n_by_key == (0, 0, 3)
    assert any("different tokenizers" in reason for reason in found.verdict().reasons)


def test_unclear_texts_are_warned_about_above_one_percent():
    p, q = lists_sharing(10)
    unclear = [(*p[0][:9], Candidate("\ufffd", p[0][9].logprob + 6.5))]
    found = diagnose(align([tuple(sorted(unclear[0], key=lambda c: -c.logprob))], q))
    assert found.ambiguous_mass == pytest.approx(0.0498, abs=1e-3)
    assert any("Record token ids" in reason for reason in found.verdict().reasons)


def test_an_unclear_top_token_is_not_counted_as_absent():
    top = (Candidate("\ufffd", -0.5), Candidate("a", -1.5))
    found = diagnose(align([top, top], [top, (Candidate("a", -0.5),)]))
    assert found.top_absent == 0.0


def test_sums_do_not_depend_on_how_positions_were_grouped():
    logp, logq = gaussian_pair(0, 12, 80, 0.7)
    lists_p, lists_q = top_lists(logp, 10), top_lists(logq, 10)
    whole = diagnose(align(lists_p, lists_q))
    parts = [diagnose(align(lists_p[t : t + 4], lists_q[t : t + 4])) for t in (0, 4, 8)]
    for joined in (parts[0] + parts[1] + parts[2], parts[2] + (parts[0] + parts[1]), AlignmentDiagnostic.total(parts)):
        assert joined.n_positions == 12
        assert (joined.overlap, joined.top_absent, joined.unseen_q) == (whole.overlap, whole.top_absent, whole.unseen_q)
        assert joined.mean_shared_mass_p == pytest.approx(whole.mean_shared_mass_p)
        assert joined.verdict() == whole.verdict()


def test_tokens_of_q_that_p_never_lists_are_a_share_of_qs_tokens():
    found = diagnosed(4)
    assert found.unseen_q == 0.6
    other = AlignmentDiagnostic(keys_p=frozenset(f"q{i}".encode() for i in range(10)))
    assert (found + other).unseen_q == 0.0


def test_nothing_measured_is_no_verdict_against():
    empty = AlignmentDiagnostic()
    assert (empty.overlap, empty.top_absent, empty.id_mismatch, empty.unseen_q) == (None, None, None, None)
    assert empty.verdict() == ("ok", ())
    assert (empty + diagnosed(4)) == diagnosed(4)
