"""``whole_population``: the two-part fit, its scores over all tokens, and its intervals, against outside answers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score

from moe_lens.capture.moments import ClassMoments
from moe_lens.capture.rows import RowStore
from moe_lens.capture.tokens import TokenTable
from moe_lens.probing.arms import REGISTRY, ModelScores, Scanned, collect
from moe_lens.probing.arms.whole_population import population_scores, routing_sums, token_sums
from moe_lens.probing.compare import compare
from moe_lens.probing.evaluate import Evaluator, columns_needed
from moe_lens.probing.fit import LayerFitter, Probe, TwoPart, off_route_logits
from moe_lens.probing.parts import read_model, write_model
from moe_lens.probing.settings import ProbeSettings
from moe_lens.stats import document_multiplicities, document_weights
from moe_lens.types import Role, Split, Status
from tests.probing.scanned import Concept
from tests.synthetic import feed, make_batch, make_tap

N_DOCUMENTS, LENGTH = 120, 50
SPLIT = [(Split.SELECT, Split.VALIDATE, Split.SELECT, Split.TEST)[i % 4] for i in range(N_DOCUMENTS)]
TEST = np.flatnonzero([s == Split.TEST for s in SPLIT])
DOCUMENT = np.repeat(np.arange(N_DOCUMENTS), LENGTH)
LABELS = np.random.default_rng(5).random(len(DOCUMENT)) < np.repeat(
    np.random.default_rng(6).uniform(0.1, 0.4, N_DOCUMENTS), LENGTH
)


@dataclass(frozen=True)
class Text:
    """Every token of a one-layer model as the tests see it, and the arms' view of the same tokens."""

    expert: np.ndarray
    weight: np.ndarray
    h: np.ndarray
    scores: ModelScores
    probes: list[Probe]

    def probe(self, expert: int = 0, k: int = 1) -> Probe:
        (found,) = [p for p in self.probes if (p.expert, p.k) == (expert, k)]
        return found

    def gh(self, expert: int, neurons: np.ndarray) -> np.ndarray:
        """Router-weighted activation over all tokens, 0 off the route."""
        return np.where(self.expert == expert, self.weight, 0.0)[:, None] * self.h[:, neurons]

    def two_part(self, probe: Probe) -> np.ndarray:
        line = two_part(probe)
        routed = self.gh(probe.expert, probe.neurons) @ line.coef + line.intercept
        return np.where(self.expert == probe.expert, routed, line.off_route).astype(np.float32)

    def estimates(self, arm: str = "whole_population", times: np.ndarray | None = None):
        found = REGISTRY[arm].estimates(self.scores, TEST, np.ones((1, len(TEST))) if times is None else times)
        assert found is not None
        return found


def two_part(probe: Probe) -> TwoPart:
    assert probe.two_part is not None
    return probe.two_part


def text(
    expert: np.ndarray, h: np.ndarray, *, n_experts: int = 2, k: tuple[int, ...] = (1,), max_rows: int = 100_000,
    weight: np.ndarray | None = None, without: tuple[int, ...] = (),
) -> Text:  # fmt: skip
    """Fit on select, score and collect; the probes of the experts in `without` carry no number."""
    r = np.random.default_rng(0)
    g = np.ones(len(DOCUMENT)) if n_experts == 1 else r.uniform(0.2, 1.0, len(DOCUMENT)).astype(np.float32)
    g = g if weight is None else weight
    select, rest = TokenTable(), TokenTable()
    moments, rows = ClassMoments([0]), RowStore(select, [0], max_rows=max_rows)
    feed([select, moments, rows], _batches(expert, h, g, n_experts, (Split.SELECT,)))
    fitter = LayerFitter(0, moments.moments(0), select, ProbeSettings(k=k, max_rows=max_rows))
    probes = [p for e in range(n_experts) for p in fitter.fit(e, rows.rows(0, e), [0], k)]
    columns = columns_needed(probes, {0: n_experts})
    kept = RowStore(rest, [0], max_rows=None, columns=columns)
    feed([rest, kept], _batches(expert, h, g, n_experts, (Split.VALIDATE, Split.TEST)))
    evaluator = Evaluator(kept, columns, SPLIT)
    by_cell = [[p for p in probes if p.expert == e] for e in range(n_experts)]
    cells = pd.DataFrame([row for e, mine in enumerate(by_cell) for row in evaluator.score(0, e, mine)])
    cells["concept"] = "c"
    cells.loc[cells.expert.isin(without), "status"] = Status.TOO_FEW.value
    scanned = Scanned(evaluator, probes, cells, [(0, e) for e in range(n_experts)], ["c"], N_DOCUMENTS)
    counts = {}
    for (layer, e), mine in scanned.usable_probes.items():
        found = evaluator.document_counts(mine, N_DOCUMENTS)
        counts |= {(layer, e, "c", p.k): c for p, c in zip(mine, found, strict=True)}
    role = "dense" if n_experts == 1 else "moe"
    return Text(expert, g, h, ModelScores(role, 0, h.shape[1], cells, counts, collect(scanned)), probes)


def _batches(expert, h, weight, n_experts, splits):
    documents = [d for d in range(N_DOCUMENTS) if SPLIT[d] in splits]
    here = np.isin(DOCUMENT, documents)
    batch = make_batch(torch.from_numpy(LABELS[here]).view(-1, LENGTH, 1), documents=documents)
    tap = make_tap(
        batch, torch.from_numpy(expert[here])[:, None], torch.from_numpy(h[here])[:, None].float(),
        n_experts=n_experts, weights=torch.from_numpy(weight[here])[:, None].float(),
        role=Role.DENSE if n_experts == 1 else Role.MOE,
    )  # fmt: skip
    return [(batch, [tap])]


def routing(on: float, off: float, seed: int = 1) -> np.ndarray:
    """Expert 0 sees this share of positives, and of negatives; expert 1 sees the rest."""
    return np.where(np.random.default_rng(seed).random(len(DOCUMENT)) < np.where(LABELS, on, off), 0, 1)


def noise(d_ff: int = 4, seed: int = 2) -> np.ndarray:
    """Neurons that are never negative and read nothing."""
    return np.abs(np.random.default_rng(seed).standard_normal((len(DOCUMENT), d_ff))).astype(np.float32)


def planted(strength: float = 2.0) -> np.ndarray:
    """The same, but neuron 1 reads the concept."""
    h = noise()
    h[:, 1] += strength * LABELS
    return h


@pytest.fixture(scope="module")
def model() -> Text:
    return text(routing(0.7, 0.3), planted())


@pytest.fixture(scope="module")
def wide() -> Text:
    """Two-part scores of three neurons."""
    return text(routing(0.7, 0.3), planted(), k=(3,))


SELECT, IN_TEST = (np.isin(DOCUMENT, np.flatnonzero([s == w for s in SPLIT])) for w in (Split.SELECT, Split.TEST))


class TestFit:
    @pytest.mark.parametrize("k", [1, 3])
    def test_the_two_parts_equal_one_regression_on_the_indicator_and_the_weighted_activation(self, model, wide, k):
        model = model if k == 1 else wide
        probe = model.probe(k=k)
        r, y = model.expert[SELECT] == 0, LABELS[SELECT]
        gh = model.gh(0, probe.neurons)[SELECT]
        z = np.where(r[:, None], (gh - gh[r].mean(0)) / gh[r].std(0), 0.0)
        sklearn = LogisticRegression(C=1.0, solver="newton-cholesky", tol=1e-12, max_iter=500)
        sklearn.fit(np.column_stack([1e4 * r, z]), y)  # so large a column is as good as free of the penalty
        sign = np.where(y, 1.0, -1.0)

        def loss(w):
            return np.logaddexp(0, -sign * (w[0] + w[1] * r + z @ w[2:])).sum() + (w[2:] ** 2).sum() / 2

        exact = minimize(loss, np.zeros(2 + k), method="BFGS", options={"gtol": 1e-6}).x
        ours = model.two_part(probe)[SELECT]
        np.testing.assert_allclose(ours, sklearn.decision_function(np.column_stack([1e4 * r, z])), atol=1e-4)
        np.testing.assert_allclose(ours, exact[0] + exact[1] * r + z @ exact[2:], atol=1e-4)

    def test_drawn_rows_stand_for_the_class_balance_of_the_cell(self):
        few, every = (text(routing(0.6, 0.5), planted(), max_rows=n) for n in (400, 100_000))
        routed = SELECT & (few.expert == 0)
        share = LABELS[routed].mean()
        p = 1 / (1 + np.exp(-few.two_part(few.probe())[routed]))
        assert share < 0.35
        assert p.mean() == pytest.approx(share, abs=0.02), "balanced weights would say a half"
        assert two_part(few.probe()).off_route == two_part(every.probe()).off_route

    def test_tokens_off_the_route_share_the_log_odds_of_their_classes(self, model):
        off = SELECT & (model.expert != 0)
        assert two_part(model.probe()).off_route == pytest.approx(np.log(LABELS[off].sum() / (~LABELS[off]).sum()))

    def test_an_empty_class_off_the_route_gets_half_a_token_and_no_token_no_evidence(self):
        labels = torch.zeros(1, 40, 1, dtype=torch.bool)
        labels[0, :15] = True
        batch = make_batch(labels, documents=[0])
        expert = torch.where(torch.arange(40) < 30, 0, 1)  # all positives visit expert 0
        tokens, moments = TokenTable(), ClassMoments([0])
        feed([tokens, moments], [(batch, [make_tap(batch, expert[:, None], torch.ones(40, 1, 2), n_experts=2)])])
        off = off_route_logits(moments.moments(0), tokens)
        assert off[:, 0].tolist() == pytest.approx([np.log(0.5 / 10.5), np.log(15 / 15)])
        tokens, moments = TokenTable(), ClassMoments([0])
        tap = make_tap(batch, torch.zeros(40, 1, dtype=torch.long), torch.ones(40, 1, 2), n_experts=1)
        feed([tokens, moments], [(batch, [tap])])
        assert off_route_logits(moments.moments(0), tokens).tolist() == [[0.0]]

    def test_a_fit_without_a_two_part_score_never_competes(self, model):
        probe = replace(model.probe(), two_part=None)
        cells = model.scores.cells
        scanned = Scanned(None, [probe], cells, [(0, 0)], ["c"], N_DOCUMENTS)  # type: ignore[arg-type]
        assert scanned.usable_probes
        scanned = replace(scanned, evaluator=_NoRows())  # type: ignore[arg-type]
        assert REGISTRY["whole_population"].collect(scanned) is None


class _NoRows(Evaluator):
    def __init__(self) -> None:
        self.split_of = np.asarray([s.value for s in SPLIT])

    def class_counts(self, n_documents, layer=None, expert=None):
        return np.ones((n_documents, 1, 2))


class TestScores:
    @pytest.mark.parametrize("k", [1, 3])
    def test_auroc_and_average_precision_are_those_of_all_test_tokens(self, model, wide, k):
        model = model if k == 1 else wide
        (chosen,) = model.scores.evidence["whole_population"].frame.query("k == @k").itertuples()
        score = model.two_part(model.probe(chosen.expert, k))[IN_TEST]
        found, y = model.estimates(), LABELS[IN_TEST]
        assert found["auroc"]["c", k].value == pytest.approx(roc_auc_score(y, score), abs=1e-6)
        assert found["average_precision"]["c", k].value == pytest.approx(average_precision_score(y, score), abs=1e-6)

    def test_the_cell_is_chosen_by_auroc_over_all_validate_tokens(self):
        both = text(routing(0.7, 0.3), np.where(routing(0.7, 0.3)[:, None] == 0, noise(), planted(4.0)))
        here = np.isin(DOCUMENT, np.flatnonzero([s == Split.VALIDATE for s in SPLIT]))
        aurocs = [roc_auc_score(LABELS[here], both.two_part(both.probe(e))[here]) for e in (0, 1)]
        (chosen,) = both.scores.evidence["whole_population"].frame.itertuples()
        assert aurocs[1] > aurocs[0] + 0.02
        assert (chosen.expert, chosen.n_cells) == (1, 2)
        assert chosen.auroc_validate == pytest.approx(aurocs[1], abs=1e-6)

    def test_chance_is_what_the_routing_alone_scores_on_the_same_tokens(self, model):
        (cell,) = model.scores.evidence["routing_only"].frame.itertuples()
        r, y, found = (model.expert == cell.expert)[IN_TEST], LABELS[IN_TEST], model.estimates()
        for metric, score in (("auroc", roc_auc_score), ("average_precision", average_precision_score)):
            part = found[metric]["c", 1]
            assert part.chance == pytest.approx(score(y, r))
            assert found[f"{metric}_increment"]["c", 1].value == pytest.approx(part.value - part.chance)
            assert found[f"{metric}_increment"]["c", 1].chance == 0
        assert found["auroc"]["c", 1].chance == pytest.approx(model.estimates("routing_only")["auroc"]["c", 1].value)

    def test_in_a_dense_layer_the_score_is_the_neuron_and_chance_is_none(self):
        dense = text(np.zeros(len(DOCUMENT), int), planted(), n_experts=1)
        found, y = dense.estimates(), LABELS[IN_TEST]
        assert found["auroc"]["c", 1].value == pytest.approx(roc_auc_score(y, dense.h[IN_TEST, 1]), abs=1e-6)
        assert found["auroc"]["c", 1].chance == 0.5
        assert found["average_precision"]["c", 1].chance == pytest.approx(y.mean())


class TestIncrement:
    def test_a_neuron_of_pure_noise_adds_nothing_though_filling_with_zeros_would_credit_it_with_the_routing(self):
        model = text(routing(0.8, 0.1), noise(), weight=np.ones(len(DOCUMENT), np.float32))
        probe, y = model.probe(), LABELS[IN_TEST]
        filled = roc_auc_score(y, model.gh(0, probe.neurons)[IN_TEST, 0])
        alone = model.estimates("routing_only")["auroc"]["c", 1].value
        of_cell = roc_auc_score(y, model.two_part(probe)[IN_TEST])
        assert alone > 0.8
        assert filled - 0.5 > 0.9 * (alone - 0.5), "the filled score knows what the router knows"
        assert of_cell == pytest.approx(alone, abs=0.02), "so does the two-part score, and no more"
        found = model.estimates()
        assert found["auroc_increment"]["c", 1].value == pytest.approx(0, abs=0.02)
        assert found["average_precision_increment"]["c", 1].value == pytest.approx(0, abs=0.02)

    def test_noise_adds_nothing_on_average_where_routing_knows_nothing_either(self):
        found = [
            text(routing(0.5, 0.5, seed), noise(2, seed + 100)).estimates()["auroc_increment"]["c", 1].value
            for seed in range(8)
        ]
        assert abs(np.mean(found)) < 0.015

    def test_a_planted_neuron_adds_what_it_separates_within_the_routed_tokens(self):
        """P(rank right) gains the pairs of two routed tokens: tpr * fpr * (AUROC inside - 1/2), if ranks do not mix."""
        model = text(routing(0.7, 0.3), planted(1.5), weight=np.ones(len(DOCUMENT), np.float32), without=(1,))
        probe, y = model.probe(), LABELS[IN_TEST]
        routed = (model.expert == 0)[IN_TEST]
        score = model.two_part(probe)[IN_TEST]
        inside = roc_auc_score(y[routed], model.h[IN_TEST, 1][routed])
        below = [(score[routed & (y == c)] < two_part(probe).off_route).mean() for c in (0, 1)]
        tpr, fpr = routed[y].mean(), routed[~y].mean()
        gain = tpr * fpr * (inside - 0.5) + fpr * (1 - tpr) * below[0] - tpr * (1 - fpr) * below[1]
        assert gain > 0.05
        assert model.estimates()["auroc_increment"]["c", 1].value == pytest.approx(gain, abs=1e-6)

    def test_the_routing_stands_alone_where_its_cell_cannot_be_probed(self):
        """Expert 0 knows the concept and has no probe; the neurons of expert 1 know nothing."""
        found = text(routing(0.9, 0.1), noise(), without=(0,)).estimates()
        assert found["auroc"]["c", 1].value == found["auroc"]["c", 1].chance > 0.8
        assert found["auroc_increment"]["c", 1].value == 0
        assert found["average_precision_increment"]["c", 1].value == 0

    def test_it_is_paired_with_the_routing_draw_by_draw(self, model):
        times = document_multiplicities(len(TEST), 50, seed=3).astype(float)
        found, alone = model.estimates(times=times), model.estimates("routing_only", times)
        difference = found["auroc"]["c", 1].draws - alone["auroc"]["c", 1].draws
        np.testing.assert_allclose(found["auroc_increment"]["c", 1].draws, difference, atol=1e-5)


class TestResampling:
    """First-order draws against weighting every token."""

    @pytest.fixture(scope="class")
    @classmethod
    def tokens(cls):
        r = np.random.default_rng(4)
        n_documents, length = 40, 30
        document = np.repeat(np.arange(n_documents), length)
        y = r.random(len(document)) < np.repeat(r.uniform(0.1, 0.5, n_documents), length)
        routed = r.random(len(document)) < np.where(y, 0.7, 0.4)
        score = np.round(r.normal(1.0 * y + np.repeat(r.normal(0, 0.5, n_documents), length)), 1)  # with many ties
        score = np.where(routed, score, 0.3).astype(np.float32)
        total = np.stack([np.bincount(document, y), np.bincount(document, ~y)], 1)
        sums = token_sums(score[routed], y[routed], document[routed], 0.3, total)
        return document, y, score, routed, sums

    @staticmethod
    def exact(document, y, score, weights):
        w = weights[document]
        return roc_auc_score(y, score, sample_weight=w), average_precision_score(y, score, sample_weight=w)

    def test_the_full_sample_is_exact(self, tokens):
        document, y, score, _, sums = tokens
        found = population_scores(sums.sum(0), np.ones((1, 40)) @ sums)
        for (value, draws), expected in zip(found.values(), self.exact(document, y, score, np.ones(40)), strict=True):
            assert value == pytest.approx(expected, abs=1e-12)
            assert draws[0] == pytest.approx(expected, abs=1e-12)

    @pytest.mark.parametrize("which", ["two-part", "routing alone"])
    def test_derivatives_equal_finite_differences(self, tokens, which):
        document, y, score, routed, sums = tokens
        if which == "routing alone":
            outcome = np.select([routed & y, routed & ~y, ~routed & y], [0, 1, 2], 3)
            sums = routing_sums(np.stack([np.bincount(document, outcome == i) for i in range(4)], 1))
            score = routed.astype(float)
        step = 1e-4
        for up, down in zip(1 + step * np.eye(40), 1 - step * np.eye(40), strict=True):
            ours = population_scores(sums.sum(0), np.stack([up, down]) @ sums)
            a, b = (np.array(self.exact(document, y, score, w)) for w in (up, down))
            for (_, draws), expected in zip(ours.values(), (a - b) / (2 * step), strict=True):
                assert (draws[0] - draws[1]) / (2 * step) == pytest.approx(expected, abs=1e-7)

    def test_draws_follow_exact_recomputation_on_resampled_documents(self, tokens):
        document, y, score, _, sums = tokens
        times = document_multiplicities(40, 300, seed=1).astype(float)
        exact = np.array([self.exact(document, y, score, w) for w in times]).T
        for (_, draws), expected in zip(population_scores(sums.sum(0), times @ sums).values(), exact, strict=True):
            assert np.corrcoef(draws, expected)[0, 1] > 0.99
            assert np.sqrt(np.mean((draws - expected) ** 2)) < 0.15 * expected.std()
            assert draws.std() == pytest.approx(expected.std(), rel=0.05)

    def test_a_sample_without_positives_has_no_score(self):
        score, y, document = (
            np.array([1.0, 2.0, 3.0, 2.5], np.float32),
            np.array([True, False, True, False]),
            np.arange(4),
        )
        sums = token_sums(score, y, document, 0.0, np.stack([y, ~y], 1).astype(int))
        found = population_scores(sums.sum(0), np.array([[0.0, 1, 0, 1], [1, 1, 1, 1]]) @ sums)
        assert all(np.isfinite(draws).tolist() == [False, True] for _, draws in found.values())
        assert all(np.isnan(draws[0]) for _, draws in found.values())

    def test_leaving_a_document_out_is_exact_to_second_order(self, tokens):
        document, y, score, _, sums = tokens
        times = document_weights(40, 1, seed=0)[1:]
        exact = np.array([self.exact(document, y, score, w) for w in times]).T
        for (_, draws), expected in zip(population_scores(sums.sum(0), times @ sums).values(), exact, strict=True):
            np.testing.assert_allclose(draws, expected, atol=1e-3)


class TestInTheTable:
    def test_a_dense_model_against_itself_has_no_gap(self):
        dense = text(np.zeros(len(DOCUMENT), int), planted(), n_experts=1).scores
        table = compare([dense], [dense], [Concept("c")], [TEST], n_resamples=200)  # type: ignore[arg-type]
        rows = table[(table.arm == "whole_population") & (table.concept == "c") & table.moe.notna()]
        assert set(rows.metric) == {"auroc", "average_precision", "auroc_increment", "average_precision_increment"}
        assert (rows.gap == 0).all()
        assert ((rows.ci_low <= 0) & (rows.ci_high >= 0)).all()

    def test_it_survives_a_write_and_a_read(self, model, tmp_path: Path):
        write_model(tmp_path / "part", model.scores)
        back = read_model(tmp_path / "part", Role.MOE, 0)
        assert back is not None
        times = document_weights(len(TEST), 20, seed=0)
        before, after = (REGISTRY["whole_population"].estimates(m, TEST, times) for m in (model.scores, back))
        assert before is not None
        assert after is not None
        for metric, by_key in before.items():
            for key, part in by_key.items():
                assert after[metric][key].value == part.value
                np.testing.assert_array_equal(after[metric][key].draws, part.draws)

    @pytest.mark.parametrize("missing", ["whole_population", "routing_only"])
    def test_without_its_evidence_or_that_of_the_routing_it_has_no_numbers(self, model, missing):
        evidence = {name: found for name, found in model.scores.evidence.items() if name != missing}
        bare = replace(model.scores, evidence=evidence)
        assert REGISTRY["whole_population"].estimates(bare, TEST, np.ones((1, len(TEST)))) is None

    def test_the_smallest_k_has_its_numbers_and_no_other(self):
        both = text(routing(0.7, 0.3), planted(), k=(1, 3))
        assert set(both.estimates()["auroc_increment"]) == {("c", 1)}
        assert both.probe(k=3).two_part is None
