"""``equal_random_tokens`` and ``equal_router_tokens``: the same search in both models (METRICS 1.3, item 4).

1. Read the select documents with both models. Draw, per layer and draw, B experts by load and B disjoint blocks of
   the dense FFN at the same depth, all of w neurons (`moe_lens.probing.pairing`).
2. Give the dense block tokens. ``equal_random_tokens``: whole random documents, until they hold as many positives
   and negatives, of as many documents, as its partner's. ``equal_router_tokens``: what the router sends to its
   partner. In both, cut either side to the same number of positives and of negatives.
3. Rank and fit in every cell; read validate, and take the cell with the highest AUROC of each draw; read test, and
   score that cell. A concept counts in a pair only if both of its cells can be probed and scored.

The first arm asks whether experts' neurons are cleaner when the search is equal, the second holds the routing fixed
as well; the difference is what routing adds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_lens.corpus.batches import Tokenized, batches
from moe_lens.corpus.splits import SPLITS, code_of
from moe_lens.errors import BadConfig, MemoryLimit
from moe_lens.probing.equal_probes import Fitted, auroc, document_counts, fit_cell, logits, metrics
from moe_lens.probing.evaluate import COUNTS
from moe_lens.probing.matched import ARMS, Matched, TwoModels
from moe_lens.probing.memory import default_limit, resident_bytes, working_bytes
from moe_lens.probing.pairing import BlockPair, Sample, draw_pairs, layer_pairs
from moe_lens.probing.settings import ProbeSettings
from moe_lens.stats import f1_always_positive
from moe_lens.types import Role, Split, Status

if TYPE_CHECKING:
    import pandas as pd
    from jaxtyping import Bool, Float, Int
    from numpy import ndarray
    from torch import Tensor

    from moe_lens.models.lens import Lens
    from moe_lens.models.spec import LayerSpec

METRICS = ("f1", "f1_balanced", "auroc")
ROLES = (Role.MOE.value, Role.DENSE.value)


@dataclass(frozen=True)
class EqualScores:
    """The chosen cell of every arm, draw, concept and k in both models, scored on test."""

    frame: pd.DataFrame
    """One row per (arm, draw, concept, k, metric, role): value, chance, the cell and its neurons, what it was chosen
    by, drawn rows per split, and between how many cells and neurons it was chosen. Equal on both roles: ``n_cells``,
    ``n_neurons``, and every ``n_...`` of one pair. ``entry`` numbers `counts`, -1 where nothing could be scored."""
    counts: Float[ndarray, "entry document count"]
    """Columns ``evaluate.COUNTS``; float32, 24 bytes per entry and document."""
    documents: Int[ndarray, "document"]
    """The test documents, as numbered in the corpus."""
    seed: int
    draws: int
    pairs: tuple[BlockPair, ...]
    n_tokens: int
    """Tokens that went through either model, summed over passes."""
    n_passes: int
    """Groups of layers: passes of each model over each split."""


def equal_candidates(
    lens: Lens,
    baseline: Lens,
    tokenized: Tokenized,
    tokenized_baseline: Tokenized,
    settings: ProbeSettings,
    *,
    layers: Sequence[int] | None = None,
    draws: int = 20,
    k: Sequence[int] = (1, 8),
    seed: int = 0,
    max_memory: int | None = None,
    progress: bool = True,
) -> EqualScores:
    """Compare two models with as many cells, neurons and tokens each, over random draws of cells.

    Each model reads each split once for all draws (once per group of layers where memory is short). Held at a time:
    the activation rows of one split of one group, for every eligible token and layer
    ``top_k * (d_ff * itemsize + 28)`` bytes of the MoE and ``d_ff * itemsize + 28`` of the dense model; labels and
    positions, at most ``4 * concepts + 70`` bytes per token and model; 32 bytes per (pair, arm, concept, neuron of a
    probe). What of one group is on its way into one array needs twice the bytes of a layer for a moment.

    Args:
        tokenized: the documents in the tokens of `lens`, split and labelled.
        tokenized_baseline: the same documents and concepts in the tokens of `baseline`.
        settings: ``rank``, ``max_rows`` and ``batch_tokens`` are used.
        layers: decoder layers of `lens`; all with experts by default. All of the baseline's are on offer.
        draws: random draws of experts and blocks.
        k: numbers of neurons; the choice of the cell is among all cells at every k.
        seed: of the draws. More draws leave the earlier ones as they were.
        max_memory: limit on the resident set of the process in bytes.

    Swapping the models swaps the roles and nothing else. A dense `lens` counts as one expert.

    Raises:
        BadConfig: two MoEs, a k above the width of the cells, no draw, or layers without experts.
        MemoryLimit: not even one pair of layers fits.

    Neurons are ranked on the drawn rows that the probe is fitted on, at most ``max_rows``, because the ranking must
    not see more tokens in one model than in the other. Does not show whether the models use their neurons for the
    concept, nor what the search over all cells of a model would find.
    """
    if lens.spec.is_moe and baseline.spec.is_moe:
        raise BadConfig(f"{baseline.name} is an MoE: the equal_* arms need a dense baseline, give one with --baseline")
    if draws < 1:
        raise BadConfig(f"{draws} draws: give 1 or more")
    chosen = lens.check_layers(layers)
    flipped = baseline.spec.is_moe
    sides = [(lens, tokenized, chosen), (baseline, tokenized_baseline, baseline.layers)]
    moe, dense = sides[::-1] if flipped else sides
    moe_layers = [n for n in moe[2] if n in moe[0].layers]
    pairs = layer_pairs(moe[0].spec, dense[0].spec, moe_layers=moe_layers, dense_layers=dense[2])
    ks = tuple(sorted({int(n) for n in k}))
    if not pairs:
        raise BadConfig(f"{lens.name}: none of the layers {list(chosen)} has experts, choose others with --layers")
    width = min(min(a.d_ff, b.d_ff) for a, b in pairs)
    if not ks or ks[0] < 1 or ks[-1] > width:
        raise BadConfig(f"k is {list(k)}: give numbers from 1 to {width}, the neurons of the narrower cells")
    models = TwoModels(moe[0], dense[0], moe[1], dense[1], settings, seed, progress)
    groups = _groups(models, pairs, max_memory)
    run = _Run(models, ks, draws)
    for group in groups:
        run.group(group)
    return run.result(flipped=flipped, names=[c.name for c in tokenized.concepts], n_passes=len(groups))


def _groups(
    models: TwoModels, pairs: Sequence[tuple[LayerSpec, LayerSpec]], max_memory: int | None
) -> list[list[tuple[LayerSpec, LayerSpec]]]:
    """Consecutive pairs of layers that fit the memory; joining a layer's rows needs twice their size for a moment."""
    sides = ((models.moe, models.moe_tokens), (models.dense, models.dense_tokens))
    n_rows = [max(batches(tokenized, split=split).n_tokens for split in SPLITS) for _, tokenized in sides]
    itemsize = [lens.model.dtype.itemsize for lens, _ in sides]
    limit = default_limit() if max_memory is None else max_memory
    working = max(
        working_bytes([p[i] for p in pairs], d_model=lens.spec.d_model, settings=models.settings, itemsize=itemsize[i])
        for i, (lens, _) in enumerate(sides)
    )
    room = limit - resident_bytes() - working
    groups: list[list[tuple[LayerSpec, LayerSpec]]] = [[]]
    used, largest = 0, 0
    for pair in pairs:
        need = [n * e.top_k * (e.d_ff * size + 28) for n, e, size in zip(n_rows, pair, itemsize, strict=True)]
        if sum(need) + 2 * max(need) > room:
            raise MemoryLimit(
                f"the rows of layers {pair[0].layer} and {pair[1].layer} do not fit --max-memory "
                f"{limit / 2**30:.1f}GB beside the models: raise --max-memory, or lower --max-tokens or --batch-size"
            )
        if used + sum(need) + 2 * max(largest, *need) > room:
            groups.append([])
            used, largest = 0, 0
        groups[-1].append(pair)
        used, largest = used + sum(need), max(largest, *need)
    return groups


@dataclass
class _Cell:
    """What is known of one pair in one arm; axis ``role`` in the order of ``ROLES``."""

    arm: str
    pair: BlockPair
    fitted: tuple[dict[int, Fitted], dict[int, Fitted]]
    ok: Bool[ndarray, "k concept"]
    n: Int[ndarray, "split class concept"]
    """Drawn rows and drawn positives."""
    auroc: Float[ndarray, "role k concept"]
    """On validate."""


@dataclass(frozen=True)
class _Best:
    """The chosen cell of one arm, draw, role, k and concept."""

    by: tuple[float, int]
    row: dict[str, Any]
    values: tuple[float, ...]
    chances: tuple[float, ...]
    counts: Float[ndarray, "document count"]


class _Run:
    """What was found in the groups of layers so far."""

    def __init__(self, models: TwoModels, ks: tuple[int, ...], draws: int) -> None:
        self.models, self.ks, self.draws = models, ks, draws
        self.n_concepts = len(models.moe_tokens.concepts)
        self.documents = models.documents(Split.TEST)
        self.place = np.full(len(models.both_read), -1)
        self.place[self.documents] = np.arange(len(self.documents))
        self.pairs: list[BlockPair] = []
        self.n_tokens = 0
        shape = (len(ARMS), draws, len(ks), self.n_concepts)
        self.n_cells, self.n_neurons = np.zeros(shape, int), np.zeros(shape, int)
        self.best: dict[tuple[int, int, int, int, int], _Best] = {}  # arm, draw, role, k, concept

    def group(self, group: Sequence[tuple[LayerSpec, LayerSpec]]) -> None:
        """All three splits for some pairs of layers; the rows of one are dropped before the next is read."""
        cells = self._select(self._read(Split.SELECT, group), group)
        self._validate(self._read(Split.VALIDATE, group), cells)
        self._test(self._read(Split.TEST, group), cells)

    def _read(self, split: Split, group: Sequence[tuple[LayerSpec, LayerSpec]]) -> Matched:
        rows = Matched(self.models, split, group)
        self.n_tokens += rows.n_tokens
        return rows

    def _bar(self, items: Sequence[Any], what: str) -> Any:
        from tqdm.auto import tqdm

        return tqdm(items, desc=f"equal {what}", unit="pair", disable=None if self.models.progress else True)

    def _select(self, rows: Matched, group: Sequence[tuple[LayerSpec, LayerSpec]]) -> list[_Cell]:
        if rows.empty:
            return []
        drawn = [draw_pairs(*two, rows.load(two[0]), draws=self.draws, seed=self.models.seed) for two in group]
        pairs = [pair for layer in drawn for pair in layer]
        self.pairs += pairs
        cells = []
        known: dict[tuple[Any, ...], dict[int, Fitted]] = {}  # one expert in several draws, and in both arms
        for pair, arm in self._bar([(pair, arm) for pair in pairs for arm in ARMS], "fit"):
            found = rows.samples(arm, pair, self.models.possible)
            if found is None:
                continue
            moe, dense = found[0].lines(rows.enough(found[0])), found[1].lines(rows.enough(*found))
            if not len(dense.concepts):
                continue
            h_moe, h_dense = rows.activations(pair)
            key = (pair.layer, pair.expert, pair.neurons.tobytes(), hash(moe.row.numpy().tobytes()))
            if key not in known or not np.array_equal(known[key][self.ks[0]].concepts, moe.concepts):
                known[key] = self._fit(h_moe, pair.neurons, moe)
            cells.append(self._cell(arm, pair, known[key], self._fit(h_dense, pair.dense_neurons, dense), dense))
        return cells

    def _cell(
        self, arm: str, pair: BlockPair, moe: dict[int, Fitted], dense: dict[int, Fitted], sample: Sample
    ) -> _Cell:
        ok = np.zeros((len(self.ks), self.n_concepts), bool)
        n = np.zeros((len(SPLITS), 2, self.n_concepts), int)
        for i, k in enumerate(self.ks):
            ok[i, sample.concepts] = moe[k].lines(sample.concepts).usable & dense[k].usable
        n[0][:, sample.concepts] = sample.n, sample.n_pos
        return _Cell(arm, pair, (moe, dense), ok, n, np.full((2, *ok.shape), np.nan))

    def _fit(self, h: Float[Tensor, "row d_ff"], neurons: Int[ndarray, "w"], sample: Sample) -> dict[int, Fitted]:
        return fit_cell(h, neurons, sample, self.ks, rank=self.models.settings.rank)

    def _matched(self, rows: Matched, cells: Sequence[_Cell]) -> Iterator[tuple[_Cell, Sample, Sample]]:
        """Cells with their samples of a later split; what has too few rows there is no longer ok."""
        for cell in self._bar(cells, rows.split.value):
            found = rows.samples(cell.arm, cell.pair, np.flatnonzero(cell.ok.any(0)))
            still = np.zeros(self.n_concepts, bool)
            if found is not None and rows.enough(*found).any():
                moe, dense = (sample.lines(rows.enough(*found)) for sample in found)
                still[dense.concepts] = True
                cell.n[code_of(rows.split)][:, dense.concepts] = dense.n, dense.n_pos
                yield cell, moe, dense
            cell.ok &= still

    def _validate(self, rows: Matched, cells: Sequence[_Cell]) -> None:
        for cell, *samples in self._matched(rows, cells):
            for role, (sample, h) in enumerate(zip(samples, rows.activations(cell.pair), strict=True)):
                for i, k in enumerate(self.ks):
                    score = logits(h, sample, cell.fitted[role][k].lines(sample.concepts))
                    cell.auroc[role, i, sample.concepts] = auroc(score, sample)

    def _test(self, rows: Matched, cells: Sequence[_Cell]) -> None:
        for _ in self._matched(rows, cells):
            pass
        for a, arm in enumerate(ARMS):
            for draw in range(self.draws):
                mine = [cell for cell in cells if cell.arm == arm and cell.pair.draw == draw]
                if mine:
                    self.n_cells[a, draw] += sum(cell.ok.astype(int) for cell in mine)
                    self.n_neurons[a, draw] += sum(cell.ok * cell.pair.width for cell in mine)
                    self._score(rows, (a, draw), mine)

    def _score(self, rows: Matched, at: tuple[int, int], cells: Sequence[_Cell]) -> None:
        """Score the chosen cells of one draw on test, where they beat those of earlier groups of layers."""
        ok = np.stack([cell.ok for cell in cells])
        n = np.broadcast_to(np.stack([cell.n[2, 0] for cell in cells])[:, None], ok.shape)
        by = np.where(ok, np.stack([cell.auroc for cell in cells], 1), -np.inf)
        first = np.stack([np.lexsort((-n, -side), axis=0)[0] for side in by])  # stable: pairs come by rising layer
        for c, cell in enumerate(cells):
            wins = (first == c) & cell.ok
            for role, i, g in np.argwhere(wins):
                old = self.best.get((*at, role, i, g))
                wins[role, i, g] = old is None or (cell.auroc[role, i, g], cell.n[2, 0, g]) > old.by
            if not wins.any():
                continue
            found = rows.samples(cell.arm, cell.pair, np.flatnonzero(wins.any((0, 1))))
            assert found is not None
            for role, i in np.argwhere(wins.any(2)).tolist():
                sample = found[role].lines(wins[role, i, found[role].concepts])
                self._score_cell(cell, sample, rows.activations(cell.pair)[role], (*at, role, i))

    def _score_cell(
        self, cell: _Cell, sample: Sample, h: Float[Tensor, "row d_ff"], at: tuple[int, int, int, int]
    ) -> None:
        _, _, role, i = at
        fitted = cell.fitted[role][self.ks[i]].lines(sample.concepts)
        score = logits(h, sample, fitted)
        numbers = metrics(score, sample)
        counts = document_counts(score, sample, self.place, len(self.documents))
        pair = cell.pair
        where = (pair.layer, pair.expert, -1) if role == 0 else (pair.dense_layer, 0, pair.block)
        for j, g in enumerate(sample.concepts.tolist()):
            prevalence, area = float(numbers["prevalence"][j]), float(cell.auroc[role, i, g])
            row = dict(zip(("layer", "expert", "block"), where, strict=True)) | {
                "neurons": fitted.neurons[j].tolist(), "sign": fitted.coef[j].sign().int().tolist(),
                "auroc_validate": area, "prevalence": prevalence,
                **{f"n_{split}": int(cell.n[s, 0, g]) for s, split in enumerate(SPLITS)},
                **{f"n_pos_{split}": int(cell.n[s, 1, g]) for s, split in enumerate(SPLITS)},
                "status": (Status.SEPARABLE if fitted.separable[j] else Status.OK).value,
            }  # fmt: skip
            values = tuple(float(numbers[m][j]) for m in METRICS)
            chances = (float(f1_always_positive(prevalence)), 2 / 3, 0.5)
            self.best[(*at, g)] = _Best((area, int(cell.n[2, 0, g])), row, values, chances, counts[j])

    def result(self, *, flipped: bool, names: Sequence[str], n_passes: int) -> EqualScores:
        """The table of what was found."""
        import pandas as pd

        entries = {key: i for i, key in enumerate(sorted(self.best))}
        blank = {"layer": -1, "expert": -1, "block": -1, "neurons": [], "sign": [], "auroc_validate": np.nan}
        blank |= {"prevalence": np.nan, **{f"{n}_{s}": 0 for n in ("n", "n_pos") for s in SPLITS}}
        blank |= {"status": Status.TOO_FEW.value}
        rows = []
        for a, d, r, i, g in np.ndindex(len(ARMS), self.draws, 2, len(self.ks), self.n_concepts):
            best = self.best.get((a, d, r, i, g))
            head = {"arm": ARMS[a], "draw": d, "concept": names[g], "k": self.ks[i], "role": ROLES[r ^ int(flipped)]}
            size = {"n_cells": int(self.n_cells[a, d, i, g]), "n_neurons": int(self.n_neurons[a, d, i, g])}
            for m, metric in enumerate(METRICS):
                value, chance = (best.values[m], best.chances[m]) if best else (np.nan, np.nan)
                rows.append(
                    {**head, "metric": metric, "value": value, "chance": chance, **(best.row if best else blank)}
                    | {**size, "entry": entries.get((a, d, r, i, g), -1)}
                )
        counts = [self.best[key].counts for key in entries]
        table = np.stack(counts) if counts else np.zeros((0, len(self.documents), len(COUNTS)), np.float32)
        return EqualScores(
            pd.DataFrame(rows), table, self.documents, self.models.seed, self.draws, tuple(self.pairs), self.n_tokens,
            n_passes,
        )  # fmt: skip
