"""DBRX: a loop over experts whose three matrices are stacked in one parameter each, the last one transposed.

Its router module returns logits only; the block makes weights and choice of them. Nothing else is special.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_lens.models.adapters.base import Adapter, RouterReturn, Shape
from moe_lens.models.rows import LoopCall

if TYPE_CHECKING:
    from moe_lens.models.seam import Session
    from moe_lens.models.sites import Site


class Dbrx(Adapter):
    title = "DBRX"

    def shape(self, experts: Any, block: Any) -> Shape:
        n_parameters = sum(p.numel() for p in experts.parameters())
        n_experts = experts.num_experts
        return Shape(n_experts, block.top_k, experts.ffn_hidden_size, n_parameters, n_parameters / n_experts)

    def read_router(self, block: Any, returned: Tensor) -> RouterReturn:
        weight, index = block.route_tokens_to_experts(returned)
        return RouterReturn(returned, weight, index)

    def call(self, experts: Any, args: tuple[Any, ...], session: Session) -> DbrxCall:
        return DbrxCall(experts, *args)

    def run_expert(self, site: Site, x: Tensor, expert: int) -> Tensor:
        index = torch.full((len(x), 1), expert, device=x.device)
        return site.module(x[:, None], index, torch.ones_like(index, dtype=x.dtype))[:, 0]

    def down_projection(self, experts: Any, expert: int) -> Tensor:
        return _matrix(experts, "w2", expert)


class DbrxCall(LoopCall):
    def __init__(self, experts: Any, hidden: Tensor, index: Tensor, weight: Tensor) -> None:
        super().__init__(hidden.reshape(-1, hidden.shape[-1]), index, weight, experts.num_experts)
        self.experts, self.batch = experts, hidden.shape[0]

    def up(self, expert: int, x: Tensor) -> Tensor:
        gate = x.matmul(_matrix(self.experts, "w1", expert).T)
        up = x.matmul(_matrix(self.experts, "v1", expert).T)
        return self.experts.mlp.activation_fn(gate) * up

    def down(self, expert: int, activation: Tensor, x: Tensor) -> Tensor:
        return activation.matmul(_matrix(self.experts, "w2", expert))

    def combine(self, output: Tensor) -> Tensor:
        return super().combine(output).view(self.batch, -1, self.x.shape[-1])


def _matrix(experts: Any, name: str, expert: int) -> Tensor:
    return getattr(experts.mlp, name).view(-1, experts.ffn_hidden_size, experts.hidden_size)[expert]
