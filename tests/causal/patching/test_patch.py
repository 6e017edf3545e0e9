"""`ml.patch` against plain passes in which the same writes are put in by hand, one prompt at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import moe_lens as ml
from moe_lens.causal.patching.plan import Grid
from moe_lens.causal.patching.run import patch
from moe_lens.models.lens import Lens
from moe_lens.models.seam import Edit
from moe_lens.types import ExpertAddress, Role
from tests.models import tiny

FAMILIES = ("olmoe", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss")
PAIR = (11, 17)
IDS = tiny.ids(12, seed=5).tolist()
OTHER = [*IDS[:4], 99, *IDS[5:8], 33, *IDS[9:]]
"""Differs in positions 4 and 8."""


def patched(lens: Lens, clean: Any = IDS, corrupt: Any = OTHER, **options: Any) -> Any:
    given = {"target": PAIR[0], "foil": PAIR[1], "n_random": 0, "progress": False}
    return patch(lens, clean, corrupt, **{**given, **options})


def difference(lens: Lens, ids: Sequence[int]) -> float:
    with torch.no_grad():
        logits = lens.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, -1].double()
    return float(logits[PAIR[0]] - logits[PAIR[1]])


def writes(lens: Lens, ids: Sequence[int], layer: int) -> torch.Tensor:
    """Gate times output (position, expert, d_model) of one layer, zero where an expert is not visited."""
    kept: list[Any] = []
    with torch.no_grad(), lens.tapping(kept.append, layers=[layer], roles=[Role.MOE]):
        lens.model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    (tap,) = kept
    out = torch.zeros(tap.n_tokens, tap.n_experts, tap.output.shape[1])
    out[tap.token, tap.expert] = tap.output * tap.weight[:, None]
    return out


def by_hand(
    lens: Lens,
    base: Sequence[int],
    source: Sequence[int],
    experts: Sequence[ExpertAddress],
    at: Sequence[tuple[int, int]],
    routing: str = "live",
) -> float:
    """Logit difference with the writes of `experts` in `source` added to, and their own taken from, the layer's sum.

    Layer after layer: what a later expert writes itself is read in a pass that is patched below.
    """
    layers = sorted({expert.layer for expert in experts})
    in_source = {layer: writes(lens, source, layer) for layer in layers}
    with ExitStack() as stack:
        if routing == "frozen":
            stack.enter_context(_choices_of(lens, base))
        for layer in layers:
            theirs, own = in_source[layer], writes(lens, base, layer)
            change = torch.zeros_like(own[:, 0])
            numbers = [expert.expert for expert in experts if expert.layer == layer]
            for here, there in at:
                change[here] = (theirs[there, numbers] - own[here, numbers]).sum(0)
            site = next(site for site in lens.sites if site.layer == layer and site.role is Role.MOE)

            def add(_m: Any, _a: Any, out: torch.Tensor, change: torch.Tensor = change) -> torch.Tensor:
                return out + change.view_as(out)

            stack.callback(site.module.register_forward_hook(add).remove)
        return difference(lens, base)


def _choices_of(lens: Lens, ids: Sequence[int]) -> Any:
    """Later passes use the experts and weights of a clean pass over `ids`."""
    kept: dict[int, Any] = {}

    class Keep(Edit):
        def routing(self, routing: Any) -> None:
            kept[routing.site.layer] = (routing.index.clone(), routing.weight.clone())

    class Again(Edit):
        def routing(self, routing: Any) -> Any:
            index, weight = kept[routing.site.layer]
            return replace(routing, index=index, weight=weight)

    with lens.tapping(lambda _tap: None, roles=[Role.MOE], edit=Keep()):
        difference(lens, ids)
    return lens.tapping(lambda _tap: None, roles=[Role.MOE], edit=Again())


def singles(found: Any) -> dict[ExpertAddress, float]:
    base = found.difference_corrupt if found.direction == "denoise" else found.difference_clean
    sign = math.copysign(1, found.difference_clean - found.difference_corrupt)
    sign = sign if found.direction == "denoise" else -sign
    rows = found.experts
    return {
        ExpertAddress(int(layer), int(expert)): base + sign * effect
        for layer, expert, effect in zip(rows["layer"], rows["expert"], rows["effect"], strict=True)
    }


ALL = [(i, i) for i in range(len(IDS))]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_gives_what_its_writes_put_in_by_hand_give(lens_of, family):
    lens = lens_of(family)
    found = singles(patched(lens))
    assert len(found) == sum(lens.spec.at(layer).n_experts for layer in lens.layers)
    wanted = {expert: by_hand(lens, OTHER, IDS, [expert], ALL) for expert in found}
    moved = [abs(value - difference(lens, OTHER)) for value in wanted.values()]
    assert max(moved) > 0.02
    assert list(found.values()) == pytest.approx(list(wanted.values()), abs=2e-4)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("routing", ["live", "frozen"])
def test_either_direction_and_routing_gives_what_a_plain_pass_gives(lens_of, direction, routing):
    lens = lens_of("olmoe")
    found = singles(patched(lens, direction=direction, routing=routing))
    base, source = (OTHER, IDS) if direction == "denoise" else (IDS, OTHER)
    wanted = [by_hand(lens, base, source, [expert], ALL, routing) for expert in found]
    assert list(found.values()) == pytest.approx(wanted, abs=2e-4)


def test_live_and_frozen_routing_differ_below_the_last_layer_and_agree_there(lens_of):
    found = {r: patched(lens_of("olmoe"), routing=r).frame for r in ("live", "frozen")}
    off = (found["live"]["effect"] - found["frozen"]["effect"]).abs()
    layer = found["live"]["layer"]
    assert off[layer == 1].max() < 1e-5
    assert off[layer == 0].max() > 1e-3


@pytest.mark.parametrize("routing", ["live", "frozen"])
def test_coalitions_set_writes_also_where_a_patch_below_changed_them(lens_of, routing):
    lens = lens_of("olmoe")
    members = [["L0.E0", "L0.E1", "L0.E2", "L1.E0", "L1.E3", "L1.E4"], ["L1.E1", "L1.E2"]]
    found = patched(lens, coalitions=members, routing=routing)
    start = difference(lens, OTHER)
    sign = math.copysign(1, difference(lens, IDS) - start)
    for row, names in zip(found.coalitions.itertuples(), members, strict=True):
        wanted = by_hand(lens, OTHER, IDS, [ExpertAddress.parse(n) for n in names], ALL, routing)
        assert start + sign * row.effect == pytest.approx(wanted, abs=2e-4)
        assert row.experts == ", ".join(names)


def test_a_later_member_is_patched_wherever_a_patch_below_may_bring_visits():
    visited = {0: np.array([[0, 0], [1, 0], [0, 1]], bool), 1: np.array([[0, 0], [0, 0], [1, 0]], bool)}
    grid = Grid({}, visited, positions=(1, 2))
    cells = grid.together([ExpertAddress(0, 0), ExpertAddress(1, 1)])
    assert cells[0].tolist() == [[False, False], [True, False], [False, False]]
    assert cells[1].tolist() == [[False, False], [False, True], [False, True]]


def test_a_whole_layer_is_the_coalition_of_its_experts_and_all_layers_of_all(lens_of):
    lens = lens_of("mixtral")
    found = patched(lens, coalitions=[[f"L{layer}.E{e}" for e in range(4)] for layer in (0, 1)])
    layers = found.frame[(found.frame["unit"] == "layer") & found.frame["position"].isna()]
    np.testing.assert_allclose(found.coalitions["effect"], layers["effect"], atol=1e-4)
    every = patched(lens, coalitions=[[f"L{layer}.E{e}" for layer in (0, 1) for e in range(4)]])
    together = found.frame.query("unit == 'all'")["effect"].item()
    assert every.coalitions["effect"].item() == pytest.approx(together, abs=1e-4)


@pytest.mark.parametrize("positions", [[8], [-4, 5], [(4, 8), (9, 9)], "last"])
def test_chosen_positions_are_the_only_ones_patched(lens_of, positions):
    lens = lens_of("olmoe")
    found = patched(lens, positions=positions)
    chosen = [11] if positions == "last" else positions
    pairs = [p if isinstance(p, tuple) else (p % 12, p % 12) for p in chosen]
    swapped = [(corrupt, clean) for clean, corrupt in pairs]
    wanted = [by_hand(lens, OTHER, IDS, [expert], swapped) for expert in singles(found)]
    assert list(singles(found).values()) == pytest.approx(wanted, abs=2e-4)


def test_prompts_of_unequal_length_are_patched_where_pairs_are_given(lens_of):
    lens = lens_of("olmoe")
    longer = [*OTHER[:4], 7, *OTHER[4:]]
    pairs = [(4, 5), (11, 12)]
    found = patched(lens, corrupt=longer, positions=pairs)
    wanted = [by_hand(lens, longer, IDS, [expert], [(5, 4), (12, 11)]) for expert in singles(found)]
    assert list(singles(found).values()) == pytest.approx(wanted, abs=2e-4)


def test_outputs_at_the_gates_of_the_prompt_that_runs_are_what_the_edit_mode_puts_there(lens_of):
    lens = lens_of("olmoe")
    clean, corrupt = "two plus two is four", "two plus ten is four"
    found = singles(patched(lens, clean, corrupt, what="output"))
    ids = lens.tokenizer(corrupt)["input_ids"]
    for expert, value in found.items():
        with lens.edit(ml.edits.patch(expert, source=clean)):
            assert value == pytest.approx(difference(lens, ids), abs=2e-4), expert


def test_each_position_alone_is_measured_for_layers_and_on_request_for_experts(lens_of):
    lens = lens_of("olmoe")
    found = patched(lens, each_position=True).frame
    start, end = difference(lens, OTHER), difference(lens, IDS)
    sign = math.copysign(1, end - start)
    alone = found[found["position"].notna()]
    assert set(alone["position"]) == set(range(4, 12))
    rows = alone[alone["unit"] == "expert"].iloc[[0, 5, -1]]
    for row in rows.itertuples():
        wanted = by_hand(lens, OTHER, IDS, [ExpertAddress(row.layer, row.expert)], [(row.position, row.position)])
        assert start + sign * row.effect == pytest.approx(wanted, abs=2e-4)
        assert row.visits_clean + row.visits_corrupt >= 1
    layer = alone[alone["unit"] == "layer"].iloc[3]
    experts = [ExpertAddress(layer["layer"], e) for e in range(6)]
    wanted = by_hand(lens, OTHER, IDS, experts, [(layer["position"], layer["position"])])
    assert start + sign * layer["effect"] == pytest.approx(wanted, abs=2e-4)


def test_where_prompts_begin_alike_nothing_is_patched(lens_of):
    found = patched(lens_of("olmoe"))
    assert found.patched == tuple((i, i) for i in range(4, 12))


def test_target_and_foil_default_to_what_either_prompt_predicts(lens_of):
    lens = lens_of("olmoe")
    found = patched(lens, target=None, foil=None)
    top = [
        lens.tokenizer.decode(lens.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()) for ids in (IDS, OTHER)
    ]
    assert [found.target, found.foil] == top
    assert found.difference_clean > 0 > found.difference_corrupt


def test_greedy_coalitions_grow_by_the_expert_that_adds_most(lens_of):
    lens = lens_of("olmoe")
    found = patched(lens, coalitions=2)
    first, second = found.coalitions["experts"]
    assert first == "L{layer}.E{expert}".format(**found.experts.iloc[0])
    others = [str(e) for e in singles(found) if str(e) != first]
    pairs = patched(lens, coalitions=[[first, other] for other in others]).coalitions
    best = pairs.loc[pairs["effect"].idxmax()]
    assert set(second.split(", ")) == set(best["experts"].split(", "))
    assert found.coalitions["effect"][1] == pytest.approx(best["effect"], abs=1e-4)


def test_batches_run_far_fewer_passes_than_a_loop_and_give_the_same(lens_of, monkeypatch):
    lens = lens_of("olmoe")
    found = patched(lens, coalitions=2, n_random=5)
    monkeypatch.setattr("moe_lens.causal.patching.run.BATCH_TOKENS", {"cpu": 1})
    loop = patched(lens, coalitions=2, n_random=5)
    assert loop.n_passes == loop.n_patches == found.n_patches
    assert found.n_patches > 10 * found.n_passes
    np.testing.assert_allclose(loop.frame["effect"], found.frame["effect"], atol=1e-5)
    np.testing.assert_allclose(loop.controls["effect"], found.controls["effect"], atol=1e-5)


def test_a_model_whose_experts_are_convolved_over_tokens_gives_the_same(lens_of):
    lens = lens_of("longcat_flash")
    found = singles(patched(lens, layers=lens.layers[:1]))
    wanted = {expert: by_hand(lens, OTHER, IDS, [expert], ALL) for expert in found}
    assert list(found.values()) == pytest.approx(list(wanted.values()), abs=2e-4)


def test_the_ffn_of_a_dense_model_is_one_expert(lens_of):
    lens = lens_of("llama")
    found = patched(lens)
    assert len(found.experts) == len(lens.layers)
    layers = found.frame[(found.frame["unit"] == "layer") & found.frame["position"].isna()]
    experts = found.experts.sort_values("layer")
    np.testing.assert_allclose(experts["effect"], layers["effect"], atol=1e-6)
    assert experts["p_random"].isna().all()


def test_low_precision_is_said():
    lens = Lens(tiny.build("olmoe", dtype=torch.bfloat16), tiny.tokenizer())
    assert "the model runs in bfloat16" in patched(lens).notes[-1]
    assert not any("float" in note for note in patched(Lens(lens.model.float(), None)).notes)


def test_the_model_is_left_as_it_was(lens_of):
    lens = lens_of("olmoe")
    before = difference(lens, IDS)
    patched(lens, coalitions=[["L0.E1"]], routing="frozen", n_random=2)
    assert difference(lens, IDS) == before
