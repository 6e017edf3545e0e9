"""What a judge marks, which false labels are made, and what is measured at a visit."""

from __future__ import annotations

import numpy as np
import pytest

import moe_lens as ml
from moe_lens.causal.effects import Effects
from moe_lens.causal.trial.claims import Claim
from moe_lens.causal.trial.judge import marked
from moe_lens.causal.trial.measured import ahead, measure, reference_text
from moe_lens.causal.trial.nulls import borrowed, token_class
from moe_lens.causal.trial.run import _controls
from moe_lens.corpus.batches import tokenize
from moe_lens.corpus.text import Corpus, Document
from moe_lens.types import ExpertAddress
from tests.causal.small import busiest, some_text
from tests.models import tiny

RULES = {"L0.E1": r"\d+", "L0.E2": r"(?<=q)[a-z]{3}", "L1.E0": "[A-Z]"}
CLAIMS = [Claim("real", ExpertAddress.parse(expert), 0, "a label", rule) for expert, rule in RULES.items()]
TEXT = Corpus.of([Document("a", "abc 123 Qqxyz 45" * 5), Document("b", "ZZ qabc 9"), Document("c", "nothing")], id="t")


def test_a_rule_marks_what_a_concept_with_the_same_expression_marks_across_windows():
    concepts = [ml.concept(f"c{i}", regex=rule) for i, rule in enumerate(RULES.values())]
    text = tokenize(TEXT, tiny.tokenizer(), concepts, max_length=13)
    assert len(text) > 5
    for number, marks in enumerate(marked(CLAIMS, text, documents=np.arange(3))):
        assert marks is not None
        np.testing.assert_array_equal(marks, text.label(number))


def test_documents_that_are_not_on_trial_are_not_read():
    text = tokenize(TEXT, tiny.tokenizer(), [])
    found = marked(CLAIMS[:1], text, documents=np.array([1]))[0]
    assert set(text.document[text.window_of[found]]) == {1}


@pytest.mark.parametrize(
    ("surface", "wanted"),
    [
        (" ", "blank"), ("\n\n", "line break"), (" 42", "number"), (" the", "lower case"), ("The", "capitalised"),
        ("NASA", "capitals"), ("::", "sign"), ("x1", "mixed"), ("漢字", "other letters"), ("A", "capitalised"),
    ],
)  # fmt: skip
def test_classes_of_tokens(surface, wanted):
    assert token_class(surface) == wanted


def test_a_neighbour_is_the_expert_of_the_layer_whose_load_is_nearest():
    places = [(0, 1), (0, 2), (0, 3), (1, 1)]
    real = [Claim("real", ExpertAddress(*place), 0, f"{place}", rule=f"rule of {place}") for place in places]
    load = dict(zip([claim.expert for claim in real], [100, 900, 130, 100], strict=True))
    made = borrowed(real, ["other-expert", "random-expert"], load.__getitem__)
    of = {(claim.kind, str(claim.expert)): claim for claim in made}
    assert of["other-expert", "L0.E1"].label == "(0, 3)"
    assert of["other-expert", "L0.E2"].label == "(0, 3)"
    assert ("other-expert", "L1.E1") not in of
    drawn = [claim for claim in made if claim.kind == "random-expert"]
    assert sorted(claim.label for claim in drawn) == sorted(claim.label for claim in real)
    assert all(claim.label != str((claim.expert.layer, claim.expert.expert)) for claim in drawn)
    assert all(claim.rule == f"rule of {claim.label}" for claim in made)


def test_controls_of_the_layer_are_matched_and_not_on_trial():
    load, mass = {0: np.array([100, 110, 300, 95])}, {0: np.array([50, 52.0, 150, 49])}
    on_trial = [ExpertAddress(0, 0), ExpertAddress(0, 1)]
    assert _controls(on_trial, load, mass) == [ExpertAddress(0, 3)]


def test_a_horizon_is_a_mean_within_the_window():
    delta, window = np.array([1.0, 2, 3, 4, 5], np.float32), np.array([0, 0, 0, 1, 1])
    assert ahead(delta, window, 1).tolist() == delta.tolist()
    assert ahead(delta, window, 2).tolist() == [1.5, 2.5, 3, 4.5, 5]
    assert ahead(delta, window, 9).tolist() == [2, 2.5, 3, 4.5, 5]


@pytest.mark.parametrize("mode", ["zero", "mean_off", "mean"])
def test_at_each_visit_the_expert_and_then_one_beside_it_is_taken_away(lens_of, mode):
    lens, text = lens_of("olmoe"), some_text(lengths=(12, 9))
    effects = Effects(lens, text, progress=False)
    expert = lens.address(busiest(lens, text, 0))
    reference = reference_text(lens, text, [0], split="test")  # type: ignore[arg-type]
    found = measure(effects, [expert], [mode], reference=reference, positions="focal", progress=False)[expert, mode]
    assert found.beside is not None
    assert (found.beside.expert != expert.expert).all()
    make = {"zero": ml.zero, "mean_off": ml.mean_off, "mean": ml.mean}[mode]
    options = {} if mode == "zero" else {"reference": reference}
    for i, at in enumerate(found.at.tolist()):
        scope = np.zeros(text.n_tokens, bool)
        scope[effects.text.token[at]] = True
        other = ExpertAddress(0, int(found.beside.expert[i]))
        for address, effect, gate in (
            (expert, found.effect, found.gate),
            (other, found.beside.effect, found.beside.gate),
        ):
            alone = effects.of(make(address, **options), tokens=scope)
            assert effect[i] == pytest.approx(alone.delta[at], abs=1e-5)
            assert gate[i] == pytest.approx(effects.gates(address)[at])
    together = measure(effects, [expert], [mode], reference=reference, progress=False)[expert, mode]
    assert np.abs(together.effect - found.effect).max() > 1e-4  # attention carries effects of earlier visits on
    assert (together.everywhere(len(effects.nll)) != 0).sum() <= len(found.at)


def test_clean_passes_that_are_not_kept_change_nothing(lens_of):
    lens, text = lens_of("olmoe"), some_text()
    experts = [lens.address(busiest(lens, text, 0, rank)) for rank in (0, 1)]
    few, many = (
        measure(
            Effects(lens, text, max_memory=memory, progress=False), experts, ["zero"], reference=None, progress=False
        )
        for memory in (0, 2**30)
    )
    assert few.keys() == many.keys()
    for key, found in many.items():
        np.testing.assert_allclose(few[key].effect, found.effect, atol=1e-5)
        assert few[key].beside is not None
        assert found.beside is not None
        np.testing.assert_allclose(few[key].beside.effect, found.beside.effect, atol=1e-5)  # type: ignore[union-attr]
