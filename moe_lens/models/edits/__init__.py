"""The ten ablation modes of METRICS 2.3, for `with lens.edit(zero("L7.E12")): ...`.

`outputs` replaces what an expert writes, `routes` changes which experts a token visits, `apply` puts modes to work
on a model and restores it. Every mode answers another question; none is the default. `steered` is no ablation: it adds
a bias to router logits.
"""

from moe_lens.models.edits.apply import ROUTING, edit
from moe_lens.models.edits.base import Mode
from moe_lens.models.edits.outputs import mean, mean_off, noise, patch, resample, zero
from moe_lens.models.edits.record import EditRecord
from moe_lens.models.edits.routes import drop_renorm, mask_refill, mask_refill_keep, swap
from moe_lens.models.edits.steered import steered

MODES = {
    "zero": zero, "mean": mean, "mean_off": mean_off, "resample": resample, "patch": patch,
    "drop_renorm": drop_renorm, "mask_refill": mask_refill, "mask_refill_keep": mask_refill_keep,
    "swap": swap, "noise": noise,
}  # fmt: skip
"""Name of each mode, as in tables, to the function that makes it."""

__all__ = [
    "MODES", "ROUTING", "EditRecord", "Mode", "drop_renorm", "edit", "mask_refill", "mask_refill_keep", "mean",
    "mean_off", "noise", "patch", "resample", "steered", "swap", "zero",
]  # fmt: skip
