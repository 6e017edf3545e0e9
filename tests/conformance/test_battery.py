"""What users do with a model beyond one clean batch: padding, single texts, generation, gradients.

Padded and incremental passes are compared within 1e-5 plus 1e-4 relative: the matrix products have other shapes,
so their last bits differ with and without us. Everything else is compared bit for bit.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lens.types import ExpertTap, Role
from tests.conformance.specimen import IMPLEMENTATIONS, Specimen
from tests.models import tiny

PAD = 256
REQUIRED = ("olmoe", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss")
"""Families that may skip nothing here."""


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_row_of_a_real_token(specimen: Specimen, side: str):
    long, short = tiny.ids(1, 10, seed=3), tiny.ids(1, 6, seed=4)
    padding = torch.full((1, 4), PAD)
    row = torch.cat([padding, short] if side == "left" else [short, padding], dim=1)
    ids = torch.cat([long, row])
    mask = (ids != PAD).long()
    first = 10 + (4 if side == "left" else 0)
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"attention_mask": mask, "position_ids": position}
    whole = logits(specimen, ids, **inputs).flatten(0, 1)
    texts = ((long, 0), (short, first))
    for one, offset in texts:
        alone = logits(specimen, one)[0]
        skip_unless_close(specimen, alone, whole[offset : offset + len(alone)], "gives padded texts other logits")
    padded = rows_of(specimen, ids, **inputs)
    for one, offset in texts:
        alone = rows_of(specimen, one)
        for layer in specimen.family.sparse:
            assert_same(alone[layer], padded[layer], offset)


@pytest.mark.parametrize("native", IMPLEMENTATIONS)
def test_a_batch_of_one_text_is_bit_equal_to_native(specimen: Specimen, native: str):
    check_bits(specimen, native, tiny.ids(1, 7))


@pytest.mark.parametrize("native", IMPLEMENTATIONS)
def test_an_expert_without_tokens_has_no_rows_and_breaks_nothing(specimen: Specimen, native: str):
    for tap in check_bits(specimen, native, tiny.ids(1, 1)):
        if tap.role is Role.MOE:
            counts = tap.offsets.diff()
            assert (counts == 0).sum() == tap.n_experts - len(tap.token)
            assert tap.offsets[-1] == len(tap.token) == len(tap.activation) == len(tap.output)


def test_generation_with_a_cache_gives_the_same_tokens_and_the_same_rows(specimen: Specimen):
    prompt, taps = tiny.ids(1, 6, seed=5), []
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "use_cache": True}
    clean = specimen.model.generate(prompt, **options, return_dict_in_generate=True, output_logits=True)
    clean, steps = clean.sequences, torch.cat(clean.logits)
    with specimen.lens.tapping(taps.append, roles=[Role.MOE]):
        tapped = specimen.model.generate(prompt, **options)
    assert torch.equal(tapped, clean)
    skip_unless_close(specimen, logits(specimen, clean[:, :-1])[0, 5:], steps, "gives other logits with its cache")
    whole = rows_of(specimen, clean[:, :-1])
    for layer in specimen.family.sparse:
        calls = [tap for tap in taps if tap.layer == layer]
        assert [tap.n_tokens for tap in calls] == [6, 1, 1, 1, 1]
        start = 0
        for tap in calls:
            assert_same(by_visit(tap), whole[layer], start)
            start += tap.n_tokens


def test_inference_mode_is_bit_equal_to_native(specimen: Specimen):
    ids, taps = tiny.ids(2, 7), []
    with torch.inference_mode():
        clean = specimen.model(input_ids=ids, use_cache=False).logits
        with specimen.lens.tapping(taps.append):
            assert torch.equal(specimen.model(input_ids=ids, use_cache=False).logits, clean)
    assert [tap.layer for tap in taps if tap.role is Role.MOE] == list(specimen.family.sparse)


@pytest.mark.parametrize("native", IMPLEMENTATIONS)
def test_gradients_of_experts_and_routers_are_the_native_ones(specimen: Specimen, native: str):
    specimen.model.train(False)
    with specimen.set_to(native):
        wanted = gradients(specimen)
        taps: list[ExpertTap] = []
        with specimen.lens.tapping(taps.append):
            got = gradients(specimen)
    taps_of = {tap.layer: tap for tap in taps if tap.role is Role.MOE}
    names = {parameter: name for name, parameter in specimen.model.named_parameters()}
    for site in specimen.sites:
        assert site.router is not None
        for module in (site.module, site.router):
            watched = [names[parameter] for parameter in module.parameters() if names[parameter] in wanted]
            learns = module is site.module or bool((taps_of[site.layer].weight != 1).any())  # Phi's weights may be 1
            assert not learns or any(wanted[name].abs().max() > 0 for name in watched)
            for name in watched:
                atol = 1e-5 * float(wanted[name].abs().max())
                torch.testing.assert_close(got.pop(name), wanted[name], rtol=1e-5, atol=atol)
    for name in got:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-6)
    assert all(tap.activation.requires_grad and tap.output.requires_grad for tap in taps)


def gradients(specimen: Specimen) -> dict[str, Tensor]:
    ids = tiny.ids(2, 7)
    specimen.model.zero_grad()
    specimen.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    grads = {n: p.grad.clone() for n, p in specimen.model.named_parameters() if p.grad is not None}
    specimen.model.zero_grad()
    return grads


def logits(specimen: Specimen, ids: Tensor, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return specimen.model(input_ids=ids, use_cache=False, **inputs).logits


def skip_unless_close(specimen: Specimen, one: Tensor, other: Tensor, what: str) -> None:
    """Skip a family in which transformers itself, untapped, computes two different things."""
    if specimen.name not in REQUIRED and not torch.allclose(one, other, rtol=1e-4, atol=1e-4):
        pytest.skip(f"transformers' own {specimen.family.title} {what}")


Visits = dict[tuple[int, int], tuple[int, Tensor, Tensor, Tensor]]


def check_bits(specimen: Specimen, native: str, ids: Tensor) -> list[ExpertTap]:
    """Taps of one pass that is checked to be bit-equal to the native one."""
    taps: list[ExpertTap] = []
    with specimen.set_to(native), torch.no_grad():
        clean = specimen.model(input_ids=ids, use_cache=False).logits
        with specimen.lens.tapping(taps.append):
            assert torch.equal(specimen.model(input_ids=ids, use_cache=False).logits, clean)
    assert [tap.layer for tap in taps if tap.role is Role.MOE] == list(specimen.family.sparse)
    return taps


def rows_of(specimen: Specimen, ids: Tensor, **inputs: Any) -> dict[int, Visits]:
    """Every routed row of one pass by layer, then by (token, slot)."""
    taps: list[ExpertTap] = []
    with torch.no_grad(), specimen.lens.tapping(taps.append, roles=[Role.MOE]):
        specimen.model(input_ids=ids, use_cache=False, **inputs)
    return {tap.layer: by_visit(tap) for tap in taps}


def by_visit(tap: ExpertTap) -> Visits:
    """(token, expert) -> expert, weight, activation, output. Slots may swap where a router does not sort."""
    pairs = zip(tap.token.tolist(), tap.expert.tolist(), strict=True)
    return {(t, e): (e, tap.weight[i], tap.activation[i], tap.output[i]) for i, (t, e) in enumerate(pairs)}


def assert_same(alone: Visits, among: Visits, offset: int) -> None:
    """Each visit of `alone` is the visit of the token `offset` places later in `among`."""
    for (token, expert), values in alone.items():
        other = among[token + offset, expert]
        for mine, theirs in zip(values[1:], other[1:], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
