"""What a trigger-target experiment would take, from the cases, the tokenizer and the config alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_lens.causal.triggers.cases import Located, count_defects
from moe_lens.causal.triggers.direct import MATCHED
from moe_lens.causal.triggers.measure import BESIDE, OTHER_TARGETS

if TYPE_CHECKING:
    from moe_lens.models.spec import Spec


@dataclass(frozen=True)
class TriggerPlan:
    """Cases, and forward passes over texts and windows. Whether an expert is chosen at a trigger takes the model."""

    model: str
    n_experts: int
    n_cases: int
    n_used: int
    defects: dict[str, int]
    layers: tuple[int, ...]
    texts: int
    """Texts that run through the clean model one by one."""
    windows: int
    """At most: the windows that are ablated, with their controls, each once a pass."""
    tokens: int
    """Of all windows, at most."""
    passes: int
    """Ablated passes, over all layers and modes, at most."""

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "layers": list(self.layers)}


def plan_triggers(located: Sequence[Located], spec: Spec, modes: Sequence[str]) -> TriggerPlan:
    """Count cases, defects and passes."""
    used = [one for one in located if one.used]
    layers = tuple(sorted({one.case.expert.layer for one in used}))
    entries = [spec.at(layer) for layer in layers]
    passes = sum(min(entry.top_k, BESIDE + 1) for entry in entries if entry is not None) * len(modes)
    per_case = [1 + MATCHED + OTHER_TARGETS + (one.gap > 0) for one in used]
    tokens = sum((one.place + 2) * n for one, n in zip(used, per_case, strict=True))
    return TriggerPlan(
        spec.name, len({one.case.expert for one in located}), len(located), len(used), count_defects(located), layers,
        len(used), sum(per_case), tokens, passes,
    )  # fmt: skip
