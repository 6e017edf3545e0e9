"""mask_refill_keep for every kind of router, the gates computed by hand from the clean logits.

Written-out rules, one per family, beside which the package has none: survivors keep their clean gate bit for bit,
a replacement has its clean score over the clean denominator of the token, times the family's scale.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

import moe_lens as ml
from moe_lens.errors import UnsupportedModel
from moe_lens.models.lens import Lens
from moe_lens.types import Role
from tests.models import tiny

COMMON = {**tiny.COMMON, "head_dim": 16}
DEEP = {
    "intermediate_size": 40, "moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 3,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 16, "routed_scaling_factor": 1.5, "head_dim": 8,
}  # fmt: skip
E6 = {"intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2}
L6 = {"intermediate_size": 24, "num_local_experts": 6, "num_experts_per_tok": 2}
ROUTERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "plain softmax": ("Olmoe", {**E6, "norm_topk_prob": False}, "softmax"),
    "softmax, renormalised": ("Olmoe", {**E6, "norm_topk_prob": True}, "softmax/chosen"),
    "softmax, always renormalised": ("Mixtral", L6, "softmax/chosen"),
    "top-k, then softmax": ("GptOss", L6, "softmax/chosen"),
    "sigmoid with a bias in the parent": ("MiniMaxM2", L6, "sigmoid/chosen"),
    "sigmoid, renormalised, scaled": ("DeepseekV3", {**DEEP, "n_group": 1, "topk_group": 1}, "sigmoid/chosen*1.5"),
    "sigmoid, scaled": (
        "DeepseekV3", {**DEEP, "n_group": 1, "topk_group": 1, "norm_topk_prob": False}, "sigmoid*1.5",
    ),
    "grouped sigmoid": ("DeepseekV3", {**DEEP, "n_group": 2, "topk_group": 1}, "sigmoid/chosen*1.5"),
    "softmax, renormalised, a scale per expert": ("Gemma4Text", {
        "enable_moe_block": True, "intermediate_size": 40, "moe_intermediate_size": 24, "num_experts": 6,
        "top_k_experts": 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": tiny.VOCAB,
        "layer_types": ["sliding_attention", "full_attention"],
    }, "softmax/chosen*scale"),
    "one expert, plain softmax": ("Olmoe", {**E6, "num_experts_per_tok": 1, "norm_topk_prob": False}, "softmax"),
    "one expert, renormalised": ("Mixtral", {**L6, "num_experts_per_tok": 1}, "softmax/chosen"),
}  # fmt: skip


def build(prefix: str, keys: dict[str, Any]) -> Lens:
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**{**COMMON, **keys})
    model: Any = transformers.AutoModelForCausalLM.from_config(config)
    tiny.enliven(model)
    for name, buffer in model.named_buffers():
        if "correction_bias" in name:
            buffer.normal_(0, 0.2)
    return Lens(model.float().eval(), None)


def tap_of(lens: Lens, layer: int, *modes: Any) -> tuple[Any, Any]:
    taps: list[Any] = []

    def run() -> None:
        with torch.no_grad(), lens.tapping(taps.append, layers=[layer], roles=[Role.MOE]):
            lens.model(tiny.ids(4, 16), use_cache=False)

    if not modes:
        run()
        return taps[0], None
    with lens.edit(*modes) as record:
        run()
    return taps[0], record


def gates(tap: Any) -> torch.Tensor:
    """Gate of every (token, expert); 0 where not visited."""
    table = torch.zeros(tap.n_tokens, tap.n_experts)
    return table.index_put_((tap.token, tap.expert), tap.weight, accumulate=True)


def score(rule: str, logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Clean gate every expert would have at every token, chosen or not."""
    value = logits.double().softmax(dim=1) if rule.startswith("softmax") else logits.double().sigmoid()
    if "chosen" in rule:
        value = value / (value * chosen).sum(dim=1, keepdim=True)
    return value * (1.5 if rule.endswith("*1.5") else 1)


@pytest.mark.parametrize("router", list(ROUTERS))
def test_survivors_keep_their_gates_and_replacements_get_their_clean_score(router):
    prefix, keys, rule = ROUTERS[router]
    lens = build(prefix, keys)
    layer = lens.layers[-1]
    clean, _ = tap_of(lens, layer)
    before = gates(clean)
    visited = torch.zeros_like(before, dtype=torch.bool)
    visited[clean.token, clean.expert] = True
    wanted = score(rule, clean.router_logits, visited)
    if rule.endswith("*scale"):
        site = next(site for site in lens.sites if site.layer == layer and site.role is Role.MOE)
        wanted = wanted * site.router.per_expert_scale.detach()
    torch.testing.assert_close(before.double(), wanted * visited, rtol=1e-4, atol=1e-6)  # the rule as written is right
    gone = int(clean.offsets.diff().argmax())

    keep, record = tap_of(lens, layer, ml.mask_refill_keep(f"L{layer}.E{gone}"))
    refill, _ = tap_of(lens, layer, ml.mask_refill(f"L{layer}.E{gone}"))
    after = gates(keep)
    now = (after != 0) | visited
    survivors = visited.clone()
    survivors[:, gone] = False
    assert torch.equal(after[survivors], before[survivors])
    assert (after[:, gone] == 0).all()
    new = now & ~visited
    if router != "grouped sigmoid":  # there the router alone may move to another group altogether
        assert torch.equal(new | survivors, gates(refill) != 0)
    assert (gates(refill)[new] != 0).all()
    torch.testing.assert_close(after[new].double(), wanted[new], rtol=1e-4, atol=1e-6)
    lost = int(visited[:, gone].sum())
    assert int(new.sum()) == lost - record.total("unsatisfied") == record.total("refilled")
    assert lost > 5
    if not any(
        word in router for word in ("bias", "grouped", "scale per expert")
    ):  # those may prefer a replacement that has the higher gate
        assert record.frame["mass_ratio"].item() < 1


@pytest.mark.parametrize(
    "router", ["one expert, sigmoid", "sigmoid, scaled", "plain softmax", "one expert, plain softmax"]
)
def test_a_token_alone_gets_the_gate_it_gets_in_a_batch(router):
    """As in every step of a generation: one row cannot tell a sigmoid from a softmax."""
    prefix, keys, _ = {**ROUTERS, "one expert, sigmoid": ("DeepseekV3", {
        **DEEP, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1, "norm_topk_prob": False,
    }, "")}[router]  # fmt: skip
    lens = build(prefix, keys)
    layer, taps = lens.layers[-1], []
    experts = [f"L{layer}.E{e}" for e in range(3)]
    ids = tiny.ids(1, 16)
    with torch.no_grad(), lens.edit(ml.mask_refill_keep(experts)), lens.tapping(taps.append, layers=[layer]):
        lens.model(ids, use_cache=False)
        cache = lens.model(ids[:, :10], use_cache=True).past_key_values
        for i in range(10, 16):
            lens.model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
    routed = [tap for tap in taps if tap.role is Role.MOE]
    whole, steps = gates(routed[0]), torch.cat([gates(tap) for tap in routed[2:]])
    torch.testing.assert_close(steps, whole[10:], rtol=1e-3, atol=1e-5)


def test_a_router_without_a_score_per_logit_is_refused_by_name():
    lens = build("Phimoe", L6)
    with pytest.raises(UnsupportedModel, match=r"PhimoeTopKRouter .* use mask_refill or zero"):
        tap_of(lens, 1, ml.mask_refill_keep("L1.E0"))


def test_groups_that_cannot_be_refilled_are_counted_and_said(caplog):
    """Two groups of 4, one allowed, top-3: two removed experts of a group leave two to choose from."""
    lens = build("DeepseekV3", {**DEEP, "n_group": 2, "topk_group": 1})
    layer = lens.layers[-1]
    tap, record = tap_of(lens, layer, ml.mask_refill("L1.E0", "L1.E1", "L1.E2", "L1.E4", "L1.E5"))
    assert record.total("unsatisfied") == 64 == tap.n_tokens
    assert record.total("short") == 0
    dropped = torch.isin(tap.expert, torch.tensor([0, 1, 2, 4, 5]))
    assert (tap.weight[dropped] == 0).all()
    assert "limited to groups" in caplog.text
    assert "64 tokens" in caplog.text


def test_grouped_mask_refill_equals_a_model_with_one_expert_less_in_every_group():
    """Two groups of 4 become two groups of 3: the only deletion that a group-limited router survives."""
    lens = build("DeepseekV3", {**DEEP, "n_group": 2, "topk_group": 1})
    gone, kept = [1, 6], [0, 2, 3, 4, 5, 7]
    pruned = copy.deepcopy(lens.model)
    block = pruned.model.layers[1].mlp
    block.gate.weight = torch.nn.Parameter(block.gate.weight[kept])
    block.gate.e_score_correction_bias = torch.nn.Buffer(block.gate.e_score_correction_bias[kept])
    for name, value in list(block.experts.named_parameters()):
        setattr(block.experts, name, torch.nn.Parameter(value[kept]))
    block.gate.num_experts = block.experts.num_experts = len(kept)
    ids = tiny.ids(4, 16)
    with torch.no_grad():
        wanted, clean = pruned(ids, use_cache=False).logits, lens.model(ids, use_cache=False).logits
        with lens.edit(ml.mask_refill([f"L1.E{e}" for e in gone])) as record:
            got = lens.model(ids, use_cache=False).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert (got - clean).abs().max() > 1e-3
    assert record.total("unsatisfied") == 0


def test_a_group_is_chosen_for_its_survivors_and_not_for_the_removed():
    """Group 0 is attractive only through experts 0 and 1; without them group 1 has the better pair."""
    lens = build("DeepseekV3", {**DEEP, "n_group": 2, "topk_group": 1})
    router = lens.model.model.layers[1].mlp.gate
    router.e_score_correction_bias.copy_(torch.tensor([5.0, 5.0, -5.0, -5.0, 0, 0, 0, 0]))
    clean, _ = tap_of(lens, 1)
    assert set(clean.expert.tolist()) <= {0, 1, 2, 3}
    tap, record = tap_of(lens, 1, ml.mask_refill("L1.E0", "L1.E1"))
    assert set(tap.expert.tolist()) <= {4, 5, 6, 7}
    assert record.total("unsatisfied") == 0


def test_fewer_survivors_than_places_are_counted_as_short():
    lens = build("Olmoe", {**E6, "num_experts_per_tok": 3, "norm_topk_prob": True})
    tap, record = tap_of(lens, 1, ml.mask_refill("L1.E0", "L1.E1", "L1.E2", "L1.E3"))
    assert record.total("short") == 64
    assert record.total("unsatisfied") == 0
    sums = torch.zeros(64).index_add_(0, tap.token, tap.weight)
    torch.testing.assert_close(sums, torch.ones(64))
    assert set(tap.expert[tap.weight > 0].tolist()) == {4, 5}
