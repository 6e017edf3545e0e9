"""One feature per expert, in the layout of Neuronpedia's bulk import.

    MODEL/LAYER-moe-experts/{release,model,sourceset,source}.jsonl
    MODEL/LAYER-moe-experts/{features,activations,explanations}/batch-0.jsonl.gz

An activation is an exemplar of the select split: its 32-token context, with the score (router weight times norm of the
expert's output) at the marked token and 0 at all others, whose scores a run does not keep.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from moe_lens import plots
from moe_lens.errors import BadOutput
from moe_lens.types import Split

if TYPE_CHECKING:
    from pathlib import Path

    from moe_lens.capture.run import Run

SET = "moe-experts"
RELEASE = "moe-lens"


def write(run: Run, folder: Path) -> None:
    """One folder per layer.

    Raises:
        BadOutput: the run has no exemplars.
    """
    if not run.has("exemplars"):
        raise BadOutput(f"{run.path} holds no exemplars: run moe-lens autointerp --model ... -o {run.path} first")
    manifest = run.manifest
    model = re.sub(r"[^a-z0-9.-]+", "-", manifest["model"]["name"].lower().rsplit("/", 1)[-1]).strip("-")
    exemplars = run.frame("exemplars")
    exemplars = exemplars[(exemplars["split"] == Split.SELECT.value) & exemplars["routed"]]
    exemplars = exemplars[exemplars["kind"].isin(["top", "quantile"])]
    for layer, rows in exemplars.groupby("layer"):
        number = int(str(layer))
        source = f"{number}-{SET}"
        home = folder / model / source
        home.mkdir(parents=True)
        for name, row in _about(manifest, model, source).items():
            _write_lines(home / f"{name}.jsonl", [row])
        key = {"modelId": model, "layer": source}
        for name, found in (
            ("features", _features(run, number, key, rows)),
            ("activations", _activations(rows, key)),
            ("explanations", _explanations(run, number, key)),
        ):
            (home / name).mkdir()
            _write_lines(home / name / "batch-0.jsonl.gz", found)


def _about(manifest: Mapping[str, Any], model: str, source: str) -> dict[str, dict[str, Any]]:
    created = {"createdAt": manifest["created"]}
    by = {"creatorName": "moe-lens", "creatorId": ""}
    note = "values are router weight times norm of the expert's output at the marked token, 0 elsewhere"
    return {
        "release": {"name": RELEASE, "description": "experts of Mixture-of-Experts models", **by, **created},
        "model": {"id": model, "displayName": manifest["model"]["name"], "instruct": False, "creatorId": "", **created},
        "sourceset": {"modelId": model, "name": SET, "description": "routed experts", "type": "moe-expert",
                      "releaseName": RELEASE, "visibility": "PUBLIC", **by, **created},
        "source": {"id": source, "modelId": model, "setName": SET, "creatorId": "", "notes": note,
                   "dataset": manifest["corpus"]["id"], "num_prompts": manifest["corpus"]["n_documents"], **created},
    }  # fmt: skip


def _features(run: Run, layer: int, key: Mapping[str, str], rows: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """One row per expert with exemplars: share of tokens that visit it, what it promotes and suppresses."""
    largest = rows.groupby("expert")["score"].max()
    tokens = pd.DataFrame()
    if run.has("logit_lens"):
        tokens = run.frame("logit_lens")
        tokens = tokens[(tokens["layer"] == layer) & tokens["document"].isna()].set_index("expert")
    load = pd.Series(dtype=float)
    if run.has("routing"):
        routing = run.routing
        load = routing[(routing["layer"] == layer) & (routing["role"] == "moe")].set_index("expert")["load_share"]
    for expert, score in largest.items():
        said: Any = tokens.loc[[expert]].iloc[0] if expert in tokens.index else None
        yield {
            **key, "index": str(expert), "sourceSetName": SET, "maxActApprox": float(score), "hasVector": False,
            "vector": [], "hookName": f"layers.{layer}.mlp.experts.{expert}",
            "frac_nonzero": float(load.get(expert, 0.0)),
            "pos_str": [] if said is None else list(said["promoted"]),
            "pos_values": [] if said is None else _floats(said["promoted_logits"]),
            "neg_str": [] if said is None else list(said["suppressed"]),
            "neg_values": [] if said is None else _floats(said["suppressed_logits"]),
        }  # fmt: skip


def _activations(rows: pd.DataFrame, key: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(plots.rows_of(rows)):
        tokens = _pieces(row.text, row.token_starts, row.token_ends)
        marked = next((at for at, start in enumerate(row.token_starts) if start == row.char_start), None)
        if marked is None:  # a token of which several make one character
            continue
        values = [0.0] * len(tokens)
        values[marked] = float(row.score)
        yield {
            "id": f"{key['modelId']}-{key['layer']}-{number}", **key, "index": str(row.expert), "creatorId": "",
            "tokens": tokens, "values": values, "maxValue": values[marked], "minValue": min(values),
            "maxValueTokenIndex": marked,
        }  # fmt: skip


def _pieces(text: str, starts: Iterable[int], ends: Iterable[int]) -> list[str]:
    """Text of each token; of several that make one character the first has it, so that they join to the text."""
    found, done = [], 0
    for start, end in zip(starts, ends, strict=True):
        found.append(text[max(start, done) : end])
        done = max(done, end)
    return found


def _explanations(run: Run, layer: int, key: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    if not run.has("labels"):
        return
    labels = run.frame("labels")
    for row in plots.rows_of(labels[(labels["layer"] == layer) & (labels["status"] == "ok")]):
        yield {
            "id": f"{key['modelId']}-{key['layer']}-{row.expert}-{row.labeller}-{row.facet}", **key,
            "index": str(row.expert), "description": row.label, "authorId": "", "typeName": "moe-lens",
            "explanationModelName": row.model_id or row.labeller, "notes": "",
        }  # fmt: skip


def _floats(values: Iterable[Any]) -> list[float]:
    return [float(v) for v in values]


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    # no time in the header: the same run gives the same bytes
    path.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)
