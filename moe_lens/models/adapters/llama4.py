"""Llama 4: the router's sigmoid scales the *input* of an expert, and every expert runs on every token.

1. The block multiplies the tokens by the gates of all experts, 0 for those not chosen, and hands over
   (expert * token, d_model) rows. A chosen expert's input is `sigmoid(logit) * x`.
2. Two batched products compute all of them; we deliver the rows of chosen experts only.
3. The block adds the experts' rows to the shared expert's output, unweighted.

So the factor on an expert's output, `ExpertTap.weight`, is 1, and the gate is in `activation` and `output`
already. `Routing.weight`, which edits see, is the gate; `ExpertTap.weight` is 0 where an edit set it to 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moe_lens.errors import UnsupportedModel
from moe_lens.models.adapters.base import Adapter, RouterReturn, Shape
from moe_lens.models.rows import ExpertsCall, Rows, sort_rows

if TYPE_CHECKING:
    from moe_lens.models.seam import Session
    from moe_lens.models.sites import Site


class Llama4(Adapter):
    title = "Llama 4"

    def shape(self, experts: Any, block: Any) -> Shape:
        n_parameters = sum(p.numel() for p in experts.parameters())
        n_experts = experts.num_experts
        return Shape(n_experts, block.top_k, experts.expert_dim, n_parameters, n_parameters / n_experts)

    def read_router(self, block: Any, returned: tuple[Tensor, Tensor]) -> RouterReturn:
        scores, logits = returned
        index = logits.topk(block.top_k, dim=1).indices
        return RouterReturn(logits, scores.gather(1, index), index)

    def call(self, experts: Any, args: tuple[Any, ...], session: Session) -> Llama4Call | None:
        if session.router_call is None or session.router_return is None:
            return None
        router = self.read_router(session.site.block, session.router_return)
        return Llama4Call(experts, args[0], session.router_call[0][0], router)

    def run_expert(self, site: Site, x: Tensor, expert: int) -> Tensor:
        """With the gate that the router gives this expert on `x`, chosen or not."""
        assert site.router is not None
        gate = site.router(x)[1][:, expert, None].float().sigmoid().to(x.dtype)
        padded = x.new_zeros(site.n_experts, *x.shape)
        padded[expert] = x * gate
        return site.module(padded.view(-1, x.shape[1])).view(padded.shape)[expert]

    def down_projection(self, experts: Any, expert: int) -> Tensor:
        return experts.down_proj[expert]

    def takes_input(self, site: Site) -> nn.Module:
        assert site.router is not None
        return site.router


class Llama4Call(ExpertsCall):
    """One call of all experts on all tokens, whose inputs the router has scaled: unchosen ones are zero."""

    def __init__(self, experts: Any, scaled: Tensor, hidden: Tensor, router: RouterReturn) -> None:
        self.experts, self.hidden, self.scaled = experts, hidden, scaled
        _, self.weight, self.index = router

    def visit(self, index: Tensor, weight: Tensor) -> tuple[Rows, Tensor]:
        """Rescale the inputs if an edit changed the choice; the factor on outputs is 1, or 0 for a removed visit."""
        n_experts = self.experts.num_experts
        if index is not self.index or weight is not self.weight:
            if (index.sort(dim=1).values.diff(dim=1) == 0).any():
                raise UnsupportedModel(
                    "Llama 4 cannot send a token to one expert twice, which this edit asks for: swap with an expert "
                    "that is not chosen together with it, or use zero"
                )
            gates = weight.new_zeros(len(index), n_experts).scatter(1, index, weight)
            self.scaled = self.hidden.repeat(n_experts, 1) * gates.transpose(0, 1).reshape(-1, 1)
        rows = sort_rows(index.to(self.scaled.device), n_experts, "eager", sentinels=False)
        self.at = rows.expert, rows.token
        return rows, weight[rows.token, rows.slot].ne(0).to(weight.dtype)

    def activate(self) -> Tensor:
        x = self.scaled.view(self.experts.num_experts, -1, self.scaled.shape[-1])
        gate, up = torch.bmm(x, self.experts.gate_up_proj).chunk(2, dim=-1)
        self.activation = up * self.experts.act_fn(gate)
        return self.activation[self.at]

    def project(self, activation: Tensor) -> Tensor:
        self.activation[self.at] = activation.to(self.activation.dtype)
        self.output = torch.bmm(self.activation, self.experts.down_proj)
        return self.output[self.at]

    def combine(self, output: Tensor) -> Tensor:
        self.output[self.at] = output.to(self.output.dtype)
        return self.output.view(-1, output.shape[-1])
