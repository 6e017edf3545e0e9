"""How often false labels pass and true ones are found, on simulated visits (METRICS 3, O11)."""

from __future__ import annotations

import numpy as np
import pytest

from moe_lens.causal.trial import cells
from moe_lens.causal.trial.need import Beside, GateCurve, Need, needed
from moe_lens.causal.trial.verdict import Evidence, Verdict, q_values, verdict
from moe_lens.stats import document_multiplicities, documents_needed

VISITS = 8
"""Of a document."""


def skewed(rng: np.random.Generator, documents: int, mean: float, sd: float) -> np.ndarray:
    """Effects with a long right tail, half of whose variance is between documents."""
    raw = rng.exponential(size=(documents, 1)) + rng.exponential(size=(documents, VISITS))
    return (mean + sd * (raw - 2) / np.sqrt(2)).ravel()


def need_of(rng: np.random.Generator, documents: int, mean: float, sd: float, draws: int) -> Need:
    """Visits of an expert whose co-selected expert shares the difficulty of the token; all gates are equal."""
    document = np.repeat(np.arange(documents), VISITS)
    shared, z = skewed(rng, documents, 0.2, sd), rng.random(len(document)) < 0.5
    own, other = (shared + skewed(rng, documents, m, sd) for m in (mean, 0))
    gate = np.full(len(own), 0.5)
    curve = GateCurve.of_layer(document % 2, gate, other, document, n_experts=3, n_documents=documents)[2]
    times = document_multiplicities(documents, draws, seed=int(rng.integers(2**31))).astype(np.float64)
    return needed(own, z, document, times, beside=Beside(other, gate, gate, curve))


def rejected(documents: int, mean: float, sd: float, *, trials: int = 400, draws: int = 300) -> float:
    rng = np.random.default_rng(0)
    return float(np.mean([need_of(rng, documents, mean, sd, draws).p < 0.05 for _ in range(trials)]))


@pytest.mark.parametrize("documents", [12, 40])
def test_p_of_an_expert_like_any_other_is_below_5_percent_in_5_percent_of_trials(documents):
    assert 0.02 < rejected(documents, 0, 0.3) < 0.085  # 5 % +- 3 standard errors of 400 trials


def test_p_of_an_expert_that_is_needed_less_is_hardly_ever_small():
    assert rejected(40, -0.1, 0.3) < 0.01


def test_a_planted_effect_is_found_as_often_as_its_size_promises():
    """d = .5: the mean over documents of the difference, over its spread."""
    rng = np.random.default_rng(1)
    spread = np.std([need_of(rng, 50, 0, 0.3, 100).need.value for _ in range(400)]) * np.sqrt(50)
    n = int(documents_needed(0.5, power=0.8, sides=1))
    assert 0.7 < rejected(n, 0.5 * spread, 0.3) < 0.92


def test_intervals_of_need_cover_the_truth():
    rng = np.random.default_rng(2)
    needs = [need_of(rng, 50, 0.1, 0.3, 300).need for _ in range(400)]
    covered = np.mean([need.low <= 0.1 <= need.high for need in needs])
    assert 0.91 < covered <= 0.98


def trial_of_labels(rng: np.random.Generator, n_labels: int, mean: float) -> list[Verdict]:
    """Labels that predict routing well; experts lose `mean` more than those beside them, in two modes."""
    documents = 60
    evidence, needs = [], []
    for _ in range(n_labels):
        z = rng.random(documents * 40) < 0.3
        r = np.where(z, rng.random(len(z)) < 0.6, rng.random(len(z)) < 0.1)
        counts = cells.cell_counts(z, r, np.repeat(np.arange(documents), 40), documents)
        times = document_multiplicities(documents, 200, seed=int(rng.integers(2**31))).astype(np.float64)
        evidence.append(Evidence(documents, documents, int(r.sum()), 0.0, cells.routing_auroc(counts, times)))
        needs.append([need_of(rng, documents, mean, 0.3, 200) for _ in range(2)])
    q = np.stack([q_values([pair[mode].p for pair in needs], [True] * n_labels) for mode in (0, 1)], axis=1)
    return [verdict(e, pair, row.tolist()) for e, pair, row in zip(evidence, needs, q, strict=True)]


def test_labels_that_describe_routing_alone_are_supported_at_most_5_percent_of_the_time():
    rng = np.random.default_rng(0)
    false = [v for _ in range(10) for v in trial_of_labels(rng, 20, 0)]
    assert np.mean([v == Verdict.SUPPORTED for v in false]) <= 0.05
    assert Verdict.REFUTED not in false


def test_labels_whose_experts_are_needed_are_supported_most_of_the_time():
    rng = np.random.default_rng(0)
    true = [v for _ in range(5) for v in trial_of_labels(rng, 20, 0.25)]
    assert np.mean([v == Verdict.SUPPORTED for v in true]) > 0.8
