"""The pair: an `OlmoeForCausalLM` and its dense twin, a fast experts loop for training, and the router losses.

The twin is the same class with one expert and top-1: its router weight is exactly 1, so it is a dense model
with the same attention, QK-norm and active FFN width (``top_k * d_ff``).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from moe_lens.organisms.tokenizer import END_ID, PAD_ID

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import OlmoeForCausalLM

EXPERTS_IMPLEMENTATION = "organisms_sorted"


@dataclass(frozen=True)
class Architecture:
    """Shape of one model of the pair."""

    d_model: int = 192
    n_layers: int = 4
    n_heads: int = 6
    vocab_size: int = 4096
    n_experts: int = 16
    top_k: int = 2
    d_ff: int = 128
    """Of one expert."""
    max_positions: int = 256

    @property
    def active_width(self) -> int:
        """FFN neurons that one token passes through in one layer."""
        return self.top_k * self.d_ff

    def dense_twin(self) -> Architecture:
        """One expert as wide as the MoE's active width."""
        return replace(self, n_experts=1, top_k=1, d_ff=self.active_width)


def sorted_experts(module: Any, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Experts as one matmul each over rows sorted by expert.

    ``unbind`` makes the backward one stack; indexing the fused parameter per expert would write a full-size
    zero gradient for each of them (as would ``chunk`` for the two halves of ``gate_up``).
    """
    top_k = indices.shape[-1]
    flat = indices.reshape(-1)
    order = flat.argsort(stable=True)
    row = order if top_k == 1 else torch.div(order, top_k, rounding_mode="floor")
    counts = torch.bincount(flat, minlength=module.num_experts).tolist()
    gate_up, down = module.gate_up_proj.unbind(0), module.down_proj.unbind(0)
    if module.num_experts == 1:
        gate, up = F.linear(hidden, gate_up[0]).unflatten(-1, (2, -1)).unbind(-2)
        return F.linear(F.silu(gate) * up, down[0]) * weights
    outputs = []
    for expert, rows in enumerate(hidden.index_select(0, row).split(counts)):
        if rows.shape[0]:
            gate, up = F.linear(rows, gate_up[expert]).unflatten(-1, (2, -1)).unbind(-2)
            outputs.append(F.linear(F.silu(gate) * up, down[expert]))
    weighted = torch.cat(outputs) * weights.reshape(-1)[order].unsqueeze(-1)
    return torch.zeros_like(hidden).index_add_(0, row, weighted.to(hidden.dtype))


def register_experts() -> None:
    """Make `sorted_experts` selectable in transformers; idempotent."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, sorted_experts)


def build_model(architecture: Architecture, seed: int) -> OlmoeForCausalLM:
    """A fresh model. Every matrix is drawn from its own name's seed, so the parts that MoE and twin share are equal."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    register_experts()
    a = architecture
    config = OlmoeConfig(
        vocab_size=a.vocab_size,
        hidden_size=a.d_model,
        intermediate_size=a.d_ff,
        num_hidden_layers=a.n_layers,
        num_attention_heads=a.n_heads,
        num_key_value_heads=a.n_heads,
        max_position_embeddings=a.max_positions,
        num_experts=a.n_experts,
        num_experts_per_tok=a.top_k,
        norm_topk_prob=False,
        tie_word_embeddings=True,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
        router_aux_loss_coef=0.01,
    )
    model = OlmoeForCausalLM(config)
    model.config._experts_implementation = EXPERTS_IMPLEMENTATION
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
                parameter.normal_(0.0, 0.02, generator=generator)
    return model


def expert_fractions(router_logits: Tensor, top_k: int) -> Tensor:
    """Share of the routed (token, expert) pairs that each expert gets; sums to 1."""
    chosen = router_logits.topk(top_k, dim=-1).indices
    counts = torch.bincount(chosen.reshape(-1), minlength=router_logits.shape[-1])
    return counts.to(torch.float32) / chosen.numel()


def balance_loss(router_logits: Tensor, fractions: Tensor) -> Tensor:
    """Switch load-balance loss of ONE layer: ``E * sum_e fraction_e * mean_probability_e``; 1 when uniform."""
    probabilities = router_logits.float().softmax(-1).mean(0)
    return router_logits.shape[-1] * (fractions * probabilities).sum()


def z_loss(router_logits: Tensor) -> Tensor:
    """Mean squared log-partition of one layer's router."""
    return router_logits.float().logsumexp(-1).square().mean()


class Balance:
    """The router losses of all layers, each layer on its own, and the mean load since the last `take_load`.

    The fractions are those of the current batch. A running mean over batches would ask for balance of the corpus
    rather than of every batch, but at this learning rate the lag makes the router swing: each batch overloads
    another few experts while the mean looks balanced (seen with a mean over about 20 batches).
    """

    def __init__(self, n_layers: int, n_experts: int) -> None:
        self._sum = torch.zeros(n_layers, n_experts)
        self._batches = 0

    def losses(self, router_logits: Sequence[Tensor], top_k: int) -> tuple[Tensor, Tensor]:
        """Sum over layers of the balance loss and of the z loss."""
        fractions = torch.stack([expert_fractions(logits.detach(), top_k) for logits in router_logits])
        self._sum += fractions
        self._batches += 1
        balance = torch.stack([balance_loss(logits, f) for logits, f in zip(router_logits, fractions, strict=True)])
        return balance.sum(), torch.stack([z_loss(logits) for logits in router_logits]).sum()

    def take_load(self) -> Tensor:
        """Mean load since the last call, [layer, expert] in multiples of the uniform share."""
        load = self._sum / max(self._batches, 1) * self._sum.shape[1]
        self._sum, self._batches = torch.zeros_like(self._sum), 0
        return load
