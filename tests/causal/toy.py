"""One-layer models whose writes are logits, set by hand: the worked toy of METRICS 2.3 and its relatives.

Dimensions 0 and 1 of the residual stream are 1 for every token and feed the router and the experts; what experts
write to dimensions 2 and 3 is the logits of tokens 0 and 1. Norms divide by a huge constant and multiply it back,
so they leave their input alone to 1e-8; all other tokens have a logit of -60.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import transformers

from moe_lens.models.lens import Lens
from tests.causal.small import tokenized_of

P = (0.5, 0.3, 0.2)
F = ((2.0, 0.0), (0.0, 1.0), (4.0, 0.0))
HUGE = 1e8
TEXT = tokenized_of([[2, 0]])
"""One prediction: after token 2 comes token 0."""


def toy(*, renorm: bool = False, top_k: int = 2, p: Sequence[float] = P, f: Sequence[Sequence[float]] = F) -> Lens:
    """Router probabilities `p` and expert outputs `f`, the same at every token."""
    config = transformers.OlmoeConfig(
        vocab_size=4, hidden_size=4, intermediate_size=1, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, num_experts=len(p), num_experts_per_tok=top_k, norm_topk_prob=renorm,
        rms_norm_eps=HUGE, pad_token_id=3, tie_word_embeddings=False, eos_token_id=None,
    )  # fmt: skip
    model: Any = transformers.OlmoeForCausalLM(config).double().eval()
    model.set_experts_implementation("eager")  # grouped_mm needs rows of 16 bytes
    layer = model.model.layers[0]
    one = torch.nn.functional.silu(torch.tensor(1.0, dtype=torch.float64))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight[:, :2] = 1
        for norm in (layer.post_attention_layernorm, model.model.norm):
            norm.weight.fill_(math.sqrt(HUGE))
        layer.mlp.gate.weight[:, 0] = torch.tensor([math.log(value) for value in p])
        layer.mlp.experts.gate_up_proj[:, 0, 0] = 1  # silu(1) ...
        layer.mlp.experts.gate_up_proj[:, 1, 0] = 1 / one  # ... times up = 1
        layer.mlp.experts.down_proj[:, 2:, 0] = torch.tensor(f, dtype=torch.float64)
        model.lm_head.weight[:2, 2:] = torch.eye(2, dtype=torch.float64)
        model.lm_head.weight[2:, 0] = -60
    return Lens(model, None)
