"""Per-document sums against their definition, row by row."""

import numpy as np
import pytest

from moe_lens.probing.document_sums import document_sums


def by_definition(score, truth, used, document, n_documents):
    out = np.zeros((n_documents, 6))
    pos, neg = (score[used & own] for own in (truth, ~truth))
    for s, t, d in zip(score[used], truth[used], document[used], strict=True):
        out[d, {(True, True): 0, (True, False): 1, (False, True): 2, (False, False): 3}[s >= 0, t]] += 1
        if len(pos) and len(neg):
            out[d, 4 if t else 5] += np.mean((neg < s) + (neg == s) / 2) if t else np.mean((pos > s) + (pos == s) / 2)
    return out


@pytest.mark.parametrize("decimals", [0, 1, 6])
def test_sums_are_those_of_the_definition_with_ties_and_rows_left_out(decimals):
    r = np.random.default_rng(decimals)
    score = r.normal(size=(300, 7)).round(decimals).astype(np.float32)
    score[:5] = -0.0
    truth, used = r.random((300, 7)) < 0.3, r.random((300, 7)) < 0.8
    truth[:, 5], used[:, 6] = True, False
    document = r.integers(0, 11, (300, 7))
    got = document_sums(score, truth, used, document, 12)
    for i in range(7):
        want = by_definition(score[:, i], truth[:, i], used[:, i], document[:, i], 12)
        np.testing.assert_allclose(got[i], want, atol=1e-9)
    np.testing.assert_array_equal(document_sums(score, truth, used, document[:, :1], 12)[0], got[0])


def test_placements_with_ties_by_hand():
    score, truth = np.array([[1.0], [2.0], [2.0], [3.0]]), np.array([[False], [True], [False], [True]])
    sums = document_sums(score, truth, np.ones((4, 1), bool), np.arange(4)[:, None], 4)[0]
    assert sums[:, 4].tolist() == [0, 0.75, 0, 1]
    assert sums[:, 5].tolist() == [1, 0, 0.75, 0]


def test_no_rows_give_zeros():
    nothing = np.zeros((0, 2))
    assert (
        document_sums(nothing, nothing > 0, nothing > 0, nothing.astype(int), 3).tolist()
        == np.zeros((2, 3, 6)).tolist()
    )
