"""The text on which effects are measured: which windows run together, and which of their tokens predict.

Token t predicts t + 1. The last token of a window predicts nothing, special tokens neither predict nor are
predicted, and the first token of a window predicts only on request (METRICS 2.4: attention sink).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from moe_lens.corpus.splits import code_of
from moe_lens.errors import BadConfig, BadCorpus

if TYPE_CHECKING:
    from jaxtyping import Bool, Int
    from numpy import ndarray

    from moe_lens.corpus.batches import Tokenized
    from moe_lens.types import Split


@dataclass(frozen=True, eq=False)
class Part:
    """Windows that run together, right-padded."""

    token: Int[torch.Tensor, "window seq"]
    """Index in the tokenised corpus, -1 on padding."""
    ids: Int[torch.Tensor, "window seq"]
    slot: Int[torch.Tensor, "window seq"]
    """Number of the prediction that a token makes, -1 where it makes none."""

    @property
    def mask(self) -> Int[torch.Tensor, "window seq"]:
        return (self.token >= 0).long()

    @property
    def counted(self) -> Bool[torch.Tensor, "window seq"]:
        return self.slot >= 0


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Whole documents of one split, and the predictions in them that are counted."""

    tokenized: Tokenized
    windows: Int[ndarray, "window"] = field(repr=False)
    """Chosen windows of `tokenized`, ascending."""
    token: Int[ndarray, "prediction"] = field(repr=False)
    """Index in the corpus of every token that predicts, ascending."""

    @cached_property
    def window(self) -> Int[ndarray, "prediction"]:
        return self.tokenized.window_of[self.token]

    @cached_property
    def document(self) -> Int[ndarray, "prediction"]:
        return self.tokenized.document[self.window]

    @cached_property
    def position(self) -> Int[ndarray, "prediction"]:
        """Position in its window of the token that predicts."""
        return self.token - self.tokenized.offsets[self.window]

    @cached_property
    def read(self) -> Int[ndarray, "read_token"]:
        """Index in the corpus of every token that goes through the model, ascending."""
        return np.flatnonzero(np.isin(self.tokenized.window_of, self.windows))

    def parts(self, batch_tokens: int, *, shuffled: int | None = None) -> list[Part]:
        """Batches of windows, longest first, or in a random order by the seed `shuffled`."""
        lengths = np.diff(self.tokenized.offsets)[self.windows]
        order = np.argsort(-lengths, kind="stable")
        if shuffled is not None:
            order = np.random.default_rng(shuffled).permutation(len(lengths))
        groups: list[list[int]] = []
        longest = 0
        for at in order.tolist():
            longest = max(longest, int(lengths[at]))
            if not groups or (len(groups[-1]) + 1) * longest > batch_tokens:
                groups.append([])
                longest = int(lengths[at])
            groups[-1].append(at)
        return [self._part(self.windows[group]) for group in groups]

    def _part(self, windows: Int[ndarray, "window"]) -> Part:
        t = self.tokenized
        lengths = np.diff(t.offsets)[windows]
        position = np.arange(lengths.max())
        is_real = position < lengths[:, None]
        token = np.where(is_real, t.offsets[windows][:, None] + position, -1)
        at = np.searchsorted(self.token, token).clip(max=len(self.token) - 1)
        slot = np.where(self.token[at] == token, at, -1)
        ids = np.where(is_real, t.input_ids[token], t.pad_id)
        return Part(*(torch.from_numpy(x.astype(np.int64)) for x in (token, ids, slot)))


def evaluation(
    tokenized: Tokenized, *, split: Split | str | None, max_tokens: int | None, include_first: bool, seed: int
) -> Evaluation:
    """Choose whole documents in a seeded random order, up to `max_tokens` tokens; at least one.

    Raises:
        BadConfig: `max_tokens` is not positive.
        BadCorpus: no document of the split has a token to predict.
    """
    if max_tokens is not None and max_tokens < 1:
        raise BadConfig(f"max_tokens={max_tokens}: give a positive number of tokens")
    counted = _predicts(tokenized, include_first)
    lengths = np.diff(tokenized.offsets)
    has_any = np.bincount(tokenized.window_of[counted], minlength=len(lengths)) > 0
    usable = has_any if split is None else has_any & (tokenized.window_split == code_of(split))
    if not usable.any():
        where = "" if split is None else f" of the split {split}"
        raise BadCorpus(f"no document{where} has a token to predict: give more or longer documents, or another split")
    chosen = np.fromiter(_documents(tokenized, usable, max_tokens, seed), np.int64)
    windows = np.flatnonzero(usable & np.isin(tokenized.document, chosen))
    counted &= np.isin(tokenized.window_of, windows)
    return Evaluation(tokenized, windows, np.flatnonzero(counted))


def _documents(
    tokenized: Tokenized, usable: Bool[ndarray, "window"], max_tokens: int | None, seed: int
) -> Iterator[int]:
    tokens = np.bincount(tokenized.document[usable], np.diff(tokenized.offsets)[usable])
    taken = 0
    for document in np.random.default_rng(seed).permutation(np.flatnonzero(tokens)).tolist():
        if max_tokens is not None and taken and taken + tokens[document] > max_tokens:
            return
        taken += int(tokens[document])
        yield document


def _predicts(tokenized: Tokenized, include_first: bool) -> Bool[ndarray, "corpus_token"]:
    follows = np.append(tokenized.eligible[1:], False)  # never the first token of the next window
    return follows if include_first else follows & tokenized.eligible
