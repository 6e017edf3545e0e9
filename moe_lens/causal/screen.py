"""Which units deserve an exact pass? An estimate of every leave-one-out effect from one backward pass.

Scale what every expert writes by alpha. Zeroing expert e moves its alpha_e from 1 to 0, so to first order the NLL
rises by minus its derivative in alpha_e, which is gradient x activation: -<dNLL/dm, g f_e(x)> (METRICS 2.3). All
experts of all layers, and every window on its own, come out of one forward and one backward pass.

Where to take the derivative matters. At alpha = 1 training has made the loss nearly flat in the scale of each
expert, and little is left to rank by: on the bundled MoE the estimate's rank correlation with exact effects is near 0
there and above .9 at alpha = 1/2, the midpoint of the path along which all experts fade together. Several alphas
average to integrated gradients along that path (as EAP-IG does for edges).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from moe_lens.errors import BadConfig
from moe_lens.models.seam import Edit, tapping
from moe_lens.stats import wilson_interval
from moe_lens.types import ExpertTap, Role

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy import ndarray

    from moe_lens.causal.effects import Effects
    from moe_lens.causal.evaluation import Part

UNIT = ["layer", "expert"]
MIDPOINT = (0.5,)
"""Half of every expert: one step of the midpoint rule."""


@dataclass(frozen=True, eq=False)
class Screen:
    """First-order estimates of the effect of zeroing each expert, live routing.

    A straight line along a path on which all experts fade together: an expert that others can stand in for looks more
    important than it is alone, and one whose loss makes tokens change experts has another exact effect. It ranks; it
    does not measure.
    """

    frame: pd.DataFrame
    """One row per routed expert, largest first: layer, expert, effect (estimated rise of the NLL, nats per
    prediction)."""
    documents: Int[ndarray, "document"]
    by_document: Float[ndarray, "unit document"]
    """Estimated rise summed over the predictions of each document; rows as in `units`."""
    units: pd.DataFrame
    """layer and expert of the rows of `by_document`."""

    def _repr_html_(self) -> str:
        return self.frame.head(12).to_html(index=False)


@dataclass(frozen=True)
class ScreenRecall:
    """How many of the truly largest effects a screen would have passed on, estimated on a random sample of units.

    It says nothing about the rank of a unit within what is passed on.
    """

    recall: float
    low: float
    high: float
    """95 % Wilson interval."""
    n_top: int
    """Units of the sample that count as largest."""
    n_sample: int
    share: float


def screen(effects: Effects, *, alphas: Sequence[float] = MIDPOINT) -> Screen:
    """Estimate the effect of zeroing each routed expert, in one forward and one backward pass per batch and alpha.

    Args:
        alphas: common scales of all experts at which derivatives are taken and averaged: ``(1.0,)`` is gradient x
            activation in the model as it is, midpoints of n equal steps are integrated gradients.

    Raises:
        BadConfig: a model without routed experts, or no alpha.
    """
    if not len(alphas):
        raise BadConfig("no alpha was given: use alphas=(0.5,)")
    lens, text = effects.lens, effects.text
    sites = [site for site in lens.sites if site.routed and site.role is Role.MOE]
    if not sites:
        raise BadConfig(f"{lens.name} has no routed experts to screen: give a Mixture-of-Experts model")
    rises = {site.layer: np.zeros((len(text.tokenized), site.n_experts)) for site in sites}
    silent = None if effects.progress else True
    work = [(part, alpha) for part in effects.parts for alpha in alphas]
    for part, at in tqdm(work, desc="screen", unit="pass", disable=silent):
        shapes = {site.layer: (len(part.ids), site.n_experts) for site in sites}
        scale = _Scale({layer: torch.full(shape, float(at), device=lens.device) for layer, shape in shapes.items()})
        with (
            _without_weight_gradients(lens.model),
            tapping(lens.model, sites, lambda _tap: None, kernel=lens.kernel, edit=scale),
        ):
            _nll(effects, part).backward()
        windows = text.tokenized.window_of[part.token[:, 0].numpy()]
        for layer, alpha in scale.alpha.items():
            if alpha.grad is not None:
                rises[layer][windows] -= alpha.grad.cpu().numpy() / len(alphas)
    by_window = np.concatenate([rises[site.layer] for site in sites], axis=1)[text.windows].T
    documents, which = np.unique(text.tokenized.document[text.windows], return_inverse=True)
    by_document = by_window @ (which[:, None] == np.arange(len(documents)))
    units = pd.DataFrame([(s.layer, e) for s in sites for e in range(s.n_experts)], columns=UNIT)
    frame = units.assign(effect=by_document.sum(axis=1) / len(text.token))
    return Screen(frame.sort_values("effect", ascending=False, ignore_index=True), documents, by_document, units)


def screen_recall(exact: pd.DataFrame, screen: Screen | pd.DataFrame, *, share: float = 0.1) -> ScreenRecall:
    """Share of the truly largest effects that the top `share` of a screen holds.

    Args:
        exact: layer, expert, effect of a *random* sample of units, such as `random_units` gives. On a sample that the
            screen itself chose, recall is 1 whatever the screen is worth.
        screen: estimates for all units.
        share: of all units that the screen passes on, and of the sample that counts as largest (at least one).

    Raises:
        BadConfig: an empty sample, a share outside (0, 1], or a sampled unit that the screen does not have.
    """
    estimates = screen.frame if isinstance(screen, Screen) else screen
    if not len(exact) or not 0 < share <= 1:
        raise BadConfig(f"screen recall needs a sample of units and a share in (0, 1], not {len(exact)} and {share}")
    ranked = estimates.sort_values("effect", ascending=False, kind="stable")
    passed = ranked[UNIT].head(_count(share, len(ranked))).assign(passed=True)
    n_top = _count(share, len(exact))
    top = exact.sort_values("effect", ascending=False, kind="stable")[UNIT].head(n_top)
    if not len(top.merge(estimates[UNIT])) == n_top:
        raise BadConfig("the sample holds units that the screen does not have: measure both on one model")
    hits = int(top.merge(passed, how="left")["passed"].notna().sum())
    low, high = wilson_interval(hits, n_top)
    return ScreenRecall(hits / n_top, float(low), float(high), n_top, len(exact), share)


def random_units(screen: Screen, *, share: float = 0.1, seed: int = 0) -> list[str]:
    """Addresses of a random sample of all units (at least one), on which to measure exact effects."""
    n = _count(share, len(screen.units))
    rows = np.sort(np.random.default_rng(seed).permutation(len(screen.units))[:n])
    return [f"L{layer}.E{expert}" for layer, expert in screen.units.iloc[rows].itertuples(index=False)]


def _count(share: float, n: int) -> int:
    """`share` of `n`, rounded up and at least 1 (METRICS 2.2); 7 % of 100 is 7 in spite of binary fractions."""
    return max(1, math.ceil(share * n - 1e-9))


class _Scale(Edit):
    """Each window's experts write alpha times what they write."""

    def __init__(self, alpha: dict[int, Tensor]) -> None:
        self.alpha = {layer: values.requires_grad_() for layer, values in alpha.items()}

    def output(self, tap: ExpertTap) -> Tensor:
        alpha = self.alpha[tap.layer]
        window = tap.token // (tap.n_tokens // len(alpha))
        return tap.output * alpha[window, tap.expert].unsqueeze(1).to(tap.output.dtype)


def _nll(effects: Effects, part: Part) -> Tensor:
    """Summed NLL of the counted predictions of a batch, with its graph."""
    device = effects.lens.device
    ids, (row, column) = part.ids.to(device), part.counted.nonzero(as_tuple=True)
    with torch.enable_grad():
        hidden = effects.replay.decode(ids, part.mask.to(device)).last_hidden_state[row, column]
        target = ids[row, column + 1]
        parts = effects.head.slices(len(hidden))
        return torch.stack(
            [F.cross_entropy(effects.head.logits(hidden[r]), target[r], reduction="sum") for r in parts]
        ).sum()


@contextmanager
def _without_weight_gradients(model: nn.Module) -> Iterator[None]:
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
