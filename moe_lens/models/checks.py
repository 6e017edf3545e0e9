"""The lines of a diagnosis that judge what was captured. `reruns` has those that run the model again.

Each holds a measured number against a threshold and says where it was worst. Where a number is computed by other
operations than the model's, `TOLERANCE` holds, relative to the size of what is summed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moe_lens.models import families, gates
from moe_lens.models.evidence import Evidence, Witness
from moe_lens.models.source import N_EXPERTS_KEYS, numbers
from moe_lens.types import ExpertTap, Role

if TYPE_CHECKING:
    from jaxtyping import Float

    from moe_lens.models.lens import Lens
    from moe_lens.models.sites import Site

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Relative error that rounding explains: about four roundings of a value (bfloat16 has a step of 2^-7), and in
float32 the error of a sum over a few thousand terms in another order."""

WIDTH_KEYS = ("moe_intermediate_size", "expert_ffn_hidden_size", "moe_ffn_hidden_size", "intermediate_size")
OUTPUT_KEYS = (*families.D_MODEL_KEYS, "moe_latent_size", "moe_hidden_size")
ROWS_PER_LAYER = 4


class Outcome(StrEnum):
    """How a check ended."""

    OK = "ok"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Check:
    """One line of a diagnosis."""

    check: str
    status: Outcome
    value: float | None
    """What was measured."""
    threshold: float | None
    """Largest value that passes."""
    detail: str
    """What was compared and where it was worst, or why it was skipped."""
    advice: str = ""
    """What a failure means for the user and what to do."""


def judged(name: str, value: float, threshold: float, detail: str, advice: str) -> Check:
    """A check that passes when `value` is a number up to `threshold`."""
    passed = not math.isnan(value) and value <= threshold
    return Check(name, Outcome.OK if passed else Outcome.FAILED, value, threshold, detail, "" if passed else advice)


def skipped(name: str, why: str) -> Check:
    return Check(name, Outcome.SKIPPED, None, None, why)


def loading(lens: Lens, offloaded: bool) -> Check:
    """Every parameter has values, unless accelerate keeps it elsewhere."""
    hooked = {id(p) for m in lens.model.modules() if hasattr(m, "_hf_hook") for p in m.parameters(recurse=False)}
    lost = [n for n, p in lens.model.named_parameters() if p.device.type == "meta" and id(p) not in hooked]
    detail = f"{sum(1 for _ in lens.model.parameters())} tensors, {'some offloaded' if offloaded else 'all in memory'}"
    return judged(
        "loading", len(lost), 0, f"{detail}{f'; first without values: {lost[0]}' if lost else ''}",
        "some weights have no values, so every number would be meaningless: load the checkpoint again",
    )  # fmt: skip


def tokenizer(lens: Lens, text: str) -> Check:
    """Encoding and decoding gives the text back, white space apart, and every id has an embedding."""
    name = "tokenizer"
    if lens.tokenizer is None:
        return skipped(name, "the lens has no tokenizer")
    ids = lens.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    back = lens.tokenizer.decode(ids, skip_special_tokens=True)
    left, right = "".join(text.split()), "".join(back.split())
    wrong = abs(len(left) - len(right)) + sum(a != b for a, b in zip(left, right, strict=False))
    unknown = sum(token >= n_embedded(lens) for token in ids)
    return judged(
        name, wrong + unknown, 0, f"{len(ids)} tokens; {wrong} characters differ when decoded, {unknown} unknown ids",
        "the tokenizer does not fit the model, so tokens in results would be wrong: use both of one release",
    )  # fmt: skip


def n_embedded(lens: Lens) -> int:
    """Token ids that have an embedding."""
    return int(lens.model.get_input_embeddings().num_embeddings)


def finite(found: Evidence) -> Check:
    """No NaN or infinity in logits, activations, outputs or router logits."""
    counts = found.not_finite
    bad, where = sum(counts.values()), next((place for place, n in counts.items() if n), "")
    lost = first_not_finite(found.lens.model) if bad else None
    advice = "load with another --dtype (bfloat16 instead of float16)"
    if lost is not None:
        too_large = f", or {advice}" if found.lens.model.dtype is torch.float16 else ""
        advice = f"the weights themselves hold some (first: {lost}), so download the checkpoint again{too_large}"
    return judged(
        "finite", bad, 0, f"logits and taps of {len(found.taps)} MoE layers" + (f"; first in {where}" if where else ""),
        f"NaN or infinity would spread into every statistic: {advice}",
    )  # fmt: skip


def first_not_finite(model: nn.Module) -> str | None:
    """Name of the first parameter or buffer in memory with NaN or infinity."""
    named = [*model.named_parameters(), *model.named_buffers()]
    in_memory = ((n, t) for n, t in named if t.is_floating_point() and t.device.type != "meta")
    return next((name for name, tensor in in_memory if not bool(tensor.isfinite().all())), None)


def widths(found: Evidence) -> Check:
    """Experts, top-k and widths of every tap are among those that the config names."""
    config = families.text_config(found.lens.model.config)
    wrong: list[str] = []
    for tap in found.taps.values():
        measured = {
            "experts": (tap.n_experts, N_EXPERTS_KEYS), "top-k": (len(tap.token) / tap.n_tokens, families.TOP_K_KEYS),
            "activation": (tap.d_ff, WIDTH_KEYS), "output": (tap.output.shape[-1], OUTPUT_KEYS),
        }  # fmt: skip
        for what, (value, keys) in measured.items():
            named = numbers(config, keys)
            if what == "experts":  # LongCat-Flash counts experts without weights apart
                named |= {n + (getattr(config, "zero_expert_num", 0) or 0) for n in named}
            if named and value not in named:
                wrong.append(f"layer {tap.layer}: {what} {value:g}, config {'/'.join(map(str, sorted(named)))}")
    first = next(iter(found.taps.values()))
    return judged(
        "widths", len(wrong), 0,
        wrong[0] if wrong else f"{first.n_experts} experts, {first.d_ff} neurons each, in {len(found.taps)} layers",
        "the taps have another shape than the config says, so addresses such as L7.E12 may name the wrong thing: "
        "check config.json, and report it if that is right",
    )  # fmt: skip


def block_output(found: Evidence) -> Check:
    """Weighted expert outputs (and the shared expert's) sum to what the model's own modules returned."""
    worst, where, n_blocks, untapped = 0.0, "", 0, set[int]()
    for witness, tap in found.moe:
        site = witness.site
        total = tap.output.new_zeros(tap.n_tokens, tap.output.shape[-1], dtype=torch.float32)
        size = total.new_zeros(len(total))
        _add(total, size, tap)
        pairs = [] if witness.returned is None else [(total.clone(), size.clone(), witness.returned)]
        total, size = total * site.block_scale, size * abs(site.block_scale)
        shared = next((s for s in found.lens.sites if s.layer == tap.layer and s.role is Role.SHARED), None)
        inside = shared is not None and shared.path.startswith(site.path.rpartition(".")[0] + ".")
        if inside and found.shared[tap.layer].output.shape == total.shape:
            _add(total, size, found.shared[tap.layer], shared.block_scale)  # type: ignore[union-attr]
        if shared is None and any(hasattr(site.block, name) for name in families.SHARED_ATTRIBUTES):
            untapped.add(tap.layer)
        elif witness.block is not None and witness.block.shape == total.shape:
            bias = getattr(site.block, "bias", None)  # JetMoe adds one to the sum
            pairs.append((total + bias.detach() if isinstance(bias, Tensor) else total, size, witness.block))
            n_blocks += 1
        for summed, scale, expected in pairs:
            error = ((summed - expected.float()).norm(dim=-1) / scale.clamp_min(1e-30)).nan_to_num(nan=math.inf)
            if not where or float(error.max()) > worst:
                worst, where = float(error.max()), f"layer {tap.layer}, token {int(error.argmax())}"
    note = f"; the shared expert of {len(untapped)} layers is not tapped" if untapped else ""
    return judged(
        "block output", worst, TOLERANCE.get(found.lens.model.dtype, 3e-2),
        f"{len(found.taps)} experts modules and {n_blocks} whole blocks{note}; worst in {where}",
        "captured outputs and weights do not add up to what the layer writes, so contributions and ablations would be "
        "wrong: do not use expert outputs of this model, and report it with the model's name",
    )  # fmt: skip


def _add(
    total: Float[Tensor, "token d_model"], size: Float[Tensor, "token"], tap: ExpertTap, scale: float = 1.0
) -> None:
    write = scale * tap.weight.float().unsqueeze(-1) * tap.output.float()
    total.index_add_(0, tap.token.to(total.device), write.to(total.device))
    size.index_add_(0, tap.token.to(size.device), write.norm(dim=-1).to(size.device))


@torch.no_grad()
def row_by_row(found: Evidence) -> Check:
    """Captured rows against the experts called with one token, one expert, weight 1; activations against outputs."""
    worst, where, n_rows = 0.0, "none", 0
    last = len(found.moe) - 1
    for i in sorted({0} if found.offloaded else {0, last // 2, last}):
        witness, tap = found.moe[i]
        if witness.x is None or witness.index is None or witness.weight is None or len(tap.token) == 0:
            continue
        for row in torch.linspace(0, len(tap.token) - 1, ROWS_PER_LAYER).long().unique().tolist():
            token, expert = int(tap.token[row]), int(tap.expert[row])
            alone = _run_alone(witness, token, expert)
            n_rows += 1
            for expected in (alone, _project_down(witness.site, tap.activation[row], expert)):
                if expected is None:
                    continue
                expected = expected.float()
                error = float((tap.output[row].float() - expected).norm() / expected.norm().clamp_min(1e-30))
                if not error < worst:
                    worst, where = error, f"L{tap.layer}.E{expert}, token {token}"
    return judged(
        "row by row", worst, TOLERANCE.get(found.lens.model.dtype, 3e-2), f"{n_rows} rows alone; worst in {where}",
        "captured activations or outputs do not belong to the token and expert they are filed under, so every number "
        "about an expert would be wrong: do not use this model, and report it with its name",
    )  # fmt: skip


def _run_alone(witness: Witness, token: int, expert: int) -> Float[Tensor, "d_model"]:
    """What the model's own experts make of one token, with one expert and weight 1."""
    assert witness.x is not None
    assert witness.index is not None
    assert witness.weight is not None
    site, x = witness.site, witness.x[token : token + 1]
    if site.adapter is not None:
        return site.adapter.run_expert(site, x, expert)[0]
    return site.module(x, witness.index.new_tensor([[expert]]), witness.weight.new_ones(1, 1))[0]


def _project_down(site: Site, activation: Float[Tensor, "d_ff"], expert: int) -> Float[Tensor, "d_model"] | None:
    """The down-projection by hand; None while the weights are elsewhere, or in a layout that only an adapter knows."""
    if site.adapter is not None:
        return None
    experts: Any = site.module
    weight = experts.down_proj[expert]
    if weight.device.type == "meta":
        return None
    output = activation @ (weight if getattr(experts, "is_transposed", False) else weight.T)
    if experts.has_bias:
        output = output + experts.down_proj_bias[expert]
    return experts.post_expert_norm(output) if getattr(experts, "has_post_expert_norm", False) else output


def router_order(found: Evidence) -> Check:
    """Experts, weights and logits of the taps are those the router returned and the experts were called with."""
    wrong, where = 0, ""
    for witness, tap in found.moe:
        logits, weight, index = witness.router
        tapped_index, tapped_weight = _dense(tap)
        if witness.site.adapter is not None and weight is not None and bool((tap.weight == 1).all()):
            tapped_weight = weight  # Llama 4 scales an expert's input, so its taps carry weight 1
        if logits is not None and type(witness.site.router).__name__ in families.PROBABILITY_ROUTERS:
            logits = logits.log()
        pairs = [
            (witness.index, tapped_index), (index, tapped_index), (witness.weight, tapped_weight),
            (weight, tapped_weight), (logits, tap.router_logits),
        ]  # fmt: skip
        for expected, got in pairs:
            if expected is None or got is None:
                continue
            same = expected.shape == got.shape and expected.to(got.dtype).eq(got)
            n_wrong = got.numel() if same is False else int((~same).sum())  # type: ignore[operator]
            where = where or (f"; first in layer {tap.layer}" if n_wrong else "")
            wrong += n_wrong
    return judged(
        "router", wrong, 0, f"experts, weights and logits of {len(found.taps)} layers{where}",
        "taps name other experts or weights than the router chose, so routing statistics would be wrong: "
        "do not use this model, and report it with its name",
    )  # fmt: skip


def _dense(tap: ExpertTap) -> tuple[Tensor, Tensor]:
    """Experts and weights as (token, slot), from the rows of a tap."""
    top_k = len(tap.token) // tap.n_tokens
    index = tap.expert.new_full((tap.n_tokens, top_k), -1)
    weight = tap.weight.new_zeros(tap.n_tokens, top_k)
    index[tap.token, tap.slot], weight[tap.token, tap.slot] = tap.expert, tap.weight
    return index, weight


def choice(found: Evidence) -> Check:
    """The chosen experts are the best by the router's logits, or by a rule that the router is known to have."""
    if any(tap.router_logits is None for tap in found.taps.values()):
        return skipped("choice", "the router of some layer was not found")
    wrong, where, rules = 0, "", list[str]()
    for witness, tap in found.moe:
        rule, n_wrong = explain(witness, tap, found.lens.model.config)
        where = where or (f"; first wrong in layer {tap.layer}" if n_wrong else "")
        rules, wrong = [*rules, rule], wrong + n_wrong
    return judged(
        "choice", wrong, 0, f"tokens that do not visit {' / '.join(dict.fromkeys(rules))}{where}",
        "the captured router logits do not explain which experts were chosen, so margins and router views would be "
        "wrong: do not use router logits of this model, and report it with its name",
    )  # fmt: skip


def explain(witness: Witness, tap: ExpertTap, config: Any) -> tuple[str, int]:
    """The rule behind the choice in one layer, and the tokens it leaves unexplained (see `gates`)."""
    if tap.router_logits is None:
        return "unknown: the router was not found", 0
    if hasattr(witness.site.router, "tid2eid"):
        return "a table of token ids", 0
    chosen = torch.zeros_like(tap.router_logits, dtype=torch.bool)
    used = tap.weight != 0  # Zaya sends tokens that skip to expert 0 with weight 0
    chosen[tap.token[used], tap.expert[used]] = True
    holders = [module for module in (witness.site.router, witness.parent) if module is not None]
    n_groups, kept = gates.groups([*holders, families.text_config(config)])
    rule = gate_rule(witness, tap)
    return gates.explain_choice(
        tap.router_logits.float(), chosen, gates.selection_biases(holders, chosen.shape[1]), n_groups, kept,
        likely=rule.score if rule else None,
    )  # fmt: skip


def gate_rule(witness: Witness, tap: ExpertTap) -> gates.GateRule | None:
    """How the weights of one layer come from its real logits; None if unknown."""
    if tap.router_logits is None or witness.index is None or witness.weight is None:
        return None
    tolerance = max(1e-3, TOLERANCE.get(witness.weight.dtype, 0.0))
    return gates.read_rule(tap.router_logits.float(), witness.index, witness.weight, tolerance=tolerance)
