"""How often intervals hold the truth where the truth is known."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pandas as pd
import pytest

from moe_lens.autointerp.scoring.metrics import label_scores, summary
from tests.autointerp.scoring_tables import Tables, tables

N_DOCUMENTS, PER_DOCUMENT, N_RUNS = 40, 4, 400
SHIFT, SHARED = 0.9, 0.7
TRUTH = NormalDist().cdf(SHIFT / 2**0.5)
"""AUROC of two normal scores of variance 1 that lie `SHIFT` apart."""


def clustered(r: np.random.Generator, *, n_experts: int, shared_documents: bool) -> Tables:
    """Items whose scores share `SHARED` of their variance with the items of the same document and side."""
    shape = (n_experts, N_DOCUMENTS, PER_DOCUMENT)
    document = np.broadcast_to(np.arange(N_DOCUMENTS)[:, None], shape)
    if not shared_documents:
        document = document + N_DOCUMENTS * np.arange(n_experts)[:, None, None]
    columns = {"expert": np.broadcast_to(np.arange(n_experts)[:, None, None], shape), "document": document}
    frames = []
    for side, mean in (("", SHIFT), ("other", 0.0)):
        of_document = mean + r.normal(0, SHARED**0.5, (*shape[:2], 1))
        # a baseline that is as good as the answers, and as clustered
        both = {name: of_document + r.normal(0, (1 - SHARED) ** 0.5, shape) for name in ("score", "unigram")}
        frames.append(pd.DataFrame({name: value.ravel() for name, value in {**columns, **both}.items()}))
        frames[-1]["negatives"] = side
    return tables(pd.concat(frames, ignore_index=True))


def coverage(low: np.ndarray, high: np.ndarray, truth: float) -> float:
    return float(np.mean((low <= truth) & (truth <= high)))


@pytest.mark.slow
def test_intervals_over_documents_hold_the_truth_and_intervals_over_tokens_do_not():
    t = clustered(np.random.default_rng(0), n_experts=N_RUNS, shared_documents=False)
    alone = t.items.assign(document=np.arange(len(t.items)))
    good = t.score(draws=300).frame
    naive = label_scores(alone, t.answers, t.labels, t.baselines, draws=300).frame
    assert good["auroc"].mean() == pytest.approx(TRUTH, abs=0.01)
    assert 0.91 <= coverage(good["ci_low"], good["ci_high"], TRUTH) <= 0.98
    assert coverage(naive["ci_low"], naive["ci_high"], TRUTH) < 0.85
    assert 0.91 <= coverage(good["margin_unigram_low"], good["margin_unigram_high"], 0) <= 0.98
    above = (good["margin_unigram_low"] > 0).mean()
    assert above < 0.06  # 2.5 % of labels are above a baseline that is just as good


@pytest.mark.slow
def test_intervals_of_means_over_experts_hold_the_truth():
    r = np.random.default_rng(1)
    runs = (clustered(r, n_experts=4, shared_documents=True).score(draws=200, seed=run) for run in range(N_RUNS // 3))
    found = pd.DataFrame([summary(scores).iloc[0] for scores in runs])
    assert 0.9 <= coverage(found["ci_low"], found["ci_high"], TRUTH) <= 0.99
