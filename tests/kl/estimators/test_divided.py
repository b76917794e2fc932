"""What comes out of a position is the same, to the last bit, however many stand beside it and however wide rows are."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kl.estimators.align import align
from kl.estimators.bounds import cells, lower_bounds
from kl.estimators.censored import SpreadEvidence, SpreadPrior
from kl.estimators.divergence import floor, measure, sampled_token
from kl.estimators.entropy import entropies
from kl.estimators.outliers import find_outliers, spread_evidence
from kl.estimators.rows import Entries, row_counts, row_sums
from tests.kl.pairs import gaussian_pair, top_lists
from tests.kl.wrong_values import with_wrong


def drawn(seed, n, noise, k_p, k_q):
    """Positions of every kind: entries without a name, masses above 1, rounded and wrong values; a response each."""
    rng = np.random.default_rng(seed)
    logp, logq = gaussian_pair(seed, n, 60, noise, zipf=rng.choice([0.5, 1.6, 6.0]), spread=1.5)
    lists_p, lists_q = top_lists(logp + rng.choice([0.0, 2e-4], (n, 1)), k_p), top_lists(logq, k_q)
    for row in rng.integers(0, n, n // 4):
        lists_q = with_wrong(lists_q, row, rng.integers(k_q), rng.choice([-20.0, -4.0]))
    lists_p, lists_q = (
        [
            tuple(c._replace(token="" if at in hidden else c.token, token_id=None) for at, c in enumerate(top[:length]))
            for top, hidden, length in zip(
                lists,
                rng.integers(0, 60, (n, 2)),
                rng.integers(max(1, len(lists[0]) - 3), 1 + len(lists[0]), n),
                strict=True,
            )
        ]
        for lists in (lists_p, lists_q)
    )
    sampled = [top[at % len(top)] for top, at in zip(lists_p, rng.integers(0, 20, n), strict=True)]
    aligned = align(lists_p, lists_q, sampled)
    return replace(aligned, response=np.arange(n), step_q=rng.choice([0.0, 1e-3], n))


def padded(aligned, by):
    def wider(values, fill):
        return np.concatenate([values, np.full((len(values), by), fill, dtype=values.dtype)], axis=1)

    fills = {
        "logp": -np.inf,
        "logq": -np.inf,
        "log_open_p": -np.inf,
        "log_open_q": -np.inf,
        "index_p": -1,
        "index_q": -1,
    }
    return replace(aligned, **{name: wider(getattr(aligned, name), fill) for name, fill in fills.items()})


def arrays(found):
    """All arrays in something nested, in order."""
    if isinstance(found, np.ndarray):
        return [found]
    parts = found if isinstance(found, tuple) else [getattr(found, name) for name in found.__dataclass_fields__]
    return [array for part in parts for array in arrays(part)]


def results(aligned, prior):
    spread = SpreadEvidence.of(aligned)
    return arrays(
        (
            measure(aligned, prior),
            lower_bounds(cells(aligned)),
            floor(aligned),
            sampled_token(aligned),
            entropies(aligned.logp, aligned.log_limit_p, aligned.coverage_p, 1000),
            entropies(aligned.logq, aligned.log_limit_q, aligned.coverage_q),
        )
    ), arrays((spread, spread_evidence(aligned)))


def outliers(aligned, prior, first):
    return [repr(item._replace(row=item.row + first)) for item in find_outliers(aligned, prior)]


priors = st.sampled_from([None, SpreadPrior(0.0), SpreadPrior(0.4), SpreadPrior(1.0, 0.9, -1.0, -4.0, 2.0)])


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 0.1, 1.0, 4.0]),
    st.tuples(st.integers(1, 24), st.integers(1, 24)),
    st.lists(st.integers(1, 39), unique=True, max_size=5),
    st.integers(0, 13),
    priors,
)
@settings(max_examples=60, deadline=None)
def test_division_and_padding_change_no_bit(seed, noise, k, cuts, width, prior):
    whole = drawn(seed, 40, noise, *k)
    edges = [0, *sorted(cuts), 40]
    parts = [
        padded(whole.only(slice(start, end)), (width + at) % 14) for at, (start, end) in enumerate(pairwise(edges))
    ]
    together, apart = results(whole, prior), [results(part, prior) for part in parts]
    for kind in range(2):
        for one, *others in zip(together[kind], *(found[kind] for found in apart), strict=True):
            joined = np.concatenate(others)
            assert one.dtype == joined.dtype
            np.testing.assert_array_equal(one, joined)
            assert one.tobytes() == joined.tobytes()
    alone = [text for start, part in zip(edges, parts, strict=False) for text in outliers(part, prior, start)]
    assert outliers(whole, prior, 0) == alone


@pytest.mark.parametrize("n", [1, 2, 7, 300])
def test_many_positions_are_measured_in_blocks_like_few(n):
    logp, logq = gaussian_pair(4, 300, 80, 0.7)
    whole = align(top_lists(logp, 20), top_lists(logq, 20))
    many = whole.only(np.tile(np.arange(300), 16))
    for one, other in zip(
        results(many, SpreadPrior(0.4)), results(whole.only(slice(n)), SpreadPrior(0.4)), strict=True
    ):
        for long, short in zip(one, other, strict=True):
            assert long[:n].tobytes() == short.tobytes()


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_entries_are_those_of_the_rows(n_rows, n_columns, seed):
    rng = np.random.default_rng(seed)
    flags, values = rng.random((n_rows, n_columns)) < 0.4, rng.normal(size=(n_rows, n_columns))
    entries = Entries.of(flags)
    np.testing.assert_array_equal(entries.of_array(values), values.T[flags.T])
    np.testing.assert_allclose(entries.sums(entries.of_array(values)), (values * flags).sum(axis=1), atol=1e-12)
    np.testing.assert_array_equal(entries.counts(), flags.sum(axis=1))
    np.testing.assert_array_equal(row_counts(flags), flags.sum(axis=1))
    np.testing.assert_allclose(row_sums(values), values.sum(axis=1), atol=1e-12)
    rows = rng.random(n_rows) < 0.5
    within = entries.within(rows)
    assert within.n_rows == rows.sum()
    np.testing.assert_array_equal(within.of_array(values[rows]), values[rows].T[flags[rows].T])
    np.testing.assert_array_equal(within.counts(), flags[rows].sum(axis=1))
