"""Small runs of the ``equal_*`` arms, and their scores as a table with intervals."""

from __future__ import annotations

import numpy as np
import pandas as pd

import moe_lens as ml
from moe_lens.probing.arms.base import METRICS
from moe_lens.probing.equal import equal_arms, equal_candidates
from moe_lens.probing.settings import ProbeSettings
from moe_lens.stats import document_multiplicities, percentile_interval

MEAN = "__mean__"
SETTINGS = ProbeSettings(k=(1, 4), max_length=64, n_resamples=200)
CONCEPTS = [
    ml.concept(f"c{i}", regex=f"[{letters}]", granularity="type")
    for i, letters in enumerate(["abcABC", "defDEF", "ghijGHIJ", "0123", "4567", "89", "aeAE05", "bdBD16"])
]


def run(moe, dense, tokens, tokens_dense=None, **kwargs):
    given = {"draws": 3, "k": (1, 4), "progress": False, **kwargs}
    return equal_candidates(moe, dense, tokens, tokens if tokens_dense is None else tokens_dense, SETTINGS, **given)


def bootstrap(scores, n=200):
    """Bootstrap samples of test documents, then each document left out."""
    n_documents = len(scores.documents)
    return np.concatenate(
        [document_multiplicities(n_documents, n, seed=0), np.ones((n_documents,) * 2) - np.eye(n_documents)]
    )


def table(scores, choice="validate"):
    """One row per (arm, metric, concept, k), and the mean over concepts: scores, gap and its interval."""
    times = bootstrap(scores)
    n = len(scores.documents)
    rows = []
    for arm, sides in equal_arms(scores, times, n_jackknife=n, cell_choice=choice).items():
        for metric in METRICS:
            moe, dense = sides["moe"][metric], sides["dense"][metric]
            assert moe.keys() == dense.keys()
            both = {key: (moe[key], dense[key]) for key in moe}
            for k in {key[1] for key in both}:
                here = {name: pair for (name, at), pair in both.items() if at == k}
                groups = {**{name: [pair] for name, pair in here.items()}, MEAN: list(here.values())}
                for name, pairs in groups.items():
                    values = np.mean([[part.value for part in pair] for pair in pairs], 0)
                    gaps = np.mean([a.draws - b.draws for a, b in pairs], 0)[:-n]
                    low, high = percentile_interval(gaps)
                    sizes = [max(getattr(p[i], f) for p in pairs) for f in ("n_cells", "n_neurons") for i in (0, 1)]
                    rows.append((arm, metric, name, k, *values, values[0] - values[1], low, high, *sizes))
    columns = ["arm", "metric", "concept", "k", "moe", "dense", "gap", "ci_low", "ci_high"]
    sizes = ["n_cells_moe", "n_cells_dense", "n_neurons_moe", "n_neurons_dense"]
    return pd.DataFrame(rows, columns=[*columns, *sizes])


def mean_row(rows, arm, *, k=1, metric="auroc"):
    (row,) = rows[(rows.arm == arm) & (rows.concept == MEAN) & (rows.k == k) & (rows.metric == metric)].itertuples()
    return row


def parts(scores, times, **kwargs):
    """What `equal_arms` returns, by (arm, role, metric, concept, k)."""
    found = equal_arms(scores, times, **kwargs)
    return {
        (arm, role, metric, *at): part
        for arm, sides in found.items() for role, side in sides.items()
        for metric, by_key in side.items() for at, part in by_key.items()
    }  # fmt: skip
