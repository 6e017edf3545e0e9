"""Classification metrics against scikit-learn and hand-computed cases."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from moe_lens.stats import (
    Confusion,
    f1_always_positive,
    f1_balanced,
    ranking_scores,
)


@given(seed=st.integers(0, 10_000), levels=st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_ranking_scores_equal_scikit_learn_with_ties_and_unused_rows(seed, levels):
    r = np.random.default_rng(seed)
    score, truth = r.integers(-levels, levels, (60, 3)) / 3, r.random((60, 3)) < 0.4
    score = score.astype(np.float32).astype(float)
    used = r.random((60, 3)) < 0.7
    used[:2], truth[0], truth[1] = True, True, False
    auroc, ap = ranking_scores(score, truth, used)
    for j in range(3):
        t, s = truth[used[:, j], j], score[used[:, j], j]
        assert auroc[j] == pytest.approx(metrics.roc_auc_score(t, s), abs=1e-12)
        assert ap[j] == pytest.approx(metrics.average_precision_score(t, s), abs=1e-12)
    everything = ranking_scores(score, truth)[0]
    assert everything[0] == pytest.approx(metrics.roc_auc_score(truth[:, 0], score[:, 0]), abs=1e-12)


def test_ranking_scores_treat_both_zeros_alike():
    auroc, _ = ranking_scores(np.array([[0.0], [-0.0]]), np.array([[True], [False]]))
    assert auroc[0] == 0.5


def test_ranking_scores_are_nan_with_one_class():
    auroc, ap = ranking_scores(np.ones((4, 1)), np.zeros((4, 1), bool))
    assert np.isnan(auroc).all()
    assert np.isnan(ap).all()


@given(seed=st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_confusion_rates_equal_scikit_learn(seed):
    r = np.random.default_rng(seed)
    yes, truth = r.random((50, 2)) < 0.5, r.random((50, 2)) < 0.3
    truth[:2] = [[True, True], [False, False]]
    c = Confusion.count(yes, truth)
    for j in range(2):
        t, y = truth[:, j], yes[:, j]
        assert c.f1[j] == pytest.approx(metrics.f1_score(t, y, zero_division=0))
        assert c.precision[j] == pytest.approx(metrics.precision_score(t, y, zero_division=0))
        assert c.recall[j] == pytest.approx(metrics.recall_score(t, y))
        assert c.mcc[j] == pytest.approx(metrics.matthews_corrcoef(t, y))
        assert c.balanced_accuracy[j] == pytest.approx(metrics.balanced_accuracy_score(t, y))


def test_unused_rows_do_not_count():
    yes, truth = np.array([[True], [True], [False]]), np.array([[True], [False], [True]])
    c = Confusion.count(yes, truth, np.array([[True], [False], [True]]))
    assert (c.tp[0], c.fp[0], c.fn[0], c.tn[0]) == (1, 0, 1, 0)


def test_always_positive_f1_is_the_f1_of_saying_yes():
    truth = np.arange(100) < 15
    assert f1_always_positive(0.15) == pytest.approx(metrics.f1_score(truth, np.ones(100, bool)))


def test_balanced_f1_does_not_depend_on_prevalence():
    # TPR .8 and FPR .2: .8 at prevalence one half
    assert f1_balanced(0.8, 0.2) == pytest.approx(0.8)
    rare = Confusion(np.array([8.0]), np.array([198.0]), np.array([2.0]), np.array([792.0]))
    assert rare.f1_balanced[0] == pytest.approx(0.8)
    assert rare.f1[0] < 0.1
