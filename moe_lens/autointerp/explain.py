"""``explain(client, ...)``: labels for experts, written by a language model that sees examples.

1. Positives of the select split: high scores, visits from every stratum of the score, visits at random. A label made
   of the highest scores alone describes the tip (peers' lesson); most of what an expert does is weaker.
2. Negatives: the same tokens where they were not routed, near misses, random tokens, other experts' examples.
   arXiv 2604.02178 shows its labeller none.
3. One prompt per expert (``prompts/explain.md``, or ``facets.md`` for several labels), which shows at each example
   one marked token, and the tokens that the expert promotes by logit lens.
4. A row per label. A labeller that found nothing, refused or broke down leaves a row without one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from moe_lens.autointerp.client import Reply, Request
from moe_lens.autointerp.exemplars import POSITIVES
from moe_lens.autointerp.facets import facets_schema
from moe_lens.autointerp.labels import label_frame
from moe_lens.autointerp.prompts import load_prompt, marked, plain, prompt_hash
from moe_lens.autointerp.replies import Outcome, ReplySchema
from moe_lens.errors import BadConfig
from moe_lens.types import Split, Status

if TYPE_CHECKING:
    from moe_lens.autointerp.client import Client

N_POSITIVE, N_NEGATIVE = 20, 10
_POSITIVE_SHARES = {"top": 0.25, "quantile": 0.5, "random": 0.25}
_NEGATIVE_SHARES = {
    "negative_same_token": 0.4, "negative_near_miss": 0.2, "negative_random": 0.2, "negative_other": 0.2,
}  # fmt: skip
_EXPERT = ["layer", "expert"]
_MARKED = [*_EXPERT, "text", "char_start", "char_end"]
_PLACE = [*_EXPERT, "document", "window_char", "position"]
_NOTHING_FOUND = "the labeller found nothing that separates them"
_STATUS = {Outcome.REFUSED: Status.REFUSED, Outcome.FAILED: Status.FAILED, Outcome.BUDGET: Status.NOT_RUN}
_NUMBERS = re.compile(r"[RN]\d+(?:[,; ]+[RN]\d+)*")


class ExplainQuestion(NamedTuple):
    """One expert's request. ``shown`` is the text of its examples by number (``R1``, ``N1``)."""

    layer: int
    expert: int
    request: Request
    n_exemplars: int
    shown: Mapping[str, str]


def explain_requests(
    exemplars: pd.DataFrame,
    lens_table: pd.DataFrame | None,
    *,
    experts: Sequence[tuple[int, int]] | None = None,
    corpus_name: str,
    n_positive: int = N_POSITIVE,
    n_negative: int = N_NEGATIVE,
    facets: int = 0,
) -> list[ExplainQuestion]:
    """What a labeller is asked, by layer and expert. ``Client.predict`` says what the requests would cost.

    Args:
        exemplars: as from ``exemplar_table``; only rows of the select split are read.
        lens_table: as from ``logit_lens``; None where there is none.
        experts: layer and expert of each, all in `exemplars` by default. One that was never visited has no question.
        corpus_name: what the text is, in words for the labeller.
        n_positive: routed examples to show: a quarter high scores, half from every stratum of the score, a quarter at
            random; more of the others where one kind runs short.
        n_negative: examples not routed: two fifths with a token id of the others, the rest in equal parts near
            misses, random tokens and high scores of other experts.
        facets: 0 for one label, 1 to 5 for up to that many.

    Raises:
        BadConfig: a number that cannot be used.
    """
    if n_positive < 1 or n_negative < 0:
        raise BadConfig(f"n_positive={n_positive} and n_negative={n_negative}: give at least 1 and at least 0")
    schema = facets_schema(facets) if facets else ReplySchema.explanation()
    prompt = load_prompt("facets" if facets else "explain")
    positives, negatives = _choose(_of_experts(exemplars, experts), n_positive, n_negative)
    promoted = _promoted(lens_table)
    not_routed = {at: rows["shown"].tolist() for at, rows in _by_expert(negatives)}
    questions = []
    for (layer, expert), rows in _by_expert(positives):
        routed, others = rows["shown"].tolist(), not_routed.get((layer, expert), [])
        messages = prompt.render(
            layer=layer,
            expert=expert,
            corpus=plain(corpus_name),
            positives=[{"strength": n, "text": text} for n, text in zip(rows["strength"], routed, strict=True)],
            negatives=[{"text": text} for text in others],
            logit_lens=promoted.get((layer, expert), ""),
            most=facets,
        )
        shown = {
            f"{letter}{i}": text for letter, texts in (("R", routed), ("N", others)) for i, text in enumerate(texts, 1)
        }
        questions.append(ExplainQuestion(layer, expert, Request(messages, schema), len(rows), shown))
    return questions


def explain(
    client: Client,
    exemplars: pd.DataFrame,
    lens_table: pd.DataFrame | None,
    *,
    experts: Sequence[tuple[int, int]] | None = None,
    corpus_name: str,
    n_positive: int = N_POSITIVE,
    n_negative: int = N_NEGATIVE,
    facets: int = 0,
    labeller: str | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Labels of experts by the model behind `client`, a table of ``labels.LABEL_COLUMNS``.

    One row per expert (``facet`` 0), or one per facet (1, 2, ...). A row without a label has status too_few (never
    visited in the select split: nobody is asked), abstained (nothing separates the examples, or no usable reply),
    refused, failed (no reply: the next run asks again) or not_run (the budget was spent), and says why.
    ``n_exemplars`` is the number of routed examples shown, few for a rare expert. ``evidence`` holds the examples
    that the model named, as they were shown.

    Args: as ``explain_requests``; `labeller` is the name in the table, ``openai:MODEL`` by default.

    Raises:
        BadConfig: a number that cannot be used; a wrong key, address or model.
        BadOutput: the cache of replies cannot be read.
        WriteFailed: it cannot be written.

    ``confidence`` is the model's own word. Only scoring shows whether a label holds.
    """
    questions = explain_requests(
        exemplars, lens_table, experts=experts, corpus_name=corpus_name, n_positive=n_positive, n_negative=n_negative,
        facets=facets,
    )  # fmt: skip
    replies = client.ask_all([question.request for question in questions], progress=progress, describe="label")
    rows = [row for question, reply in zip(questions, replies, strict=True) for row in _rows(question, reply)]
    asked = {(question.layer, question.expert) for question in questions}
    for layer, expert in sorted(_wanted(exemplars, experts) - asked):
        rows.append(_without(layer, expert, Status.TOO_FEW, "no visit in the texts that explain", bool(facets)))
    said_by = {
        "labeller": labeller or f"openai:{client.model}",
        "model_id": client.model,
        "prompt_hash": prompt_hash("facets" if facets else "explain"),
    }
    return label_frame({**row, **said_by} for row in rows)


def _of_experts(exemplars: pd.DataFrame, experts: Sequence[tuple[int, int]] | None) -> pd.DataFrame:
    """The select rows of the wanted experts, without random tokens that were routed."""
    rows = exemplars[exemplars["split"] == str(Split.SELECT)]
    rows = rows[rows["routed"] == rows["kind"].isin(POSITIVES)]
    if experts is None:
        return rows
    return rows[pd.MultiIndex.from_frame(rows[_EXPERT]).isin(list(experts))]


def _wanted(exemplars: pd.DataFrame, experts: Sequence[tuple[int, int]] | None) -> set[tuple[int, int]]:
    if experts is not None:
        return set(experts)
    return set(exemplars[_EXPERT].drop_duplicates().itertuples(index=False, name=None))


def _choose(rows: pd.DataFrame, n_positive: int, n_negative: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The examples to show, strongest first and same tokens first, with what is shown of them."""
    # by content, so that the choice depends on no other expert and on no order of rows
    rows = rows.assign(lot=pd.util.hash_pandas_object(rows[_PLACE], index=False).to_numpy())
    rows = rows.assign(positive=rows["kind"].isin(POSITIVES)).sort_values(["positive", "lot"], ascending=[False, True])
    rows = rows.drop_duplicates(_MARKED)  # also the token of a positive seen as a negative: two bytes of one letter
    positives, negatives = rows[rows["positive"]], rows[~rows["positive"]]
    best = positives.groupby(_EXPERT)["score"].transform("max")
    strength = (100 * positives["score"] / best.where(best > 0, np.inf)).round().astype(int)
    positives = _share_out(_in_turn(positives.assign(strength=strength)), _POSITIVE_SHARES, n_positive)
    positives = positives.sort_values([*_EXPERT, "score", "lot"], ascending=[True, True, False, True])
    seen = pd.MultiIndex.from_frame(positives[[*_EXPERT, "token_id"]])
    strange = ~pd.MultiIndex.from_frame(negatives[[*_EXPERT, "token_id"]]).isin(seen)
    negatives = negatives.assign(turn=strange.astype(int), tie=negatives["lot"])
    negatives = _share_out(negatives, _NEGATIVE_SHARES, n_negative)
    order = negatives["kind"].map({kind: i for i, kind in enumerate(_NEGATIVE_SHARES)})
    negatives = negatives.assign(order=order).sort_values([*_EXPERT, "order", "lot"])
    return _with_marks(positives), _with_marks(negatives)


def _in_turn(positives: pd.DataFrame) -> pd.DataFrame:
    """With `turn` and `tie`, which say what to take first: the highest score of every document before its second,
    one visit of every quarter of the score before another, and visits at random as they come."""
    by_score = positives.sort_values("score", ascending=False)
    of_document = by_score.groupby([*_EXPERT, "kind", "document"]).cumcount().reindex(positives.index)
    quarter = (positives["quantile"].fillna(0) * 4).astype(int).rename("quarter")
    of_quarter = positives.groupby([*_EXPERT, "kind", quarter]).cumcount()
    top, spread = positives["kind"] == "top", positives["kind"] == "quantile"
    turn = np.select([top, spread], [of_document, of_quarter], 0)
    return positives.assign(turn=turn, tie=np.where(top, -positives["score"], positives["lot"]))


def _share_out(rows: pd.DataFrame, shares: Mapping[str, float], n: int) -> pd.DataFrame:
    """`n` rows per expert, of each kind its share; where one kind runs short, more of the others."""
    rows = rows.sort_values([*_EXPERT, "kind", "turn", "tie"])
    place = rows.groupby([*_EXPERT, "kind"]).cumcount() + 0.5
    rows = rows.assign(due=place / rows["kind"].map(shares).astype(float)).sort_values([*_EXPERT, "due", "kind"])
    return rows[rows.groupby(_EXPERT).cumcount() < n]


def _by_expert(rows: pd.DataFrame) -> Iterator[tuple[tuple[int, int], pd.DataFrame]]:
    """Layer and expert, and their rows."""
    places: dict[Any, Any] = rows.groupby(_EXPERT).indices
    for (layer, expert), at in places.items():
        yield (int(layer), int(expert)), rows.iloc[at]


def _with_marks(rows: pd.DataFrame) -> pd.DataFrame:
    texts = zip(rows["text"], rows["char_start"], rows["char_end"], strict=True)
    return rows.assign(shown=[marked(text, start, end) for text, start, end in texts])


def _promoted(lens_table: pd.DataFrame | None) -> dict[tuple[int, int], str]:
    """Promoted tokens by expert, quoted; pieces of letters, which no text can show, are left out."""
    if lens_table is None:
        return {}
    own = lens_table[lens_table["document"].isna()]
    return {
        (int(layer), int(expert)): ", ".join(
            plain(json.dumps(word, ensure_ascii=False)) for word in words if "\N{REPLACEMENT CHARACTER}" not in word
        )
        for layer, expert, words in zip(own["layer"], own["expert"], own["promoted"], strict=True)
    }


def _rows(question: ExplainQuestion, reply: Reply) -> list[dict[str, Any]]:
    """The rows of one expert."""
    several = question.request.schema.name == "facets"
    place = (question.layer, question.expert)
    if reply.status is not Outcome.OK:
        status = _STATUS.get(reply.status, Status.ABSTAINED)
        return [_without(*place, status, reply.why, several) | {"n_exemplars": question.n_exemplars}]
    found = reply.value.facets if several else [reply.value]
    if not found or found[0].label is None:
        nothing = _without(*place, Status.ABSTAINED, _NOTHING_FOUND, several)
        return [nothing | {"n_exemplars": question.n_exemplars}]
    return [
        {
            "layer": question.layer,
            "expert": question.expert,
            "facet": number if several else 0,
            "label": one.label,
            "n_exemplars": question.n_exemplars,
            "confidence": one.confidence,
            "evidence": _looked_up(one.evidence, question.shown),
        }
        for number, one in enumerate(found, start=1)
    ]


def _without(layer: int, expert: int, status: Status, why: str, several: bool) -> dict[str, Any]:
    return {"layer": layer, "expert": expert, "facet": int(several), "status": str(status), "why": why}


def _looked_up(evidence: Sequence[str], shown: Mapping[str, str]) -> list[str]:
    """The examples behind the numbers; anything else that was said stays as it is."""
    found = []
    for said in evidence:
        if not _NUMBERS.fullmatch(said.strip()):
            found.append(said)
            continue
        numbers = re.findall(r"[RN]\d+", said)
        found += [f"{'routed' if number[0] == 'R' else 'not routed'}: {shown.get(number, '?')}" for number in numbers]
    return found
