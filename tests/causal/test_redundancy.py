"""Backups, replacements and self-repair, where they are planted and against the effects they are made of."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

import moe_lens as ml
from moe_lens.causal.effects import Effects
from moe_lens.causal.redundancy import pair_redundancy, replaceability, self_repair
from moe_lens.errors import BadConfig, OutOfRange
from moe_lens.types import ExpertAddress
from tests.causal.small import some_text, tokenized_of
from tests.causal.toy import toy

TEXT = tokenized_of([[2, 0], [2, 0], [2, 0]])
TWINS = {"p": (0.4, 0.4, 0.2), "f": ((3.0, 0.0), (3.0, 0.0), (0.0, 1.0)), "renorm": True}
"""Experts 0 and 1 write the same, 2 something else."""


def effects(text: Any = TEXT, **options: Any) -> Effects:
    return Effects(toy(**options), text, include_first=True, progress=False)


@pytest.fixture(scope="module")
def random_effects(lens_of) -> Effects:
    return Effects(lens_of("olmoe"), some_text(lengths=[30] * 8), progress=False)


@pytest.mark.parametrize(
    ("mode", "top_k"), [("drop_renorm", 2), ("mask_refill", 1)], ids=["router sends both", "backup by refill"]
)
def test_two_redundant_experts_show_nothing_alone_and_are_perfect_backups_together(mode, top_k):
    found = pair_redundancy(effects(**TWINS, top_k=top_k), "L0.E0", "L0.E1", mode)
    assert found.alone_a.value == pytest.approx(0, abs=1e-6)
    assert found.alone_b.value == pytest.approx(0, abs=1e-6)
    assert found.together.value > 0.5
    assert found.redundancy.value == pytest.approx(1, abs=1e-5)
    assert found.super_additivity.value == pytest.approx(found.together.value, abs=1e-5)


def test_the_same_two_experts_are_no_backups_where_each_adds_its_own_write():
    """Under zero both writes count: what is redundant depends on the mode. What is left comes of the NLL's curve."""
    found = pair_redundancy(effects(**TWINS), "L0.E0", "L0.E1", "zero")
    nll = [float(np.log1p(np.exp(-logit))) for logit in (3.0, 1.5, 0.0)]
    alone, together = nll[1] - nll[0], nll[2] - nll[0]
    assert (found.alone_a.value, found.alone_b.value) == pytest.approx((alone, alone), abs=1e-6)
    assert found.redundancy.value == pytest.approx(1 - 2 * alone / together, abs=1e-5)


def test_the_numbers_are_ratios_of_mean_effects(random_effects):
    a, b = "L0.E1", "L0.E3"
    found = pair_redundancy(random_effects, a, b)
    alone_a, alone_b, both = (random_effects.of(ml.zero(*names)).mean for names in ((a,), (b,), (a, b)))
    assert (found.alone_a.value, found.alone_b.value) == pytest.approx((alone_a, alone_b))
    assert found.together.value == pytest.approx(both)
    assert found.super_additivity.value == pytest.approx(both - alone_a - alone_b)
    assert found.n_documents == 8
    wanted = 1 - (alone_a + alone_b) / both
    assert np.isnan(found.redundancy.value) or found.redundancy.value == pytest.approx(wanted)


def test_replaceability_of_the_worked_toy_has_the_printed_digits():
    """O3: 0.451169 nats where the expert is dropped, 0.070891 where another takes its place."""
    found = replaceability(effects(), "L0.E0")
    assert found.zero.value == pytest.approx(0.451169, abs=1.1e-6)
    assert found.refilled.value == pytest.approx(0.070891, abs=1.1e-6)
    assert found.replaceability.value == pytest.approx(1 - 0.070891 / 0.451169, abs=1e-5)
    assert found.replaceability.low == pytest.approx(found.replaceability.value, abs=1e-9)


def test_a_twin_that_comes_in_replaces_as_much_as_its_gate_allows():
    found = replaceability(effects(p=(0.5, 0.3, 0.2), f=TWINS["f"], top_k=1), "L0.E0")
    logits = {"clean": 1.5, "zero": 0.0, "refilled": 0.9}
    nll = {name: np.log1p(np.exp(-value)) for name, value in logits.items()}
    assert found.zero.value == pytest.approx(nll["zero"] - nll["clean"], abs=1e-6)
    assert found.refilled.value == pytest.approx(nll["refilled"] - nll["clean"], abs=1e-6)


def test_self_repair_is_what_frozen_routing_loses_beyond_live(random_effects):
    found = self_repair(random_effects, "L0.E1")
    live, frozen = (random_effects.of(ml.zero("L0.E1"), routing=r).mean for r in ("live", "frozen"))
    assert found.repaired.value == pytest.approx(frozen - live)
    assert found.repaired.value != 0
    assert found.repaired.low < found.repaired.value < found.repaired.high
    assert self_repair(random_effects, "L1.E1").repaired.value == pytest.approx(0, abs=1e-6)


def test_a_ratio_is_refused_where_documents_disagree_whether_there_is_an_effect():
    mixed = tokenized_of([[2, 0], [2, 1], [2, 0], [2, 1]])
    pair, one = effects(mixed), effects(mixed)
    found = pair_redundancy(pair, "L0.E0", "L0.E1")
    assert np.isnan([found.redundancy.value, found.redundancy.low, found.redundancy.high]).all()
    assert np.isfinite(found.super_additivity.value)
    assert "too little together for a ratio" in found.finding()
    assert np.isnan(replaceability(one, "L0.E0").replaceability.value)


def test_an_expert_without_effect_has_no_ratio():
    found = pair_redundancy(effects(top_k=1), "L0.E1", "L0.E2")
    assert found.together.value == 0
    assert np.isnan(found.redundancy.value)
    assert json.loads(json.dumps(found.to_dict()))["redundancy"] is None


class Drawn:
    """Effects whose documents are drawn: per document a random level and tokens around it."""

    def __init__(self, rng: np.random.Generator, alone: tuple[float, float], together: float) -> None:
        self.lens = SimpleNamespace(address=ExpertAddress.parse)
        level = rng.normal(0, 0.2, (50, 1))
        self.tables = [
            pd.DataFrame({"tokens": 20, "delta": (mean + share * level + rng.normal(0, 0.3, (50, 20))).sum(1)})
            for mean, share in zip((*alone, together), (0.2, 0.2, 1.0), strict=True)
        ]

    def of_each(self, _edits: Any, **_options: Any) -> list[Any]:
        return [SimpleNamespace(documents=table) for table in self.tables]


def test_a_joint_effect_of_two_standard_errors_is_no_denominator():
    small, large = (
        pair_redundancy(Drawn(np.random.default_rng(0), (0.1, 0.1), mean), "L0.E0", "L0.E1", n_resamples=400)  # type: ignore[arg-type]
        for mean in (0.06, 0.3)
    )
    assert small.together.value > 0.02
    assert np.isnan(small.redundancy.value)
    assert np.isfinite(large.redundancy.value)


def test_intervals_over_documents_cover_the_truth():
    """O11: 93 to 97 % of 95 % intervals with 50 documents, here of super-additivity."""
    rng, truth = np.random.default_rng(0), 0.3
    made = [pair_redundancy(Drawn(rng, (0.1, 0.2), 0.6), "L0.E0", "L0.E1", n_resamples=400) for _ in range(600)]  # type: ignore[arg-type]
    covered = np.mean([found.super_additivity.low <= truth <= found.super_additivity.high for found in made])
    assert 0.92 <= covered <= 0.97
    ratio = np.mean([found.redundancy.low <= 0.5 <= found.redundancy.high for found in made])
    assert 0.92 <= ratio <= 0.97


def test_results_tell_what_they_found(random_effects):
    for found in (
        pair_redundancy(random_effects, "L0.E0", "L1.E0", n_resamples=50),
        replaceability(random_effects, "L0.E0", n_resamples=50),
        self_repair(random_effects, "L0.E0", n_resamples=50),
    ):
        assert "8 documents" in found.finding()
        assert found._repr_html_().startswith("<p>")
        assert len(found.frame) == 1
        json.dumps(found.to_dict(), allow_nan=False)


def test_modes_with_a_reference_take_it_as_an_option(random_effects):
    reference = random_effects.lens.reference("Seven wizards jump over the fox's box.", experts=["L0.E0", "L0.E1"])
    found = pair_redundancy(random_effects, "L0.E0", "L0.E1", "mean_off", options={"reference": reference})
    both = random_effects.of(ml.mean_off("L0.E0", "L0.E1", reference=reference)).mean
    assert found.together.value == pytest.approx(both)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda e: pair_redundancy(e, "L0.E0", "L0.E0"), BadConfig, "own backup"),
        (lambda e: pair_redundancy(e, "L0.E0", "L0.E9"), OutOfRange, "experts are 0 to 5"),
        (lambda e: pair_redundancy(e, "L0.E0", "L0.E1", "zeros"), BadConfig, "did you mean 'zero'"),
        (lambda e: pair_redundancy(e, "L0.E0", "L0.E1", "swap"), BadConfig, "not swap"),
        (lambda e: pair_redundancy(e, "L0.E0", "L0.E1", "mean"), BadConfig, "options="),
        (lambda e: self_repair(e, "L0.E0", "mean"), BadConfig, "options="),
        (lambda e: replaceability(effects(tokenized_of([[2, 0]])), "L0.E0"), BadConfig, "at least two"),
    ],
)
def test_bad_input_is_one_sentence(random_effects, call, error, match):
    with pytest.raises(error, match=match) as caught:
        call(random_effects)
    assert "\n" not in str(caught.value)
