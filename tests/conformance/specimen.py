"""One family's checkpoint, loaded as a user would, and what plain hooks see while it runs.

Nothing here uses the seam: it is what the seam is measured against.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import moe_lens
from moe_lens.models.lens import Lens
from moe_lens.models.sites import Site
from moe_lens.types import ExpertTap, Role
from tests.conformance.gates import GATES, standard
from tests.conformance.zoo import Family
from tests.models import tiny

if TYPE_CHECKING:
    from jaxtyping import Float, Int

IMPLEMENTATIONS = ("grouped_mm", "eager")


@dataclass
class Seen:
    """What went through one MoE layer, by ordinary forward hooks."""

    x: Float[Tensor, "token d_in"]
    """Input of the experts module."""
    index: Int[Tensor, "token slot"]
    weight: Float[Tensor, "token slot"]
    routed: Float[Tensor, "token d_in"]
    """Return of the experts module."""
    router: tuple[Tensor, ...] = ()
    """Everything the router returned."""
    shared: Float[Tensor, "token d_model"] | None = None
    """Return of the shared expert's module, before its gate."""
    block: Tensor | None = None
    """Return of the MoE block, or what `Family.entry` received."""


@dataclass
class Observation:
    """One pass: the model's own logits, what hooks saw, and the same pass through the lens."""

    clean: Float[Tensor, "window seq vocab"]
    seen: dict[int, Seen]
    tapped: Float[Tensor, "window seq vocab"]
    after: Float[Tensor, "window seq vocab"]
    taps: list[ExpertTap] = field(default_factory=list)

    def of(self, role: Role) -> dict[int, ExpertTap]:
        """Taps of one role by layer."""
        return {tap.layer: tap for tap in self.taps if tap.role is role}


class Specimen:
    """A family's tiny checkpoint."""

    def __init__(self, name: str, family: Family, folder: Path) -> None:
        self.name, self.family, self.folder = name, family, folder
        self.ids = tiny.ids(2, 9)
        self._observations: dict[str, Observation] = {}

    @cached_property
    def lens(self) -> Lens:
        return moe_lens.load(str(self.folder))

    @cached_property
    def bfloat16(self) -> Lens:
        return moe_lens.load(str(self.folder), dtype="bfloat16")

    @property
    def model(self) -> Any:
        return self.lens.model

    @property
    def sites(self) -> list[Site]:
        """Sites with routed experts."""
        return [site for site in self.lens.sites if site.role is Role.MOE]

    def logits(self, lens: Lens | None = None) -> Float[Tensor, "window seq vocab"]:
        with torch.no_grad():
            return (lens or self.lens).model(input_ids=self.ids, use_cache=False).logits

    def observe(self, native: str) -> Observation:
        """Run the model set to `native` with plain hooks, then through the lens, then plainly again."""
        if native not in self._observations:
            taps: list[ExpertTap] = []
            with self.set_to(native):
                with self.hooks() as seen:
                    clean = self.logits()
                with self.lens.tapping(taps.append, layers=[entry.layer for entry in self.lens.spec.layers]):
                    tapped = self.logits()
                self._observations[native] = Observation(clean, seen, tapped, self.logits(), taps)
        return self._observations[native]

    @contextmanager
    def set_to(self, native: str) -> Iterator[None]:
        """The experts implementation of transformers, for a while."""
        self.model.set_experts_implementation(native)
        try:
            yield
        finally:
            self.model.set_experts_implementation("grouped_mm")

    @contextmanager
    def hooks(self) -> Iterator[dict[int, Seen]]:
        """Fill a dict of `Seen` by layer while the model runs inside the block."""
        seen: dict[int, Seen] = {}
        parts: dict[tuple[int, str], Any] = {}
        handles = [handle for site in self.sites for handle in self._watch(site, seen, parts)]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()
        for (layer, part), value in parts.items():
            setattr(seen[layer], part, value)

    def _watch(self, site: Site, seen: dict[int, Seen], parts: dict[tuple[int, str], Any]) -> Iterator[Any]:
        assert site.router is not None
        assert site.block is not None

        def experts(_m: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
            seen[site.layer] = Seen(*(value.clone() for value in (*args[:3], out)))

        def keep(part: str, value: Tensor) -> None:
            parts[site.layer, part] = value.reshape(-1, value.shape[-1]).clone()

        def block(_m: Any, args: tuple[Tensor, ...], out: Any) -> None:
            keep("block", out[0] if isinstance(out, tuple) else out)

        def router(_m: Any, _a: Any, out: tuple[Tensor, ...]) -> None:
            parts[site.layer, "router"] = tuple(value.reshape(-1, value.shape[-1]).clone() for value in out)

        yield site.module.register_forward_hook(experts)
        yield site.router.register_forward_hook(router)
        if self.family.entry is None:
            yield site.block.register_forward_hook(block)
        else:
            entry = site.block.get_submodule(self.family.entry)
            yield entry.register_forward_pre_hook(lambda _m, args: keep("block", args[0]))
        shared = shared_module(site)
        if shared is not None:
            yield shared.register_forward_hook(lambda _m, _a, out: keep("shared", out))

    def by_hand(self, site: Site, x: Float[Tensor, "d_in"], expert: int) -> Float[Tensor, "d_ff"]:
        """Activation of one expert on one token, in float64 from the weights alone."""
        experts: Any = site.module
        name = "gate_up_proj" if hasattr(experts, "gate_up_proj") else "up_proj"
        matrix = getattr(experts, name)[expert].double()
        z = x.double() @ (matrix if matrix.shape[0] == len(x) else matrix.T)
        if hasattr(experts, f"{name}_bias"):
            z = z + getattr(experts, f"{name}_bias")[expert].double()
        key = self.family.text_config.model_type
        return GATES.get(key, standard)(z, self.family.text_config)

    def one_row(self, site: Site, x: Float[Tensor, "d_in"], expert: int) -> Float[Tensor, "d_in"]:
        """Output of one expert on one token, from transformers' own eager loop with weight 1."""
        return site.module(x[None], torch.tensor([[expert]]), torch.ones(1, 1, dtype=x.dtype))[0]


def shared_module(site: Site) -> nn.Module | None:
    """The shared expert beside a routed site, found by attribute name and not through `sites`."""
    block: Any = site.block
    for name in ("shared_expert", "shared_experts", "shared_mlp"):
        if isinstance(getattr(block, name, None), nn.Module):
            return getattr(block, name)
    return None


def integer_last(values: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, weights, indices) of a router's return: the widest float, the float as wide as the integers, those."""
    index = next(value for value in values if not value.is_floating_point())
    floats = [value for value in values if value.is_floating_point()]
    weight = next(value for value in floats if value.shape == index.shape)
    logits = next(value for value in floats if value is not weight)
    return logits, weight, index
