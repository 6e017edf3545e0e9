"""Ablation on every family, against surgery on the weights: zeroed down-projections, deleted router rows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import moe_lens as ml
from moe_lens.models.sites import is_experts
from moe_lens.types import Role
from tests.conformance.specimen import IMPLEMENTATIONS, Specimen

FIXED_BY_TOKEN = {"deepseek_v4": (0,)}
"""Layers whose experts are a table by token id: no router to ask again."""

NOT_DELETABLE = {
    "zaya": "the skip class is known by its number, which deletion changes",
    "inkling_text": "its router also sets the gains of the shared experts, which mask_refill leaves clean",
}

GROUPED = ("n_group", "num_expert_group", "num_group", "n_expert_groups")


def busiest(specimen: Specimen, n: int) -> dict[int, list[int]]:
    """The experts of each MoE layer that most tokens visit."""
    taps: list[Any] = []
    with specimen.lens.tapping(taps.append, roles=[Role.MOE]):
        specimen.logits()
    return {tap.layer: tap.offsets.diff().argsort(descending=True)[:n].tolist() for tap in taps}


def addresses(experts: dict[int, list[int]]) -> list[str]:
    return [f"L{layer}.E{expert}" for layer, found in experts.items() for expert in found]


@pytest.mark.parametrize("native", IMPLEMENTATIONS)
def test_zero_ablation_equals_zeroed_down_projection(specimen: Specimen, native: str) -> None:
    experts = busiest(specimen, 2)
    surgery = copy.deepcopy(specimen.model)
    with torch.no_grad():
        for site in specimen.sites:
            module: Any = surgery.get_submodule(site.path)
            module.down_proj[experts[site.layer]] = 0
            if module.has_bias:
                module.down_proj_bias[experts[site.layer]] = 0
    surgery.set_experts_implementation(native)
    with torch.no_grad():
        wanted = surgery(input_ids=specimen.ids, use_cache=False).logits
    with specimen.set_to(native), specimen.lens.edit(ml.zero(addresses(experts))):
        got = specimen.logits()
    assert torch.equal(got, wanted)
    assert not torch.equal(got, specimen.observe(native).clean)


def group_count(router: Any) -> int:
    holders = (router, getattr(router, "config", None))
    return max(int(getattr(holder, name, 1) or 1) for holder in holders for name in GROUPED)


def prune(model: Any, layer_path: str, gone: list[int]) -> None:
    """Delete experts from an experts module and everything about them from the modules beside it."""
    experts = model.get_submodule(layer_path)
    block = model.get_submodule(layer_path.rpartition(".")[0])
    n_experts = experts.num_experts
    kept = [e for e in range(n_experts) if e not in gone]
    modules = [experts]
    for name in ("gate", "router"):
        if isinstance(getattr(block, name, None), nn.Module):
            modules += list(getattr(block, name).modules())
    for module in [*modules, block]:
        for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            for dim, size in enumerate(value.shape):
                extra = size - n_experts  # scores that a router gives to something else stay
                if 0 <= extra <= 2 and (module is not block or value.dim() == 1) and not (module is experts and dim):
                    rows = kept + list(range(n_experts, size))
                    new = value.detach().index_select(dim, torch.tensor(rows)).clone()
                    is_parameter = isinstance(value, nn.Parameter)
                    setattr(module, name, nn.Parameter(new) if is_parameter else nn.Buffer(new))
                    break
        for name in ("num_experts", "n_routed_experts", "num_group_experts"):
            if getattr(module, name, None) == n_experts:
                setattr(module, name, len(kept))
        for name in ("n_total_experts", "num_router_classes"):
            if hasattr(module, name):
                setattr(module, name, getattr(module, name) - len(gone))


def test_mask_refill_equals_a_model_without_the_router_row_and_the_expert(specimen: Specimen) -> None:
    layer = specimen.sites[-1].layer
    site = specimen.sites[-1]
    if group_count(site.router) > 1:
        pytest.skip("deleting an expert breaks the shape of the groups")
    if specimen.name in NOT_DELETABLE:
        pytest.skip(NOT_DELETABLE[specimen.name])
    gone = busiest(specimen, 1)[layer]
    pruned = copy.deepcopy(specimen.model)
    prune(pruned, site.path, gone)
    with torch.no_grad():
        wanted = pruned(input_ids=specimen.ids, use_cache=False).logits
    with specimen.lens.edit(ml.mask_refill(addresses({layer: gone}))) as record:
        got = specimen.logits()
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-5)
    assert record.total("unsatisfied") == 0
    assert record.total("refilled") > 0
    assert (got - specimen.observe("grouped_mm").clean).abs().max() > 1e-4


def test_a_masked_expert_gets_no_weight_or_the_record_says_so(specimen: Specimen) -> None:
    experts = busiest(specimen, 1)
    taps: list[Any] = []
    edit, tap = specimen.lens.edit(ml.mask_refill(addresses(experts))), specimen.lens.tapping
    with edit as record, tap(taps.append, roles=[Role.MOE]):
        got = specimen.logits()
    assert torch.isfinite(got).all()
    for tap in taps:
        rows = torch.isin(tap.expert, torch.tensor(experts[tap.layer]))
        assert (tap.weight[rows] == 0).all()
        dropped = record.counts["mask_refill", tap.layer]["unsatisfied"]
        assert dropped == int(tap.token[rows].unique().numel())
        if tap.layer in FIXED_BY_TOKEN.get(specimen.name, ()):
            assert dropped > 0


def test_the_pruned_model_of_the_test_has_one_expert_less(specimen: Specimen) -> None:
    site = specimen.sites[-1]
    pruned = copy.deepcopy(specimen.model)
    prune(pruned, site.path, [0])
    module: Any = pruned.get_submodule(site.path)
    assert is_experts(module)
    assert module.num_experts == site.n_experts - 1 == module.down_proj.shape[0]
