"""Which experts, neurons and tokens stand against which in the ``equal_*`` arms (METRICS 1.3, item 4).

1. Layers are paired by relative depth, as many as the shallower model has.
2. Per draw and layer: B experts, one from each stratum of load, and B disjoint blocks of the dense FFN, all of
   ``w`` neurons.
3. Per pair, split and concept: the rows either side may use, cut to the same number of positives and negatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Int
    from numpy import ndarray
    from torch import Tensor

    from moe_lens.capture.tokens import TokenTable
    from moe_lens.models.spec import LayerSpec, Spec


@dataclass(frozen=True)
class BlockPair:
    """One expert and one block of a dense FFN, of the same width."""

    draw: int
    layer: int
    expert: int
    neurons: Int[ndarray, "w"]
    """Of the expert; all of them unless the dense FFN is narrower."""
    dense_layer: int
    block: int
    dense_neurons: Int[ndarray, "w"]

    @property
    def width(self) -> int:
        return len(self.neurons)


def layer_pairs(
    moe: Spec, dense: Spec, *, moe_layers: Sequence[int], dense_layers: Sequence[int]
) -> list[tuple[LayerSpec, LayerSpec]]:
    """Layers of two models at nearly the same relative depth, none used twice; ties go to the lower layer."""

    def depths(spec: Spec, layers: Sequence[int]) -> list[tuple[float, LayerSpec]]:
        last = spec.n_layers - 1
        return [(e.layer / last if last > 0 else 0.5, e) for e in spec.layers if e.layer in set(layers)]

    a, b = depths(moe, moe_layers), depths(dense, dense_layers)
    short, long = (a, b) if len(a) <= len(b) else (b, a)
    chosen: list[tuple[LayerSpec, LayerSpec]] = []
    previous = -1
    for i, (depth, entry) in enumerate(short):
        open_ = range(previous + 1, len(long) - len(short) + i + 1)
        previous = min(open_, key=lambda j: (round(abs(long[j][0] - depth), 9), j))
        chosen.append((entry, long[previous][1]))
    return chosen if short is a else [(m, d) for d, m in chosen]


def draw_pairs(
    moe: LayerSpec, dense: LayerSpec, load: Int[ndarray, "expert"], *, draws: int, seed: int
) -> list[BlockPair]:
    """Random equal cells of one pair of layers: ``B = max(1, d_ff_dense // w)``, at most the number of experts.

    Experts are sorted by `load` (rows each was visited with) and cut into B strata of equal size; one is drawn
    from each, so that frequent and rare experts stand against blocks in the same proportion in every draw.
    """
    w = min(moe.d_ff, dense.d_ff)
    n_blocks = min(max(1, dense.d_ff // w), moe.n_experts)
    strata = np.array_split(np.lexsort((np.arange(moe.n_experts), -load)), n_blocks)
    out = []
    for draw in range(draws):
        rng = np.random.default_rng([seed, draw, moe.layer, dense.layer])
        experts = [int(rng.choice(stratum)) for stratum in strata]
        blocks = rng.permutation(dense.d_ff)[: n_blocks * w].reshape(n_blocks, w)
        for block, expert in enumerate(experts):
            neurons = np.sort(rng.permutation(moe.d_ff)[:w])
            out.append(BlockPair(draw, moe.layer, expert, neurons, dense.layer, block, np.sort(blocks[block])))
    return out


@dataclass(frozen=True, eq=False)
class Sample:
    """Drawn rows of one cell, one line per concept, padded to the longest line."""

    concepts: Int[ndarray, "concept"]
    row: Int[Tensor, "concept row"]
    """Number among the rows of the cell's expert; 0 in padding."""
    positive: Bool[Tensor, "concept row"]
    used: Bool[Tensor, "concept row"]
    """False in padding."""
    document: Int[Tensor, "concept row"]
    documents: Int[ndarray, "concept class"]
    """Distinct documents behind the positives, and behind the negatives."""

    def lines(self, which: Bool[ndarray, "concept"]) -> Sample:
        """Some of the concepts."""
        if which.all():
            return self
        i = torch.from_numpy(which)
        lines = self.row[i], self.positive[i], self.used[i], self.document[i]
        return Sample(self.concepts[which], *lines, self.documents[which])

    def of(self, concepts: Int[ndarray, "some"]) -> Sample:
        """Those of `concepts` that the sample holds, in its order."""
        return self.lines(np.isin(self.concepts, concepts))

    @property
    def n_pos(self) -> Int[ndarray, "concept"]:
        return self.positive.sum(1).numpy()

    @property
    def n(self) -> Int[ndarray, "concept"]:
        return self.used.sum(1).numpy()


@dataclass(frozen=True, eq=False)
class Visits:
    """Rows that a cell may use, by rising random key: the first m are a random m."""

    row: Int[Tensor, "visit"]
    """Number among the rows of the cell's expert."""
    token: Int[Tensor, "visit"]
    """Number in the token table."""
    document: Int[Tensor, "visit"]
    classes: Bool[Tensor, "class concept visit"]
    """Positives, negatives; neither where the concept is not defined."""

    @classmethod
    def of(cls, tokens: TokenTable, token: Int[Tensor, "row"], allowed: Bool[Tensor, "document"]) -> Visits:
        """All rows of an expert that fall in `allowed` documents."""
        row = allowed[tokens.document[token]].nonzero().squeeze(1)
        token = token[row]
        labels, scope = tokens.labels[token].T, tokens.in_scope[token].T
        return cls(row, token, tokens.document[token], torch.stack([labels & scope, scope & ~labels]))

    def at(self, which: Bool[Tensor, "visit"]) -> Visits:
        """Some of the visits, in the same order."""
        i = which.nonzero().squeeze(1)
        return Visits(self.row[i], self.token[i], self.document[i], self.classes.index_select(2, i))

    @cached_property
    def n(self) -> Int[Tensor, "class concept"]:
        return self.classes.sum(2)

    @cached_property
    def per_document(self) -> Int[ndarray, "document class concept"]:
        """Rows of each class in every document; the last entry is an empty document."""
        n_documents = int(self.document.max()) + 1 if len(self.document) else 0
        counts = torch.zeros(n_documents + 1, *self.classes.shape[:2])
        return counts.index_add_(0, self.document, self.classes.permute(2, 0, 1).float()).long().numpy()

    def draw(
        self,
        concepts: Int[ndarray, "concept"],
        n: Int[Tensor, "class concept"],
        *,
        hold: Int[Tensor, "class concept"] | None = None,
        order: Int[ndarray, "document"] | None = None,
        spread: Int[ndarray, "concept class"] | int = 0,
    ) -> Sample:
        """Draw `n` rows of each class of each of `concepts`, as far as there are so many.

        Args:
            order: draw from whole documents: as many of this order as it takes to hold `hold` rows of both classes.
            spread: and as it takes for each class to occur in so many documents.
        """
        prefix, there = None, self.n[:, concepts].numpy()
        if order is not None:
            last, there = self._prefix(concepts, n if hold is None else hold, order, spread)
            place = np.full(max(int(order.max()), int(self.document.max())) + 1, len(order) + 1, np.int32)
            place[order] = np.arange(len(order))
            prefix = place[self.document.numpy()], last.astype(np.int32)[:, None]
        take = np.minimum(n.numpy(), there)
        n_pos, n_all = take[0][:, None], take.sum(0)[:, None]
        column = np.arange(int(n_all.max(initial=0)))
        used, positive = column < n_all, column < n_pos
        visit = np.zeros(used.shape, np.int64)
        visit[positive] = self._first(0, concepts, take[0], there[0], prefix)
        visit[used & ~positive] = self._first(1, concepts, take[1], there[1], prefix)
        row, document = (np.where(used, known.numpy()[visit], 0) for known in (self.row, self.document))
        documents = [_distinct(document, member) for member in (positive, used & ~positive)]
        row, positive, used, document = (torch.from_numpy(value) for value in (row, positive, used, document))
        return Sample(concepts, row, positive, used, document, np.stack(documents, 1))

    def _prefix(
        self,
        concepts: Int[ndarray, "concept"],
        n: Int[Tensor, "class concept"],
        order: Int[ndarray, "document"],
        spread: Int[ndarray, "concept class"] | int,
    ) -> tuple[Int[ndarray, "concept"], Int[ndarray, "class concept"]]:
        """Place in `order` of the last document that each concept needs, and the rows in all up to there."""
        counts = self.per_document[np.minimum(order, len(self.per_document) - 1)][..., concepts]
        rows, documents = counts.cumsum(0), (counts > 0).cumsum(0)
        wanted = np.minimum(np.transpose(spread), documents[-1])
        reached = np.all((rows >= n.numpy()) & (documents >= wanted), axis=1)  # once True, True for all later documents
        last = np.where(reached[-1], reached.argmax(0), len(order) - 1)
        return last, np.take_along_axis(rows, last[None, None], 0)[0]

    def _first(
        self,
        side: int,
        concepts: Int[ndarray, "concept"],
        n: Int[ndarray, "concept"],
        there: Int[ndarray, "concept"],
        prefix: tuple[Int[ndarray, "visit"], Int[ndarray, "concept 1"]] | None,
    ) -> Int[ndarray, "drawn"]:
        """The first `n` visits of one class, concept after concept; reads about as far as it has to."""
        share = float((n / np.maximum(there, 1)).max(initial=0))
        stop = min(len(self.row), 1024 + int(1.1 * share * len(self.row)))  # keys are random: rows are spread evenly
        while True:
            member = self.classes[side, :, :stop][torch.from_numpy(concepts)].numpy()
            if prefix is not None:
                member &= prefix[0][:stop] <= prefix[1]
            found = np.flatnonzero(member)
            start = np.searchsorted(found, np.arange(len(concepts) + 1) * stop)
            if stop == len(self.row) or bool((np.diff(start) >= n).all()):
                break
            stop = min(len(self.row), 2 * stop)
        line = np.repeat(np.arange(len(concepts)), n)
        return found[np.arange(len(line)) + (start[:-1] - n.cumsum() + n)[line]] - line * stop


def _distinct(document: Int[ndarray, "concept row"], member: Bool[ndarray, "concept row"]) -> Int[ndarray, "concept"]:
    """Different documents behind the member rows of each concept."""
    n_documents = int(document.max(initial=0)) + 1
    hit = np.zeros((len(document), n_documents), bool)
    hit.reshape(-1)[(document + np.arange(len(document))[:, None] * n_documents)[member]] = True
    return hit.sum(1)


class Alignment:
    """Carries a set of tokens from one tokenisation of the documents of a split to another.

    The same tokenisation carries every token to itself. Between different ones a token belongs iff more than half
    of its characters lie in the spans of chosen tokens.
    """

    def __init__(self, source: TokenTable, target: TokenTable) -> None:
        names = ("document", "char_start", "char_end", "input_ids")
        self.same = all(torch.equal(getattr(source, n), getattr(target, n)) for n in names)
        if self.same:
            return
        ends = [np.zeros(1, np.int64)]
        for table in (source, target):
            top = np.zeros(int(table.document.max()) + 1 if table.n_tokens else 0, np.int64)
            np.maximum.at(top, table.document.numpy(), table.char_end.numpy())
            ends.append(top)
        longest = np.zeros(max(map(len, ends)), np.int64)
        for top in ends:
            longest[: len(top)] = np.maximum(longest[: len(top)], top)
        self._base = np.cumsum(longest + 1) - longest - 1  # characters of all documents in one line
        self._length = int((longest + 1).sum())
        self._source, self._target = self._span(source), self._span(target)

    def _span(self, table: TokenTable) -> tuple[Int[ndarray, "token"], Int[ndarray, "token"]]:
        base = self._base[table.document.numpy()]
        start, end = table.char_start.numpy(), table.char_end.numpy()
        blank = start < 0
        return base + np.where(blank, 0, start), base + np.where(blank, 0, end)

    def carry(self, token: Int[Tensor, "chosen"], n_target: int) -> Bool[Tensor, "target_token"]:
        """Which of the target's tokens the chosen source tokens cover."""
        out = torch.zeros(n_target, dtype=torch.bool)
        if self.same:
            out[token] = True
            return out
        start, end = (bound[token.numpy()] for bound in self._source)
        depth = np.bincount(start, minlength=self._length + 1) - np.bincount(end, minlength=self._length + 1)
        covered = np.concatenate([[0], (depth.cumsum() > 0).cumsum()])
        a, b = self._target
        return torch.from_numpy(2 * (covered[b] - covered[a]) > b - a)
