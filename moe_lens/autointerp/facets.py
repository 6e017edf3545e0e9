"""Several labels for one expert: the reply that ``prompts/facets.md`` asks for.

One label assumes that an expert has one role. Facets test that assumption: a model names up to five disjoint kinds
of tokens, and how many of the expert's tokens each covers, and how purely, is measured by scoring each as a label
of its own. The model's word for it is not taken.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated

from pydantic import AfterValidator, create_model

from moe_lens.autointerp.replies import Evidence, Grade, Phrase, ReplySchema, Shape
from moe_lens.errors import BadConfig

MOST = 5


class Facet(Shape):
    """One kind of token. Unlike the one label of an expert, its label cannot be null: leave such a kind out."""

    label: Phrase
    evidence: Evidence
    confidence: Grade


@lru_cache
def facets_schema(most: int) -> ReplySchema:
    """A list of none to `most` facets, each with a label of its own.

    Raises:
        BadConfig: `most` is not between 1 and 5.
    """
    if not 1 <= most <= MOST:
        raise BadConfig(f"facets={most}: ask for 1 to {MOST} facets, or 0 for one label")

    def check(facets: list[Facet]) -> list[Facet]:
        # not in the JSON schema: strict servers know no maxItems
        if len(facets) > most:
            raise ValueError(f"holds {len(facets)} facets, {most} at most were asked for")
        if len({facet.label.casefold() for facet in facets}) < len(facets):
            raise ValueError("holds the same label twice")
        return facets

    shape = create_model("Facets", __base__=Shape, facets=(Annotated[list[Facet], AfterValidator(check)], ...))
    return ReplySchema("facets", shape)
