"""Specs equal the published numbers and the built models."""

from __future__ import annotations

import time

import pytest
import transformers

from moe_lens.models.spec import empty_model, inspect, spec_of
from moe_lens.types import Role
from tests.models import tiny


def spec_from(tmp_path, config):
    config.save_pretrained(tmp_path)
    return inspect(str(tmp_path))


def test_olmoe_1b_7b(tmp_path):
    config = transformers.OlmoeConfig(
        vocab_size=50304, hidden_size=2048, intermediate_size=1024, num_hidden_layers=16, num_attention_heads=16,
        num_key_value_heads=16, num_experts=64, num_experts_per_tok=8, tie_word_embeddings=False,
    )  # fmt: skip
    spec = spec_from(tmp_path, config)
    assert (spec.n_layers, spec.d_model, spec.vocab_size) == (16, 2048, 50304)
    assert spec.moe_layers == tuple(range(16))
    assert {(e.n_experts, e.top_k, e.d_ff, e.shared_d_ff, e.gated) for e in spec.layers} == {(64, 8, 1024, None, True)}
    assert spec.sparsity == 0.125
    assert round(spec.total_parameters / 1e9, 2) == 6.92
    assert round(spec.active_parameters / 1e9, 2) == 1.28
    assert spec.norm_topk_prob is False
    assert spec.suggested_baseline == "allenai/OLMo-1B-0724-hf"


def test_mixtral_8x7b(tmp_path):
    spec = spec_from(tmp_path, transformers.MixtralConfig())
    assert round(spec.total_parameters / 1e9, 1) == 46.7
    assert round(spec.active_parameters / 1e9, 1) == 12.9
    assert spec.suggested_baseline == "mistralai/Mistral-7B-v0.1"


def test_a_huge_model_answers_in_seconds():
    config = transformers.DeepseekV3Config()
    start = time.perf_counter()
    spec = spec_of(empty_model(config), name="deepseek-v3")
    assert time.perf_counter() - start < 10
    assert round(spec.total_parameters / 1e9) == 671
    assert round(spec.active_parameters / 1e9, 1) == 37.6  # 36.7B by DeepSeek's count, without the input embedding
    assert spec.moe_layers == tuple(range(3, 61))
    assert spec.at(3).shared_d_ff == 2048
    assert [entry.role for entry in spec.layers[:3]] == [Role.DENSE] * 3


@pytest.mark.parametrize("family", [*tiny.MOE, *tiny.DENSE])
def test_parameters_are_those_of_the_model(family):
    model = tiny.build(family)
    spec = spec_of(model, name=family)
    assert spec.total_parameters == sum(p.numel() for p in model.parameters())
    assert spec.is_moe == (family in tiny.MOE)
    assert (spec.active_parameters < spec.total_parameters) == spec.is_moe
    assert len(spec.frame) == 2


def test_active_parameters_of_a_tiny_olmoe():
    model = tiny.build("olmoe")
    idle = 2 * (6 - 2) * (3 * 32 * 24)
    spec = spec_of(model, name="x")
    assert spec.active_parameters == spec.total_parameters - idle


def test_layers_differ_where_the_model_says_so():
    spec = spec_of(tiny.build("qwen3_moe"), name="x")
    assert list(spec.frame["role"]) == ["dense", "moe"]
    assert list(spec.frame["d_ff"]) == [40, 24]
    shared = spec_of(tiny.build("qwen2_moe"), name="x")
    assert list(shared.frame["shared_d_ff"]) == [20, 20]


def test_names_are_escaped_in_html():
    assert "<script>" not in spec_of(tiny.build("olmoe"), name="<script>")._repr_html_()
