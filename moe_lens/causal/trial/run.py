"""``validate(lens, corpus, labels)``: put labels on trial (METRICS 3).

1. Check the labels; choose documents of the split ``test`` and run the clean model on them.
2. What the judge says there; false labels beside the real ones.
3. Take every expert away at its visits, under ``zero`` and ``mean_off``, and a random expert that was chosen beside
   it. One pass each; all labels of an expert, true and false, read the same passes.
4. One row per label and mode, one verdict per label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from moe_lens.causal.effects import Effects
from moe_lens.causal.trial.claims import REAL, Case, claims_of, read_claims
from moe_lens.causal.trial.hearing import POSITIONS, heard
from moe_lens.causal.trial.judge import check_marks
from moe_lens.causal.trial.kept import Kept
from moe_lens.causal.trial.matching import load_matched, stratified_sample
from moe_lens.causal.trial.measured import LATER, MODES, Positions, measure
from moe_lens.causal.trial.nulls import NULL_LABELS, OF_ROUTING, borrowed, check_kinds, from_routing
from moe_lens.causal.trial.result import Trial
from moe_lens.causal.trial.table import Court, validation_table
from moe_lens.causal.trial.verdict import DELTA, VERDICT_MODES
from moe_lens.corpus.batches import Tokenized, tokenize
from moe_lens.corpus.splits import assign_splits, code_of
from moe_lens.errors import BadConfig, BadCorpus, nearest
from moe_lens.stats import document_multiplicities
from moe_lens.types import ExpertAddress, Split

if TYPE_CHECKING:
    from jaxtyping import Bool, Int
    from numpy import ndarray

    from moe_lens.causal.trial.judge import Judge
    from moe_lens.corpus.text import Corpus
    from moe_lens.models.lens import Lens

MAX_TOKENS = 16_384


def validate(
    lens: Lens,
    corpus: Corpus | Tokenized,
    labels: pd.DataFrame,
    *,
    judge: Judge | None = None,
    second_judge: Judge | None = None,
    judge_positions: int = POSITIONS,
    null_labels: Sequence[str] = NULL_LABELS,
    null_tables: Mapping[str, pd.DataFrame] | None = None,
    modes: Sequence[str] = VERDICT_MODES,
    experts: Sequence[str | ExpertAddress] | None = None,
    n_labels: int | None = None,
    max_tokens: int | None = MAX_TOKENS,
    draws: int = 2000,
    controls: Literal["trial", "layer"] = "trial",
    positions: Positions = "all",
    horizon: int = 1,
    store: Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Trial:
    """Whether labels say where their experts are visited, and whether the experts are needed there.

    Args:
        corpus: of a `Tokenized`, documents of the split ``test`` are used, whole and in a random order up to
            `max_tokens`. A `Corpus` is tokenised so that as many documents as possible have a part in these: only
            the first tokens of each are read.
        labels: columns ``layer, expert, label``, what judges them, ``rule`` (a regular expression) or ``concept``
            (a name or a `Concept`, which goes before the rule), and if there are any ``facet`` and ``status`` (rows
            other than ``ok`` have no label to try). A label that nothing judges counts, as underpowered.
        judge: asked about every label instead of rules and concepts, at a sample of tokens; the false labels that
            are made from routing keep their rules.
        second_judge: asked about a tenth of these tokens again; its agreement with the first is ``kappa_judge``.
            Without it that is the agreement of `judge` with the rule or concept of a label that has one.
        judge_positions: visits that a judge is asked about for each label, and as many other tokens.
        null_labels: kinds of false labels to try beside the real ones, see `moe_lens.causal.trial.nulls`.
        null_tables: further false labels by kind, as tables like `labels` (``{"shuffled": table}``); those of experts
            with a label on trial are tried.
        modes: ``zero`` and ``mean_off``, which give the verdict, and others for columns beside them: ``mean``,
            ``resample`` (8 passes), ``mask_refill_keep``.
        experts: try only the labels of these.
        n_labels: try a random sample that holds experts of all loads; None means all labels.
        draws: bootstrap samples of documents.
        controls: where load-matched controls of the column ``specificity`` come from: experts on trial, or all of
            the layer, which takes more passes.
        positions: ``focal`` edits every visit on its own; slow, to check ``all`` against.
        horizon: predictions over which an effect is averaged, from the token itself on.
        store: folder in which the passes of every expert are kept as they finish, and read back (`Kept`).

    Raises:
        BadConfig: two rows for one label, an empty label, unknown modes or kinds, a judge that marks nothing or
            everything or abstains on everything, or what `Effects` refuses.
        BadConcept, UnknownConcept: a rule that does not compile, a concept that is none.
        OutOfRange: an expert that the model does not have.
        BadCorpus: no document under test with a token to predict, or none as long as the horizon.
        WriteFailed: `store` cannot be written.

    A verdict is about this text, this model and ablation at all visits at once. It does not show that the words of a
    label are the best ones: false labels in the same table say how much a label of that kind gets for nothing.
    """
    tables = dict(null_tables or {})
    _check_settings(modes, horizon, draws, judge_positions)
    check_kinds(null_labels, tables)
    chosen = read_claims(lens, labels, experts=experts)
    false = {kind: read_claims(lens, table, kind=kind) for kind, table in tables.items()}
    n_given = len(chosen)
    text = corpus if isinstance(corpus, Tokenized) else _tokenized(lens, corpus, max_tokens, seed)
    effects = Effects(lens, text, max_tokens=max_tokens, progress=progress, seed=seed)
    used = _reaches(effects, horizon)
    if not used.any():
        raise BadCorpus(f"no document under test has {horizon} tokens to predict: give longer ones, or horizon=1")
    chosen = _sampled(effects, chosen, n_labels, seed)
    load, mass = _loads(effects, sorted(set(chosen["layer"])))
    bench = _Bench(effects, used, judge, second_judge, judge_positions, seed)
    cases = bench.cases(chosen, null_labels, false, load, _seen(lens, text, null_labels, max_tokens, seed))
    how = _How(tuple(modes), controls, positions, horizon, draws, store, seed, progress)
    court = _court(effects, sorted({case.expert for case in cases}), load, mass, how)
    constants = {"routing": "live", "split": str(Split.TEST), "horizon": horizon, "positions": positions}
    settings = _settings(effects, court, how, len(chosen), n_given) | bench.settings
    return Trial(validation_table(cases, court, constants), settings)


@dataclass(frozen=True, eq=False)
class _Bench:
    """Who judges, and how."""

    effects: Effects
    used: Bool[ndarray, "prediction"]
    judge: Judge | None
    second_judge: Judge | None
    positions: int
    seed: int

    def cases(
        self,
        chosen: pd.DataFrame,
        kinds: Sequence[str],
        tables: Mapping[str, pd.DataFrame],
        load: Mapping[int, Any],
        seen: Effects | None,
    ) -> list[Case]:
        """The labels on trial and the false ones of their experts, judged."""
        text = self.effects.text.tokenized
        real = claims_of(chosen, text)
        experts = {claim.expert for claim in real}
        judged = real if self.judge is not None else [c for c in real if c.judged_by != "none"]
        claims = [*real, *borrowed(judged, kinds, lambda e: float(load[e.layer][e.expert]), seed=self.seed)]
        for kind, table in tables.items():
            claims += [claim for claim in claims_of(table, text, kind=kind) if claim.expert in experts]
        cases = heard(
            claims, self.effects, used=self.used, judge=self.judge, second_judge=self.second_judge,
            positions=self.positions, seed=self.seed,
        )  # fmt: skip
        check_marks(cases[: len(real)], self.judge)
        made = from_routing(kinds, sorted(experts), self.effects, seen)
        order = {kind: number for number, kind in enumerate((REAL, *kinds, *tables))}
        return sorted([*cases, *made], key=lambda case: order[case.kind])

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "judge": getattr(self.judge, "name", None), "second_judge": getattr(self.second_judge, "name", None),
            "judge_positions": self.positions if self.judge or self.second_judge else None,
        }  # fmt: skip


@dataclass(frozen=True)
class _How:
    """Settings of `validate` that say how effects are measured."""

    modes: tuple[str, ...]
    controls: Literal["trial", "layer"]
    positions: Positions
    horizon: int
    draws: int
    store: Path | None
    seed: int
    progress: bool


def _court(
    effects: Effects, experts: Sequence[ExpertAddress], load: dict[int, Any], mass: dict[int, Any], how: _How
) -> Court:
    """Run the passes."""
    same: dict[str, Any] = {"positions": how.positions, "horizon": how.horizon, "seed": how.seed}
    measured = measure(
        effects, experts, how.modes, alone=_controls(experts, load, mass) if how.controls == "layer" else (),
        keeper=None if how.store is None else Kept(how.store, effects, **same), progress=how.progress, **same,
    )  # fmt: skip
    _, document = np.unique(effects.text.document, return_inverse=True)
    times = document_multiplicities(int(document.max()) + 1, how.draws, seed=how.seed).astype(np.float64)
    used, later = _reaches(effects, how.horizon), _reaches(effects, max(how.horizon, LATER))
    delta = max(DELTA, effects.noise_floor().nll)
    return Court(measured, how.modes, document, used, later, load, mass, times, delta, how.seed)


def _settings(effects: Effects, court: Court, how: _How, n_on_trial: int, n_given: int) -> dict[str, Any]:
    """What was tried on what, as plain values."""
    tokenized = effects.text.tokenized
    return {
        "model": effects.lens.spec.name, "corpus": tokenized.corpus.name, "n_labels": n_given,
        "n_on_trial": n_on_trial, "is_sample": n_on_trial < n_given, "n_documents": court.n_documents,
        "n_predictions": len(court.document), "document_tokens": int(tokenized.document_lengths.max()),
        "delta": court.delta, "draws": how.draws, "seed": how.seed, "modes": how.modes, "controls": how.controls,
        "horizon": how.horizon, "positions": how.positions, "notes": effects.notes,
    }  # fmt: skip


def _check_settings(modes: Sequence[str], horizon: int, draws: int, judge_positions: int) -> None:
    for mode in modes:
        if mode not in MODES:
            raise BadConfig(f"unknown mode {mode!r}{nearest(mode, MODES)}: use some of {', '.join(MODES)}")
    if missing := [mode for mode in VERDICT_MODES if mode not in modes]:
        raise BadConfig(f"a verdict needs the modes {' and '.join(VERDICT_MODES)}: add {missing[0]} to modes=")
    if horizon < 1 or draws < 100:
        raise BadConfig(f"horizon={horizon}, draws={draws}: give a horizon of 1 or more and 100 draws or more")
    if judge_positions < 1:
        raise BadConfig(f"judge_positions={judge_positions}: give 1 or more, better 100 or more")


def _tokenized(lens: Lens, corpus: Corpus, max_tokens: int | None, seed: int) -> Tokenized:
    """The first tokens of every document, so many that all documents of the test split fit into `max_tokens`."""
    if lens.tokenizer is None:
        raise BadConfig("the model has no tokenizer: load one with it, or give a Tokenized corpus")
    splits = assign_splits(corpus, seed=seed)
    context = min(256, lens.spec.max_positions or 256)
    each = None
    if max_tokens is not None:
        n_test = max(1, int((splits == code_of(Split.TEST)).sum()))
        each = int(np.clip(max_tokens // n_test, min(32, context), context))
    return tokenize(corpus, lens.tokenizer, [], splits=splits, max_length=context, document_tokens=each, seed=seed)


def _sampled(effects: Effects, labels: pd.DataFrame, n_labels: int | None, seed: int) -> pd.DataFrame:
    if n_labels is None:
        return labels
    if n_labels < 1:
        raise BadConfig(f"n_labels={n_labels}: give a positive number of labels")
    addresses = [ExpertAddress(int(a), int(b)) for a, b in zip(labels["layer"], labels["expert"], strict=True)]
    load = np.array([effects.visits(address).sum() for address in addresses])
    return labels.iloc[stratified_sample(load, n_labels, seed=seed)].reset_index(drop=True)


def _seen(
    lens: Lens, tokenized: Tokenized, null_labels: Sequence[str], max_tokens: int | None, seed: int
) -> Effects | None:
    """The clean model on documents of the split ``validate``, if a kind of false label needs it."""
    if not set(OF_ROUTING) & set(null_labels):
        return None
    return Effects(
        lens, tokenized, split=Split.VALIDATE, max_tokens=max_tokens, max_memory=0, seed=seed, progress=False
    )


def _loads(effects: Effects, layers: Sequence[int]) -> tuple[dict[int, Any], dict[int, Any]]:
    """Visits and gate mass of all experts of each layer, at the predictions under test."""
    rows = np.searchsorted(effects.text.read, effects.text.token)
    load, mass = {}, {}
    for layer in layers:
        index, weight = (values[rows] for values in effects.routing[layer])
        n_experts = next(entry.n_experts for entry in effects.lens.spec.layers if entry.layer == layer)
        load[layer] = np.bincount(index.ravel(), minlength=n_experts)
        mass[layer] = np.bincount(index.ravel(), weight.ravel(), minlength=n_experts)
    return load, mass


def _controls(on_trial: Sequence[ExpertAddress], load: dict[int, Any], mass: dict[int, Any]) -> list[ExpertAddress]:
    """Load-matched experts that are not on trial themselves."""
    found = {
        ExpertAddress(own.layer, other)
        for own in on_trial
        for other in load_matched(own.expert, load[own.layer], mass[own.layer], among=range(len(load[own.layer])))
    }
    return sorted(found - set(on_trial))


def _reaches(effects: Effects, horizon: int) -> Bool[ndarray, "prediction"]:
    """Predictions with `horizon` of them, their own included, up to the end of the window."""
    window: Int[ndarray, "prediction"] = effects.text.window
    return np.searchsorted(window, window, side="right") - np.arange(len(window)) >= horizon
