"""Texts as token ids, and what plain passes of the whole model say about them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from moe_lens.corpus.batches import Tokenized
from moe_lens.corpus.text import Corpus, Document
from moe_lens.models.lens import Lens
from moe_lens.types import Role
from tests.models import tiny

LENGTHS = (30, 21, 30, 9, 26, 14)


def tokenized_of(
    windows: Sequence[Sequence[int]], *, documents: Sequence[int] | None = None, special: Sequence[int] = ()
):
    """A corpus of ready-made windows, all in the test split. `special` ids are neither predicted nor predict."""
    ids = np.concatenate([np.asarray(window) for window in windows])
    lengths = [len(window) for window in windows]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    owner = np.arange(len(windows)) if documents is None else np.asarray(documents)
    eligible = ~np.isin(ids, list(special))
    eligible[offsets[:-1]] = False
    n = int(owner.max()) + 1
    corpus = Corpus("ids", tuple(Document(str(i), "x") for i in range(n)), sha256="")
    return Tokenized(
        corpus, (), np.full(n, 2, np.int8), 0, max(lengths), offsets, owner, ids, np.where(eligible, 0, -1),
        np.where(eligible, 1, -1), eligible, np.zeros((len(ids), 0), np.uint8), np.zeros((len(windows), 0), bool),
    )  # fmt: skip


def some_text(seed: int = 3, lengths: Sequence[int] = LENGTHS) -> Tokenized:
    return tokenized_of([tiny.ids(n, seed=seed + i).tolist() for i, n in enumerate(lengths)])


def plain(lens: Lens, tokenized: Tokenized, *modes: Any, tokens: Any = None, routing: Any = "live") -> torch.Tensor:
    """Log-probabilities (corpus token, vocab) in float64: one whole-model pass per window, nothing cached."""
    found = []
    for start, stop in zip(tokenized.offsets, tokenized.offsets[1:], strict=False):
        ids = torch.from_numpy(tokenized.input_ids[start:stop]).long()[None]
        mask = None if tokens is None else torch.from_numpy(tokens[start:stop])[None]
        block = lens.edit(*modes, tokens=mask, routing=routing, whole_layers=True) if modes else nullcontext()
        with torch.no_grad(), block:
            found.append(lens.model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1))
    return torch.cat(found)


def plain_effect(lens: Lens, tokenized: Tokenized, at: Any, *modes: Any, **options: Any) -> dict[str, np.ndarray]:
    """NLL and KL of the predictions made at corpus tokens `at`, from plain passes."""
    clean, edited = plain(lens, tokenized)[at], plain(lens, tokenized, *modes, **options)[at]
    target = torch.from_numpy(tokenized.input_ids[at + 1]).long()[:, None]
    return {
        "nll_clean": -clean.gather(1, target)[:, 0].numpy(),
        "nll": -edited.gather(1, target)[:, 0].numpy(),
        "kl": (clean.exp() * (clean - edited)).sum(-1).numpy(),
    }


def busiest(lens: Lens, tokenized: Tokenized, layer: int, rank: int = 0) -> str:
    """The expert of a layer that most tokens visit, or the next ones."""
    taps: list[Any] = []
    with lens.tapping(taps.append, layers=[layer], roles=[Role.MOE]):
        plain(lens, tokenized)
    counts = sum(tap.offsets.diff() for tap in taps)
    return f"L{layer}.E{int(counts.argsort(descending=True)[rank])}"  # type: ignore[union-attr]
