"""Whether anything can be scored on a text: enough documents in every split, and concepts that vary.

1. `check_corpus` needs no tokenizer, so it can come before anything is loaded.
2. `check_scorable` looks at the tokens that will be read. What is only partly unusable is said in a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from moe_lens.corpus.concepts import WRITTEN, Concept, Regex
from moe_lens.corpus.splits import SPLITS, assign_splits, domain_order, units
from moe_lens.corpus.tagging import Tagger
from moe_lens.errors import BadConcept, BadCorpus
from moe_lens.types import Split

if TYPE_CHECKING:
    from jaxtyping import Int
    from numpy import ndarray

    from moe_lens.corpus.batches import Tokenized
    from moe_lens.corpus.text import Corpus

log = logging.getLogger("moe_lens")
_NAMED = 5
"""Concepts that a message names."""
_TRIED = 2_000_000
"""Characters on which users' expressions are tried before anything is loaded: seconds for a good one."""


def check_corpus(corpus: Corpus, concepts: Sequence[Concept], needed: Mapping[Split, int], *, seed: int = 0) -> None:
    """Refuse a corpus with too few documents for any probe, and users' regular expressions that are too slow.

    Args:
        concepts: those that users wrote are tried on documents of every domain, up to two million characters.
        needed: documents per split that one class of one probe must come from (METRICS 1.1).
        seed: of the split.

    Raises:
        BadCorpus: how many documents there are, and how many are needed.
        BadConcept: an expression that takes too long; names the document.

    Passing says nothing about a single concept: its positives may still come from too few documents.
    """
    codes = assign_splits(corpus, seed=seed)
    _refuse_few(corpus, codes, needed)
    tagger = Tagger([c for c in concepts if c.collection == WRITTEN and isinstance(c.labeller, Regex)])
    left = _TRIED
    for i in domain_order(corpus, seed=seed, codes=codes.tolist()) if tagger.concepts else ():
        left -= len(corpus.documents[i].text)
        if left < 0:
            break
        tagger.tag(corpus.documents[i])


def _refuse_few(corpus: Corpus, codes: Int[ndarray, "document"], needed: Mapping[Split, int]) -> None:
    if problem := _too_few(codes, needed):
        n_units = len(set(units(corpus)))
        alike = f" in {n_units:,} groups of one source or near-copies" if n_units < len(corpus) else ""
        raise BadCorpus(
            f"{corpus.name} has {len(corpus):,} documents{alike}: {problem}; "
            f"give at least {_total(needed):,} different documents"
        )


def check_scorable(tokenized: Tokenized, needed: Mapping[Split, int]) -> None:
    """Refuse tokens on which no probe can be scored, and warn of what is only partly unusable.

    Args:
        needed: as in `check_corpus`.

    Raises:
        BadCorpus: too few documents in some split.
        BadConcept: every concept matches no token, or every token.
    """
    _refuse_few(tokenized.corpus, tokenized.splits, needed)
    read = np.unique(tokenized.document)
    if problem := _too_few(tokenized.splits[read], needed):
        raise BadCorpus(
            f"{len(read):,} documents of {tokenized.corpus.name} are read: {problem}; "
            "raise the limit on tokens, or give documents of two or more tokens"
        )
    never, always = constant_concepts(tokenized)
    found = [*_about(never, "no token"), *_about(always, "every token")]
    where = tokenized.corpus.name
    if found and len(never) + len(always) == len(tokenized.concepts):
        raise BadConcept(f"nothing to probe: in {where} {' and '.join(found)}; choose or write other concepts")
    if found:
        log.warning("in %s %s: not scored", where, " and ".join(found))


def constant_concepts(tokenized: Tokenized) -> tuple[list[str], list[str]]:
    """Names of the concepts that match no eligible token in their scope, and of those that match all of them."""
    eligible, packed = tokenized.eligible[:, None], tokenized.packed_labels
    n = len(tokenized.concepts)
    somewhere = np.bitwise_or.reduce(np.where(eligible, packed, 0), axis=0)
    in_window = np.bitwise_and.reduceat(np.where(eligible, packed, 255), tokenized.offsets[:-1], axis=0)
    never = ~np.unpackbits(somewhere, count=n).view(bool)
    everywhere = (np.unpackbits(in_window, axis=1, count=n).view(bool) | ~tokenized.in_scope).all(0)
    names = np.array([c.name for c in tokenized.concepts], dtype=object)
    return names[never].tolist(), names[everywhere & ~never].tolist()


def _too_few(codes: Int[ndarray, "document"], needed: Mapping[Split, int]) -> str:
    """What is missing, in words; empty if nothing is."""
    have = dict(zip(SPLITS, np.bincount(codes, minlength=len(SPLITS)).tolist(), strict=True))
    if all(have[split] >= n for split, n in needed.items()):
        return ""
    return f"{_by_split(have)}, and a probe needs {_by_split(needed)}"


def _by_split(numbers: Mapping[Split, int]) -> str:
    return ", ".join(f"{numbers[split]} to {split}" for split in SPLITS)


def _total(needed: Mapping[Split, int]) -> int:
    """Documents from which a 50/25/25 split has enough of each."""
    share = {Split.SELECT: 2, Split.VALIDATE: 4, Split.TEST: 4}
    return max(share[split] * n for split, n in needed.items())


def _about(names: Sequence[str], what: str) -> list[str]:
    """``concept 'a' matches no token``, or nothing about no concept."""
    if not names:
        return []
    shown = ", ".join(map(repr, names[:_NAMED]))
    if len(names) == 1:
        return [f"concept {shown} matches {what}"]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return [f"concepts {shown}{more} match {what}"]
