"""Lenses of the six families that nnsight is tested on, and what the seam says about one text."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from moe_lens.models.lens import Lens
from moe_lens.models.seam import Edit
from moe_lens.types import ExpertTap, Role
from tests.models import tiny

TEXT = "All men are mortal."
LAYER = 1
"""An MoE layer in every family."""
GROUPED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_oss": ("GptOss", {
        "intermediate_size": 24, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
    }),
    "deepseek_v3": ("DeepseekV3", {
        "intermediate_size": 40, "moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 3,
        "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "norm_topk_prob": True,
        "routed_scaling_factor": 1.5, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 16, "head_dim": 8,
    }),
}  # fmt: skip
FAMILIES = [*tiny.MOE, *GROUPED]
CACHE: dict[str, Lens] = {}


def build(family: str) -> Any:
    if family in tiny.MOE:
        return tiny.build(family)
    prefix, keys = GROUPED[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**{**tiny.COMMON, **keys})
    model = transformers.AutoModelForCausalLM.from_config(config)
    tiny.enliven(model)
    for name, buffer in model.named_buffers():
        if "correction_bias" in name:
            buffer.normal_(0, 0.1)
    return model.float().eval()


def lens_of(family: str) -> Lens:
    """A lens that several tests share; they leave it as they found it."""
    if family not in CACHE:
        CACHE[family] = Lens(build(family), tiny.tokenizer())
    return CACHE[family]


def ids(text: str = TEXT) -> torch.Tensor:
    return torch.tensor([tiny.tokenizer()(text)["input_ids"]])


def logits(lens: Lens, text: str = TEXT) -> torch.Tensor:
    with torch.no_grad():
        return lens.model(input_ids=ids(text)).logits


def taps_of(lens: Lens, text: str = TEXT) -> dict[tuple[int, Role], ExpertTap]:
    taps: list[ExpertTap] = []
    with lens.tapping(taps.append, layers=[0, 1]):
        logits(lens, text)
    return {(tap.layer, tap.role): tap for tap in taps}


def visited(tap: ExpertTap) -> int:
    """The expert with most rows."""
    return int(tap.offsets.diff().argmax())


def rows(tap: ExpertTap, expert: int) -> slice:
    return slice(int(tap.offsets[expert]), int(tap.offsets[expert + 1]))


class Change(Edit):
    """Apply `change` to the rows of one expert at one point."""

    def __init__(self, expert: int, point: str, change: Any) -> None:
        self.expert, self.point, self.change = expert, point, change

    def _changed(self, tap: ExpertTap, point: str) -> torch.Tensor | None:
        if (tap.layer, tap.role, self.point) != (LAYER, Role.MOE, point):
            return None
        value = getattr(tap, point).clone()
        value[rows(tap, self.expert)] = self.change(value[rows(tap, self.expert)])
        return value

    def activation(self, tap):
        return self._changed(tap, "activation")

    def output(self, tap):
        return self._changed(tap, "output")


def edited(lens: Lens, edit: Edit, text: str = TEXT) -> torch.Tensor:
    with lens.tapping(lambda tap: None, edit=edit):
        return logits(lens, text)
