"""The lines of a diagnosis that run the model again: equal logits, ablation by surgery, restoration.

Equal means equal bits: the taps use the operations of the implementation they stand in for, in its order.
"""

from __future__ import annotations

import copy
import math
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_lens.models import evidence
from moe_lens.models.checks import Check, judged, skipped
from moe_lens.models.evidence import Evidence, State
from moe_lens.types import ExpertAddress

if TYPE_CHECKING:
    from moe_lens.models.seam import Kernel

SLOW_PASS = 4.0
"""A forward pass of this many seconds leaves no time for the optional ones."""
OPTIONAL_UNTIL = 30.0
"""Nor does a diagnosis that has lasted this long: all of it should take about a minute."""


def logits_equal(found: Evidence, kernel: str) -> Check:
    """Logits with taps on against the model's own, both with one implementation."""
    name = f"logits, {kernel}"
    if kernel == found.kernel:
        return _equal_logits(name, found.clean, found.tapped)
    if all(witness.site.adapter is not None for witness in found.witnesses.values()):
        return skipped(name, f"{found.lens.spec.architecture} runs its experts in its own order only")
    if (why := no_time(found)) is not None:
        return skipped(name, f"{why}, and the model is set to {found.kernel}")
    try:
        clean = evidence.native(found.lens, found.ids, kernel)
    except Exception as error:  # a kernel that this model or device cannot run is no fault of the taps
        return skipped(name, f"the model itself does not run with {kernel}: {_first_line(error)}")
    chosen: Kernel = "eager" if kernel == "eager" else "grouped_mm"
    return _equal_logits(name, clean, evidence.with_taps(found.lens, found.ids, kernel=chosen))


def logits_equal_in_bfloat16(found: Evidence, free_bytes: int) -> Check:
    """The same in bfloat16, on a copy of a float32 model."""
    name = "logits, bfloat16"
    model = found.lens.model
    if model.dtype is not torch.float32:
        return skipped(name, f"the model is in {_short(model.dtype)} already, so the lines above are in it")
    size = 2 * sum(p.numel() for p in model.parameters())
    if (why := no_time(found)) is not None:
        return skipped(name, why)
    if size > free_bytes / 4:
        return skipped(name, "no room for a copy of the model")
    twin = type(found.lens)(copy.deepcopy(model).to(torch.bfloat16), found.lens.tokenizer, kernel=found.lens.kernel)
    try:
        clean = evidence.native(twin, found.ids, found.kernel)
    except Exception as error:  # families that fix some parts to float32
        return skipped(name, f"the model itself does not run in bfloat16: {_first_line(error)}")
    return _equal_logits(name, clean, evidence.with_taps(twin, found.ids))


def no_time(found: Evidence) -> str | None:
    """Why optional passes are left out, None if there is time for them."""
    if found.offloaded:
        return "weights are offloaded, so each pass reads them again"
    if found.seconds > SLOW_PASS:
        return f"a pass takes {found.seconds:.0f} s"
    return "a minute would not do" if time.perf_counter() - found.started > OPTIONAL_UNTIL else None


def _equal_logits(name: str, clean: Tensor, tapped: Tensor) -> Check:
    difference = (clean - tapped).abs().float().amax(dim=-1).flatten()
    worst = int(difference.argmax())
    return judged(
        name, float(difference[worst]), 0.0,
        f"largest difference of {clean.shape[1]} x {clean.shape[2]} logits"
        + (f", at token {worst}" if float(difference[worst]) else ": equal bits"),
        "the model computes something else while it is tapped, so results would describe another model: "
        "use --kernel with the other implementation, and report it with your transformers and torch versions",
    )  # fmt: skip


def ablation(found: Evidence, address: ExpertAddress) -> Check:
    """Zeroing an expert's output by an edit equals zeroing its down-projection."""
    name = f"ablation {address}"
    site = found.witnesses[address.layer].site
    if evidence.is_offloaded(site.module):
        return skipped(name, "the expert's weights are offloaded, so they cannot be zeroed in place")
    with evidence.down_projection_zeroed(site, address.expert):
        expected = evidence.native(found.lens, found.ids, found.kernel)
    edit = evidence.Zeroed(address.layer, address.expert)
    got = evidence.with_taps(found.lens, found.ids, edit=edit)
    value = float((got - expected).abs().max())
    effect = float((expected - found.clean).abs().max())
    return judged(
        name, value, 0.0, f"visited by {edit.n_rows} of {found.ids.numel()} tokens; moves logits by up to {effect:.3g}",
        "an ablated expert does not compute what a model without it computes, so causal results would be wrong: "
        "do not use ablations on this model, and report it with its name",
    )  # fmt: skip


def restored(found: Evidence) -> Check:
    """After tapping, the model is set, hooked and computing as before."""
    before, after = found.state
    changed = [f.replace("_", " ") for f in State.__dataclass_fields__ if getattr(before, f) != getattr(after, f)]
    again = evidence.native(found.lens, found.ids, found.kernel)
    same = again.eq(found.clean) | (again.isnan() & found.clean.isnan())
    difference = float((again - found.clean).abs().masked_fill(same, 0).max())
    detail = f"changed: {', '.join(changed)}" if changed else "implementation, hooks and attributes as before"
    return judged(
        "restored", math.inf if changed else difference, 0.0, f"{detail}; logits differ by {difference:.3g}",
        "the model is not what it was before it was tapped, or two equal passes differ: load it again before you use "
        "it for anything else, and set torch.use_deterministic_algorithms(True) if it is on a GPU",
    )  # fmt: skip


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
