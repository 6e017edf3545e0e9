"""Direct logit contributions: what a vector written to the residual stream adds to one logit.

The final norm is linear once its scale is frozen at the value it had: `norm(x) = c(x) * s + b` with `c` the
identity (RMSNorm) or centring (LayerNorm). Then a write `f` adds `(c(f) * s) . W_U[target]` to the logit, and
the contributions of all writes sum to the logit (less the bias). Direct effects only: what later layers read
from the write is not in it. (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".)
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moe_lens.errors import UnsupportedModel
from moe_lens.models import families
from moe_lens.models.sites import decoder_layers

if TYPE_CHECKING:
    from jaxtyping import Float

Linear = Callable[[Tensor], Tensor]


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last decoder layer and the LM head.

    Raises:
        UnsupportedModel: there is none beside the decoder layers.
    """
    path = decoder_layers(model)[0][0].rsplit(".", 2)[0]
    for module in reversed(list(model.get_submodule(path).children())):
        if is_norm(module):
            return module
    raise UnsupportedModel(f"{type(model).__name__} has no final norm, so logit contributions are not defined for it")


def post_ffn_norm(block: nn.Module) -> nn.Module | None:
    """The norm that a decoder layer applies to its feed-forward output before adding it, if any."""
    found = (getattr(block, name, None) for name in families.POST_FFN_NORMS)
    return next((m for m in found if isinstance(m, nn.Module)), None)


def is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


@torch.no_grad()
def freeze(norm: nn.Module, x: Float[Tensor, "d_model"]) -> Linear:
    """`norm` as a linear map, its scale frozen at the value it has on `x`; the bias is left out.

    Works for every variant of RMSNorm and LayerNorm without knowing which: norm(0) is the bias, and
    norm(1) equals it exactly when the norm centres.
    """
    exact = copy.deepcopy(norm).float().cpu()
    x = x.float().cpu()
    bias = exact(torch.zeros_like(x))
    centres = bool((exact(torch.ones_like(x)) - bias).abs().max() < 1e-3)
    centred = _centre(x) if centres else x
    tiny = centred.abs().max() * 1e-6
    centred = torch.where(centred.abs() < tiny, tiny, centred)
    scale = (exact(centred) - bias) / centred
    return lambda f: (_centre(f.float()) if centres else f.float()) * scale


def _centre(x: Tensor) -> Tensor:
    return x - x.mean(dim=-1, keepdim=True)
