"""Probe every cell of one model under one document split.

1. Stream the select documents, a group of layers at a time: moments of every (cell, concept, neuron), and rows.
2. Rank neurons, fit k = 1 everywhere; fit larger k in the best cells of each concept.
3. Stream the validate and test documents once, keeping only the neurons that some probe reads.
4. Score every probe; keep per-document counts of what the arms report.
5. Exchange the labels, and choose and score the probes of every k again (the null).

Every document goes through the model once per group of layers for step 1 and once in all for step 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from moe_lens.capture.moments import ClassMoments
from moe_lens.capture.routing import RoutingStats
from moe_lens.capture.rows import RowStore
from moe_lens.capture.stream import stream
from moe_lens.capture.tokens import TokenTable
from moe_lens.corpus.batches import Batches, Tokenized, batches
from moe_lens.corpus.splits import SPLITS
from moe_lens.probing.arms import ModelScores, Scanned, collect, usable, winner_keys
from moe_lens.probing.arms.base import WinnerKey
from moe_lens.probing.evaluate import NUMBERS, Evaluator, columns_needed
from moe_lens.probing.exchange import label_tracks, strata
from moe_lens.probing.fit import LayerFitter, Probe
from moe_lens.probing.memory import layer_groups
from moe_lens.probing.nulls import NullDistribution, cell_columns, null_statistics
from moe_lens.probing.settings import BEST_CELLS, ProbeSettings
from moe_lens.probing.threads import chunks, in_threads
from moe_lens.types import Granularity, Role, Split, Status

if TYPE_CHECKING:
    from moe_lens.models.lens import Lens
    from moe_lens.models.spec import LayerSpec

_CONCEPTS_AT_ONCE, _PROBES_AT_ONCE = 32, 128


@dataclass(frozen=True)
class Scan:
    """What one pass over model and corpus gave."""

    scores: ModelScores
    routing: RoutingStats
    n_tokens: int
    """Tokens that went through the model, summed over passes."""
    n_passes: int
    """Passes over the select split, one per group of layers."""


def scope_numbers(tokenized: Tokenized) -> list[int]:
    """Number the distinct scopes of the concepts; concepts defined on the same documents share one."""
    seen: dict[tuple[tuple[str, tuple[str, ...]], ...], int] = {}
    keys = [tuple(sorted((name, tuple(values)) for name, values in c.scope.items())) for c in tokenized.concepts]
    return [seen.setdefault(key, len(seen)) for key in keys]


def scan(
    lens: Lens,
    tokenized: Tokenized,
    settings: ProbeSettings,
    *,
    layers: Sequence[LayerSpec],
    role: Role,
    experts: Sequence[tuple[int, int]] | None = None,
    max_memory: int | None = None,
    progress: bool = True,
) -> Scan:
    """Probe the cells of one model.

    Args:
        layers: feed-forward layers to probe.
        experts: restrict to these (layer, expert) cells.
        max_memory: limit on the resident set of the process in bytes.

    Raises:
        MemoryLimit: not even one layer fits.
    """
    scopes = scope_numbers(tokenized)
    n_documents = len(tokenized.corpus)
    routing = RoutingStats(n_documents)
    groups = layer_groups(
        layers,
        n_classes=len(scopes) + len(set(scopes)) + 1,
        n_rows=_batches(tokenized, Split.SELECT, settings).n_tokens,
        d_model=lens.spec.d_model,
        settings=settings,
        itemsize=lens.model.dtype.itemsize,
        max_memory=max_memory,
    )
    probes: list[Probe] = []
    n_tokens = 0
    for number, group in enumerate(groups):
        tag = f"{role.value} select {number + 1}/{len(groups)}"
        found, stats, n = _select(lens, tokenized, settings, group, scopes, experts, tag, progress)
        if number:  # the same documents again: count them once
            stats.tokens_of_document.zero_()
        routing.merge(stats)
        probes += found
        n_tokens += n
    probes = _best_cells_only(probes, settings)
    evaluator, n = _evaluation_rows(lens, tokenized, settings, layers, scopes, probes, routing, role, progress)
    cells = _score(evaluator, probes, tokenized, role, progress)
    addresses = list(experts) if experts else [(a.layer, e) for a in layers for e in range(a.n_experts)]
    names = [c.name for c in tokenized.concepts]
    scanned = Scanned(evaluator, probes, cells, sorted(addresses), names, n_documents)
    d_ff = max(layer.d_ff for layer in layers)
    null = _null(evaluator, probes, tokenized, settings)
    scores = ModelScores(role.value, settings.seed, d_ff, cells, _winner_counts(scanned), collect(scanned), null)
    return Scan(scores, routing, n_tokens + n, len(groups))


def _null(
    evaluator: Evaluator, probes: Sequence[Probe], tokenized: Tokenized, settings: ProbeSettings
) -> NullDistribution | None:
    """The pipeline on exchanged labels; strata are the same for every tokenizer."""
    if not settings.permutations or not any(p.k == 1 and p.fitted for p in probes):
        return None
    documents = tokenized.corpus.documents
    length = np.array([len(document.text) for document in documents])
    source = [
        f"{code} {document.fields.get('domain', '')}"
        for code, document in zip(tokenized.splits, documents, strict=True)
    ]
    tracks, number = label_tracks(
        evaluator.rows.tokens,
        splits=tokenized.splits,
        stratum=strata(source, length),
        length_bin=strata(tokenized.splits.tolist(), length),
        names=[c.name for c in tokenized.concepts],
        granularity=[Granularity(c.granularity) for c in tokenized.concepts],
    )
    columns = cell_columns(evaluator.rows, evaluator.columns, probes, number)
    return null_statistics(tracks, columns, n_permutations=settings.permutations, seed=settings.seed)


def _winner_counts(scanned: Scanned) -> dict[WinnerKey, np.ndarray]:
    """Per-document counts of the cells that an arm chose."""
    wanted = winner_keys(scanned.cells)
    counts: dict[WinnerKey, np.ndarray] = {}
    for (layer, expert), probes in scanned.usable_probes.items():
        keys = [(layer, expert, scanned.concepts[p.concept], p.k) for p in probes]
        chosen = [i for i, key in enumerate(keys) if key in wanted]
        if chosen:
            found = scanned.evaluator.document_counts([probes[i] for i in chosen], scanned.n_documents)
            counts |= {keys[i]: c for i, c in zip(chosen, found, strict=True)}
    return counts


def _batches(tokenized: Tokenized, split: Split, settings: ProbeSettings) -> Batches:
    return batches(tokenized, split=split, tokens_per_batch=settings.batch_tokens)


def _select(
    lens: Lens,
    tokenized: Tokenized,
    settings: ProbeSettings,
    group: Sequence[int],
    scopes: Sequence[int],
    experts: Sequence[tuple[int, int]] | None,
    tag: str,
    progress: bool,
) -> tuple[list[Probe], RoutingStats, int]:
    """Steps 1 and 2 for one group of layers."""
    from tqdm.auto import tqdm

    tokens, moments, routing = TokenTable(), ClassMoments(scopes), RoutingStats(len(tokenized.corpus))
    rows = RowStore(tokens, scopes, max_rows=settings.max_rows, seed=settings.seed)
    loader = _batches(tokenized, Split.SELECT, settings)
    consumers = [tokens, moments, rows, routing]
    n = stream(lens, loader, consumers, layers=group, progress=progress, describe=tag)
    probes: list[Probe] = []
    fitters: dict[int, LayerFitter] = {}
    bar = tqdm(moments.layers, desc=f"{tag}: fit", unit="layer", disable=None if progress else True)
    for layer in bar:
        fitters[layer] = fitter = LayerFitter(layer, moments.moments(layer), tokens, settings)
        cells = [e for e in range(len(moments.counts(layer))) if experts is None or (layer, e) in experts]
        probes += _fit(fitter, rows, {(layer, e): list(range(len(scopes))) for e in cells}, [1])
        moments.drop(layer)
    if larger := [k for k in settings.k if k > 1]:
        best: dict[tuple[int, int], list[int]] = {}
        for probe in _leading(probes, settings):
            best.setdefault((probe.layer, probe.expert), []).append(probe.concept)
        for layer, fitter in fitters.items():
            mine = {at: sorted(concepts) for at, concepts in best.items() if at[0] == layer}
            probes += _fit(fitter, rows, mine, larger)
            rows.drop(layer)
    return probes, routing, n


def _fit(
    fitter: LayerFitter, rows: RowStore, concepts: Mapping[tuple[int, int], Sequence[int]], ks: Sequence[int]
) -> list[Probe]:
    """Fit some concepts of some experts of one layer."""
    rows.rows(fitter.layer, 0)  # sorts them, once
    pieces = chunks(concepts, _CONCEPTS_AT_ONCE)
    found = in_threads(lambda piece: fitter.fit(piece[0][1], rows.rows(*piece[0]), piece[1], ks), pieces)
    return [probe for piece in found for probe in piece]


def _leading(probes: Sequence[Probe], settings: ProbeSettings) -> list[Probe]:
    """The k = 1 probes of the cells that deserve larger k: the best eight per concept by select AUROC."""
    fitted = [p for p in probes if p.k == 1 and p.fitted]
    if settings.all_cells:
        return fitted
    by_concept: dict[int, list[Probe]] = {}
    for probe in fitted:
        by_concept.setdefault(probe.concept, []).append(probe)
    return [
        probe
        for members in by_concept.values()
        for probe in sorted(members, key=lambda p: (-p.auroc_select, p.layer, p.expert))[:BEST_CELLS]
    ]


def _best_cells_only(probes: Sequence[Probe], settings: ProbeSettings) -> list[Probe]:
    """Drop larger k from cells that a later layer pushed out of the best eight; keep k = 1 if it was asked for."""
    leading = {(p.layer, p.expert, p.concept) for p in _leading(probes, settings)}
    return [
        p for p in probes if (p.k == 1 and 1 in settings.k) or (p.k > 1 and (p.layer, p.expert, p.concept) in leading)
    ]


def _evaluation_rows(
    lens: Lens,
    tokenized: Tokenized,
    settings: ProbeSettings,
    layers: Sequence[LayerSpec],
    scopes: Sequence[int],
    probes: Sequence[Probe],
    routing: RoutingStats,
    role: Role,
    progress: bool,
) -> tuple[Evaluator, int]:
    """Step 3: stream validate and test documents, keep the needed columns."""
    columns = columns_needed(probes, {layer.layer: layer.n_experts for layer in layers})
    tokens = TokenTable()
    rows = RowStore(tokens, scopes, max_rows=None, columns=columns, seed=settings.seed)
    n = 0
    for split in (Split.VALIDATE, Split.TEST):
        loader = _batches(tokenized, split, settings)
        tag = f"{role.value} {split.value}"
        chosen = [layer.layer for layer in layers]
        n += stream(lens, loader, [tokens, rows, routing], layers=chosen, progress=progress, describe=tag)
    return Evaluator(rows, columns, [SPLITS[code] for code in tokenized.splits]), n


def _score(
    evaluator: Evaluator, probes: Sequence[Probe], tokenized: Tokenized, role: Role, progress: bool
) -> pd.DataFrame:
    """Step 4: one row per probe."""
    from tqdm.auto import tqdm

    by_cell: dict[tuple[int, int], list[Probe]] = {}
    for probe in probes:
        by_cell.setdefault((probe.layer, probe.expert), []).append(probe)
    pieces = chunks(by_cell, _PROBES_AT_ONCE)
    scored = in_threads(lambda piece: evaluator.score(*piece[0], piece[1]), pieces)
    bar = tqdm(scored, f"{role.value} score", len(pieces), unit="part", disable=None if progress else True)
    frame = pd.DataFrame([row for piece in bar for row in piece])
    concepts = tokenized.concepts
    which = frame.pop("concept").to_numpy()
    frame.insert(2, "concept", [concepts[i].name for i in which])
    frame.insert(3, "category", [concepts[i].category for i in which])
    frame.insert(4, "granularity", [str(concepts[i].granularity) for i in which])
    return _with_not_fitted(frame).sort_values(["concept", "k", "layer", "expert"], ignore_index=True, kind="stable")


def _with_not_fitted(frame: pd.DataFrame) -> pd.DataFrame:
    """Add rows for the larger k of cells that were fitted at k = 1 only; what hindered k = 1 hinders them as well."""
    first = frame[frame.k == 1]
    parts = [frame]
    for k in sorted(set(frame.k) - {1}):
        there = pd.MultiIndex.from_frame(frame.loc[frame.k == k, ["layer", "expert", "concept"]])
        rest = first[~pd.MultiIndex.from_frame(first[["layer", "expert", "concept"]]).isin(there)].copy()
        rest["k"] = k
        rest["status"] = rest.status.where(~rest.index.isin(usable(rest).index), Status.NOT_FITTED.value)
        rest[["auroc_select", *NUMBERS]] = np.nan
        for name in ("neurons", "sign"):
            rest[name] = [[] for _ in range(len(rest))]
        parts.append(rest)
    return pd.concat(parts, ignore_index=True)
