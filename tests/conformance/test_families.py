"""One code path for every family that transformers decorates: bit-equal logits, complete block writes.

Tiny random models from config classes. A family joins by one line in `ZOO`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from moe_lens.models.lens import Lens
from moe_lens.models.sites import is_experts
from moe_lens.types import ExpertTap, Role
from tests.models import tiny

E4 = {"num_experts": 4, "num_experts_per_tok": 2}
L4 = {"num_local_experts": 4, "num_experts_per_tok": 2}
MI = {"intermediate_size": 48, "moe_intermediate_size": 24}
DEEP = {
    **MI, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "n_group": 2, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.5,
}  # fmt: skip
MLA = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}

ZOO: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (prefix, keys) for family, (prefix, keys) in tiny.MOE.items()},
    "flex_olmo": ("FlexOlmo", {"intermediate_size": 24, **E4}),
    "minimax": ("MiniMax", {"intermediate_size": 24, "head_dim": 16, "block_size": 8, **L4}),
    "minimax_m2": ("MiniMaxM2", {"intermediate_size": 24, "head_dim": 16, **L4}),
    "gpt_oss": ("GptOss", {"intermediate_size": 24, "head_dim": 16, **L4}),
    "deepseek_v2": ("DeepseekV2", {**DEEP, **MLA, "topk_method": "greedy", "head_dim": 8}),
    "deepseek_v3": ("DeepseekV3", {**DEEP, **MLA, "head_dim": 8}),
    "glm4_moe": ("Glm4Moe", {**DEEP, "head_dim": 16}),
    "dots1": ("Dots1", {**DEEP, "head_dim": 16}),
    "phimoe": ("Phimoe", {"intermediate_size": 24, **L4}),
    "granitemoe": ("GraniteMoe", {"intermediate_size": 24, "residual_multiplier": 0.5, "logits_scaling": 4.0, **L4}),
    "granitemoeshared": ("GraniteMoeShared", {"intermediate_size": 24, "shared_intermediate_size": 16, **L4}),
    "ernie4_5_moe": ("Ernie4_5_Moe", {
        **MI, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1,
        "moe_layer_end_index": 1,
    }),
    "hunyuan_v1_moe": ("HunYuanMoEV1", {"intermediate_size": 24, "num_experts": 4, "moe_topk": 2, "head_dim": 16}),
    "lfm2_moe": ("Lfm2Moe", {
        **MI, **E4, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"], "use_expert_bias": True,
    }),
    "qwen3_next": ("Qwen3Next", {
        **MI, **E4, "shared_expert_intermediate_size": 16, "head_dim": 16, "linear_num_key_heads": 2,
        "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    }),
    "solar_open": ("SolarOpen", {**DEEP, "head_dim": 16}),
    "jamba": ("Jamba", {
        "intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "expert_layer_period": 1,
        "expert_layer_offset": 0, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False,
        "mamba_d_state": 4, "mamba_dt_rank": 4,
    }),
}  # fmt: skip

BIASED = {"deepseek_v3", "glm4_moe", "dots1", "solar_open", "minimax_m2", "lfm2_moe", "ernie4_5_moe"}


@pytest.fixture(scope="module", params=list(ZOO))
def model(request) -> Any:
    prefix, keys = ZOO[request.param]
    config_class = getattr(transformers, f"{prefix}Config", None)
    if config_class is None:
        pytest.skip(f"this transformers has no {prefix}")
    torch.manual_seed(0)
    config = config_class(**{**tiny.COMMON, **keys})
    model = transformers.AutoModelForCausalLM.from_config(config)
    tiny.enliven(model)
    for name, buffer in model.named_buffers():
        if "correction_bias" in name or "expert_bias" in name:
            buffer.normal_(0, 0.1)
    return model.float().eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tiny.ids(2, 8), use_cache=False).logits


@pytest.mark.parametrize("native", ["grouped_mm", "eager"])
def test_tapped_logits_are_bit_equal_to_native(model, native):
    model.set_experts_implementation(native)
    lens, taps = Lens(model, None), []
    clean = logits(model)
    with lens.tapping(taps.append):
        assert torch.equal(logits(model), clean)
    assert torch.equal(logits(model), clean)
    assert model.get_experts_implementation()[""] == native
    routed = [tap for tap in taps if tap.role is Role.MOE]
    n_modules = sum(is_experts(module) for module in model.modules())
    assert len(routed) == n_modules == len(lens.spec.moe_layers)
    for tap in routed:
        entry = lens.spec.at(tap.layer)
        assert (tap.n_experts, tap.d_ff) == (entry.n_experts, entry.d_ff)
        assert len(tap.token) == 16 * entry.top_k
        assert tap.router_logits.shape == (16, entry.n_experts)


def test_weighted_outputs_sum_to_what_the_experts_return(model):
    model.set_experts_implementation("grouped_mm")
    lens, taps, returned = Lens(model, None), [], {}
    sites = [site for site in lens.sites if site.role is Role.MOE]
    handles = [
        s.module.register_forward_hook(lambda _m, _a, out, k=s.layer: returned.__setitem__(k, out)) for s in sites
    ]
    with lens.tapping(taps.append, roles=[Role.MOE]):
        logits(model)
    for handle in handles:
        handle.remove()
    for tap in taps:
        total = torch.zeros_like(returned[tap.layer])
        total.index_add_(0, tap.token, (tap.weight[:, None] * tap.output).to(total.dtype))
        torch.testing.assert_close(total, returned[tap.layer], rtol=1e-5, atol=1e-5)


def test_router_logits_explain_the_choice(model):
    """Without a selection bias or groups, the chosen experts are those with the largest logits."""
    if model.config.model_type in BIASED:
        pytest.skip("selects by logits plus a bias, or in groups")
    taps: list[ExpertTap] = []
    with Lens(model, None).tapping(taps.append, roles=[Role.MOE]):
        logits(model)
    for tap in taps:
        top_k = len(tap.token) // tap.n_tokens
        best = tap.router_logits.topk(top_k, dim=-1).indices
        chosen = torch.zeros_like(tap.router_logits, dtype=torch.bool)
        chosen[tap.token, tap.expert] = True
        assert chosen.gather(1, best).float().mean() > 0.95
