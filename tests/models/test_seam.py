"""The seam gives what the model computes, changes nothing, and leaves nothing behind."""

from __future__ import annotations

import pytest
import torch

from moe_lens.errors import BadConfig
from moe_lens.models import seam
from moe_lens.models.lens import Lens
from moe_lens.models.seam import Edit, tapping
from moe_lens.types import ExpertTap, Role
from tests.models import oracle, tiny

FAMILIES = list(tiny.MOE)


def run(model, ids, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **kwargs).logits


def tapped(lens: Lens, ids, **kwargs) -> tuple[torch.Tensor, list[ExpertTap]]:
    taps: list[ExpertTap] = []
    with lens.tapping(taps.append):
        return run(lens.model, ids, **kwargs), taps


@pytest.fixture(params=FAMILIES)
def lens(request, lens_of) -> Lens:
    lens = lens_of(request.param)
    yield lens
    lens.model.set_experts_implementation("grouped_mm")


@pytest.mark.parametrize("native", ["grouped_mm", "eager"])
@pytest.mark.parametrize("shape", [(3, 17), (1, 1), (1, 5)])
def test_tapped_logits_are_bit_equal_to_the_native_implementation(lens, native, shape):
    lens.model.set_experts_implementation(native)
    ids = tiny.ids(*shape)
    clean = run(lens.model, ids)
    got, taps = tapped(lens, ids)
    assert torch.equal(got, clean)
    assert [tap.layer for tap in taps if tap.role is Role.MOE] == list(lens.layers)


@pytest.mark.parametrize("native", ["grouped_mm", "eager"])
def test_row_order_within_an_expert_is_that_of_the_native_implementation(native, monkeypatch):
    """Which row meets which block of a matrix product decides its last bit, so we compare the rows themselves."""
    model = tiny.build("olmoe")
    experts, site = model.model.layers[0].mlp.experts, Lens(model, None).sites[0]
    index = torch.rand(150, 6, generator=torch.Generator().manual_seed(0)).topk(3, dim=-1).indices
    x, weight, seen, taps = torch.randn(150, 32), torch.rand(150, 3), [], []
    apply_gate = type(experts)._apply_gate if native == "grouped_mm" else None
    model.set_experts_implementation(native)
    if apply_gate is not None:
        monkeypatch.setattr(type(experts), "_apply_gate", lambda m, z: seen.append(apply_gate(m, z)) or seen[-1])
    else:
        plain = experts.act_fn.forward
        monkeypatch.setattr(experts.act_fn, "forward", lambda z: seen.append(plain(z)) or seen[-1])
    with torch.no_grad():
        experts(x, index, weight)
        native_rows = torch.cat(seen)
        seen.clear()
        with tapping(model, [site], taps.append):
            experts(x, index, weight)
    assert torch.equal(torch.cat(seen), native_rows)
    assert (taps[0].token.diff() < 0).any()


def test_a_forced_kernel_is_bit_equal_to_that_implementation(lens):
    ids = tiny.ids(2, 9)
    for kernel in ("grouped_mm", "eager"):
        lens.model.set_experts_implementation(kernel)
        clean = run(lens.model, ids)
        lens.model.set_experts_implementation("eager" if kernel == "grouped_mm" else "grouped_mm")
        with tapping(lens.model, lens.sites, lambda tap: None, kernel=kernel):
            assert torch.equal(run(lens.model, ids), clean)


@pytest.mark.parametrize("native", ["grouped_mm", "eager"])
def test_bfloat16_logits_are_bit_equal_and_taps_within_bfloat16_rounding(lens_of, native):
    model = tiny.build("olmoe", dtype=torch.bfloat16)
    model.set_experts_implementation(native)
    lens = Lens(model, None)
    ids = tiny.ids(2, 12)
    clean = run(model, ids)
    record = oracle.Recorder(model, [0])
    got, taps = tapped(lens, ids)
    assert torch.equal(got, clean)
    wanted = by_hand(model, taps[0], record.inputs[0])
    torch.testing.assert_close(taps[0].activation.double(), wanted[0], rtol=0.03, atol=0.03)
    torch.testing.assert_close(taps[0].output.double(), wanted[1], rtol=0.03, atol=0.05)


def by_hand(model, tap: ExpertTap, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    experts = model.model.layers[tap.layer].mlp.experts
    pairs = zip(tap.token.tolist(), tap.expert.tolist(), strict=True)
    rows = [oracle.expert_row(experts, x[token], expert) for token, expert in pairs]
    return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])


@pytest.mark.parametrize("native", ["grouped_mm", "eager"])
def test_rows_equal_a_row_by_row_computation(lens, native):
    lens.model.set_experts_implementation(native)
    record = oracle.Recorder(lens.model, list(lens.layers))
    _, taps = tapped(lens, tiny.ids(2, 11))
    for handle in record.handles:
        handle.remove()
    for tap in (tap for tap in taps if tap.role is Role.MOE):
        activation, output = by_hand(lens.model, tap, record.inputs[tap.layer])
        torch.testing.assert_close(tap.activation.double(), activation, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(tap.output.double(), output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("native", ["grouped_mm", "eager"])
def test_routing_equals_what_the_router_returned(lens, native):
    lens.model.set_experts_implementation(native)
    record = oracle.Recorder(lens.model, list(lens.layers))
    _, taps = tapped(lens, tiny.ids(3, 9))
    for handle in record.handles:
        handle.remove()
    for tap in (tap for tap in taps if tap.role is Role.MOE):
        logits, weights, index = record.router[tap.layer]
        assert torch.equal(tap.router_logits, logits.reshape(-1, logits.shape[-1]))
        assert torch.equal(index[tap.token, tap.slot], tap.expert)
        assert torch.equal(weights[tap.token, tap.slot], tap.weight)
        visits = {*zip(tap.token.tolist(), tap.slot.tolist(), strict=True)}
        assert len(visits) == index.numel() == len(tap.token)
        assert (tap.expert.diff() >= 0).all()
        assert tap.n_tokens == 27
        assert tap.n_experts == logits.shape[-1]


def test_weighted_outputs_and_the_shared_expert_sum_to_the_block_output(lens):
    record = oracle.Recorder(lens.model, list(lens.layers))
    _, taps = tapped(lens, tiny.ids(2, 9))
    for handle in record.handles:
        handle.remove()
    for layer in lens.layers:
        total = torch.zeros_like(record.outputs[layer])
        for tap in (tap for tap in taps if tap.layer == layer):
            total.index_add_(0, tap.token, tap.weight[:, None] * tap.output)
        torch.testing.assert_close(total, record.outputs[layer], rtol=1e-5, atol=1e-5)


def test_the_shared_expert_has_its_sigmoid_gate_as_weight(lens_of):
    lens = lens_of("qwen2_moe")
    record = oracle.Recorder(lens.model, [0])
    _, taps = tapped(lens, tiny.ids(2, 5))
    for handle in record.handles:
        handle.remove()
    shared = next(tap for tap in taps if tap.role is Role.SHARED and tap.layer == 0)
    block, x = lens.model.model.layers[0].mlp, record.inputs[0]
    with torch.no_grad():
        assert torch.equal(shared.weight, torch.sigmoid(block.shared_expert_gate(x)).flatten())
        torch.testing.assert_close(shared.output, block.shared_expert(x), rtol=1e-5, atol=1e-6)
    assert shared.router_logits is None
    assert shared.d_ff == 20


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_no_bit_of_the_tapped_logits(lens, side):
    ids, mask = tiny.ids(2, 10), torch.ones(2, 10, dtype=torch.long)
    padding = slice(0, 4) if side == "left" else slice(6, 10)
    ids[1, padding], mask[1, padding] = 256, 0
    clean = run(lens.model, ids, attention_mask=mask)
    got, taps = tapped(lens, ids, attention_mask=mask)
    assert torch.equal(got, clean)
    assert taps[-1].n_tokens == 20


@pytest.mark.parametrize("native", ["grouped_mm", "eager"])
def test_an_expert_that_no_token_visits_has_no_rows(native):
    model = tiny.build("olmoe", num_experts=8, num_experts_per_tok=2)
    model.set_experts_implementation(native)
    lens = Lens(model, None)
    clean = run(model, tiny.ids(1, 1))
    got, taps = tapped(lens, tiny.ids(1, 1))
    assert torch.equal(got, clean)
    assert (taps[0].offsets.diff() == 0).sum() == 6
    assert taps[0].offsets[-1] == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_is_restored_after_exit_and_after_an_exception(family):
    lens, ids = Lens(tiny.build(family), None), tiny.ids(2, 7)  # a model that was never tapped before
    for native in ("grouped_mm", "eager"):
        lens.model.set_experts_implementation(native)
        before, state = run(lens.model, ids), fingerprint(lens.model)
        tapped(lens, ids)
        assert fingerprint(lens.model) == state

        def fail(tap: ExpertTap) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), lens.tapping(fail):
            run(lens.model, ids)
        assert fingerprint(lens.model) == state
        assert lens.model.get_experts_implementation()[""] == native
        assert torch.equal(run(lens.model, ids), before)


def fingerprint(model) -> list:
    """Attribute names, hooks and config of every module."""
    marks = [
        (name, sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]
    return [*marks, sorted(vars(model.config).items(), key=lambda pair: pair[0])]


def test_only_the_chosen_layers_are_tapped(lens):
    taps: list[ExpertTap] = []
    clean = run(lens.model, tiny.ids(2, 7))
    with lens.tapping(taps.append, layers=[1], roles=[Role.MOE]):
        assert torch.equal(run(lens.model, tiny.ids(2, 7)), clean)
    assert [tap.layer for tap in taps] == [1]


def test_gradients_are_those_of_the_native_implementation(lens):
    ids = tiny.ids(2, 7)
    for native in ("grouped_mm", "eager"):
        lens.model.set_experts_implementation(native)
        wanted = gradients(lens.model, ids)
        with lens.tapping(lambda tap: None):
            got = gradients(lens.model, ids)
        for name in wanted:
            torch.testing.assert_close(got[name], wanted[name], rtol=1e-5, atol=1e-7)


def gradients(model, ids) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert any("experts" in name for name in grads)
    return grads


class Zero(Edit):
    """Silence one expert, at either hook point."""

    def __init__(self, layer: int, expert: int, role: Role, stage: str) -> None:
        self.layer, self.expert, self.role, self.stage = layer, expert, role, stage

    def _zeroed(self, tap: ExpertTap, value: torch.Tensor) -> torch.Tensor | None:
        if (tap.layer, tap.role) != (self.layer, self.role):
            return None
        return value.masked_fill((tap.expert == self.expert)[:, None], 0.0)

    def activation(self, tap):
        return self._zeroed(tap, tap.activation) if self.stage == "activation" else None

    def output(self, tap):
        return self._zeroed(tap, tap.output) if self.stage == "output" else None


@pytest.mark.parametrize("stage", ["activation", "output"])
@pytest.mark.parametrize("native", ["grouped_mm", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_zero_ablation_equals_zeroed_down_projection(family, native, stage):
    model = tiny.build(family)
    model.set_experts_implementation(native)
    lens, ids = Lens(model, None), tiny.ids(2, 9)
    clean = run(model, ids)
    with lens.tapping(lambda tap: None, edit=Zero(1, 2, Role.MOE, stage)):
        edited = run(model, ids)
    assert not torch.equal(edited, clean)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2] = 0
    torch.testing.assert_close(edited, run(model, ids), rtol=0, atol=1e-6)


def test_an_edited_tap_shows_the_edit(lens_of):
    lens, taps = lens_of("olmoe"), []
    with lens.tapping(taps.append, edit=Zero(0, 1, Role.MOE, "activation")):
        run(lens.model, tiny.ids(2, 9))
    assert taps[0].activation[taps[0].expert == 1].abs().max() == 0
    assert taps[0].activation[taps[0].expert == 0].abs().max() > 0


def test_blocks_nest_and_the_inner_one_sees_the_outer_edit(lens_of):
    lens, ids, inner = lens_of("olmoe"), tiny.ids(2, 9), []
    clean = run(lens.model, ids)
    with lens.tapping(lambda tap: None, edit=Zero(0, 1, Role.MOE, "output")):
        edited = run(lens.model, ids)
        with lens.tapping(inner.append):
            assert torch.equal(run(lens.model, ids), edited)
        assert torch.equal(run(lens.model, ids), edited)
        with pytest.raises(BadConfig, match="contradicts"):
            tapping(lens.model, lens.sites, inner.append, kernel="eager").__enter__()
        assert torch.equal(run(lens.model, ids), edited)
    assert inner[0].output[inner[0].expert == 1].abs().max() == 0
    assert torch.equal(run(lens.model, ids), clean)


def test_batched_mm_is_replaced_by_grouped_mm_with_a_notice(lens_of, caplog):
    lens, ids = lens_of("qwen3_moe"), tiny.ids(3, 17)  # with top-3 the order of summation shows
    clean = run(lens.model, ids)
    lens.model.set_experts_implementation("batched_mm")
    got, _ = tapped(lens, ids)
    assert lens.model.get_experts_implementation()[""] == "batched_mm"
    lens.model.set_experts_implementation("grouped_mm")
    assert torch.equal(got, clean)
    assert "grouped_mm" in caplog.text


def test_an_unknown_kernel_is_refused(lens_of):
    lens = lens_of("olmoe")
    with pytest.raises(BadConfig, match="native, grouped_mm, eager"):
        tapping(lens.model, lens.sites, lambda tap: None, kernel="fast").__enter__()


def test_rows_of_other_ranks_are_dropped_under_expert_parallelism():
    """Under expert parallelism the ids of other ranks' experts equal the number of local experts."""
    index = torch.tensor([[0, 3], [3, 3], [2, 0]])
    for kernel in ("grouped_mm", "eager"):
        rows = seam.sort_rows(index, 3, kernel, sentinels=True)
        assert sorted(zip(rows.token.tolist(), rows.slot.tolist(), strict=True)) == [(0, 0), (2, 0), (2, 1)]
        assert rows.offsets.tolist() == [0, 2, 2, 3]


@pytest.mark.parametrize("order", ["grouped_mm", "eager"])
def test_an_expert_parallel_call_equals_the_full_call_with_foreign_weights_zero(order):
    model = tiny.build("olmoe")
    experts, site = model.model.layers[0].mlp.experts, Lens(model, None).sites[0]
    x, index, weight = torch.randn(7, 32), torch.randint(0, 6, (7, 2)), torch.rand(7, 2)
    experts._is_expert_parallel = True
    index[0], index[3, 1] = 6, 6
    weight[index == 6] = 0
    model.set_experts_implementation("grouped_mm")
    taps: list[ExpertTap] = []
    with torch.no_grad():
        wanted = experts(x, index, weight)
        with tapping(model, [site], taps.append, kernel=order):
            got = experts(x, index, weight)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert len(taps[0].token) == int((index < 6).sum())
