"""What a run directory says about one expert, read from its tables.

    run.exemplars("L7.E12")   rows of exemplars.parquet
    run.card("L7.E12")        those worth looking at, beside routing, labels with scores, logit lens and probes

Tables are read, of which commands wrote all or some; no model is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from moe_lens.capture.card_lines import label_line, probe_line, records, routing_line, score_chips
from moe_lens.capture.shading import routed_spans, token_name, visible
from moe_lens.errors import BadConfig, BadOutput, OutOfRange
from moe_lens.types import ExpertAddress, Split, Status

if TYPE_CHECKING:
    from moe_lens.capture.run import Run

TOP = "highest scores (router weight x output norm), at most two of a document"
NOT_ROUTED = "same token, not routed"
PER_DOCUMENT = 2
"""Of the highest scores: a document that repeats itself would fill the list."""
N_STRATA = 4
N_PROBES = 5
_SUPPLIERS = {
    "routing": "moe-lens probe or ml.capture",
    "labels": "moe-lens autointerp",
    "label_scores": "moe-lens autointerp with a scorer",
    "logit_lens": "moe-lens autointerp",
    "probe": "moe-lens probe",
}


@dataclass(frozen=True, repr=False)
class ExpertCard:
    """One expert, as far as the run knows it. A part is None while no command has written its table.

    What it shows is where the expert is used and what was said about it, not what the model needs it for.
    """

    address: str
    frame: pd.DataFrame
    """Exemplars to look at, from the select split: rows of exemplars.parquet under a first column ``group``. The
    highest scores, then some of each quarter of the score, then the same tokens where they were not routed."""
    largest_score: float
    """Of all its exemplars in that split; shades are shares of it."""
    routing: Mapping[str, Any] | None
    """Its row of ``run.experts()``, and ``load_over_even``, its load over that of an even router."""
    labels: pd.DataFrame | None
    scores: pd.DataFrame | None
    """Its rows of label_scores.parquet."""
    promoted: tuple[str, ...] | None
    """Tokens that the mean write of its exemplars raises most; see `autointerp.logit_lens`."""
    suppressed: tuple[str, ...] | None
    probes: pd.DataFrame | None
    """Concepts that its neurons read best, chosen by AUROC on validate, with the scores on test."""

    @property
    def groups(self) -> dict[str, pd.DataFrame]:
        """The exemplars of each group, in order."""
        return {str(name): rows for name, rows in self.frame.groupby("group", sort=False)}

    @property
    def missing(self) -> dict[str, str]:
        """Tables that the run does not have yet, with what writes them."""
        parts = {
            "routing": self.routing, "labels": self.labels, "label_scores": self.scores, "logit_lens": self.promoted,
            "probe": self.probes,
        }  # fmt: skip
        return {name: _SUPPLIERS[name] for name, part in parts.items() if part is None}

    def facts(self) -> list[tuple[str, str]]:
        """Everything but the exemplars as (name, text) lines; the text is safe for a terminal, not escaped for HTML."""
        lines = [("routing", routing_line(self.routing))] if self.routing else []
        lines += self._label_lines()
        for name, tokens in (("promotes", self.promoted), ("suppresses", self.suppressed)):
            if tokens:
                lines.append((name, "  ".join(map(token_name, tokens))))
        if self.probes is not None:
            lines.append(("neurons", probe_line(self.probes)))
        if missing := self.missing:
            lines.append(("not run", "; ".join(f"{name}: {command}" for name, command in missing.items())))
        return lines

    def _label_lines(self) -> list[tuple[str, str]]:
        if self.labels is None:
            return []
        lines = []
        for row in records(self.labels):
            name = f"facet {row['facet']}" if row["facet"] else "label"
            lines.append((name, label_line(row)))
            if isinstance(row["rule"], str):
                lines.append(("rule", visible(row["rule"])))
            if self.scores is not None and row["status"] == str(Status.OK):
                said = score_chips(self.scores, labeller=row["labeller"], facet=row["facet"])
                lines.append(("scores", " · ".join(said) or "none for this label"))
        return lines or [("label", "none for this expert")]

    def summary(self) -> dict[str, Any]:
        """Everything as plain values for JSON; None where there is nothing.

        ``routed_spans`` are the characters of every token of a context that the expert got.
        """
        tables = {"labels": self.labels, "label_scores": self.scores, "probes": self.probes}
        spans = self.frame.drop(columns=["token_starts", "token_ends", "routed_tokens"])
        spans["routed_spans"] = pd.Series([routed_spans(row) for row in self.frame.itertuples()], dtype=object)
        return {
            "address": self.address,
            "routing": dict(self.routing) if self.routing else None,
            **{name: None if part is None else records(part) for name, part in tables.items()},
            "promoted": self.promoted,
            "suppressed": self.suppressed,
            "exemplars": records(spans),
            "not_run": self.missing,
        }

    def __repr__(self) -> str:
        lines = [f"{name}: {text}" for name, text in self.facts()]
        tokens = "  ".join(token_name(token) for token in self.frame.loc[self.frame["group"] == TOP, "token"])
        return "\n".join([f"ExpertCard({self.address})", *lines, f"highest scores: {tokens}"])

    def _repr_html_(self) -> str:
        from moe_lens.capture.card_page import card_html

        return card_html(self)


def expert_exemplars(run: Run, address: str | ExpertAddress, *, split: str, kind: str | None) -> pd.DataFrame:
    """Rows of exemplars.parquet of one expert; the contract of ``Run.exemplars``."""
    at = _expert(address)
    if split not in (Split.SELECT, Split.VALIDATE):
        raise BadConfig(f"there are no exemplars of the split {split!r}: give 'select' or 'validate'")
    found = _of_expert(run, "exemplars", at)
    if found is None:
        raise BadOutput(f"{run.path} holds no exemplars: run moe-lens autointerp --model ... -o {run.path} first")
    if not len(found):
        raise OutOfRange(_nowhere(run, at))
    found = found[found["split"] == split]
    if found["kind"].str.startswith("negative").all():
        raise OutOfRange(
            f"{at} has no exemplars: none of the tokens of the split {split!r} was routed to it; use more text, or "
            "look at another expert"
        )
    if kind is not None and kind not in set(found["kind"]):
        raise BadConfig(f"{at} has no exemplars of the kind {kind!r}: there are {', '.join(found['kind'].unique())}")
    return (found if kind is None else found[found["kind"] == kind]).reset_index(drop=True)


def expert_card(run: Run, address: str | ExpertAddress, *, n: int) -> ExpertCard:
    """Everything about one expert; the contract of ``Run.card``."""
    if n < 1:
        raise BadConfig(f"cannot show {n} exemplars: give 1 or more")
    rows = expert_exemplars(run, address, split=Split.SELECT, kind=None)
    at = _expert(address)
    lens = _of_expert(run, "logit_lens", at)
    own = lens[lens["document"].isna()] if lens is not None else None
    promoted, suppressed = (
        None if own is None else tuple(str(token) for tokens in own[name] for token in tokens)
        for name in ("promoted", "suppressed")
    )
    return ExpertCard(
        address=str(at),
        frame=_to_look_at(rows, n),
        largest_score=float(rows["score"].max()),
        routing=_routing(run, at),
        labels=_of_expert(run, "labels", at),
        scores=_of_expert(run, "label_scores", at),
        promoted=promoted,
        suppressed=suppressed,
        probes=_probes(run, at),
    )


def _expert(address: str | ExpertAddress) -> ExpertAddress:
    at = ExpertAddress.parse(address)
    if at.neuron is not None:
        raise OutOfRange(f"{at} is a neuron: give its expert, L{at.layer}.E{at.expert}")
    return at


def _of_expert(run: Run, name: str, at: ExpertAddress) -> pd.DataFrame | None:
    """Its rows of one table."""
    return run.of_expert(name, at).reset_index(drop=True) if run.has(name) else None


def _nowhere(run: Run, at: ExpertAddress) -> str:
    """Why there is no row at all of an expert."""
    cells = pd.read_parquet(run.path / "exemplars.parquet", columns=["layer", "expert"])
    layers = sorted(set(cells["layer"].tolist()))
    if not layers:
        return f"{run.path} holds no exemplars of any expert: use more text"
    if at.layer not in layers:
        return f"{run.path} has no exemplars of layer {at.layer}: it has those of layers {', '.join(map(str, layers))}"
    experts = cells.loc[cells["layer"] == at.layer, "expert"]
    return f"there is no expert {at} in {run.path}: layer {at.layer} has experts {experts.min()} to {experts.max()}"


def _to_look_at(rows: pd.DataFrame, n: int) -> pd.DataFrame:
    """`n` of the highest scores, about as many over the quarters of the score, half as many that were not routed."""
    top = rows[rows["kind"] == "top"].sort_values("score", ascending=False)
    top = top[top.groupby("document").cumcount() < PER_DOCUMENT].head(n).assign(group=TOP)
    groups = [top]
    rest = rows[rows["kind"].isin(["quantile", "random"])].sort_values("quantile", ascending=False)
    stratum = (rest["quantile"] * N_STRATA).astype(int).clip(upper=N_STRATA - 1)
    for number in reversed(range(N_STRATA)):
        here = rest[stratum == number]
        low, high = 100 * number // N_STRATA, 100 * (number + 1) // N_STRATA
        groups.append(_spread(here, math.ceil(n / N_STRATA)).assign(group=f"score quantiles {low} to {high} %"))
    same = rows[rows["kind"] == "negative_same_token"]
    order = same["token_id"].map({token: i for i, token in enumerate(dict.fromkeys(top["token_id"]))})
    seen = same.groupby("token_id").cumcount()
    same = same.assign(seen=seen, order=order).sort_values(["seen", "order"], na_position="last", kind="stable")
    groups.append(same.drop(columns=["seen", "order"]).head(math.ceil(n / 2)).assign(group=NOT_ROUTED))
    found = pd.concat([group for group in groups if len(group)], ignore_index=True)
    return found[["group", *rows.columns]]


def _spread(rows: pd.DataFrame, n: int) -> pd.DataFrame:
    """`n` rows at even distances."""
    if len(rows) <= n:
        return rows
    return rows.iloc[[round((i + 0.5) * len(rows) / n - 0.5) for i in range(n)]]


def _routing(run: Run, at: ExpertAddress) -> dict[str, Any] | None:
    if not run.has("routing"):
        return None
    experts = run.experts()
    layer = experts[experts["layer"] == at.layer]
    mine = layer[layer["expert"] == at.expert]
    if not len(mine):
        return None
    row = records(mine)[0]
    return row | {"load_over_even": row["load"] / layer["load"].mean()}


def _probes(run: Run, at: ExpertAddress) -> pd.DataFrame | None:
    cells = _of_expert(run, "probe", at)
    if cells is None:
        return None
    carries = cells["status"].isin([str(Status.OK), str(Status.SEPARABLE)])
    cells = cells[(cells["role"] == "moe") & (cells["k"] == cells["k"].min()) & carries]
    best = cells[cells["seed"] == cells["seed"].min()].sort_values("auroc_validate", ascending=False)
    names = ["concept", "neurons", "sign", "auroc_validate", "auroc", "f1", "f1_balanced", "f1_always_positive"]
    names += ["n_test", "n_pos_test"]
    return best[names].head(N_PROBES).reset_index(drop=True)
