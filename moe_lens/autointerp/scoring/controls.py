"""Labels given to the wrong experts: what a score is worth that any label of the layer would get (METRICS 1.6)."""

from __future__ import annotations

import numpy as np
import pandas as pd

from moe_lens.autointerp.labels import KEY, usable


def shuffled(labels: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """`labels` with every expert's label, rule and facets replaced by those of another expert of its layer.

    Every expert gives and gets once. Experts in random order, those with the same label next to each other, are
    moved on by the size of the largest such group: then no expert gets its own words back, unless more than half of
    the layer have one label. A layer in which a single expert has a label has no rows, nor have rows without a label.

    Args:
        labels: as in ``labels.parquet``.
        seed: of the order; a layer's draw does not depend on the other layers.

    Does not show what a label says beyond its layer's usual text: labels of one layer can be alike in what they fit.
    """
    rows = usable(labels)
    layers = sorted(set(rows["layer"].tolist()))
    parts = [_moved_on(rows[rows["layer"] == layer], np.random.default_rng([seed, layer])) for layer in layers]
    moved = pd.concat([rows.iloc[:0], *parts])
    return moved.sort_values(list(KEY), ignore_index=True)


def _moved_on(rows: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """The labels of one layer, each under the number of another expert."""
    words = rows.fillna({"rule": ""}).groupby("expert").agg({"label": tuple, "rule": tuple})
    alike = words.groupby(["label", "rule"], sort=False).ngroup()
    experts, group = words.index.to_numpy(), alike.to_numpy()
    if len(experts) < 2:
        return rows.iloc[:0]
    order = rng.permutation(len(experts))
    order = order[np.argsort(rng.permutation(len(experts))[group[order]], kind="stable")]
    largest = int(np.bincount(group).max())
    step = largest if largest < len(experts) else 1
    receiver = dict(zip(experts[order], experts[np.roll(order, -step)], strict=True))
    return rows.assign(expert=rows["expert"].map(receiver))
