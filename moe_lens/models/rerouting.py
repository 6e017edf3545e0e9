"""Ask a router again as if some experts did not exist.

1. Run the family's own router on the arguments it was called with.
2. Inside, the logits of removed experts become the most negative number, so that no softmax or sigmoid
   gives them mass, and they are lowered once more where the router takes its top-k, because a selection
   bias or a group score could still prefer them.
3. A removed expert that is chosen all the same (too few survivors, groups, routing fixed by the token)
   gets weight 0, and the caller is told.

No family's routing rule is written down here. `score_rule` reads from logits and weights how the router
turns one into the other; it is needed to give a refilled expert the gate it would have had
(`mask_refill_keep`, METRICS 2.3).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from moe_lens.errors import UnsupportedModel

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from moe_lens.models.seam import Routing

LOGIT_WIDTHS = ("n_total_experts", "num_router_classes")
"""Router attributes for the width of its logits where that is not the number of routed experts
(Inkling scores its shared experts too, Zaya has a class for skipping)."""

EXPERT_SCALE = "per_expert_scale"
"""Router parameter that multiplies the weight of each expert after normalisation (Gemma 4)."""

RULES = {
    "softmax": lambda a: a,
    "sigmoid": F.logsigmoid,
    "sqrt(softplus)": lambda a: F.softplus(a).clamp(min=torch.finfo(a.dtype).tiny).log() / 2,
}
"""Log score of a logit, up to a constant of the token (names as in `gates.SCORES`): weights are proportional to it."""

_LINEAR = (F.linear, torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
_TOPK = (torch.topk, Tensor.topk)


class _Mask(TorchFunctionMode):
    """Lower the scores of removed experts inside a router's forward."""

    def __init__(self, removed: Bool[Tensor, "token expert"], widths: set[int]) -> None:
        super().__init__()
        self.removed, self.widths = removed, widths
        self.n_masked = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _TOPK and args and (lowered := self._lower(args[0])) is not None:
            found = func(lowered, *args[1:], **kwargs)
            if lowered.shape[-1] not in self.widths:  # scores of groups: the sums must be of survivors
                return found
            values = args[0].gather(-1, found.indices)  # weights are the router's own, also of a removed expert
            return torch.return_types.topk((values, found.indices))
        out = func(*args, **kwargs)
        if func in _LINEAR and (lowered := self._lower(out)) is not None:
            self.n_masked += 1
            return lowered
        return out

    def _lower(self, scores: Tensor) -> Tensor | None:
        """`scores` with removed experts lowered; None if its shape is not one score per token and expert."""
        n_tokens, n_experts = self.removed.shape
        width = scores.shape[-1]
        if scores.numel() == n_tokens * n_experts:  # also seen as groups: (token, group, expert in group)
            removed = self.removed
        elif width in self.widths and scores.numel() == n_tokens * width:
            removed = F.pad(self.removed, (0, width - n_experts))
        else:
            return None
        return scores.masked_fill(removed.view(scores.shape), torch.finfo(scores.dtype).min)


def route_without(
    routing: Routing, removed: Bool[Tensor, "token expert"]
) -> tuple[Int[Tensor, "token slot"], Float[Tensor, "token slot"]]:
    """Experts and weights that the router of `routing` would choose if `removed` experts did not exist.

    A removed expert may still be in the result, with weight 0: see the module's docstring.

    Raises:
        UnsupportedModel: the router was not found, or computes its logits in a way that cannot be masked.
    """
    site = routing.site
    if routing.call is None or site.router is None:
        raise UnsupportedModel(
            f"the router of layer {site.layer} ({site.path}) was not found, so its choice cannot be masked: use zero"
        )
    args, kwargs = routing.call
    widths = {site.n_experts} | {int(w) for name in LOGIT_WIDTHS if (w := getattr(site.router, name, 0))}
    mask = _Mask(removed, widths)
    with mask:
        out = site.router.forward(*args, **kwargs)
    if not mask.n_masked:
        raise UnsupportedModel(
            f"{type(site.router).__name__} computes its logits in a way that cannot be masked: use zero or drop_renorm"
        )
    weight, index = (out if site.adapter is None else site.adapter.read_router(site.block, out))[1:3]
    weight, index = weight.reshape(routing.weight.shape), index.reshape(routing.index.shape)
    return index, weight.masked_fill(removed.gather(1, index), 0).to(routing.weight.dtype)


def score_rule(routing: Routing) -> str:
    """Which of `RULES` turns the logits of `routing` into weights, read from the numbers: the one that fits best.

    For routers that `gates.rule_of_router` cannot try alone. Few tokens can fit several rules.

    Raises:
        UnsupportedModel: none of them does (Phi-MoE's sparse mixer), or with one expert per token none can be told.
    """
    assert routing.logits is not None
    chosen = routing.logits.double().gather(1, routing.index)
    weight = _unscaled(routing).double()
    usable = (weight > 0).all(dim=1)
    chosen, log_weight = chosen[usable], weight[usable].log()
    is_full = torch.finfo(routing.logits.dtype).bits == 32 == torch.finfo(routing.weight.dtype).bits
    errors = {}
    for name, log_score in RULES.items():
        error = (log_weight - log_weight[:, :1]) - (log_score(chosen) - log_score(chosen[:, :1]))
        errors[name] = float(error.abs().max()) if error.numel() else 0.0
    best = min(errors, key=errors.__getitem__)
    if routing.index.shape[1] == 1 or errors[best] > (1e-3 if is_full else 0.05):
        raise UnsupportedModel(
            f"{type(routing.site.router).__name__} does not weight experts in proportion to a score of their logits, "
            "so mask_refill_keep is not defined for it: use mask_refill or zero"
        )
    return best


def keep_gates(
    routing: Routing,
    removed: Bool[Tensor, "token expert"],
    refilled: Int[Tensor, "token slot"],
    rule: str | None = None,
) -> tuple[Int[Tensor, "token slot"], Float[Tensor, "token slot"]]:
    """Survivors keep slot and weight bit for bit; replacements get their clean score over the clean denominator.

    The denominator is that of the token's clean choice, so `weight(new) = weight(old) * score(new) / score(old)`
    for any `old` expert of it: the same for plain softmax, softmax over the top-k and sigmoid, renormalised or not.

    Args:
        refilled: the experts that the router chooses without `removed` (from `route_without`), in any order.
        rule: one of `RULES`; None reads it from this batch.

    Returns:
        Experts and weights; a slot without a replacement keeps its expert with weight 0.
    """
    assert routing.logits is not None
    n_experts = removed.shape[1]
    lost = removed.gather(1, routing.index)
    clean = F.one_hot(routing.index, n_experts).sum(dim=1).bool()
    refilled = refilled.gather(1, routing.logits.gather(1, refilled).argsort(dim=1, descending=True))
    is_new = ~clean.gather(1, refilled) & ~removed.gather(1, refilled)
    # k-th lost slot of a token gets its k-th best replacement (a group-limited router may offer more than are needed)
    rank_lost, rank_new = lost.cumsum(dim=1) - 1, is_new.cumsum(dim=1) - 1
    match = lost.unsqueeze(2) & is_new.unsqueeze(1) & (rank_lost.unsqueeze(2) == rank_new.unsqueeze(1))
    found = match.any(dim=2)
    replacement = refilled.gather(1, match.int().argmax(dim=2))
    index = torch.where(found, replacement, routing.index)

    log_score = RULES[rule or score_rule(routing)]
    logits, base = routing.logits.double(), _unscaled(routing).double()
    anchor = base.argmax(dim=1, keepdim=True)  # the heaviest clean expert: best-conditioned ratio
    ratio = log_score(logits.gather(1, index)) - log_score(logits.gather(1, routing.index.gather(1, anchor)))
    new = base.gather(1, anchor) * ratio.exp() * _scale(routing, index)
    weight = torch.where(found, new.to(routing.weight.dtype), routing.weight.masked_fill(lost, 0))
    return index, weight


def _scale(routing: Routing, index: Tensor) -> Tensor | float:
    scale = getattr(routing.site.router, EXPERT_SCALE, None)
    return 1.0 if scale is None else scale[index]


def _unscaled(routing: Routing) -> Tensor:
    return routing.weight / _scale(routing, routing.index)
