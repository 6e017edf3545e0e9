"""``rule_answers(...)``: the judge that needs no model. A label's rule is run on the documents.

The rule reads the whole document, not the 32 tokens of an item, so that it marks the same tokens here as in a causal
trial of the label, and as a concept with the same regular expression does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from moe_lens.autointerp.contexts import Contexts
from moe_lens.autointerp.labels import KEY, usable
from moe_lens.autointerp.replies import Outcome
from moe_lens.corpus.concepts import concept
from moe_lens.corpus.tagging import Tagger
from moe_lens.types import ExpertAddress

if TYPE_CHECKING:
    from jaxtyping import Bool
    from numpy import ndarray

    from moe_lens.corpus.batches import Tokenized

RULE = "rule"
FITS, FITS_NOT = 4.0, 0.0


def rule_answers(
    labels: pd.DataFrame, items: pd.DataFrame, tokenized: Tokenized, *, control: str = "none", progress: bool = True
) -> pd.DataFrame:
    """What the rule of every label says of every item of its expert: 4 where it marks a character of the token, else 0.

    Columns ``layer, expert, facet, scorer, control, item, score, outcome``. Labels without a rule have no rows.

    Args:
        labels: as in ``labels.parquet``.
        items: as from ``make_items``.
        tokenized: what the items were captured from.
        control: ``shuffled`` if the labels are, so that the answers say so.

    Raises:
        BadConcept: a rule that does not compile or takes too long; the message names the label's expert.
        BadCorpus: the items were captured from other windows than those of `tokenized`.

    A rule gives no degrees, so its AUROC is its balanced accuracy.
    """
    rules = usable(labels).dropna(subset="rule")
    places = _characters(items, tokenized)
    asked = rules[[*KEY, "rule"]].merge(places, on=["layer", "expert"])
    says = _marked(asked, tokenized, progress)
    answers = asked[[*KEY, "item"]].assign(
        scorer=RULE, control=control, score=np.where(says, FITS, FITS_NOT).astype(np.float32), outcome=str(Outcome.OK)
    )
    order = [*KEY, "scorer", "control", "item", "score", "outcome"]
    return answers[order].sort_values([*KEY, "item"], ignore_index=True)


def _characters(items: pd.DataFrame, tokenized: Tokenized) -> pd.DataFrame:
    """Layer, expert, number and document of every item, with the characters that its token covers there."""
    found = Contexts(tokenized, None).locate(items)
    at = tokenized.offsets[found["window"]] + found["position"].to_numpy(np.int64)
    characters = {"start": tokenized.char_start[at], "end": tokenized.char_end[at]}
    return found[["layer", "expert", "item", "document"]].assign(**characters)


def _marked(asked: pd.DataFrame, tokenized: Tokenized, progress: bool) -> Bool[ndarray, "row"]:
    """Whether the row's rule marks the row's token; each rule reads each document once."""
    from tqdm.auto import tqdm

    says = np.zeros(len(asked), bool)
    start, end = asked["start"].to_numpy(), asked["end"].to_numpy()
    groups = asked.groupby("rule", sort=False)
    for rule, rows in tqdm(groups, desc="rules", unit="rule", disable=None if progress else True):
        first = rows.iloc[0]
        named = f"rule-of-{ExpertAddress(int(first['layer']), int(first['expert']))}"
        tagger = Tagger([concept(named, regex=str(rule))])
        for document, at in rows.groupby("document").indices.items():
            here = rows.index.to_numpy()[at]
            tags = tagger.tag(tokenized.corpus.documents[int(str(document))], until=int(end[here].max()))
            says[here] = tags.token_bits(start[here], end[here])[:, 0]
    return says
