"""What an expert writes reaches the residual stream as it is, or the family is known to do something with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_lens.errors import UnsupportedModel
from moe_lens.models import families, norms
from moe_lens.models.seam import Edit
from moe_lens.types import ExpertTap, Role
from tests.conformance.specimen import Specimen

ROW = 5


class AddToOneRow(Edit):
    """Add a small vector to one expert output of one layer."""

    def __init__(self, layer: int) -> None:
        self.layer, self.token, self.added = layer, 0, torch.zeros(())

    def output(self, tap: ExpertTap) -> Tensor | None:
        if tap.layer != self.layer or tap.role is not Role.MOE:
            return None
        noise = 0.01 * torch.randn(tap.output.shape[1], generator=torch.Generator().manual_seed(0))
        self.token, self.added = int(tap.token[ROW]), noise * tap.weight[ROW]
        return tap.output.index_add(0, torch.tensor([ROW]), noise[None])


def test_expert_outputs_reach_the_residual_stream_or_the_family_is_known_not_to(specimen: Specimen):
    known = families.indirect_writes(specimen.model.config)
    assert is_direct(specimen) == (known is None), known


def is_direct(specimen: Specimen) -> bool:
    """Whether a change of an expert's output is the same change of what the final norm reads.

    The weight of the router, the scale of the block, Granite's residual multiplier and a norm on the FFN's output
    are accounted for; nothing else may touch it.
    """
    lens, last = specimen.lens, specimen.family.sparse[-1]
    assert last == len(lens.blocks) - 1
    try:
        final = norms.final_norm(specimen.model)
    except UnsupportedModel:
        return False
    after_ffn = norms.post_ffn_norm(lens.blocks[last])
    edit = AddToOneRow(last)
    clean = watch(specimen, final, after_ffn)
    with lens.tapping(lambda tap: None, edit=edit):
        changed = watch(specimen, final, after_ffn)
    site = next(site for site in specimen.sites if site.layer == last)
    change = {name: (changed[name] - clean[name])[edit.token] for name in clean}
    write = edit.added * site.block_scale
    if after_ffn is not None:
        if not close(change["norm_in"], write):
            return False
        write = change["norm_out"]
    return close(change["final"], write * families.residual_scale(specimen.model.config))


def watch(specimen: Specimen, final: Any, after_ffn: Any) -> dict[str, Tensor]:
    """Input of the final norm, and input and output of the norm after the last FFN."""
    kept: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor) -> None:
        kept[name] = value.reshape(-1, value.shape[-1]).clone()

    def around(_module: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
        keep("norm_in", args[0])
        keep("norm_out", out)

    handles = [final.register_forward_pre_hook(lambda _m, args: keep("final", args[0]))]
    if after_ffn is not None:
        handles.append(after_ffn.register_forward_hook(around))
    specimen.logits()
    for handle in handles:
        handle.remove()
    return kept


def close(got: Tensor, wanted: Tensor) -> bool:
    return got.shape == wanted.shape and torch.allclose(got, wanted, rtol=1e-2, atol=1e-5)
