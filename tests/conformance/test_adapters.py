"""The claims of the decorated families, for those that transformers does not dispatch.

These have one implementation of their experts, their own, so nothing here is run for two kernels.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import moe_lens as ml
from moe_lens.errors import BadConfig, UnsupportedModel
from moe_lens.models.adapters import ADAPTERS
from moe_lens.models.lens import Lens
from moe_lens.models.sites import Site
from moe_lens.types import ExpertTap, Role
from tests.conformance import test_battery as battery
from tests.conformance import test_families as claims
from tests.conformance import test_writes as writes
from tests.conformance import zoo
from tests.conformance.zoo_adapters import ADAPTED, N_FFN, WIDTHS, Adapted, build, delete, parameters
from tests.models import tiny

NATIVE = "eager"
"""What transformers says these models are set to."""


@pytest.fixture(scope="module", params=list(ADAPTED))
def specimen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    family = ADAPTED[request.param]
    folder = tiny.save(build(family), tmp_path_factory.mktemp("adapted") / request.param)
    return Adapted(request.param, family, folder)


def test_tapped_logits_are_bit_equal_to_native(specimen: Adapted):
    claims.test_tapped_logits_are_bit_equal_to_native(specimen, NATIVE)


def test_tapped_bfloat16_logits_are_bit_equal_to_native(specimen: Adapted):
    claims.test_tapped_bfloat16_logits_are_bit_equal_to_native(specimen, NATIVE)


def test_rows_equal_a_row_by_row_computation(specimen: Adapted):
    claims.test_rows_equal_a_row_by_row_computation(specimen, NATIVE)


def test_weighted_outputs_and_shared_expert_sum_to_the_block(specimen: Adapted):
    claims.test_weighted_outputs_and_shared_expert_sum_to_the_block(specimen, NATIVE)


def test_routing_is_what_the_router_returned(specimen: Adapted):
    claims.test_routing_is_what_the_router_returned(specimen, NATIVE)


def test_everything_is_restored_after_exit_and_after_an_exception(specimen: Adapted):
    claims.test_everything_is_restored_after_exit_and_after_an_exception(specimen, NATIVE)


def test_a_batch_of_one_text_is_bit_equal_to_native(specimen: Adapted):
    battery.test_a_batch_of_one_text_is_bit_equal_to_native(specimen, NATIVE)


def test_an_expert_without_tokens_has_no_rows_and_breaks_nothing(specimen: Adapted):
    battery.test_an_expert_without_tokens_has_no_rows_and_breaks_nothing(specimen, NATIVE)


def test_router_logits_explain_the_choice(specimen: Adapted):
    claims.test_router_logits_explain_the_choice(specimen)


def test_generation_with_a_cache_gives_the_same_tokens_and_the_same_rows(specimen: Adapted):
    battery.test_generation_with_a_cache_gives_the_same_tokens_and_the_same_rows(specimen)


def test_inference_mode_is_bit_equal_to_native(specimen: Adapted):
    battery.test_inference_mode_is_bit_equal_to_native(specimen)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_row_of_a_real_token(specimen: Adapted, side: str):
    battery.test_padding_changes_no_row_of_a_real_token(specimen, side)


def test_inspect_says_what_the_config_says(specimen: Adapted):
    spec, family = ml.inspect(str(specimen.folder)), specimen.family
    assert (spec.moe_layers, spec.dense_layers) == (family.sparse, family.dense)
    assert spec.n_layers == len(family.sparse + family.dense)
    for layer in family.sparse:
        entry = spec.at(layer)
        assert entry is not None
        assert (entry.n_experts, entry.top_k, entry.d_ff) == WIDTHS[specimen.name]
        assert (entry.shared_d_ff, entry.gated) == (family.shared, True)
    assert spec.layers == specimen.lens.spec.layers


def test_inspect_counts_active_parameters(specimen: Adapted):
    """All but the experts that a token does not visit.

    LongCat-Flash's experts without neurons have no parameters; JetMoe has experts in its attention too.
    """
    n_experts, top_k, d_ff = WIDTHS[specimen.name]
    spec = ml.inspect(str(specimen.folder))
    held = sum(p.numel() for site in specimen.sites for p in parameters(specimen.kind, site.module))
    used = len(specimen.sites) * top_k * 3 * d_ff * 32 * N_FFN.get(specimen.name, n_experts) / n_experts
    assert spec.total_parameters == sum(p.numel() for p in specimen.model.parameters())
    attention = 2 * (6 - 2) * 2 * 32 * 32 if specimen.kind == "jetmoe" else 0
    assert spec.active_parameters == pytest.approx(spec.total_parameters - held + used - attention)


def busiest(specimen: Adapted, layer: int) -> int:
    """The expert with neurons that most tokens visit."""
    tap = specimen.observe(NATIVE).of(Role.MOE)[layer]
    return int(tap.offsets.diff()[: N_FFN.get(specimen.name, tap.n_experts)].argmax())


def logits_of(specimen: Adapted, model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=specimen.ids, use_cache=False).logits


def test_zero_ablation_equals_zeroed_down_projection(specimen: Adapted):
    experts = {site.layer: busiest(specimen, site.layer) for site in specimen.sites}
    surgery = copy.deepcopy(specimen.model)
    with torch.no_grad():
        for site in specimen.sites:
            parameters(specimen.kind, surgery.get_submodule(site.path))[-1][experts[site.layer]].zero_()
    with specimen.lens.edit(ml.zero([f"L{layer}.E{expert}" for layer, expert in experts.items()])):
        got = specimen.logits()
    assert torch.equal(got, logits_of(specimen, surgery))
    assert not torch.equal(got, specimen.observe(NATIVE).clean)


def test_a_zeroed_neuron_equals_a_zeroed_column_of_the_down_projection(specimen: Adapted):
    site, neuron = specimen.sites[0], 3
    expert = busiest(specimen, site.layer)
    surgery = copy.deepcopy(specimen.model)
    with torch.no_grad():
        down = parameters(specimen.kind, surgery.get_submodule(site.path))[-1][expert]
        (down[neuron] if down.shape[0] == site.d_ff else down[:, neuron]).zero_()
    with specimen.lens.edit(ml.zero(f"L{site.layer}.E{expert}.N{neuron}")):
        got = specimen.logits()
    torch.testing.assert_close(got, logits_of(specimen, surgery), rtol=1e-5, atol=1e-5)
    assert not torch.equal(got, specimen.observe(NATIVE).clean)


def test_mask_refill_equals_a_model_without_the_router_row_and_the_expert(specimen: Adapted):
    site = specimen.sites[-1]
    expert = busiest(specimen, site.layer)
    pruned = copy.deepcopy(specimen.model)
    delete(specimen.kind, pruned.get_submodule(block_path(specimen)), expert)
    with specimen.lens.edit(ml.mask_refill(f"L{site.layer}.E{expert}")) as record:
        got = specimen.logits()
    torch.testing.assert_close(got, logits_of(specimen, pruned), rtol=1e-4, atol=2e-5)
    assert record.total("unsatisfied") == 0
    assert record.total("refilled") > 0
    assert (got - specimen.observe(NATIVE).clean).abs().max() > 1e-4


def block_path(specimen: Adapted) -> str:
    block = specimen.sites[-1].block
    return next(name for name, module in specimen.model.named_modules() if module is block)


def test_survivors_of_mask_refill_keep_hold_their_gates(specimen: Adapted):
    site = specimen.sites[-1]
    expert = busiest(specimen, site.layer)
    clean, taps = specimen.observe(NATIVE).of(Role.MOE)[site.layer], []
    edit = specimen.lens.edit(ml.mask_refill_keep(f"L{site.layer}.E{expert}"))
    with edit, specimen.lens.tapping(taps.append, layers=[site.layer], roles=[Role.MOE]):
        specimen.logits()
    before, after = weights(clean), weights(taps[0])
    kept = [visit for visit in before if visit[1] != expert]
    assert kept
    assert all(before[visit] == after[visit] for visit in kept)
    assert all(weight == 0 for (_, e), weight in after.items() if e == expert)
    assert set(after) - set(before)


def weights(tap: ExpertTap) -> dict[tuple[int, int], float]:
    return {
        (token, expert): weight
        for token, expert, weight in zip(tap.token.tolist(), tap.expert.tolist(), tap.weight.tolist(), strict=True)
    }


def test_swap_equals_copied_weights(specimen: Adapted):
    """With a partner that is never chosen together with the expert, which Llama 4 could not compute."""
    site = specimen.sites[-1]
    tap = specimen.observe(NATIVE).of(Role.MOE)[site.layer]
    together = torch.zeros(tap.n_tokens, tap.n_experts)
    together[tap.token, tap.expert] = 1
    n_ffn = N_FFN.get(specimen.name, tap.n_experts)
    never = (together.T @ together)[:n_ffn, :n_ffn] == 0
    expert, other = next(
        (e, o) for e in range(n_ffn) for o in range(n_ffn) if e != o and never[e, o] and together[:, e].any()
    )
    surgery = copy.deepcopy(specimen.model)
    with torch.no_grad():
        for parameter in parameters(specimen.kind, surgery.get_submodule(site.path)):
            parameter[expert] = parameter[other]
    with specimen.lens.edit(ml.swap(f"L{site.layer}.E{expert}", f"L{site.layer}.E{other}")):
        got = specimen.logits()
    torch.testing.assert_close(got, logits_of(specimen, surgery), rtol=1e-4, atol=1e-5)
    assert not torch.equal(got, specimen.observe(NATIVE).clean)


@pytest.mark.parametrize("mode", [ml.mean, ml.mean_off, ml.resample], ids=lambda mode: mode.__name__)
def test_modes_with_a_reference_write_what_the_expert_writes_there(specimen: Adapted, mode: Any):
    site, text = specimen.sites[-1], "The theorem holds for every prime; def f(x): return x"
    (expert, wanted), taps = outputs_by_hand(specimen, site, text), []
    address = f"L{site.layer}.E{expert}"
    reference = specimen.lens.reference(text, experts=[address])
    edit = specimen.lens.edit(mode(address, reference=reference))
    with edit, specimen.lens.tapping(taps.append, layers=[site.layer], roles=[Role.MOE]):
        specimen.logits()
    got = taps[0].output[taps[0].expert == expert]
    assert len(got)
    if mode is ml.resample:
        assert all(torch.isclose(row, wanted["on"], rtol=1e-4, atol=1e-5).all(dim=1).any() for row in got)
    else:
        mean = wanted["on" if mode is ml.mean else "off"].mean(dim=0).expand_as(got)
        torch.testing.assert_close(got, mean, rtol=1e-4, atol=1e-5)


def outputs_by_hand(specimen: Adapted, site: Site, text: str) -> tuple[int, dict[str, Tensor]]:
    """An expert that some tokens visit, and f_e of every token of a text but the first: visitors and others."""
    ids = torch.tensor([specimen.lens.tokenizer(text)["input_ids"]])
    with specimen.hooks() as seen, torch.no_grad():
        specimen.model(input_ids=ids, use_cache=False)
    x, index = seen[site.layer].x[1:], seen[site.layer].index[1:]
    n_ffn = N_FFN.get(specimen.name, site.n_experts)
    visits = torch.stack([(index == expert).any(dim=1) for expert in range(n_ffn)])
    expert = int((visits.float().mean(dim=1) - 0.4).abs().argmin())
    with torch.no_grad():
        rows = torch.stack([specimen.one_row(site, token, expert) for token in x])
    return expert, {"on": rows[visits[expert]], "off": rows[~visits[expert]]}


def test_frozen_routing_replays_the_clean_choice(specimen: Adapted):
    first, last = specimen.sites[0].layer, specimen.sites[-1].layer
    experts = specimen.observe(NATIVE).of(Role.MOE)[first].offsets.diff().argsort(descending=True)[:3].tolist()
    taps: list[ExpertTap] = []
    for routing in ("live", "frozen"):
        edit = specimen.lens.edit(ml.zero([f"L{first}.E{expert}" for expert in experts]), routing=routing)
        with edit, specimen.lens.tapping(taps.append, layers=[last], roles=[Role.MOE]):
            specimen.logits()
    clean, (live, frozen) = weights(specimen.observe(NATIVE).of(Role.MOE)[last]), map(weights, taps)
    assert frozen == clean
    assert live != clean
    assert not torch.equal(taps[1].output, specimen.observe(NATIVE).of(Role.MOE)[last].output)


def test_zeroed_experts_without_neurons_write_nothing(tmp_path):
    specimen = Adapted("longcat_flash", ADAPTED["longcat_flash"], tmp_path)
    model = build(specimen.family)
    specimen.lens = Lens(model, tiny.tokenizer())
    surgery = copy.deepcopy(model)
    for layer in (0, 1):
        surgery.model.layers[layer].mlp.experts.identity_expert = Nothing()
    with specimen.lens.edit(ml.zero([f"L{layer}.E{expert}" for layer in (0, 1) for expert in (5, 6, 7)])) as record:
        got = specimen.logits()
    assert torch.equal(got, logits_of(specimen, surgery))
    assert record.total("visits") > 0


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def test_llama4_refuses_to_send_a_token_to_one_expert_twice(tmp_path):
    model = build(ADAPTED["llama4_text"])
    lens = Lens(model, tiny.tokenizer())
    taps: list[ExpertTap] = []
    with lens.tapping(taps.append, layers=[0], roles=[Role.MOE]):
        model(input_ids=tiny.ids(1, 4))
    pair = taps[0].expert[taps[0].token == 0].tolist()
    with pytest.raises(UnsupportedModel, match="twice"), lens.edit(ml.swap(f"L0.E{pair[0]}", f"L0.E{pair[1]}")):
        model(input_ids=tiny.ids(1, 4))


def test_nested_blocks_share_one_replacement_and_leave_nothing(specimen: Adapted):
    outer, inner = [], []
    state = claims.fingerprint(specimen.lens)
    with specimen.lens.tapping(outer.append):
        specimen.logits()
        with specimen.lens.tapping(inner.append, layers=[specimen.sites[-1].layer], roles=[Role.MOE]):
            assert torch.equal(specimen.logits(), specimen.observe(NATIVE).clean)
        assert torch.equal(specimen.logits(), specimen.observe(NATIVE).clean)
    assert claims.fingerprint(specimen.lens) == state
    in_moe_layers = [site for site in specimen.lens.sites if site.layer in specimen.family.sparse]
    assert (len(inner), len(outer)) == (1, 3 * len(in_moe_layers))


def test_another_kernel_than_the_familys_own_is_refused(specimen: Adapted):
    lens = Lens(specimen.model, None, kernel="grouped_mm")
    with pytest.raises(BadConfig, match="leave the kernel at native"), lens.tapping(lambda tap: None):
        specimen.logits()


def test_gradients_of_experts_and_routers_are_the_native_ones(specimen: Adapted):
    wanted, taps = battery.gradients(specimen), []
    with specimen.lens.tapping(taps.append):
        got = battery.gradients(specimen)
    assert set(got) == set(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5 * float(value.abs().max()))
    names = {parameter: name for name, parameter in specimen.model.named_parameters()}
    for site in specimen.sites:
        assert site.router is not None
        assert all(wanted[names[parameter]].any() for parameter in site.router.parameters())
    assert all(tap.activation.requires_grad and tap.output.requires_grad for tap in taps)


def test_expert_outputs_reach_the_residual_stream(specimen: Adapted):
    assert writes.is_direct(specimen)


def test_a_trace_sees_what_the_taps_see(specimen: Adapted):
    layer = specimen.lens.layers[0]
    trace = specimen.lens.trace("The theorem holds.", layers=[layer])
    routed = trace.routing[trace.routing["role"] == "moe"]
    tap = next(tap for tap in trace.taps if tap.role is Role.MOE)
    assert len(routed) == len(trace.tokens) * WIDTHS[specimen.name][1]
    assert sorted(zip(routed["position"], routed["expert"], strict=True)) == sorted(weights(tap))
    assert trace.contributions(3, 101)["logit"].abs().sum() > 0


@pytest.mark.parametrize("name", ["llama4_text", "llama4_top1"])
def test_llama4_on_disk_computes_what_it_computes_in_memory(name, tmp_path):
    """transformers itself cannot run DBRX and JetMoe offloaded, and computes something else for LongCat-Flash."""
    folder = tiny.save(build(ADAPTED[name]), tmp_path / name)
    names = ("embed_tokens", "norm", "rotary_emb", "layers.0", "layers.1")
    places = {f"model.{part}": "cpu" for part in names} | {"lm_head": "cpu", "model.layers.2": "disk"}
    here, away, taps = ml.load(str(folder)), ml.load(str(folder), device_map=places), {}
    forwards = {n: vars(m).get("forward") for n, m in away.model.named_modules()}
    for lens in (here, away):
        ids, taps[lens] = tiny.ids(2, 9), []
        with lens.tapping(taps[lens].append), torch.no_grad():
            logits = lens.model(input_ids=ids, use_cache=False).logits
        with torch.no_grad():
            assert torch.equal(here.model(input_ids=ids, use_cache=False).logits, logits)
    for mine, theirs in zip(taps[here], taps[away], strict=True):
        assert torch.equal(mine.activation, theirs.activation)
        assert torch.equal(mine.output, theirs.output)
    assert {n: vars(m).get("forward") for n, m in away.model.named_modules()} == forwards


def test_llama4_multimodal_checkpoints_are_read_as_their_language_model(tmp_path):
    family = ADAPTED["llama4_text"]
    vision = {**zoo.TOWER, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    whole = replace(
        family, prefix="Llama4", built_as="Llama4ForConditionalGeneration", towers=(("vision_config", vision),)
    )
    model, taps = build(whole), []
    lens = ml.load(str(tiny.save(model, tmp_path)))
    ids = tiny.ids(2, 9)
    with lens.tapping(taps.append), torch.no_grad():
        got = lens.model(input_ids=ids, use_cache=False).logits
        assert torch.equal(got, model(input_ids=ids, use_cache=False).logits)
    assert {tap.layer for tap in taps if tap.role is Role.MOE} == set(family.sparse)


@pytest.mark.parametrize(
    ("config", "name", "keys"),
    [
        ("Doge", "Doge", {"is_moe": True}),
        ("NllbMoe", "NLLB-MoE", {}),
        ("Step3p7", "Step 3.7", {}),
        ("SwitchTransformers", "Switch Transformers", {}),
    ],
)
def test_what_remains_is_refused_by_name_with_a_reason_and_a_way_out(config, name, keys, tmp_path):
    getattr(transformers, f"{config}Config")(**keys).save_pretrained(tmp_path)
    for enter in (ml.inspect, ml.load):
        with pytest.raises(UnsupportedModel, match=rf"{name}.*: choose ") as error:
            enter(str(tmp_path))
        assert "\n" not in str(error.value)


def test_experts_of_an_unknown_kind_are_refused_and_not_taken_for_a_dense_layer(monkeypatch):
    model = build(ADAPTED["llama4_text"])
    monkeypatch.delitem(ADAPTERS, "Llama4TextExperts")
    with pytest.raises(UnsupportedModel, match=r"layer 0 holds experts \(Llama4TextExperts\)"):
        Lens(model, None)


def test_a_dense_model_of_the_doge_family_is_a_dense_model(tmp_path):
    config = transformers.DogeConfig(**{**tiny.COMMON, "intermediate_size": 48})
    assert config.is_moe is False
    config.save_pretrained(tmp_path)
    assert ml.inspect(str(tmp_path)).dense_layers == (0, 1)
