"""A bias on router logits is what a bias in the router would be, and its extremes are never and always."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import moe_lens as ml
from moe_lens.errors import BadConfig, UnsupportedModel
from moe_lens.models.edits import steered
from moe_lens.models.edits.steered import FULL
from moe_lens.models.lens import Lens
from moe_lens.types import ExpertTap, Role
from tests.causal.toy import toy
from tests.conformance import zoo, zoo_adapters
from tests.models import tiny

FAMILIES = ["olmoe", "mixtral", "qwen2_moe", "qwen3_moe"]
ZOO = ["afmoe", "deepseek_v3", "gpt_oss", "inkling_text", "zaya", "llama4_text", "longcat_flash", "phimoe"]
"""Routers with groups, selection biases, logits for other things than experts, interfaces of their own."""
IDS = tiny.ids(2, 12)


@pytest.fixture(scope="module")
def zoo_lens() -> Callable[[str], Lens]:
    cache: dict[str, Lens] = {}

    def get(name: str) -> Lens:
        if name not in cache:
            adapted = name in zoo_adapters.ADAPTED
            model = zoo_adapters.build(zoo_adapters.ADAPTED[name]) if adapted else zoo.build(zoo.ZOO[name])
            cache[name] = Lens(model, tiny.tokenizer(), name=name)
        return cache[name]

    return get


def logits(lens: Lens) -> torch.Tensor:
    with torch.no_grad():
        return lens.model(input_ids=IDS, use_cache=False).logits


def last_tap(lens: Lens, bias: dict[str, float]) -> ExpertTap:
    taps: list[ExpertTap] = []
    with lens.edit(steered(bias)), lens.tapping(taps.append, layers=[lens.layers[-1]], roles=[Role.MOE]):
        logits(lens)
    return taps[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bias_of_0_leaves_logits_bitwise_equal(lens_of: Callable[[str], Lens], family: str) -> None:
    lens = lens_of(family)
    clean = logits(lens)
    with lens.edit(steered({f"L{layer}.E1": 0.0 for layer in lens.layers})) as record:
        assert torch.equal(logits(lens), clean)
    assert record.total("tokens") == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_minus_infinity_is_mask_refill(lens_of: Callable[[str], Lens], family: str) -> None:
    lens = lens_of(family)
    expert = f"L{lens.layers[-1]}.E1"
    with lens.edit(ml.mask_refill(expert)):
        masked = logits(lens)
    with lens.edit(steered({expert: -math.inf})):
        assert torch.equal(logits(lens), masked)
    assert not torch.equal(logits(lens), masked)


@pytest.mark.parametrize("name", ZOO)
def test_the_extremes_are_never_and_always_whatever_the_router(zoo_lens: Callable[[str], Lens], name: str) -> None:
    lens = zoo_lens(name)
    clean, expert = logits(lens), f"L{lens.layers[-1]}.E1"
    tap = last_tap(lens, {expert: math.inf})
    assert (tap.expert == 1).sum() == IDS.numel()
    tap = last_tap(lens, {expert: -math.inf})
    assert (tap.weight[tap.expert == 1] == 0).all()
    with lens.edit(steered({expert: 0.0})):
        assert torch.equal(logits(lens), clean)


@pytest.mark.parametrize("bias", [-2.0, 0.7, 5.0])
def test_it_equals_the_same_bias_inside_a_router_that_has_one(zoo_lens: Callable[[str], Lens], bias: float) -> None:
    lens = zoo_lens("gpt_oss")
    changed = copy.deepcopy(lens.model)
    with torch.no_grad():
        changed.model.layers[-1].mlp.router.bias[2] += bias
        wanted = changed(input_ids=IDS, use_cache=False).logits
    with lens.edit(steered({f"L{lens.layers[-1]}.E2": bias})):
        got = logits(lens)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert (got - logits(lens)).abs().max() > 1e-3


@pytest.mark.parametrize("renorm", [True, False])
def test_gates_after_a_bias_are_those_of_the_shifted_softmax(renorm: bool) -> None:
    """p = (.5, .3, .2) with ln 4 on the third: (.3125, .1875, .5), of which the third and the first are chosen."""
    lens = toy(renorm=renorm)
    taps: list[ExpertTap] = []
    with lens.edit(steered({"L0.E2": math.log(4)})) as record, lens.tapping(taps.append):
        lens.model(torch.tensor([[1]]), use_cache=False)
    total = 0.5 + 0.3125 if renorm else 1.0
    found = dict(zip(taps[0].expert.tolist(), taps[0].weight.tolist(), strict=True))
    assert found == pytest.approx({0: 0.3125 / total, 2: 0.5 / total})
    assert (record.total("tokens"), record.total("visits")) == (1, 1)  # E1 made room


def test_a_larger_bias_never_loses_visits(lens_of: Callable[[str], Lens]) -> None:
    lens = lens_of("olmoe")
    counts = [int((last_tap(lens, {"L1.E3": bias}).expert == 3).sum()) for bias in (-FULL, -2, -0.5, 0, 0.5, 2, FULL)]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, IDS.numel())


def test_only_tokens_in_scope_are_steered(lens_of: Callable[[str], Lens]) -> None:
    lens = lens_of("olmoe")
    clean, mask = logits(lens), torch.zeros(2, 12, dtype=torch.bool)
    mask[1, 4:] = True
    for bias in (3.0, math.inf, -math.inf):
        with lens.edit(steered({"L1.E3": bias}), tokens=mask):
            got = logits(lens)
        assert torch.equal(got[0], clean[0])
        assert torch.equal(got[1, :4], clean[1, :4])
        assert not torch.equal(got[1, 4:], clean[1, 4:])


def test_generating_with_a_cache_follows_the_steered_model(lens_of: Callable[[str], Lens]) -> None:
    lens, prompt = lens_of("olmoe"), tiny.ids(1, 6)
    mode = steered({"L0.E2": math.inf, "L1.E3": -1.5})
    with torch.no_grad(), lens.edit(mode):
        made = lens.model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
        whole = lens.model(input_ids=made[:, :-1], use_cache=False).logits
    assert torch.equal(whole[0, 5:].argmax(-1), made[0, 6:])


def test_hooks_are_gone_afterwards_also_after_an_error(lens_of: Callable[[str], Lens]) -> None:
    lens = lens_of("olmoe")
    clean, hooks = logits(lens), _hooks(lens)
    with suppress(ZeroDivisionError), lens.edit(steered({"L1.E3": 4.0})):
        assert not torch.equal(logits(lens), clean)
        raise ZeroDivisionError
    assert torch.equal(logits(lens), clean)
    assert _hooks(lens) == hooks
    assert not lens.is_edited


def _hooks(lens: Lens) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lens.model.modules())


def test_experts_removed_by_an_outer_block_stay_removed(lens_of: Callable[[str], Lens]) -> None:
    lens = lens_of("olmoe")
    with lens.edit(ml.mask_refill("L1.E3")):
        tap = last_tap(lens, {"L1.E3": math.inf, "L1.E2": 1.0})
    assert not (tap.weight[tap.expert == 3] > 0).any()


def test_frozen_routing_holds_elsewhere_and_the_steered_layer_moves(lens_of: Callable[[str], Lens]) -> None:
    lens = lens_of("olmoe")
    taps: list[ExpertTap] = []
    with lens.tapping(taps.append, layers=[1], roles=[Role.MOE]):
        logits(lens)
    with lens.edit(steered({"L0.E2": math.inf}), routing="frozen"), lens.tapping(taps.append, roles=[Role.MOE]):
        logits(lens)
    clean, first, second = taps
    assert torch.equal(clean.expert, second.expert)
    assert (first.expert == 2).sum() == IDS.numel()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: steered({}), "no expert was named"),
        (lambda: steered({"L0.E1": math.nan}), "the bias of L0.E1 is nan"),
        (lambda: steered({"L0.E1": 1.0, "0:1": 2.0}), "L0.E1 has two biases"),
        (lambda: steered({"L0.E1": "much"}), "the bias of L0.E1 is 'much'"),  # type: ignore[dict-item]
    ],
)
def test_a_bias_that_cannot_be_read_is_one_sentence(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(BadConfig, match=words):
        make()


def test_it_would_undo_another_change_of_the_choice(lens_of: Callable[[str], Lens]) -> None:
    lens = lens_of("olmoe")
    for outer in (ml.drop_renorm("L1.E0"), steered({"L1.E0": 1.0})):
        with pytest.raises(BadConfig, match="would undo"), lens.edit(outer), lens.edit(steered({"L1.E3": 1.0})):
            logits(lens)


def test_a_router_that_cannot_be_asked_again_is_one_sentence(lens_of: Callable[[str], Lens], monkeypatch) -> None:
    lens = lens_of("olmoe")
    router = type(lens.model.model.layers[1].mlp.gate)

    def by_hand(self: Any, x: torch.Tensor) -> Any:
        scores = (x.reshape(-1, x.shape[-1])[:, None] * self.weight).sum(-1)  # no linear map
        value, index = scores.softmax(-1).topk(2)
        return scores, value, index

    monkeypatch.setattr(router, "forward", by_hand)
    with pytest.raises(UnsupportedModel, match="cannot be steered: put"), lens.edit(steered({"L1.E3": 1.0})):
        logits(lens)


def test_the_router_logits_of_the_tap_stay_those_of_the_router(lens_of: Callable[[str], Lens]) -> None:
    lens = lens_of("olmoe")
    plain, pushed = (last_tap(lens, {"L1.E3": bias}).router_logits for bias in (0.0, 3.0))
    assert plain is not None
    assert pushed is not None
    assert torch.equal(plain, pushed)


def test_the_bias_meets_the_last_of_several_maps_as_wide_as_the_experts(lens_of, monkeypatch) -> None:
    lens = lens_of("olmoe")
    own = torch.zeros(6)

    def two_maps(self: Any, x: torch.Tensor) -> Any:
        narrow = F.linear(x.reshape(-1, x.shape[-1]), self.weight)
        scores = F.linear(narrow.tanh(), 3 * torch.eye(6)) + own
        value, index = scores.softmax(-1).topk(2)
        return scores, value, index

    monkeypatch.setattr(type(lens.model.model.layers[1].mlp.gate), "forward", two_maps)
    with lens.edit(steered({"L0.E3": 1.5, "L1.E3": 1.5})):
        got = logits(lens)
    own[3] = 1.5
    torch.testing.assert_close(got, logits(lens), rtol=1e-5, atol=1e-6)
