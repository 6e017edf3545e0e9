"""The trainer resumes exactly, the twin is a fair twin, and the losses have their hand-computed values."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from moe_lens.errors import BadOutput
from moe_lens.organisms.model import (
    Architecture,
    Balance,
    balance_loss,
    build_model,
    expert_fractions,
    sorted_experts,
    z_loss,
)
from moe_lens.organisms.tokenizer import train_tokenizer
from moe_lens.organisms.training import Batches, Trainer, TrainingConfig, export

NANO = Architecture(d_model=16, n_layers=2, n_heads=2, vocab_size=300, n_experts=4, top_k=2, d_ff=8, max_positions=16)
BATCH = 2 * 16


def ids() -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.integers(0, 40, 4000) + 20 * (np.arange(4000) % 3)).astype(np.uint16)


def nano(path, steps: int = 20, **changes) -> Trainer:
    settings = {
        "batch_size": 2,
        "sequence_length": 16,
        "warmup_steps": 3,
        "checkpoint_tokens": 5 * BATCH,
        "log_tokens": 5 * BATCH,
    }
    return Trainer(TrainingConfig(architecture=NANO, tokens=steps * BATCH, **settings | changes), ids(), path)


def equal(a: Trainer, b: Trainer) -> bool:
    return all(
        torch.equal(x, y) for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True)
    )


def test_killed_and_resumed_run_ends_with_the_same_weights(tmp_path) -> None:
    whole = nano(tmp_path / "whole")
    whole.run()
    nano(tmp_path / "cut").run(until=12)  # the checkpoint is of step 10 or of the last step reached
    resumed = nano(tmp_path / "cut")
    assert 10 <= resumed.step <= 12
    resumed.run()
    assert resumed.finished
    assert equal(whole, resumed)


def test_more_tokens_continue_from_the_stable_phase(tmp_path) -> None:
    nano(tmp_path / "run").run()
    longer = nano(tmp_path / "run", steps=40)
    assert (
        longer.step
        == TrainingConfig(architecture=NANO, tokens=20 * BATCH, batch_size=2, sequence_length=16).decay_start
    )
    longer.run()
    direct = nano(tmp_path / "direct", steps=40)
    direct.run()
    assert equal(longer, direct)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


def test_training_lowers_the_loss(tmp_path) -> None:
    trainer = nano(tmp_path / "run", steps=60)
    trainer.run()
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert rows[-1]["train"] < rows[0]["train"] - 0.5


def test_checkpoint_of_another_configuration_is_refused(tmp_path) -> None:
    nano(tmp_path / "run").run(until=6)
    with pytest.raises(BadOutput, match="another configuration"):
        nano(tmp_path / "run", learning_rate=1e-4)


def test_moe_and_twin_see_the_same_batches_in_a_new_order_each_epoch() -> None:
    first, second = (Batches(ids(), 2, 16, seed=3) for _ in range(2))
    assert all(torch.equal(first[step], second[step]) for step in (0, 5, first.per_epoch + 1))
    epoch = torch.cat([first[step] for step in range(first.per_epoch)])
    again = torch.cat([first[first.per_epoch + step] for step in range(first.per_epoch)])
    assert not torch.equal(epoch, again)
    assert sorted(epoch[:, 0].tolist())[:-4] != []


def test_rate_warms_up_stays_and_decays() -> None:
    config = TrainingConfig(tokens=1000 * 1024)
    assert config.rate(0) == pytest.approx(3e-3 / 60)
    assert config.rate(60) == config.rate(config.decay_start - 1) == 3e-3
    assert config.rate(config.total_steps - 1) == pytest.approx(0.05 * 3e-3)


def test_twin_has_equal_active_width_and_equal_shared_weights() -> None:
    twin = NANO.dense_twin()
    assert twin.active_width == NANO.active_width == 16
    assert (twin.n_experts, twin.top_k) == (1, 1)
    moe, dense = build_model(NANO, 0), build_model(twin, 0)
    other = dict(dense.named_parameters())
    shared = [name for name, _ in moe.named_parameters() if ".mlp." not in name]
    assert len(shared) == len([name for name in other if ".mlp." not in name])
    assert all(torch.equal(dict(moe.named_parameters())[name], other[name]) for name in shared)


def test_twin_router_weight_is_exactly_one() -> None:
    dense = build_model(NANO.dense_twin(), 0)
    _, weights, chosen = dense.model.layers[0].mlp.gate(torch.randn(5, 16))
    assert torch.equal(weights, torch.ones_like(weights))
    assert chosen.eq(0).all()


@pytest.mark.parametrize("architecture", [NANO, NANO.dense_twin()], ids=["moe", "dense"])
def test_sorted_experts_equal_the_plain_loop(architecture: Architecture) -> None:
    experts = build_model(architecture, 1).model.layers[0].mlp.experts
    hidden = torch.randn(11, 16)
    chosen = torch.stack([torch.randperm(architecture.n_experts)[: architecture.top_k] for _ in range(11)])
    weights = torch.rand(11, architecture.top_k)
    ours = sorted_experts(experts, hidden, chosen, weights)
    expected = torch.zeros_like(hidden)
    for row in range(11):
        for expert, weight in zip(chosen[row], weights[row], strict=True):
            gate, up = (experts.gate_up_proj[expert] @ hidden[row]).chunk(2)
            expected[row] += weight * (experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(ours, expected)


def test_balance_loss_has_its_hand_computed_value() -> None:
    # two tokens, two experts, top-1: probabilities (3/4, 1/4) and (3/4, 1/4), so both go to expert 0
    logits = torch.tensor([[math.log(3.0), 0.0], [math.log(3.0), 0.0]])
    fractions = expert_fractions(logits, 1)
    assert fractions.tolist() == [1.0, 0.0]
    assert balance_loss(logits, fractions).item() == pytest.approx(2 * (1.0 * 0.75))
    assert balance_loss(torch.zeros(6, 4), torch.full((4,), 0.25)).item() == pytest.approx(1.0)
    assert z_loss(torch.zeros(3, 4)).item() == pytest.approx(math.log(4) ** 2)


def test_balance_is_per_layer_not_pooled() -> None:
    # each layer sends everything to its own expert: pooled over layers this looks balanced, per layer it is not
    layers = [torch.tensor([[8.0, 0.0]] * 4), torch.tensor([[0.0, 8.0]] * 4)]
    balance = Balance(2, 2)
    total, _ = balance.losses(layers, top_k=1)
    assert total.item() == pytest.approx(4.0, abs=0.01)
    assert balance.take_load().tolist() == [[2.0, 0.0], [0.0, 2.0]]


def test_export_is_an_ordinary_checkpoint(tmp_path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    train_tokenizer(["some text 123", "andere Wörter"] * 20, 300, model_max_length=16).save_pretrained(
        tmp_path / "tokenizer"
    )
    trainer = nano(tmp_path / "run")
    trainer.run(until=5)
    for _ in range(2):  # the second time replaces the first
        export(trainer, tmp_path / "tokenizer", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert model.dtype == torch.float32
    window = trainer.batches[0][:, :-1]
    torch.testing.assert_close(model.float()(window).logits, trainer.model(window).logits, atol=0.05, rtol=0.05)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "Wörter 2024"
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert tokenizer.decode(encoded["input_ids"]) == text
    assert [text[a:b] for a, b in encoded["offset_mapping"]][-4:] == ["2", "0", "2", "4"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run", "tokenizer"]
