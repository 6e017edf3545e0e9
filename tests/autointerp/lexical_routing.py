"""Routing made to order on real text, captured as a model's would be."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import moe_lens as ml
from moe_lens.capture.exemplars import TopExemplars
from moe_lens.corpus.batches import Tokenized, batches
from tests.synthetic import make_tap

Router = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""(token) first character, end, document -> (token, slot) experts."""


@cache
def bundled_tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(Path(ml.__file__).parent / "bundled" / "tiny-moe")


def route(kept: TopExemplars, tokenized: Tokenized, *routers: Router, n_experts: int) -> TopExemplars:
    """Feed `kept` with taps of one layer per router; expert outputs are all 1."""
    for batch in batches(tokenized, tokens_per_batch=8192):
        kept.start_batch(batch)
        start, end = (x.reshape(-1).numpy() for x in (batch.char_start, batch.char_end))
        document = batch.token_document.numpy()
        for layer, router in enumerate(routers):
            experts = torch.from_numpy(router(start, end, document))
            ones = torch.ones(*experts.shape, 1)
            kept.update(make_tap(batch, experts, ones, n_experts=n_experts, layer=layer), batch)
    return kept


def from_marks(tokenized: Tokenized, patterns: list[str]) -> Router:
    """Slot i is expert i where the token holds a character of the spans of pattern i, else the last expert.

    Evaluated with the standard library's ``re``, one document at a time.
    """
    import re

    n = len(patterns)
    texts = [d.text for d in tokenized.corpus.documents]

    def marks(document: int) -> np.ndarray:
        out = np.zeros((n, len(texts[document]) + 1), np.int64)
        for i, pattern in enumerate(patterns):
            for match in re.finditer(pattern, texts[document]):
                out[i, match.start() + 1 : match.end() + 1] = 1
        return out.cumsum(1)

    totals = cache(marks)

    def router(start: np.ndarray, end: np.ndarray, document: np.ndarray) -> np.ndarray:
        out = np.full((len(start), n), n, np.int64)
        for d in np.unique(document).tolist():
            at = np.flatnonzero((document == d) & (start >= 0))
            count = totals(d)
            on = count[:, end[at]] > count[:, start[at]]
            out[at] = np.where(on.T, np.arange(n), n)
        return out

    return router
