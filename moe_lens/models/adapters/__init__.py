"""Families whose experts transformers does not dispatch: one file and one entry each.

While a model is tapped, the `forward` of its experts modules is replaced by one that gives the seam an
`ExpertsCall`, which computes what the family's own code computes, with its operations in its order.
"""

from __future__ import annotations

from torch import nn

from moe_lens.models.adapters.base import Adapter, RouterReturn, Shape
from moe_lens.models.adapters.dbrx import Dbrx
from moe_lens.models.adapters.jetmoe import JetMoe, idle_in_attention
from moe_lens.models.adapters.llama4 import Llama4
from moe_lens.models.adapters.longcat_flash import LongcatFlash

ADAPTERS: dict[str, Adapter] = {
    "DbrxExperts": Dbrx(),
    "JetMoeMoE": JetMoe(),
    "Llama4TextExperts": Llama4(),
    "LongcatFlashExperts": LongcatFlash(),
}
"""Class of the module whose `forward` is replaced -> how its family computes."""


def adapter_of(module: nn.Module) -> Adapter | None:
    """The adapter for an experts module, None if it needs none or there is none."""
    return ADAPTERS.get(type(module).__name__)


__all__ = ["ADAPTERS", "Adapter", "RouterReturn", "Shape", "adapter_of", "idle_in_attention"]
