"""What model families call things, and the few quirks that module structure does not reveal.

No maths of any family lives here: the experts modules describe themselves (see `seam`). A new family
that needs an entry touches this file and one test.
"""

from __future__ import annotations

from typing import Any

ROUTER_ATTRIBUTES = ("gate", "router")
"""Attribute of the MoE block (or decoder layer) that holds the router."""

SHARED_ATTRIBUTES = ("shared_expert", "shared_experts", "shared_mlp")
"""Attribute of the MoE block or decoder layer that holds the always-on expert."""

SHARED_GATE_ATTRIBUTES = ("shared_expert_gate",)
"""Linear layer whose sigmoid scales the shared expert (Qwen2-MoE, Qwen3-Next)."""

TOP_K_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")
N_LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
D_MODEL_KEYS = ("hidden_size", "n_embd", "d_model")
MAX_POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len")

PROBABILITY_ROUTERS = frozenset({"Gemma4TextRouter", "DiffusionGemmaTextRouter"})
"""Router classes whose first output holds probabilities; their logarithm is the logits up to a constant."""

UNDECORATED = {
    "llama4": "Llama 4", "llama4_text": "Llama 4", "dbrx": "DBRX", "jetmoe": "JetMoe", "doge": "Doge",
    "longcat_flash": "LongCat-Flash", "step3p7": "Step 3.7", "switch_transformers": "Switch Transformers",
    "nllb-moe": "NLLB-MoE",
}  # fmt: skip
"""Families whose experts transformers does not dispatch through its registry."""

HUB_ALIASES = {"allenai/OLMoE-1B-7B": "allenai/OLMoE-1B-7B-0125"}
"""Names that people write, and the repository that exists."""

BASELINES = {
    "olmoe": "allenai/OLMo-1B-0724-hf",
    "flex_olmo": "allenai/OLMo-2-1124-7B",
    "mixtral": "mistralai/Mistral-7B-v0.1",
    "qwen2_moe": "Qwen/Qwen1.5-1.8B",
    "qwen3_moe": "Qwen/Qwen3-4B-Base",
    "qwen3_next": "Qwen/Qwen3-4B-Base",
    "granitemoe": "ibm-granite/granite-3.0-2b-base",
    "granitemoeshared": "ibm-granite/granite-3.0-2b-base",
    "deepseek_v2": "deepseek-ai/deepseek-llm-7b-base",
    "deepseek_v3": "deepseek-ai/deepseek-llm-7b-base",
    "phimoe": "microsoft/Phi-3.5-mini-instruct",
    "ernie4_5_moe": "baidu/ERNIE-4.5-0.3B-PT",
    "llama4": "meta-llama/Llama-3.1-8B",
    "gpt_oss": "Qwen/Qwen3-4B-Base",
}
"""A dense model of similar data or active size for ``--baseline``: a suggestion, never a matched control."""


def first_key(config: Any, keys: tuple[str, ...]) -> int | None:
    """The first of `keys` that `config` sets to a number; a per-layer list gives its maximum."""
    for key in keys:
        value = getattr(config, key, None)
        if isinstance(value, (list, tuple)) and value:
            value = max(value)
        if isinstance(value, int):
            return value
    return None


def text_config(config: Any) -> Any:
    """The language model's part of a multimodal config, `config` itself otherwise."""
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def residual_scale(config: Any) -> float:
    """Factor on a block's output before the residual sum (Granite's `residual_multiplier`)."""
    return float(getattr(text_config(config), "residual_multiplier", 1.0) or 1.0)


def logit_divisor(config: Any) -> float:
    """Divisor of the logits (Granite's `logits_scaling`)."""
    return float(getattr(text_config(config), "logits_scaling", 1.0) or 1.0)


POST_FFN_NORMS = ("post_feedforward_layernorm", "post_mlp_layernorm")
"""Norm on the feed-forward output before the residual sum (OLMo-2, FlexOlmo, Gemma-2, GLM-4)."""
