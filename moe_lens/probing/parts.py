"""Finished parts of an unfinished probing run, on disk: what ``--resume`` starts from.

A part is several files with one stem. The one that says "finished" is written last.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from moe_lens.capture.store import replacing, write_table
from moe_lens.probing.arms import REGISTRY, Evidence, ModelScores
from moe_lens.probing.nulls import NullDistribution, PipelineScores
from moe_lens.probing.polysemanticity import Polysemanticity
from moe_lens.types import Role

if TYPE_CHECKING:
    from numpy import ndarray

_SCORES = ("statistic", "auroc", "f1_balanced", "cell")


def write_model(part: Path, scores: ModelScores) -> None:
    """Store the scores of one model; the cells come last."""
    keys = pd.DataFrame(list(scores.counts), columns=["layer", "expert", "concept", "k"])
    values = np.stack(list(scores.counts.values())) if len(keys) else np.zeros((0, 0, 6))
    write_arrays(part.with_suffix(".npz"), {"counts": values, "d_ff": np.array(scores.d_ff)})
    write_table(part.with_suffix(".keys.parquet"), keys)
    for name, evidence in scores.evidence.items():
        write_arrays(part.with_suffix(f".{name}.npz"), {"counts": evidence.counts})
        write_table(part.with_suffix(f".{name}.parquet"), evidence.frame)
    if scores.null is not None:
        write_arrays(part.with_suffix(".null.npz"), _arrays_of(scores.null))
    write_table(part.with_suffix(".cells.parquet"), scores.cells)


def read_model(part: Path, role: Role, seed: int) -> ModelScores | None:
    """The scores that `write_model` stored, None if it did not finish."""
    if not part.with_suffix(".cells.parquet").exists():
        return None
    cells, keys = (pd.read_parquet(part.with_suffix(s)) for s in (".cells.parquet", ".keys.parquet"))
    with np.load(part.with_suffix(".npz")) as stored:
        counts, d_ff = stored["counts"], int(stored["d_ff"])
    names = zip(keys.layer.tolist(), keys.expert.tolist(), keys.concept.tolist(), keys.k.tolist(), strict=True)
    evidence = {}
    for name in REGISTRY:
        if (frame := part.with_suffix(f".{name}.parquet")).exists():
            with np.load(part.with_suffix(f".{name}.npz")) as stored:
                evidence[name] = Evidence(pd.read_parquet(frame), stored["counts"])
    null = None
    if (path := part.with_suffix(".null.npz")).exists():
        with np.load(path) as stored:
            null = _null_of(stored)
    return ModelScores(role.value, seed, d_ff, cells, dict(zip(names, counts, strict=True)), evidence, null)


def write_neurons(part: Path, found: Polysemanticity) -> None:
    """Store both tables; that of the layers comes last."""
    write_table(part.with_suffix(".table.parquet"), found.neurons)
    write_table(part.with_suffix(".layers.parquet"), found.layers)


def read_neurons(part: Path) -> Polysemanticity | None:
    """What `write_neurons` stored, None if it did not finish."""
    if not part.with_suffix(".layers.parquet").exists():
        return None
    return Polysemanticity(*(pd.read_parquet(part.with_suffix(f".{name}.parquet")) for name in ("table", "layers")))


def write_arrays(path: Path, arrays: Mapping[str, ndarray]) -> None:
    """Write an ``.npz`` file, atomically."""
    with replacing(path) as temporary, open(temporary, "wb") as handle:
        np.savez_compressed(handle, allow_pickle=False, **arrays)


def _arrays_of(null: NullDistribution) -> dict[str, ndarray]:
    """Of every k; names of arrays end in it where it is not 1."""
    out = {"names": np.array(null.names), "address": null.address, "kept": null.kept, **_scores_of(null, "")}
    for k, more in null.larger.items():
        out |= _scores_of(more, f"_{k}")
    return {**out, "larger": np.array(sorted(null.larger), np.int64)}


def _scores_of(null: NullDistribution, end: str) -> dict[str, ndarray]:
    kinds = {"observed": null.observed, "null": null.null}
    scores = {f"{kind}_{name}{end}": getattr(found, name) for kind, found in kinds.items() for name in _SCORES}
    return scores | ({f"n_cells{end}": null.n_cells} if null.n_cells is not None else {})


def _null_of(stored: Mapping[str, ndarray], end: str = "") -> NullDistribution:
    observed, null = (PipelineScores(*(stored[f"{kind}_{n}{end}"] for n in _SCORES)) for kind in ("observed", "null"))
    # a part of an older version knows k = 1 only
    larger = {} if end or "larger" not in stored else {int(k): _null_of(stored, f"_{k}") for k in stored["larger"]}
    n_cells = stored.get(f"n_cells{end}")
    return NullDistribution(
        tuple(stored["names"].tolist()), stored["address"], observed, null, stored["kept"], n_cells, larger
    )
