"""The zoo: a tiny random model of every causal-LM family whose experts transformers dispatches.

A family joins by one entry in `ZOO`. `test_zoo.py` compares the zoo with the installed transformers, so a
family that a new release decorates fails there until it is entered here or in `REFUSED`.

The settings are awkward on purpose: leading dense layers, top-3 of 8 in 4 groups of 2, several layer types in
one stack, scales other than 1, selection biases other than 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import transformers

from tests.models import tiny

E6 = {"num_experts": 6, "num_experts_per_tok": 2}
L6 = {"num_local_experts": 6, "num_experts_per_tok": 2}
R8 = {"n_routed_experts": 8, "num_experts_per_tok": 3}
WIDTHS = {"intermediate_size": 40, "moe_intermediate_size": 24}
GROUPS = {"n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 1.5}
DEEP = {**WIDTHS, **R8, **GROUPS, "n_shared_experts": 1}
MLA = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
INDEXER = {"index_topk": 64, "index_head_dim": 16, "index_n_heads": 2}
DELTA_NET = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
DENSE_THEN_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
TOWER = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "depth": 2, "num_heads": 2,
    "num_attention_heads": 2, "out_hidden_size": 32, "patch_size": 4, "num_position_embeddings": 16,
}  # fmt: skip
"""A vision tower as deep as the text model, so that the two can be confused."""


@dataclass(frozen=True)
class Family:
    """How to build one tiny model, and what is known about it from its config and its paper."""

    title: str
    """What readers call the family."""
    prefix: str
    """Class prefix: `{prefix}Config`."""
    keys: dict[str, Any]
    dense: tuple[int, ...] = ()
    """Layers with a dense FFN."""
    no_ffn: tuple[int, ...] = ()
    """Layers that only mix tokens. All others have routed experts."""
    shared: int | None = None
    """Neurons of the shared expert."""
    biased: bool = False
    """Selects by more than the largest logits: a selection bias, groups, or a table by token id."""
    entry: str | None = None
    """Submodule of the MoE block that the sum of the experts enters, where the block does more than add."""
    shared_apart: bool = False
    """The shared expert is added elsewhere than in the sum checked above."""
    built_as: str | None = None
    """Class that writes the checkpoint, where that is another than AutoModelForCausalLM gives."""
    note: str | None = None
    """What the README says about the family under its table."""
    towers: tuple[tuple[str, Any], ...] = ()
    """Configs of the other parts of a multimodal model; `keys` are then its text part."""

    @cached_property
    def config(self) -> Any:
        """The config of the tiny model."""
        keys = {**tiny.COMMON, **self.keys}
        if self.towers:
            keys = {"text_config": keys, **dict(self.towers), "tie_word_embeddings": False}
        return getattr(transformers, f"{self.prefix}Config")(**keys)

    @cached_property
    def text_config(self) -> Any:
        return self.config.get_text_config(decoder=True)

    @property
    def sparse(self) -> tuple[int, ...]:
        """Layers with routed experts."""
        layers = range(self.text_config.num_hidden_layers)
        return tuple(layer for layer in layers if layer not in self.dense + self.no_ffn)

    def expected(self, *names: str) -> int:
        """The first of `names` that this family's tiny config sets."""
        name = next(name for name in names if self.keys.get(name) is not None)
        value = getattr(self.text_config, name)
        assert value == self.keys[name]
        return value


ZOO: dict[str, Family] = {
    "afmoe": Family("AFMoE (Arcee Trinity)", "Afmoe", {
        **WIDTHS, **E6, "num_shared_experts": 2, "num_dense_layers": 1, "head_dim": 16, "route_scale": 1.5,
        "global_attn_every_n_layers": 2,
    }, dense=(0,), shared=48, biased=True),
    "aria_text": Family("Aria (text)", "AriaText", {
        "intermediate_size": 24, "moe_num_experts": 6, "moe_topk": 2, "moe_num_shared_experts": 2, "head_dim": 16,
    }, shared=48),
    "axk1": Family("A.X K1", "AXK1", {
        **DEEP, **MLA, **DENSE_THEN_SPARSE,
    }, dense=(0,), shared=24, biased=True, entry="post_mlp_layernorm"),
    "axk2": Family("A.X K2", "AXK2", {
        **DEEP, **MLA, **INDEXER, **DENSE_THEN_SPARSE, "gated_norm_rank": 4,
    }, dense=(0,), shared=24, biased=True),
    "bailing_hybrid": Family("Ling hybrid (Bailing)", "BailingHybrid", {
        **WIDTHS, **MLA, "num_experts": 8, "num_experts_per_token": 3, "num_expert_group": 4, "topk_group": 2,
        "num_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 16, "layer_group_size": 2,
    }, dense=(0,), shared=24, biased=True),
    "beam": Family("Beam", "Beam", {
        **WIDTHS, **GROUPS, "num_experts": 8, "num_experts_per_tok": 3, "head_dim": 16, **DENSE_THEN_SPARSE,
        "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4,
    }, dense=(0,), biased=True),
    "cohere2_moe": Family("Command A (Cohere 2 MoE)", "Cohere2Moe", {
        "intermediate_size": 24, **E6, "num_shared_experts": 2, "head_dim": 16, "expert_selection_fn": "sigmoid",
        "prefix_dense_intermediate_size": 40, **DENSE_THEN_SPARSE,
    }, dense=(0,), shared=48),
    "deepseek_v2": Family("DeepSeek-V2", "DeepseekV2", {
        **DEEP, **MLA, "first_k_dense_replace": 1, "topk_method": "group_limited_greedy",
    }, dense=(0,), shared=24, biased=True),
    "deepseek_v3": Family("DeepSeek-V3 / R1", "DeepseekV3", {
        **DEEP, **MLA, "first_k_dense_replace": 1,
    }, dense=(0,), shared=24, biased=True),
    "deepseek_v32": Family("DeepSeek-V3.2", "DeepseekV32", {
        **DEEP, **MLA, **INDEXER, "first_k_dense_replace": 1,
    }, dense=(0,), shared=24, biased=True),
    "deepseek_v4": Family("DeepSeek-V4", "DeepseekV4", {
        **R8, "moe_intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 16, "q_lora_rank": 16, "o_groups": 2,
        "o_lora_rank": 8, "qk_rope_head_dim": 8, **INDEXER, "hc_mult": 2, "hc_sinkhorn_iters": 2,
        "num_hidden_layers": 3, "sliding_window": 4,
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention", "sliding_attention"],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
    }, shared=24, biased=True),
    "dots1": Family("dots.llm1", "Dots1", {
        **DEEP, "first_k_dense_replace": 1, "head_dim": 16,
    }, dense=(0,), shared=24, biased=True),
    "dots3_note_text": Family("dots3 (text)", "Dots3NoteText", {
        **DEEP, **MLA, **INDEXER, "first_k_dense_replace": 1, "shared_experts_intermediate_size": 20,
    }, dense=(0,), shared=20, biased=True),
    "ernie4_5_moe": Family("ERNIE 4.5", "Ernie4_5_Moe", {
        **WIDTHS, "moe_num_experts": 6, "moe_k": 2, "moe_num_shared_experts": 2, "moe_layer_start_index": 1,
        "moe_layer_end_index": 1,
    }, dense=(0,), shared=48, biased=True),
    "exaone_moe": Family("EXAONE MoE", "ExaoneMoe", {
        **WIDTHS, **GROUPS, "num_experts": 8, "num_experts_per_tok": 3, "num_shared_experts": 1,
        "first_k_dense_replace": 1, "sliding_window_pattern": 2, "sliding_window": 4,
    }, dense=(0,), shared=24, biased=True),
    "flex_olmo": Family("FlexOlmo", "FlexOlmo", {"intermediate_size": 24, **E6}),
    "flint": Family("Flint", "Flint", {
        **WIDTHS, **E6, "shared_expert_intermediate_size": 20, "head_dim": 16, "mlp_only_layers": [0],
    }, dense=(0,), shared=20),
    "gemma4_text": Family("Gemma 4 (text)", "Gemma4Text", {
        **WIDTHS, "enable_moe_block": True, "num_experts": 6, "top_k_experts": 2, "head_dim": 16,
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": tiny.VOCAB,
        "layer_types": ["sliding_attention", "full_attention"],
    }, shared=40, entry="post_feedforward_layernorm_2", shared_apart=True),
    "glm4_moe": Family("GLM-4.5 / 4.6", "Glm4Moe", {
        **DEEP, "first_k_dense_replace": 1, "head_dim": 16,
    }, dense=(0,), shared=24, biased=True),
    "glm4_moe_lite": Family("GLM-4.7 Flash", "Glm4MoeLite", {
        **DEEP, **MLA, **DENSE_THEN_SPARSE,
    }, dense=(0,), shared=24, biased=True),
    "glm_moe_dsa": Family("GLM-5", "GlmMoeDsa", {
        **DEEP, **MLA, **INDEXER, "first_k_dense_replace": 1,
    }, dense=(0,), shared=24, biased=True),
    "gpt_oss": Family("gpt-oss", "GptOss", {"intermediate_size": 24, "head_dim": 16, **L6}),
    "granitemoe": Family("Granite 3 MoE", "GraniteMoe", {
        "intermediate_size": 24, "residual_multiplier": 0.5, "logits_scaling": 4.0, **L6,
    }),
    "granitemoe_swa": Family("Granite MoE SWA", "GraniteMoeSWA", {
        "intermediate_size": 24, "shared_intermediate_size": 16, "residual_multiplier": 0.5, "sliding_window": 4, **L6,
    }, shared=16, shared_apart=True),
    "granitemoehybrid": Family("Granite 4 (hybrid)", "GraniteMoeHybrid", {
        "intermediate_size": 24, "shared_intermediate_size": 16, "residual_multiplier": 0.5, **L6,
        "layer_types": ["linear_attention", "full_attention"], "mamba_n_heads": 4, "mamba_d_state": 8,
        "mamba_d_head": 16, "mamba_chunk_size": 8,
    }, shared=16, shared_apart=True),
    "granitemoeshared": Family("Granite 3 MoE, shared expert", "GraniteMoeShared", {
        "intermediate_size": 24, "shared_intermediate_size": 16, **L6,
    }, shared=16, shared_apart=True),
    "hunyuan_v1_moe": Family("Hunyuan-Large / A13B", "HunYuanMoEV1", {
        "intermediate_size": 24, "num_experts": 6, "moe_topk": 2, "head_dim": 16,
    }, shared=24),
    "hy_v3": Family("Hunyuan 3", "HYV3", {
        **WIDTHS, **E6, "num_shared_experts": 1, "router_scaling_factor": 1.5, "head_dim": 16,
    }, dense=(0,), shared=24, biased=True),
    "hy_v4": Family("Hunyuan 4", "HYV4", {
        **DEEP, **MLA, **INDEXER, "hc_mult": 2, "swiglu_limit": 1.0,
    }, dense=(0,), shared=24, biased=True),
    "inkling_text": Family("Inkling (text)", "InklingText", {
        **WIDTHS, **R8, "n_shared_experts": 2, "head_dim": 16, "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2, "swa_head_dim": 16, "d_rel": 4, "rel_extent": 16, "route_scale": 1.5,
        "local_layer_ids": [0], **DENSE_THEN_SPARSE, "sliding_window_size": 4,
    }, dense=(0,), biased=True, note="its shared experts are stacked in one tensor and are not tapped"),
    "inkling2_text": Family("Inkling 2 (text)", "Inkling2Text", {
        **R8, "moe_intermediate_size": 24, "head_dim": 16, "swa_num_attention_heads": 2, "swa_num_key_value_heads": 2,
        "swa_head_dim": 16, "d_rel": 4, "rel_extent": 16, "layer_types": ["hybrid_sliding", "hybrid"],
        "n_layers_per_attn_res_block": 1, "sliding_window_size": 4, "unpadded_vocab_size": tiny.VOCAB,
    }, biased=True),
    "jamba": Family("Jamba", "Jamba", {
        "intermediate_size": 24, **E6, "expert_layer_period": 2, "expert_layer_offset": 1, "attn_layer_period": 4,
        "attn_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 4,
        "num_hidden_layers": 4,
    }, dense=(0, 2)),
    "kimi_linear": Family("Kimi Linear", "KimiLinear", {
        **WIDTHS, **MLA, "q_lora_rank": None, "num_experts": 8, "num_experts_per_token": 3, "num_expert_group": 4,
        "topk_group": 2, "num_shared_experts": 1, "linear_head_dim": 16, "linear_num_heads": 2,
        "layer_types": ["linear_attention", "full_attention"], **DENSE_THEN_SPARSE,
    }, dense=(0,), shared=24, biased=True),
    "kolibri1": Family("Kolibri 1", "Kolibri1", {
        "moe_intermediate_size": 24, **L6, "shared_expert_intermediate_size": 20, "head_dim": 16, "sliding_window": 4,
    }, shared=20, biased=True),
    "laguna": Family("Laguna", "Laguna", {
        **WIDTHS, **E6, "shared_expert_intermediate_size": 20, "head_dim": 16, "moe_routed_scaling_factor": 1.5,
        "moe_router_logit_softcapping": 5.0, "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 4,
    }, dense=(0,), shared=20, biased=True),
    "lfm2_moe": Family("LFM2 MoE", "Lfm2Moe", {
        **WIDTHS, **E6, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"], "use_expert_bias": True,
    }, dense=(0,), biased=True),
    "mellum": Family("Mellum 2", "Mellum", {**WIDTHS, **L6, "head_dim": 16, **DENSE_THEN_SPARSE}, dense=(0,)),
    "mimo_v2_flash": Family("MiMo-V2-Flash", "MiMoV2Flash", {
        **WIDTHS, **R8, **GROUPS, "head_dim": 24, "v_head_dim": 8, "num_key_value_heads": 1,
        "sliding_window": 4,
        "layer_types": ["full_attention", "sliding_attention"],
    }, dense=(0,), biased=True),
    "minimax": Family("MiniMax-Text-01", "MiniMax", {
        "intermediate_size": 24, "head_dim": 16, "block_size": 8, **L6, "mlp_alpha_factor": 2, "mlp_beta_factor": 1.5,
        "layer_types": ["linear_attention", "full_attention"],
    }),
    "minimax_m2": Family("MiniMax-M2", "MiniMaxM2", {"intermediate_size": 24, "head_dim": 16, **L6}, biased=True),
    "minimax_m3_vl_text": Family("MiniMax-M3 (text)", "MiniMaxM3VLText", {
        "intermediate_size": 24, "dense_intermediate_size": 40, "shared_intermediate_size": 20, **L6, "head_dim": 16,
        "rotary_dim": 8, "index_n_heads": 2, "index_head_dim": 16, "index_block_size": 4, "index_topk_blocks": 2,
        **DENSE_THEN_SPARSE,
    }, dense=(0,), shared=20, biased=True),
    "mixtral": Family("Mixtral", "Mixtral", {"intermediate_size": 24, **L6}),
    "nemotron_h": Family("Nemotron-H / Nemotron 3", "NemotronH", {
        **WIDTHS, **R8, **GROUPS, "moe_shared_expert_intermediate_size": 20, "head_dim": 16,
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "moe"], "ssm_state_size": 8,
        "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2, "chunk_size": 8, "use_mamba_kernels": False,
    }, dense=(1,), no_ffn=(0, 2), shared=20, biased=True),
    "nemotron_h_latent": Family("Nemotron 3, latent experts", "NemotronH", {
        **WIDTHS, **R8, **GROUPS, "moe_shared_expert_intermediate_size": 20, "head_dim": 16, "moe_latent_size": 16,
        "layers_block_type": ["full_attention", "moe"], "use_mamba_kernels": False,
    }, no_ffn=(0,), shared=20, biased=True, entry="fc2_latent_proj", shared_apart=True),
    "olmoe": Family("OLMoE", "Olmoe", {"intermediate_size": 24, **E6}),
    "phimoe": Family("Phi-3.5 MoE", "Phimoe", {"intermediate_size": 24, **L6}),
    "qwen2_moe": Family("Qwen1.5 / Qwen2 MoE", "Qwen2Moe", {
        **WIDTHS, **E6, "shared_expert_intermediate_size": 20, "norm_topk_prob": False, "decoder_sparse_step": 2,
    }, dense=(0,), shared=20),
    "qwen3_5_moe_text": Family("Qwen3.5 MoE (text)", "Qwen3_5MoeText", {
        "moe_intermediate_size": 24, **E6, "shared_expert_intermediate_size": 20, "head_dim": 16, **DELTA_NET,
        "layer_types": ["linear_attention", "full_attention"],
    }, shared=20),
    "qwen3_moe": Family("Qwen3 MoE", "Qwen3Moe", {
        **WIDTHS, "num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": True, "head_dim": 16,
        "mlp_only_layers": [0],
    }, dense=(0,)),
    "qwen3_next": Family("Qwen3-Next", "Qwen3Next", {
        **WIDTHS, **E6, "shared_expert_intermediate_size": 20, "head_dim": 16, **DELTA_NET,
        "layer_types": ["linear_attention", "full_attention"],
    }, shared=20),
    "qwen4_exp_text": Family("Qwen4 (experimental, text)", "Qwen4ExpText", {
        "moe_intermediate_size": 24, **E6, "shared_expert_intermediate_size": 20, "head_dim": 16, **DELTA_NET,
        "layer_types": ["linear_attention", "indexed_attention"], "hc_count": 2, "hc_lowrank": 8,
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    }, shared=20),
    "solar_open": Family("Solar Open", "SolarOpen", {**DEEP, "head_dim": 16}, shared=24, biased=True),
    "zaya": Family("ZAYA1", "Zaya", {
        "moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 1, "head_dim": 16,
        "router_hidden_size": 16,
    }, biased=True, note="a token that skips the experts shows as a visit of expert 0 with weight 0"),
}  # fmt: skip


def _multimodal(title: str, prefix: str, text: str, **towers: Any) -> Family:
    return replace(
        ZOO[text], title=title, prefix=prefix, built_as=f"{prefix}ForConditionalGeneration",
        towers=tuple(towers.items()),
    )  # fmt: skip


ZOO |= {
    "dots3_note": _multimodal(
        "dots3, multimodal", "Dots3Note", "dots3_note_text",
        vision_config={**TOWER, "mlp_layer_types": ["dense", "dense"], "adapter_in_dim": 32, "adapter_out_dim": 32},
        audio_config={**TOWER, "downsample_hidden_size": 8, "adapter_input_size": 32, "adapter_out_dim": 32},
    ),
    "gemma4": _multimodal("Gemma 4, multimodal", "Gemma4", "gemma4_text", vision_config=TOWER, audio_config=None),
    "qwen3_5_moe": _multimodal("Qwen3.5 MoE, multimodal", "Qwen3_5Moe", "qwen3_5_moe_text", vision_config=TOWER),
    "qwen4_exp": _multimodal(
        "Qwen4 (experimental), multimodal", "Qwen4Exp", "qwen4_exp_text", vision_config=TOWER
    ),
}  # fmt: skip

REFUSED: dict[str, str] = {
    "aria": "Aria",
    "deepseek_ocr2": "DeepseekOcr2",
    "diffusion_gemma": "DiffusionGemma",
    "ernie4_5_vl_moe": "Ernie4_5_VLMoe",
    "glm4v_moe": "Glm4vMoe",
    "glm5_next": "Glm5Next",
    "inkling2": "Inkling2",
    "inkling_mm_model": "Inkling",
    "minimax_m3_vl": "MiniMaxM3VL",
    "mistral4": "Mistral4",
    "mistral_large4": "MistralLarge4",
    "muse_spark": "MuseSpark",
    "openai_privacy_filter": "OpenAIPrivacyFilter",
    "qwen3_omni_moe": "Qwen3OmniMoe",
    "qwen3_omni_moe_thinker": "Qwen3OmniMoeThinker",
    "qwen3_vl_moe": "Qwen3VLMoe",
    "unlimited_ocr": "UnlimitedOcr",
}
"""model_type -> class prefix: decorated, but AutoModelForCausalLM does not load them."""


AUDIO = {
    "patch_sizes": [2, 2], "hidden_sizes": [8, 8], "depths": [1, 1], "num_hidden_layers": 2, "out_hidden_size": 32,
}  # fmt: skip

GIVEN: dict[str, Family] = {
    "mistral4": Family("Mistral Small 4", "Mistral4", {
        **DEEP, **MLA,
    }, shared=24, biased=True, built_as="Mistral4ForCausalLM"),
    "muse_spark": Family(
        "Muse Spark", "MuseSpark",
        {"moe_intermediate_size": 24, **L6, "head_dim": 16, "moe_hidden_size": 16, "mlp_layer_types": ["sparse"] * 2,
         "layer_types": ["sliding_attention", "full_attention"], "layer_rope_theta": [1e4, 0]},
        built_as="MuseSparkForConditionalGeneration", biased=True, entry="post_expert_proj",
        towers=(("vision_config", TOWER), ("audio_config", AUDIO)),
    ),
    "qwen3_vl_moe": Family(
        "Qwen3-VL MoE", "Qwen3VLMoe", {**WIDTHS, **E6, "head_dim": 16},
        built_as="Qwen3VLMoeForConditionalGeneration", towers=(("vision_config", TOWER),),
    ),
}  # fmt: skip
"""Models that AutoModelForCausalLM does not load, but which work when the user hands the model over."""


def build(family: Family, seed: int = 0) -> Any:
    """A tiny float32 model of a family, of the class that writes its checkpoints."""
    torch.manual_seed(seed)
    if family.built_as is not None:
        model = getattr(transformers, family.built_as)(family.config)
    else:
        model = transformers.AutoModelForCausalLM.from_config(family.config)
    tiny.enliven(model)
    _bias_selection(model)
    return model.float().eval()


@torch.no_grad()
def _bias_selection(model: torch.nn.Module) -> None:
    """Selection biases start at zero, where they would change nothing; token tables send all to expert 0."""
    for name, value in (*model.named_buffers(), *model.named_parameters()):
        if any(word in name for word in ("correction_bias", "expert_bias", "balancing_biases")):
            value.normal_(0, 0.4)
        elif name.endswith("tid2eid"):
            n_experts = model.get_submodule(name.rpartition(".")[0]).num_experts
            choice = torch.rand(len(value), n_experts).topk(value.shape[1]).indices
            value.copy_(choice)
