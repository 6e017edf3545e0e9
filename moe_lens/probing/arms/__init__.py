"""The arms of the comparison with a dense model, one module each (METRICS 1.3).

===================  ==================================================================================
raw                  the best cell by its own test score: the search and the score share the test data
homogeneous          the best of cells that are all alike: what the search alone makes of chance
held_out             the cell is chosen on validate documents and scored on test documents
equal_random_tokens  as many cells, neurons and tokens in both models
equal_router_tokens  the same, the dense cells on the tokens that the router sends to their partner
routing_only         no neuron at all: a token is taken for positive where it visits the chosen expert
whole_population     what the neuron adds to that, over all tokens
null                 the pipeline on exchanged labels
===================  ==================================================================================

To add an arm, write its module and name it in ``REGISTRY``. An arm says what it keeps of a scanned model
(``collect``) and what it makes of that under a bootstrap of documents (``estimates``). An arm that scores both
models together is no member of ``REGISTRY``: its numbers go to ``compare(joint=...)``. An arm that was not run has
no rows.
"""

from __future__ import annotations

from moe_lens.probing.arms import best_cell, homogeneous, routing_only, whole_population
from moe_lens.probing.arms.base import METRICS, Arm, Estimates, Evidence, ModelScores, Part, Scanned, usable
from moe_lens.probing.arms.best_cell import winner_keys, winners

LADDER = (
    "raw", "homogeneous", "held_out", "equal_random_tokens", "equal_router_tokens", "routing_only",
    "whole_population", "null",
)  # fmt: skip
"""Every arm in the order in which tables and figures show them."""

_ARMS: tuple[Arm, ...] = (
    best_cell.BestCell("raw"),
    homogeneous.Homogeneous(),
    best_cell.BestCell("held_out"),
    routing_only.RoutingOnly(),
    whole_population.WholePopulation(),
)
REGISTRY: dict[str, Arm] = {arm.name: arm for arm in sorted(_ARMS, key=lambda arm: LADDER.index(arm.name))}
"""The arms that score one model at a time."""


def collect(scanned: Scanned) -> dict[str, Evidence]:
    """What the arms keep of a scanned model."""
    found = {name: arm.collect(scanned) for name, arm in REGISTRY.items()}
    return {name: evidence for name, evidence in found.items() if evidence is not None}


__all__ = [
    "LADDER", "METRICS", "REGISTRY", "Arm", "Estimates", "Evidence", "ModelScores", "Part", "Scanned", "collect",
    "usable", "winner_keys", "winners",
]  # fmt: skip
