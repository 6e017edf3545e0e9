"""The first-order screen against finite differences, and what its recall says."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import moe_lens as ml
from moe_lens.causal.effects import Effects
from moe_lens.causal.screen import random_units, screen, screen_recall
from moe_lens.corpus.batches import tokenize
from moe_lens.errors import BadConfig
from moe_lens.models.edits import zero
from moe_lens.models.lens import Lens
from tests.causal.small import some_text
from tests.models import tiny

TEXT = some_text()


@pytest.fixture(scope="module", params=["olmoe", "qwen2_moe"])
def found(request) -> Effects:
    return Effects(Lens(in_float64(request.param), None), TEXT, progress=False, batch_tokens=64)


def in_float64(family: str) -> Any:
    """A tiny model with exact enough losses for finite differences."""
    model = tiny.build(family, dtype=torch.float64)
    model.set_experts_implementation("eager")  # grouped_mm has no float64
    return model


def test_the_screen_is_the_slope_of_the_loss_in_the_scale_of_an_expert(found):
    flags = [parameter.requires_grad for parameter in found.lens.model.parameters()]
    ranked = screen(found, alphas=(1.0,))
    assert [parameter.requires_grad for parameter in found.lens.model.parameters()] == flags
    assert all(parameter.grad is None for parameter in found.lens.model.parameters())
    step = 1e-3
    for layer, expert in [(0, 1), (0, 4), (1, 0), (1, 5)]:
        means = []
        for scale in (1 + step, 1 - step):
            model = copy.deepcopy(found.lens.model)
            with torch.no_grad():
                model.model.layers[layer].mlp.experts.down_proj[expert] *= scale
            changed = Effects(Lens(model, None), TEXT, progress=False)
            means.append(np.bincount(changed.text.document, changed.nll.astype(np.float64)))
        slope = (means[0] - means[1]) / (2 * step)
        row = ranked.units.index[(ranked.units["layer"] == layer) & (ranked.units["expert"] == expert)][0]
        np.testing.assert_allclose(ranked.by_document[row], -slope, atol=2e-2 * np.abs(slope).max() + 2e-3)
        effect = ranked.frame.set_index(["layer", "expert"])["effect"][layer, expert]
        assert effect == pytest.approx(-slope.sum() / len(found.text.token), abs=1e-3)


def test_an_expert_that_writes_little_gets_its_exact_effect_from_the_screen():
    model = in_float64("olmoe")
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj *= 1e-3
    found = Effects(Lens(model, None), TEXT, progress=False)
    ranked = screen(found, alphas=(1.0,)).frame.set_index(["layer", "expert"])["effect"]
    exact = {(u.layer, u.expert): r.mean for u, r in found.leave_one_out([f"L0.E{e}" for e in range(6)])}
    for unit, effect in exact.items():
        assert ranked[unit] == pytest.approx(effect, rel=0.05, abs=2e-7)


def test_averaged_over_the_path_the_estimates_add_up_to_the_effect_of_all_experts_together():
    """Completeness of integrated gradients. One MoE layer, so no token changes experts on the way."""
    found = Effects(Lens(in_float64("qwen3_moe"), None), TEXT, progress=False)
    exact = found.of(zero([f"L1.E{e}" for e in range(6)]), whole_layers=True).delta.sum(dtype=np.float64)
    fine = screen(found, alphas=[(step + 0.5) / 40 for step in range(40)]).by_document.sum()
    assert fine == pytest.approx(exact, rel=0.01)
    assert screen(found, alphas=(1.0,)).by_document.sum() != pytest.approx(exact, rel=0.1)


@pytest.mark.slow
def test_at_half_scale_the_screen_ranks_the_experts_of_a_trained_model():
    lens = ml.load("bundled:tiny-moe", dtype="float32")
    text = tokenize(ml.corpus("bundled:"), lens.tokenizer, [], limit_tokens=60_000)
    found = Effects(lens, text, max_tokens=4096, progress=False)
    exact = pd.DataFrame([(u.layer, u.expert, r.mean) for u, r in found.leave_one_out(quantities=())])
    exact.columns = ["layer", "expert", "effect"]
    both = {a: exact.merge(screen(found, alphas=(a,)).frame, on=["layer", "expert"]) for a in (0.5, 1.0)}
    rank = {a: m["effect_x"].corr(m["effect_y"], method="spearman") for a, m in both.items()}
    assert rank[0.5] > 0.8
    assert rank[1.0] < 0.5
    assert screen_recall(exact, screen(found), share=0.2).recall > 0.7


def test_recall_counts_the_largest_of_the_sample_that_the_screen_passes_on():
    units = pd.DataFrame({"layer": 0, "expert": range(100)})
    estimates = units.assign(effect=-units["expert"])  # passes on experts 0 to 9
    sample = units.iloc[[0, 3, 5, 20, 40, 60, 80, 85, 90, 95]]
    exact = sample.assign(effect=[5, 9, 1, 8, 0, 0, 0, 0, 0, 0])
    found = screen_recall(exact, estimates, share=0.1)
    assert (found.recall, found.n_top, found.n_sample) == (1, 1, 10)  # expert 3 leads the sample
    exact.loc[20, "effect"] = 10  # not passed on
    assert screen_recall(exact, estimates, share=0.1).recall == 0
    wider = screen_recall(exact, estimates, share=0.3)  # 20, 3 and 0; of all units 0 to 29 pass
    assert (wider.recall, wider.n_top) == (1, 3)
    assert 0 < wider.low < 1 == wider.high


def test_a_random_sample_is_random_distinct_and_repeatable(found):
    ranked = screen(found)
    names = random_units(ranked, share=0.5, seed=1)
    assert len(names) == len(set(names)) == len(ranked.units) / 2
    assert names == random_units(ranked, share=0.5, seed=1) != random_units(ranked, share=0.5, seed=2)
    assert len(random_units(ranked, share=1e-9)) == 1


def test_bad_input_is_one_sentence(found):
    ranked = screen(found)
    with pytest.raises(BadConfig, match="needs a sample of units"):
        screen_recall(ranked.frame.head(0), ranked)
    with pytest.raises(BadConfig, match="measure both on one model"):
        screen_recall(pd.DataFrame({"layer": [7], "expert": [1], "effect": [1.0]}), ranked)
    with pytest.raises(BadConfig, match="no routed experts to screen"):
        screen(Effects(Lens(tiny.build("llama"), None), TEXT, progress=False))
