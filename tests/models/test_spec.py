"""Specs equal the published numbers and the built models."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch
import transformers

from moe_lens.models import families, gates
from moe_lens.models.spec import empty_model, inspect, spec_of
from moe_lens.types import Role
from tests.conformance import zoo
from tests.models import tiny

OLMOE = transformers.OlmoeConfig(
    vocab_size=50304, hidden_size=2048, intermediate_size=1024, num_hidden_layers=16, num_attention_heads=16,
    num_key_value_heads=16, num_experts=64, num_experts_per_tok=8, tie_word_embeddings=False,
)  # fmt: skip
MIXTRAL = transformers.MixtralConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2, tie_word_embeddings=False,
)  # fmt: skip
QWEN3 = transformers.Qwen3MoeConfig(
    vocab_size=151936, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=48,
    num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
    norm_topk_prob=True, tie_word_embeddings=False,
)  # fmt: skip
GPT_OSS = transformers.GptOssConfig(
    vocab_size=201088, hidden_size=2880, intermediate_size=2880, num_hidden_layers=24, num_attention_heads=64,
    num_key_value_heads=8, head_dim=64, num_local_experts=32, num_experts_per_tok=4, tie_word_embeddings=False,
)  # fmt: skip
DEEPSEEK = transformers.DeepseekV3Config(
    vocab_size=129280, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048, num_hidden_layers=61,
    num_attention_heads=128, num_key_value_heads=128, n_shared_experts=1, n_routed_experts=256,
    num_experts_per_tok=8, n_group=8, topk_group=4, routed_scaling_factor=2.5, norm_topk_prob=True,
    first_k_dense_replace=3, kv_lora_rank=512, q_lora_rank=1536, qk_rope_head_dim=64, qk_nope_head_dim=128,
    v_head_dim=128, max_position_embeddings=163840, tie_word_embeddings=False,
)  # fmt: skip


def spec_from(tmp_path, config):
    config.save_pretrained(tmp_path)
    return inspect(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "total", "active", "with_embedding"),
    [
        (OLMOE, 6.9e9, 1.3e9, True),  # arXiv 2409.02060, table 1
        (MIXTRAL, 46.7e9, 12.9e9, True),  # mistral.ai/news/mixtral-of-experts
        (QWEN3, 30.5e9, 3.3e9, True),  # model card of Qwen3-30B-A3B
        (GPT_OSS, 20.9e9, 3.6e9, False),  # arXiv 2508.10925, table 1: "active" leaves the input embedding out
        (DEEPSEEK, 671e9, 37e9, True),  # arXiv 2412.19437
    ],
    ids=["olmoe", "mixtral", "qwen3-30b-a3b", "gpt-oss-20b", "deepseek-v3"],
)
def test_parameters_are_those_that_were_published(tmp_path, config, total, active, with_embedding):
    spec = spec_from(tmp_path, config)
    counted = spec.active_parameters - (0 if with_embedding else spec.embedding_parameters)
    assert spec.total_parameters == pytest.approx(total, rel=0.01)
    assert counted == pytest.approx(active, rel=0.02)


def test_olmoe_1b_7b(tmp_path):
    spec = spec_from(tmp_path, OLMOE)
    assert (spec.n_layers, spec.d_model, spec.vocab_size) == (16, 2048, 50304)
    assert spec.moe_layers == tuple(range(16))
    assert {(e.n_experts, e.top_k, e.d_ff, e.shared_d_ff, e.gated) for e in spec.layers} == {(64, 8, 1024, None, True)}
    assert spec.sparsity == 0.125
    assert round(spec.total_parameters / 1e9, 2) == 6.92
    assert round(spec.active_parameters / 1e9, 2) == 1.28
    assert spec.norm_topk_prob is False
    assert spec.suggested_baseline == "allenai/OLMo-1B-0724-hf"


def test_deepseek_v3_has_dense_layers_and_shared_experts(tmp_path):
    spec = spec_from(tmp_path, DEEPSEEK)
    assert spec.moe_layers == tuple(range(3, 61))
    assert spec.at(3).shared_d_ff == 2048
    assert [entry.role for entry in spec.layers[:3]] == [Role.DENSE] * 3
    assert [entry.d_ff for entry in spec.layers[2:4]] == [18432, 2048]
    assert spec.sparsity == 8 / 256
    assert str(spec.gate) == (
        "sigmoid, then top-k, divided by the sum of the chosen, times 2.5, "
        "from 4 of 8 groups, chosen with a selection bias"
    )


def test_a_model_of_671_billion_parameters_answers_in_a_second(tmp_path):
    DEEPSEEK.save_pretrained(tmp_path)
    inspect(str(tmp_path))  # the first call imports transformers' model code
    times = []
    for _ in range(3):
        start = time.process_time()  # of this process: other work on the machine does not count
        inspect(str(tmp_path))
        times.append(time.process_time() - start)
    assert min(times) < 1


def test_a_quantised_checkpoint_is_described(tmp_path):
    """The published DeepSeek-V3 and gpt-oss are quantised; what is reported is the plain model."""
    plain = spec_from(tmp_path, DEEPSEEK)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text()) | {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}}
    file.write_text(json.dumps(config))
    spec = inspect(str(tmp_path))
    assert spec.quantisation == "fp8"
    assert plain.quantisation is None
    assert spec.total_parameters == plain.total_parameters


@pytest.mark.parametrize("family", [*tiny.MOE, *tiny.DENSE])
def test_parameters_are_those_of_the_model(family):
    model = tiny.build(family)
    spec = spec_of(model, name=family)
    assert spec.total_parameters == sum(p.numel() for p in model.parameters())
    assert spec.embedding_parameters == model.get_input_embeddings().weight.numel()
    assert spec.is_moe == (family in tiny.MOE)
    assert (spec.active_parameters < spec.total_parameters) == spec.is_moe
    assert len(spec.frame) == 2


def test_active_parameters_of_a_tiny_olmoe():
    model = tiny.build("olmoe")
    idle = 2 * (6 - 2) * (3 * 32 * 24)
    spec = spec_of(model, name="x")
    assert spec.active_parameters == spec.total_parameters - idle


def test_active_parameters_with_a_shared_expert_a_dense_layer_and_biases():
    """Nothing but routed experts is ever idle; the biases of an idle expert are."""
    qwen = spec_of(tiny.build("qwen2_moe"), name="x")
    assert qwen.total_parameters - qwen.active_parameters == 2 * (6 - 2) * 3 * 32 * 24
    partly_dense = spec_of(tiny.build("qwen3_moe"), name="x")
    assert partly_dense.total_parameters - partly_dense.active_parameters == (6 - 3) * 3 * 32 * 24
    gpt_oss = spec_of(tiny_zoo("gpt_oss"), name="x")
    entry = gpt_oss.layers[0]
    per_expert = 3 * 32 * entry.d_ff + 2 * entry.d_ff + 32
    assert gpt_oss.total_parameters - gpt_oss.active_parameters == 2 * (entry.n_experts - entry.top_k) * per_expert


def tiny_zoo(family: str) -> Any:
    return zoo.build(zoo.ZOO[family])


@pytest.mark.parametrize(
    ("family", "score", "renormalised"),
    [
        ("olmoe", "softmax", False),
        ("mixtral", "softmax", True),
        ("gpt_oss", "softmax", True),
        ("deepseek_v3", "sigmoid", True),
        ("minimax_m2", "sigmoid", True),
        ("granitemoe", "softmax", True),
        ("jamba", "softmax", False),
    ],
)
def test_the_gate_is_read_from_the_routers_code(family, score, renormalised):
    """Several of these say nothing about it in their config."""
    spec = spec_of(empty_model(tiny_zoo(family).config), name=family)
    assert (spec.gate.score, spec.gate.renormalised) == (score, renormalised)
    assert spec.norm_topk_prob is renormalised


def test_a_gate_that_its_config_contradicts_is_told_by_its_code():
    """DeepSeek-V2's router ignores norm_topk_prob."""
    config = tiny_zoo("deepseek_v2").config
    config.norm_topk_prob = True
    assert spec_of(empty_model(config), name="x").norm_topk_prob is False


@pytest.mark.parametrize(
    ("family", "groups", "bias"),
    [
        ("olmoe", (1, 1), False),
        ("gpt_oss", (1, 1), False),  # its router's bias is part of the logits
        ("deepseek_v2", (4, 2), False),
        ("deepseek_v3", (4, 2), True),
        ("minimax_m2", (1, 1), True),  # the block holds the bias
        ("ernie4_5_moe", (1, 1), True),
    ],
)
def test_what_limits_the_choice_is_part_of_the_gate(family, groups, bias):
    gate = spec_of(empty_model(tiny_zoo(family).config), name=family).gate
    assert (gate.groups, gate.selection_bias) == (groups, bias)
    assert ("from 2 of 4 groups" in str(gate)) == (groups == (4, 2))
    assert ("selection bias" in str(gate)) == bias


def test_groups_that_the_router_ignores_are_not_named():
    """A greedy DeepSeek-V2 has groups in its config only."""
    config = tiny_zoo("deepseek_v2").config
    config.topk_method = "greedy"
    assert spec_of(empty_model(config), name="x").gate.groups == (1, 1)


def test_a_baseline_of_another_size_is_not_suggested(tmp_path):
    """Mixtral 8x7B uses 12.9B for a token, Mixtral 8x22B 39B; Mistral 7B is no comparison for the second."""
    assert spec_from(tmp_path, MIXTRAL).suggested_baseline == "mistralai/Mistral-7B-v0.1"
    assert spec_from(tmp_path, GPT_OSS).suggested_baseline == "Qwen/Qwen3-4B-Base"
    large = transformers.MixtralConfig(**{**MIXTRAL.to_dict(), "hidden_size": 6144, "intermediate_size": 16384})
    large.num_hidden_layers = 56
    spec = spec_from(tmp_path, large)
    assert spec.active_parameters > 2 * families.DENSE_PARAMETERS["mistralai/Mistral-7B-v0.1"]
    assert spec.suggested_baseline is None
    assert spec_from(tmp_path, DEEPSEEK).suggested_baseline is None


def test_the_size_of_every_baseline_is_known():
    assert set(families.BASELINES.values()) == set(families.DENSE_PARAMETERS)


def test_an_unknown_gate_is_left_open():
    logits, index = torch.randn(8, 4), torch.tensor([[0, 1]]).repeat(8, 1)
    assert gates.read_rule(logits, index, torch.rand(8, 2), tolerance=1e-3) is None
    assert gates.rule_of_router(torch.nn.Linear(8, 4), 8) is None
    assert gates.rule_of_router(None, 8) is None


def test_layers_differ_where_the_model_says_so():
    spec = spec_of(tiny.build("qwen3_moe"), name="x")
    assert list(spec.frame["role"]) == ["dense", "moe"]
    assert list(spec.frame["d_ff"]) == [40, 24]
    shared = spec_of(tiny.build("qwen2_moe"), name="x")
    assert list(shared.frame["shared_d_ff"]) == [20, 20]


def test_a_spec_is_plain_values_in_json():
    spec = spec_of(tiny.build("olmoe"), name="bundled:tiny-moe")
    found = json.loads(json.dumps(spec.to_dict()))
    assert (found["sparsity"], found["is_moe"], found["moe_layers"]) == (2 / 6, True, [0, 1])
    assert found["suggested_baseline"] == "bundled:tiny-dense"
    assert found["gate"]["words"] == "softmax over all experts, then top-k (weights not renormalised)"
    assert spec_of(tiny.build("llama"), name="x").to_dict()["gate"] is None


def test_names_are_escaped_in_html():
    assert "<script>" not in spec_of(tiny.build("olmoe"), name="<script>")._repr_html_()
