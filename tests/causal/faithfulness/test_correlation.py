"""Correlations against scipy, load statistics against METRICS O10."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from moe_lens.causal.faithfulness.correlation import (
    entropy,
    gini,
    kendall,
    partial_spearman,
    pearson,
    ranks,
    spearman,
    variation,
)

PAIRS = st.integers(3, 12).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(0, 5), min_size=n, max_size=n).map(np.array)] * 2)
)


@given(PAIRS)
def test_rank_correlations_are_those_of_scipy_with_ties(pair):
    x, y = pair
    np.testing.assert_allclose(ranks(x), stats.rankdata(x))
    if len(set(x)) > 1 and len(set(y)) > 1:
        assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
        assert kendall(x, y) == pytest.approx(stats.kendalltau(x, y).statistic, abs=1e-12)
    else:
        assert np.isnan(spearman(x, y))
        assert np.isnan(kendall(x, y))


def test_a_partial_correlation_is_that_of_what_a_regression_on_ranks_leaves():
    r = np.random.default_rng(0)
    load = r.normal(size=30)
    x, y = load + r.normal(size=30), load + r.normal(size=30)
    design = np.stack([np.ones(30), stats.rankdata(load)], axis=1)
    left = [v - design @ np.linalg.lstsq(design, v, rcond=None)[0] for v in map(stats.rankdata, (x, y))]
    assert partial_spearman(x, y, load) == pytest.approx(float(pearson(*left)), abs=1e-10)
    assert np.isnan(partial_spearman(x, load, load))


def test_many_problems_at_once_are_each_on_its_own():
    r = np.random.default_rng(1)
    x, y, z = r.normal(size=(3, 5, 7))
    for f, given_ in ((spearman, (x, y)), (kendall, (x, y)), (partial_spearman, (x, y, z)), (gini, (abs(x),))):
        each = [f(*(v[i] for v in given_)) for i in range(5)]
        np.testing.assert_allclose(f(*given_), each)


def test_o10_entropy_and_spread_of_a_load():
    assert entropy(np.array([0.5, 0.3, 0.2])) == pytest.approx(1.02965, abs=5e-6)
    assert np.exp(entropy(np.array([0.5, 0.3, 0.2]))) == pytest.approx(2.80009, abs=5e-6)
    load = np.array([6, 3, 2, 1])
    assert variation(load) == pytest.approx(0.62361, abs=5e-6)
    assert gini(load) == pytest.approx(1 / 3)
    assert entropy(load) / np.log(4) == pytest.approx(0.86479, abs=5e-6)
    assert gini(np.array([0, 0, 0, 5])) == pytest.approx(3 / 4)
    assert np.isnan(gini(np.zeros(4)))
    assert np.isnan(variation(np.zeros(4)))
