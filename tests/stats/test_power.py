"""Null spread and detectable effects against exact enumeration, scipy's distributions and simulation."""

from itertools import combinations

import numpy as np
import pytest
from scipy import stats as scipy_stats
from scipy.optimize import brentq
from sklearn.metrics import roc_auc_score

from moe_lens.errors import BadConfig
from moe_lens.stats import auroc_null_se, design_effect, detectable_auroc, detectable_effect, documents_needed


def every_auroc(score, n_pos):
    """AUROC under every assignment of `n_pos` positives."""
    out = []
    for chosen in combinations(range(len(score)), n_pos):
        truth = np.zeros(len(score), bool)
        truth[list(chosen)] = True
        out.append(roc_auc_score(truth, score))
    return np.array(out)


def test_null_spread_of_auroc_is_exact_over_all_assignments():
    assert auroc_null_se(3, 5) == pytest.approx(every_auroc(np.arange(8.0), 3).std(), rel=1e-12)


def test_ties_shrink_the_null_spread_by_the_stated_factor():
    score = np.array([0.0, 0, 0, 0, 1, 1, 2, 3])
    factor = 1 - ((4**3 - 4) + (2**3 - 2)) / (8**3 - 8)
    assert auroc_null_se(3, 5) * np.sqrt(factor) == pytest.approx(every_auroc(score, 3).std(), rel=1e-12)


def test_an_empty_class_has_no_finite_spread():
    assert np.isinf(auroc_null_se(np.array([0, 4]), np.array([4, 0]))).all()


def t_power(n, d, alpha):
    """Power of the two-sided one-sample t-test (the far tail is nil)."""
    return scipy_stats.nct.sf(scipy_stats.t.isf(alpha / 2, n - 1), n - 1, d * np.sqrt(n))


@pytest.mark.parametrize("alpha", [0.05, 0.05 / 20, 0.05 / 1024])
@pytest.mark.parametrize("d", [0.1, 0.2, 0.5])
def test_documents_needed_equal_the_noncentral_t_within_one(d, alpha):
    exact = brentq(lambda n: t_power(n, d, alpha) - 0.8, 4, 10_000)
    assert abs(int(documents_needed(d, alpha=alpha)) - np.ceil(exact)) <= 1


def test_documents_needed_are_those_of_metrics():
    """METRICS 2.5 prints the root itself, cut: 198 and 786. One more document is needed to reach the power."""
    assert documents_needed(np.array([0.2, 0.1])).tolist() == [199, 787]
    assert documents_needed(np.array([0.2, 0.1]), alpha=0.05 / 1024).tolist() == [610, 2412]


@pytest.mark.parametrize("n", [30, 200, 2000])
def test_the_detectable_effect_inverts_documents_needed(n):
    d = detectable_effect(n)
    assert documents_needed(d * (1 + 1e-9)) == n
    assert t_power(n, d, 0.05) == pytest.approx(0.8, abs=0.01)
    assert np.isnan(detectable_effect(3, alpha=1e-6))


def test_the_power_of_a_paired_test_is_reached_in_simulation():
    r = np.random.default_rng(0)
    n = int(documents_needed(0.5, alpha=0.05 / 1024))
    x = r.normal(0.5, 1, (4000, n))
    t = x.mean(1) / x.std(1, ddof=1) * np.sqrt(n)
    assert n == 105
    assert (t > scipy_stats.t.isf(0.025 / 1024, n - 1)).mean() == pytest.approx(0.8, abs=0.025)


@pytest.mark.parametrize(("n_pos", "n_neg"), [(60, 60), (40, 400)])
def test_the_detectable_auroc_is_found_as_often_as_promised(n_pos, n_neg):
    auroc = float(detectable_auroc(n_pos, n_neg))
    shift = np.sqrt(2) * scipy_stats.norm.ppf(auroc)
    r = np.random.default_rng(0)
    p = scipy_stats.mannwhitneyu(
        r.normal(shift, 1, (4000, n_pos)), r.normal(0, 1, (4000, n_neg)), axis=1, alternative="greater"
    ).pvalue
    assert (p <= 0.05).mean() == pytest.approx(0.8, abs=0.03)


def test_clustering_raises_the_detectable_auroc_and_may_put_it_out_of_reach():
    tokens = np.full(30, 100)
    assert design_effect(tokens, 0.0) == 1
    assert design_effect(tokens, 1.0) == 100
    whole_documents = detectable_auroc(15, 15)
    by_tokens = detectable_auroc(1500, 1500, design_effect=design_effect(tokens, 1.0))
    assert by_tokens == pytest.approx(whole_documents, abs=0.005)
    assert np.isnan(detectable_auroc(2, 2, alpha=1e-6))
    assert detectable_auroc(50, 50, sides=2) > detectable_auroc(50, 50)


def test_impossible_settings_are_refused():
    with pytest.raises(BadConfig, match="1 or 2 sides"):
        detectable_effect(50, sides=3)
    with pytest.raises(BadConfig, match="power"):
        detectable_effect(50, power=1.0)
