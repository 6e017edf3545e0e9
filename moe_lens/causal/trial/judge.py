"""Which tokens a label marks, blind to routing: the judge of a trial.

A label's rule reads whole documents and marks characters; a token is z=1 iff one of its characters is marked, all
other tokens are z=0. This is how a concept with the same regular expression labels tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from moe_lens.corpus.concepts import concept
from moe_lens.corpus.patterns import check_pattern
from moe_lens.corpus.tagging import Tagger
from moe_lens.errors import BadConfig

if TYPE_CHECKING:
    from jaxtyping import Bool, Int, Int8
    from numpy import ndarray

    from moe_lens.corpus.batches import Tokenized

NO, YES, ABSTAINS = 0, 1, -1


def marked_by_rules(
    rules: Mapping[str, str], tokenized: Tokenized, *, documents: Int[ndarray, "document"]
) -> dict[str, Bool[ndarray, "corpus_token"]]:
    """Tokens that each rule marks in `documents`; tokens of other documents are False.

    Args:
        rules: owner (for messages, as in ``L9.E5``) to a regular expression over characters.

    Raises:
        BadConcept: a rule that does not compile, or takes too long; the message names its owner.
    """
    for owner, rule in rules.items():
        check_pattern(rule, owner=f"the rule of {owner}")
    tagger = Tagger(
        [concept(f"rule-of-{number}-{_name(owner)}", regex=rules[owner]) for number, owner in enumerate(rules)]
    )
    bits = np.zeros((tokenized.n_tokens, len(rules)), bool)
    document_of = tokenized.document[tokenized.window_of]
    order = np.argsort(document_of, kind="stable")
    bounds = np.searchsorted(document_of, [documents, np.asarray(documents) + 1], sorter=order)
    for document, start, stop in zip(documents.tolist(), *bounds, strict=True):
        at = order[start:stop]
        ends = tokenized.char_end[at]
        tags = tagger.tag(tokenized.corpus.documents[document], until=int(ends.max()))
        bits[at] = tags.token_bits(tokenized.char_start[at], ends)
    return dict(zip(rules, bits.T, strict=True))


def check_marks(z: Mapping[str, Int8[ndarray, "prediction"]]) -> None:
    """Refuse judges that cannot tell anything apart.

    Raises:
        BadConfig: all labels together mark nothing, or each marks everything, or the judge abstains on everything.
    """
    if not z:
        return
    if all((marks == ABSTAINS).all() for marks in z.values()):
        raise BadConfig("no label has a rule, so nothing says where they hold: give rules, or a judge= that does")
    judged = [marks[marks != ABSTAINS] for marks in z.values() if (marks != ABSTAINS).any()]
    if not any((marks == YES).any() for marks in judged):
        raise BadConfig("the labels mark no token of the documents under test: give other rules, or more documents")
    if all((marks == YES).all() for marks in judged):
        raise BadConfig("every label marks every token of the documents under test: give rules that leave some out")


def _name(owner: str) -> str:
    return "".join(c if c.isalnum() or c in "_.+-" else "-" for c in owner)
