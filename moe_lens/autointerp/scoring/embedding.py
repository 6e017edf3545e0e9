"""``embedding_answers(client, labels, items)``: how near a label and a marked text are, by an embeddings model.

A judge that reads nothing but resemblance: the score is the cosine of the embedding of the label and of the embedding
of the item as a chat model would see it, mark included. It is cheap, and a floor for what reading adds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from moe_lens.autointerp.labels import KEY, usable
from moe_lens.autointerp.prompts import marked, plain
from moe_lens.autointerp.replies import Outcome
from moe_lens.autointerp.scoring.judge import ANSWER_COLUMNS

if TYPE_CHECKING:
    from moe_lens.autointerp.client import Client, Embedding

EMBEDDING = "embedding"


def embedding_texts(labels: pd.DataFrame, items: pd.DataFrame) -> list[str]:
    """What ``embedding_answers`` embeds, each text once; for ``Client.predict_embeddings``."""
    asked = _asked(labels, items)
    return list(dict.fromkeys([*asked["label"], *asked["shown"]]))


def embedding_answers(
    client: Client, labels: pd.DataFrame, items: pd.DataFrame, *, control: str = "none", progress: bool = True
) -> pd.DataFrame:
    """Similarity of every label and every item of its expert, a row each: ``ANSWER_COLUMNS``.

    ``score`` is a cosine, NaN where one of the two texts has no embedding; ``outcome`` says why.

    Args:
        client: its model is asked for embeddings (``/v1/embeddings``).
        labels: as from ``label_frame``; rows without a label are passed over.
        items: as from ``make_items``.
        control: as in ``judge``.

    Raises:
        BadConfig: a wrong key, address or model.
        BadOutput: the cache of replies cannot be read.
        WriteFailed: it cannot be written.

    Cosines have no zero that means anything and no common scale: compare items of one label by rank (AUROC). The
    embedding of a whole text hardly depends on where its mark is, so that this judge cannot tell moved marks.
    """
    asked = _asked(labels, items)
    found = client.embed_all(list(dict.fromkeys([*asked["label"], *asked["shown"]])), progress=progress)
    pairs = [_similarity(found[a], found[b]) for a, b in zip(asked["label"], asked["shown"], strict=True)]
    score, outcome = zip(*pairs, strict=True) if pairs else ((), ())
    score = np.array(score, np.float32)
    answers = asked.assign(scorer=EMBEDDING, control=control, score=score, outcome=list(outcome))
    return answers[list(ANSWER_COLUMNS)].sort_values([*KEY, "item"], ignore_index=True)


def _asked(labels: pd.DataFrame, items: pd.DataFrame) -> pd.DataFrame:
    """Every pair of a label and an item, as they are written for the model."""
    texts = zip(items["text"], items["char_start"], items["char_end"], strict=True)
    shown = items[["layer", "expert", "item"]].assign(shown=[marked(*text) for text in texts])
    mine = usable(labels)[[*KEY, "label"]]
    return mine.assign(label=[plain(label) for label in mine["label"]]).merge(shown, on=["layer", "expert"])


def _similarity(one: Embedding, other: Embedding) -> tuple[float, str]:
    """Cosine and outcome of one pair."""
    if one.vector is None or other.vector is None:
        return np.nan, str(one.status if one.vector is None else other.status)
    lengths = np.linalg.norm(one.vector) * np.linalg.norm(other.vector)
    return float(one.vector @ other.vector / lengths), str(Outcome.OK)
