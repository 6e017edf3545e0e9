"""One verdict per label, by a rule that is read from the top (METRICS 3, "The verdict")."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from moe_lens.causal.trial.cells import Interval
from moe_lens.stats import benjamini_hochberg, wilson_interval

if TYPE_CHECKING:
    from moe_lens.causal.trial.need import Need

VERDICT_MODES = ("zero", "mean_off")
"""Both must agree. Modes that keep the constant part of what an expert writes have no vote (METRICS 2.3)."""
DELTA = 0.02
"""Nats per token from which an expert counts as needed."""
MIN_DOCUMENTS, MIN_VISITS, MAX_ABSTAINED = 30, 200, 0.2
MIN_DOCUMENTS_BOTH = 10
"""With (z=1, r=1), for support."""
ROUTING = 0.55
"""Routing AUROC that a label must lie above, or below to be refuted."""
ALPHA = 0.05


class Verdict(StrEnum):
    SUPPORTED = "supported"
    ROUTING_ONLY = "routing-only"
    REFUTED = "refuted"
    UNDERPOWERED = "underpowered"
    UNDECIDED = "undecided"


class Exclusive(StrEnum):
    """Whether the expert is needed more where its label holds than at its other tokens."""

    EXCLUSIVE = "exclusive"
    BY_ROUTING = "by routing"
    """Too few documents in which it is visited elsewhere."""
    NOT_EXCLUSIVE = "not exclusive"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Evidence:
    """What the text and the judge can show about one label at all."""

    documents_z1: int
    documents_r1: int
    visits: int
    """Tokens routed to the expert."""
    abstained: float
    """Share of positions that the judge did not judge."""
    routing: Interval
    """AUROC of the label for the routing."""

    @property
    def is_powered(self) -> bool:
        enough_documents = min(self.documents_z1, self.documents_r1) >= MIN_DOCUMENTS
        return enough_documents and self.visits >= MIN_VISITS and self.abstained <= MAX_ABSTAINED


def q_values(p: Sequence[float], powered: Sequence[bool]) -> list[float]:
    """Benjamini-Hochberg over the powered labels of one mode; NaN for the others."""
    return benjamini_hochberg(np.where(powered, p, np.nan)).tolist()


def verdict(evidence: Evidence, needs: Sequence[Need], q: Sequence[float], *, delta: float = DELTA) -> Verdict:
    """The rule, in its order.

    Beside METRICS 3 it asks for the effect itself: nothing is ``supported`` whose removal does not surely cost
    something at its label's tokens, and nothing is ``routing-only`` whose removal surely costs more than `delta` in
    both modes, even if another expert at such a gate would cost as much.

    Args:
        needs: under `VERDICT_MODES`, with their q-values.
        delta: nats; at least the noise floor of the clean passes.

    ``refuted`` is about the routing claim alone: a label can hold of tokens that an expert serves in other ways.
    ``supported`` says that the model is worse without the expert where the label holds, not that the words of the
    label are the right ones: see the null labels.
    """
    if not evidence.is_powered:
        return Verdict.UNDERPOWERED
    if evidence.routing.high < ROUTING:
        return Verdict.REFUTED
    routed = evidence.routing.low > ROUTING
    found = zip(needs, q, strict=True)
    if routed and all(is_needed(need, at, delta) for need, at in found):
        return Verdict.SUPPORTED
    costs = all(need.effect.low > delta for need in needs)
    if routed and not costs and all(need.need.high < delta for need in needs):
        return Verdict.ROUTING_ONLY
    return Verdict.UNDECIDED


def is_needed(need: Need, q: float, delta: float) -> bool:
    """Whether a label passes in one mode."""
    found = need.need
    more = found.value > delta and found.low > 0 and q < ALPHA
    return more and need.effect.low > 0 and need.documents >= MIN_DOCUMENTS_BOTH


def exclusive(needs: Sequence[Need], *, delta: float = DELTA) -> Exclusive:
    """The word beside ``supported``: all modes must agree on it."""
    found = [need.exclusivity for need in needs]
    if any(np.isnan(x.value) for x in found):
        return Exclusive.BY_ROUTING
    if all(x.low > 0 for x in found):
        return Exclusive.EXCLUSIVE
    return Exclusive.NOT_EXCLUSIVE if all(x.high < delta for x in found) else Exclusive.UNKNOWN


def shares(verdicts: Iterable[str]) -> pd.DataFrame:
    """Labels by verdict: ``verdict, n, share, low, high`` (Wilson, 95 %) over all labels, underpowered ones too.

    Labels are taken as independent. Those of one model and text are not quite, so the intervals are a little narrow.
    """
    given = [str(v) for v in verdicts]
    n = np.array([given.count(str(v)) for v in Verdict])
    low, high = wilson_interval(n, np.full(len(n), len(given)))
    share = n / max(len(given), 1)
    return pd.DataFrame({"verdict": [str(v) for v in Verdict], "n": n, "share": share, "low": low, "high": high})
