"""JetMoe: MLP experts as two stacks of linear layers over rows that the router has sorted.

The block adds one bias per layer after the experts: its output is the weighted sum of expert outputs plus
`block.bias`. JetMoe's attention is a mixture of experts too; those experts are not tapped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_lens.models.adapters.base import Adapter, RouterReturn, Shape
from moe_lens.models.rows import ExpertsCall, Rows, sort_rows

if TYPE_CHECKING:
    from moe_lens.models.seam import Session
    from moe_lens.models.sites import Site


class JetMoe(Adapter):
    title = "JetMoe"

    def shape(self, experts: Any, block: Any) -> Shape:
        n_parameters = experts.input_linear.weight.numel() + experts.output_linear.weight.numel()
        n_experts = experts.router.num_experts
        return Shape(n_experts, experts.router.top_k, experts.hidden_size, n_parameters, n_parameters / n_experts)

    def read_router(self, block: Any, returned: tuple[Any, ...]) -> RouterReturn:
        order, _, gates, sizes, logits = returned
        expert = torch.arange(len(sizes), device=order.device).repeat_interleave(
            torch.tensor(sizes, device=order.device)
        )
        index = torch.empty_like(expert).index_copy(0, order, expert)
        weight = torch.empty_like(gates).index_copy(0, order, gates)
        return RouterReturn(logits, weight.view(len(logits), -1), index.view(len(logits), -1))

    def call(self, experts: Any, args: tuple[Any, ...], session: Session) -> JetMoeCall:
        return JetMoeCall(self, experts, *args)

    def run_expert(self, site: Site, x: Tensor, expert: int) -> Tensor:
        sizes = [len(x) if e == expert else 0 for e in range(site.n_experts)]
        return _down(site.module, _up(site.module, x, sizes), sizes)

    def down_projection(self, experts: Any, expert: int) -> Tensor:
        return experts.output_linear.weight[expert]


def idle_in_attention(module: Any) -> int:
    """Parameters of JetMoe's attention experts that one token does not use; 0 for other modules."""
    if type(module).__name__ != "JetMoeMoA":
        return 0
    n_parameters = module.input_linear.weight.numel() + module.output_linear.weight.numel()
    return (module.num_experts - module.top_k) * n_parameters // module.num_experts


class JetMoeCall(ExpertsCall):
    def __init__(self, adapter: JetMoe, block: Any, hidden: Tensor) -> None:
        self.block, self.hidden = block, hidden
        self.x = hidden.reshape(-1, hidden.shape[-1])
        _, self.weight, self.index = adapter.read_router(block, block.router(self.x))

    def visit(self, index: Tensor, weight: Tensor) -> tuple[Rows, Tensor]:
        self.rows = sort_rows(index, self.block.router.num_experts, "grouped_mm", sentinels=False)
        self.sizes = self.rows.offsets.diff().tolist()
        self.factor = weight[self.rows.token, self.rows.slot]
        return self.rows, self.factor

    def activate(self) -> Tensor:
        return _up(self.block, self.x[self.rows.token], self.sizes)

    def project(self, activation: Tensor) -> Tensor:
        return _down(self.block, activation, self.sizes)

    def combine(self, output: Tensor) -> Tensor:
        weighted = output * self.factor[:, None]
        total = weighted.new_zeros(self.x.shape).index_add(0, self.rows.token, weighted)
        return total.view(self.hidden.shape) + self.block.bias


def _up(block: Any, x: Tensor, sizes: list[int]) -> Tensor:
    gate, up = block.input_linear(x, sizes).chunk(2, dim=-1)
    return block.activation(gate) * up


def _down(block: Any, activation: Tensor, sizes: list[int]) -> Tensor:
    return block.output_linear(activation, sizes)
