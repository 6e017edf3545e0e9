"""Effects of sets on a model: equal to plain passes, once each, and nothing where nothing is removed."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

import moe_lens as ml
from moe_lens.causal.effects import Effects
from moe_lens.causal.faithfulness.alignment import churn
from moe_lens.causal.faithfulness.measure import SET_MODES, Measured, check_modes, edit_maker
from moe_lens.causal.faithfulness.settings import Texts
from moe_lens.causal.faithfulness.visits import routed_units, visits
from moe_lens.errors import BadConfig, BadCorpus, NotAnMoE
from moe_lens.models.lens import Lens
from moe_lens.types import Role
from tests.causal.small import plain_effect, some_text
from tests.models import tiny

TEXT = some_text()
REFERENCE = "Seven wizards quickly jump over the fox's box."


@pytest.fixture(scope="module")
def effects() -> Effects:
    return Effects(Lens(tiny.build("olmoe"), tiny.tokenizer(), name="olmoe"), TEXT, progress=False, batch_tokens=64)


def measured(effects: Effects, *modes: str, reference: Any = REFERENCE, **options: Any) -> Measured:
    units = routed_units(effects.lens)
    layer = np.array([unit.layer for unit in units])
    collected = effects.lens.reference(reference, experts=units)
    makers = {m: edit_maker(m, units, layer, reference=collected, effects=effects) for m in modes}
    return Measured(effects, units, makers, **options)


def removed(found: Measured, *names: str) -> np.ndarray:
    return np.array([str(unit) in names for unit in found.units])


def per_document(effects: Effects, values: np.ndarray) -> np.ndarray:
    return np.bincount(effects.text.document, values)


@pytest.mark.parametrize("mode", ["zero", "mean_off", "drop_renorm", "mask_refill", "mask_refill_keep"])
def test_the_effect_of_a_set_is_that_of_plain_passes(effects, mode):
    found = measured(effects, mode)
    names = ["L0.E1", "L0.E4", "L1.E0", "L1.E2", "L1.E5"]
    extra = {"reference": effects.lens.reference(REFERENCE, experts=names)} if mode == "mean_off" else {}
    wanted = plain_effect(effects.lens, TEXT, effects.text.token, ml.edits.MODES[mode](names, **extra))
    effect = found.of(mode, removed(found, *names))
    np.testing.assert_allclose(effect.kl, per_document(effects, wanted["kl"]), atol=2e-4)
    np.testing.assert_allclose(effect.nll, per_document(effects, wanted["nll"] - wanted["nll_clean"]), atol=2e-4)
    assert np.isfinite(effect.mass_ratio) == (mode not in ("zero", "mean_off"))


def test_each_set_runs_once_and_the_empty_set_never(effects, monkeypatch):
    found = measured(effects, "zero", "mean_off")
    calls: list[int] = []
    real = Effects.of_each
    monkeypatch.setattr(Effects, "of_each", lambda self, edits, **o: calls.append(len(edits)) or real(self, edits, **o))
    one, none = removed(found, "L0.E1"), removed(found)
    found.run([("zero", one), ("zero", none), ("zero", one.copy()), ("mean_off", one)])
    found.run([("zero", one)])
    assert (sum(calls), found.n_passes) == (2, 2)
    assert not found.of("zero", none).kl.any()
    assert not found.of("zero", none).nll.any()
    assert effects.progress is False


def test_o6_ablating_a_never_routed_unit_changes_nothing():
    lens = Lens(tiny.build("olmoe"), None)
    effects = Effects(lens, some_text(lengths=(3, 3)), progress=False)
    idle = next(e for e in range(6) if e not in effects.routing[1][0])
    units = routed_units(lens)
    layer = np.array([unit.layer for unit in units])
    modes = ("zero", "drop_renorm")
    found = Measured(effects, units, {m: edit_maker(m, units, layer, reference=None, effects=effects) for m in modes})
    for mode in modes:
        effect = found.of(mode, removed(found, f"L1.E{idle}"))
        assert not effect.kl.any()
        assert not effect.nll.any()


@pytest.mark.parametrize("mode", ["mask_refill", "mask_refill_keep"])
def test_a_layer_without_survivors_is_zeroed_and_counted(effects, mode):
    found = measured(effects, mode)
    whole = [f"L0.E{e}" for e in range(6)]
    effect = found.of(mode, removed(found, *whole, "L1.E2"))
    both = (ml.edits.MODES[mode]("L1.E2"), ml.zero(whole))
    wanted = plain_effect(effects.lens, TEXT, effects.text.token, *both)
    np.testing.assert_allclose(effect.kl, per_document(effects, wanted["kl"]), atol=2e-4)
    assert effect.layers_emptied == 1
    everything = found.of(mode, np.ones(len(found.units), bool))
    assert everything.layers_emptied == 2
    assert everything.kl.sum() > 0


def test_tokens_with_too_few_survivors_are_counted(effects):
    found = measured(effects, "mask_refill_keep")
    effect = found.of("mask_refill_keep", removed(found, *(f"L1.E{e}" for e in range(5))))  # one is left, top-k is 2
    assert effect.short_tokens > 0
    assert effect.layers_emptied == 0
    assert 0 < effect.mass_ratio < 1


@pytest.mark.parametrize("mode", ["mean", "resample"])
def test_units_that_the_reference_never_visits_are_zeroed(effects, mode):
    found = measured(effects, mode, reference="ab")
    counts = effects.lens.reference("ab", experts=found.units).count[1]
    unseen = f"L1.E{int((counts == 0).nonzero()[0])}"
    effect = found.of(mode, removed(found, unseen))
    wanted = plain_effect(effects.lens, TEXT, effects.text.token, ml.zero(unseen))
    np.testing.assert_allclose(effect.kl, per_document(effects, wanted["kl"]), atol=2e-4)


def test_clean_passes_that_are_not_kept_give_the_same(effects):
    again = Effects(effects.lens, TEXT, progress=False, batch_tokens=64, max_memory=0)
    assert not again.is_kept
    a, b = (measured(e, "zero") for e in (effects, again))
    wanted = [("zero", removed(a, "L0.E1")), ("zero", removed(a, "L1.E3", "L0.E0"))]
    b.run(wanted)
    for mode, one in wanted:
        np.testing.assert_allclose(a.of(mode, one).kl, b.of(mode, one).kl, atol=1e-5)


def test_churn_is_counted_where_the_router_chooses_again(effects):
    lens = effects.lens
    found = churn(effects, [ml.zero("L0.E1")])
    assert found[0] == 0
    chosen: list[list[np.ndarray]] = [[], []]
    for into, block in zip(chosen, (None, lens.edit(ml.zero("L0.E1"))), strict=True):
        into += every_choice(lens, block)
    both = np.concatenate(chosen[0]) & np.concatenate(chosen[1])
    either = np.concatenate(chosen[0]) | np.concatenate(chosen[1])
    assert found[1] == pytest.approx(1 - (both.sum(1) / either.sum(1)).mean(), abs=1e-6)
    assert found[1] > 0
    assert churn(effects, [ml.mask_refill_keep("L0.E1")])[0] > 0


def every_choice(lens: Lens, block: Any) -> list[np.ndarray]:
    rows: list[np.ndarray] = []

    def on_tap(tap: Any) -> None:
        visited = np.zeros((tap.n_tokens, tap.n_experts), bool)
        visited[tap.token, tap.expert] = True
        rows.append(visited)

    with block or nullcontext(), lens.tapping(on_tap, layers=[1], roles=[Role.MOE]), torch.no_grad():
        for start, stop in zip(TEXT.offsets, TEXT.offsets[1:], strict=False):
            lens.model(input_ids=torch.from_numpy(TEXT.input_ids[start:stop]).long()[None])
    return rows


def test_visits_add_up_to_the_routing_of_the_text(effects):
    v = visits(effects)
    eligible = TEXT.eligible[effects.text.read]
    for layer, (index, weight) in effects.routing.items():
        mine = v.layer == layer
        load = np.bincount(index[eligible].ravel(), minlength=6)
        assert v.load.sum(0)[mine].tolist() == load.tolist()
        mass = np.bincount(index[eligible].ravel(), weight[eligible].ravel(), minlength=6)
        np.testing.assert_allclose(v.mass.sum(0)[mine], mass, rtol=1e-5)
    assert v.n_tokens.sum() == eligible.sum()
    assert v.slots.tolist() == [2] * 12
    assert (v.weighted_norm <= v.norm + 1e-9).all()
    assert ((v.peak > 0) == (v.load > 0)).all()
    assert (v.norm >= v.peak - 1e-5).all()


def test_a_loud_expert_of_an_early_layer_is_a_super_expert():
    for layer, wanted in ((0, ["L0.E3"]), (1, [])):
        model = tiny.build("olmoe")
        quiet = visits(Effects(Lens(model, None), TEXT, progress=False))
        assert quiet.super_experts() == ()
        with torch.no_grad():
            model.model.layers[layer].mlp.experts.down_proj[3] *= 1000
        loud = visits(Effects(Lens(model, None), TEXT, progress=False))
        assert [str(unit) for unit in loud.super_experts()] == wanted


def test_bad_input_is_one_sentence(effects):
    with pytest.raises(BadConfig, match="did you mean 'zero'"):
        check_modes(["zeroo"])
    with pytest.raises(BadConfig, match="unknown mode 'patch'"):
        check_modes(["patch"])
    with pytest.raises(BadConfig, match="no ablation mode"):
        check_modes([])
    assert check_modes(SET_MODES) == SET_MODES
    assert check_modes("zero") == ("zero",)
    with pytest.raises(NotAnMoE, match="no routed experts to rank"):
        routed_units(Lens(tiny.build("llama"), None))
    alone = Texts(100, (None, None), include_first=False)
    with pytest.raises(BadCorpus, match="evaluation text has one"):
        alone.check(some_text(lengths=(12,)), seed=0)
