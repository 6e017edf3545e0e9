"""Oracles O3, O4 and O5 of METRICS 6.1, through `Effects`."""

from __future__ import annotations

import pytest

import moe_lens as ml
from moe_lens.causal.effects import Effects
from tests.causal.toy import TEXT, toy

MODES = {
    "zero": lambda: ml.zero("L0.E0"),
    "drop_renorm": lambda: ml.drop_renorm("L0.E0", total="one"),
    "mask_refill": lambda: ml.mask_refill("L0.E0"),
    "mask_refill_keep": lambda: ml.mask_refill_keep("L0.E0"),
}


def effects(**options) -> Effects:
    return Effects(toy(**options), TEXT, include_first=True, progress=False)


@pytest.mark.parametrize(
    ("renorm", "clean", "deltas", "divergences"),
    [
        (True, 0.348445, {"zero": 0.549679, "drop_renorm": 0.964817, "mask_refill": -0.035183},
         {"zero": 0.181910, "drop_renorm": 0.413164, "mask_refill": 0.001594}),
        (False, 0.403186, {"zero": 0.451169, "drop_renorm": 0.910076, "mask_refill": -0.089924,
                           "mask_refill_keep": 0.070891},
         {"zero": 0.119357, "drop_renorm": 0.345995, "mask_refill": 0.009619}),
    ],
)  # fmt: skip
def test_the_worked_toy_has_the_printed_digits(renorm, clean, deltas, divergences):
    found = effects(renorm=renorm)
    assert found.nll.tolist() == pytest.approx([clean], abs=1e-6)
    for mode, value in deltas.items():
        assert found.of(MODES[mode]()).delta.tolist() == pytest.approx([value], abs=1.1e-6), mode
    for mode, value in divergences.items():
        assert found.of(MODES[mode]()).kl.tolist() == pytest.approx([value], abs=1.1e-6), mode


def test_a_token_that_loses_all_its_experts_is_counted():
    """Oracle O6: drop_renorm has nothing to scale and falls back to zero."""
    found = effects()
    gone = found.of(ml.drop_renorm("L0.E0", "L0.E1"))
    assert gone.record.total("emptied") == len(TEXT.input_ids)
    assert gone.nll.tolist() == pytest.approx(found.of(ml.zero("L0.E0", "L0.E1")).nll.tolist(), abs=1e-6)


def test_where_writes_only_add_up_the_effect_of_a_set_is_the_sum_of_its_parts():
    """Oracle O4: super-additivity is 0, and leave-one-out orders the units as their writes do."""
    f = ((2.0, 0.5), (-1.0, 1.0), (0.5, -3.0), (7.0, 7.0))
    found = effects(p=(0.4, 0.3, 0.2, 0.1), f=f, top_k=3)

    def change(*experts: int) -> float:
        result = found.of(ml.zero([f"L0.E{e}" for e in experts]), quantities=(), pairs=[(0, 1)])
        return float((result.logit_difference - result.logit_difference_clean)[0, 0])

    alone = [change(e) for e in range(4)]
    assert alone == pytest.approx([-0.4 * 1.5, 0.3 * 2.0, -0.2 * 3.5, 0.0], abs=1e-5)
    for together in ((0, 1), (0, 2), (1, 2), (0, 1, 2)):
        assert change(*together) == pytest.approx(sum(alone[e] for e in together), abs=1e-5)


def test_two_identical_experts_show_nothing_alone_and_something_together():
    """Oracle O5: pair redundancy 1 - (D_a + D_b) / D_ab is 1."""
    found = effects(p=(0.6, 0.3, 0.1), f=((3.0, 0.0), (3.0, 0.0), (0.0, 1.0)), top_k=1, renorm=True)
    alone = [found.of(ml.mask_refill(f"L0.E{e}")).mean for e in (0, 1)]
    together = found.of(ml.mask_refill("L0.E0", "L0.E1")).mean
    assert alone == [0, 0]
    assert together > 1
    assert 1 - sum(alone) / together == 1
