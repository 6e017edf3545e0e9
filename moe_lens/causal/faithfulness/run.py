"""Are these the experts that matter? ``faithfulness(lens, corpus, rankings=...)``.

1. Rank all routed experts on the select split: routing sums, one backward pass, leave-one-out, a user's CSV.
2. Cut each ranking at bins; draw sets with as many units in each layer, at random and of equal load.
3. On the test split ablate each set (comprehensiveness) and everything else (sufficiency), once each.
4. Scores, gaps to the controls and intervals over documents (`tables`); agreement with leave-one-out, stability,
   and routing alignment (`alignment`) beside them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moe_lens.capture.run import create_run, digest, identity_of
from moe_lens.causal.effects import Effects
from moe_lens.causal.faithfulness import alignment, beside, controls, directory, sets
from moe_lens.causal.faithfulness import rankings as ranking_module
from moe_lens.causal.faithfulness.kept import KeptSets
from moe_lens.causal.faithfulness.measure import FROM_REFERENCE, Measured, edit_maker
from moe_lens.causal.faithfulness.result import Faithfulness
from moe_lens.causal.faithfulness.settings import (
    DEFAULT_BINS,
    DOCUMENT_TOKENS,
    MODES,
    RANKING_TEXT,
    RANKINGS,
    Settings,
    Texts,
    chosen_units,
    effect_request,
    request_of,
    settings_of,
)
from moe_lens.causal.faithfulness.tables import Case, Tabulator
from moe_lens.causal.faithfulness.visits import Visits, routed_units, visits
from moe_lens.corpus.batches import Batches, Tokenized, tokenize
from moe_lens.corpus.text import Corpus
from moe_lens.types import ExpertAddress, Split

if TYPE_CHECKING:
    from jaxtyping import Bool
    from numpy import ndarray

    from moe_lens.causal.faithfulness.rankings import Ranking
    from moe_lens.models.lens import Lens


def faithfulness(
    lens: Lens,
    corpus: Corpus | Tokenized,
    *,
    rankings: str | Sequence[str] = RANKINGS,
    modes: str | Sequence[str] = MODES,
    routing: Literal["live", "frozen"] = "live",
    universe: sets.Universe = "global",
    axis: sets.Axis = "count",
    bins: str | sets.Bins | Sequence[float] = DEFAULT_BINS,
    layers: Sequence[int] | None = None,
    experts: Sequence[str | ExpertAddress] | None = None,
    max_tokens: int = 2048,
    n_random: int = 20,
    n_matched: int = 5,
    naopc: int = 0,
    draws: int = 1000,
    super_ratio: float = 10.0,
    splits: tuple[Split | str | None, Split | str | None] = (Split.SELECT, Split.TEST),
    include_first: bool = False,
    document_tokens: int = DOCUMENT_TOKENS,
    max_length: int = 256,
    batch_tokens: int | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
) -> Faithfulness:
    """Score rankings of experts by ablating what they put first, and what they put last (METRICS 2).

    Args:
        corpus: a tokenised corpus, or one of which the first `document_tokens` tokens of each document are read.
        rankings: of load, gate_mass, gate_norm (sum of g ||f||), reap (its mean), ean, max_activation, esft_gate,
            esft_token, gradient (`screen`), leave_one_out (by zero), paths of CSV files with layer, expert, score,
            and random, which is the control of the others.
        modes: of `measure.SET_MODES`. Which one is chosen can change the sign of an effect.
        universe: a bin is a share of all experts, or of each layer's.
        axis: a bin is a share of their number, or of their gate mass.
        bins: shares, a preset (default, eraser, seed, mib) or `sets.Bins`, which also sets rounding and zero bin.
        layers, experts: the experts that are ranked and ablated, all by default; the others always stay.
        max_tokens: of the evaluation text; rankings read twice as many.
        n_random: random control sets for each set, with as many units in each layer.
        n_matched: control sets in which each unit is replaced by one of equal load and gate mass.
        naopc: candidate experts, drawn by lot, for which the limits of AOPC are found; exact up to 8, else a beam.
        draws: bootstrap samples of documents.
        super_ratio: see `Visits.super_experts`; where some are found everything is scored without them as well.
        splits: documents to rank on and documents to score on; None means all.
        include_first: count predictions made at the first token of a window, where attention sinks live.
        max_length: tokens per window.
        batch_tokens: see `Effects`.
        out: run directory. A killed run in it measures no set twice; a finished one of equal settings is read back.
        resume: False starts anew.

    Raises:
        NotAnMoE: a model without routed experts.
        BadConfig: unknown names, bins that are none, or what `Effects` refuses.
        BadCorpus: a split without documents, or one document to score on.
        OutOfRange: a layer or an expert that the model does not have.
        BadOutput: `out` holds another run.

    Ablating many experts at once takes the model far from anything it has seen: read the bins, not the mean alone,
    and compare models by NAOPC only.
    """
    started = time.perf_counter()
    settings = settings_of(
        rankings, modes, bins, routing=routing, universe=universe, axis=axis, n_random=n_random,
        n_matched=n_matched, naopc=naopc, draws=draws, super_ratio=super_ratio, seed=seed,
    )  # fmt: skip
    texts = Texts(max_tokens, splits, include_first, batch_tokens)
    units = routed_units(lens)
    member = chosen_units(lens, units, layers, experts)
    ranking_module.check_files(settings.rankings, units)
    if isinstance(corpus, Corpus):
        corpus = tokenized_for(
            corpus, lens.tokenizer, texts, document_tokens=document_tokens, max_length=max_length, seed=seed
        )
    texts.check(corpus, seed=seed)
    request = request_of(settings, texts, corpus, units, member)
    run = None if out is None else create_run(out, identity_of(lens, corpus.corpus, seed=seed))
    if run is not None:
        if not resume:
            directory.drop(run)
        elif (found := directory.finished(run, request)) is not None:
            return found
    on_select, on_test = (
        Effects(lens, corpus, **which, batch_tokens=batch_tokens, seed=seed, progress=progress)
        for which in (texts.to_rank(), texts.to_score())
    )
    folder = None if run is None else run.partial(directory.COMMAND)
    result = _scored(settings, request, on_select, on_test, member, folder)
    if run is not None:
        result = directory.write(run, result, request, seconds=time.perf_counter() - started)
    return result


def tokenized_for(
    corpus: Corpus, tokenizer: Any, texts: Texts, *, document_tokens: int, max_length: int, seed: int
) -> Tokenized:
    """As much of a corpus as ranking and scoring need: a quarter of it is the test split."""
    limit = 4 * RANKING_TEXT * texts.max_tokens
    return tokenize(
        corpus, tokenizer, [], max_length=max_length, document_tokens=document_tokens, limit_tokens=limit, seed=seed
    )


def _scored(
    settings: Settings, request: dict[str, Any], on_select: Effects, on_test: Effects, member: Bool[ndarray, "unit"],
    folder: Path | None,
) -> Faithfulness:  # fmt: skip
    seed, modes = settings.seed, settings.modes
    v = visits(on_select)
    loo = _kept(folder, request, ranking_module.LEAVE_ONE_OUT)
    ranked = ranking_module.rank(settings.rankings, on_select, v, member=member, kept=loo)
    rankings = list(ranked.values())
    supers = v.super_experts(ratio=settings.super_ratio)
    cases = _cases(settings, rankings, v, supers, member)
    measured = _measured(on_select, on_test, v, settings, request, folder)
    measured.run((mode, removed) for mode in modes for case in cases for removed in case.removed())
    tables = Tabulator(measured, settings.bins, draws=settings.draws, seed=seed)
    constant = {
        "routing": settings.routing, "universe": settings.universe, "axis": settings.axis,
        "rounding": settings.bins.rounding, "include_zero": settings.bins.include_zero,
        "aggregate": settings.bins.aggregate,
    }  # fmt: skip
    importance = {r.name: r for r in rankings if r.name not in ranking_module.FROM_VISITS}
    if ranking_module.GRADIENT not in importance:  # alignment needs an importance that is no routing number
        importance |= ranking_module.rank([ranking_module.GRADIENT], on_select, v)
    limits = beside.naopc(settings, measured, rankings, member)
    return Faithfulness(
        frame=beside.with_naopc(tables.frame(modes, cases, constant), limits, constant),
        gaps=tables.gaps(modes, cases),
        draws=tables.draws(modes, cases),
        circuit=tables.circuit(modes, cases, ends=settings.bins != sets.PRESETS["mib"]),
        naopc=limits,
        agreement=beside.agreement(ranked, member),
        stability=ranking_module.stability(rankings, seed=seed),
        alignment=alignment.routing_alignment(list(importance.values()), v, member=member, seed=seed),
        routing_spread=alignment.routing_spread(v),
        churn=beside.churn(measured, settings, cases),
        units=beside.unit_frame(ranked, v, supers, member),
        bins=settings.bins,
        noise=on_test.noise_floor(),
        recall=beside.recall(ranked, on_select, v, member, loo, seed=seed),
        n_documents=len(measured.documents),
        n_tokens=int(measured.n_tokens.sum()),
        n_passes=measured.n_passes,
        reference=measured.reference,
        notes=(*_read_with(request), *beside.notes(settings, measured, v)),
    )


def _read_with(request: dict[str, Any]) -> list[str]:
    return ["first tokens predict as well"] if request["text"]["include_first"] else []


def _cases(
    settings: Settings, rankings: Sequence[Ranking], v: Visits, supers: Sequence[ExpertAddress],
    member: Bool[ndarray, "unit"],
) -> list[Case]:  # fmt: skip
    universes = {"included": member}
    without = member & ~np.isin(np.arange(len(v.units)), [v.units.index(unit) for unit in supers])
    if without.any() and (without != member).any():
        universes["excluded"] = without
    return [_case(settings, r, v, name, members) for name, members in universes.items() for r in rankings]


def _case(settings: Settings, ranking: Ranking, v: Visits, name: str, member: Bool[ndarray, "unit"]) -> Case:
    load, mass = v.load.sum(0), v.mass.sum(0)
    counted = mass if settings.axis == "gate-mass" else None
    chosen = np.stack([
        sets.top(ranking.score, share, settings.bins, layer=v.layer, member=member, mass=counted,
                 universe=settings.universe)
        for share in settings.bins.shares
    ])  # fmt: skip
    found: dict[str, ndarray] = {}
    if settings.random_draws:
        place = controls.random_orders(v.layer, settings.random_draws, seed=settings.seed)
        drawn = [controls.random_like(one, place, layer=v.layer, member=member) for one in chosen]
        found["random"] = np.stack(drawn, axis=1)
    within = np.full(len(chosen), np.nan)
    if settings.n_matched:
        pairs = [
            controls.matched_like(one, settings.n_matched, layer=v.layer, member=member, load=load, mass=mass,
                                  seed=settings.seed)
            for one in chosen
        ]  # fmt: skip
        found["load-matched"] = np.stack([drawn for drawn, _ in pairs], axis=1)
        within = np.array([share for _, share in pairs])
    return Case(ranking.name, name, member, chosen, found, within)


def _measured(
    on_select: Effects, on_test: Effects, v: Visits, settings: Settings, request: dict[str, Any], folder: Path | None
) -> Measured:
    reference = None
    if set(settings.modes) & set(FROM_REFERENCE):
        windows = [part.token[:, 0].numpy() for part in on_select.parts]
        text = on_select.text.tokenized
        batches = Batches(text, tuple(text.window_of[first] for first in windows))
        sampled = v.units if "resample" in settings.modes else [v.units[i] for i in np.unique(v.layer, True)[1]]
        reference = on_select.lens.reference(batches, experts=sampled, seed=settings.seed)
    makers = {mode: edit_maker(mode, v.units, v.layer, reference=reference, effects=on_test) for mode in settings.modes}
    named = reference.digest[:16] if reference else ""
    kept = _kept(folder, request, named)
    return Measured(on_test, v.units, makers, routing=settings.routing, reference=named, kept=kept)


def _kept(folder: Path | None, request: dict[str, Any], reference: str) -> KeptSets | None:
    """Where effects of sets with these settings are kept while the run is unfinished."""
    return None if folder is None else KeptSets(folder / digest(effect_request(request, reference)))
