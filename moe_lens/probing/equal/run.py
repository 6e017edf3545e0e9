"""``equal_random_tokens`` and ``equal_router_tokens``: the same search in both models (METRICS 1.3, item 4).

1. Read the select documents with both models. Draw, per layer and draw, B experts by load and B disjoint blocks of
   the dense FFN at the same depth, all of w neurons (`moe_lens.probing.equal.pairing`).
2. Give the dense block tokens. ``equal_random_tokens``: whole random documents, until they hold as many positives
   and negatives, of as many documents, as its partner's. ``equal_router_tokens``: what the router sends to its
   partner. In both, cut either side to the same number of positives and of negatives.
3. Rank and fit in every cell; read validate and test, and score them all. Take the cell of each draw with the
   highest validate AUROC, and beside it the one with the highest test score, which is what reuse of the test data
   adds. A concept counts in a pair only if both of its cells can be probed and scored.

The first arm asks whether experts' neurons are cleaner when the search is equal, the second holds the routing fixed
as well; the difference is what routing adds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, product
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pandas as pd

from moe_lens.corpus.batches import Tokenized, batches
from moe_lens.corpus.splits import SPLITS, code_of
from moe_lens.errors import BadConfig, MemoryLimit
from moe_lens.probing.arms.base import METRICS, chance_scores
from moe_lens.probing.document_sums import COUNTS
from moe_lens.probing.equal.pairing import BlockPair, Sample, draw_pairs, layer_pairs
from moe_lens.probing.equal.probes import Fitted, auroc, document_counts, fit_cell, logits, metrics
from moe_lens.probing.equal.rows import ARMS, Matched, TwoModels
from moe_lens.probing.equal.scores import CHOICES, EqualScores
from moe_lens.probing.memory import default_limit, gigabytes, release, resident_bytes, working_bytes
from moe_lens.probing.settings import ProbeSettings
from moe_lens.probing.threads import in_threads
from moe_lens.types import Role, Split, Status

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from numpy import ndarray
    from torch import Tensor

    from moe_lens.models.lens import Lens
    from moe_lens.models.spec import LayerSpec

Item = TypeVar("Item")
Result = TypeVar("Result")
ROLES = (Role.MOE.value, Role.DENSE.value)


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
    positions, at most ``6 * concepts + 70`` bytes per token and model; the rows drawn for one pair, some 100 bytes per
    concept and row of its expert; 32 bytes per (pair, arm, concept, neuron of a probe); 24 bytes per chosen cell and
    test document, at most 4 cells per (arm, draw, role, concept, k). What of one group is on its way into one array
    needs twice the bytes of a layer for a moment.

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
                f"the rows of layers {pair[0].layer} and {pair[1].layer} need about "
                f"{gigabytes(limit - room + sum(need) + 2 * max(need))} in all and --max-memory is {gigabytes(limit)}: "
                f"raise --max-memory, or lower --max-tokens or --batch-size"
            )
        if used + sum(need) + 2 * max(largest, *need) > room:
            groups.append([])
            used, largest = 0, 0
        groups[-1].append(pair)
        used, largest = used + sum(need), max(largest, *need)
    return groups


@dataclass(eq=False)
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

    def describe(self, role: int, k: int, i: int, concept: int) -> dict[str, Any]:
        """Where the cell is, its probe at `k`, the `i`-th number, and the rows behind them."""
        where = (self.pair.layer, self.pair.expert, -1) if role == 0 else (self.pair.dense_layer, 0, self.pair.block)
        probe = self.fitted[role][k].lines(np.array([concept]))
        n, n_pos = self.n[:, 0, concept].tolist(), self.n[:, 1, concept].tolist()
        return {
            **dict(zip(("layer", "expert", "block"), where, strict=True)),
            "neurons": probe.neurons[0].tolist(), "sign": probe.coef[0].sign().int().tolist(),
            "auroc_validate": float(self.auroc[role, i, concept]), "prevalence": n_pos[-1] / n[-1],
            **dict(zip((f"n_{split}" for split in SPLITS), n, strict=True)),
            **dict(zip((f"n_pos_{split}" for split in SPLITS), n_pos, strict=True)),
            "status": (Status.SEPARABLE if probe.separable[0] else Status.OK).value,
        }  # fmt: skip


@dataclass(frozen=True)
class _Entry:
    """A cell that is the best so far of some arm, draw, role, k and concept."""

    cell: _Cell
    values: tuple[float, ...]
    """On test, in the order of ``METRICS``."""
    counts: Float[ndarray, "document count"]


class _Best:
    """The best cell so far of every (arm, draw, role, k) and concept, for every way to choose.

    Axis ``way``: by validate AUROC, then by each test metric.
    """

    def __init__(self, shape: tuple[int, ...], n_concepts: int) -> None:
        ways = (*shape, 1 + len(METRICS), n_concepts)
        self.by, self.n_test = np.full(ways, -np.inf), np.zeros(ways, int)
        self.entry = np.full(ways, -1)
        self.entries: dict[int, _Entry] = {}
        self._next = 0

    def offer(
        self, at: tuple[int, int, int, int], cell: _Cell, values: Float[ndarray, "metric concept"],
        counts: Mapping[int, Float[ndarray, "document count"]],
    ) -> None:  # fmt: skip
        """Take `cell` where it scores higher than those before, or as high on more rows."""
        _, _, role, i = at
        score = np.where(cell.ok[i], np.concatenate([cell.auroc[role, i][None], values]), -np.inf)
        n = np.broadcast_to(cell.n[-1, 0], score.shape)
        wins = (score > self.by[at]) | ((score == self.by[at]) & (n > self.n_test[at]))
        wins &= cell.ok[i]
        concepts = np.flatnonzero(wins.any(0))
        before = self.entry[at][:, concepts]
        for g in concepts.tolist():
            self.entries[self._next] = _Entry(cell, tuple(values[:, g].tolist()), counts[g])
            self.entry[at][wins[:, g], g] = self._next
            self._next += 1
        self.by[at][wins], self.n_test[at][wins] = score[wins], n[wins]
        for number in np.setdiff1d(before, self.entry[at][:, concepts]).tolist():
            self.entries.pop(number, None)


_Counted = list[tuple["Float[ndarray, 'metric concept']", "dict[int, Float[ndarray, 'document count']]"]]
"""Scores of all concepts and counts of some, for every k."""


def _pair_of(cell: _Cell) -> BlockPair:
    return cell.pair


class _Run:
    """What was found in the groups of layers so far."""

    def __init__(self, models: TwoModels, ks: tuple[int, ...], draws: int) -> None:
        self.models, self.ks, self.draws = models, ks, draws
        self.n_concepts = len(models.moe_tokens.concepts)
        self.documents = models.documents(Split.TEST)
        self.place = np.full(len(models.both_read), -1)
        self.place[self.documents] = np.arange(len(self.documents))
        self.n_tokens = 0
        shape = (len(ARMS), draws, len(ks), self.n_concepts)
        self.n_cells, self.n_neurons = np.zeros(shape, int), np.zeros(shape, int)
        self.best = _Best((len(ARMS), draws, len(ROLES), len(ks)), self.n_concepts)

    def group(self, group: Sequence[tuple[LayerSpec, LayerSpec]]) -> None:
        """All three splits for some pairs of layers; the rows of one are dropped before the next is read."""
        cells = self._select(self._read(Split.SELECT, group), group)
        self._validate(self._read(Split.VALIDATE, group), cells)
        self._test(self._read(Split.TEST, group), cells)

    def _read(self, split: Split, group: Sequence[tuple[LayerSpec, LayerSpec]]) -> Matched:
        release()  # what the split before has left
        rows = Matched(self.models, split, group)
        self.n_tokens += rows.n_tokens
        return rows

    def _by_expert(
        self, work: Callable[[Matched, list[Item]], Result], rows: Matched, items: Sequence[Item],
        pair_of: Callable[[Item], BlockPair], what: str,
    ) -> Iterator[Result]:  # fmt: skip
        """`work` on the items of one expert after the other; items are sorted by expert."""
        from tqdm.auto import tqdm

        experts = [list(own) for _, own in groupby(items, key=lambda item: (pair_of(item).layer, pair_of(item).expert))]
        results = in_threads(lambda own: work(rows.view(), own), experts)
        hidden = None if self.models.progress else True
        yield from tqdm(results, f"equal {what}", len(experts), unit="expert", disable=hidden)

    def _select(self, rows: Matched, group: Sequence[tuple[LayerSpec, LayerSpec]]) -> list[_Cell]:
        """Fit every cell, expert by expert: what an expert needs is drawn and fitted once for all draws and arms."""
        if rows.empty:
            return []
        drawn = [draw_pairs(*two, rows.load(two[0]), draws=self.draws, seed=self.models.seed) for two in group]
        pairs = sorted((p for layer in drawn for p in layer), key=lambda p: (p.layer, p.expert, p.draw, p.block))
        cells = self._by_expert(self._fit_expert, rows, pairs, lambda pair: pair, "fit")
        return [cell for own in cells for cell in own]

    def _fit_expert(self, rows: Matched, pairs: Sequence[BlockPair]) -> list[_Cell]:
        cells = []
        for pair, arm in product(pairs, ARMS):
            found = rows.samples(arm, pair, self.models.possible)
            if found is not None:
                cells.append(self._cell(rows, arm, pair, *found))
        return cells

    def _cell(self, rows: Matched, arm: str, pair: BlockPair, moe: Sample, dense: Sample) -> _Cell:
        h_moe, h_dense = rows.activations(pair)
        fitted = (
            rows.once(("fit", moe, pair.neurons.tobytes()), lambda: self._fit(h_moe, pair.neurons, moe)),
            self._fit(h_dense, pair.dense_neurons, dense),
        )
        ok = np.zeros((len(self.ks), self.n_concepts), bool)
        for i, k in enumerate(self.ks):
            ok[i, dense.concepts] = fitted[0][k].lines(dense.concepts).usable & fitted[1][k].usable
        n = np.zeros((len(SPLITS), 2, self.n_concepts), int)
        n[0][:, dense.concepts] = dense.n, dense.n_pos
        return _Cell(arm, pair, fitted, ok, n, np.full((len(ROLES), *ok.shape), np.nan))

    def _fit(self, h: Float[Tensor, "row d_ff"], neurons: Int[ndarray, "w"], sample: Sample) -> dict[int, Fitted]:
        return fit_cell(h, neurons, sample, self.ks, rank=self.models.settings.rank)

    def _matched(self, rows: Matched, cells: Sequence[_Cell]) -> Iterator[tuple[_Cell, tuple[Sample, Sample]]]:
        """Cells with their samples of a later split; what has too few rows there is no longer ok."""
        for cell in cells:
            found = rows.samples(cell.arm, cell.pair, np.flatnonzero(cell.ok.any(0)))
            still = np.zeros(self.n_concepts, bool)
            if found is not None:
                dense = found[1]
                still[dense.concepts] = True
                cell.n[code_of(rows.split)][:, dense.concepts] = dense.n, dense.n_pos
            cell.ok &= still
            if found is not None:
                yield cell, found

    def _validate(self, rows: Matched, cells: Sequence[_Cell]) -> None:
        for _ in self._by_expert(self._validate_expert, rows, cells, _pair_of, rows.split.value):
            pass

    def _validate_expert(self, rows: Matched, cells: Sequence[_Cell]) -> None:
        for cell, (moe, dense) in self._matched(rows, cells):
            (h_moe, h_dense), (fit_moe, fit_dense) = rows.activations(cell.pair), cell.fitted
            cell.auroc[0] = rows.once(("auroc", moe, id(fit_moe)), partial(self._auroc, h_moe, moe, fit_moe))
            cell.auroc[1] = self._auroc(h_dense, dense, fit_dense)

    def _auroc(
        self, h: Float[Tensor, "row d_ff"], sample: Sample, fitted: dict[int, Fitted]
    ) -> Float[ndarray, "k concept"]:
        sample = sample.of(fitted[self.ks[0]].concepts)
        out = np.full((len(self.ks), self.n_concepts), np.nan)
        for i, k in enumerate(self.ks):
            out[i, sample.concepts] = auroc(logits(h, sample, fitted[k].lines(sample.concepts)), sample)
        return out

    def _test(self, rows: Matched, cells: Sequence[_Cell]) -> None:
        for own in self._by_expert(self._test_expert, rows, cells, _pair_of, rows.split.value):
            for cell, sides in own:
                a, draw = ARMS.index(cell.arm), cell.pair.draw
                self.n_cells[a, draw] += cell.ok
                self.n_neurons[a, draw] += cell.ok * cell.pair.width
                for (role, side), i in product(enumerate(sides), range(len(self.ks))):
                    self.best.offer((a, draw, role, i), cell, *side[i])

    def _test_expert(self, rows: Matched, cells: Sequence[_Cell]) -> list[tuple[_Cell, tuple[_Counted, _Counted]]]:
        out = []
        for cell, (moe, dense) in self._matched(rows, cells):
            (h_moe, h_dense), (fit_moe, fit_dense) = rows.activations(cell.pair), cell.fitted
            counted = rows.once(("counts", moe, id(fit_moe)), partial(self._counts, h_moe, moe, fit_moe))
            out.append((cell, (counted, self._counts(h_dense, dense, fit_dense))))
        return out

    def _counts(self, h: Float[Tensor, "row d_ff"], sample: Sample, fitted: dict[int, Fitted]) -> _Counted:
        """Scores of all concepts and counts of those in `sample`, at every k."""
        sample = sample.of(fitted[self.ks[0]].concepts)
        out = []
        for k in self.ks:
            score = logits(h, sample, fitted[k].lines(sample.concepts))
            counts = document_counts(score, sample, self.place, len(self.documents))
            values = np.full((len(METRICS), self.n_concepts), np.nan)
            values[:, sample.concepts] = metrics(counts)
            out.append((values, dict(zip(sample.concepts.tolist(), counts.astype(np.float32), strict=True))))
        return out

    def result(self, *, flipped: bool, names: Sequence[str], n_passes: int) -> EqualScores:
        """The table of what was found."""
        best = self.best
        numbers = sorted(best.entries)
        place = np.full(max(numbers, default=-1) + 2, -1)  # the last one is for entry -1
        place[numbers] = np.arange(len(numbers))
        rows, values = self._entries(numbers)
        # arm, draw, role, k, way, concept -> choice, metric in place of way
        way = np.array([[0] * len(METRICS), range(1, 1 + len(METRICS))])
        entry = np.moveaxis(place[best.entry][:, :, :, :, way], (6, 2), (2, 4))
        at = np.indices(entry.shape).reshape(entry.ndim, -1)  # arm, draw, concept, k, role, choice, metric
        arm, draw, g, i, role, choice, m = at
        flat = entry.reshape(-1)
        frame = pd.DataFrame({
            "arm": np.array(ARMS)[arm], "draw": draw, "concept": np.array(names)[g], "k": np.array(self.ks)[i],
            "role": np.array(ROLES[::-1] if flipped else ROLES)[role], "choice": np.array(CHOICES)[choice],
            "metric": np.array(METRICS)[m], "value": values[0, flat, m], "chance": values[1, flat, m],
        })  # fmt: skip
        frame = pd.concat([frame, rows.iloc[flat % len(rows)].reset_index(drop=True)], axis=1)
        frame["n_cells"], frame["n_neurons"] = self.n_cells[arm, draw, i, g], self.n_neurons[arm, draw, i, g]
        frame["entry"] = flat
        counts = [best.entries[number].counts for number in numbers]
        table = np.stack(counts) if counts else np.zeros((0, len(self.documents), len(COUNTS)), np.float32)
        return EqualScores(frame, table, self.documents, self.models.seed, self.draws, self.n_tokens, n_passes)

    def _entries(self, numbers: Sequence[int]) -> tuple[pd.DataFrame, Float[ndarray, "two entry metric"]]:
        """A row for each entry and a last one for none; their values and chances."""
        found = {int(self.best.entry[at]): at for at in map(tuple, np.argwhere(self.best.entry >= 0))}
        rows, values = [], np.full((2, len(numbers) + 1, len(METRICS)), np.nan)
        for j, number in enumerate(numbers):
            _, _, role, i, _, concept = found[number]
            entry = self.best.entries[number]
            rows.append(entry.cell.describe(int(role), self.ks[i], int(i), int(concept)))
            chance = chance_scores(rows[-1]["prevalence"])
            values[:, j] = entry.values, [chance[metric] for metric in METRICS]
        blank = {"layer": -1, "expert": -1, "block": -1, "neurons": [], "sign": [], "auroc_validate": np.nan}
        blank |= {"prevalence": np.nan, **{f"{n}_{s}": 0 for n in ("n", "n_pos") for s in SPLITS}}
        return pd.DataFrame([*rows, blank | {"status": Status.TOO_FEW.value}]), values
