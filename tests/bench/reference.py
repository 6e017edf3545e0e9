"""The yardstick: k-sparse probes as the code of arXiv 2604.02178 fits them, without anything of moe_lens.probing.

1. For every concept, every text that has it goes through the model twice: once for its positive tokens, once for
   its negative ones.
2. For every (cell, concept, k), one ``LogisticRegression`` with ``saga`` and at most 500 steps.

Given to it for free: batches as full as ours (its scripts take one text at a time), no LM head, recording of
activations, ranking of neurons, and features that are standardised, without which saga converges less often.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from timing import seconds

from moe_lens.corpus.batches import Batches, Tokenized
from moe_lens.types import Granularity

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from numpy import ndarray

    from moe_lens.models.lens import Lens

MAX_STEPS = 500
COPIES = 2
TOKENS_PER_BATCH = 4096


def windows_of(tokenized: Tokenized, concept: int) -> Int[ndarray, "window"]:
    """Windows of the documents that have at least one token of the concept, longest first."""
    hit = tokenized.eligible & tokenized.in_scope[tokenized.window_of, concept] & tokenized.label(concept)
    documents = np.unique(tokenized.document[tokenized.window_of[hit]])
    windows = np.flatnonzero(np.isin(tokenized.document, documents))
    return windows[np.argsort(-np.diff(tokenized.offsets)[windows], kind="stable")]


def tokens_forwarded(tokenized: Tokenized, *, negatives: bool = False) -> int:
    """Tokens of both copies of all texts of all concepts, padding not counted.

    Args:
        negatives: a document concept has no negative tokens in its own texts; count for it each text in scope once,
            with the concept or without it. The source has no such concepts.
    """
    lengths, total = np.diff(tokenized.offsets), 0
    for c, concept in enumerate(tokenized.concepts):
        if negatives and concept.granularity is Granularity.DOCUMENT:
            total += int(lengths[tokenized.in_scope[:, c]].sum())
        else:
            total += COPIES * int(lengths[windows_of(tokenized, c)].sum())
    return total


def forward_seconds(lens: Lens, tokenized: Tokenized, concept: int) -> tuple[float, int]:
    """Seconds and tokens of the forward passes for one concept. Batches are made beforehand."""
    windows, lengths = windows_of(tokenized, concept), np.diff(tokenized.offsets)
    groups, start = [], 0
    while start < len(windows):
        stop = start + max(1, TOKENS_PER_BATCH // int(lengths[windows[start]]))
        groups.append(windows[start:stop])
        start = stop
    loader = list(Batches(tokenized, tuple(groups)))

    def run() -> None:
        with torch.no_grad():
            for batch in loader * COPIES:
                lens.model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)

    return seconds(run), COPIES * int(lengths[windows].sum())


@dataclass(frozen=True)
class Fit:
    """One probe of the reference."""

    model: LogisticRegression
    mean: Float[ndarray, "k"]
    sd: Float[ndarray, "k"]
    seconds: float

    @property
    def converged(self) -> bool:
        return bool(self.model.n_iter_[0] < MAX_STEPS)

    def predict(self, x: Float[ndarray, "row k"]) -> Bool[ndarray, "row"]:
        return np.asarray(self.model.predict((x - self.mean) / self.sd), bool)


def fit(x: Float[ndarray, "row k"], y: Bool[ndarray, "row"]) -> Fit:
    """Standardise (not timed) and fit one probe (timed)."""
    x = x.astype(np.float64)
    mean, sd = x.mean(0), x.std(0)
    sd = np.where(sd > 0, sd, 1)
    z = (x - mean) / sd
    model = LogisticRegression(solver="saga", max_iter=MAX_STEPS, class_weight="balanced", random_state=0)
    took = seconds(lambda: model.fit(z, y))
    return Fit(model, mean, sd, took)


def aurocs(
    h: Float[ndarray, "row neuron"], positive: Bool[ndarray, "row concept"], used: Bool[ndarray, "row concept"]
) -> Float[ndarray, "neuron concept"]:
    """``roc_auc_score`` for one neuron and one concept at a time; NaN where a class is empty."""
    out = np.full((h.shape[1], positive.shape[1]), np.nan)
    for c in range(positive.shape[1]):
        y = positive[used[:, c], c]
        if not y.any() or y.all():
            continue
        for j in range(h.shape[1]):
            out[j, c] = roc_auc_score(y, h[used[:, c], j])
    return out
