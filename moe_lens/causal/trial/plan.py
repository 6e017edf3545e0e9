"""``plan_trial(...)``: what a trial would take, and which labels the text is too short for.

The clean model is run, rules are read and one expert is measured; nothing else is.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from moe_lens.causal.effects import Effects
from moe_lens.causal.trial import run as trial
from moe_lens.causal.trial.claims import claims_of, read_claims
from moe_lens.causal.trial.hearing import POSITIONS
from moe_lens.causal.trial.judge import marked
from moe_lens.causal.trial.measured import _Edits, measure
from moe_lens.causal.trial.nulls import OF_ROUTING
from moe_lens.causal.trial.verdict import DELTA, MIN_DOCUMENTS, MIN_VISITS, VERDICT_MODES
from moe_lens.corpus.batches import Tokenized
from moe_lens.errors import BadCorpus
from moe_lens.stats import detectable_effect
from moe_lens.types import ExpertAddress

if TYPE_CHECKING:
    from jaxtyping import Bool, Int
    from numpy import ndarray

    from moe_lens.causal.trial.claims import Claim
    from moe_lens.causal.trial.measured import Measured, Positions
    from moe_lens.corpus.text import Corpus
    from moe_lens.models.lens import Lens


@dataclass(frozen=True)
class LabelOutlook:
    """What the text can show about one label."""

    address: str
    label: str
    n_documents: int | None
    """With a token that the label marks and the expert is visited by; None if a language model judges."""
    visits: int
    lacks: str
    """What it would be underpowered by, empty if nothing."""
    detectable: float | None
    """Smallest need that is found with 80 % power, nats; None without documents or their spread."""


@dataclass(frozen=True)
class TrialPlan:
    """What a trial would take."""

    model: str
    n_labels: int
    n_given: int
    n_documents: int
    n_predictions: int
    n_passes: int
    seconds_per_pass: float
    seconds_clean: float
    """Of the clean passes, which come once."""
    timed: str
    """Expert whose pass was timed, and whose spread between documents `detectable` assumes for all."""
    delta: float
    labels: tuple[LabelOutlook, ...]
    asked: tuple[int, ...]
    """Tokens that a language model would be asked about, for each claim; the real labels come first."""

    @property
    def minutes(self) -> float:
        """Of all passes; statistics, false labels and language models not counted."""
        return (self.seconds_clean + self.n_passes * self.seconds_per_pass) / 60

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"minutes": self.minutes}


def plan_trial(
    lens: Lens,
    text: Corpus | Tokenized,
    labels: pd.DataFrame,
    *,
    is_asked: bool = False,
    n_tables: int = 0,
    experts: Sequence[str | ExpertAddress] | None = None,
    n_labels: int | None = None,
    modes: Sequence[str] = VERDICT_MODES,
    null_labels: Sequence[str] = (),
    controls: Literal["trial", "layer"] = "trial",
    positions: Positions = "all",
    horizon: int = 1,
    max_tokens: int | None = trial.MAX_TOKENS,
    judge_positions: int = POSITIONS,
    seed: int = 0,
    progress: bool = True,
) -> TrialPlan:
    """Passes, minutes, labels that would be underpowered, and smallest needs, for `run.validate` of the same arguments.

    Args:
        is_asked: a language model would judge, so where labels hold is not known beforehand.
        n_tables: tables of false labels that would be tried too.

    Raises:
        BadConfig, BadConcept, BadCorpus, OutOfRange, UnknownConcept: as `run.validate`.

    Minutes are those of one expert's passes times their number: experts of later layers are faster, those with more
    visits slower.
    """
    chosen = read_claims(lens, labels, experts=experts)
    n_given = len(chosen)
    tokenized = text if isinstance(text, Tokenized) else trial._tokenized(lens, text, max_tokens, seed)
    started = time.perf_counter()
    effects = Effects(lens, tokenized, max_tokens=max_tokens, progress=progress, seed=seed)
    seconds_clean = time.perf_counter() - started
    used = trial._reaches(effects, horizon)
    if not used.any():
        raise BadCorpus(f"no document under test has {horizon} tokens to predict: give longer ones, or horizon=1")
    claims = claims_of(trial._sampled(effects, chosen, n_labels, seed), tokenized)
    on_trial = sorted({claim.expert for claim in claims})
    load, mass = trial._loads(effects, sorted({expert.layer for expert in on_trial}))
    alone = trial._controls(on_trial, load, mass) if controls == "layer" else []
    timed = on_trial[len(on_trial) // 2]
    started = time.perf_counter()
    measured = measure(effects, [timed], ["zero"], positions=positions, horizon=horizon, seed=seed, progress=False)[
        timed, "zero"
    ]
    seconds = time.perf_counter() - started
    passes = _Edits(effects, (), None, seed)
    asked = [_asked(effects, claim, used, judge_positions) for claim in claims] if is_asked else []
    n_kinds = 1 + sum(kind not in OF_ROUTING for kind in null_labels) + n_tables
    return TrialPlan(
        model=lens.spec.name, n_labels=len(claims), n_given=n_given,
        n_documents=len(np.unique(effects.text.document)), n_predictions=len(effects.text.token),
        n_passes=sum(passes.n_passes(e, mode, e in alone) for e in [*on_trial, *alone] for mode in modes),
        seconds_per_pass=seconds / passes.n_passes(timed, "zero", False),
        seconds_clean=seconds_clean, timed=str(timed), delta=max(DELTA, effects.noise_floor().nll),
        labels=tuple(_outlooks(claims, effects, used, _spread(measured, effects), is_asked)),
        asked=tuple(asked * n_kinds),
    )  # fmt: skip


def _spread(measured: Measured, effects: Effects) -> float:
    """Standard deviation over documents of the mean effect beyond the expert beside it, nats."""
    effect = measured.effect.astype(np.float64)
    if measured.beside is not None:
        effect = effect - measured.beside.effect
    _, document = np.unique(effects.text.document[measured.at], return_inverse=True)
    n = np.bincount(document)
    means = np.bincount(document, effect) / n if len(n) else n
    return float(np.std(means, ddof=1)) if len(means) > 1 else np.nan


def _outlooks(
    claims: Sequence[Claim], effects: Effects, used: Bool[ndarray, "prediction"], spread: float, is_asked: bool
) -> list[LabelOutlook]:
    text = effects.text
    marks = [None] * len(claims) if is_asked else marked(claims, text.tokenized, documents=np.unique(text.document))
    out = []
    for claim, mark in zip(claims, marks, strict=True):
        visited = effects.visits(claim.expert) & used
        z = None if mark is None else mark[text.token]
        visits, of_visits = int(visited.sum()), _count(text.document, visited)
        of_label = None if z is None else _count(text.document, z & used)
        both = None if z is None else _count(text.document, z & visited)
        lacks = [f"{of_label} documents with the label"] if of_label is not None and of_label < MIN_DOCUMENTS else []
        lacks += [f"{of_visits} documents with a visit"] if of_visits < MIN_DOCUMENTS else []
        lacks += [f"{visits} visits"] if visits < MIN_VISITS else []
        lacks += ["no rule or concept"] if z is None and not is_asked else []
        reach = float(detectable_effect(both, sides=1)) * spread if both else np.nan
        found = reach if reach > 0 else None  # NaN too
        out.append(LabelOutlook(claim.owner, claim.label, both, visits, ", ".join(lacks), found))
    return out


def _count(document: Int[ndarray, "prediction"], at: Bool[ndarray, "prediction"]) -> int:
    return len(np.unique(document[at]))


def _asked(effects: Effects, claim: Claim, used: Bool[ndarray, "prediction"], positions: int) -> int:
    """Tokens that a judge is asked about: visits, and as many others."""
    visited = effects.visits(claim.expert)
    return min(positions, int((used & visited).sum())) + min(positions, int((used & ~visited).sum()))
