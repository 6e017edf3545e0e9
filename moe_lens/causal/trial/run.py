"""``validate(lens, corpus, labels)``: put labels on trial (METRICS 3).

1. Check the labels; choose documents of the split ``test`` and run the clean model on them.
2. What each rule marks there; false labels beside the real ones.
3. Take every expert away at its visits, under ``zero`` and ``mean_off``, and a random expert that was chosen beside
   it. One pass each; all labels of an expert, true and false, read the same passes.
4. One row per label and mode, one verdict per label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from moe_lens.causal.effects import Effects
from moe_lens.causal.trial.judge import ABSTAINS, check_marks, marked_by_rules
from moe_lens.causal.trial.matching import load_matched, stratified_sample
from moe_lens.causal.trial.measured import MODES, Positions, measure, reference_text
from moe_lens.causal.trial.nulls import NULL_LABELS, REAL, Case, null_cases
from moe_lens.causal.trial.result import Trial
from moe_lens.causal.trial.table import Court, validation_table
from moe_lens.causal.trial.verdict import DELTA, VERDICT_MODES
from moe_lens.corpus.batches import Tokenized, tokenize
from moe_lens.corpus.splits import assign_splits, code_of
from moe_lens.errors import BadConfig, BadCorpus, nearest
from moe_lens.stats import document_multiplicities
from moe_lens.types import ExpertAddress, Split, Status

if TYPE_CHECKING:
    from jaxtyping import Bool, Int
    from numpy import ndarray

    from moe_lens.corpus.text import Corpus
    from moe_lens.models.lens import Lens

MAX_TOKENS = 16_384
_KEY = ["layer", "expert", "facet"]


def validate(
    lens: Lens,
    corpus: Corpus | Tokenized,
    labels: pd.DataFrame,
    *,
    modes: Sequence[str] = VERDICT_MODES,
    experts: Sequence[str | ExpertAddress] | None = None,
    n_labels: int | None = None,
    max_tokens: int | None = MAX_TOKENS,
    draws: int = 2000,
    null_labels: Sequence[str] = NULL_LABELS,
    controls: Literal["trial", "layer"] = "trial",
    positions: Positions = "all",
    horizon: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> Trial:
    """Whether labels say where their experts are visited, and whether the experts are needed there.

    Args:
        corpus: of a `Tokenized`, documents of the split ``test`` are used, whole and in a random order up to
            `max_tokens`. A `Corpus` is tokenised so that as many documents as possible have a part in these: only
            the first tokens of each are read.
        labels: columns ``layer, expert, label, rule``, and if there are any ``facet`` and ``status`` (rows other than
            ``ok`` have no label to try). A label without a rule has no judge: it counts, as underpowered.
        modes: ``zero`` and ``mean_off``, which give the verdict, and ``mean`` for a column beside them.
        experts: try only the labels of these.
        n_labels: try a random sample that holds experts of all loads; None means all labels.
        draws: bootstrap samples of documents.
        null_labels: kinds of false labels to try beside the real ones, see `moe_lens.causal.trial.nulls`.
        controls: where load-matched controls of the column ``specificity`` come from: experts on trial, or all of
            the layer, which takes more passes.
        positions: ``focal`` edits every visit on its own; slow, to check ``all`` against.
        horizon: predictions over which an effect is averaged, from the token itself on.

    Raises:
        BadConfig: two rows for one label, an empty label, unknown modes or kinds, a judge that marks nothing or
            everything, or what `Effects` refuses.
        BadConcept: a rule that does not compile.
        OutOfRange: an expert that the model does not have.
        BadCorpus: no document under test with a token to predict, or none as long as the horizon.

    A verdict is about this text, this model and ablation at all visits at once. It does not show that the words of a
    label are the best ones: false labels in the same table say how much a label of that kind gets for nothing.
    """
    _check_settings(modes, null_labels, horizon, draws)
    chosen = _checked(lens, labels, experts)
    n_given = len(chosen)
    text = corpus if isinstance(corpus, Tokenized) else _tokenized(lens, corpus, max_tokens, seed)
    effects = Effects(lens, text, max_tokens=max_tokens, progress=progress, seed=seed)
    _reaches(effects, horizon)  # refuses a horizon that nothing reaches, before the passes
    chosen = _sampled(effects, chosen, n_labels, seed)
    real = _cases(effects, chosen)
    layers = sorted({case.expert.layer for case in real})
    load, mass = _loads(effects, layers)
    cases = real + null_cases(
        real, null_labels, effects, _seen(lens, text, null_labels, max_tokens, seed),
        lambda e: float(load[e.layer][e.expert]), seed=seed,
    )  # fmt: skip
    how = _How(tuple(modes), controls, positions, horizon, draws, seed, progress)
    court = _court(effects, sorted({case.expert for case in real}), load, mass, how)
    constants = {"routing": "live", "split": str(Split.TEST), "horizon": horizon, "positions": positions}
    return Trial(validation_table(cases, court, constants), _settings(effects, court, how, len(real), n_given))


@dataclass(frozen=True)
class _How:
    """Settings of `validate` that say how effects are measured."""

    modes: tuple[str, ...]
    controls: Literal["trial", "layer"]
    positions: Positions
    horizon: int
    draws: int
    seed: int
    progress: bool


def _court(
    effects: Effects, experts: Sequence[ExpertAddress], load: dict[int, Any], mass: dict[int, Any], how: _How
) -> Court:
    """Run the passes."""
    lens, text = effects.lens, effects.text
    needs_text = set(how.modes) != {"zero"}
    reference = reference_text(lens, text.tokenized, sorted(load), seed=how.seed) if needs_text else None
    measured = measure(
        effects, experts, how.modes, reference=reference, positions=how.positions, horizon=how.horizon, seed=how.seed,
        alone=_controls(experts, load, mass) if how.controls == "layer" else (), progress=how.progress,
    )  # fmt: skip
    _, document = np.unique(text.document, return_inverse=True)
    times = document_multiplicities(int(document.max()) + 1, how.draws, seed=how.seed).astype(np.float64)
    used, delta = _reaches(effects, how.horizon), max(DELTA, effects.noise_floor().nll)
    return Court(measured, how.modes, document, used, load, mass, times, delta, how.seed)


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


def _check_settings(modes: Sequence[str], null_labels: Sequence[str], horizon: int, draws: int) -> None:
    for given, known, name in ((modes, MODES, "mode"), (null_labels, NULL_LABELS, "kind of null label")):
        for value in given:
            if value not in known:
                raise BadConfig(f"unknown {name} {value!r}{nearest(value, known)}: use some of {', '.join(known)}")
    if missing := [mode for mode in VERDICT_MODES if mode not in modes]:
        raise BadConfig(f"a verdict needs the modes {' and '.join(VERDICT_MODES)}: add {missing[0]} to modes=")
    if horizon < 1 or draws < 100:
        raise BadConfig(f"horizon={horizon}, draws={draws}: give a horizon of 1 or more and 100 draws or more")


def _checked(lens: Lens, labels: pd.DataFrame, experts: Sequence[str | ExpertAddress] | None) -> pd.DataFrame:
    """Rows with a label, of the experts asked for."""
    missing = [name for name in ("layer", "expert", "label") if name not in labels]
    if missing:
        raise BadConfig(f"the labels have no column {missing[0]!r}: give layer, expert, label and rule")
    table = labels.assign(**{name: value for name, value in (("facet", 0), ("rule", None)) if name not in labels})
    if "status" in table:
        table = table[table["status"] == str(Status.OK)]
    if experts is not None:
        wanted = [lens.address(e) for e in experts]
        keep = [ExpertAddress(int(a), int(b)) in wanted for a, b in zip(table["layer"], table["expert"], strict=True)]
        table = table[keep]
    if not len(table):
        raise BadConfig("there is no label to put on trial: give rows with a label, of the experts asked for")
    for row in table.to_dict("records"):
        at = lens.address(ExpertAddress(int(row["layer"]), int(row["expert"])))
        if at.layer not in lens.spec.moe_layers:
            raise BadConfig(f"{at} is a dense layer that every token visits: try labels of experts of MoE layers")
        if not isinstance(row["label"], str) or not row["label"].strip():
            raise BadConfig(f"the label of {at} is empty: write one or take the row out")
    twice = table[table.duplicated(_KEY)]
    if len(twice):
        at = ExpertAddress(int(twice["layer"].iloc[0]), int(twice["expert"].iloc[0]))
        raise BadConfig(f"there are two labels for {at}: keep one, or number them in a column facet (1, 2, ...)")
    return table.sort_values(_KEY, ignore_index=True)


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


def _cases(effects: Effects, labels: pd.DataFrame) -> list[Case]:
    rows = labels.to_dict("records")
    names = [f"{ExpertAddress(int(row['layer']), int(row['expert']))}" for row in rows]
    owners = [
        name if not row["facet"] else f"{name}-facet-{row['facet']}" for name, row in zip(names, rows, strict=True)
    ]
    rules = {owner: row["rule"] for owner, row in zip(owners, rows, strict=True) if isinstance(row["rule"], str)}
    marks = marked_by_rules(rules, effects.text.tokenized, documents=np.unique(effects.text.document))
    at = effects.text.token
    nothing = np.full(len(at), ABSTAINS, np.int8)
    z = {owner: marks[owner][at].astype(np.int8) if owner in marks else nothing for owner in owners}
    check_marks(z)
    return [
        Case(REAL, ExpertAddress.parse(name), int(row["facet"]), row["label"], z[owner])
        for name, owner, row in zip(names, owners, rows, strict=True)
    ]


def _seen(
    lens: Lens, tokenized: Tokenized, null_labels: Sequence[str], max_tokens: int | None, seed: int
) -> Effects | None:
    """The clean model on documents of the split ``validate``, if a kind of false label needs it."""
    if not {"frequent-token", "token-class", "topic"} & set(null_labels):
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
    left = np.searchsorted(window, window, side="right") - np.arange(len(window))
    if not (left >= horizon).any():
        raise BadCorpus(f"no document under test has {horizon} tokens to predict: give longer ones, or horizon=1")
    return left >= horizon
