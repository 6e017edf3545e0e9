"""What is on trial: labels as claims, checked, and what a judge said of each (`Case`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from moe_lens.corpus.concepts import Concept, concepts_for
from moe_lens.errors import BadConcept, BadConfig
from moe_lens.types import ExpertAddress, Status

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jaxtyping import Float, Int8
    from numpy import ndarray

    from moe_lens.corpus.batches import Tokenized
    from moe_lens.models.lens import Lens

REAL = "real"
KEY = ["layer", "expert", "facet"]


@dataclass(frozen=True, eq=False)
class Claim:
    """That a label says where an expert is visited and needed. A concept judges it, or else a rule, or a `Judge`."""

    kind: str
    expert: ExpertAddress
    facet: int
    label: str
    rule: str | None = None
    concept: Concept | None = None

    @property
    def owner(self) -> str:
        """For messages."""
        return f"{self.expert}-facet-{self.facet}" if self.facet else f"{self.expert}"

    @property
    def judged_by(self) -> str:
        """``concept:NAME``, ``rule`` or ``none``."""
        if self.concept is not None:
            return f"concept:{self.concept.name}"
        return "none" if self.rule is None else "rule"


@dataclass(frozen=True, eq=False)
class Case:
    """A label on trial, with what the judge says at every prediction under test."""

    kind: str
    expert: ExpertAddress
    facet: int
    label: str
    z: Int8[ndarray, "prediction"]
    """1, 0, -1 where the judge abstains, -2 where it was not asked."""
    judge: str = "rule"
    weight: Float[ndarray, "prediction"] | None = None
    """Predictions that each one asked about stands for, 0 where the judge was not asked; None means 1 everywhere."""
    grade: Float[ndarray, "prediction"] | None = None
    """0 to 4, NaN where there is none; None for rules and concepts."""
    kappa: float = np.nan
    """Agreement with a second judge (Cohen)."""


def read_claims(
    lens: Lens,
    labels: pd.DataFrame,
    *,
    kind: str = REAL,
    experts: Sequence[str | ExpertAddress] | None = None,
) -> pd.DataFrame:
    """Rows with a label, of the experts asked for, checked and sorted, with all columns that `claims_of` reads.

    Raises:
        BadConfig: a column is missing, two rows for one label, an empty label, an expert of a dense layer, no row.
        OutOfRange: an expert that the model does not have.
    """
    whose = "the labels" if kind == REAL else f"the null labels {kind!r}"
    missing = [name for name in ("layer", "expert", "label") if name not in labels]
    if missing:
        raise BadConfig(f"{whose} have no column {missing[0]!r}: give layer, expert, label and rule")
    for name in ("layer", "expert"):
        number = pd.to_numeric(labels[name], errors="coerce")
        if len(wrong := labels[name][number.isna() | (number % 1 != 0)]):
            raise BadConfig(f"{whose} have a {name} {wrong.iloc[0]!r}: give whole numbers")
    defaults = (("facet", 0), ("rule", None), ("concept", None))
    table = labels.assign(**{name: value for name, value in defaults if name not in labels})
    if "status" in table:
        table = table[table["status"] == str(Status.OK)]
    if experts is not None:
        wanted = {lens.address(e) for e in experts}
        keep = [ExpertAddress(int(a), int(b)) in wanted for a, b in zip(table["layer"], table["expert"], strict=True)]
        table = table[keep]
    if not len(table) and kind == REAL:
        raise BadConfig("there is no label to put on trial: give rows with a label, of the experts asked for")
    for layer, expert, label in table[["layer", "expert", "label"]].itertuples(index=False, name=None):
        at = lens.address(ExpertAddress(int(layer), int(expert)))
        if at.layer not in lens.spec.moe_layers:
            raise BadConfig(f"{at} is a dense layer that every token visits: try labels of experts of MoE layers")
        if not isinstance(label, str) or not label.strip():
            raise BadConfig(f"the label of {at} is empty: write one or take the row out")
    twice = table[table.duplicated(KEY)]
    if len(twice):
        at = ExpertAddress(int(twice["layer"].iloc[0]), int(twice["expert"].iloc[0]))
        raise BadConfig(f"there are two labels for {at}: keep one, or number them in a column facet (1, 2, ...)")
    return table.sort_values(KEY, ignore_index=True)


def claims_of(table: pd.DataFrame, tokenized: Tokenized, *, kind: str = REAL) -> list[Claim]:
    """The rows of `read_claims` as claims.

    Raises:
        UnknownConcept, BadConcept: the column ``concept`` names nothing, several, or what this corpus cannot label.
    """
    known = {one.name: one for one in tokenized.concepts}
    out = []
    for row in table.to_dict("records"):
        expert = ExpertAddress(int(row["layer"]), int(row["expert"]))
        rule = row["rule"] if isinstance(row["rule"], str) and row["rule"] else None
        found = _concept(row["concept"], expert, tokenized, known)
        out.append(Claim(kind, expert, int(row["facet"]), row["label"], rule, found))
    return out


def _concept(value: Any, expert: ExpertAddress, tokenized: Tokenized, known: Mapping[str, Concept]) -> Concept | None:
    if value is None or (isinstance(value, float) and np.isnan(value)) or value == "":
        return None
    if isinstance(value, str) and value in known:
        return known[value]
    found = concepts_for(tokenized.corpus, value)
    if len(found) != 1:
        names = ", ".join(one.name for one in found[:4])
        raise BadConcept(f"the concept {value!r} of {expert} stands for {len(found)} ({names}, ...): name one of them")
    return found[0]
