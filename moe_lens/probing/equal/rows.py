"""Rows of both models on one split, and what each pair of cells may use of them (METRICS 1.3, item 4)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from moe_lens.capture.rows import RowStore
from moe_lens.capture.stream import stream
from moe_lens.capture.tokens import TokenTable
from moe_lens.corpus.batches import Tokenized, batches
from moe_lens.corpus.splits import code_of
from moe_lens.probing.equal.pairing import Alignment, BlockPair, Sample, Visits
from moe_lens.probing.settings import MINIMUM_EVAL, MINIMUM_SELECT, Minimum, ProbeSettings
from moe_lens.types import Split

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from numpy import ndarray
    from torch import Tensor

    from moe_lens.models.lens import Lens
    from moe_lens.models.spec import LayerSpec

T = TypeVar("T")
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
    """One split in both models; ask for pairs expert by expert, as `once` forgets the expert before.

    A thread needs a `view` of its own.

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
        for moe_layer, dense_layer in group:  # sorts the rows, before threads read them
            self.moe.token(moe_layer.layer, 0)
            self.dense.token(dense_layer.layer, 0)
        self._alignment = Alignment(self.moe.tokens, self.dense.tokens)
        # A dense layer's one expert has the same rows in the same order in every layer: all tokens, by key.
        self._every = Visits.of(self.dense.tokens, self.dense.token(group[0][1].layer, 0), models.both_read)
        self._expert: tuple[int, int] | None = None
        self._known: dict[Hashable, object] = {}

    def view(self) -> Matched:
        """The same rows with a memory of its own."""
        other = copy(self)
        other._expert, other._known = None, {}
        return other

    def load(self, layer: LayerSpec) -> Int[ndarray, "expert"]:
        """Eligible tokens of every expert of the MoE's `layer`."""
        return np.array([len(self.moe.token(layer.layer, e)) for e in range(layer.n_experts)])

    def activations(self, pair: BlockPair) -> tuple[Float[Tensor, "row d_ff"], Float[Tensor, "row d_ff"]]:
        """All neurons of the pair's expert, and of its dense layer."""
        return self.moe.activation(pair.layer, pair.expert), self.dense.activation(pair.dense_layer, 0)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """`make()`, or what it returned before: an expert stands in several draws and in both arms.

        Objects in `key` count by identity, and live as long as the answer does.
        """
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]  # type: ignore[return-value]

    def visits(self, arm: str, pair: BlockPair) -> tuple[Visits, Visits]:
        """Rows that the pair's expert and block may use, before they are made equally many."""
        at = pair.layer, pair.expert
        if self._expert != at:
            self._expert, self._known = at, {}
        moe = self.once("visits", lambda: Visits.of(self.moe.tokens, self.moe.token(*at), self.models.both_read))
        return self.once(("visits", arm), lambda: self._allowed(arm, moe))

    def _allowed(self, arm: str, moe: Visits) -> tuple[Visits, Visits]:
        if arm == RANDOM:
            return moe, self._every
        if not bool(self.models.same_text.all()):
            moe = moe.at(self.models.same_text[moe.document])
        return moe, self._every.at(self._alignment.carry(moe.token, self.dense.tokens.n_tokens)[self._every.token])

    def samples(self, arm: str, pair: BlockPair, concepts: Int[ndarray, "concept"]) -> tuple[Sample, Sample] | None:
        """Equally many positives and negatives for the expert and for the block, each from enough documents.

        The block's sample has those of `concepts` that both sides have the tokens and documents for; None if there
        are none. The expert's has these and more, and is one object for all pairs and arms that draw the same rows.
        On select at most ``max_rows``, half of them positive where there are enough.
        """
        if self.empty or not len(concepts):
            return None
        moe, dense = self.visits(arm, pair)
        n = torch.minimum(moe.n, dense.n)
        can = (n >= self.need.tokens).all(0)
        possible = self.models.possible[can[self.models.possible].numpy()]
        mine = self.once(
            ("moe", moe, possible.tobytes(), n[:, possible].numpy().tobytes()), lambda: self._draw(moe, possible, n)
        )
        concepts = np.intersect1d(concepts, mine.concepts)
        if not len(concepts):
            return None
        if arm == ROUTER:
            theirs = self.once(("dense", mine), lambda: self._draw(dense, mine.concepts, n)).of(concepts)
        else:
            rng = np.random.default_rng([self.models.seed, pair.draw, pair.layer, pair.block, code_of(self.split)])
            order = rng.permutation(self.documents)
            theirs = self._draw(dense, concepts, n, order=order, spread=mine.of(concepts).documents)
        return (mine, theirs) if len(theirs.concepts) else None

    def _draw(
        self,
        visits: Visits,
        concepts: Int[ndarray, "concept"],
        n: Int[Tensor, "class every_concept"],
        *,
        order: Int[ndarray, "document"] | None = None,
        spread: Int[ndarray, "concept class"] | int = 0,
    ) -> Sample:
        """Rows of `concepts`, without those whose rows come from too few documents."""
        n = n[:, concepts]
        take = n
        if self.split is Split.SELECT:  # as fit.draw_rows: positives take what negatives leave
            most = self.models.settings.max_rows
            negative = torch.minimum(n[1], most - n[0].clamp(max=most // 2))
            take = torch.stack([torch.minimum(n[0], most - negative), negative])
        sample = visits.draw(concepts, take, hold=n, order=order, spread=spread)
        return sample.lines(np.all(sample.documents >= self.need.documents, axis=1))
