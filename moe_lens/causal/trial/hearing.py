"""Claims before the judge: ``heard(claims, effects, ...)`` gives the cases.

1. Concepts and rules mark every token.
2. A `Judge` is asked, label by label, about up to `positions` tokens that visit the expert and as many that do not,
   drawn uniformly within each. Its grades of 3 and 4 are z=1. All that mixes the two weights them by how many tokens
   each stands for.
3. Agreement of two judges: the second one reads a tenth of the same tokens; without a second one the rule or concept
   of a label that a `Judge` decides, on all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from moe_lens.capture.exemplars import CONTEXT, context_start
from moe_lens.causal.trial.claims import REAL, Case, Claim
from moe_lens.causal.trial.judge import ABSTAINS, BEST, FITS, NOT_ASKED, YES, Judge, cohen_kappa, marked
from moe_lens.errors import BadConfig

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, Int8
    from numpy import ndarray

    from moe_lens.causal.effects import Effects

POSITIONS = 200
TWICE = 0.1
"""Of the positions that a second judge reads too."""


def heard(
    claims: Sequence[Claim],
    effects: Effects,
    *,
    used: Bool[ndarray, "prediction"],
    judge: Judge | None = None,
    second_judge: Judge | None = None,
    positions: int = POSITIONS,
    seed: int = 0,
) -> list[Case]:
    """The cases, in the order of the claims, which come kind by kind.

    Args:
        used: predictions that count; others are not asked about.
        judge: decides every claim, also those with a rule or concept; None leaves it to these.
        second_judge: reads real labels again.

    Raises:
        BadConcept: a rule that cannot be used.
        BadConfig: a judge that gives no grade per item.
    """
    text = effects.text
    marks = marked(claims, text.tokenized, documents=np.unique(text.document))
    z = [None if found is None else found[text.token].astype(np.int8) for found in marks]
    cases = [_ruled(claim, own, len(used)) for claim, own in zip(claims, z, strict=True)]
    if judge is None and second_judge is None:
        return cases
    samples = [_sample(effects, claim, used, positions, seed) for claim in claims]
    if judge is not None:
        for kind in dict.fromkeys(claim.kind for claim in claims):
            here = [i for i, claim in enumerate(claims) if claim.kind == kind]
            grades = _ask(judge, [claims[i] for i in here], [samples[i].at for i in here], effects)
            for i, found in zip(here, grades, strict=True):
                cases[i] = _graded(cases[i], samples[i], found, judge)
    return cases if second_judge is None else _read_again(cases, claims, samples, effects, second_judge, seed)


@dataclass(frozen=True, eq=False)
class _Sample:
    """Predictions to ask about, ascending, and how many each stands for."""

    at: Int[ndarray, "chosen"]
    weight: Float[ndarray, "chosen"]


def _sample(effects: Effects, claim: Claim, used: Bool[ndarray, "prediction"], positions: int, seed: int) -> _Sample:
    """Up to `positions` visits of the expert and as many other predictions; the same for all labels of an expert."""
    rng = np.random.default_rng([seed, claim.expert.layer, claim.expert.expert])
    visited = effects.visits(claim.expert)
    at, weight = [], []
    for group in (np.flatnonzero(used & visited), np.flatnonzero(used & ~visited)):
        chosen = rng.permutation(group)[:positions]
        at.append(chosen)
        weight.append(np.full(len(chosen), len(group) / max(len(chosen), 1)))
    order = np.argsort(np.concatenate(at))
    return _Sample(np.concatenate(at)[order], np.concatenate(weight)[order])


def _ask(
    judge: Judge, claims: Sequence[Claim], at: Sequence[Int[ndarray, "chosen"]], effects: Effects
) -> list[Float[ndarray, "chosen"]]:
    """Grades of each claim's predictions, in one call."""
    items = _items(claims, at, effects)
    grades = np.asarray(judge(items), np.float64)
    if grades.shape != (len(items),):
        raise BadConfig(f"the judge {judge.name} gave {grades.shape} grades for {len(items)} items: one for each")
    if ((grades < 0) | (grades > BEST)).any():
        raise BadConfig(f"the judge {judge.name} gave a grade outside 0 to {BEST}: grade so, and abstain with NaN")
    return np.split(grades, np.cumsum([len(chosen) for chosen in at])[:-1])


def _items(claims: Sequence[Claim], at: Sequence[Int[ndarray, "chosen"]], effects: Effects) -> pd.DataFrame:
    text, n = effects.text, [len(chosen) for chosen in at]
    prediction = np.concatenate([np.zeros(0, np.int64), *at])
    context, start, end = _contexts(effects, prediction)
    columns = {
        "item": np.arange(len(prediction)),
        "layer": np.repeat([claim.expert.layer for claim in claims], n),
        "expert": np.repeat([claim.expert.expert for claim in claims], n),
        "facet": np.repeat([claim.facet for claim in claims], n),
        "label": np.repeat(np.array([claim.label for claim in claims], object), n),
        "document": text.document[prediction], "token": text.token[prediction],
        "context": context, "start": start, "end": end,
    }  # fmt: skip
    return pd.DataFrame(columns)


def _contexts(
    effects: Effects, prediction: Int[ndarray, "item"]
) -> tuple[list[str], Int[ndarray, "item"], Int[ndarray, "item"]]:
    """Text around each focal token, and the token's characters in it."""
    text, tokenized = effects.text, effects.text.tokenized
    window, token = text.window[prediction], text.token[prediction]
    first, length = tokenized.offsets[window], np.diff(tokenized.offsets)[window]
    begin = context_start(torch.from_numpy(token - first), torch.from_numpy(length)).numpy()
    near = begin[:, None] + np.arange(CONTEXT)
    near = first[:, None] + np.minimum(near, length[:, None] - 1)
    start, end = tokenized.char_start[near].astype(np.int64), tokenized.char_end[near].astype(np.int64)
    low = np.where(start >= 0, start, np.iinfo(np.int64).max).min(axis=1, initial=np.iinfo(np.int64).max)
    high = end.max(axis=1, initial=0)
    documents = [tokenized.corpus.documents[i].text for i in text.document[prediction].tolist()]
    context = [body[a:b] for body, a, b in zip(documents, low.tolist(), high.tolist(), strict=True)]
    return context, tokenized.char_start[token] - low, tokenized.char_end[token] - low


def _ruled(claim: Claim, z: Int8[ndarray, "prediction"] | None, n_predictions: int) -> Case:
    """A case that a rule or concept decides; without either the judge abstains everywhere."""
    said = np.full(n_predictions, ABSTAINS, np.int8) if z is None else z
    return Case(claim.kind, claim.expert, claim.facet, claim.label, said, claim.judged_by)


def _graded(by_rule: Case, sample: _Sample, grades: Float[ndarray, "chosen"], judge: Judge) -> Case:
    """A case that a `Judge` decides, with its agreement with the rule or concept if there is one."""
    n, said = len(by_rule.z), _said(grades)
    z, weight, grade = np.full(n, NOT_ASKED, np.int8), np.zeros(n), np.full(n, np.nan)
    z[sample.at], weight[sample.at], grade[sample.at] = said, sample.weight, grades
    kappa = _kappa(said, by_rule.z[sample.at])
    return replace(by_rule, z=z, judge=judge.name, weight=weight, grade=grade, kappa=kappa)


def _read_again(
    cases: Sequence[Case],
    claims: Sequence[Claim],
    samples: Sequence[_Sample],
    effects: Effects,
    judge: Judge,
    seed: int,
) -> list[Case]:
    """The cases with the agreement between their judge and a second one on some of the sampled positions."""
    rng = np.random.default_rng(seed)
    read = [i for i, case in enumerate(cases) if case.kind == REAL and (case.z >= 0).any()]
    at = [np.sort(rng.permutation(samples[i].at)[: max(1, round(TWICE * len(samples[i].at)))]) for i in read]
    grades = _ask(judge, [claims[i] for i in read], at, effects)
    out = list(cases)
    for i, chosen, found in zip(read, at, grades, strict=True):
        out[i] = replace(cases[i], kappa=_kappa(cases[i].z[chosen], _said(found)))
    return out


def _said(grades: Float[ndarray, "item"]) -> Int8[ndarray, "item"]:
    return np.where(np.isnan(grades), ABSTAINS, grades >= FITS).astype(np.int8)


def _kappa(a: Int8[ndarray, "item"], b: Int8[ndarray, "item"]) -> float:
    both = (a >= 0) & (b >= 0)
    return cohen_kappa(a[both] == YES, b[both] == YES)
