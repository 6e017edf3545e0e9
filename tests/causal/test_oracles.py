"""The oracles O1 to O11 of METRICS 6.1: where each is a test, and those that are tests here.

O1   set function       faithfulness/test_scores.py test_o1_*; faithfulness/test_tables.py test_o1_*
O2   identity           faithfulness/test_scores.py test_o2_*; faithfulness/test_run.py test_o2_*
O3   toy MoE            test_toy.py test_the_worked_toy_has_the_printed_digits; models/edits/test_toy.py (gates, p);
                        test_redundancy.py test_replaceability_of_the_worked_toy_has_the_printed_digits
O4   additive           test_toy.py test_where_writes_only_add_up_*; faithfulness/test_scores.py test_o4_*
O5   redundancy         here (patching); test_redundancy.py test_two_redundant_experts_*; test_toy.py test_two_*;
                        faithfulness/test_scores.py test_o5_*
O6   no-ops             test_effects.py test_ablating_a_never_routed_expert_*, test_refill_of_a_never_routed_expert_*,
                        test_frozen_is_live_on_the_last_layer_*; faithfulness/test_run.py test_o6_*;
                        test_toy.py test_a_token_that_loses_all_its_experts_is_counted;
                        models/edits/test_edit.py test_everything_is_as_before_after_the_block_*
O7   DiD                trial/test_trial_statistics.py test_o7_*
O8   assignment         trial/test_trial_statistics.py test_o8_*
O9   CKA                no code in the package computes it yet
O10  routing            faithfulness/test_correlation.py test_o10_*; capture/test_routing.py test_oracle_o10_*
O11  bootstrap, nulls   stats/test_resampling.py test_document_bootstrap_covers_the_true_mean (coverage, ICC);
                        stats/test_power.py (power: METRICS prints 68 documents for d = .5, the t-test needs 105);
                        trial/test_trial_calibration.py (need); test_redundancy.py test_intervals_*; here (uniform p)

Planted truth of issue 6, item 8: trial/test_planted_trial.py (verdicts), patching/test_planted_patch.py, and here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kstest

import moe_lens as ml
from moe_lens.causal.effects import Effects
from moe_lens.causal.patching.run import patch
from moe_lens.causal.trial.assignment import assignment
from moe_lens.causal.trial.cells import contrast, specificity
from moe_lens.stats import permutation_p
from tests.causal.small import tokenized_of
from tests.causal.trial.made import BANG, made
from tests.models import tiny

SENTENCES = ("a1!b2!C", "D3!e4!f", "g5!H6!i", "1!jA2!b")


def effects_of(lens: Any) -> Effects:
    windows = [tiny.tokenizer()(text)["input_ids"] for text in SENTENCES]
    return Effects(lens, tokenized_of(windows), include_first=True, progress=False)


def test_a_specialised_expert_with_a_constant_write_is_acquitted():
    """It shows 0 under mean and resample, which keep its constant write, and what it does under zero and mean_off."""
    lens = made()
    effects = effects_of(lens)
    reference = lens.reference(list(SENTENCES), experts=["L0.E3"])
    visits = effects.visits("L0.E3")
    assert 0 < visits.sum() < len(visits)
    deltas = {
        "zero": effects.of(ml.zero("L0.E3")).delta,
        "mean_off": effects.of(ml.mean_off("L0.E3", reference=reference)).delta,
        "mean": effects.of(ml.mean("L0.E3", reference=reference)).delta,
        "resample": effects.of(ml.resample("L0.E3", reference=reference)).delta,
    }
    for mode in ("mean", "resample"):
        assert np.abs(deltas[mode]).max() < 1e-5, mode
    for mode in ("zero", "mean_off"):
        assert deltas[mode][visits].min() > 1, mode
        assert np.abs(deltas[mode][~visits]).max() < 1e-5, mode


def test_patching_finds_the_same_expert_between_two_prompts():
    found = patch(made(), "ab1", "abC", target="!", foil="a", progress=False).experts.set_index("expert")
    assert found["recovery"][3] == pytest.approx(1, abs=1e-5)
    assert np.abs(found["recovery"].drop(3)).max() < 1e-5


def test_o5_patching_sees_two_redundant_experts_only_as_a_coalition():
    """The write of either is enough for the prediction; what each of two twins would add is capped at that."""
    lens = capped_twins()
    options = {"target": "!", "foil": "a", "direction": "noise", "progress": False}
    found = patch(lens, "ab1", "abC", coalitions=[["L0.E0", "L0.E3"]], **options)
    alone = found.experts.set_index("expert")["recovery"]
    assert alone[[0, 3]].tolist() == pytest.approx([0, 0], abs=1e-3)
    assert found.coalitions["recovery"].item() == pytest.approx(1, abs=1e-3)


def capped_twins() -> Any:
    """`made` with E0, which digits visit beside E3, as its twin, and a final norm that caps what they write."""
    lens = made()
    layer = lens.model.model.layers[0]
    experts = layer.mlp.experts
    with torch.no_grad():
        for weight in (experts.gate_up_proj, experts.down_proj):
            weight[0] = weight[3]
            experts.down_proj[[0, 3]] = 0
        experts.down_proj[[0, 3], BANG, 0] = 1e6  # far more than the norm lets through
        lens.model.model.norm.variance_epsilon = 1.0
        lens.model.model.norm.weight.fill_(1)
    return lens


def test_o7_difference_in_differences_by_hand():
    z = np.array([True, False])
    own, controls = contrast(np.array([0.30, 0.05]), z), [contrast(np.array(c), z) for c in ((0.1, 0.08), (0.06, 0.04))]
    assert specificity(own, controls) == pytest.approx(0.23)


def test_o11_p_of_an_assignment_is_uniform_where_labels_are_exchangeable():
    rng = np.random.default_rng(0)
    p = np.array([assignment(rng.normal(size=(8, 8)), n_permutations=199, seed=i).p for i in range(500)])
    assert kstest(p - rng.random(500) / 200, "uniform").pvalue > 0.01


def test_o11_p_by_rank_among_controls_is_uniform_where_the_unit_is_one_of_them():
    """As `patch` ranks an expert among the others of its layer."""
    rng = np.random.default_rng(0)
    drawn = rng.standard_t(3, (2000, 20))
    p = permutation_p(drawn[:, 0], drawn[:, 1:].T)
    assert kstest(p - rng.random(2000) / 20, "uniform").pvalue > 0.01
    shifted = permutation_p(drawn[:, 0] + 1, drawn[:, 1:].T)
    assert kstest(shifted - rng.random(2000) / 20, "uniform").pvalue < 1e-6
