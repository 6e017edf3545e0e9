"""False labels that stand trial beside the real ones (METRICS 3, item 6).

================  ====================================================================================
frequent-token    the token that the expert is visited by most often
token-class       letters, digits, capitals, ...: the class of tokens that tells its visits apart best
topic             the value of a document field that does
other-expert      the label of the expert of the same layer whose load is nearest
random-expert     the label of a random other expert on trial, each used once
================  ====================================================================================

The first three are made from the routing on documents of the split ``validate``, which no verdict sees; a rule decides
them. The last two are claims for the judge of the real ones. Labels that a labeller made of ``shuffled`` activations
come from outside, as a table. A real label that does not do better than these says little about its expert that they
do not say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_lens.causal.trial.claims import REAL, Case, Claim
from moe_lens.causal.trial.matching import deranged
from moe_lens.corpus.concepts import DOCUMENT_FIELDS
from moe_lens.errors import BadConfig, nearest

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from numpy import ndarray

    from moe_lens.causal.effects import Effects
    from moe_lens.corpus.batches import Tokenized
    from moe_lens.types import ExpertAddress

OF_ROUTING = ("frequent-token", "token-class", "topic")
NULL_LABELS = (*OF_ROUTING, "other-expert", "random-expert")
SHUFFLED = "shuffled"
"""Kind of the labels that a labeller made of shuffled activations."""


def check_kinds(null_labels: Sequence[str], tables: Iterable[str]) -> None:
    """Refuse kinds of false labels that nobody makes, and tables that take the name of a kind that is made here.

    Raises:
        BadConfig: as said.
    """
    for kind in null_labels:
        if kind == SHUFFLED:
            raise BadConfig(
                f"labels of the kind {kind!r} are a labeller's: give them as null_tables={{{kind!r}: table}}"
            )
        if kind not in NULL_LABELS:
            known = ", ".join(NULL_LABELS)
            raise BadConfig(f"unknown kind of null label {kind!r}{nearest(kind, NULL_LABELS)}: use some of {known}")
    for kind in tables:
        if kind in (REAL, *NULL_LABELS):
            raise BadConfig(f"null_tables= has the kind {kind!r}, which is not made elsewhere: name it otherwise")


def borrowed(
    real: Sequence[Claim], kinds: Sequence[str], load: Callable[[ExpertAddress], float], *, seed: int = 0
) -> list[Claim]:
    """Labels of other experts, for the kinds ``other-expert`` and ``random-expert``.

    Args:
        real: claims that something judges; others are nobody's false label.
        load: visits of an expert, to find the nearest.
    """
    made: list[Claim] = []
    for kind in kinds:
        if kind == "other-expert":
            made += _of_neighbours(real, load)
        elif kind == "random-expert":
            made += _of_random_experts(real, seed)
    return made


def from_routing(
    kinds: Sequence[str], experts: Sequence[ExpertAddress], effects: Effects, seen: Effects | None
) -> list[Case]:
    """False labels of `experts` of the kinds `OF_ROUTING`; where a kind has none for an expert, it is left out.

    Args:
        effects: the text under test.
        seen: the clean model on other documents; may be None if no kind needs it.
    """
    out: list[Case] = []
    for kind in kinds:
        if kind in OF_ROUTING and seen is not None:
            out += _of_kind(kind, experts, effects, seen)
    return out


def _of_neighbours(real: Sequence[Claim], load: Callable[[ExpertAddress], float]) -> list[Claim]:
    out = []
    for claim in real:
        others = [c for c in real if c.expert.layer == claim.expert.layer and c.expert != claim.expert]
        if others:
            nearest = min(others, key=lambda c: abs(np.log((load(c.expert) + 1) / (load(claim.expert) + 1))))
            out.append(replace(nearest, kind="other-expert", expert=claim.expert, facet=claim.facet))
    return out


def _of_random_experts(real: Sequence[Claim], seed: int) -> list[Claim]:
    if len(real) < 2:
        return []
    pairs = [(claim, real[j]) for claim, j in zip(real, deranged(len(real), seed=seed).tolist(), strict=True)]
    return [
        replace(other, kind="random-expert", expert=own.expert, facet=own.facet)
        for own, other in pairs
        if own.expert != other.expert
    ]


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


def _of_kind(kind: str, experts: Sequence[ExpertAddress], effects: Effects, seen: Effects) -> list[Case]:
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
