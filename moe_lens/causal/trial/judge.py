"""Which tokens a label marks, blind to routing: the judge of a trial.

A rule or concept reads whole documents and marks characters; a token is z=1 iff one of its characters is marked, all
other tokens are z=0. A `Judge` object (a language model) is asked about some tokens, see `hearing`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from moe_lens.corpus.concepts import Concept, concept
from moe_lens.corpus.patterns import check_pattern
from moe_lens.corpus.tagging import Tagger
from moe_lens.errors import BadConcept, BadConfig

if TYPE_CHECKING:
    import pandas as pd
    from jaxtyping import Bool, Float, Int, Int8
    from numpy import ndarray

    from moe_lens.causal.trial.claims import Case, Claim
    from moe_lens.corpus.batches import Tokenized

NO, YES, ABSTAINS, NOT_ASKED = 0, 1, -1, -2
FITS = 3
"""The lowest grade that is z=1, as where labels are scored: 2 is "could be either", and doubt is no claim."""
BEST = 4


class Judge(Protocol):
    """Says how well labels fit marked tokens, without seeing the model."""

    @property
    def name(self) -> str:
        """Such as ``openai:MODEL``."""
        ...

    def __call__(self, items: pd.DataFrame) -> Float[ndarray, "item"]:
        """0 (does not fit) to 4 (fits) for each row, NaN to abstain.

        A call holds one kind of labels, so that (layer, expert, facet) has one label in it.

        Args:
            items: ``item`` (0, 1, ...); ``layer, expert, facet`` of the expert on trial and the ``label`` that it is
                tried under; ``document`` and ``token`` (index in the tokenised corpus) of the focal token;
                ``context``, the text of up to 32 tokens of its window, and ``start, end``, the characters of the
                focal token in it. It does not say which rows visit the expert.
        """
        ...


def marked(
    claims: Sequence[Claim], tokenized: Tokenized, *, documents: Int[ndarray, "document"]
) -> list[Bool[ndarray, "corpus_token"] | None]:
    """Tokens that the concept or rule of each claim marks in `documents`, None for a claim with neither.

    Tokens of other documents are False, and so are those of documents on which a concept is not defined.

    Raises:
        BadConcept: a rule that does not compile, or takes too long; the message names its owner.
    """
    keys = [(c.judged_by, c.rule if c.concept is None else None) for c in claims]
    unique: dict[tuple[str, str | None], Concept] = {}
    for key, claim in zip(keys, claims, strict=True):
        if claim.concept is not None:
            if unique.setdefault(key, claim.concept) != claim.concept:
                raise BadConcept(f"two different concepts are named {claim.concept.name!r}: rename one")
        elif claim.rule is not None and key not in unique:
            check_pattern(claim.rule, owner=f"the rule of {claim.owner}")
            unique[key] = concept(f"rule-of-{len(unique)}-{_name(claim.owner)}", regex=claim.rule)
    bits = np.zeros((tokenized.n_tokens, len(unique)), bool)
    tagger = Tagger(list(unique.values()))
    document_of = tokenized.document[tokenized.window_of]
    order = np.argsort(document_of, kind="stable")
    bounds = np.searchsorted(document_of, [documents, np.asarray(documents) + 1], sorter=order)
    for document, start, stop in zip(documents.tolist(), *bounds, strict=True):
        at = order[start:stop]
        ends = tokenized.char_end[at]
        tags = tagger.tag(tokenized.corpus.documents[document], until=int(ends.max()))
        bits[at] = tags.token_bits(tokenized.char_start[at], ends)
    column = {key: np.ascontiguousarray(bits[:, number]) for number, key in enumerate(unique)}
    return [column.get(key) for key in keys]


def check_marks(cases: Sequence[Case], judge: Judge | None) -> None:
    """Refuse judges that cannot tell anything apart.

    Raises:
        BadConfig: all labels together mark nothing, or each marks everything, or the judge abstains on everything.
    """
    z: list[Int8[ndarray, "asked"]] = [case.z[case.z != NOT_ASKED] for case in cases]
    judged = [marks[marks != ABSTAINS] for marks in z if (marks != ABSTAINS).any()]
    if not judged and judge is not None:
        raise BadConfig(
            f"the judge {judge.name} abstained on every token that it was asked about: give another judge, or labels "
            "that it can tell"
        )
    if not judged:
        raise BadConfig("no label has a rule, so nothing says where they hold: give rules, concepts or a judge=")
    if not any((marks == YES).any() for marks in judged):
        raise BadConfig("the labels mark no token of the documents under test: give other rules, or more documents")
    if all((marks == YES).all() for marks in judged):
        raise BadConfig("every label marks every token of the documents under test: give rules that leave some out")


def cohen_kappa(a: Bool[ndarray, "item"], b: Bool[ndarray, "item"]) -> float:
    """Agreement of two judges beyond chance (Cohen 1960); NaN without items, or where both always say the same one.

    Agreement is not truth: two judges of one family err alike. It depends on how many items are positive.
    """
    if not len(a):
        return np.nan
    by_chance = a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean())
    return float(((a == b).mean() - by_chance) / (1 - by_chance)) if by_chance < 1 else np.nan


def _name(owner: str) -> str:
    return "".join(c if c.isalnum() or c in "_.+-" else "-" for c in owner)
