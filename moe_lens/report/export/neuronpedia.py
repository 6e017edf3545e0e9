"""One feature per expert, in the layout of Neuronpedia's bulk import.

    MODEL/LAYER-moe-experts/{release,model,sourceset,source}.jsonl
    MODEL/LAYER-moe-experts/{features,activations,explanations}/batch-0.jsonl.gz
    config/{explanation_type,explanation_model_type}.jsonl     what the explanations refer to

Columns are those of Neuronpedia's database (its schema.prisma, MIT): its importer takes from the first line of a file
which columns there are, and refuses a file without lines, so no such file is written.

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
from moe_lens.report.sections.provenance import without_folders
from moe_lens.types import Split

if TYPE_CHECKING:
    from pathlib import Path

    from moe_lens.capture.run import Run

SET = "moe-experts"
RELEASE = TYPE = "moe-lens"
CREATOR = "clkht01d40000jv08hvalcvly"
"""Creator of everything that Neuronpedia imports, in the code that it publishes; activations of others are hidden."""
_README = """# {model}: routed experts for Neuronpedia

Made by moe-lens {version} from a run on `{corpus}`; one source per layer, one feature per routed expert that has
exemplars. {note}

- Own instance of [Neuronpedia](https://github.com/hijohnnylin/neuronpedia): upload this folder as it is under the
  prefix of its data sets' bucket (`{home}/` beside the models that are there, `config/` beside theirs), and import
  model and sources in its admin panel. Files of `config/` add their lines to those that are there.
- neuronpedia.org takes new sources from its team: ask there, with a link to this folder.

The activations quote the text that the run read: see to its licence before you pass them on.
"""
_NOTE = "Values are router weight times norm of the expert's output at the marked token, and 0 elsewhere."


def write(run: Run, folder: Path) -> None:
    """One folder per layer.

    Raises:
        BadOutput: the run has no exemplars.
    """
    if not run.has("exemplars"):
        raise BadOutput(f"{run.path} holds no exemplars: run moe-lens autointerp --model ... -o {run.path} first")
    manifest = without_folders(run.manifest)
    model = re.sub(r"[^a-z0-9.-]+", "-", manifest["model"]["name"].lower().rsplit("/", 1)[-1]).strip("-")
    exemplars = run.frame("exemplars")
    exemplars = exemplars[(exemplars["split"] == Split.SELECT.value) & exemplars["routed"]]
    exemplars = exemplars[exemplars["kind"].isin(["top", "quantile"])]
    for layer, rows in exemplars.groupby("layer"):
        number = int(str(layer))
        source = f"{number}-{SET}"
        home = folder / model / source
        home.mkdir(parents=True)
        for name, row in _about(run, model, source).items():
            _write_lines(home / f"{name}.jsonl", [row])
        key = {"modelId": model, "layer": source}
        for name, found in (
            ("features", _features(run, number, key, rows)),
            ("activations", _activations(rows, key)),
            ("explanations", _explanations(run, number, key)),
        ):
            if lines := list(found):
                (home / name).mkdir()
                _write_lines(home / name / "batch-0.jsonl.gz", lines)
    for name, found in _config(run).items():
        (folder / "config").mkdir(exist_ok=True)
        _write_lines(folder / "config" / f"{name}.jsonl", found)
    readme = _README.format(
        model=manifest["model"]["name"], version=manifest["packages"]["moe-lens"], corpus=manifest["corpus"]["id"],
        note=_NOTE, home=model,
    )  # fmt: skip
    (folder / "README.md").write_text(readme, encoding="utf-8")


def _about(run: Run, model: str, source: str) -> dict[str, dict[str, Any]]:
    manifest = without_folders(run.manifest)
    name, corpus = manifest["model"]["name"], manifest["corpus"]
    owner = name.split("/")[0] if name.count("/") == 1 else "moe-lens"
    layers, experts = (int(run.frame("exemplars")[column].max()) + 1 for column in ("layer", "expert"))
    if run.has("routing"):
        layers, experts = (int(run.routing[column].max()) + 1 for column in ("layer", "expert"))
    shared = {"creatorId": CREATOR, "visibility": "PUBLIC", "createdAt": manifest["created"]}
    by = {"creatorName": "moe-lens", **shared}
    return {
        "release": {"name": RELEASE, "description": "experts of Mixture-of-Experts models", **by},
        "model": {"id": model, "displayName": name, "displayNameShort": name.rsplit("/", 1)[-1], "instruct": False,
                  "owner": owner, "layers": layers, "neuronsPerLayer": experts, **shared},
        "sourceset": {"modelId": model, "name": SET, "description": "routed experts", "type": "moe-expert",
                      "releaseName": RELEASE, **by},
        "source": {"id": source, "modelId": model, "setName": SET, "notes": _NOTE, "dataset": corpus["id"],
                   "num_prompts": corpus["n_documents"], **shared},
    }  # fmt: skip


def _config(run: Run) -> dict[str, list[dict[str, Any]]]:
    """The kind of explanation and the models that wrote them, which explanations name."""
    if not run.has("labels"):
        return {}
    labels = run.frame("labels")
    names = {row.model_id or row.labeller: row.labeller for row in plots.rows_of(labels[labels["status"] == "ok"])}
    kind = {"name": TYPE, "displayName": "moe-lens label", "creatorName": "moe-lens", "creatorId": CREATOR,
            "description": "what tokens an expert is visited by, from exemplars"}  # fmt: skip
    models = [
        {
            "name": name,
            "displayName": name,
            "description": f"labeller {labeller} of moe-lens",
            "creatorName": "moe-lens",
        }
        for name, labeller in names.items()
    ]
    return {"explanation_type": [kind], "explanation_model_type": models} if models else {}


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
            **key, "index": str(expert), "sourceSetName": SET, "creatorId": CREATOR, "maxActApprox": float(score),
            "hasVector": False, "vector": [], "hookName": f"layers.{layer}.mlp.experts.{expert}",
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
            "id": f"{key['modelId']}-{key['layer']}-{number}", **key, "index": str(row.expert), "creatorId": CREATOR,
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
            "index": str(row.expert), "description": row.label, "authorId": CREATOR, "typeName": TYPE,
            "explanationModelName": row.model_id or row.labeller,
        }  # fmt: skip


def _floats(values: Iterable[Any]) -> list[float]:
    return [float(v) for v in values]


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    # no time in the header: the same run gives the same bytes
    path.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)
