"""One code path for every family that transformers decorates. Each test is a claim about each family.

The README's table is made from a run of these tests (`report.py`). Tolerances: float32 and bfloat16 logits are
compared bit for bit, rows with a float64 computation within 1e-4 relative.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import moe_lens
from moe_lens.models.lens import Lens
from moe_lens.types import ExpertTap, Role
from tests.conformance.specimen import IMPLEMENTATIONS, Specimen, integer_last

EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
WIDTH = ("moe_intermediate_size", "intermediate_size")


class Interrupted(Exception):
    """What a user's code may raise."""


def test_inspect_says_what_the_config_says(specimen: Specimen):
    spec, family = moe_lens.inspect(str(specimen.folder)), specimen.family
    assert spec.moe_layers == family.sparse
    assert spec.dense_layers == family.dense
    for layer in family.sparse:
        entry = spec.at(layer)
        assert entry is not None
        assert entry.n_experts == family.expected(*EXPERTS)
        assert entry.top_k == family.expected(*TOP_K)
        assert entry.d_ff == family.expected(*WIDTH)
        assert entry.shared_d_ff == family.shared
        assert entry.gated == (family.prefix != "NemotronH")
    for layer in family.dense:
        entry = spec.at(layer)
        assert entry is not None
        assert (entry.n_experts, entry.top_k, entry.shared_d_ff) == (1, 1, None)
        assert entry.d_ff == next(
            getattr(family.text_config, name)
            for name in ("dense_intermediate_size", "prefix_dense_intermediate_size", "intermediate_size")
            if getattr(family.text_config, name, None)
        )
    assert spec.total_parameters > spec.active_parameters > 0
    assert spec.layers == specimen.lens.spec.layers


@pytest.mark.parametrize("native", IMPLEMENTATIONS)
def test_tapped_logits_are_bit_equal_to_native(specimen: Specimen, native: str):
    run = specimen.observe(native)
    assert run.clean.isfinite().all()
    assert torch.equal(run.tapped, run.clean)
    assert set(run.of(Role.MOE)) == set(specimen.family.sparse)
    assert set(run.of(Role.DENSE)) == set(specimen.family.dense)


@pytest.mark.parametrize("native", IMPLEMENTATIONS)
def test_tapped_bfloat16_logits_are_bit_equal_to_native(specimen: Specimen, native: str):
    lens = specimen.bfloat16
    lens.model.set_experts_implementation(native)
    clean = specimen.logits(lens)
    with lens.tapping(lambda tap: None):
        tapped = specimen.logits(lens)
    assert clean.isfinite().all()
    assert torch.equal(tapped, clean)


@pytest.mark.parametrize("native", IMPLEMENTATIONS)
def test_rows_equal_a_row_by_row_computation(specimen: Specimen, native: str):
    run = specimen.observe(native)
    with specimen.set_to("eager"), torch.no_grad():
        for site in specimen.sites:
            tap, seen = run.of(Role.MOE)[site.layer], run.seen[site.layer]
            pairs = list(zip(tap.token.tolist(), tap.expert.tolist(), strict=True))
            activation = torch.stack([specimen.by_hand(site, seen.x[token], expert) for token, expert in pairs])
            output = torch.stack([specimen.one_row(site, seen.x[token], expert) for token, expert in pairs])
            torch.testing.assert_close(tap.activation.double(), activation, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(tap.output, output, rtol=1e-4, atol=1e-5)
            assert len(pairs) == seen.index.numel()


@pytest.mark.parametrize("native", IMPLEMENTATIONS)
def test_weighted_outputs_and_shared_expert_sum_to_the_block(specimen: Specimen, native: str):
    """Where the block does more than add (a norm, a projection), its input there is what must be met."""
    run = specimen.observe(native)
    for site in specimen.sites:
        seen = run.seen[site.layer]
        routed = weighted_sum(run.of(Role.MOE)[site.layer], seen.routed)
        torch.testing.assert_close(routed, seen.routed, rtol=1e-4, atol=1e-5)
        total = routed * site.block_scale
        if not specimen.family.shared_apart:
            total = total + shared_part(specimen, run, site.layer, total)
        torch.testing.assert_close(total, seen.block, rtol=1e-4, atol=1e-5)
    assert set(run.of(Role.SHARED)) == (set(specimen.family.sparse) if specimen.family.shared else set())


def weighted_sum(tap: ExpertTap, like: Tensor) -> Tensor:
    return torch.zeros_like(like).index_add_(0, tap.token, (tap.weight[:, None] * tap.output).to(like.dtype))


def shared_part(specimen: Specimen, run: Any, layer: int, like: Tensor) -> Tensor:
    """The shared expert's contribution from its tap, checked against its module."""
    seen, tap = run.seen[layer], run.of(Role.SHARED).get(layer)
    if tap is None:
        return torch.zeros_like(like) if seen.shared is None else seen.shared
    torch.testing.assert_close(tap.output, seen.shared, rtol=1e-5, atol=1e-6)
    site = next(s for s in specimen.lens.sites if s.role is Role.SHARED and s.layer == layer)
    return weighted_sum(tap, like) * site.block_scale


@pytest.mark.parametrize("native", IMPLEMENTATIONS)
def test_routing_is_what_the_router_returned(specimen: Specimen, native: str):
    run = specimen.observe(native)
    for layer, tap in run.of(Role.MOE).items():
        seen = run.seen[layer]
        logits, weight, index = integer_last(seen.router)
        assert torch.equal(seen.index, index)
        assert torch.equal(index[tap.token, tap.slot], tap.expert)
        assert torch.equal(weight[tap.token, tap.slot], tap.weight)
        assert len(set(zip(tap.token.tolist(), tap.slot.tolist(), strict=True))) == index.numel() == len(tap.token)
        assert tap.router_logits is not None
        if specimen.name.startswith("gemma4"):  # its router returns probabilities
            logits = logits.log()
        assert torch.equal(tap.router_logits, logits)


def test_router_logits_explain_the_choice(specimen: Specimen):
    """They are raw logits: the largest are chosen, unless something else than logits has a say."""
    differs = False
    for tap in specimen.observe("grouped_mm").of(Role.MOE).values():
        assert tap.router_logits is not None
        assert (tap.router_logits < 0).any()  # not probabilities
        top_k = len(tap.token) // tap.n_tokens
        chosen = torch.zeros(tap.router_logits.shape, dtype=torch.bool)
        chosen[tap.token, tap.expert] = True
        best = tap.router_logits.topk(top_k, dim=-1).indices
        differs = differs or not bool(chosen.gather(1, best).all())
    assert differs == specimen.family.biased


@pytest.mark.parametrize("native", IMPLEMENTATIONS)
def test_everything_is_restored_after_exit_and_after_an_exception(specimen: Specimen, native: str):
    run = specimen.observe(native)
    assert torch.equal(run.after, run.clean)
    with specimen.set_to(native):
        state = fingerprint(specimen.lens)
        with pytest.raises(Interrupted):
            run_and_interrupt(specimen)
        assert fingerprint(specimen.lens) == state

        def fail(tap: ExpertTap) -> None:
            raise Interrupted

        with pytest.raises(Interrupted), specimen.lens.tapping(fail):
            specimen.logits()
        assert fingerprint(specimen.lens) == state
        assert specimen.model.get_experts_implementation()[""] == native
        assert torch.equal(specimen.logits(), run.clean)


def run_and_interrupt(specimen: Specimen) -> None:
    with specimen.lens.tapping(lambda tap: None):
        specimen.logits()
        raise Interrupted


def fingerprint(lens: Lens) -> list[Any]:
    """Attribute names, hooks and settings of every module."""
    marks = [
        (name, sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in lens.model.named_modules()
    ]
    return [*marks, lens.model.get_experts_implementation(), str(lens.model.config)]
