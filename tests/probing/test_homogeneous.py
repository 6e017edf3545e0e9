"""``homogeneous`` against exact enumeration, and on models whose neurons are all equal."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from moe_lens.probing.arms import METRICS, REGISTRY
from moe_lens.probing.arms.homogeneous import Rates, auroc_variance, expected_maximum, moved, pooled_rates
from moe_lens.probing.compare import MEAN, compare
from moe_lens.stats import document_multiplicities, f1_balanced
from moe_lens.types import Split
from tests.probing.scanned import Concept, Store, Table, alike, scores

SCORES = {
    "f1": lambda tp, fp, p, n: 2 * tp / (tp + fp + p),
    "f1_balanced": lambda tp, fp, p, n: f1_balanced(tp / p, fp / n),
}


def rates(tpr, fpr, auroc=0.7):
    return Rates(float(tpr), float(fpr), float(auroc))


def best(n_pos, n_neg, tpr, fpr, auroc=0.7, **more):
    return expected_maximum(np.array(n_pos), np.array(n_neg), rates(tpr, fpr, auroc), **more)


class TestHomogeneous:
    @staticmethod
    def exact(cells, tpr, fpr, score):
        """Expectation of the maximum, from the exact distribution of every cell: P(max <= x) is their product."""
        from scipy.stats import binom

        tables = []
        for n_pos, n_neg in cells:
            tp, fp = np.arange(n_pos + 1)[:, None], np.arange(n_neg + 1)
            mass = binom.pmf(tp, n_pos, tpr) * binom.pmf(fp, n_neg, fpr)
            tables.append((score(tp, fp, n_pos, n_neg).ravel(), mass.ravel()))
        values = np.unique(np.concatenate([value for value, _ in tables]))
        below = np.ones(len(values))
        for value, mass in tables:
            order = value.argsort()
            cumulative = np.append(0, mass[order].cumsum())
            below *= cumulative[np.searchsorted(value[order], values, "right")]
        return values @ np.diff(below, prepend=0)

    @pytest.mark.parametrize("metric", SCORES)
    @pytest.mark.parametrize("cells", [[(25, 25)], [(40, 200)], [(25, 25)] * 6, [(25, 60), (100, 30), (60, 60)]])
    @pytest.mark.parametrize(("tpr", "fpr"), [(0.5, 0.5), (0.85, 0.1), (0.0, 0.2), (1.0, 0.0)])
    def test_the_expected_maximum_equals_exact_enumeration(self, cells, tpr, fpr, metric):
        found = best(*zip(*cells, strict=True), tpr, fpr)[metric]
        assert found.mean == pytest.approx(self.exact(cells, tpr, fpr, SCORES[metric]), abs=0.005)
        alone = [self.exact([cell], tpr, fpr, SCORES[metric]) for cell in cells]
        assert found.one_cell == pytest.approx(np.mean(alone), abs=0.005)

    @pytest.mark.parametrize("n_cells", [1, 10, 600])
    def test_the_monte_carlo_error_is_below_two_thousandths(self, n_cells):
        found = best([25] * n_cells, [25] * n_cells, 0.5, 0.5, 0.5)
        assert max(m.error for m in found.values()) < 0.002

    def test_more_cells_of_equal_quality_score_higher_and_a_single_one_does_not(self):
        by_number = [best([40] * n, [60] * n, 0.6, 0.3) for n in (1, 4, 16, 64, 256)]
        for metric in METRICS:
            assert (np.diff([m[metric].mean for m in by_number]) > 0.01).all()
            assert np.ptp([m[metric].one_cell for m in by_number]) < 0.005
            assert by_number[0][metric].mean == by_number[0][metric].one_cell

    def test_with_very_many_tokens_it_is_the_pooled_score(self):
        n_pos, n_neg, tpr, fpr = 2e6, 6e6, 0.6, 0.1
        found = best([int(n_pos)] * 8, [int(n_neg)] * 8, tpr, fpr, 0.8)
        assert found["f1"].mean == pytest.approx(2 * tpr * n_pos / (tpr * n_pos + fpr * n_neg + n_pos), abs=0.002)
        assert found["f1_balanced"].mean == pytest.approx(f1_balanced(tpr, fpr), abs=0.002)
        assert found["auroc"].mean == pytest.approx(0.8, abs=0.002)

    @pytest.mark.parametrize("n_cells", [1, 12])
    @pytest.mark.parametrize(("n_pos", "n_neg"), [(25, 25), (30, 150)])
    @pytest.mark.parametrize("shift", [0.0, 1.0, 2.0])
    def test_the_auroc_model_is_close_to_ranking_normal_scores(self, shift, n_pos, n_neg, n_cells):
        from scipy.stats import norm, rankdata

        r = np.random.default_rng(0)
        score = r.normal(size=(3000 * 12 // n_cells // 4, n_cells, n_pos + n_neg))
        score[..., :n_pos] += shift
        area = (rankdata(score, axis=-1)[..., :n_pos].sum(-1) - n_pos * (n_pos + 1) / 2) / n_pos / n_neg
        found = best([n_pos] * n_cells, [n_neg] * n_cells, 0.5, 0.5, norm.cdf(shift / 2**0.5))["auroc"]
        assert found.mean == pytest.approx(area.max(1).mean(), abs=0.01)

    def test_the_auroc_variance_is_exact_for_a_useless_score(self):
        n_pos, n_neg = np.array([1, 7, 100]), np.array([1, 30, 25])
        np.testing.assert_allclose(auroc_variance(0.5, n_pos, n_neg), (n_pos + n_neg + 1) / (12 * n_pos * n_neg))

    @pytest.mark.parametrize("auroc", [0.0, 0.02, 0.999, 1.0])
    def test_extreme_areas_stay_areas(self, auroc):
        found = best([25] * 50, [25] * 50, 1.0, 0.0, auroc)["auroc"]
        assert 0 <= found.mean <= 1

    def test_resampled_rates_move_the_maximum_as_a_new_simulation_would(self):
        r = np.random.default_rng(3)
        n_pos, n_neg = r.integers(25, 120, 10), r.integers(25, 400, 10)
        point = rates(0.7, 0.2, 0.8)
        at = expected_maximum(n_pos, n_neg, point, tolerance=3e-4)
        other = Rates(*(base + r.normal(0, 0.03, 12) for base in (0.7, 0.2, 0.8)))
        fresh = [
            expected_maximum(n_pos, n_neg, rates(*one), tolerance=3e-4)
            for one in zip(other.tpr, other.fpr, other.auroc, strict=True)
        ]
        for metric in METRICS:
            want = np.array([m[metric].mean for m in fresh])
            assert want.std() > 0.005
            best = at[metric]
            np.testing.assert_allclose(moved(best.mean, best.slope, point, other), want, atol=0.004)
            alone = np.array([m[metric].one_cell for m in fresh])
            np.testing.assert_allclose(moved(best.one_cell, best.one_cell_slope, point, other), alone, atol=0.004)

    def test_pooled_rates_are_total_hits_by_total_tokens(self):
        counts = np.array([[3, 1, 1, 5, 0.2], [1, 0, 3, 6, -0.2]], float)
        point, drawn = pooled_rates(counts, np.array([[2.0, 0.0]]), 0.7, 10.0)
        assert (point.tpr, point.fpr, point.auroc) == (4 / 8, 1 / 12, 0.7)
        assert (drawn.tpr[0], drawn.fpr[0], drawn.auroc[0]) == (3 / 4, 1 / 6, pytest.approx(0.74))


class TestModelsWhoseNeuronsAreAllEqual:
    """200 simulated concepts: 16 small cells against 2 large ones, every neuron equally good."""

    N = 200

    @pytest.fixture(scope="class")
    @classmethod
    def both(cls):
        moe, documents = alike(role="moe", n_concepts=cls.N, n_experts=8, seed=1)
        dense, _ = alike(role="dense", n_concepts=cls.N, n_experts=1, seed=1)
        return moe, dense, documents

    @pytest.fixture(scope="class")
    @classmethod
    def gaps(cls, both):
        """Gap per concept, columns (metric, arm)."""
        moe, dense, documents = both
        concepts = [Concept(f"c{i}") for i in range(cls.N)]
        table = compare([moe], [dense], concepts, [documents], n_resamples=100)  # type: ignore[arg-type]
        return table[table.concept != MEAN].pivot(index="concept", columns=["metric", "arm"], values="gap")

    @pytest.mark.parametrize("metric", METRICS)
    def test_raw_shows_a_gap_that_is_not_there(self, gaps, metric):
        raw = gaps[metric].raw
        assert raw.mean() > 0.02
        assert raw.mean() > 5 * raw.std() / self.N**0.5

    @pytest.mark.parametrize("metric", METRICS)
    def test_search_explains_all_of_it(self, gaps, metric):
        left = gaps[metric].raw - gaps[metric].homogeneous
        assert abs(left.mean()) < 3 * left.std() / self.N**0.5 + 0.002

    @pytest.mark.parametrize("metric", METRICS)
    def test_nothing_is_left_when_the_cell_is_chosen_on_other_documents(self, gaps, metric):
        held = gaps[metric].held_out
        assert abs(held.mean()) < 3 * held.std() / self.N**0.5

    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize("role", ["moe", "dense"])
    def test_raw_is_a_draw_from_the_simulated_search(self, both, metric, role):
        """A 5 % test of "raw equals homogeneous" rejects at most as often as that, in either model."""
        model, _, documents = both if role == "moe" else (both[1], None, both[2])
        evidence = model.evidence["homogeneous"]
        z = []
        for concept, counts in zip(evidence.frame.concept, evidence.counts, strict=True):
            cells = model.cells[model.cells.concept == concept]
            n_pos, n_neg = cells.n_pos_test.to_numpy(), (cells.n_test - cells.n_pos_test).to_numpy()
            area = float(np.average(cells.auroc, weights=n_pos * n_neg))
            point, _ = pooled_rates(counts[documents], np.ones((1, len(documents))), area, 1.0)
            found = expected_maximum(n_pos, n_neg, point, tolerance=0.003)[metric]
            z.append((cells[metric].max() - found.mean) / found.sd)
        assert np.mean(np.abs(z) > 1.96) <= 0.09
        assert abs(np.mean(z)) < 0.25

    def test_pooled_counts_are_the_sums_over_cells(self, both):
        model, _, documents = both
        evidence = model.evidence["homogeneous"]
        tp = (model.cells.recall * model.cells.n_pos_test).groupby(model.cells.concept).sum()
        got = pd.Series(evidence.counts[:, documents, 0].sum(1), index=evidence.frame.concept)
        np.testing.assert_allclose(got, tp[got.index])
        np.testing.assert_allclose(evidence.counts[..., 4].sum(1), 0, atol=1e-6)


class TestPooledAuroc:
    """Two cells of one layer: nine tenths of the tokens at an AUROC near .9, the rest near .6."""

    @pytest.fixture(scope="class")
    @classmethod
    def rows(cls):
        r = np.random.default_rng(0)
        document = np.repeat(np.arange(60), 50)
        truth = r.random(3000) < 0.3
        cell = (r.random(3000) < 0.1).astype(int)
        score = r.normal(size=3000) + np.where(cell, 0.35, 1.8) * truth + 0.5 * r.normal(size=60)[document]
        split = [Split.VALIDATE if i % 2 else Split.TEST for i in range(60)]
        visits = {(0, e): np.flatnonzero(cell == e) for e in range(2)}
        model = scores(Store(Table(document, truth[:, None]), visits, {0: score[:, None]}), split, ["a"])
        return model, document, truth, cell, score

    def test_cells_weigh_by_their_pairs(self, rows):
        model = rows[0]
        pairs = model.cells.n_pos_test * (model.cells.n_test - model.cells.n_pos_test)
        documents = np.arange(0, 60, 2)
        (part,) = REGISTRY["homogeneous"].estimates(model, documents, np.ones((2, 30)))["auroc"].values()  # type: ignore[index]
        want = np.average(model.cells.auroc, weights=pairs)
        assert abs(model.cells.auroc.mean() - want) > 0.05
        assert part.one_cell == pytest.approx(want, abs=0.006)
        np.testing.assert_allclose(part.draws, part.value, err_msg="every document once is no change")

    def test_resampled_documents_move_it_as_ranking_anew_would(self, rows):
        from sklearn.metrics import roc_auc_score

        model, document, truth, cell, score = rows
        documents = np.arange(0, 60, 2)
        times = document_multiplicities(30, 60, seed=0).astype(float)
        pairs = (model.cells.n_pos_test * (model.cells.n_test - model.cells.n_pos_test)).to_numpy()
        area = float(np.average(model.cells.auroc, weights=pairs))
        _, drawn = pooled_rates(model.evidence["homogeneous"].counts[0][documents], times, area, float(pairs.sum()))
        want = []
        for one in times:
            weight = np.zeros(60)
            weight[documents] = one
            by_cell = [
                roc_auc_score(truth[cell == e], score[cell == e], sample_weight=weight[document][cell == e])
                for e in range(2)
            ]
            want.append(np.average(by_cell, weights=pairs))
        assert np.corrcoef(drawn.auroc, want)[0, 1] > 0.98
        assert np.abs(drawn.auroc - want).max() < 0.02
