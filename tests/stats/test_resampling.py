"""Bootstrap intervals against scipy's, and their coverage on clustered data."""

import warnings

import numpy as np
import pytest
from scipy import stats as scipy_stats

from moe_lens.errors import BadConfig
from moe_lens.stats import (
    Bootstrap,
    average_over_groups,
    bca_interval,
    cluster_bootstrap,
    document_multiplicities,
    percentile_interval,
)


def ratio(total):
    """Precision: tp / (tp + fp)."""
    return total[..., 0] / (total[..., 0] + total[..., 1])


def skewed_counts(seed=0, n_documents=30, problems=()):
    r = np.random.default_rng(seed)
    return np.stack([r.poisson(r.gamma(0.8, 4, (*problems, n_documents))) for _ in range(2)], -1) + 0.1


@pytest.mark.parametrize("level", [0.95, 0.8])
def test_bca_equals_scipy_on_the_same_resamples(level):
    counts = skewed_counts()
    done = scipy_stats.bootstrap(
        (np.arange(30),), lambda i, axis=-1: ratio(counts[i].sum(-2)), n_resamples=999, method="BCa",
        confidence_level=level, rng=1, vectorized=True,
    )  # fmt: skip
    boot = cluster_bootstrap(counts, ratio, n_resamples=2)
    low, high = bca_interval(boot.estimate, done.bootstrap_distribution, *boot.jackknives, level=level)
    assert low == pytest.approx(done.confidence_interval.low, abs=1e-12)
    assert high == pytest.approx(done.confidence_interval.high, abs=1e-12)


def test_bca_of_two_kinds_of_unit_equals_scipy_on_two_samples():
    r = np.random.default_rng(0)
    x, y = r.exponential(1, 25), r.exponential(2, 40)
    done = scipy_stats.bootstrap(
        (x, y), lambda a, b, axis=-1: a.mean(axis) - b.mean(axis), n_resamples=999, method="BCa", rng=1
    )
    left = np.array([np.delete(x, i).mean() - y.mean() for i in range(25)])
    right = np.array([x.mean() - np.delete(y, i).mean() for i in range(40)])
    low, high = bca_interval(x.mean() - y.mean(), done.bootstrap_distribution, left, right)
    assert (low, high) == pytest.approx(done.confidence_interval, abs=1e-12)


def test_many_problems_at_once_equal_one_at_a_time():
    counts = skewed_counts(problems=(3, 2))
    together = cluster_bootstrap(counts, ratio, n_resamples=200, seed=5)
    low, high = together.bca()
    assert low.shape == (3, 2)
    for i in range(3):
        for j in range(2):
            alone = cluster_bootstrap(counts[i, j], ratio, n_resamples=200, seed=5)
            assert together.estimate[i, j] == pytest.approx(alone.estimate)
            np.testing.assert_allclose((low[i, j], high[i, j]), alone.bca(), atol=1e-12)
            np.testing.assert_allclose(np.array(together.percentile())[:, i, j], percentile_interval(alone.draws))


def test_jackknife_leaves_one_document_out():
    counts = skewed_counts()
    (jackknife,) = cluster_bootstrap(counts, ratio, n_resamples=2).jackknives
    for d in range(30):
        assert jackknife[d] == pytest.approx(ratio(np.delete(counts, d, 0).sum(0)))


def test_bca_moves_the_interval_of_a_variance_upwards():
    """The variance is biased downwards and skewed: both percentile limits are too low (Efron 1987, section 3)."""
    x = np.random.default_rng(0).normal(size=30)
    counts = np.stack([np.ones(30), x, x**2], 1)
    boot = cluster_bootstrap(counts, lambda t: t[..., 2] / t[..., 0] - (t[..., 1] / t[..., 0]) ** 2, n_resamples=4000)
    assert boot.bca()[0] > boot.percentile()[0] + 0.02
    assert boot.bca()[1] > boot.percentile()[1] + 0.02


def test_undefined_draws_are_left_out_and_a_constant_has_no_width():
    draws = np.array([0.2, np.nan, 0.4, 0.3, 0.5])
    assert bca_interval(np.array(0.3), draws, np.array([0.3, 0.31, np.nan]))[1] <= 0.5
    assert np.isnan(bca_interval(np.array(np.nan), draws, np.array([0.3, 0.31]))).all()
    low, high = bca_interval(np.array(1.0), np.ones(50), np.ones(10))
    assert (low, high) == (1.0, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(percentile_interval(np.full((5, 2), np.nan))[0]).all()


def test_an_estimate_outside_its_draws_still_has_an_interval():
    low, high = bca_interval(np.array(1.0), np.linspace(0, 0.9, 100), np.linspace(0.9, 1.1, 20))
    assert 0.85 <= low <= high <= 0.9


def test_a_paired_gap_uses_the_same_resamples():
    a, b = (cluster_bootstrap(skewed_counts(s), ratio, n_resamples=300, seed=1) for s in (0, 1))
    gap = a - b
    np.testing.assert_array_equal(gap.draws, a.draws - b.draws)
    same = (a - a).bca()
    assert same == (0, 0)


def test_one_document_is_refused():
    with pytest.raises(BadConfig, match="at least two"):
        cluster_bootstrap(np.ones((1, 2)), ratio)


def test_document_bootstrap_covers_the_true_mean():
    """95 % intervals over 50 clusters cover 93 to 97 % (METRICS 6, O11); intervals over tokens cover far less."""
    r = np.random.default_rng(0)
    n_sims, n_documents, n_tokens = 2000, 50, 20
    tokens = r.normal(0, 1, (n_sims, n_documents, 1)) + r.normal(0, 1, (n_sims, n_documents, n_tokens))
    counts = np.stack([tokens.sum(-1), np.full((n_sims, n_documents), float(n_tokens))], -1)
    boot = cluster_bootstrap(counts, lambda t: t[..., 0] / t[..., 1], n_resamples=1000, seed=1)
    for low, high in (boot.percentile(), boot.bca()):
        assert 0.93 <= ((low <= 0) & (high >= 0)).mean() <= 0.97
    by_token = tokens[:200].reshape(200, -1, 1)
    with_ones = np.concatenate([by_token, np.ones_like(by_token)], -1)
    narrow = cluster_bootstrap(with_ones, lambda t: t[..., 0] / t[..., 1], n_resamples=200).percentile()
    assert ((narrow[0] <= 0) & (narrow[1] >= 0)).mean() < 0.6
    width = [h - low for low, h in (boot.percentile(), narrow)]
    assert width[0].mean() > 2 * width[1].mean()


def grouped(draws, estimate, jackknife):
    return Bootstrap(np.asarray(estimate), np.asarray(draws), (np.asarray(jackknife),))


def test_the_mean_over_groups_leaves_out_groups_without_a_value():
    boot = grouped([[0.1, 0.3], [0.5, np.nan]], [0.2, 0.4], [[0.2, 0.2], [0.4, 0.6]])
    mean = average_over_groups(boot)
    assert mean.estimate == pytest.approx(0.3)
    np.testing.assert_allclose(mean.draws, [0.2, 0.5])
    np.testing.assert_allclose(mean.jackknives[0], [0.2, 0.5])


def test_documents_x_groups_covers_the_population_mean_where_documents_alone_cannot():
    """Concept groups drawn from a population of true gaps: only resampling them covers its mean."""
    r = np.random.default_rng(0)
    n_sims, n_groups, n_documents = 400, 30, 40
    truth = r.normal(0, 1, (n_sims, n_groups, 1))
    values = truth + r.normal(0, 1, (n_sims, n_groups, n_documents)) + r.normal(0, 1, (n_sims, 1, n_documents))
    counts = np.stack([values, np.ones_like(values)], -1)
    boot = cluster_bootstrap(counts, lambda t: t[..., 0] / t[..., 1], n_resamples=400)
    covered = {}
    for both in (False, True):
        low, high = average_over_groups(boot, resample_groups=both).bca()
        covered[both] = ((low <= 0) & (high >= 0)).mean()
    assert covered[False] < 0.85
    assert 0.92 <= covered[True] <= 0.99


def test_multiplicities_draw_as_many_documents_as_there_are():
    times = document_multiplicities(50, 400, seed=1)
    assert (times.sum(1) == 50).all()
    assert times.mean(0) == pytest.approx(np.ones(50), abs=0.25)
