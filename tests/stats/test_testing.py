"""p-values and corrections against scipy and against their definitions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from moe_lens.errors import BadConfig
from moe_lens.stats import benjamini_hochberg, holm, max_t, permutation_p, wilson_interval

P_VALUES = st.lists(st.floats(0, 1, allow_subnormal=False), min_size=1, max_size=30)


def test_permutation_p_counts_the_observed_labelling():
    null = np.array([0.1, 0.2, 0.3, 0.4])
    assert permutation_p(0.25, null) == 3 / 5
    assert permutation_p(0.3, null) == 3 / 5  # a tie counts against
    assert permutation_p(9.0, null) == 1 / 5
    assert permutation_p(0.3 + 1e-7, null, tolerance=1e-6) == 3 / 5
    assert np.isnan(permutation_p(np.nan, null))


def test_permutation_p_equals_scipy_on_all_sign_flips():
    x = np.random.default_rng(0).normal(0.4, 1, 9)
    exact = scipy_stats.permutation_test(
        (x,), lambda v, axis=-1: v.mean(axis), permutation_type="samples", alternative="greater", n_resamples=np.inf
    )
    # scipy lists the identity among the exact null, so 2^n instead of B + 1
    assert permutation_p(exact.statistic, exact.null_distribution[1:], tolerance=1e-12) == pytest.approx(exact.pvalue)


def test_no_permutations_are_refused():
    with pytest.raises(BadConfig, match="99 or more"):
        permutation_p(1.0, np.zeros(0))


@given(p=P_VALUES)
@settings(max_examples=60, deadline=None)
def test_benjamini_hochberg_equals_scipy(p):
    np.testing.assert_allclose(benjamini_hochberg(np.array(p)), scipy_stats.false_discovery_control(p), atol=1e-15)


def test_benjamini_hochberg_of_the_first_published_example():
    """Benjamini & Hochberg 1995, section 3.2: four rejections at q = .05, where Bonferroni makes three."""
    p = np.array([0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240, 0.4262,
                  0.5719, 0.6528, 0.7590, 1.0])  # fmt: skip
    assert (benjamini_hochberg(p) <= 0.05).sum() == 4
    assert (holm(p) <= 0.05).sum() == 3


def test_holm_by_hand():
    np.testing.assert_allclose(holm(np.array([0.04, 0.01, 0.03])), [0.06, 0.03, 0.06])
    np.testing.assert_allclose(holm(np.array([0.9, 0.8])), [1.0, 1.0])


@given(p=P_VALUES)
@settings(max_examples=40, deadline=None)
def test_holm_equals_its_definition(p):
    """The adjusted p is the largest (m - i + 1) p_(i) up to one's own rank."""
    p = np.array(p)
    m = len(p)
    want = [max(min(1, (m - (p < q).sum()) * q) for q in p[p <= mine]) for mine in p]
    np.testing.assert_allclose(holm(p), want, atol=1e-15)


@pytest.mark.parametrize("adjust", [benjamini_hochberg, holm])
def test_missing_hypotheses_are_not_counted(adjust):
    p = np.array([[0.01, np.nan, 0.04, 0.2], [np.nan, np.nan, np.nan, 0.3]])
    out = adjust(p)
    np.testing.assert_allclose(out[0, [0, 2, 3]], adjust(p[0, [0, 2, 3]]))
    assert out[1, 3] == pytest.approx(0.3)
    np.testing.assert_array_equal(np.isnan(out), np.isnan(p))


@pytest.mark.parametrize("adjust", [benjamini_hochberg, holm])
def test_impossible_p_values_are_refused(adjust):
    with pytest.raises(BadConfig, match="between 0 and 1"):
        adjust(np.array([0.5, 1.2]))


def test_max_t_compares_with_the_maximum_of_each_permutation():
    null = np.array([[1.0, 5.0], [2.0, 0.0], [3.0, 1.0]])
    np.testing.assert_allclose(max_t(np.array([2.5, 6.0]), null), [3 / 4, 1 / 4])
    np.testing.assert_allclose(max_t(np.array([2.5, np.nan]), null), [2 / 4, np.nan])
    assert np.isnan(max_t(np.array([np.nan]), null[:, :1])).all()


def test_max_t_holds_the_family_error_and_beats_bonferroni_under_dependence():
    r = np.random.default_rng(0)
    m, n_sims, b = 40, 400, 199

    def draw(n):
        return 0.95 * r.normal(size=(n, 1)) + np.sqrt(1 - 0.95**2) * r.normal(size=(n, m))

    adjusted = np.array([max_t(draw(1)[0], draw(b)) for _ in range(n_sims)])
    assert 0.02 <= (adjusted <= 0.05).any(1).mean() <= 0.085
    strong = max_t(draw(1)[0] * 0 + 3.0, draw(9999))
    assert strong.max() < m * scipy_stats.norm.sf(3.0) / 2


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (10, 10), (70, 1000)])
def test_wilson_equals_scipy(k, n):
    want = scipy_stats.binomtest(k, n).proportion_ci(method="wilson")
    assert wilson_interval(k, n) == pytest.approx((want.low, want.high), abs=1e-12)
    wide = scipy_stats.binomtest(k, n).proportion_ci(0.99, method="wilson")
    assert wilson_interval(k, n, 0.99) == pytest.approx((wide.low, wide.high), abs=1e-12)


def test_wilson_of_nothing_is_unknown():
    assert np.isnan(wilson_interval(np.array([0, 1]), np.array([0, 2]))[0]).tolist() == [True, False]
