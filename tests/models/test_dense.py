"""Dense FFNs are found by structure and tapped without changing a bit."""

from __future__ import annotations

import pytest
import torch

from moe_lens.models.lens import Lens
from moe_lens.models.seam import Edit
from moe_lens.types import ExpertTap, Role
from tests.models import tiny

FAMILIES = list(tiny.DENSE)

# path of (module whose input is the FFN input, first linear layers, last linear layer) in layer 1
WHERE = {
    "gpt_neox": ("gpt_neox.layers.1.mlp", "dense_4h_to_h"),
    "gpt2": ("transformer.h.1.mlp", "c_proj"),
    "phi": ("model.layers.1.mlp", "fc2"),
    "opt": ("model.decoder.layers.1", "fc2"),
}


def activation_by_hand(family: str, ffn, x: torch.Tensor) -> torch.Tensor:
    if family in ("gpt_neox", "gpt2", "phi"):
        first = {"gpt_neox": "dense_h_to_4h", "gpt2": "c_fc", "phi": "fc1"}[family]
        act = getattr(ffn, {"phi": "activation_fn"}.get(family, "act"))
        return act(getattr(ffn, first)(x))
    if family == "phi3":
        gate, up = ffn.gate_up_proj(x).chunk(2, dim=-1)
        return ffn.activation_fn(gate) * up
    return ffn.act_fn(ffn.gate_proj(x)) * ffn.up_proj(x)


@pytest.mark.parametrize("family", FAMILIES)
def test_taps_of_a_dense_model(family):
    model = tiny.build(family)
    lens, ids, taps, seen = Lens(model, None), tiny.ids(2, 9), [], {}
    path, _last = WHERE.get(family, ("model.layers.1.mlp", "down_proj"))
    ffn = model.get_submodule(path)
    with torch.no_grad():
        clean = model(input_ids=ids).logits
        handle = ffn.register_forward_hook(lambda m, args, out: seen.update(x=args[0], y=out))
        with lens.tapping(taps.append):
            assert torch.equal(model(input_ids=ids).logits, clean)
        handle.remove()
        assert torch.equal(model(input_ids=ids).logits, clean)
    assert lens.layers == (0, 1)
    assert [(tap.layer, tap.role, tap.d_ff) for tap in taps] == [(0, Role.DENSE, 48), (1, Role.DENSE, 48)]
    tap = taps[1]
    assert tap.n_tokens == 18
    assert tap.offsets.tolist() == [0, 18]
    assert tap.token.tolist() == list(range(18))
    assert tap.weight.tolist() == [1.0] * 18
    assert tap.router_logits is None
    if family != "opt":  # OPT has no FFN module to compare with: its linear layers sit in the decoder layer
        with torch.no_grad():
            h = activation_by_hand(family, ffn, seen["x"])
        assert torch.equal(tap.activation, h.reshape(18, 48))
        assert torch.equal(tap.output, seen["y"].reshape(18, -1))
    assert lens.spec.at(1).gated == (family not in WHERE)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("stage", ["activation", "output"])
def test_an_edit_of_a_dense_layer_equals_the_edited_model(family, stage):
    class Silence(Edit):
        def activation(self, tap: ExpertTap):
            return torch.zeros_like(tap.activation) if stage == "activation" and tap.layer == 1 else None

        def output(self, tap: ExpertTap):
            return torch.zeros_like(tap.output) if stage == "output" and tap.layer == 1 else None

    model, ids, taps = tiny.build(family), tiny.ids(2, 9), []
    lens = Lens(model, None)
    with torch.no_grad():
        clean = model(input_ids=ids).logits
        with lens.tapping(taps.append, edit=Silence()):
            edited = model(input_ids=ids).logits
        assert not torch.equal(edited, clean)
        assert torch.equal(model(input_ids=ids).logits, clean)
        last = model.get_submodule(lens.sites[1].path)
        last.weight.zero_()
        if last.bias is not None and stage == "output":
            last.bias.zero_()
        torch.testing.assert_close(edited, model(input_ids=ids).logits, rtol=0, atol=1e-6)
    assert getattr(taps[1], stage).abs().max() == 0


def test_leading_dense_layers_of_an_moe_have_role_dense(lens_of):
    lens, taps = lens_of("qwen3_moe"), []
    assert [entry.role for entry in lens.spec.layers] == [Role.DENSE, Role.MOE]
    assert lens.layers == (1,)
    with torch.no_grad(), lens.tapping(taps.append, layers=[0, 1]):
        lens.model(input_ids=tiny.ids(1, 6))
    assert [(tap.role, tap.d_ff) for tap in taps] == [(Role.DENSE, 40), (Role.MOE, 24)]


def test_an_moe_with_one_expert_is_dense():
    """Our bundled dense twin is an OlmoeForCausalLM with a single expert that every token visits."""
    model, taps = tiny.build("olmoe", num_experts=1, num_experts_per_tok=1), []
    lens, ids = Lens(model, None), tiny.ids(2, 7)
    assert not lens.spec.is_moe
    assert lens.layers == (0, 1)
    assert lens.spec.sparsity == 1.0
    assert lens.spec.active_parameters == lens.spec.total_parameters
    with torch.no_grad():
        clean = model(input_ids=ids).logits
        with lens.tapping(taps.append):
            assert torch.equal(model(input_ids=ids).logits, clean)
    assert [tap.role for tap in taps] == [Role.DENSE] * 2
    assert taps[0].router_logits is None
    assert taps[0].weight.tolist() == [1.0] * 14
    assert sorted(taps[0].token.tolist()) == list(range(14))


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_the_last_linear_layer_is_found_when_all_are_square(family):
    lens = Lens(tiny.build(family, intermediate_size=32), None)
    assert [site.path.rpartition(".")[2] for site in lens.sites] == [
        {"llama": "down_proj", "gpt_neox": "dense_4h_to_h"}[family]
    ] * 2
