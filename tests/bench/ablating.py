"""What leave-one-expert-out costs when only what an edit can reach runs again, against one full pass per expert."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from timing import seconds, show, timed
from transformers import OlmoeConfig, OlmoeForCausalLM

import moe_lens as ml
from moe_lens.causal.effects import Effects
from moe_lens.causal.result import TokenEffects
from moe_lens.causal.scoring import Wanted
from moe_lens.corpus.batches import Tokenized
from moe_lens.models.lens import Lens
from moe_lens.types import ExpertAddress

TOKENS = 4096
FULL_BATCH = 4096
"""Tokens of a full pass, as in every other command."""
FEW = 8
"""Experts of the arms that only explain the ratio."""


def ablation_cost(
    lens: Lens, tokenized: Tokenized, title: str, units: Sequence[ExpertAddress], goal: float
) -> dict[str, float]:
    """Zero each of `units` alone, NLL and KL of every prediction: replayed, and by full passes.

    All arms score with the same code, from clean probabilities that are made beforehand. They take turns expert by
    expert.
    """
    options: dict[str, Any] = {"max_tokens": TOKENS, "progress": False}
    ours = Effects(lens, tokenized, **options)
    full = Effects(lens, tokenized, reach="full", batch_tokens=FULL_BATCH, **options)
    same = Effects(lens, tokenized, reach="full", batch_tokens=ours.batch_tokens, **options)
    for arm in (ours, full, same):
        arm.of(ml.zero(units[0]))
    for layer in {unit.layer for unit in units}:  # the trial of each layer's shortcut, once a model
        ours.of(ml.zero(ExpertAddress(layer, 0)))
    ratio, per_expert, noise = _turns(ours, full, units)
    few = units[:: max(1, len(units) // FEW)]
    same_ratio, _, difference = _turns(ours, same, few)
    head = _head_seconds(full) / (ratio * per_expert)
    exact = _difference_in_float64(lens, tokenized, few)
    show(
        f"{title}: {len(units)} experts, {len(ours.text.token)} predictions",
        [
            (f"full passes of {FULL_BATCH} tokens / replayed in {ours.batch_tokens}", f"{ratio:.2f}", f">= {goal}"),
            (f"full passes of {ours.batch_tokens} tokens / the same", f"{same_ratio:.2f}", ""),
            ("windows that visit the expert, the others do not run", f"{_visited(ours, units):.0%}", ""),
            ("seconds per expert, replayed", f"{per_expert:.2f}", ""),
            ("LM head and scoring of all predictions / full pass", f"{head:.0%}", ""),
            ("largest difference of NLL or KL in float64, nats", f"{exact:.1e}", "<= 1e-5"),
            ("the same in float32, batches as above", f"{difference:.1e}", ""),
            (f"the same in float32, against batches of {FULL_BATCH}", f"{noise:.1e}", ""),
        ],
    )
    return {"ratio": ratio, "same_batches": same_ratio, "head_share": head, "difference": exact}


def _visited(effects: Effects, units: Sequence[ExpertAddress]) -> float:
    """Mean share of windows in which a token visits the expert."""
    windows = effects.text.tokenized.window_of[effects.text.read]
    visits = [windows[(effects.routing[unit.layer][0] == unit.expert).any(axis=1)] for unit in units]
    return float(np.mean([len(np.unique(found)) for found in visits]) / len(effects.text.windows))


def _turns(ours: Effects, other: Effects, units: Sequence[ExpertAddress]) -> tuple[float, float, float]:
    """Seconds of `other` over seconds of `ours`, seconds of `ours` per expert, largest difference."""
    spent, off = np.zeros(2), 0.0
    for unit in units:
        (mine, replayed), (theirs, whole) = (timed(lambda arm=arm: arm.of(ml.zero(unit))) for arm in (ours, other))  # noqa: B023
        spent += mine, theirs
        off = max(off, _difference(replayed, whole))
    return float(spent[1] / spent[0]), float(spent[0]) / len(units), off


def _difference(a: TokenEffects, b: TokenEffects) -> float:
    return max(float(np.abs(a.nll - b.nll).max()), float(np.abs(a.kl - b.kl).max()))


def _difference_in_float64(lens: Lens, tokenized: Tokenized, units: Sequence[ExpertAddress]) -> float:
    """Where rounding does not send a token near a tie between two experts another way."""
    model = deepcopy(lens.model).double()
    model.set_experts_implementation("eager")  # grouped_mm has no float64
    twin = Lens(model, lens.tokenizer)
    short, full = (Effects(twin, tokenized, max_tokens=TOKENS // 4, reach=r, progress=False) for r in (None, "full"))
    return max(_difference(short.of(ml.zero(unit)), full.of(ml.zero(unit))) for unit in units)


def _head_seconds(effects: Effects) -> float:
    """Seconds of scoring every prediction once."""
    work = [kept.predictions for _, kept in effects.clean_passes()]

    def run() -> None:
        for clean in work:
            clean.score(clean.hidden, torch.arange(len(clean.target)), Wanted(kl=True))

    return min(seconds(run) for _ in range(3))


def deep_model(tokenizer: Any) -> Lens:
    """16 layers, H 128, 64 experts, top-8, d_ff 64, random weights, with the bundled tokenizer."""
    config = OlmoeConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=64, num_hidden_layers=16,
        num_attention_heads=4, num_key_value_heads=4, num_experts=64, num_experts_per_tok=8, pad_token_id=1,
        eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return Lens(OlmoeForCausalLM(config).eval(), tokenizer, name="random-olmoe")


def ablating_cost(tokenized: Tokenized) -> dict[str, dict[str, float]]:
    """Every expert of the bundled MoE, and one expert of each layer of the deep one, drawn by lot."""
    bundled = ml.load("bundled:tiny-moe", dtype="float32")
    every = [ExpertAddress(entry.layer, e) for entry in bundled.spec.layers for e in range(entry.n_experts)]
    some = [ExpertAddress(layer, int(e)) for layer, e in enumerate(np.random.default_rng(0).integers(0, 64, 16))]
    deep = deep_model(bundled.tokenizer)
    return {
        "bundled": ablation_cost(bundled, tokenized, "leave one out, bundled:tiny-moe in float32", every, 1.6),
        "deep": ablation_cost(deep, tokenized, "leave one out, 16-layer random OLMoE of 1,024 experts", some, 2.5),
    }
