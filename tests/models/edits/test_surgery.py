"""Every mode against the same change made by hand, on weights, routers and recorded tensors."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch

import moe_lens as ml
from moe_lens.models.lens import Lens
from moe_lens.types import Role
from tests.models import tiny
from tests.models.oracle import Recorder

TEXT = "The quick brown fox jumps over the lazy dog; twice."
IDS = torch.tensor(tiny.tokenizer()(TEXT)["input_ids"]).view(3, 17)


@pytest.fixture(params=list(tiny.MOE))
def lens(request, lens_of) -> Lens:
    lens = lens_of(request.param)
    yield lens
    lens.model.set_experts_implementation("grouped_mm")


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def edited(lens: Lens, *modes: Any, ids: torch.Tensor = IDS, **options: Any) -> torch.Tensor:
    with lens.edit(*modes, **options):
        return logits(lens.model, ids)


def busiest(lens: Lens, layer: int, n: int = 1) -> list[str]:
    """The experts of a layer that most tokens of IDS visit."""
    taps: list[Any] = []
    with lens.tapping(taps.append, layers=[layer], roles=[Role.MOE]):
        logits(lens.model)
    return [f"L{layer}.E{e}" for e in taps[0].offsets.diff().argsort(descending=True)[:n].tolist()]


def experts_of(model: Any, layer: int) -> Any:
    return model.model.layers[layer].mlp.experts


@pytest.mark.parametrize("native", ["grouped_mm", "eager"])
def test_zero_equals_zeroed_down_projections_bit_for_bit(lens, native):
    lens.model.set_experts_implementation(native)
    names = [name for layer in lens.layers for name in busiest(lens, layer, 2)]
    surgery = copy.deepcopy(lens.model)
    with torch.no_grad():
        for name in names:
            address = lens.address(name)
            experts_of(surgery, address.layer).down_proj[address.expert].zero_()
    wanted = logits(surgery)
    assert torch.equal(edited(lens, ml.zero(names)), wanted)
    assert not torch.equal(wanted, logits(lens.model))


def delete_experts(model: Any, layer: int, gone: list[int]) -> Any:
    """A copy of `model` whose router rows and experts do not exist."""
    pruned = copy.deepcopy(model)
    block = pruned.model.layers[layer].mlp
    kept = [e for e in range(block.experts.num_experts) if e not in gone]
    for module in (block.experts, block.gate):
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(parameter[kept]))
        module.num_experts = len(kept)
    return pruned


@pytest.mark.parametrize("renorm", [True, False])
@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "qwen3_moe"])
def test_mask_refill_equals_a_checkpoint_without_router_row_and_expert(family, renorm):
    lens = Lens(tiny.build(family, norm_topk_prob=renorm), None)
    layer = lens.layers[-1]
    names = busiest(lens, layer, 2)
    pruned = delete_experts(lens.model, layer, [lens.address(name).expert for name in names])
    got = edited(lens, ml.mask_refill(names))
    torch.testing.assert_close(got, logits(pruned), rtol=1e-4, atol=1e-5)
    assert (got - logits(lens.model)).abs().max() > 1e-3


def test_mask_refill_equals_deletion_in_every_layer_at_once(lens):
    names = [busiest(lens, layer)[0] for layer in lens.layers]
    pruned = lens.model
    for name in names:
        address = lens.address(name)
        pruned = delete_experts(pruned, address.layer, [address.expert])
    torch.testing.assert_close(edited(lens, ml.mask_refill(names)), logits(pruned), rtol=1e-4, atol=1e-5)


def substituted(lens: Lens, layer: int, expert: int, vector: torch.Tensor) -> torch.Tensor:
    """Logits when `expert` writes `vector`, by plain hooks: its down-projection is zeroed, gate * vector is added."""
    surgery = copy.deepcopy(lens.model)
    with torch.no_grad():
        experts_of(surgery, layer).down_proj[expert].zero_()

    def add(_module: Any, args: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor:
        gate = (args[2] * (args[1] == expert)).sum(dim=1)
        return out + gate[:, None] * vector

    experts_of(surgery, layer).register_forward_hook(add)
    return logits(surgery)


def rows_by_hand(lens: Lens, layer: int, expert: int, text: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Router inputs of a text, whether each is routed to `expert`, and f_expert of every one; first token left out."""
    record = Recorder(lens.model, [layer])
    logits(lens.model, torch.tensor([lens.tokenizer(text)["input_ids"]]))
    for handle in record.handles:
        handle.remove()
    x = record.inputs[layer][1:]
    routed = (record.router[layer][2][1:] == expert).any(dim=1)
    experts = experts_of(lens.model, layer)
    gate, up = (x @ experts.gate_up_proj[expert].T).chunk(2, dim=1)
    return x, routed, ((torch.nn.functional.silu(gate) * up) @ experts.down_proj[expert].T).detach()


def test_mean_equals_substitution_of_the_routed_mean_by_hand(lens):
    address = lens.address(busiest(lens, lens.layers[-1])[0])
    _, routed, f = rows_by_hand(lens, address.layer, address.expert, TEXT)
    wanted = substituted(lens, address.layer, address.expert, f[routed].mean(dim=0))
    torch.testing.assert_close(edited(lens, ml.mean(address, reference=TEXT)), wanted, rtol=1e-4, atol=1e-5)
    assert (wanted - logits(lens.model)).abs().max() > 1e-4


def test_mean_off_equals_substitution_of_the_mean_over_unrouted_inputs_by_hand(lens):
    for name in busiest(lens, lens.layers[-1], 3):  # in one family every token visits the busiest
        address = lens.address(name)
        _, routed, f = rows_by_hand(lens, address.layer, address.expert, TEXT)
        if not routed.all():
            break
    assert 0 < int(routed.sum()) < len(routed)
    wanted = substituted(lens, address.layer, address.expert, f[~routed].mean(dim=0))
    torch.testing.assert_close(edited(lens, ml.mean_off(address, reference=TEXT)), wanted, rtol=1e-4, atol=1e-5)
    assert (wanted - edited(lens, ml.mean(address, reference=TEXT))).abs().max() > 1e-4


def taps_of(lens: Lens, *modes: Any, layer: int) -> Any:
    taps: list[Any] = []
    with lens.edit(*modes) if modes else nullcontext(), lens.tapping(taps.append, layers=[layer], roles=[Role.MOE]):
        logits(lens.model)
    return taps[0]


def test_resample_writes_outputs_of_the_reference_and_nothing_else(lens):
    address = lens.address(busiest(lens, lens.layers[-1])[0])
    _, routed, f = rows_by_hand(lens, address.layer, address.expert, TEXT)
    found = []
    for seed in (0, 0, 1):
        tap = taps_of(lens, ml.resample(address, reference=TEXT, seed=seed), layer=address.layer)
        rows = tap.output[tap.expert == address.expert]
        gaps = (rows[:, None] - f[routed][None]).abs().amax(dim=2)
        assert gaps.min(dim=1).values.max() < 1e-5
        found.append(rows)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_noise_keeps_every_norm_and_loses_the_direction(lens):
    name = busiest(lens, lens.layers[-1])[0]
    address = lens.address(name)
    tap, plain = taps_of(lens, ml.noise(name), layer=address.layer), taps_of(lens, layer=address.layer)
    mine = tap.expert == address.expert
    old, new = plain.output[mine], tap.output[mine]
    torch.testing.assert_close(new.norm(dim=1), old.norm(dim=1), rtol=1e-4, atol=1e-6)
    assert torch.cosine_similarity(new, old).abs().mean() < 0.6
    assert torch.equal(tap.output[~mine], plain.output[~mine])


def test_swap_computes_the_other_expert_with_the_same_gate(lens):
    layer = lens.layers[-1]
    name = busiest(lens, layer)[0]
    one = lens.address(name).expert
    other = (one + 1) % experts_of(lens.model, layer).num_experts
    surgery = copy.deepcopy(lens.model)
    with torch.no_grad():
        for parameter in experts_of(surgery, layer).parameters():
            parameter[one] = parameter[other]
    torch.testing.assert_close(edited(lens, ml.swap(name, f"L{layer}.E{other}")), logits(surgery), rtol=1e-4, atol=1e-5)


def test_patch_writes_what_the_source_writes_at_the_same_position_else_zero(lens):
    layer = lens.layers[-1]
    source = TEXT[::-1]
    clean, other = lens.trace(TEXT), lens.trace(source)
    visits = clean.routing[(clean.routing["layer"] == layer) & (clean.routing["role"] == "moe")]
    name = f"L{layer}.E{int(visits['expert'].mode()[0])}"
    theirs = dict(zip(other[name].token.tolist(), other[name].output, strict=True))
    with lens.edit(ml.edits.patch(name, source=source)) as record:
        got = lens.trace(TEXT)[name]
    for position, row in zip(got.token.tolist(), got.output, strict=True):
        torch.testing.assert_close(row, theirs.get(position, torch.zeros_like(row)))
    missing = sum(p not in theirs for p in got.token.tolist())
    assert record.total("unaligned") == missing
    assert 0 < missing < len(got.token)


def test_drop_renorm_scales_the_other_gates_to_the_mass_the_token_had(lens):
    name = busiest(lens, lens.layers[-1])[0]
    address = lens.address(name)
    plain, tap = taps_of(lens, layer=address.layer), taps_of(lens, ml.drop_renorm(name), layer=address.layer)
    mass, removed = torch.zeros(tap.n_tokens), torch.zeros(tap.n_tokens)
    before = torch.zeros(tap.n_tokens).index_add_(0, plain.token, plain.weight)
    mass.index_add_(0, tap.token, tap.weight)
    removed.index_add_(0, tap.token, (tap.expert == address.expert) * plain.weight)
    torch.testing.assert_close(mass, before, rtol=1e-5, atol=1e-6)
    assert (tap.weight[tap.expert == address.expert] == 0).all()
    others = tap.expert != address.expert
    growth = (before / (before - removed))[tap.token]
    torch.testing.assert_close(tap.weight[others], (plain.weight * growth)[others], rtol=1e-5, atol=1e-6)


def test_drop_renorm_of_all_that_a_token_chose_is_zero_and_counted(lens):
    layer = lens.layers[-1]
    tap = taps_of(lens, layer=layer)
    gone = sorted(set(tap.expert[tap.token == 0].tolist()))
    names = [f"L{layer}.E{e}" for e in gone]
    emptied = sum(set(tap.expert[tap.token == t].tolist()) <= set(gone) for t in range(tap.n_tokens))
    with lens.edit(ml.drop_renorm(names)) as record:
        got = logits(lens.model)
    assert torch.isfinite(got).all()
    assert record.total("emptied") == emptied >= 1


def test_a_zeroed_neuron_equals_a_zeroed_column_of_the_down_projection(lens):
    name = busiest(lens, lens.layers[-1])[0]
    address = lens.address(name + ".N5")
    surgery = copy.deepcopy(lens.model)
    with torch.no_grad():
        experts_of(surgery, address.layer).down_proj[address.expert, :, 5] = 0
    assert torch.equal(edited(lens, ml.zero(str(address))), logits(surgery))
