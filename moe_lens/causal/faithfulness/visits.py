"""What each routed expert was sent and wrote on the ranking text, document by document: ``visits(effects)``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from moe_lens.errors import NotAnMoE
from moe_lens.types import ExpertAddress, ExpertTap, Role

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy import ndarray
    from torch import Tensor

    from moe_lens.causal.effects import Effects
    from moe_lens.models.lens import Lens

_SUMS = ("load", "mass", "norm", "weighted_norm", "peak")


def routed_units(lens: Lens) -> tuple[ExpertAddress, ...]:
    """Every routed expert, by layer and number; shared experts are no units (METRICS 2.1).

    Raises:
        NotAnMoE: the model has none.
    """
    sites = [site for site in lens.sites if site.routed and site.role is Role.MOE]
    if not sites:
        raise NotAnMoE(f"{lens.name} has no routed experts to rank: give a Mixture-of-Experts model")
    return tuple(ExpertAddress(site.layer, e) for site in sites for e in range(site.n_experts))


@dataclass(frozen=True, eq=False)
class Visits:
    """Sums over the tokens of each document; first tokens of windows and special tokens left out.

    They say where tokens go and how loudly experts write, not what the writing is good for.
    """

    units: tuple[ExpertAddress, ...]
    n_tokens: Float[ndarray, "document"]
    load: Float[ndarray, "document unit"] = field(repr=False)
    mass: Float[ndarray, "document unit"] = field(repr=False)
    """Sum of router weights."""
    norm: Float[ndarray, "document unit"] = field(repr=False)
    """Sum of ||f||."""
    weighted_norm: Float[ndarray, "document unit"] = field(repr=False)
    """Sum of g ||f||."""
    peak: Float[ndarray, "document unit"] = field(repr=False)
    """Largest |component| of an output."""
    router_entropy: dict[int, Float[ndarray, "document"]] = field(repr=False)
    """Sum over tokens of the entropy of the router's softmax over all experts, nats, by layer."""

    @cached_property
    def layer(self) -> Int[ndarray, "unit"]:
        """Layer of each unit."""
        return np.array([unit.layer for unit in self.units])

    @cached_property
    def slots(self) -> Float[ndarray, "unit"]:
        """Experts that a token visits in the layer of each unit."""
        total, tokens = self.load.sum(0), max(float(self.n_tokens.sum()), 1.0)
        layers, inverse = np.unique(self.layer, return_inverse=True)
        per_layer = np.array([total[self.layer == layer].sum() for layer in layers]) / tokens
        return np.maximum(per_layer, 1)[inverse]

    def super_experts(self, *, ratio: float = 10.0) -> tuple[ExpertAddress, ...]:
        """Experts with extreme outputs in the first 75 % of MoE layers (arXiv 2507.23279).

        The largest |component| is above the 99.5th percentile over all experts and above a tenth of the model's
        largest (the rule of REAP's code, which takes signed values), and `ratio` times the median. Without the last
        condition, which is ours, the loudest expert of any model would be one.
        """
        peak, layers = self.peak.max(0), np.unique(self.layer)
        early = np.isin(self.layer, layers[: max(1, int(0.75 * len(layers)))])
        seen = peak[peak > 0]
        if not len(seen):
            return ()
        percentile = float(np.percentile(peak, 99.5, method="lower"))
        loud = (peak >= percentile) & (peak > peak.max() / 10) & (peak > ratio * np.median(seen))
        return tuple(self.units[i] for i in np.flatnonzero(early & loud))


@torch.no_grad()
def visits(effects: Effects) -> Visits:
    """Run the clean model over the text of `effects` once more and add up what experts do.

    Raises:
        NotAnMoE: a model without routed experts.
    """
    lens, text = effects.lens, effects.text
    units = routed_units(lens)
    first = {layer: i for i, layer in reversed(list(enumerate(unit.layer for unit in units)))}
    documents, which = np.unique(text.tokenized.document[text.windows], return_inverse=True)
    number = np.full(len(text.tokenized), -1)
    number[text.windows] = which
    sums = {name: torch.zeros(len(documents) * len(units), dtype=torch.float64) for name in _SUMS}
    entropies = {layer: torch.zeros(len(documents), dtype=torch.float64) for layer in first}
    n_tokens = torch.zeros(len(documents), dtype=torch.float64)
    for part in effects.parts:
        token = part.token.reshape(-1).numpy()
        counted = torch.from_numpy((token >= 0) & text.tokenized.eligible[token])
        document = torch.from_numpy(number[text.tokenized.window_of[token]])
        n_tokens += torch.bincount(document[counted], minlength=len(documents))
        on_tap = _adder(sums, entropies, counted, document, first, len(units))
        with lens.tapping(on_tap, layers=list(first), roles=[Role.MOE]):
            effects.replay.decode(part.ids.to(lens.device), part.mask.to(lens.device))
    found = {name: total.view(len(documents), len(units)).numpy() for name, total in sums.items()}
    return Visits(units, n_tokens.numpy(), router_entropy={k: v.numpy() for k, v in entropies.items()}, **found)


def _adder(
    sums: dict[str, Tensor], entropies: dict[int, Tensor], counted: Tensor, document: Tensor, first: dict[int, int],
    n_units: int,
) -> Callable[[ExpertTap], None]:  # fmt: skip
    def add(tap: ExpertTap) -> None:
        token = tap.token.cpu()
        keep = counted[token]
        at = document[token[keep]] * n_units + first[tap.layer] + tap.expert.cpu()[keep]
        output, weight = tap.output.float(), tap.weight.double().cpu()[keep]
        norm = output.norm(dim=-1).double().cpu()[keep]
        for name, value in (("load", torch.ones_like(norm)), ("mass", weight), ("norm", norm)):
            sums[name].index_add_(0, at, value)
        sums["weighted_norm"].index_add_(0, at, weight * norm)
        sums["peak"].scatter_reduce_(0, at, output.abs().amax(-1).double().cpu()[keep], "amax")
        if tap.router_logits is not None:
            log_p = tap.router_logits.float().log_softmax(-1).cpu()[counted]
            entropies[tap.layer].index_add_(0, document[counted], -(log_p.exp() * log_p).sum(-1).double())

    return add
