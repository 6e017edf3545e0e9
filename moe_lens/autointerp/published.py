"""The labels and judgements released with arXiv 2604.02178, and what its scores leave out.

The source shows a judge 20 snippets per expert, 10 in which the expert fired and 10 of a pool of its layer, and asks
which fit the label. Its files hold, per expert, ``labels`` (which snippets were positives) and ``scores`` (what the
judge answered): precision and recall come out as released only this way round. ``published_controls`` sets beside the
released F1

    f1_always_yes   what a judge scores who says yes to everything: .667 of every expert
    ci_low, ci_high of one expert's F1, which rests on 20 answers
    fpr_low, high   false-positive rates of the negatives that all experts of a layer share

Usage: ``published_scores(file)``, ``published_controls(file)``, ``shared_negatives(file)``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from moe_lens.autointerp.labels import label_frame
from moe_lens.autointerp.scoring.metrics import binary_scores
from moe_lens.errors import BadConfig
from moe_lens.stats import wilson_interval
from moe_lens.stats.resampling import document_multiplicities, percentile_interval
from moe_lens.types import Status

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy import ndarray

LLM = "gemini-3-flash-preview"
"""Labeller and judge of the release. Its paper names it, its files do not."""
EXPERT = ["model", "layer", "expert"]
SCORES = ["n", "n_pos", "precision", "recall", "f1", "accuracy", "f1_always_yes", "ci_low", "ci_high", "status"]

_ROUNDING = 1e-9  # 2 tp / (2 tp + fp + fn) and 2 pi / (1 + pi) may differ in the last bit where they are equal
_FULL_NAME = re.compile(r"(?P<model>.+)_L(?P<layer>\d+)_auto_interp")
_SUMMARY_KEY = re.compile(r"(?P<model>.+)_L(?P<layer>\d+)")
_SNIPPET = re.compile(r"<snippet>(.*?)</snippet>\s*</example>", re.DOTALL)
_EXAMPLE = re.compile(r"<example id=")


class PublishedLabels(NamedTuple):
    """What one released file holds."""

    labels: pd.DataFrame
    """``model`` and `LABEL_COLUMNS`; abstained where the release has no hypothesis."""
    judgements: pd.DataFrame
    """One row per (model, layer, expert, item): ``truth`` whether the expert fired in the snippet, ``answer`` of the
    judge (missing where it gave none), ``snippet`` where the file has its prompts, else None."""


def read_published_labels(path: str | Path) -> PublishedLabels:
    """Read ``labels_and_scores.json`` (all layers) or a ``MODEL_L9_auto_interp.json`` (one layer, with prompts).

    A list of answers that is shorter or longer than that of the items is left out. The source fills it with zeros or
    cuts it; in the released files the lists agree, but for the empty ones of the null hypotheses.

    Raises:
        BadConfig: no such file, or none of the released format.
    """
    path = Path(path)
    labels: dict[str, list[dict[str, Any]]] = {}
    judgements: list[pd.DataFrame] = []
    for model, layer, expert, entry in _entries(path):
        try:
            at = {"model": model, "layer": layer, "expert": int(expert)}
            judgements.append(_judgements(at, entry))
            labels.setdefault(model, []).append(_label(at, entry))
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise _unreadable(path, f"the entry of expert {expert!r} of {model!r}, layer {layer}") from error
    if not judgements:
        raise _unreadable(path, "it holds no expert")
    frames = [label_frame(rows) for rows in labels.values()]
    for model, frame in zip(labels, frames, strict=True):
        frame.insert(0, "model", model)
    table = pd.concat(judgements, ignore_index=True).astype({"truth": bool, "answer": "boolean"})
    return PublishedLabels(pd.concat(frames, ignore_index=True), table)


def published_scores(path: str | Path) -> pd.DataFrame:
    """The judge's score of every released label, with the interval that 20 answers allow.

    Returns:
        One row per (model, layer, expert): ``label, n, n_pos, precision, recall, f1, accuracy, f1_always_yes, ci_low,
        ci_high, status``. NaN and ``abstained`` where there are no answers. ``precision`` is 0 where the judge never
        says yes, as released.

    The 95 % interval is that of F1: Wilson's for ``tp / (tp + fp + fn)``, of which F1 is a function (Lam et al.,
    arXiv 2309.14621, "Wilson indirect"). It takes the items of an expert for independent.
    Does not show how the label does on typical tokens: the source's positives are ranks 21 to 30 of some 60,000
    windows. Nor what it adds to the token ids, or to the number of marks, of which nothing was matched. Labeller
    and judge are the same model.

    Raises:
        BadConfig: see `read_published_labels`.
    """
    labels, judgements = read_published_labels(path)
    return labels[[*EXPERT, "label"]].merge(_scores(judgements), on=EXPERT, validate="one_to_one")


def published_controls(path: str | Path, *, n_resamples: int = 10_000, seed: int = 0) -> pd.DataFrame:
    """Mean F1 of every released layer beside what it takes to read it.

    Returns:
        One row per (model, layer): ``n_experts`` scored, ``n_abstained``, mean ``f1`` with its 95 % interval over
        experts, ``f1_always_yes``, ``n_no_better`` experts with an F1 of no more than that, ``n_ci_above`` whose own
        interval lies above it, and, where the file has prompts, ``n_negatives`` shared ones with the lowest and
        highest rate of yeses (``fpr_low, fpr_high``).

    The interval over experts does not show the luck of the draw of negatives: all experts of a layer have the same.

    Raises:
        BadConfig: see `read_published_labels`.
    """
    judgements = read_published_labels(path).judgements
    rates = _negatives(judgements)
    rows = []
    for (model, layer), group in _scores(judgements).groupby(EXPERT[:2], sort=False):
        f1 = group["f1"].dropna().to_numpy()
        low, high = _interval_of_mean(f1, n_resamples, seed)
        mine = rates[(rates["model"] == model) & (rates["layer"] == layer)]["false_positive_rate"]
        rows.append({
            "model": model, "layer": layer, "n_experts": len(f1), "n_abstained": len(group) - len(f1),
            "f1": f1.mean() if len(f1) else np.nan, "ci_low": low, "ci_high": high,
            "f1_always_yes": group["f1_always_yes"].mean(),
            "n_no_better": int((group["f1"] <= group["f1_always_yes"] + _ROUNDING).sum()),
            "n_ci_above": int((group["ci_low"] > group["f1_always_yes"]).sum()),
            "n_negatives": len(mine), "fpr_low": mine.min(), "fpr_high": mine.max(),
        })  # fmt: skip
    return pd.DataFrame(rows)


def published_finding(scores: pd.DataFrame) -> str:
    """What the released F1 comes to, in one sentence; `scores` as from `published_scores`."""
    known = scores[scores["status"] == Status.OK]
    if not len(known):
        return "Nothing was scored: no expert of this file has a hypothesis and answers to it."
    no_better = (known["f1"] <= known["f1_always_yes"] + _ROUNDING).sum()
    above = (known["ci_low"] > known["f1_always_yes"]).sum()
    return (
        f"The mean F1 of {len(known)} labels is {known['f1'].mean():.3f}, but a judge that always says yes has "
        f"{known['f1_always_yes'].mean():.3f}: {no_better} labels score no better, and the 95 % interval that "
        f"{known['n'].median():.0f} answers allow lies above it for {above}; {len(scores) - len(known)} experts have "
        f"no label."
    )


def shared_negatives(path: str | Path) -> pd.DataFrame:
    """How often the judge says yes to each negative that several experts of a layer share.

    Returns:
        One row per (model, layer, snippet): ``n_experts`` that were judged on it and ``false_positive_rate``, highest
        first. Empty for a file without prompts.

    A layer's F1 depends on which few negatives were drawn. Does not show that a yes is wrong: the snippet is marked
    at tokens of another expert, and may fit the label all the same.

    Raises:
        BadConfig: see `read_published_labels`.
    """
    return _negatives(read_published_labels(path).judgements)


def _entries(path: Path) -> Iterator[tuple[str, int, str, Any]]:
    """``(model, layer, expert, entry)`` of either kind of file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadConfig(f"cannot read {path}: {error.strerror or error}; give a released .json file") from error
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
        raise _unreadable(path, "it is not JSON") from error
    if not isinstance(content, dict):
        raise _unreadable(path, "it is not a JSON object")
    full = _FULL_NAME.fullmatch(path.stem)
    layers = {f"{full['model']}_L{full['layer']}": content} if full else content
    for key, experts in layers.items():
        place = _SUMMARY_KEY.fullmatch(key)
        if place is None or not isinstance(experts, dict):
            raise _unreadable(path, f"the key {key!r} is no MODEL_L9, which a file of one layer has in its name")
        for expert, entry in experts.items():
            yield place["model"], int(place["layer"]), expert, entry


def _unreadable(path: Path, why: str) -> BadConfig:
    return BadConfig(
        f"cannot use {path} ({why}): give labels_and_scores.json or MODEL_L9_auto_interp.json as they were released"
    )


def _label(at: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    hypothesis = entry["hypothesis"]
    row = {"layer": at["layer"], "expert": at["expert"], "labeller": f"published:{LLM}", "model_id": LLM}
    row["n_exemplars"] = len(_EXAMPLE.findall(entry.get("explainer_prompt", "")))
    if hypothesis is None:
        return row | {"status": str(Status.ABSTAINED), "why": "released without a hypothesis"}
    return row | {"label": " ".join(hypothesis.split())}


def _judgements(at: dict[str, Any], entry: dict[str, Any]) -> pd.DataFrame:
    truth, answers = entry["labels"], entry["scores"]
    if not truth or not set(truth) | set(answers) <= {0, 1}:
        raise ValueError("no item, or an answer that is neither 0 nor 1")
    snippets = _SNIPPET.findall(entry.get("scorer_prompt", ""))
    columns = {
        "item": np.arange(len(truth)),
        "truth": truth,
        "answer": answers if len(answers) == len(truth) else [None] * len(truth),
        "snippet": snippets if len(snippets) == len(truth) else [None] * len(truth),
    }
    return pd.DataFrame(at | columns)


def _scores(judgements: pd.DataFrame) -> pd.DataFrame:
    """`published_scores` without the labels."""
    experts = judgements.groupby(EXPERT, sort=False)
    known = (experts["answer"].count() == experts.size()).to_numpy()
    of, item = experts.ngroup().to_numpy(), judgements["item"].to_numpy()
    truth, answer, used = np.zeros((3, item.max() + 1, len(known)), bool)
    truth[item, of], used[item, of] = judgements["truth"], True
    answer[item, of] = judgements["answer"].fillna(False)
    numbers = binary_scores(truth, answer, used)
    numbers["accuracy"] = ((truth == answer) & used).sum(0) / used.sum(0)
    numbers["ci_low"], numbers["ci_high"] = _f1_interval((truth & answer).sum(0), (truth | answer).sum(0))
    frame = experts.size().index.to_frame(index=False)
    frame["n"], frame["n_pos"] = used.sum(0), numbers["n_pos"]
    frame["status"] = np.where(known, str(Status.OK), str(Status.ABSTAINED))
    names = ["precision", "recall", "f1", "accuracy", "ci_low", "ci_high"]
    frame[names] = numbers[names]
    frame.loc[~known, names] = np.nan
    frame["f1_always_yes"] = numbers["f1_always_yes"]
    return frame[[*EXPERT, *SCORES]]


def _f1_interval(
    both: Int[ndarray, "expert"], either: Int[ndarray, "expert"]
) -> tuple[Float[ndarray, "expert"], Float[ndarray, "expert"]]:
    """95 % interval of F1 from the number of items that are true and yes, and true or yes.

    ``F1 = 2 J / (1 + J)`` rises with ``J = both / either``, whose interval is Wilson's (arXiv 2309.14621).
    """
    low, high = wilson_interval(both, either)
    return 2 * low / (1 + low), 2 * high / (1 + high)


def _negatives(judgements: pd.DataFrame) -> pd.DataFrame:
    rows = judgements[~judgements["truth"] & judgements["answer"].notna() & judgements["snippet"].notna()]
    groups = rows.astype({"answer": bool}).groupby(["model", "layer", "snippet"], sort=False)["answer"]
    table = groups.agg(n_experts="count", false_positive_rate="mean").reset_index()
    table = table[table["n_experts"] > 1]
    return table.sort_values("false_positive_rate", ascending=False, kind="stable", ignore_index=True)


def _interval_of_mean(values: Float[ndarray, "expert"], n_resamples: int, seed: int) -> tuple[float, float]:
    if len(values) < 2:
        return np.nan, np.nan
    times = document_multiplicities(len(values), n_resamples, seed=seed)
    low, high = percentile_interval(times @ values / len(values))
    return float(low), float(high)
