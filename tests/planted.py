"""Checkpoints whose neurons are made to order, so that the true answer of every arm is known.

``planted_model``   chosen neurons of chosen experts fire for chosen concepts and nothing else
``planted_twins``   an MoE and a dense model that carry the same neurons
``remade``          a checkpoint changed in one place
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import moe_lens as ml
from moe_lens.models.lens import Lens
from tests.models import tiny

ONE_CONCEPT = {"digit": (1, 3, 7), "after_digit": (0, 1, 5), "upper": (1, 0, 19)}
"""Concepts with a neuron (layer, expert, neuron) of their own: a property of tokens, of spans, of documents."""
THREE_CONCEPTS = {"ab": (0, 4, 11), "ef": (0, 4, 11), "ij": (0, 4, 11)}
"""Unrelated concepts that share one neuron."""
CONCEPTS = [
    ml.concept("digit", regex="[0-9]"),
    ml.concept("after_digit", regex="(?<=[0-9])."),
    ml.concept("upper", field="domain", equals="up"),
    *(ml.concept(pair, regex=f"(?i:[{pair}])") for pair in THREE_CONCEPTS),
    ml.concept("coin", field="coin", equals="heads"),
]
"""What is planted, and a label drawn by lot."""

# dimensions of the residual stream of `planted_model`
_FEATURE = {name: i for i, name in enumerate([*ONE_CONCEPT, *THREE_CONCEPTS])}
_CASE, _ONE, _CHARACTER, _PAST = 6, 7, 8, 24
"""Upper or lower case; always 4; 16 that tell characters apart; the rest: what was read before."""


def planted_text(path: Path, n_documents: int = 300, seed: int = 0) -> Path:
    """Documents of letters in one case, digits and blanks, as many digits in either domain."""
    r = np.random.default_rng(seed)
    lines = []
    for i in range(n_documents):
        letters = list("ABCDEFGHIJ" if i % 2 else "abcdefghij")
        text = "".join([*r.choice(letters, 5), *r.choice(letters * 2 + list("0123456789   "), 55)])
        coin = ["heads", "tails"][r.integers(2)]
        lines.append(json.dumps({"id": f"d{i}", "text": text, "domain": ["low", "up"][i % 2], "coin": coin}))
    path.write_text("\n".join(lines))
    return path


def planted_model(folder: Path, seed: int = 1) -> Path:
    """A checkpoint with the neurons of ``ONE_CONCEPT`` and ``THREE_CONCEPTS``.

    All other neurons, and the router, know which characters came before, but not the present one. The first head
    averages over all characters before, the second reads the one before.
    """
    model = tiny.build("olmoe", seed=seed, hidden_size=48)
    vocabulary = tiny.tokenizer().get_vocab()
    embedding = model.model.embed_tokens.weight.data
    embedding[:, :_CHARACTER] = embedding[:, _PAST:] = 0
    embedding[:, _ONE] = 4
    marks = [("digit", "0123456789"), *((pair, pair + pair.upper()) for pair in THREE_CONCEPTS)]
    for name, characters in marks:
        embedding[[vocabulary[c] for c in characters], _FEATURE[name]] = 1
    for sign, characters in ((1, "ABCDEFGHIJ"), (-1, "abcdefghij")):
        embedding[[vocabulary[c] for c in characters], _CASE] = sign
    for layer in model.model.layers:
        attention, experts = layer.self_attn, layer.mlp.experts
        for weight in (attention.q_proj, attention.k_proj, attention.v_proj, layer.mlp.gate):
            weight.weight.data[:, :_PAST] = 0
        experts.gate_up_proj.data[..., :_PAST] = experts.down_proj.data[:, :_PAST] = 0
        attention.o_proj.weight.data[:_PAST] = 0
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data[:] = 1
    _plant_heads(model.model.layers[0].self_attn)
    for at in {*ONE_CONCEPT.values(), *THREE_CONCEPTS.values()}:
        serves = [name for name, place in {**ONE_CONCEPT, **THREE_CONCEPTS}.items() if place == at]
        reads = torch.zeros(48)
        reads[[_FEATURE[name] for name in serves]] = 3
        plant(model, at, reads, torch.eye(48)[_ONE])
    return tiny.save(model, folder)


def _plant_heads(attention: Any) -> None:
    """Head 0 attends to everything alike, head 1 to the token before; both copy who is there, and one feature."""
    q, k, v, o = (getattr(attention, f"{name}_proj").weight.data for name in "qkvo")
    q[:], k[:] = 0, 0
    turn = 1e4 ** (-torch.arange(12) / 12)  # RoPE turns keys by this per token: the score is highest one token back
    q[24:, _ONE], k[24:36, _ONE] = torch.cat([turn.cos(), -turn.sin()]), 1
    attention.q_norm.weight.data[:] = attention.k_norm.weight.data[:] = 8
    v[:, _CHARACTER:_PAST] = torch.randn(48, 16)
    for row, copied, to in ((0, _CASE, "upper"), (24, _FEATURE["digit"], "after_digit")):
        v[row], o[:, row] = torch.eye(48)[copied], torch.eye(48)[_FEATURE[to]]


def plant(model: Any, at: tuple[int, int, int], gate: torch.Tensor, up: torch.Tensor) -> None:
    """Make neuron `at` compute ``act(gate x) * (up x)``, and write nothing."""
    layer, expert, neuron = at
    experts = model.model.layers[layer].mlp.experts
    experts.gate_up_proj.data[expert].view(2, -1, len(gate))[:, neuron] = torch.stack([gate, up])
    experts.down_proj.data[expert, :, neuron] = 0


def remade(source: str, folder: Path, change: Callable[[Any], Any]) -> Lens:
    """The checkpoint `source` after `change`, which may return another model; saved and loaded again."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    model = change(model) or model
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return ml.load(str(folder))


def planted_twins(folder, seed=0, *, n_experts=16, n_layers=3, n_texts=400):
    """Write a dense model and an MoE that carry the same neurons, and a text; return them with the concepts.

    Tokens are characters, a concept is a random set of 8 of the 40. In either half of the dense FFN, neuron j < 8 is
    ``silu(2 c_j + noise + .5)``, 8 more are noise alone; every expert is one half. Noise is as strong everywhere, in
    directions of its own, and is made of the two characters before; the router reads the third and the fourth, so it
    knows neither neurons nor concepts. No FFN writes anything: both models see the same stream in every layer.
    """
    import json
    from pathlib import Path

    import torch
    import transformers
    from tokenizers import Tokenizer, models

    import moe_lens as ml

    n, w, heads, folder = 8, 16, 6, Path(folder)  # concepts, neurons of an expert, how far back anything reads
    torch.manual_seed(seed)
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmn"
    member = torch.rand(40, n).argsort(0) < 8
    sets = ["".join(c for c, is_in in zip(letters, column, strict=True) if is_in) for column in member.T]
    concepts = [ml.concept(f"c{j}", regex=f"[{characters}]") for j, characters in enumerate(sets)]
    texts = ["".join(letters[c] for c in row) for row in torch.randint(0, 40, (n_texts, 60)).tolist()]
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*letters, "<pad>"])}, merges=[]))

    one, who, past = n, slice(n + 1, n + 17), slice(n + 17, n + 17 + 8 * heads)  # dimensions; the first n are concepts
    size = {
        "vocab_size": 41, "pad_token_id": 40, "hidden_size": 80, "num_hidden_layers": n_layers, "head_dim": 16,
        "num_attention_heads": heads, "num_key_value_heads": heads, "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    }  # fmt: skip
    routed = {"moe_intermediate_size": w, "num_experts": n_experts, "num_experts_per_tok": 1, "norm_topk_prob": True}
    build = transformers.AutoModelForCausalLM.from_config
    dense = build(transformers.Qwen3Config(**size, intermediate_size=2 * w))
    moe = build(transformers.Qwen3MoeConfig(**size, **routed))
    with torch.no_grad():
        for weight in (weight for model in (dense, moe) for weight in model.parameters() if weight.dim() > 1):
            weight.zero_()
        characters = dense.model.embed_tokens.weight[:40]
        characters[:, :n], characters[:, one] = member.float(), 1
        characters[:, who] = 4 * torch.nn.functional.normalize(torch.randn(40, 16))
        attention = dense.model.layers[0].self_attn  # head h copies what stands h + 1 tokens back, by RoPE alone
        angle = torch.arange(1, heads + 1)[:, None] * 1e4 ** (-torch.arange(8) / 8)
        attention.q_proj.weight[:, one] = torch.cat([angle.cos(), -angle.sin()], 1).flatten()
        attention.k_proj.weight[:, one] = (torch.arange(16 * heads) % 16 < 8).float()
        attention.q_norm.weight[:] = attention.k_norm.weight[:] = 8
        attention.v_proj.weight[:, who] = torch.eye(16).repeat(heads, 1)
        copies = torch.randn(heads, 8, 16) / 4
        attention.o_proj.weight[past] = torch.block_diag(*copies)
        noise = torch.einsum("ci,hoi->hco", characters[:, who], copies[:2])
        for layer, sparse in zip(dense.model.layers, moe.model.layers, strict=True):
            gate, up = layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight
            gate[:, :n] = torch.cat([2 * torch.eye(n), torch.zeros(w - n, n)]).repeat(2, 1)
            direction = torch.randn(2 * w, 2, 8)
            strength = torch.einsum("hco,who->whc", noise, direction).var(2).sum(1).sqrt()
            gate[:, past][:, :16] = (direction / strength[:, None, None]).flatten(1)
            gate[:, one], up[:, one] = 0.5, 1
            halves = torch.stack([gate, up]).view(2, 2, w, -1).transpose(0, 1).flatten(1, 2)
            sparse.mlp.experts.gate_up_proj[:] = halves.repeat(n_experts // 2, 1, 1)
            sparse.mlp.gate.weight[:, past][:, 16:32] = torch.randn(n_experts, 16)
    moe.load_state_dict(dense.state_dict(), strict=False)
    for name, model in (("moe", moe), ("dense", dense)):
        model.save_pretrained(folder / name)
        transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>").save_pretrained(folder / name)
    lines = [json.dumps({"id": f"d{i}", "text": text}) for i, text in enumerate(texts)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    return ml.load(str(folder / "moe")), ml.load(str(folder / "dense")), ml.corpus(str(folder / "text.jsonl")), concepts
