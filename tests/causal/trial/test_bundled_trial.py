"""`validate` on the bundled MoE: what false labels get there, and what a trial of 32 experts needs."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pandas as pd
import pytest
import regex
import torch

import moe_lens as ml
from moe_lens.causal.effects import Effects
from moe_lens.causal.trial.measured import reference_text
from moe_lens.causal.trial.run import validate
from moe_lens.corpus.batches import tokenize
from moe_lens.stats import wilson_interval
from moe_lens.types import ExpertAddress

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lens():
    return ml.load("bundled:tiny-moe", dtype="float32")


@pytest.fixture(scope="module")
def corpus():
    return ml.corpus("bundled:")


def frequent_tokens(lens, corpus, n: int = 25) -> pd.DataFrame:
    """A rule for every expert: the tokens that visit it most, over their share of all tokens."""
    seen = Effects(lens, tokenize(corpus, lens.tokenizer, [], document_tokens=40), split="select", progress=False)
    ids = seen.text.tokenized.input_ids[seen.text.token]
    overall = Counter(ids.tolist())
    rows = []
    for layer in lens.layers:
        for number in range(16):
            counts = Counter(ids[seen.visits(ExpertAddress(layer, number))].tolist())
            best = sorted(counts, key=lambda i: counts[i] ** 1.5 / overall[i], reverse=True)[:n]
            surfaces = [lens.tokenizer.decode([i]) for i in best]
            rule = "|".join(regex.escape(s) for s in surfaces if s and "\ufffd" not in s)
            rows.append({"layer": layer, "expert": number, "label": f"tokens of {layer}.{number}", "rule": rule})
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def trial(lens, corpus):
    kinds = ("other-expert", "random-expert")
    return validate(lens, corpus, frequent_tokens(lens, corpus), n_labels=32, null_labels=kinds, progress=False)


def supported(trial, *kinds: str, exclusive: bool = False) -> tuple[int, int]:
    """Labels of these kinds that are supported (with the word exclusive), and all."""
    once = trial.frame.drop_duplicates(["label_kind", "layer", "expert"])
    once = once[once["label_kind"].isin(kinds)]
    found = once[once["verdict"] == "supported"]
    return int((found["exclusive"] == "exclusive").sum() if exclusive else len(found)), len(once)


def test_labels_of_other_experts_are_supported_at_most_5_percent_of_the_time(trial):
    low, _ = wilson_interval(*supported(trial, "other-expert", "random-expert"))
    assert low <= 0.05  # at most 5 %, within binomial error


def constant(lens, corpus):
    """The model with every down-projection replaced by what its expert writes on average; the routing reads on."""
    text = tokenize(corpus, lens.tokenizer, [], document_tokens=40)
    written = reference_text(lens, text, lens.layers).mean
    for site in lens.sites:
        experts, d_ff = site.module, site.module.down_proj.shape[-1]
        with torch.no_grad():
            experts.down_proj.copy_((written[site.layer] / d_ff)[:, :, None].expand_as(experts.down_proj))
        experts._apply_gate = lambda gate_up: torch.ones_like(gate_up[:, : gate_up.shape[1] // 2])
    return lens


def test_experts_that_always_write_the_same_are_exclusive_at_most_5_percent_of_the_time(lens, corpus, trial):
    labels = frequent_tokens(lens, corpus)
    lens = constant(ml.load("bundled:tiny-moe", dtype="float32"), corpus)
    text = tokenize(corpus, lens.tokenizer, [], document_tokens=40)
    effects = Effects(lens, text, max_tokens=2000, progress=False)
    mean_changes_nothing = effects.of(ml.mean("L1.E2", reference=reference_text(lens, text, [1])))
    assert np.abs(mean_changes_nothing.delta).max() < 1e-3
    assert supported(trial, "real", exclusive=True)[0] >= 3  # in the model as it is there is something to lose
    found = validate(lens, corpus, labels, n_labels=32, null_labels=(), progress=False)
    low, _ = wilson_interval(*supported(found, "real", exclusive=True))
    assert low <= 0.05


def test_no_more_than_half_of_the_experts_are_underpowered(trial):
    assert (trial.verdicts["verdict"] == "underpowered").mean() <= 0.5


def test_labels_fit_their_own_experts_better_than_each_other(trial):
    real = trial.frame[trial.frame["label_kind"] == "real"].drop_duplicates(["layer", "mode"])
    assert (real["p_assignment"] <= 0.05).mean() > 0.5
    assert (real["p_assignment"] >= real["p_assignment_floor"]).all()


def test_the_sample_is_spread_over_loads_and_declared(trial):
    loads = np.sort(trial.verdicts["load"])
    assert len(loads) == 32
    assert loads[-1] > 3 * loads[0]
    assert trial.settings["is_sample"]
