"""``polysemanticity``: read both models, score every neuron, compare.

1. Group the concepts; pair the layers by relative depth; cut the pairs into groups that fit the memory.
2. Per group of pairs, stream validate and test documents once through each model and keep all eligible rows.
3. Per pair: draw equally many rows for all cells (`cells`), score every neuron (`auroc`), describe (`neurons`) and
   compare (`compare`) it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from moe_lens.corpus.batches import Tokenized, batches
from moe_lens.corpus.splits import code_of
from moe_lens.errors import BadConfig, MemoryLimit
from moe_lens.probing.equal.pairing import layer_pairs
from moe_lens.probing.equal.rows import SplitRows
from moe_lens.probing.memory import default_limit, gigabytes, release, resident_bytes, working_bytes
from moe_lens.probing.polysemanticity.cells import Cell, score_cells
from moe_lens.probing.polysemanticity.compare import LayerComparison, compare_layer, layer_table
from moe_lens.probing.polysemanticity.groups import ConceptGroup, concept_groups
from moe_lens.probing.polysemanticity.neurons import N_FOLDS, LayerAurocs, join
from moe_lens.probing.polysemanticity.result import Polysemanticity
from moe_lens.probing.settings import ProbeSettings
from moe_lens.types import Role, Split, Status

if TYPE_CHECKING:
    from jaxtyping import Bool, Int
    from torch import Tensor

    from moe_lens.models.lens import Lens
    from moe_lens.models.spec import LayerSpec

_SPLITS = (Split.VALIDATE, Split.TEST)
_Side = tuple[Role, "Lens", Tokenized]
_Pair = tuple["LayerSpec", ...]


def polysemanticity(
    lens: Lens,
    tokenized: Tokenized,
    *,
    baseline: Lens | None = None,
    tokenized_baseline: Tokenized | None = None,
    settings: ProbeSettings,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    max_memory: int | None = None,
    progress: bool = True,
) -> Polysemanticity:
    """How many concept groups each neuron serves, MoE and dense, matched on firing rate (METRICS 1.4).

    Held at a time: the validate and test rows of one group of pairs of layers, ``top_k * (d_ff * itemsize + 28)``
    bytes per eligible token and layer; and, for one pair and every concept, 2 bytes per row and some 150 per neuron.

    Args:
        tokenized: the documents in the tokens of `lens`, split and labelled.
        baseline: a dense model; without one only the tables of `lens` are made.
        tokenized_baseline: the same documents and concepts in the tokens of `baseline`; `tokenized` by default.
        settings: ``batch_tokens`` and ``seed`` (of the row keys, which draw the rows) are used.
        layers: decoder layers of `lens`, all by default. Only as many as the shallower model has are compared, and
            the others are left out.
        seed: of the folds of documents and of the experts that dense neurons are given as partners.
        max_memory: limit on the resident set of the process in bytes.

    Raises:
        BadConfig: a baseline with experts, other documents or concepts in the two corpora, or an empty split.
        MemoryLimit: not even one pair of layers fits.

    Does not show that the model uses a neuron for what it detects, nor anything about concepts that were not listed.
    An AUROC is among the tokens that a cell sees: an expert's negatives are those that its router sends it, so the
    routing is part of what is compared. Neurons whose cell sees too few tokens of every group are not judged, and
    they are no random sample: rarely visited experts are among them.
    """
    first = Role.MOE if lens.spec.is_moe or baseline is not None else Role.DENSE
    sides: list[_Side] = [(first, lens, tokenized)]
    if baseline is not None:
        if baseline.spec.is_moe:
            raise BadConfig(f"{baseline.name} is an MoE: give a dense model with --baseline, the MoE with --model")
        sides.append((Role.DENSE, baseline, tokenized if tokenized_baseline is None else tokenized_baseline))
    allowed = _documents(sides)
    chosen = set(lens.check_layers(layers))
    pairs: list[_Pair] = [(entry,) for entry in lens.spec.layers if entry.layer in chosen]
    if baseline is not None:
        pairs = [*layer_pairs(lens.spec, baseline.spec, moe_layers=sorted(chosen), dense_layers=baseline.layers)]
    groups = concept_groups(tokenized)
    fold = _folds(tokenized, seed)
    concepts = np.array([group.concept for group in groups], np.int64)
    names = {role: model.name for role, model, _ in sides}
    found: list[LayerComparison] = []
    frames: list[pd.DataFrame] = []
    for number, part in enumerate(_memory_groups(sides, pairs, max_memory, settings)):
        rows = [
            _read(side, [pair[i].layer for pair in part], settings, f"neurons {number + 1}", progress)
            for i, side in enumerate(sides)
        ]
        for pair in part:
            release()  # rows that were joined
            cells = _cells(names, pair, rows)
            layer = join(score_cells(cells, concepts, allowed, fold, N_FOLDS), len(groups), seed=seed)
            compared = compare_layer(layer)
            frames.append(_frame(layer, compared, groups, len(found), names))
            found.append(compared)
        del rows, cells, layer  # before the next group is read
        release()
    at = [(pair[0].layer, pair[1].layer if len(pair) > 1 else None) for pair in pairs]
    return Polysemanticity(pd.concat(frames, ignore_index=True), layer_table(found, at))


def _cells(roles: Iterable[Role], pair: _Pair, rows: Sequence[tuple[SplitRows, SplitRows]]) -> list[Cell]:
    """All experts of both models at one depth; a dense layer is one."""
    return [
        Cell(role, entry.layer, expert, splits)
        for role, entry, splits in zip(roles, pair, rows, strict=True)
        for expert in range(entry.n_experts)
    ]


def _read(
    side: _Side, layers: Sequence[int], settings: ProbeSettings, tag: str, progress: bool
) -> tuple[SplitRows, SplitRows]:
    """Validate and test rows of some layers of one model."""
    role, lens, tokenized = side
    validate, test = (
        SplitRows(lens, tokenized, split, settings, layers=layers, tag=f"{tag} {role.value}", progress=progress)
        for split in _SPLITS
    )
    return validate, test


def _documents(sides: Sequence[_Side]) -> Bool[Tensor, "document"]:
    """Documents that every model has tokens of."""
    _, first, text = sides[0]
    for _, model, other in sides[1:]:
        if len(other.corpus) != len(text.corpus) or [c.name for c in other.concepts] != [c.name for c in text.concepts]:
            raise BadConfig(
                f"{first.name} and {model.name} were given other documents or concepts: tokenize one corpus"
            )
    read = np.logical_and.reduce([np.isin(np.arange(len(t.corpus)), t.document) for _, _, t in sides])
    for split in _SPLITS:
        if not (read & (text.splits == code_of(split))).any():
            raise BadConfig(f"no document of the {split.value} split is left to score neurons on: give a larger corpus")
    return torch.from_numpy(read)


def _folds(tokenized: Tokenized, seed: int) -> Int[Tensor, "document"]:
    """Fold of every document; documents of one source file stay together, every fold has its part of both splits."""
    names = [document.group for document in tokenized.corpus.documents]
    codes = dict(zip(names, tokenized.splits.tolist(), strict=True))
    rng = np.random.default_rng([seed, N_FOLDS])
    order = rng.permutation(sorted(codes))
    order = sorted(order.tolist(), key=lambda name: codes[name])  # stable: random within each split
    number = {name: i % N_FOLDS for i, name in enumerate(order)}
    return torch.tensor([number[name] for name in names])


def _memory_groups(
    sides: Sequence[_Side], pairs: Sequence[_Pair], max_memory: int | None, settings: ProbeSettings
) -> list[list[_Pair]]:
    """Consecutive pairs of layers whose rows fit; joining the rows of one split needs twice their size for a moment."""
    limit = default_limit() if max_memory is None else max_memory
    n_rows = [[batches(text, split=split).n_tokens for split in _SPLITS] for _, _, text in sides]
    working = max(
        working_bytes([p[i] for p in pairs], d_model=model.spec.d_model, settings=settings,
                      itemsize=model.model.dtype.itemsize)
        for i, (_, model, _) in enumerate(sides)
    )  # fmt: skip
    room = limit - resident_bytes() - working
    out: list[list[_Pair]] = [[]]
    used = 0
    for pair in pairs:
        each = [
            n * entry.top_k * (entry.d_ff * model.model.dtype.itemsize + 28)
            for (_, model, _), entry, splits in zip(sides, pair, n_rows, strict=True)
            for n in splits
        ]
        neurons = sum(entry.n_experts * entry.d_ff for entry in pair)
        labels = sum(2 * n * e.top_k for e, splits in zip(pair, n_rows, strict=True) for n in splits)
        moment = 2 * max(each) + (150 * neurons + labels) * len(sides[0][2].concepts)
        if sum(each) + moment > room:
            least = gigabytes(limit - room + sum(each) + moment)
            raise MemoryLimit(
                f"the rows of layer {pair[0].layer} need about {least} in all and --max-memory is {gigabytes(limit)}: "
                "raise --max-memory, or lower --max-tokens or --batch-size"
            )
        if used + sum(each) + moment > room:
            out.append([])
            used = 0
        out[-1].append(pair)
        used += sum(each)
    return out


def _frame(
    layer: LayerAurocs, compared: LayerComparison, groups: Sequence[ConceptGroup], pair: int, names: dict[Role, str]
) -> pd.DataFrame:
    """One row per neuron of one pair of layers."""
    at = [(c.cell.role, c.cell.layer, c.cell.expert, n) for c in layer.cells for n in range(len(c.firing_rate))]
    table = compared.neurons
    status = np.where(np.isnan(layer.firing_rate), Status.CONSTANT.value, Status.OK.value).astype(object)
    seen = np.repeat([any(len(split.token(c.cell.layer, c.cell.expert)) for split in c.cell.splits)
                      for c in layer.cells], [len(c.firing_rate) for c in layer.cells])  # fmt: skip
    status[(table.n_groups == 0) & ((status == Status.OK.value) | ~seen)] = Status.TOO_FEW.value
    return pd.DataFrame({
        "model": [names[role] for role, *_ in at], "role": [role.value for role, *_ in at], "pair": pair,
        "layer": [a[1] for a in at], "expert": [a[2] for a in at], "neuron": [a[3] for a in at],
        "firing_rate": layer.firing_rate, "n_groups": table.n_groups,
        "best_group": [groups[g].name if g >= 0 else None for g in table.best_group],
        "best_auroc": table.best_auroc, "sign": table.sign, "participation_ratio": table.participation_ratio,
        "participation_ratio_all": table.participation_ratio_all, "n_groups_found": table.n_groups_found,
        "n_groups_detected": table.n_groups_detected, "selectivity": table.selectivity, "p_value": table.p_value,
        "q_value": table.q_value, "weight": compared.weight, "status": status.astype(str),
    })  # fmt: skip
