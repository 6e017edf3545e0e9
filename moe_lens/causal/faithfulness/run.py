"""Are these the experts that matter? ``faithfulness(lens, corpus, rankings=...)``.

1. Rank all routed experts on the select split: routing sums, one backward pass, leave-one-out, a user's CSV.
2. Cut each ranking at bins; draw sets with as many units in each layer, at random and of equal load.
3. On the test split ablate each set (comprehensiveness) and everything else (sufficiency), once each.
4. Scores, gaps to the controls and intervals over documents (`tables`); agreement with leave-one-out, stability,
   and routing alignment (`alignment`) beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from moe_lens.causal.effects import Effects
from moe_lens.causal.faithfulness import alignment, controls, sets
from moe_lens.causal.faithfulness import rankings as ranking_module
from moe_lens.causal.faithfulness.correlation import kendall, spearman
from moe_lens.causal.faithfulness.measure import FROM_REFERENCE, Measured, check_modes, edit_maker
from moe_lens.causal.faithfulness.result import Faithfulness
from moe_lens.causal.faithfulness.scores import BEAM_UNITS, EXACT_UNITS, limits, top_jaccard
from moe_lens.causal.faithfulness.tables import Case, Tabulator
from moe_lens.causal.faithfulness.visits import Visits, routed_units, visits
from moe_lens.corpus.batches import Batches, Tokenized, tokenize
from moe_lens.corpus.text import Corpus
from moe_lens.errors import BadConfig
from moe_lens.types import ExpertAddress, Split

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray

    from moe_lens.causal.faithfulness.rankings import Ranking
    from moe_lens.models.lens import Lens

DOCUMENT_TOKENS = 64
"""Tokens read of each document of a corpus: intervals are over documents, so many short ones tell more."""
RANKING_TEXT = 2
"""Tokens of the ranking text, in those of the evaluation text."""
BEAMS = (5, 10)
"""Widths of the two beams behind NAOPC limits that are not exact."""
RANKINGS = ("load", "gate_norm", "gradient", "random")
MODES = ("mean_off", "mask_refill_keep")
DEFAULT_BINS = sets.PRESETS["default"].shares


@dataclass(frozen=True)
class Settings:
    """What is scored and how, checked before any pass."""

    rankings: tuple[str, ...]
    modes: tuple[str, ...]
    bins: sets.Bins
    routing: Literal["live", "frozen"] = "live"
    universe: sets.Universe = "global"
    axis: sets.Axis = "count"
    n_random: int = 20
    n_matched: int = 5
    naopc: int = 0
    draws: int = 1000
    super_ratio: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("routing", ("live", "frozen")), ("universe", ("global", "per-layer")),
                            ("axis", ("count", "gate-mass"))):  # fmt: skip
            if getattr(self, name) not in known:
                raise BadConfig(f"{name}={getattr(self, name)!r}: use {' or '.join(known)}")
        for name in ("n_random", "n_matched", "naopc", "draws"):
            if getattr(self, name) < 0:
                raise BadConfig(f"{name}={getattr(self, name)}: give 0 or more")
        if self.naopc > BEAM_UNITS:
            raise BadConfig(f"naopc={self.naopc}: limits are found for at most {BEAM_UNITS} candidate experts")

    @property
    def n_scored(self) -> int:
        """Rankings that are scored; ``random`` is their control."""
        return len([name for name in self.rankings if name != ranking_module.RANDOM])

    @property
    def leaves_one_out(self) -> bool:
        return ranking_module.LEAVE_ONE_OUT in self.rankings

    @property
    def random_draws(self) -> int:
        return self.n_random if ranking_module.RANDOM in self.rankings else 0


def settings_of(
    rankings: str | Sequence[str], modes: str | Sequence[str], bins: str | sets.Bins | Sequence[float], **more: Any
) -> Settings:
    """Settings with their names checked.

    Raises:
        BadConfig: an unknown name, or a number that cannot be.
    """
    return Settings(ranking_module.check_names(rankings), check_modes(modes), sets.bins_of(bins), **more)


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
    max_tokens: int = 2048,
    n_random: int = 20,
    n_matched: int = 5,
    naopc: int = 0,
    draws: int = 1000,
    super_ratio: float = 10.0,
    splits: tuple[Split | str | None, Split | str | None] = (Split.SELECT, Split.TEST),
    include_first: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Faithfulness:
    """Score rankings of experts by ablating what they put first, and what they put last (METRICS 2).

    Args:
        corpus: a tokenised corpus, or one of which the first 64 tokens of each document are read.
        rankings: of load, gate_mass, gate_norm (sum of g ||f||), reap (its mean), ean, max_activation, esft_gate,
            esft_token, gradient (`screen`), leave_one_out (by zero), paths of CSV files with layer, expert, score,
            and random, which is the control of the others.
        modes: of `measure.SET_MODES`. Which one is chosen can change the sign of an effect.
        universe: a bin is a share of all experts, or of each layer's.
        axis: a bin is a share of their number, or of their gate mass.
        bins: shares, a preset (default, eraser, seed, mib) or `sets.Bins`, which also sets rounding and zero bin.
        max_tokens: of the evaluation text; rankings read twice as many.
        n_random: random control sets for each set, with as many units in each layer.
        n_matched: control sets in which each unit is replaced by one of equal load and gate mass.
        naopc: candidate experts, drawn by lot, for which the limits of AOPC are found; exact up to 8, else a beam.
        draws: bootstrap samples of documents.
        super_ratio: see `Visits.super_experts`; where some are found everything is scored without them as well.
        splits: documents to rank on and documents to score on; None means all.
        include_first: count predictions made at the first token of a window, where attention sinks live.

    Raises:
        NotAnMoE: a model without routed experts.
        BadConfig: unknown names, bins that are none, or what `Effects` refuses.
        BadCorpus: a split without documents, or one document to score on.
        OutOfRange: a CSV that names an expert the model does not have.

    Ablating many experts at once takes the model far from anything it has seen: read the bins, not the mean alone,
    and compare models by NAOPC only.
    """
    settings = settings_of(
        rankings, modes, bins, routing=routing, universe=universe, axis=axis, n_random=n_random,
        n_matched=n_matched, naopc=naopc, draws=draws, super_ratio=super_ratio, seed=seed,
    )  # fmt: skip
    routed_units(lens)
    if max_tokens < 1:
        raise BadConfig(f"max_tokens={max_tokens}: give a positive number of tokens")
    if isinstance(corpus, Corpus):
        limit = 8 * max_tokens  # a quarter of it is the test split
        corpus = tokenize(corpus, lens.tokenizer, [], document_tokens=DOCUMENT_TOKENS, limit_tokens=limit, seed=seed)
    texts = [(splits[0], RANKING_TEXT * max_tokens, False), (splits[1], max_tokens, include_first)]
    on_select, on_test = (
        Effects(lens, corpus, split=split, max_tokens=n, include_first=first, seed=seed, progress=progress)
        for split, n, first in texts
    )
    return _scored(settings, on_select, on_test, ["first tokens predict as well"] if include_first else [])


def _scored(settings: Settings, on_select: Effects, on_test: Effects, notes: Sequence[str]) -> Faithfulness:
    seed, modes = settings.seed, settings.modes
    v = visits(on_select)
    ranked = ranking_module.rank(settings.rankings, on_select, v)
    rankings = list(ranked.values())
    supers = v.super_experts(ratio=settings.super_ratio)
    cases = _cases(settings, rankings, v, supers)
    measured = _measured(on_select, on_test, v, settings)
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
    return Faithfulness(
        frame=tables.frame(modes, cases, constant),
        gaps=tables.gaps(modes, cases),
        draws=tables.draws(modes, cases),
        circuit=tables.circuit(modes, cases, ends=settings.bins != sets.PRESETS["mib"]),
        naopc=_naopc(settings, measured, rankings),
        agreement=_agreement(ranked),
        stability=ranking_module.stability(rankings, seed=seed),
        alignment=alignment.routing_alignment(list(importance.values()), v, seed=seed),
        routing_spread=alignment.routing_spread(v),
        churn=_churn(measured, settings, cases),
        units=_unit_frame(ranked, v, supers),
        bins=settings.bins,
        noise=on_test.noise_floor(),
        n_documents=len(measured.documents),
        n_tokens=int(measured.n_tokens.sum()),
        n_passes=measured.n_passes,
        reference=measured.reference,
        notes=(*notes, *_notes(settings, measured, v)),
    )


def _cases(settings: Settings, rankings: Sequence[Ranking], v: Visits, supers: Sequence[ExpertAddress]) -> list[Case]:
    everyone = np.ones(len(v.units), bool)
    universes = {"included": everyone}
    if supers:
        universes["excluded"] = ~np.isin(np.arange(len(v.units)), [v.units.index(unit) for unit in supers])
    return [_case(settings, r, v, name, member) for name, member in universes.items() for r in rankings]


def _case(settings: Settings, ranking: Ranking, v: Visits, name: str, member: ndarray) -> Case:
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


def _measured(on_select: Effects, on_test: Effects, v: Visits, settings: Settings) -> Measured:
    reference = None
    if set(settings.modes) & set(FROM_REFERENCE):
        windows = [part.token[:, 0].numpy() for part in on_select.parts]
        text = on_select.text.tokenized
        batches = Batches(text, tuple(text.window_of[first] for first in windows))
        sampled = v.units if "resample" in settings.modes else [v.units[i] for i in np.unique(v.layer, True)[1]]
        reference = on_select.lens.reference(batches, experts=sampled, seed=settings.seed)
    makers = {mode: edit_maker(mode, v.units, v.layer, reference=reference, effects=on_test) for mode in settings.modes}
    digest = reference.digest[:16] if reference else ""
    return Measured(on_test, v.units, makers, routing=settings.routing, reference=digest)


def _agreement(ranked: dict[str, Ranking]) -> pd.DataFrame:
    """Agreement of each ranking with leave-one-out; empty without it."""
    columns = ["ranking", "kendall", "spearman", "top_jaccard", "n_top"]
    if ranking_module.LEAVE_ONE_OUT not in ranked:
        return pd.DataFrame(columns=columns)
    exact = ranked[ranking_module.LEAVE_ONE_OUT].score
    n_top = max(1, round(0.1 * len(exact)))
    rows = []
    for name, ranking in ranked.items():
        if name != ranking_module.LEAVE_ONE_OUT:
            score = ranking.score
            score = np.nan_to_num(score, nan=np.nanmin(score) - 1)
            shared = top_jaccard(sets.ranked(score)[:n_top], sets.ranked(exact)[:n_top])
            rows.append((name, float(kendall(score, exact)), float(spearman(score, exact)), shared, n_top))
    return pd.DataFrame(rows, columns=columns)


def _churn(measured: Measured, settings: Settings, cases: Sequence[Case]) -> pd.DataFrame:
    """Churn of the top-k when the largest bin is ablated, by layer; empty under frozen routing."""
    rows = []
    for mode in settings.modes if settings.routing == "live" else ():
        for case in (case for case in cases if case.super_experts == "included"):
            removed = case.chosen[-1]
            if not removed.any():
                continue
            for layer, share in alignment.churn(measured.effects, measured.makers[mode](removed)).items():
                lost = float(removed[measured.layer == layer].mean())
                rows.append((case.ranking, mode, settings.bins.shares[-1], layer, share, lost))
    return pd.DataFrame(rows, columns=["ranking", "mode", "bin", "layer", "churn", "share_ablated"])


def _naopc(settings: Settings, measured: Measured, rankings: Sequence[Ranking]) -> pd.DataFrame:
    """AOPC in KL over candidates drawn by lot, between the lowest and highest of any order; empty unless asked for."""
    columns = ["ranking", "mode", "score", "n_candidates", "width", "aopc", "low", "high", "naopc"]
    n_units = len(measured.units)
    n = min(settings.naopc, n_units)
    if not n:
        return pd.DataFrame(columns=columns)
    candidates = np.sort(np.random.default_rng([settings.seed, 41]).permutation(n_units)[:n]).tolist()
    is_exact = n <= EXACT_UNITS
    rows: list[tuple[Any, ...]] = []
    for mode in settings.modes:
        if is_exact:
            subsets = [s for size in range(n + 1) for s in combinations(candidates, size)]
            measured.run((mode, np.isin(np.arange(n_units), subset)) for subset in subsets)

        def without(members: frozenset[int], mode: str = mode) -> float:
            effect = measured.of(mode, np.isin(np.arange(n_units), list(members)))
            return float(effect.kl.sum() / measured.n_tokens.sum())

        def only(members: frozenset[int], mode: str = mode) -> float:
            return without(frozenset(candidates) - members, mode)

        for score, value in (("comprehensiveness_kl", without), ("sufficiency_kl", only)):
            found = [limits(value, candidates, width=width) for width in ((None,) if is_exact else BEAMS)]
            for ranking in rankings:
                order = [candidates[i] for i in sets.ranked(ranking.score[candidates])]
                area = float(np.mean([value(frozenset(order[:k])) for k in range(1, n + 1)]))
                for limit in found:
                    width = pd.NA if limit.width is None else limit.width
                    rows.append((ranking.name, mode, score, n, width, area, limit.low, limit.high,
                                 limit.normalised(area)))  # fmt: skip
    return pd.DataFrame(rows, columns=columns).astype({"width": "Int64"})


def _unit_frame(ranked: dict[str, Ranking], v: Visits, supers: Sequence[ExpertAddress]) -> pd.DataFrame:
    scores: dict[str, Float[ndarray, "unit"]] = {f"score_{name}": ranking.score for name, ranking in ranked.items()}
    return pd.DataFrame({
        "layer": v.layer, "expert": [unit.expert for unit in v.units], "load": v.load.sum(0).astype(np.int64),
        "gate_mass": v.mass.sum(0), "max_output": v.peak.max(0), "is_super": [unit in supers for unit in v.units],
        **scores,
    })  # fmt: skip


def _notes(settings: Settings, measured: Measured, v: Visits) -> tuple[str, ...]:
    notes = list(measured.effects.notes)
    if 0 < settings.random_draws < 19:
        least = 1 / (settings.random_draws + 1)
        notes.append(f"with {settings.random_draws} random sets p cannot fall below {least:.2f}: draw 20")
    if idle := int((v.load.sum(0) == 0).sum()):
        notes.append(f"{idle} of {len(v.units)} experts are never visited by the ranking text: bins that hold them "
                     "remove little")  # fmt: skip
    if len(measured.documents) < 30:
        notes.append(f"{len(measured.documents)} documents are few: intervals are too narrow below 30")
    return tuple(notes)
