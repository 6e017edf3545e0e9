"""Run directories written by hand: what cards and ``moe-lens show`` read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

LAYER = 2
NASTY = ("<script>alert(1)</script>", "\x1b[31m", "\u202e", "\n\t", " [bold]&", "العربية", "👩‍👩‍👧", "")
"""Tokens that a page, a terminal or a reader could take for something else; the last covers no character."""


def row(
    expert: int, tokens: Sequence[str], focal: int, *, routed: Sequence[int] = (), **changes: Any
) -> dict[str, Any]:
    """One row of exemplars.parquet: a context of `tokens` around the one at `focal`; `routed` others went there too."""
    ends = [len("".join(tokens[: i + 1])) for i in range(len(tokens))]
    starts = [0, *ends[:-1]]
    kind = changes.get("kind", "top")
    got = not kind.startswith("negative")
    values: dict[str, Any] = {
        "layer": LAYER, "expert": expert, "split": "select", "kind": "top", "quantile": 0.99 if got else float("nan"),
        "score": 5.0 if got else 0.0, "weight": 0.5 if got else 0.0, "routed": got, "document": 0, "window_char": 0,
        "position": focal, "token_id": 7, "token": tokens[focal], "text": "".join(tokens),
        "char_start": starts[focal], "char_end": ends[focal], "token_starts": starts, "token_ends": ends,
        "routed_tokens": [i in {*routed, *([focal] if got else [])} for i in range(len(tokens))], "status": "ok",
    }  # fmt: skip
    return {**values, **changes}


def exemplars() -> pd.DataFrame:
    """Expert 1 gets every nasty token, expert 2 gets none, expert 3 plain words whose score rises with quantile."""
    rows = [
        row(1, ["one ", "two ", t, " and on"], 2, routed=[0], document=i, score=9.0 - i) for i, t in enumerate(NASTY)
    ]
    rows += [row(1, ["the ", t, " elsewhere"], 1, kind="negative_same_token", document=20) for t in NASTY[:2]]
    rows += [row(2, ["never ", "here"], 1, kind=kind) for kind in ("negative_random", "negative_other")]
    for i in range(10):
        found = {"document": 30 + i, "quantile": i / 10 + 0.05, "score": float(i + 1), "token_id": i}
        rows.append(row(3, ["before ", f"word{i}", " after"], 1, kind="quantile", **found))
        rows.append(row(3, ["before ", f"seen{i}", " after"], 1, kind="random", split="validate", **found))
    rows += [row(3, ["a ", f"word{i}", " b"], 1, score=20.0 - i, document=i // 4, token_id=i) for i in range(8)]
    for i in (9, 9, 0, 0, 4):  # 0 and 4 are among its highest scores
        rows.append(row(3, ["no ", f"word{i}"], 1, kind="negative_same_token", token_id=i))
    return pd.DataFrame(rows)


def labels() -> pd.DataFrame:
    """A label with a rule for expert 1, a refusal for expert 3."""
    shared = {
        "layer": LAYER, "facet": 0, "model_id": "m", "prompt_hash": "", "n_exemplars": 8, "evidence": [],
    }  # fmt: skip
    return pd.DataFrame(
        [
            {**shared, "expert": 1, "label": "<b>markup</b> & \x1b[0m", "rule": "<[^>]+>", "labeller": "openai:m",
             "confidence": 3, "status": "ok", "why": ""},
            {**shared, "expert": 3, "label": None, "rule": None, "labeller": "openai:m", "confidence": None,
             "status": "refused", "why": "no <reason>"},
        ]
    ).astype({"confidence": "Int64"})  # fmt: skip


def label_scores() -> pd.DataFrame:
    """Detection by the labeller itself and the rule, for expert 1."""
    empty = {
        "labeller": "openai:m", "layer": LAYER, "expert": 1, "facet": 0, "scorer_model": "m", "control": "none",
        "n_pos": 40, "n_neg": 40, "n_abstain": 0, "n_documents": 30, "ci_low": 0.55, "ci_high": 0.69, "status": "ok",
    }  # fmt: skip
    margins = {
        "margin_unigram": 0.12, "margin_unigram_low": 0.05, "margin_unigram_high": 0.19, "margin_bigram": -0.04,
        "margin_bigram_low": -0.1, "margin_bigram_high": 0.03,
    }  # fmt: skip
    rows: list[dict[str, Any]] = [
        {"scorer": "detection", "same_model": True, "negatives": "random", "auroc": 0.91},
        {
            "scorer": "detection",
            "same_model": True,
            "negatives": "same_token",
            "auroc": 0.62,
            "n_abstain": 3,
            **margins,
        },
        {"scorer": "detection", "same_model": True, "negatives": "same_token", "control": "shuffled", "auroc": 0.503},
        {"scorer": "rule", "same_model": False, "negatives": "near_miss", "auroc": None, "status": "too_few"},
        {"scorer": "rule", "same_model": False, "negatives": "same_token", "auroc": 1.0},
    ]
    return pd.DataFrame([{**empty, **r} for r in rows])


def logit_lens() -> pd.DataFrame:
    """The rows of expert 1 as a whole and of one of its exemplars."""
    place = {"layer": LAYER, "expert": 1}
    own = {**place, "document": None, "promoted": [" <i>", "\n"], "suppressed": [NASTY[2]]}
    one = {**place, "document": 3, "promoted": ["of one exemplar"], "suppressed": ["of one exemplar"]}
    return pd.DataFrame([own, one]).astype({"document": "Int64"})


def probe() -> pd.DataFrame:
    """Six concepts on expert 1: the one that is best on validate is not the best on test."""
    rows = [
        {"role": "moe", "seed": 0, "layer": LAYER, "expert": 1, "concept": f"c{i}", "k": 1, "neurons": [i], "sign": [1],
         "auroc_validate": 0.9 - i / 10, "auroc": 0.6 + i / 20, "f1": 0.5, "f1_balanced": 0.7,
         "f1_always_positive": 0.3, "n_test": 90, "n_pos_test": 30, "status": "too_few" if i == 1 else "ok"}
        for i in range(6)
    ]  # fmt: skip
    more_neurons = {**rows[0], "k": 8, "neurons": list(range(8)), "concept": "eight"}
    return pd.DataFrame([*rows, more_neurons, {**rows[0], "role": "dense", "concept": "of the twin"}])


def routing() -> pd.DataFrame:
    """Expert 1 gets six times the load of an even router."""
    load = [0, 600, 0, 100, 0, 0, 0, 0, 0, 0]
    columns = {
        "load": load, "load_share": [x / 700 for x in load], "gate_mass": [x / 2 for x in load], "mean_weight": 0.5,
        "output_norm": 2.0, "weighted_norm": 1.0, "write_share": 0.25, "router_entropy": 1.5,
    }  # fmt: skip
    return pd.DataFrame({"layer": LAYER, "role": "moe", "expert": range(10), **columns})


TABLES = {
    "exemplars": exemplars, "labels": labels, "label_scores": label_scores, "logit_lens": logit_lens, "probe": probe,
    "routing": routing,
}  # fmt: skip


def write_run(folder: Path, *names: str) -> Path:
    """A run with the tables `names`, all by default."""
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"model": {"name": "m"}, "commands": {}}))
    for name in names or TABLES:
        TABLES[name]().to_parquet(folder / f"{name}.parquet")
    return folder
