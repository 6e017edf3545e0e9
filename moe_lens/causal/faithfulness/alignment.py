"""Does importance follow routing? Correlations per layer, spread of the load, churn of the top-k under ablation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from moe_lens.causal.ablation import prepare
from moe_lens.causal.faithfulness.correlation import entropy, gini, kendall, partial_spearman, spearman, variation
from moe_lens.causal.faithfulness.rankings import FROM_VISITS, Ranking
from moe_lens.stats import document_multiplicities
from moe_lens.types import ExpertTap, Role

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from numpy import ndarray

    from moe_lens.causal.effects import Effects
    from moe_lens.causal.faithfulness.visits import Visits
    from moe_lens.models.edits import Mode
    from moe_lens.models.edits.apply import DownstreamRouting

ROUTING_NUMBERS = ("load", "gate_mass", "gate_norm")
FEWEST = 4
"""Visited units of a layer below which a rank correlation says nothing."""


def routing_alignment(
    importance: Sequence[Ranking],
    v: Visits,
    *,
    member: Bool[ndarray, "unit"] | None = None,
    draws: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """Rank correlation between the importance of units and where tokens go, layer by layer.

    Units that no token visits are left out, since they agree trivially, and those outside `member`. The row with
    layer NA is the mean over layers, so that differences between layers do not count. Intervals are over documents,
    resampled on both sides.

    Columns: importance, routing (load, gate_mass, gate_norm), layer, n_units, spearman, spearman_low,
    spearman_high, kendall (tau-b), partial_spearman (given load; NaN for load itself).

    A correlation does not say that routing causes importance; a layer of 8 or 16 experts pins it down badly.
    """
    n = len(v.n_tokens)
    times = np.concatenate([np.ones((1, n)), document_multiplicities(n, draws, seed=seed)])
    counted = v.load.sum(0) > 0 if member is None else member & (v.load.sum(0) > 0)
    layers = [at for layer in np.unique(v.layer) if len(at := np.flatnonzero((v.layer == layer) & counted))]
    rows = []
    for ranking in importance:
        if ranking.name in ROUTING_NUMBERS:
            continue
        x = np.stack([ranking.of(t) for t in times]) if ranking.from_documents else _repeat(ranking.score, len(times))
        for name in ROUTING_NUMBERS:
            y = np.stack([FROM_VISITS[name](v, t) for t in times])
            rows += _alignment_rows(ranking.name, name, x, y, times @ v.load, layers, v.layer)
    return pd.DataFrame(rows, columns=_ALIGNMENT).astype({"layer": "Int64"})


_ALIGNMENT = [
    "importance", "routing", "layer", "n_units", "spearman", "spearman_low", "spearman_high", "kendall",
    "partial_spearman",
]  # fmt: skip


def _repeat(score: Float[ndarray, "unit"], n: int) -> Float[ndarray, "draw unit"]:
    return np.broadcast_to(np.nan_to_num(score, nan=np.nanmin(score) - 1), (n, len(score)))


def _alignment_rows(
    importance: str, routing: str, x: Float[ndarray, "draw unit"], y: Float[ndarray, "draw unit"],
    load: Float[ndarray, "draw unit"], layers: Sequence[Int[ndarray, "visited"]], layer_of: Int[ndarray, "unit"],
) -> list[tuple[object, ...]]:  # fmt: skip
    found = []
    for at in layers:
        if len(at) >= FEWEST:
            rho = spearman(x[:, at], y[:, at])
            tau = kendall(x[0, at], y[0, at])
            partial = np.nan if routing == "load" else partial_spearman(x[0, at], y[0, at], load[0, at])
            found.append((layer_of[at[0]], len(at), rho, float(tau), float(partial)))
    if found:
        _, sizes, rhos, taus, partials = zip(*found, strict=True)
        found.append((pd.NA, sum(sizes), np.mean(rhos, axis=0), float(np.mean(taus)), float(np.mean(partials))))
    return [
        (importance, routing, layer, n, float(rho[0]), *_fisher(rho), tau, partial)
        for layer, n, rho, tau, partial in found
    ]


def _fisher(rho: Float[ndarray, "draw"]) -> tuple[float, float]:
    """95 % interval about the first value, from the spread of the others on Fisher's scale.

    Not their percentiles: resampling adds noise to both sides, which pulls every drawn correlation towards 0.
    """
    z = np.arctanh(np.clip(rho, -1 + 1e-9, 1 - 1e-9))
    drawn = z[1:][np.isfinite(z[1:])]
    if len(drawn) < 2:
        return float("nan"), float("nan")
    half = 1.96 * drawn.std(ddof=1)
    return float(np.tanh(z[0] - half)), float(np.tanh(z[0] + half))


def routing_spread(v: Visits) -> pd.DataFrame:
    """How evenly each layer uses its experts (METRICS 4.2).

    Columns: layer, n_experts, n_unvisited, router_entropy (nats per token, softmax over all experts),
    effective_experts (e to that), load_entropy (nats), load_evenness (over ln N), load_cv (ddof 0), load_gini,
    load_max_over_mean. An even load says nothing about what experts do.
    """
    rows = []
    for layer in np.unique(v.layer):
        load = v.load.sum(0)[v.layer == layer]
        per_token = float(v.router_entropy[int(layer)].sum() / max(v.n_tokens.sum(), 1))
        spread = float(entropy(load))
        rows.append({
            "layer": int(layer), "n_experts": len(load), "n_unvisited": int((load == 0).sum()),
            "router_entropy": per_token, "effective_experts": float(np.exp(per_token)), "load_entropy": spread,
            "load_evenness": spread / np.log(len(load)) if len(load) > 1 else np.nan,
            "load_cv": float(variation(load)), "load_gini": float(gini(load)),
            "load_max_over_mean": float(load.max() / load.mean()) if load.sum() else np.nan,
        })  # fmt: skip
    return pd.DataFrame(rows)


@torch.no_grad()
def churn(effects: Effects, edit: Sequence[Mode], *, routing: DownstreamRouting = "live") -> dict[int, float]:
    """Share of the top-k that an ablation changes, by MoE layer: 1 - mean Jaccard of clean and edited choices.

    In a layer that loses experts, refill modes change the choice by definition; what happens in later layers is the
    model's own re-routing. Order within the top-k does not count. 0 under frozen routing, unless the mode refills.
    """
    lens, text = effects.lens, effects.text
    ablation = prepare(lens, list(edit), routing=routing, whole_layers=True)
    layers = list(effects.routing)
    totals, n = dict.fromkeys(layers, 0.0), 0
    for part in effects.parts:
        flat = part.token.reshape(-1)
        real = flat >= 0
        rows = np.searchsorted(text.read, flat[real].numpy())
        n += len(rows)

        def on_tap(tap: ExpertTap, real: torch.Tensor = real, rows: Int[ndarray, "token"] = rows) -> None:
            visited = torch.zeros(tap.n_tokens, tap.n_experts, dtype=torch.bool)
            visited[tap.token.cpu(), tap.expert.cpu()] = True
            clean = np.zeros((len(rows), tap.n_experts), bool)
            np.put_along_axis(clean, effects.routing[tap.layer][0][rows], True, axis=1)
            now = visited[real].numpy()
            jaccard = (clean & now).sum(1) / np.maximum((clean | now).sum(1), 1)
            totals[tap.layer] += float((1 - jaccard).sum())

        with (
            ablation.at(lens, part.token, routing=routing),
            lens.tapping(on_tap, layers=layers, roles=[Role.MOE]),
        ):
            effects.replay.decode(part.ids.to(lens.device), part.mask.to(lens.device))
    return {layer: total / max(n, 1) for layer, total in totals.items()}
