"""Tables made from ``RoutingStats``: routing, co-activation, domains, always-on committees, super experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from moe_lens.types import Role

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from moe_lens.capture.routing import RoutingStats, _Site

ALWAYS_ON_DOCUMENTS = 0.95
"""An always-on expert is visited in at least this share of documents with 32 tokens or more ..."""
ALWAYS_ON_LOAD = 1.5
"""... and by at least this multiple of the tokens that uniform routing would send."""
MIN_DOCUMENT_TOKENS = 32


def routing_table(stats: RoutingStats) -> pd.DataFrame:
    """One row per (layer, role, expert); a dense or shared FFN is expert 0 of its role.

    Columns: ``n_tokens`` that passed the layer; ``load`` (visits) and ``load_share`` (visits / tokens);
    ``gate_mass`` (sum of router weights) and ``mean_weight``; ``output_norm`` (mean ||f||), ``weighted_norm``
    (mean g ||f|| per visit), ``write_share`` (share of sum g ||f|| over all experts of the layer, the shared
    expert included); ``max_output`` (largest |component| of any output); ``n_documents`` that visit it;
    per layer ``router_entropy`` (nats, softmax over all experts), ``router_margin`` (logit gap between the
    last chosen and the first rejected expert), ``load_entropy`` (nats), ``load_cv`` (ddof 0).

    Load and mass say where tokens go, not what an expert contributes: norms do not add up when experts
    write in opposite directions.
    """
    written: dict[int, float] = {}
    for (layer, _), site in stats.sites.items():
        written[layer] = written.get(layer, 0.0) + float(site.sums["weighted_norm"].sum())
    frames = [_site_rows(layer, role, site, written[layer]) for (layer, role), site in sorted(stats.sites.items())]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def _site_rows(layer: int, role: Role, site: _Site, written: float) -> pd.DataFrame:
    load, mass, norm, weighted = (site.sums[k].numpy() for k in ("load", "mass", "norm", "weighted_norm"))
    visits, n = np.maximum(load, 1), max(site.n_tokens, 1)
    share = load / max(load.sum(), 1)
    positive = share[share > 0]
    routed = role is Role.MOE
    return pd.DataFrame(
        {
            "layer": layer,
            "role": role.value,
            "expert": np.arange(site.n_experts),
            "n_tokens": site.n_tokens,
            "load": load.astype(np.int64),
            "load_share": load / n,
            "gate_mass": mass,
            "mean_weight": np.where(load > 0, mass / visits, np.nan),
            "output_norm": np.where(load > 0, norm / visits, np.nan),
            "weighted_norm": np.where(load > 0, weighted / visits, np.nan),
            "write_share": weighted / written if written > 0 else np.nan,
            "max_output": site.max_output.double().numpy(),
            "n_documents": (site.per_document > 0).sum(0).numpy(),
            "router_entropy": site.entropy / n if routed else np.nan,
            "router_margin": site.margin / n if routed and site.top_k < site.n_experts else np.nan,
            "load_entropy": float(-(positive * np.log(positive)).sum()),
            "load_cv": float(load.std() / load.mean()) if load.sum() else np.nan,
        }
    )


def coactivation_table(stats: RoutingStats) -> pd.DataFrame:
    """One row per unordered pair of experts of a layer (METRICS 4.2).

    ``lift = P(ij) / (P(i) P(j))``; ``lift_null = (K-1) N / (K (N-1))`` is what routing without any preference
    between equally loaded experts gives, below 1 because K experts are drawn without replacement;
    ``jaccard`` is visits to both over visits to either. A high lift shows that two experts are chosen together,
    not that they do the same thing.
    """
    rows = []
    for (layer, role), site in sorted(stats.sites.items()):
        if role is not Role.MOE or site.n_experts < 2:
            continue
        i, j = np.triu_indices(site.n_experts, 1)
        both, load = site.coactivation.numpy()[i, j].astype(float), site.sums["load"].numpy()
        k, e, n = site.top_k, site.n_experts, max(site.n_tokens, 1)
        product, either = load[i] * load[j], load[i] + load[j] - both
        rows.append(
            pd.DataFrame(
                {
                    "layer": layer,
                    "expert": i,
                    "other": j,
                    "count": both.astype(np.int64),
                    "lift": np.divide(both * n, product, out=np.full(len(i), np.nan), where=product > 0),
                    "lift_null": (k - 1) * e / (k * (e - 1)),
                    "jaccard": np.divide(both, either, out=np.full(len(i), np.nan), where=either > 0),
                }
            )
        )
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame()


def routing_by_field(stats: RoutingStats, fields: Sequence[Mapping[str, str]], names: Sequence[str]) -> pd.DataFrame:
    """How each value of a document field (a domain, a language) spreads over experts.

    Args:
        fields: the fields of every document, in corpus order.
        names: which fields to tabulate.

    Columns: ``share`` = share of the value's tokens that visit the expert; ``lift`` = that share over the
    expert's share on the whole corpus; ``n_documents`` with the value. A lift over few documents shows those
    documents, not the domain.
    """
    rows = []
    tokens = stats.tokens_of_document.numpy()
    for name in names:
        value_of = np.array([f.get(name, "") for f in fields], dtype=object)
        for (layer, role), site in sorted(stats.sites.items()):
            if role is not Role.MOE:
                continue
            counts = site.per_document.numpy()
            overall = counts.sum(0) / max(tokens.sum(), 1)
            for value in sorted(set(value_of[tokens > 0]) - {""}):
                mine = (value_of == value) & (tokens > 0)
                n, visits = tokens[mine].sum(), counts[mine].sum(0)
                share = visits / max(n, 1)
                lift = np.divide(share, overall, out=np.full(len(share), np.nan), where=overall > 0)
                columns = {"field": name, "value": value, "layer": layer, "expert": np.arange(site.n_experts)}
                columns |= {"n_documents": int(mine.sum()), "n_tokens": int(n), "visits": visits}
                rows.append(pd.DataFrame({**columns, "share": share, "lift": lift}))
    columns_of_rows = ["field", "value", "layer", "expert", "n_documents", "n_tokens", "visits", "share", "lift"]
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=columns_of_rows)


def notable_experts(stats: RoutingStats) -> pd.DataFrame:
    """Always-on committees and super experts, one row per finding (``kind``, layer, expert, value, threshold).

    ``always_on``: visited in 95 % of documents and by 1.5 times the tokens of uniform routing; the always-on
    experts of a layer are its committee, ``value`` is the expert's share of tokens.
    ``super``: largest |output component| above both the 99.5th percentile over all experts and a tenth of the
    model's maximum, in the first 75 % of layers (the rule of REAP's code, on absolute instead of signed
    values); ``value`` is that largest component.
    ``dead``: never visited.

    A super expert by this rule is a candidate: whether the model depends on it, only an ablation shows.
    """
    columns = ["kind", "layer", "expert", "value", "threshold"]
    rows: list[tuple[str, int, int, float, float]] = []
    routed = {layer: site for (layer, role), site in sorted(stats.sites.items()) if role is Role.MOE}
    long = (stats.tokens_of_document >= MIN_DOCUMENT_TOKENS).numpy()
    for layer, site in routed.items():
        load = site.sums["load"].numpy()
        share, uniform = load / max(site.n_tokens, 1), site.top_k / site.n_experts
        presence = (site.per_document.numpy()[long] > 0).mean(0) if long.any() else np.zeros(site.n_experts)
        threshold = ALWAYS_ON_LOAD * uniform
        for e in range(site.n_experts):
            if load[e] == 0:
                rows.append(("dead", layer, e, 0.0, 0.0))
            elif threshold < 1 and share[e] >= threshold and presence[e] >= ALWAYS_ON_DOCUMENTS:
                rows.append(("always_on", layer, e, float(share[e]), threshold))
    if routed:
        peaks = {layer: site.max_output.double().numpy() for layer, site in routed.items()}
        everything = np.concatenate(list(peaks.values()))
        threshold = max(float(np.percentile(everything, 99.5)), float(everything.max()) / 10)
        early = sorted(routed)[: max(1, int(0.75 * len(routed)))]
        for layer in early:
            rows += [("super", layer, int(e), float(peaks[layer][e]), threshold)
                     for e in np.flatnonzero(peaks[layer] > threshold)]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)
