"""The null arm: the pipeline after neuron selection, run on exchanged labels (METRICS 1.3, item 7).

1. Neurons, weights and threshold of every probe stay as learnt on select; the rows of each cell, split and concept
   are ranked by each k's probe once.
2. Labels are exchanged (`moe_lens.probing.exchange`), a block of permutations at a time, for all k together.
3. One product gives the rank sums of the positives in every cell under every permutation of a block, and with
   them AUROC; two more give the class sizes and the true positives.
4. Per permutation as in the real run: cells with too few rows drop out, the cell with the best validate AUROC is
   scored on test; beside it the maximum over cells of the studentised test AUROC.

At k > 1 the cells are those of the real run: the eight of each concept with the best select AUROC at k = 1, unless
all cells were probed. Select keeps its labels, so these stay the same under every permutation: read a score against
the band of its own k, and a band that moves with k as another search, not as another kind of chance. There are at
most `MORE_NEURONS_PERMUTATIONS` permutations and no p-values: tests are made at k = 1 only (METRICS 1.3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moe_lens.corpus.splits import code_of
from moe_lens.errors import BadConfig
from moe_lens.probing.exchange import ExchangedLabels, LabelTracks, exchange_labels
from moe_lens.probing.settings import MINIMUM_EVAL
from moe_lens.probing.threads import in_threads
from moe_lens.stats import auroc_null_se, f1_balanced, max_t, percentile_interval, permutation_p
from moe_lens.types import Split

if TYPE_CHECKING:
    import pandas as pd
    from jaxtyping import Bool, Float, Int
    from numpy import ndarray
    from torch import Tensor

    from moe_lens.capture.rows import RowStore
    from moe_lens.probing.fit import Probe

_TOLERANCE = 1e-4
"""Standard errors (of AUROC under the null: 1e-6) within which two float32 results are a tie."""
MORE_NEURONS_PERMUTATIONS = 99
"""Permutations at k > 1, at most, the first of those at k = 1: enough for a band, and nothing is tested there."""
Exchange = Callable[..., Iterator[ExchangedLabels]]


@dataclass(frozen=True)
class CellColumns:
    """Scores of the probes on the validate and test tokens that each cell visits."""

    address: Int[ndarray, "cell 2"]
    """Layer and expert, ascending."""
    offsets: Int[ndarray, "cell+1"]
    """Rows of cell ``i`` are ``offsets[i]:offsets[i + 1]``."""
    token: Int[ndarray, "row"]
    """Number of each row's token in the label tracks."""
    score: Callable[[int], Float[ndarray, "row"]]
    """Logit of a concept's k = 1 probe on every row; NaN in cells where it was not fitted."""
    larger: Mapping[int, Callable[[int], Float[ndarray, "row"]]] = field(default_factory=dict)
    """The same at each k > 1; NaN in most cells, where only the best at k = 1 were probed."""
    scores_per_row: float = 1.0
    """How many scores a row has, all k together, averaged over rows and concepts: bounds memory."""


def cell_columns(
    rows: RowStore,
    columns: Mapping[int, Int[Tensor, "expert column"]],
    probes: Sequence[Probe],
    number: Int[ndarray, "table_token"],
) -> CellColumns:
    """Columns of the fitted probes, read from the stored evaluation rows without copying them.

    Args:
        rows: validate and test rows, as ``Evaluator`` holds them.
        columns: neurons stored for each (layer, expert), from ``columns_needed``.
        number: track number of every token of the rows' table, from ``label_tracks``.
    """
    by_k: dict[int, dict[tuple[int, int], dict[int, Probe]]] = {1: {}}
    for probe in probes:
        if probe.fitted:
            by_k.setdefault(probe.k, {}).setdefault((probe.layer, probe.expert), {})[probe.concept] = probe
    cells = sorted(by_k[1])
    visited = [number[rows.rows(*cell).token.numpy()] for cell in cells]
    offsets = np.cumsum([0, *(len(v) for v in visited)])

    def score(k: int, concept: int) -> Float[ndarray, "row"]:
        out = np.full(offsets[-1], np.nan, np.float32)
        for i, (layer, expert) in enumerate(cells):
            if (probe := by_k[k].get((layer, expert), {}).get(concept)) is not None:
                stored = columns[layer][expert].tolist()
                at = [stored.index(int(neuron)) for neuron in probe.neurons]
                h = rows.rows(layer, expert).activation.index_select(1, torch.tensor(at)).float().numpy()
                out[offsets[i] : offsets[i + 1]] = h @ probe.coef.astype(np.float32) + np.float32(probe.intercept)
        return out

    n_rows = dict(zip(cells, map(len, visited), strict=True))
    n_scores = sum(n_rows.get((probe.layer, probe.expert), 0) for probe in probes if probe.fitted)
    per_row = n_scores / max(1, offsets[-1] * len({probe.concept for probe in probes}))
    token = np.concatenate(visited) if visited else np.zeros(0, np.int64)
    larger = {k: partial(score, k) for k in sorted(by_k) if k > 1}
    return CellColumns(np.array(cells, np.int64).reshape(-1, 2), offsets, token, partial(score, 1), larger, per_row)


@dataclass(frozen=True)
class PipelineScores:
    """What the pipeline reports for each labelling; NaN (statistic: -inf) where no cell has enough rows."""

    statistic: Float[ndarray, "labelling concept"]
    """Maximum over cells of (test AUROC - .5) / SE_null(n+, n-)."""
    auroc: Float[ndarray, "labelling concept"]
    """Test AUROC of the cell with the best validate AUROC."""
    f1_balanced: Float[ndarray, "labelling concept"]
    """Test F1_bal of the same cell at the threshold learnt on select."""
    cell: Int[ndarray, "labelling concept"]
    """Number of that cell, -1 for none."""


@dataclass(frozen=True)
class NullDistribution:
    """The pipeline under the true labels and under exchanged ones.

    The null is that activations and routing say nothing about the concept beyond stratum and position. A small p
    rejects that for the best of the cells; it does not show a gap between models, nor which neuron is needed.
    """

    names: tuple[str, ...]
    address: Int[ndarray, "cell 2"]
    observed: PipelineScores
    """One labelling: the true one."""
    null: PipelineScores
    kept: Float[ndarray, "concept"]
    """Mean share of tokens that got their own label back. Power fails as it grows: strata are too small."""
    n_cells: Int[ndarray, "concept"] | None = None
    """Cells with a probe of each concept and rows to score it on; None where they were not counted."""
    larger: Mapping[int, NullDistribution] = field(default_factory=dict)
    """The same at each k > 1, under the first of these exchanges; empty at k > 1."""

    @property
    def n_permutations(self) -> int:
        return len(self.null.auroc)

    @property
    def p(self) -> Float[ndarray, "concept"]:
        """Of the studentised maximum over cells; NaN without a usable cell."""
        return permutation_p(self._statistic, self.null.statistic, tolerance=_TOLERANCE)

    @property
    def p_held_out(self) -> Float[ndarray, "concept"]:
        """Of the held-out AUROC of the chosen cell."""
        return permutation_p(self.observed.auroc[0], self.null.auroc, tolerance=1e-6)

    @property
    def p_adjusted(self) -> Float[ndarray, "concept"]:
        """Max-T over concepts. Each concept's statistic is first standardised by its own null (the true labelling
        counted in), because tokens of a document are alike and some concepts' nulls are far wider than others'.
        """
        return self.adjusted(np.ones(len(self.names), bool))

    def adjusted(self, family: Bool[ndarray, "concept"]) -> Float[ndarray, "concept"]:
        """`p_adjusted` over some concepts; NaN for the others."""
        every = np.concatenate([self.observed.statistic, self.null.statistic])
        finite = np.where(np.isfinite(every), every, np.nan)
        known = np.isfinite(finite).sum(0) > 1
        scaled = np.full(every.shape, np.nan)
        sd = np.nanstd(finite[:, known], axis=0)
        scaled[:, known] = (every[:, known] - np.nanmean(finite[:, known], axis=0)) / np.where(sd > 0, sd, 1)
        observed = np.where(np.isfinite(self._statistic) & family, scaled[0], np.nan)
        return max_t(observed, scaled[1:], tolerance=_TOLERANCE)

    @property
    def _statistic(self) -> Float[ndarray, "concept"]:
        return np.where(np.isfinite(self.observed.statistic[0]), self.observed.statistic[0], np.nan)

    def band(
        self, metric: str = "auroc", level: float = 0.95
    ) -> tuple[Float[ndarray, "concept"], Float[ndarray, "concept"]]:
        """Range of the null held-out score (``auroc`` or ``f1_balanced``) of the chosen cell, for figures."""
        return percentile_interval(getattr(self.null, metric), level)

    def gap(self, dense: NullDistribution, metric: str = "auroc") -> Float[ndarray, "permutation concept"]:
        """Null draws of this model's score minus `dense`'s, under the same exchanged labels.

        Run both with one seed, on the same documents and strata. The spread belongs to the null that neither
        model knows the concept; it does not test whether two models that know it know it equally well.
        """
        return getattr(self.null, metric) - getattr(dense.null, metric)

    @cached_property
    def frame(self) -> pd.DataFrame:
        """One row per concept."""
        import pandas as pd

        cell = self.observed.cell[0]
        address = np.concatenate([self.address, [[-1, -1]]])[cell]
        table: dict[str, Any] = {
            "concept": self.names, "layer": address[:, 0], "expert": address[:, 1],
            "statistic": self._statistic, "p_value": self.p, "p_adjusted": self.p_adjusted,
            "auroc": self.observed.auroc[0], "p_held_out": self.p_held_out,
            "f1_balanced": self.observed.f1_balanced[0], "kept": self.kept,
        }  # fmt: skip
        for metric in ("auroc", "f1_balanced"):
            low, high = self.band(metric)
            with np.errstate(all="ignore"):
                table |= {f"null_{metric}_{n}": v for n, v in (("low", low), ("high", high))}
                table[f"null_{metric}_mean"] = _mean_known(getattr(self.null, metric))
        return pd.DataFrame(table)


def null_statistics(
    tracks: LabelTracks,
    columns: CellColumns,
    *,
    n_permutations: int = 999,
    seed: int = 0,
    minimum: int = MINIMUM_EVAL.tokens,
    max_bytes: int = 256 << 20,
    exchange: Exchange = exchange_labels,
) -> NullDistribution:
    """Run cell choice and scoring under the true and under exchanged labels, for every concept and k.

    Args:
        n_permutations: at k = 1; at k > 1 at most `MORE_NEURONS_PERMUTATIONS`.
        minimum: rows of each class that a cell needs in validate and in test, counted anew in every labelling.
            The rule on documents (METRICS 1.1) is not applied here, to the true labels neither.
        max_bytes: bounds what is held at a time, besides the columns themselves.
        exchange: how labels are exchanged; tests pass a broken one.

    Raises:
        BadConfig: fewer than one permutation, or no cell with a fitted probe.
        BadConcept: see `exchange_labels`.

    Neurons are not chosen anew for exchanged labels. That is right where select shares nothing with validate and
    test but chance; see `exchange_labels` for ``type``.
    """
    if not len(columns.address):
        raise BadConfig("no cell holds a fitted k = 1 probe, so there is nothing to test: give a larger corpus")
    n_concepts = len(tracks.names)
    bags = [_Bags.of(tracks, columns, tracks.in_scope[:, c]) for c in _first_of(tracks.scope_of)]
    block = int(np.clip(max_bytes // 2 // (32 * tracks.n_tokens), 1, min(n_permutations, 256)))
    held = 8 * max(1, len(columns.token)) * max(1.0, columns.scores_per_row)
    chunk = max(1, int(max_bytes // 2 // held))
    order = sorted(range(n_concepts), key=lambda c: (tracks.granularity[c], tracks.scope_of[c]))
    scores = {1: columns.score, **columns.larger}
    sizes = {k: n_permutations if k == 1 else min(n_permutations, MORE_NEURONS_PERMUTATIONS) for k in scores}
    observed, null = ({k: _empty(n, n_concepts) for k, n in of.items()} for of in (dict.fromkeys(scores, 1), sizes))
    n_cells, kept = {k: np.zeros(n_concepts, np.int64) for k in scores}, np.zeros(n_concepts)
    for start in range(0, n_concepts, chunk):
        some = [(c, k) for c in order[start : start + chunk] for k in scores]
        found = in_threads(lambda at: bags[tracks.scope_of[at[0]]].rank(scores[at[1]](at[0])), some)
        ranked: dict[int, dict[int, _Ranked]] = {}
        for (c, k), column in zip(some, found, strict=True):
            ranked.setdefault(c, {})[k] = column
            n_cells[k][c] = column.n_cells
            _store(observed[k], 0, c, column.pipeline(_table(tracks.labels[:, [c]]), minimum))
        at = 0
        for labels in exchange(tracks, n_permutations=n_permutations, seed=seed, block=block):
            for c, by_k in ranked.items():
                table = _table(labels.labels(c))
                for k, column in by_k.items():
                    if (n := min(len(labels), sizes[k] - at)) > 0:
                        _store(null[k], at, c, column.pipeline(table[:, :n], minimum))
                kept[c] += labels.kept(c) * len(labels) / n_permutations
            at += len(labels)
    whole = (tracks.names, columns.address)
    larger = {k: NullDistribution(*whole, observed[k], null[k], kept, n_cells[k]) for k in columns.larger}
    return NullDistribution(*whole, observed[1], null[1], kept, n_cells[1], larger)


def _table(labels: Bool[ndarray, "token labelling"]) -> Float[Tensor, "token labelling"]:
    return torch.from_numpy(labels.astype(np.float32))


def _first_of(numbers: Int[ndarray, "concept"]) -> list[int]:
    return np.unique(numbers, return_index=True)[1].tolist()


def _empty(n: int, n_concepts: int) -> PipelineScores:
    shape = (n, n_concepts)
    return PipelineScores(np.empty(shape), np.empty(shape), np.empty(shape), np.empty(shape, np.int64))


def _store(into: PipelineScores, at: int, concept: int, found: PipelineScores) -> None:
    for name in ("statistic", "auroc", "f1_balanced", "cell"):
        values = getattr(found, name)[:, 0]
        getattr(into, name)[at : at + len(values), concept] = values


def _mean_known(values: Float[ndarray, "permutation concept"]) -> Float[ndarray, "concept"]:
    known = np.isfinite(values)
    return np.where(known, values, 0).sum(0) / known.sum(0)


@dataclass(frozen=True)
class _Bags:
    """Rows of every cell on documents in scope: one bag per cell in validate, then one per cell in test."""

    row: Int[ndarray, "used"]
    """Row of the columns, bag by bag."""
    bag: Int[ndarray, "used"]
    token: Int[Tensor, "used"]
    offsets: Int[Tensor, "bag+1"]

    @classmethod
    def of(cls, tracks: LabelTracks, columns: CellColumns, in_scope: Bool[ndarray, "document"]) -> _Bags:
        """The bags of one scope, rows of documents outside it left out."""
        n_cells = len(columns.address)
        cell = np.repeat(np.arange(n_cells), np.diff(columns.offsets))
        document = tracks.document[columns.token]
        split = tracks.split[document]
        bag = np.where(split == code_of(Split.VALIDATE), cell, cell + n_cells)
        wanted = (split == code_of(Split.VALIDATE)) | (split == code_of(Split.TEST))
        row = np.flatnonzero(wanted & in_scope[document])
        row = row[np.argsort(bag[row], kind="stable")]
        offsets = np.searchsorted(bag[row], np.arange(2 * n_cells + 1))
        return cls(row, bag[row], torch.from_numpy(columns.token[row]), torch.from_numpy(offsets))

    def rank(self, score: Float[ndarray, "row"]) -> _Ranked:
        """Rank the rows inside each bag, ties by their mean rank, as ``2 rank - n - 1``: a whole number of sum 0.

        Bags without a fitted probe are emptied.
        """
        unknown = np.bincount(self.bag, np.isnan(score[self.row]), minlength=len(self.offsets) - 1)
        return self._only(unknown == 0)._rank(score, unknown == 0)

    def _only(self, which: Bool[ndarray, "bag"]) -> _Bags:
        kept = which[self.bag]
        bag = self.bag[kept]
        offsets = torch.from_numpy(np.searchsorted(bag, np.arange(len(self.offsets))))
        return _Bags(self.row[kept], bag, self.token[torch.from_numpy(kept)], offsets)

    def _rank(self, score: Float[ndarray, "row"], fitted: Bool[ndarray, "bag"]) -> _Ranked:
        used = score[self.row]
        order = np.empty(len(used), np.int64)
        for start, end in pairwise(self.offsets.tolist()):  # numpy sorts one key ten times faster than two
            order[start:end] = start + np.argsort(used[start:end])
        value, bag = used[order], self.bag[order]
        new = np.ones(len(value), bool)
        new[1:] = (value[1:] != value[:-1]) | (bag[1:] != bag[:-1])
        run = np.cumsum(new) - 1
        first = np.flatnonzero(new)
        last = np.append(first[1:], len(value)) - 1
        offsets = self.offsets.numpy()
        middle = (first + last)[run] - 2 * offsets[bag] - np.diff(offsets)[bag] + 1
        rank = np.empty(len(used), np.float32)
        rank[order] = middle
        yes = (used >= 0).astype(np.float32)
        n_yes = np.bincount(self.bag, yes, minlength=len(fitted))
        return _Ranked(self, torch.from_numpy(rank), torch.from_numpy(yes), n_yes, fitted)


@dataclass(frozen=True)
class _Ranked:
    """One concept's scores in every bag, ready for any labelling."""

    bags: _Bags
    rank: Float[Tensor, "used"]
    yes: Float[Tensor, "used"]
    n_yes: Float[ndarray, "bag"]
    fitted: Bool[ndarray, "bag"]

    @property
    def n_cells(self) -> int:
        """Cells with a probe, and with rows in both splits."""
        known = self.fitted & (np.diff(self.bags.offsets.numpy()) > 0)
        return int(known.reshape(2, -1).all(0).sum())

    def pipeline(self, table: Float[Tensor, "token labelling"], minimum: int) -> PipelineScores:
        """Choose the cell on validate and score it on test, for every labelling."""
        n_cells = len(self.fitted) // 2
        n_pos = self._sums(table, None)
        n = np.diff(self.bags.offsets.numpy())[:, None]
        n_neg = n - n_pos
        with np.errstate(divide="ignore", invalid="ignore"):
            auroc = 0.5 + self._sums(table, self.rank) / (2 * n_pos * n_neg)
        enough = (n_pos >= minimum) & (n_neg >= minimum) & self.fitted[:, None]
        usable = enough[:n_cells] & enough[n_cells:]
        test = slice(n_cells, None)
        z = np.where(usable, (auroc[test] - 0.5) / auroc_null_se(n_pos[test], n_neg[test]), -np.inf)
        validate = np.where(usable, auroc[:n_cells].round(6), -np.inf)
        best = np.where(validate == validate.max(0), n[test], -1).argmax(0)  # ties: more rows, then lower address
        at = (best + n_cells, np.arange(table.shape[1]))
        some = usable.any(0)
        tp = self._sums(table, self.yes)[at]
        with np.errstate(divide="ignore", invalid="ignore"):
            f1 = f1_balanced(tp / n_pos[at], (self.n_yes[at[0]] - tp) / n_neg[at])
        columns = (z.max(0), np.where(some, auroc[at], np.nan), np.where(some, f1, np.nan), np.where(some, best, -1))
        return PipelineScores(*(c[:, None] for c in columns))

    def _sums(self, table: Float[Tensor, "token labelling"], weight: Float[Tensor, "used"] | None) -> ndarray:
        """Weighted number of positives in every bag: one sparse product, no bag x token matrix is ever formed."""
        return torch.nn.functional.embedding_bag(
            self.bags.token, table, self.bags.offsets, mode="sum", per_sample_weights=weight, include_last_offset=True
        ).double().numpy()  # fmt: skip
