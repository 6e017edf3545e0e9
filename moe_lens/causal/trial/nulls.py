"""False labels that stand trial beside the real ones (METRICS 3, item 6).

================  ====================================================================================
frequent-token    the token that the expert is visited by most often
token-class       letters, digits, capitals, ...: the class of tokens that tells its visits apart best
topic             the value of a document field that does
other-expert      the label of the expert of the same layer whose load is nearest
shuffled          the label of a random other expert on trial, each used once
================  ====================================================================================

The first three are made from the routing on documents of the split ``validate``, which no verdict sees. A real label
that does not do better than these says little about its expert that they do not say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_lens.causal.trial.judge import ABSTAINS
from moe_lens.causal.trial.matching import deranged
from moe_lens.corpus.concepts import DOCUMENT_FIELDS
from moe_lens.types import ExpertAddress

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, Int8
    from numpy import ndarray

    from moe_lens.causal.effects import Effects
    from moe_lens.corpus.batches import Tokenized

REAL = "real"
NULL_LABELS = ("frequent-token", "token-class", "topic", "other-expert", "shuffled")


@dataclass(frozen=True, eq=False)
class Case:
    """A label on trial, with what the judge says at every prediction under test."""

    kind: str
    expert: ExpertAddress
    facet: int
    label: str
    z: Int8[ndarray, "prediction"]
    """1, 0, or -1 where the judge abstains."""


def null_cases(
    real: Sequence[Case],
    kinds: Sequence[str],
    effects: Effects,
    seen: Effects | None,
    load: Callable[[ExpertAddress], float],
    *,
    seed: int = 0,
) -> list[Case]:
    """False labels of the experts that have a real one; where a kind has none for an expert, it is left out.

    Args:
        effects: the text under test.
        seen: the clean model on other documents, for the kinds that are made from routing.
        load: visits of an expert, to find the nearest.
    """
    experts = list(dict.fromkeys(case.expert for case in real))
    made: list[Case] = []
    for kind in kinds:
        if kind == "other-expert":
            made += _of_neighbours(real, load)
        elif kind == "shuffled":
            made += _shuffled(real, seed)
        elif seen is not None:
            made += _from_routing(kind, experts, effects, seen)
    return made


def _of_neighbours(real: Sequence[Case], load: Callable[[ExpertAddress], float]) -> list[Case]:
    out = []
    for case in real:
        others = [c for c in real if c.expert.layer == case.expert.layer and c.expert != case.expert and _says(c)]
        if others:
            nearest = min(others, key=lambda c: abs(np.log((load(c.expert) + 1) / (load(case.expert) + 1))))
            out.append(Case("other-expert", case.expert, case.facet, nearest.label, nearest.z))
    return out


def _shuffled(real: Sequence[Case], seed: int) -> list[Case]:
    cases = [case for case in real if _says(case)]
    if len(cases) < 2:
        return []
    pairs = [(case, cases[j]) for case, j in zip(cases, deranged(len(cases), seed=seed).tolist(), strict=True)]
    return [Case("shuffled", a.expert, a.facet, b.label, b.z) for a, b in pairs if a.expert != b.expert]


def _says(case: Case) -> bool:
    return bool((case.z != ABSTAINS).any())


@dataclass(frozen=True, eq=False)
class _Property:
    """A partition of the corpus tokens: one code each, and what every code is called."""

    names: Sequence[str]
    code: Int[ndarray, "corpus_token"]

    def counts(self, seen: Effects, routed: Bool[ndarray, "prediction"]) -> Float[ndarray, "split code"]:
        """Share of each code among routed tokens, and among the others."""
        code = self.code[seen.text.token]
        found = [np.bincount(code[at], minlength=len(self.names)) for at in (routed, ~routed)]
        return np.stack([n / max(n.sum(), 1) for n in found])


def _from_routing(kind: str, experts: Sequence[ExpertAddress], effects: Effects, seen: Effects) -> list[Case]:
    made = {"frequent-token": _tokens, "token-class": _classes, "topic": _topics}[kind]
    properties = made(effects.text.tokenized, effects.lens.tokenizer)
    out = []
    for expert in experts:
        routed = seen.visits(expert)
        scored = []
        for found in properties:
            on, off = found.counts(seen, routed)
            score = on if kind == "frequent-token" else on - off
            scored.append((float(score.max()), int(score.argmax()), found))
        if scored and routed.any():
            _, best, found = max(scored, key=lambda entry: entry[0])
            z = found.code[effects.text.token] == best
            out.append(Case(kind, expert, 0, found.names[best], z.astype(np.int8)))
    return out


def _tokens(tokenized: Tokenized, tokenizer: Any) -> list[_Property]:
    ids, code = np.unique(tokenized.input_ids, return_inverse=True)
    return [_Property([f"the token {_surface(tokenizer, i)!r}" for i in ids.tolist()], code)]


def _classes(tokenized: Tokenized, tokenizer: Any) -> list[_Property]:
    ids, code = np.unique(tokenized.input_ids, return_inverse=True)
    of_id = np.array([CLASSES.index(token_class(_surface(tokenizer, i))) for i in ids.tolist()])
    return [_Property([f"tokens of the class {name}" for name in CLASSES], of_id[code])]


def _topics(tokenized: Tokenized, _tokenizer: Any) -> list[_Property]:
    documents = tokenized.corpus.documents
    out = []
    for name in DOCUMENT_FIELDS:
        values = [document.fields.get(name, "") for document in documents]
        known, code = np.unique(values, return_inverse=True)
        if len(known) > 1:
            titles = [f"documents with {name} {value or 'unknown'}" for value in known.tolist()]
            out.append(_Property(titles, code[tokenized.document][tokenized.window_of]))
    return out


CLASSES = ("blank", "line break", "number", "lower case", "capitalised", "capitals", "other letters", "sign", "mixed")


def token_class(surface: str) -> str:
    """One of `CLASSES`, from the characters of a token without the blanks around them."""
    text = surface.strip()
    if not text:
        return "line break" if "\n" in surface or "\r" in surface else "blank"
    if text.isdigit():
        return "number"
    if not any(c.isalnum() for c in text):
        return "sign"
    if not text.isalpha():
        return "mixed"
    if text.islower():
        return "lower case"
    if text.isupper() and len(text) > 1:
        return "capitals"
    return "capitalised" if text[0].isupper() else "other letters"


def _surface(tokenizer: Any, token_id: int) -> str:
    return str(tokenizer.decode([token_id]))
