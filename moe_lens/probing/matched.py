"""Rows of both models on one split, and what each pair of cells may use of them (METRICS 1.3, item 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from moe_lens.capture.rows import RowStore
from moe_lens.capture.stream import stream
from moe_lens.capture.tokens import TokenTable
from moe_lens.corpus.batches import Tokenized, batches
from moe_lens.corpus.splits import code_of
from moe_lens.probing.pairing import Alignment, BlockPair, Sample, Visits
from moe_lens.probing.settings import MINIMUM_EVAL, MINIMUM_SELECT, Minimum, ProbeSettings
from moe_lens.types import Split

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from numpy import ndarray
    from torch import Tensor

    from moe_lens.models.lens import Lens
    from moe_lens.models.spec import LayerSpec

RANDOM, ROUTER = ARMS = ("equal_random_tokens", "equal_router_tokens")


@dataclass(frozen=True)
class TwoModels:
    """A model with experts and a dense one, on the same documents; a dense model may stand for one expert."""

    moe: Lens
    dense: Lens
    moe_tokens: Tokenized
    dense_tokens: Tokenized
    settings: ProbeSettings
    seed: int
    progress: bool

    @cached_property
    def both_read(self) -> Bool[Tensor, "document"]:
        """Documents that have tokens in both models."""
        read = [np.isin(np.arange(len(t.corpus)), t.document) for t in (self.moe_tokens, self.dense_tokens)]
        return torch.from_numpy(read[0] & read[1])

    @cached_property
    def same_text(self) -> Bool[Tensor, "document"]:
        """Documents whose characters are the same for both: chat templates write other texts."""
        a, b = self.moe_tokens.corpus.documents, self.dense_tokens.corpus.documents
        return torch.tensor([one.text == other.text for one, other in zip(a, b, strict=True)], dtype=torch.bool)

    @cached_property
    def possible(self) -> Int[ndarray, "concept"]:
        """Concepts that the corpus has enough of in every split, in both tokenisations: no cell can have more."""
        ok = np.ones(len(self.moe_tokens.concepts), bool)
        for tokenized in (self.moe_tokens, self.dense_tokens):
            counts = tokenized.counts()
            for split in Split:
                part, need = counts[counts.split == split.value], needed(split)
                pos, every, documents = (part[name].to_numpy() for name in ("positives", "tokens", "documents"))
                ok &= (np.minimum(pos, every - pos) >= need.tokens) & (documents >= need.documents)
        return np.flatnonzero(ok)

    def documents(self, split: Split) -> Int[ndarray, "document"]:
        """Documents of one split that both models read."""
        return np.flatnonzero(self.both_read.numpy() & (self.moe_tokens.splits == code_of(split)))


def needed(split: Split) -> Minimum:
    """Tokens and documents that a cell must have of each class."""
    return MINIMUM_SELECT if split is Split.SELECT else MINIMUM_EVAL


class SplitRows:
    """Activation rows of some layers of one model on one split: every eligible token."""

    def __init__(
        self, lens: Lens, tokenized: Tokenized, split: Split, settings: ProbeSettings, *, layers: Sequence[int],
        tag: str, progress: bool,
    ) -> None:  # fmt: skip
        self.tokens = TokenTable()
        self.store = RowStore(self.tokens, [], max_rows=None, seed=settings.seed)
        loader = batches(tokenized, split=split, tokens_per_batch=settings.batch_tokens)
        self.n_tokens = stream(
            lens, loader, [self.tokens, self.store], layers=sorted(set(layers)), progress=progress,
            describe=f"{tag} {split.value}",
        )  # fmt: skip

    def token(self, layer: int, expert: int) -> Int[Tensor, "row"]:
        return self.store.rows(layer, expert).token

    def activation(self, layer: int, expert: int) -> Float[Tensor, "row d_ff"]:
        return self.store.rows(layer, expert).activation


class Matched:
    """One split in both models.

    Args:
        group: layers that are paired, MoE first.
    """

    def __init__(self, models: TwoModels, split: Split, group: Sequence[tuple[LayerSpec, LayerSpec]]) -> None:
        self.models, self.split = models, split
        self.need = needed(split)
        self.moe, self.dense = (
            SplitRows(
                lens, tokenized, split, models.settings, layers=layers, tag=f"equal {tag}", progress=models.progress
            )
            for lens, tokenized, layers, tag in (
                (models.moe, models.moe_tokens, [moe.layer for moe, _ in group], "moe"),
                (models.dense, models.dense_tokens, [dense.layer for _, dense in group], "dense"),
            )
        )
        self.n_tokens = self.moe.n_tokens + self.dense.n_tokens
        self.documents = models.documents(split)
        self.empty = not len(self.documents)
        if self.empty:
            return
        self._alignment = Alignment(self.moe.tokens, self.dense.tokens)
        # A dense layer's one expert has the same rows in the same order in every layer: all tokens, by key.
        self._every = Visits.of(self.dense.tokens, self.dense.token(group[0][1].layer, 0), models.both_read)
        self._last: tuple[tuple[int, int], Visits] | None = None

    def load(self, layer: LayerSpec) -> Int[ndarray, "expert"]:
        """Eligible tokens of every expert of the MoE's `layer`."""
        return np.array([len(self.moe.token(layer.layer, e)) for e in range(layer.n_experts)])

    def activations(self, pair: BlockPair) -> tuple[Float[Tensor, "row d_ff"], Float[Tensor, "row d_ff"]]:
        """All neurons of the pair's expert, and of its dense layer."""
        return self.moe.activation(pair.layer, pair.expert), self.dense.activation(pair.dense_layer, 0)

    def visits(self, arm: str, pair: BlockPair) -> tuple[Visits, Visits]:
        """Rows that the pair's expert and block may use, before they are made equally many."""
        at = pair.layer, pair.expert
        if self._last is None or self._last[0] != at:  # both arms ask in turn; the labels of all experts are large
            self._last = at, Visits.of(self.moe.tokens, self.moe.token(*at), self.models.both_read)
        moe, dense = self._last[1], self._every
        if arm == ROUTER:
            if not bool(self.models.same_text.all()):
                moe = moe.at(self.models.same_text[moe.document])
            dense = dense.at(self._alignment.carry(moe.token, self.dense.tokens.n_tokens)[dense.token])
        return moe, dense

    def samples(self, arm: str, pair: BlockPair, concepts: Int[ndarray, "concept"]) -> tuple[Sample, Sample] | None:
        """Equally many positives and negatives for the expert and for the block.

        Of those of `concepts` that have the tokens for it; None if none has. On select at most ``max_rows``, half
        of them positive where there are enough.
        """
        if self.empty or not len(concepts):
            return None
        moe, dense = self.visits(arm, pair)
        n = torch.minimum(moe.n, dense.n)[:, concepts]
        enough = (n >= self.need.tokens).all(0)
        concepts, n = concepts[enough.numpy()], n[:, enough]
        if not len(concepts):
            return None
        take = n
        if self.split is Split.SELECT:  # as fit.draw_rows: positives take what negatives leave
            most = self.models.settings.max_rows
            negative = torch.minimum(n[1], most - n[0].clamp(max=most // 2))
            take = torch.stack([torch.minimum(n[0], most - negative), negative])
        mine = moe.draw(concepts, take)
        if arm == ROUTER:
            return mine, dense.draw(concepts, take)
        rng = np.random.default_rng([self.models.seed, pair.draw, pair.layer, pair.block, code_of(self.split)])
        order = rng.permutation(self.documents)
        return mine, dense.draw(concepts, take, hold=n, order=order, spread=mine.documents)

    def enough(self, *samples: Sample) -> Bool[ndarray, "concept"]:
        """Whether both classes come from enough documents, in all of the samples."""
        return np.logical_and.reduce([(s.documents >= self.need.documents).all(1) for s in samples])
