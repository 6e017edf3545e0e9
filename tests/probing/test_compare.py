"""The arms on hand-made cell tables: who is chosen, what is reported, what the intervals do."""

import numpy as np
import pandas as pd
import pytest

from moe_lens.probing.arms import ModelScores, winners
from moe_lens.probing.arms.best_cell import resampled
from moe_lens.probing.compare import MEAN, compare
from moe_lens.probing.document_sums import document_sums
from moe_lens.stats import document_multiplicities
from moe_lens.types import Granularity


class FakeConcept:
    def __init__(self, name, group=None):
        self.name, self.group, self.category, self.granularity = name, group, "test", Granularity.SPAN


def cell(concept, expert, f1, validate, *, layer=0, k=1, n_test=100, status="ok"):
    return {
        "layer": layer, "expert": expert, "concept": concept, "k": k, "f1": f1, "f1_balanced": f1, "auroc": f1,
        "auroc_validate": validate, "prevalence": 0.5, "n_test": n_test, "status": status,
    }  # fmt: skip


def scores(role, cells, d_ff=8, n_documents=10, seed=0):
    frame = pd.DataFrame(cells)
    counts = {}
    for row in frame.itertuples():
        tp = np.full(n_documents, 10 * row.f1)
        counts[row.layer, row.expert, row.concept, row.k] = np.stack(
            [tp, 10 - tp, 10 - tp, tp, tp * row.f1, tp * row.f1], 1
        )
    return ModelScores(role, seed, d_ff, frame, counts)


DOCS = [np.arange(10)]


def pick(table, arm, concept, metric="f1"):
    (row,) = table[(table.arm == arm) & (table.concept == concept) & (table.metric == metric)].itertuples()
    return row


def test_raw_takes_the_best_test_score_and_held_out_the_best_validate_score():
    moe = scores("moe", [cell("a", 0, 0.9, 0.6), cell("a", 1, 0.7, 0.8)])
    dense = scores("dense", [cell("a", 0, 0.75, 0.9)], d_ff=16)
    table = compare([moe], [dense], [FakeConcept("a")], DOCS)
    assert pick(table, "raw", "a").moe == 0.9
    assert pick(table, "held_out", "a").moe == 0.7
    assert pick(table, "raw", "a").gap == pytest.approx(0.15)
    assert pick(table, "held_out", "a").gap == pytest.approx(-0.05)
    assert pick(table, "held_out", "a").n_cells_moe == 2
    assert pick(table, "held_out", "a").n_distinct_neurons_moe == 16


def test_ties_go_to_the_larger_cell_then_to_the_lower_address():
    table = pd.DataFrame([cell("a", 3, 0.5, 0.8), cell("a", 2, 0.6, 0.8, n_test=200), cell("a", 1, 0.7, 0.8)])
    assert winners(table, "held_out", "f1").expert.tolist() == [2]
    assert winners(table.assign(n_test=100), "held_out", "f1").expert.tolist() == [1]


def test_cells_without_numbers_never_win():
    table = pd.DataFrame([cell("a", 0, 0.99, 0.99, status="too_few"), cell("a", 1, 0.5, 0.5)])
    assert winners(table, "raw", "f1").expert.tolist() == [1]


def test_swapping_the_models_flips_the_sign():
    one = scores("moe", [cell("a", 0, 0.9, 0.6), cell("b", 0, 0.5, 0.6)])
    two = scores("dense", [cell("a", 0, 0.7, 0.6), cell("b", 0, 0.6, 0.6)])
    concepts = [FakeConcept("a"), FakeConcept("b")]
    forth, back = compare([one], [two], concepts, DOCS), compare([two], [one], concepts, DOCS)
    np.testing.assert_allclose(forth.gap, -back.gap)
    np.testing.assert_allclose(forth.ci_low, -back.ci_high)


def test_duplicates_count_once_in_the_mean_and_missing_concepts_not_at_all():
    concepts = [FakeConcept("a"), FakeConcept("b1", "b"), FakeConcept("b2", "b"), FakeConcept("gone")]
    moe = scores("moe", [cell("a", 0, 1.0, 0.6), cell("b1", 0, 0.4, 0.6), cell("b2", 0, 0.4, 0.6)])
    table = compare([moe], [], concepts, DOCS)
    mean = pick(table, "held_out", MEAN)
    assert mean.moe == pytest.approx(0.7)
    assert mean.n_concepts == 2
    assert np.isnan(mean.dense)
    assert pick(table, "held_out", "gone").status == "too_few"
    assert np.isnan(pick(table, "held_out", "gone").moe)


def test_a_concept_that_one_model_lacks_has_no_gap():
    moe, dense = scores("moe", [cell("a", 0, 1.0, 0.6)]), scores("dense", [cell("b", 0, 1.0, 0.6)])
    row = pick(compare([moe], [dense], [FakeConcept("a"), FakeConcept("b")], DOCS), "raw", "a")
    assert row.moe == 1.0
    assert np.isnan(row.gap)
    assert row.status == "too_few"


def test_resampled_metrics_equal_recomputation():
    r = np.random.default_rng(0)
    counts = r.integers(1, 20, (3, 12, 6)).astype(float)
    times = document_multiplicities(12, 5, seed=0).astype(float)
    f1 = resampled(counts, times, "f1")
    for w in range(3):
        for b in range(5):
            tp, fp, fn = (times[b] @ counts[w, :, i] for i in range(3))
            assert f1[w, b] == pytest.approx(2 * tp / (2 * tp + fp + fn))


def test_auroc_expansion_is_close_to_reranking():
    from sklearn.metrics import roc_auc_score

    r = np.random.default_rng(1)
    document = np.repeat(np.arange(80), 25)
    truth = r.random(2000) < 0.3
    score = r.normal(size=2000) + truth + r.normal(size=80)[document]
    columns = (a[:, None] for a in (score, truth, np.ones(2000, bool), document))
    counts = document_sums(*columns, 80)
    times = document_multiplicities(80, 40, seed=0).astype(float)
    got = resampled(counts, times, "auroc")[0]
    want = [roc_auc_score(truth, score, sample_weight=t[document]) for t in times]
    assert np.corrcoef(got, want)[0, 1] > 0.99
    assert np.abs(got - want).max() < 0.01


def test_more_seeds_give_a_mean_and_a_spread():
    a, b = scores("moe", [cell("a", 0, 0.9, 0.6)]), scores("moe", [cell("a", 0, 0.7, 0.6)], seed=1)
    d = scores("dense", [cell("a", 0, 0.6, 0.6)])
    row = pick(compare([a, b], [d, d], [FakeConcept("a")], DOCS * 2), "raw", "a")
    assert row.moe == pytest.approx(0.8)
    assert row.n_seeds == 2
    assert row.sd_seeds == pytest.approx(np.std([0.3, 0.1], ddof=1))
