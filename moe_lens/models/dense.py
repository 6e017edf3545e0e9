"""Tap FFNs that are ordinary linear layers: dense models, dense layers of an MoE, shared experts.

The last linear layer of the FFN sees the activation as its input and gives the output, so two hooks on it
see everything and compute nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_lens.types import ExpertTap

if TYPE_CHECKING:
    from jaxtyping import Float

    from moe_lens.models.seam import Edit, Pass
    from moe_lens.models.sites import Site


@dataclass
class _Call:
    """State of one site between its hooks."""

    gate: Tensor | None = None


def attach(site: Site, on_tap: Callable[[ExpertTap], None], edit: Edit | None, stack: ExitStack, current: Pass) -> None:
    """Hook the FFN of a dense or shared `site` until `stack` closes."""
    call = _Call()

    def before_ffn(_module: Any, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        assert site.shared_gate is not None
        call.gate = torch.sigmoid(site.shared_gate(x)).reshape(-1)

    def before_last_linear(_module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if edit is None or current.recording is not None:
            return None
        edited = edit.activation(make_tap(site, args[0], None, call.gate))
        return None if edited is None else (edited.reshape(args[0].shape), *args[1:])

    def after_last_linear(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if current.recording is not None:
            return None
        edited = edit.output(make_tap(site, args[0], output, call.gate)) if edit is not None else None
        result = output if edited is None else edited.reshape(output.shape)
        on_tap(make_tap(site, args[0], result, call.gate))
        if site.block_adds_in_place:  # or it would change the tap's output behind the consumer's back
            return result.clone()
        return None if edited is None else result

    if site.shared_gate is not None and site.ffn is not None:
        stack.callback(site.ffn.register_forward_pre_hook(before_ffn).remove)
    if edit is not None:
        stack.callback(site.module.register_forward_pre_hook(before_last_linear).remove)
    stack.callback(site.module.register_forward_hook(after_last_linear).remove)


def make_tap(
    site: Site, activation: Float[Tensor, "... d_ff"], output: Tensor | None, gate: Tensor | None
) -> ExpertTap:
    """A tap of one expert that every token visits."""
    flat = activation.reshape(-1, activation.shape[-1])
    n_tokens = flat.shape[0]
    token = torch.arange(n_tokens, device=flat.device)

    def make_output() -> Tensor:
        if output is None:
            raise RuntimeError("an activation edit runs before the down-projection: it has no output yet")
        return output.reshape(n_tokens, -1)

    return ExpertTap(
        layer=site.layer,
        role=site.role,
        token=token,
        slot=torch.zeros_like(token),
        weight=flat.new_ones(n_tokens) if gate is None else gate,
        offsets=torch.tensor([0, n_tokens], device=flat.device),
        activation=flat,
        router_logits=None,
        n_tokens=n_tokens,
        make_output=make_output,
    )
