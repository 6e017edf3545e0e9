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

PARALLEL_ATTRIBUTES = ("mlp",)
"""FFN that every token visits in a decoder layer that holds router and experts itself (Gemma 4)."""

MIXER_WORDS = ("attn", "attention", "mamba", "deltanet", "shortconv", "recurrentblock")
"""Modules that mix tokens: their projections look like an FFN (Jamba's Mamba, Nemotron-H's attention)."""

TOP_K_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")
N_LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
D_MODEL_KEYS = ("hidden_size", "n_embd", "d_model")
MAX_POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len")

PROBABILITY_ROUTERS = frozenset({"Gemma4TextRouter", "DiffusionGemmaTextRouter"})
"""Router classes whose first output holds probabilities; their logarithm is the logits up to a constant."""

IN_PLACE_BLOCKS = frozenset({"Llama4TextMoe"})
"""MoE blocks that add the routed experts to the shared expert's output in place."""

UNSUPPORTED = {
    "doge": "Doge's experts are single rows of an embedding table, thousands of them, without neurons of their own to "
    "look into: choose a family whose experts are feed-forward networks, such as OLMoE",
    "nllb-moe": "NLLB-MoE is an encoder-decoder, not a causal language model: choose a decoder-only MoE such as OLMoE",
    "step3p7": "transformers has no causal language model of Step 3.7, only the multimodal whole, whose experts it "
    "does not dispatch: choose another family, such as Qwen3 MoE",
    "switch_transformers": "Switch Transformers is an encoder-decoder, not a causal language model: choose a "
    "decoder-only MoE such as OLMoE",
}
"""model_type -> why a family cannot be looked into and what to do. `adapters` holds the undecorated ones that can."""

EAGER_SUMS_IN_WEIGHT_DTYPE = frozenset({"NemotronHExperts", "Inkling2Experts"})
"""Experts classes whose eager loop sums in the dtype of the router's weights, not of the hidden states."""

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
    "llama4_text": "meta-llama/Llama-3.1-8B",
    "gpt_oss": "Qwen/Qwen3-4B-Base",
}
"""A dense model of similar data or active size for ``--baseline``: a suggestion, never a matched control."""


DENSE_PARAMETERS = {
    "allenai/OLMo-1B-0724-hf": 1.28e9,
    "allenai/OLMo-2-1124-7B": 7.3e9,
    "mistralai/Mistral-7B-v0.1": 7.24e9,
    "Qwen/Qwen1.5-1.8B": 1.84e9,
    "Qwen/Qwen3-4B-Base": 4.02e9,
    "ibm-granite/granite-3.0-2b-base": 2.63e9,
    "deepseek-ai/deepseek-llm-7b-base": 6.91e9,
    "microsoft/Phi-3.5-mini-instruct": 3.82e9,
    "baidu/ERNIE-4.5-0.3B-PT": 0.36e9,
    "meta-llama/Llama-3.1-8B": 8.03e9,
}
"""Parameters of `BASELINES`, rounded, embeddings included."""


def first_key(config: Any, keys: tuple[str, ...]) -> int | None:
    """The first of `keys` that `config` sets to a number; a per-layer list gives its maximum."""
    for key in keys:
        value = getattr(config, key, None)
        if isinstance(value, (list, tuple)) and value:
            value = max(value)
        if isinstance(value, int):
            return value
    return None


def refusal(config: Any) -> str | None:
    """Why a model of this config cannot be looked into, None if nothing is known against it."""
    if getattr(config, "is_moe", None) is False:  # a dense Doge
        return None
    return UNSUPPORTED.get(getattr(config, "model_type", ""))


def n_layers(config: Any) -> int | None:
    """Decoder layers; the `num_hidden_layers` of LongCat-Flash are attention parts, two to a layer."""
    is_longcat = getattr(config, "model_type", "") == "longcat_flash"
    return first_key(config, ("num_layers",) if is_longcat else N_LAYER_KEYS)


def text_config(config: Any) -> Any:
    """The language model's part of a multimodal config, `config` itself otherwise."""
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def block_scale(block: Any) -> float:
    """Factor that an MoE block applies to the weighted sum of its routed experts.

    Most families put `routed_scaling_factor` into the router's weights; a block that holds the factor itself
    applies it to the sum. Command A averages routed and shared experts.
    """
    scale = getattr(block, "routed_scaling_factor", 1.0)
    return shared_scale(block) * (float(scale) if isinstance(scale, (int, float)) else 1.0)


def shared_scale(block: Any) -> float:
    """Factor that an MoE block applies to its shared expert."""
    averages = getattr(block, "shared_expert_combination_strategy", "sum") == "average"
    return 0.5 if averages and getattr(block, "num_shared_experts", 0) else 1.0


_HYPER = "keeps several residual streams and mixes them in every layer"
_INDIRECT_WRITES = {
    "axk1": "normalises what its experts and shared expert write together",
    "beam": "rescales the residual stream at every write",
    "deepseek_v4": _HYPER,
    "gemma4_text": "normalises the experts' output apart from the dense FFN beside them, and scales every layer",
    "hy_v4": _HYPER,
    "inkling_text": "convolves the experts' output over tokens",
    "inkling2_text": "convolves the experts' output over tokens",
    "minimax": "normalises the residual stream in every layer",
    "muse_spark_text": "projects the experts' output to the residual stream",
    "qwen4_exp_text": _HYPER,
    "zaya": "rescales the residual stream in every layer",
}


def indirect_writes(config: Any) -> str | None:
    """Why expert outputs do not reach the residual stream as they are (a norm after the FFN aside), else None.

    Direct logit contributions are not defined for such a model.
    """
    text = text_config(config)
    if getattr(text, "moe_latent_size", None):
        return "projects the experts' output to the residual stream"
    return _INDIRECT_WRITES.get(getattr(text, "model_type", ""))


def residual_scale(config: Any) -> float:
    """Factor on a block's output before the residual sum (Granite's `residual_multiplier`)."""
    return float(getattr(text_config(config), "residual_multiplier", 1.0) or 1.0)


def logit_divisor(config: Any) -> float:
    """Divisor of the logits (Granite's `logits_scaling`)."""
    return float(getattr(text_config(config), "logits_scaling", 1.0) or 1.0)


POST_FFN_NORMS = ("post_feedforward_layernorm", "post_mlp_layernorm")
"""Norm on the feed-forward output before the residual sum (OLMo-2, FlexOlmo, Gemma-2, GLM-4)."""
