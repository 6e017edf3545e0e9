"""How a router turns logits into a choice and weights: measured on what it returns, not looked up by family.

A rule is a candidate `w = scale * f(logits)[chosen]` that reproduces every weight. A softmax renormalised over
the chosen experts and a softmax over the chosen logits are one function, so they are one rule here.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_lens.models import families

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

Scores = Callable[["Float[Tensor, 'token expert']"], "Float[Tensor, 'token expert']"]


@dataclass(frozen=True)
class GateRule:
    """The weight of a chosen expert: `scale` times a score of its logit, divided by the chosen sum or not."""

    score: str
    """One of `SCORES`; a softmax is over all experts."""
    renormalised: bool
    """True when the scores of the chosen experts are divided by their sum."""
    scale: float
    """Factor on every weight (`routed_scaling_factor`); 1 in most families."""
    groups: tuple[int, int] = (1, 1)
    """Groups of experts, and how many of them one token may visit; (1, 1) where all are open."""
    selection_bias: bool = False
    """True when a bias enters the choice but not the weights."""

    def __str__(self) -> str:
        if self.score == "softmax":
            how = "softmax over the chosen experts" if self.renormalised else "softmax over all experts, then top-k"
        else:
            how = f"{self.score}, then top-k" + (", divided by the sum of the chosen" if self.renormalised else "")
        ending = "weights sum to 1" if self.renormalised else "weights not renormalised"
        choice = f", from {self.groups[1]} of {self.groups[0]} groups" if self.groups[0] > 1 else ""
        choice += ", chosen with a selection bias" if self.selection_bias else ""
        if abs(self.scale - 1) > 1e-3:
            return f"{how}, times {self.scale:.4g}{choice}"
        return f"{how}{choice} ({ending})"


SCORES: dict[str, Scores] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrt(softplus)": lambda logits: functional.softplus(logits).sqrt(),
}


def read_rule(
    logits: Float[Tensor, "token expert"],
    index: Int[Tensor, "token slot"],
    weight: Float[Tensor, "token slot"],
    *,
    tolerance: float,
) -> GateRule | None:
    """The rule that gives `weight` from `logits`; None when none of the known ones does.

    Args:
        tolerance: largest relative spread of `weight / candidate` over all visits.
    """
    logits, weight = logits.double(), weight.double()
    for (score, scores), renormalised in itertools.product(SCORES.items(), (False, True)):
        candidate = scores(logits).gather(1, index)
        if renormalised:
            candidate = candidate / candidate.sum(-1, keepdim=True)
        ratio = weight / candidate
        scale = ratio.median()
        if scale > 0 and bool(((ratio - scale).abs() <= tolerance * scale).all()):
            return GateRule(score, renormalised, float(scale))
    return None


@torch.no_grad()
def rule_of_router(
    router: nn.Module | None,
    d_model: int,
    read: Callable[[Any], Sequence[Tensor | None]] | None = None,
    holders: Sequence[Any] = (),
) -> GateRule | None:
    """The rule of a router that has no weights yet (meta device): run a copy with random ones.

    `read` tells logits, weights and indices in what it returns, where their types do not. `holders` are the block
    and the config, which may hold a selection bias and the number of groups; a limit to groups counts only if every
    choice keeps to it. None when the router cannot run alone or follows no known rule.
    """
    if router is None:
        return None
    generator = torch.Generator().manual_seed(0)
    try:
        twin: Any = copy.deepcopy(router).to_empty(device="cpu").float().eval()
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.zero_()
            if tensor.dim() > 1:  # vectors are biases, which may enter the choice but not the weights
                tensor.normal_(0, d_model**-0.5, generator=generator)
        x = torch.randn(16, d_model, generator=generator)
        logits, weight, index = (read or parts)(_call(twin, x))
    except Exception:  # routers that want more than hidden states, or are no modules of their own
        return None
    if logits is None or weight is None or index is None:
        return None
    if type(router).__name__ in families.PROBABILITY_ROUTERS:
        logits = logits.log()
    rule = read_rule(logits, index, weight, tolerance=1e-3)
    if rule is None:
        return None
    n_groups, kept = groups([router, *holders])
    group = index // max(1, logits.shape[1] // n_groups)
    limited = kept < n_groups and all(len(row.unique()) <= kept for row in group)
    modules = [router, *(holder for holder in holders if isinstance(holder, nn.Module))]
    biased = any(not name.endswith(".bias") for name, _ in _biases(modules, logits.shape[1]))
    return replace(rule, groups=(n_groups, kept) if limited else (1, 1), selection_bias=biased)


def _call(router: nn.Module, x: Tensor) -> Any:
    try:
        return router(x)
    except TypeError:  # a selection bias that the parent holds comes as the second argument
        return router(x, torch.zeros(1))


def parts(returned: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Logits, weights and indices among what a router returned, told apart by type and width."""
    tensors = [t for t in (returned if isinstance(returned, tuple) else (returned,)) if isinstance(t, Tensor)]
    flat = [t.reshape(-1, t.shape[-1]) for t in tensors if t.dim() > 0]
    index = next((t for t in flat if not t.is_floating_point()), None)
    floats = [t for t in flat if t.is_floating_point()]
    weight = None if index is None else next((t for t in floats[1:] if t.shape == index.shape), None)
    return (floats[0] if floats else None), weight, index


def explain_choice(
    logits: Float[Tensor, "token expert"],
    chosen: Bool[Tensor, "token expert"],
    biases: Sequence[Float[Tensor, "expert"]],
    n_groups: int,
    kept: int,
    *,
    likely: str | None = None,
) -> tuple[str, int]:
    """The rule that explains which experts were chosen, and how many tokens it leaves unexplained.

    Args:
        likely: score that the weights are made of; tried first, because few tokens fit several rules.
        biases: vectors that may be added to the scores for the choice only.
        n_groups, kept: groups of neighbouring experts, and how many of them one token may use.
    """
    candidates = [("the top-k of the logits", logits)]
    for bias in biases:
        candidates += [
            (f"the top-k of {name}(logits) + selection bias", score(logits) + bias.to(logits))
            for name, score in sorted(SCORES.items(), key=lambda entry: entry[0] != likely)
        ]
        candidates.append(("the top-k of logits + selection bias", logits + bias.to(logits)))
    tried = [(name, int((~_is_best(score, chosen)).sum())) for name, score in candidates]
    if n_groups > 1:
        tried += [
            (f"{name} in {kept} of {n_groups} groups", int((~_is_best_in_groups(score, chosen, n_groups, kept)).sum()))
            for name, score in candidates
        ]
    return min(tried, key=lambda entry: entry[1])


def _is_best(score: Float[Tensor, "token expert"], chosen: Bool[Tensor, "token expert"]) -> Bool[Tensor, "token"]:
    """Tokens of which no rejected expert beats a chosen one (a tie is no defeat)."""
    worst_chosen = score.masked_fill(~chosen, math.inf).amin(-1)
    best_rejected = score.masked_fill(chosen, -math.inf).amax(-1)
    finite = score.masked_fill(score.abs() >= 1e30, 0)
    slack = 4 * torch.finfo(torch.float32).eps * finite.abs().amax(-1)
    return worst_chosen >= best_rejected - slack


def _is_best_in_groups(score: Tensor, chosen: Tensor, n_groups: int, kept: int) -> Bool[Tensor, "token"]:
    """The same among the experts of the groups that were used, of which there are at most `kept`."""
    used = chosen.view(len(chosen), n_groups, -1).any(-1)
    members = used.repeat_interleave(chosen.shape[1] // n_groups, dim=1)
    return (used.sum(-1) <= kept) & _is_best(score.masked_fill(~members, -1e30), chosen)


def groups(holders: Sequence[Any]) -> tuple[int, int]:
    """Groups of experts and how many of them a token may use, from the first of `holders` that says; else (1, 1)."""
    n_groups = next((n for s in holders for k in ("num_group", "n_group") if (n := getattr(s, k, None))), 1)
    return int(n_groups), int(next((n for s in holders if (n := getattr(s, "topk_group", None))), n_groups))


def selection_biases(holders: Sequence[nn.Module], n_logits: int) -> list[Float[Tensor, "expert"]]:
    """Vectors over logits in a router (at any depth) or directly in its block that may enter the choice."""
    found = _biases(holders, n_logits)
    return [tensor.detach().reshape(-1).float() for _, tensor in found if tensor.device.type != "meta"]


def _biases(holders: Sequence[nn.Module], n_logits: int) -> list[tuple[str, Tensor]]:
    router, *blocks = holders
    tensors = [*router.named_parameters(), *router.named_buffers()]
    for block in blocks:
        tensors += [*block.named_parameters(recurse=False), *block.named_buffers(recurse=False)]
    return [("." + name, tensor) for name, tensor in tensors if "bias" in name and tensor.numel() == n_logits]
