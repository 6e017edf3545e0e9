"""Exemplars, logit lens and labels of experts that exist on paper only: every text is different, every mark known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from moe_lens.autointerp.exemplars import COLUMNS, POSITIVES
from moe_lens.autointerp.labels import label_frame

EXPERTS = ((0, 0), (0, 1), (3, 0), (3, 7))
COUNTS = {
    "top": 20, "quantile": 20, "random": 20, "negative_random": 12, "negative_same_token": 12,
    "negative_near_miss": 12, "negative_other": 12,
}  # fmt: skip
WORDS = 32


def exemplar_rows(
    experts: Sequence[tuple[int, int]] = EXPERTS, counts: Mapping[str, int] = COUNTS, seed: int = 0
) -> pd.DataFrame:
    """The columns of ``exemplar_table``. No word names kind or expert; a same_token negative has a positive's word."""
    rows = []
    document = 0
    for layer, expert in experts:
        for split in ("select", "validate"):
            rng = np.random.default_rng([seed, layer, expert, split == "select"])
            ids = rng.integers(100, 140, 400)
            for kind, n in counts.items():
                for i in range(n):
                    routed = kind in POSITIVES
                    word = int(ids[i % 20] if kind == "negative_same_token" else ids[20 + i] + 100 * (not routed))
                    rows.append(_row(rng, word if not routed or i % 2 else int(ids[i % 20]), document, routed))
                    rows[-1] |= {"layer": layer, "expert": expert, "split": split, "kind": kind}
                    document += 1
    frame = pd.DataFrame(rows)
    positive = frame["kind"].isin(POSITIVES)
    by_expert = frame["score"].where(positive).groupby([frame["layer"], frame["expert"], frame["split"]])
    return frame.assign(quantile=by_expert.rank(pct=True) - 0.001)[list(COLUMNS)]


def _row(rng: np.random.Generator, word: int, document: int, routed: bool) -> dict[str, object]:
    focal = int(rng.integers(1, WORDS))
    words = [f"w{number}" for number in rng.integers(0, 100, WORDS)]
    words[focal] = f"w{word}"
    words[0] = f"d{document}"
    ends = np.cumsum([len(one) + 1 for one in words]) - 1
    starts = ends - [len(one) for one in words]
    return {
        "score": float(rng.gamma(1.0)) + 0.01 if routed else 0.0, "weight": 0.5 * routed, "routed": routed,
        "document": document, "window_char": 0, "position": focal, "token_id": word, "token": words[focal],
        "text": " ".join(words), "char_start": int(starts[focal]), "char_end": int(ends[focal]),
        "token_starts": starts, "token_ends": ends, "routed_tokens": (np.arange(WORDS) == focal) & routed,
        "status": "ok",
    }  # fmt: skip


def lens_rows(experts: Sequence[tuple[int, int]] = EXPERTS) -> pd.DataFrame:
    """The columns of ``logit_lens`` that labellers read: an expert's own row, and one of an exemplar."""
    rows = [
        {"layer": layer, "expert": expert, "document": document, "promoted": promoted}
        for layer, expert in experts
        for document, promoted in (
            (pd.NA, [f"up{layer}x{expert}", " the\n", "\N{REPLACEMENT CHARACTER}"]),
            (5, ["not"]),
        )
    ]
    return pd.DataFrame(rows).astype({"document": "Int64"})


def label_rows(experts: Sequence[tuple[int, int]] = EXPERTS) -> pd.DataFrame:
    """A label for each expert, different from all others."""
    names = ("brackets", "verbs", "numbers", "names", "colours", "rivers", "hinges", "tenses")
    return label_frame(
        {"layer": layer, "expert": expert, "label": f"{names[i % 8]} {i}"} for i, (layer, expert) in enumerate(experts)
    )
