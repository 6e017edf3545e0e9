"""The worked toy of METRICS 2.3 (oracle O3): three experts, two chosen, every mode to its printed digits.

p = (.5, .3, .2), outputs f = (2, 0), (0, 1), (4, 0), logits = sum of gate * f, the right answer is 0, and expert 0
is ablated. The model is an OLMoE block whose weights are set by hand; its one token is x = (1, 1).
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers

import moe_lens as ml
from moe_lens.models.lens import Lens

P = (0.5, 0.3, 0.2)
F = ((2.0, 0.0), (0.0, 1.0), (4.0, 0.0))


def toy(renorm: bool) -> Lens:
    config = transformers.OlmoeConfig(
        vocab_size=4, hidden_size=2, intermediate_size=1, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, num_experts=3, num_experts_per_tok=2, norm_topk_prob=renorm, rms_norm_eps=0.0,
        pad_token_id=0,
    )  # fmt: skip
    model: Any = transformers.OlmoeForCausalLM(config).eval()
    model.set_experts_implementation("eager")  # grouped_mm needs rows of 16 bytes
    block = model.model.layers[0].mlp
    one = torch.nn.functional.silu(torch.tensor(1.0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.fill_(1.0)
        model.model.layers[0].post_attention_layernorm.weight.fill_(1.0)
        block.gate.weight[:, 0] = torch.tensor([math.log(p) for p in P])
        block.experts.gate_up_proj[:, 0, 0] = 1.0  # silu(1) ...
        block.experts.gate_up_proj[:, 1, 0] = 1 / one  # ... times up = 1
        block.experts.down_proj[:, :, 0] = torch.tensor(F)
    return Lens(model, None)


def answer(lens: Lens, *modes: Any) -> tuple[float, torch.Tensor]:
    """NLL of the right answer, and the distribution over answers."""
    written: list[torch.Tensor] = []
    handle = lens.model.model.layers[0].mlp.register_forward_hook(lambda _m, _a, out: written.append(out))
    with lens.edit(*modes) if modes else torch.no_grad():
        lens.model(torch.tensor([[1]]), use_cache=False)
    handle.remove()
    log_p = written[-1].detach().reshape(2).double().log_softmax(0)
    return -float(log_p[0]), log_p


MODES = {
    "zero": lambda: ml.zero("L0.E0"),
    "drop_renorm": lambda: ml.drop_renorm("L0.E0", total="one"),
    "mask_refill": lambda: ml.mask_refill("L0.E0"),
    "mask_refill_keep": lambda: ml.mask_refill_keep("L0.E0"),
}


@pytest.mark.parametrize(
    ("renorm", "clean", "deltas"),
    [
        (True, 0.348445, {"zero": 0.549679, "drop_renorm": 0.964817, "mask_refill": -0.035183}),
        (False, 0.403186, {
            "zero": 0.451169, "drop_renorm": 0.910076, "mask_refill": -0.089924, "mask_refill_keep": 0.070891,
        }),
    ],
)  # fmt: skip
def test_nll_of_every_mode_has_the_printed_digits(renorm, clean, deltas):
    lens = toy(renorm)
    nll, _ = answer(lens)
    assert nll == pytest.approx(clean, abs=1e-6)
    for mode, delta in deltas.items():
        assert answer(lens, MODES[mode]())[0] - nll == pytest.approx(delta, abs=1e-6), mode


@pytest.mark.parametrize(
    ("renorm", "clean", "probabilities"),
    [
        (True, 0.7058, {"zero": 0.4073, "drop_renorm": 0.2689, "mask_refill": 0.7311}),
        (False, 0.6682, {"zero": 0.4256, "drop_renorm": 0.2689, "mask_refill": 0.7311, "mask_refill_keep": 0.622459}),
    ],
)
def test_probability_of_the_answer_has_the_printed_digits(renorm, clean, probabilities):
    lens = toy(renorm)
    assert float(answer(lens)[1].exp()[0]) == pytest.approx(clean, abs=5.1e-5)
    for mode, value in probabilities.items():
        assert float(answer(lens, MODES[mode]())[1].exp()[0]) == pytest.approx(value, abs=5.1e-5), mode


@pytest.mark.parametrize(
    ("renorm", "divergences"),
    [
        (True, {"zero": 0.181910, "drop_renorm": 0.413164, "mask_refill": 0.001594}),
        (False, {"zero": 0.119357, "drop_renorm": 0.345995, "mask_refill": 0.009619}),
    ],
)
def test_divergence_from_the_clean_answer_has_the_printed_digits(renorm, divergences):
    lens = toy(renorm)
    _, full = answer(lens)
    for mode, value in divergences.items():
        _, ablated = answer(lens, MODES[mode]())
        assert float((full.exp() * (full - ablated)).sum()) == pytest.approx(value, abs=1e-6), mode


@pytest.mark.parametrize(("renorm", "total", "gate"), [(True, "kept", 1.0), (False, "kept", 0.8), (False, "one", 1.0)])
def test_drop_renorm_keeps_the_mass_of_the_token_or_makes_it_one(renorm, total, gate):
    """The printed digits of O3 without renormalisation are those of total="one"; the definition keeps the mass."""
    _, log_p = answer(toy(renorm), ml.drop_renorm("L0.E0", total=total))
    assert float(log_p[1] - log_p[0]) == pytest.approx(gate, abs=1e-6)


@pytest.mark.parametrize(
    ("renorm", "mode", "gates"),
    [
        (True, "mask_refill", {1: 0.6, 2: 0.4}),
        (False, "mask_refill", {1: 0.6, 2: 0.4}),
        (True, "mask_refill_keep", {1: 0.375, 2: 0.25}),
        (False, "mask_refill_keep", {1: 0.3, 2: 0.2}),
    ],
)
def test_gates_after_refill_are_as_defined(renorm, mode, gates):
    lens, taps = toy(renorm), []
    with lens.edit(MODES[mode]()) as record, lens.tapping(taps.append):
        lens.model(torch.tensor([[1]]), use_cache=False)
    found = dict(zip(taps[0].expert.tolist(), taps[0].weight.tolist(), strict=True))
    assert found == pytest.approx(gates, abs=1e-6)
    before = 1.0 if renorm else P[0] + P[1]
    assert record.frame["mass_ratio"].item() == pytest.approx(sum(gates.values()) / before, abs=1e-6)
    assert record.frame[["tokens", "visits", "refilled"]].to_numpy().tolist() == [[1, 1, 1]]
