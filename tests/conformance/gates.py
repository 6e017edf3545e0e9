"""What each family does between its up- and its down-projection, written from its paper or config.

Deliberately apart from the package and from transformers: the tests compare both with these lines.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from jaxtyping import Float

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
}


def activation_of(config: Any) -> Callable[[Tensor], Tensor]:
    for key in ("hidden_act", "hidden_activation", "mlp_hidden_act"):
        if getattr(config, key, None) is not None:
            return ACTIVATIONS[getattr(config, key)]
    return F.silu


def standard(z: Float[Tensor, "two_d_ff"], config: Any) -> Float[Tensor, "d_ff"]:
    """SwiGLU and its kin: `act(gate) * up`, the gate in the first half."""
    gate, up = z.chunk(2)
    return activation_of(config)(gate) * up


def ungated(z: Float[Tensor, "d_ff"], config: Any) -> Float[Tensor, "d_ff"]:
    return activation_of(config)(z)


def clamped(z: Float[Tensor, "two_d_ff"], config: Any) -> Float[Tensor, "d_ff"]:
    """SwiGLU on a gate bounded above and an up bounded on both sides (DeepSeek-V4, Hunyuan 4)."""
    limit = config.swiglu_limit
    gate, up = z.chunk(2)
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def shifted(gate: Tensor, up: Tensor, config: Any) -> Tensor:
    """`(up + 1) * gate * sigmoid(alpha * gate)` on clamped halves (gpt-oss, MiniMax-M3)."""
    limit, alpha = config.swiglu_limit, config.swiglu_alpha
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(alpha * gate)


def interleaved(z: Float[Tensor, "two_d_ff"], config: Any) -> Float[Tensor, "d_ff"]:
    return shifted(z[0::2], z[1::2], config)


def halves(z: Float[Tensor, "two_d_ff"], config: Any) -> Float[Tensor, "d_ff"]:
    return shifted(*z.chunk(2), config)


def softcapped(z: Float[Tensor, "two_d_ff"], config: Any) -> Float[Tensor, "d_ff"]:
    """SwiGLU whose linear factors saturate: `cap * tanh(x / cap)` (Inkling 2)."""
    gate, up = z.chunk(2)

    def cap(x: Tensor, at: float) -> Tensor:
        return at * torch.tanh(x / at)

    return cap(gate, config.mlp_gate_softcap) * torch.sigmoid(gate) * cap(up, config.mlp_up_softcap)


GATES: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "deepseek_v4": clamped,
    "gpt_oss": interleaved,
    "hy_v4": clamped,
    "inkling2_text": softcapped,
    "minimax_m3_vl_text": halves,
    "nemotron_h": ungated,
}
"""model_type -> maths, where it is not `standard`."""
