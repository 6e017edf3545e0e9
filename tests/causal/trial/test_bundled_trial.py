"""`validate` on the bundled MoE: what false labels get there, and what a trial of 32 experts needs."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pandas as pd
import pytest
import regex

import moe_lens as ml
from moe_lens.causal.effects import Effects
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
    kinds = ("other-expert", "shuffled")
    return validate(lens, corpus, frequent_tokens(lens, corpus), n_labels=32, null_labels=kinds, progress=False)


def test_labels_of_other_experts_are_supported_at_most_5_percent_of_the_time(trial):
    once = trial.frame.drop_duplicates(["label_kind", "layer", "expert"])
    false = once[once["label_kind"].isin(["other-expert", "shuffled"])]
    low, _ = wilson_interval(int((false["verdict"] == "supported").sum()), len(false))
    assert low <= 0.05  # at most 5 %, within binomial error


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
