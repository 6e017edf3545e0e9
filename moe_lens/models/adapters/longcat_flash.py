"""LongCat-Flash: a loop over experts, the last of which return their input (zero-computation experts).

They are experts like the others here: they have addresses, rows, weights and an output, which is the token's
own vector, so that the weighted sum of outputs is the block's output and an ablation takes away what they
write. They have no neurons, so their `activation` is zero, and an edit of it does nothing.

transformers (5.23) allocates up-projections for them too, which nothing reads; `Spec.total_parameters` counts
those. `active_parameters` assumes that visits spread evenly over all experts, as the paper reports.

The two dense FFNs beside the MoE block of each layer (`mlps`) are not tapped. `layer` counts decoder layers,
each of which holds two attention parts (`num_layers`, not `num_hidden_layers`, of the config).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_lens.models.adapters.base import Adapter, RouterReturn, Shape
from moe_lens.models.rows import LoopCall

if TYPE_CHECKING:
    from moe_lens.models.seam import Session
    from moe_lens.models.sites import Site


class LongcatFlash(Adapter):
    title = "LongCat-Flash"

    def shape(self, experts: Any, block: Any) -> Shape:
        n_parameters = sum(p.numel() for p in experts.parameters())
        share = experts.num_routed_experts / experts.total_experts  # of visits, if they are spread evenly
        each = 3 * experts.hidden_size * experts.intermediate_size
        top_k = block.router.top_k
        return Shape(experts.total_experts, top_k, experts.intermediate_size, n_parameters, share * each)

    def read_router(self, block: Any, returned: tuple[Tensor, Tensor, Tensor]) -> RouterReturn:
        return RouterReturn(*returned)

    def call(self, experts: Any, args: tuple[Any, ...], session: Session) -> LongcatFlashCall:
        return LongcatFlashCall(experts, *args)

    def run_expert(self, site: Site, x: Tensor, expert: int) -> Tensor:
        index = torch.full((len(x), 2), expert, device=x.device)  # its loop cannot take one slot
        return site.module(x, index, x.new_tensor([1, 0]).expand(len(x), 2))

    def down_projection(self, experts: Any, expert: int) -> Tensor:
        return experts.down_proj[expert]


class LongcatFlashCall(LoopCall):
    def __init__(self, experts: Any, x: Tensor, index: Tensor, weight: Tensor) -> None:
        super().__init__(x, index, weight, experts.total_experts)
        self.experts = experts

    def up(self, expert: int, x: Tensor) -> Tensor:
        if expert >= self.experts.num_routed_experts:
            return x.new_zeros(len(x), self.experts.intermediate_size)
        gate, up = F.linear(x, self.experts.gate_up_proj[expert]).chunk(2, dim=-1)
        return self.experts.act_fn(gate) * up

    def down(self, expert: int, activation: Tensor, x: Tensor) -> Tensor:
        if expert >= self.experts.num_routed_experts:
            return x
        return F.linear(activation, self.experts.down_proj[expert])
