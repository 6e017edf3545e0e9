"""Information and ablation give the known answer on planted data; the card quotes them."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_lens.organisms.ablation import AblationConfig, domain_experts, half
from moe_lens.organisms.card import loss_svg, table
from moe_lens.organisms.corpus import Document
from moe_lens.organisms.evaluate import bits_per_byte
from moe_lens.organisms.forward import LayeredForward, windows
from moe_lens.organisms.information import conditional_information, entropy, information, mutual_information
from moe_lens.organisms.model import Architecture, build_model
from moe_lens.organisms.tokenizer import train_tokenizer

NANO = Architecture(d_model=16, n_layers=2, n_heads=2, vocab_size=300, n_experts=4, top_k=2, d_ff=8, max_positions=32)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["alpha beta gamma delta", "12345 67890"] * 20, 300, model_max_length=32)


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    words = {"letters": "alpha beta gamma delta ", "digits": "1234567890"}
    return [
        Document(f"{domain}-{n}", text * (3 + n % 3), domain, "natural", "en", "x", "s", f"f{n}", "CC0-1.0")
        for domain, text in words.items()
        for n in range(24)
    ]


def test_entropy_and_information_of_known_tables() -> None:
    assert entropy(np.array([1, 1, 2])) == pytest.approx(1.5)
    x = np.array([0, 0, 1, 1])
    assert mutual_information(x, x, 2, 2) == pytest.approx(1.0)
    assert mutual_information(x, np.array([0, 1, 0, 1]), 2, 2) == pytest.approx(0.0, abs=1e-12)
    # y = x given z: knowing z alone says nothing, given z all is known
    assert conditional_information(x, x, np.zeros(4, int), 2, 2, 1) == pytest.approx(1.0)
    assert conditional_information(x, x, x, 2, 2, 2) == pytest.approx(0.0, abs=1e-12)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=60))
def test_information_is_symmetric_and_bounded(pairs) -> None:
    x, y = np.array(pairs).T
    one, other = mutual_information(x, y, 3, 4), mutual_information(y, x, 4, 3)
    assert one == pytest.approx(other, abs=1e-9)
    assert -1e-9 <= one <= min(entropy(np.bincount(x)), entropy(np.bincount(y))) + 1e-9


def test_routing_by_token_alone_has_no_excess_over_the_null() -> None:
    rng = np.random.default_rng(0)
    document = np.repeat(np.arange(60), 50)
    domain = np.arange(60) % 3
    tokens = rng.integers(0, 20, 3000)
    experts = np.stack([tokens % 4, (tokens + 1) % 4], 1)
    by_token = information(0, experts, tokens, document, domain, n_experts=4, n_tokens=20)
    assert by_token.given_token == pytest.approx(0.0, abs=1e-9)
    experts = np.stack([domain[document], domain[document]], 1)
    by_domain = information(0, experts, tokens, document, domain, n_experts=4, n_tokens=20)
    assert by_domain.domain_expert == pytest.approx(math.log2(3))
    assert by_domain.given_token > by_domain.given_token_null_max + 0.5


def test_layered_ablation_equals_edited_weights(tokenizer, documents) -> None:
    model = build_model(NANO, 0).eval()
    data = windows(documents[::6], tokenizer, 16, per_document=1)
    forward = LayeredForward(model, data, batch=3)

    def nats() -> np.ndarray:
        with torch.no_grad():
            logits = model(input_ids=data.ids, attention_mask=data.real.long()).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), data.ids[:, 1:].flatten(), reduction="none", ignore_index=1
        )
        return loss.view(len(data.ids), -1).sum(1).numpy()

    np.testing.assert_allclose(forward.base, nats(), rtol=1e-5)
    ablated = forward.ablated(1, 2)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2] = 0
    np.testing.assert_allclose(ablated, nats(), rtol=1e-5)


def test_the_planted_expert_of_a_domain_is_found_on_the_other_half(tokenizer, documents) -> None:
    model = build_model(NANO, 0).eval()
    digits = [tokenizer.convert_tokens_to_ids(str(n)) for n in range(10)]
    letters = [i for i in range(2, 300) if i not in digits]
    with torch.no_grad():
        embed = model.model.embed_tokens.weight
        embed.mul_(0.01)
        embed[digits, 0] += 1.0
        embed[letters, 1] += 1.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.experts.down_proj.zero_()
            layer.mlp.gate.weight.zero_()
        mlp = model.model.layers[1].mlp
        mlp.gate.weight[3, 0] = 4.0  # digits go to expert 3
        mlp.gate.weight[2, 1] = 4.0
        mlp.experts.gate_up_proj[3].zero_()
        mlp.experts.gate_up_proj[3, :, 0] = 1.0
        mlp.experts.down_proj[3, 1] = -0.008  # which speaks against letters
    rows = domain_experts(model, documents, tokenizer, AblationConfig(length=16, bootstrap=200))
    digit_row = next(row for row in rows if row.domain == "digits")
    assert (digit_row.layer, digit_row.expert) == (1, 3)
    assert digit_row.meets
    assert digit_row.rise > 0.05
    assert digit_row.rise_low <= digit_row.rise <= digit_row.rise_high
    letter_row = next(row for row in rows if row.domain == "letters")
    assert not letter_row.meets


def test_halves_are_a_stable_even_split() -> None:
    sides = [half(f"document-{n}") for n in range(2000)]
    assert 900 < sum(sides) < 1100
    assert sides == [half(f"document-{n}") for n in range(2000)]


def test_bits_per_byte_and_its_interval() -> None:
    size = np.full(50, 100.0)
    nats = {"moe": size * math.log(2) * 2, "dense": size * math.log(2) * 2.5}
    result = bits_per_byte(nats, size, np.array(["a"] * 25 + ["b"] * 25))
    assert result["overall"] == {"moe": pytest.approx(2.0), "dense": pytest.approx(2.5)}
    gap = result["dense_minus_moe"]
    assert gap["low"] == pytest.approx(0.5) == gap["high"]
    assert result["by_domain"]["a"]["documents"] == 25


def test_loss_picture_is_valid_svg_with_both_curves() -> None:
    curve = [{"tokens": n * 1000, "train": 8 - n / 10, "held_out": 8 - n / 11} for n in range(1, 20)]
    root = ET.fromstring(loss_svg({"moe": curve, "dense": curve}))
    assert len(root.findall("{http://www.w3.org/2000/svg}polyline")) == 4


def test_table_is_markdown() -> None:
    assert table(("a", "b"), [(1, 0.5)]) == "| a | b |\n| --- | --- |\n| 1 | 0.500 |\n"
