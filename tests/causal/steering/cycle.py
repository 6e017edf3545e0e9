"""A checkpoint that writes abcdabcd..., one expert for each letter.

After ``a`` E0 writes ``b``, after ``b`` E1 writes ``c``, after ``c`` E2 writes ``d``, after ``d`` E3 writes ``a``. What
the residual stream says without them is the letter after the next. E4 is chosen beside them and writes nothing; E5 is
never chosen and would write ``!`` after anything.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers

from moe_lens.models.lens import Lens
from tests.models import tiny

HUGE = 1e8
LETTERS = "abcd"
ONE, WRITES, BANG = 5, 8, 12
"""Dimensions of the residual stream: always 1; logits of the letters from here on; the logit of ``!``. The first four
say which letter it is."""
NEXT, AFTER_NEXT = 12.0, 7.0
"""Logits."""


def cycle() -> Lens:
    config = transformers.OlmoeConfig(
        vocab_size=tiny.VOCAB, hidden_size=16, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, num_experts=6, num_experts_per_tok=2, norm_topk_prob=True, rms_norm_eps=HUGE,
        max_position_embeddings=64, pad_token_id=256, bos_token_id=257, eos_token_id=258, tie_word_embeddings=False,
    )  # fmt: skip
    model: Any = transformers.OlmoeForCausalLM(config).eval()
    vocabulary = tiny.tokenizer().get_vocab()
    layer = model.model.layers[0]
    router, experts = layer.mlp.gate.weight, layer.mlp.experts
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for norm in (layer.post_attention_layernorm, model.model.norm):
            norm.weight.fill_(math.sqrt(HUGE))
        model.model.embed_tokens.weight[:, ONE] = 1
        router[4, ONE], router[5, ONE] = 2, -4
        for kind, letter in enumerate(LETTERS):
            model.model.embed_tokens.weight[vocabulary[letter], kind] = 1
            router[kind, kind] = 4
            experts.gate_up_proj[kind, 0, kind] = 4  # fires at its letter alone
            experts.gate_up_proj[kind, 4, ONE] = 1
            experts.down_proj[kind, WRITES + (kind + 1) % 4, 0] = NEXT / 4
            model.lm_head.weight[vocabulary[letter], WRITES + kind] = 1
            model.lm_head.weight[vocabulary[letter], (kind - 2) % 4] = AFTER_NEXT
        experts.gate_up_proj[5, 0, ONE], experts.gate_up_proj[5, 4, ONE] = 4, 1
        experts.down_proj[5, BANG, 0] = NEXT / 2
        model.lm_head.weight[vocabulary["!"], BANG] = 1
    return Lens(model, tiny.tokenizer(), name="cycle")
