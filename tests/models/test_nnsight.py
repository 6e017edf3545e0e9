"""`lens.nnsight` and `lens.at` give in a trace what the seam gives in a tap, and change what an edit changes.

The seam shares code with the handles, so nnsight's own `.source` on an untouched model is asked as well.
"""

from __future__ import annotations

from typing import Any

import nnsight
import pytest
import torch

from moe_lens.models.lens import Lens
from moe_lens.types import Role
from tests.models import tiny
from tests.models.traced import (
    FAMILIES,
    LAYER,
    TEXT,
    Change,
    build,
    edited,
    ids,
    lens_of,
    logits,
    rows,
    taps_of,
    visited,
)


@pytest.fixture(params=FAMILIES)
def lens(request) -> Lens:
    return lens_of(request.param)


@pytest.fixture(params=["grouped_mm", "eager"])
def native(request, lens) -> Any:
    lens.model.set_experts_implementation(request.param)
    yield request.param
    lens.model.set_experts_implementation("grouped_mm")


# Reading


def test_every_expert_reads_exactly_the_rows_of_its_tap(lens, native):
    tap = taps_of(lens)[LAYER, Role.MOE]
    with torch.no_grad(), lens.nnsight.trace(TEXT):
        found = nnsight.save({})
        for expert in range(tap.n_experts):
            handle = lens.at(f"L{LAYER}.E{expert}")
            found[expert, "activation"] = handle.activation
            found[expert, "token"], found[expert, "weight"] = handle.token, handle.weight
        for expert in range(tap.n_experts):
            found[expert, "output"] = lens.at(f"L{LAYER}.E{expert}").output
    for expert in range(tap.n_experts):
        for name in ("activation", "output", "token", "weight"):
            assert torch.equal(found[expert, name], getattr(tap, name)[rows(tap, expert)])


def test_routing_and_block_output_are_those_of_the_modules(lens, native):
    tap = taps_of(lens)[LAYER, Role.MOE]
    site = next(site for site in lens.sites if (site.layer, site.role) == (LAYER, Role.MOE))
    block, seen = lens.model.get_submodule(site.path.rpartition(".")[0]), {}
    hooks = [
        site.module.register_forward_pre_hook(lambda _m, args: seen.update(index=args[1], weight=args[2])),
        block.register_forward_hook(lambda _m, _a, out: seen.update(out=out[0] if isinstance(out, tuple) else out)),
    ]
    logits(lens)
    for hook in hooks:
        hook.remove()
    with torch.no_grad(), lens.nnsight.trace(TEXT):
        layer = lens.at(LAYER)
        weights, indices = layer.expert_weights.save(), layer.expert_indices.save()
        router_logits = layer.router_logits.save()
        out = layer.block_output.save()
    assert torch.equal(router_logits, tap.router_logits)
    assert torch.equal(indices, seen["index"])
    assert torch.equal(weights, seen["weight"])
    assert torch.equal(out, seen["out"])


@pytest.mark.parametrize("family", FAMILIES)
def test_an_independent_nnsight_model_reads_the_same_from_the_source_of_transformers(family):
    """Nothing of ours runs here: nnsight instruments the Python source of transformers' `grouped_mm`."""
    lens, model = lens_of(family), build(family)
    plain = nnsight.NNsight(model)
    experts = next(site.path for site in lens.sites if (site.layer, site.role) == (LAYER, Role.MOE))
    envoy = plain.get(experts)
    with torch.no_grad(), plain.trace(ids()):
        index = envoy.inputs[0][1].save()
        source = envoy.source.experts_forward_1.source
        activation = source.self__apply_gate_0.output.save()
        output = source._grouped_linear_1.output.save()
    expert = int(index.flatten().bincount().argmax())
    with torch.no_grad(), lens.nnsight.trace(TEXT):
        handle = lens.at(f"L{LAYER}.E{expert}")
        token = handle.token.save()
        ours, ours_out = handle.activation.save(), handle.output.save()
    sorted_experts, order = index.flatten().sort()
    here = sorted_experts == expert
    assert torch.equal(ours, activation[here])
    assert torch.equal(ours_out, output[here])
    assert torch.equal(token, order[here] // index.shape[1])


def test_dense_and_shared_parts_are_experts_that_every_token_visits():
    lens = lens_of("deepseek_v3")
    taps = taps_of(lens)
    with torch.no_grad(), lens.nnsight.trace(TEXT):
        dense = lens.at("L0.E0").activation.save()
        block = lens.at("L0").block_output.save()
        shared = lens.at("L1").shared.output.save()
    assert torch.equal(dense, taps[0, Role.DENSE].activation)
    assert torch.equal(block.flatten(0, 1), taps[0, Role.DENSE].output)
    assert torch.equal(shared, taps[1, Role.SHARED].output)


def test_an_expert_that_no_token_visits_gives_an_empty_tensor_and_can_be_set():
    lens = lens_of("qwen2_moe")
    tap = taps_of(lens, "a")[LAYER, Role.MOE]
    idle = int(tap.offsets.diff().argmin())
    with torch.no_grad(), lens.nnsight.trace("a"):
        handle = lens.at(f"L{LAYER}.E{idle}")
        activation, token, weight = handle.activation.save(), handle.token.save(), handle.weight.save()
        handle.activation = 1.0
        output = handle.output.save()
        handle.output = 1.0
        after = lens.nnsight.output.logits.save()
    assert (activation.shape, output.shape) == ((0, 24), (0, 32))
    assert token.shape == weight.shape == (0,)
    assert torch.equal(after, logits(lens, "a"))


def test_a_saved_expert_does_not_keep_the_rows_of_the_others_alive():
    lens = lens_of("mixtral")
    with torch.no_grad(), lens.nnsight.trace(TEXT):
        activation = lens.at(f"L{LAYER}.E0").activation.save()
    assert activation.untyped_storage().nbytes() == activation.numel() * activation.element_size()


def test_text_ids_and_tensors_trace_the_same_tokens_as_the_lens_tokenizer_makes():
    lens, wanted = lens_of("olmoe"), logits(lens_of("olmoe"))
    for given in (TEXT, ids(), ids()[0], ids()[0].tolist()):
        with torch.no_grad(), lens.nnsight.trace(given):
            got = lens.nnsight.output.logits.save()
        assert torch.equal(got, wanted)


# Changing nothing


def test_a_trace_without_interventions_is_bit_equal_and_leaves_the_model_as_it_was(native):
    clean_model = build("olmoe")
    clean_model.set_experts_implementation(native)
    lens = Lens(clean_model, tiny.tokenizer())
    wanted, config, weights = logits(lens), lens.model.config.to_dict(), list(map(id, lens.model.parameters()))
    with torch.no_grad(), lens.nnsight.trace(TEXT):
        got = lens.nnsight.output.logits.save()
    assert torch.equal(got, wanted)
    assert torch.equal(logits(lens), wanted)
    assert lens.model.get_experts_implementation()[""] == native
    assert lens.model.config.to_dict() == config
    assert list(map(id, lens.nnsight._module.parameters())) == weights
    assert not any("_moe_lens" in name for module in lens.model.modules() for name in vars(module))
    assert lens.tokenizer.padding_side == "right"
    assert isinstance(lens.nnsight, nnsight.LanguageModel)
    assert lens.nnsight is lens.nnsight


def test_reading_changes_no_bit_of_the_logits_with_and_without_gradients(lens, native):
    wanted = logits(lens)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), lens.nnsight.trace(TEXT):
            lens.at(LAYER).expert_weights.save()
            lens.at(f"L{LAYER}.E0").activation.save()
            lens.at(f"L{LAYER}.E1").output.save()
            got = lens.nnsight.output.logits.save()
        assert torch.equal(got, wanted)


def test_the_implementation_is_restored_when_a_block_raises():
    lens, wanted = lens_of("mixtral"), logits(lens_of("mixtral"))
    with pytest.raises(ZeroDivisionError), lens.nnsight.trace(TEXT):
        lens.at("L0.E1").output.new_zeros(1)[0] = 1 / 0
    assert lens.model.get_experts_implementation()[""] == "grouped_mm"
    assert torch.equal(logits(lens), wanted)
    with torch.no_grad(), lens.nnsight.trace(TEXT):
        got = lens.nnsight.output.logits.save()
    assert torch.equal(got, wanted)


def test_the_seam_taps_the_same_after_a_trace():
    lens = Lens(build("gpt_oss"), tiny.tokenizer())
    before = taps_of(lens)[LAYER, Role.MOE]
    with lens.nnsight.trace(TEXT):
        lens.at("L0.E0").output = 0
    after = taps_of(lens)[LAYER, Role.MOE]
    assert torch.equal(before.activation, after.activation)


# Setting


@pytest.mark.parametrize("how", ["number", "tensor", "in place"])
def test_setting_an_output_to_zero_equals_the_edit_that_zeroes_it(lens, native, how):
    expert = visited(taps_of(lens)[LAYER, Role.MOE])
    wanted = edited(lens, Change(expert, "output", torch.zeros_like))
    with torch.no_grad(), lens.nnsight.trace(TEXT):
        handle = lens.at(f"L{LAYER}.E{expert}")
        if how == "number":
            handle.output = 0
        elif how == "tensor":
            handle.output = torch.zeros_like(handle.output)
        else:
            handle.output[:] = 0
        got = lens.nnsight.output.logits.save()
    assert torch.equal(got, wanted)
    assert not torch.equal(got, logits(lens))


def test_setting_an_activation_reaches_the_output_and_the_logits(lens, native):
    expert = visited(taps_of(lens)[LAYER, Role.MOE])
    wanted = edited(lens, Change(expert, "activation", lambda value: value * 2 + 1))
    with torch.no_grad(), lens.nnsight.trace(TEXT):
        handle = lens.at(f"L{LAYER}.E{expert}")
        before = handle.activation.clone().save()
        handle.activation *= 2
        handle.activation += 1
        again = handle.activation.save()
        got = lens.nnsight.output.logits.save()
    assert torch.equal(again, before * 2 + 1)
    assert torch.equal(got, wanted)
    assert not torch.equal(got, logits(lens))


def test_doubling_an_activation_equals_doubling_the_down_projection():
    lens, surgery = lens_of("olmoe"), build("olmoe")
    expert = visited(taps_of(lens)[LAYER, Role.MOE])
    with torch.no_grad():
        surgery.model.layers[LAYER].mlp.experts.down_proj[expert] *= 2
        wanted = surgery(input_ids=ids()).logits
    with torch.no_grad(), lens.nnsight.trace(TEXT):
        lens.at(f"L{LAYER}.E{expert}").activation *= 2
        got = lens.nnsight.output.logits.save()
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_two_experts_of_a_layer_can_be_set_in_any_order():
    lens = lens_of("mixtral")
    for pair in (("L1.E0", "L1.E2"), ("L1.E2", "L1.E0")):
        with torch.no_grad(), lens.nnsight.trace(TEXT):
            for address in pair:
                lens.at(address).output[:] = 0
            got = lens.nnsight.output.logits.save()
        with lens.tapping(lambda tap: None, edit=Change(0, "output", torch.zeros_like)):
            wanted = edited(lens, Change(2, "output", torch.zeros_like))
        assert torch.equal(got, wanted)


def test_a_neuron_is_one_column_and_setting_it_equals_zeroing_its_weights():
    lens, surgery = lens_of("qwen3_moe"), build("qwen3_moe")
    expert = visited(taps_of(lens)[LAYER, Role.MOE])
    with torch.no_grad():
        surgery.model.layers[LAYER].mlp.experts.down_proj[expert, :, 3] = 0
        wanted = surgery(input_ids=ids()).logits
    for in_place in (True, False):
        with torch.no_grad(), lens.nnsight.trace(TEXT):
            whole = lens.at(f"L{LAYER}.E{expert}").activation.clone().save()
            neuron = lens.at(f"L{LAYER}.E{expert}.N3")
            column, token = neuron.activation.clone().save(), neuron.token.save()
            if in_place:
                neuron.activation[:] = 0
            else:
                neuron.activation = 0
            got = lens.nnsight.output.logits.save()
        assert torch.equal(column, whole[:, 3])
        assert token.shape == column.shape
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        assert not torch.equal(got, logits(lens))


@pytest.mark.parametrize("family", FAMILIES)
def test_set_weights_and_indices_are_what_the_experts_receive(family):
    lens, plain = lens_of(family), build(family)

    def other_arguments(_module: Any, args: Any) -> Any:
        return args[0], torch.stack([torch.zeros_like(args[1][:, 0]), *args[1].T[1:]], 1), args[2] * 0.5

    plain.get_submodule(f"model.layers.{LAYER}.mlp.experts").register_forward_pre_hook(other_arguments)
    with torch.no_grad():
        wanted = plain(input_ids=ids()).logits
    with torch.no_grad(), lens.nnsight.trace(TEXT):
        layer = lens.at(f"L{LAYER}")
        layer.expert_indices[:, 0] = 0
        layer.expert_weights = layer.expert_weights * 0.5
        token = lens.at(f"L{LAYER}.E0").token.save()
        got = lens.nnsight.output.logits.save()
    assert torch.equal(got, wanted)
    assert set(range(ids().shape[1])) <= set(token.tolist())


def test_a_set_block_output_replaces_what_the_block_writes():
    for family in ("olmoe", "gpt_oss"):
        lens, plain = lens_of(family), build(family)
        plain.model.layers[LAYER].mlp.register_forward_hook(
            lambda _m, _a, out: (out[0] * 0, *out[1:]) if isinstance(out, tuple) else out * 0
        )
        with torch.no_grad():
            wanted = plain(input_ids=ids()).logits
        with torch.no_grad(), lens.nnsight.trace(TEXT):
            lens.at(LAYER).block_output = 0
            got = lens.nnsight.output.logits.save()
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_an_edit_around_the_trace_shows_in_it():
    lens = lens_of("olmoe")
    expert = visited(taps_of(lens)[LAYER, Role.MOE])
    edit = Change(expert, "activation", lambda value: value * 0)
    with lens.tapping(lambda tap: None, edit=edit), torch.no_grad(), lens.nnsight.trace(TEXT):
        activation = lens.at(f"L{LAYER}.E{expert}").activation.save()
        got = lens.nnsight.output.logits.save()
    assert len(activation) > 0
    assert activation.abs().max() == 0
    assert torch.equal(got, edited(lens, edit))


def test_setting_works_under_inference_mode_and_in_stored_nnsight_edits():
    lens = lens_of("olmoe")
    expert = visited(taps_of(lens)[LAYER, Role.MOE])
    wanted = edited(lens, Change(expert, "output", torch.zeros_like))
    with torch.inference_mode(), lens.nnsight.trace(TEXT):
        lens.at(f"L{LAYER}.E{expert}").output[:] = 0
        got = lens.nnsight.output.logits.save()
    assert torch.equal(got, wanted)
    with lens.nnsight.edit() as (_tracer, silenced):
        lens.at(f"L{LAYER}.E{expert}").output = 0
    with torch.no_grad(), silenced.trace(TEXT):
        got = silenced.output.logits.save()
    assert torch.equal(got, wanted)
