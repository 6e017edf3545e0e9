"""``lexical_labels(...)``: what an expert's tokens look like, found by search and said by rule.

1. The sampled windows of the select split are cut into two halves by document.
2. Predicates over tokens and what stands before them are evaluated once (`sampled_text`, `candidates`).
3. Each expert's rule, up to four terms, is proposed on one half and kept as far as it helps on the other (`search`).
4. The rule is written as one regular expression (`predicates`) and as a sentence (`sentence`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_lens.autointerp.labels import label_frame
from moe_lens.autointerp.lexical.candidates import Candidates
from moe_lens.autointerp.lexical.predicates import rule_of
from moe_lens.autointerp.lexical.sampled_text import SampledText
from moe_lens.autointerp.lexical.search import Found, Search
from moe_lens.autointerp.lexical.sentence import legible, phrase, sentence
from moe_lens.types import Split, Status

if TYPE_CHECKING:
    import pandas as pd
    from jaxtyping import Bool
    from numpy import ndarray

    from moe_lens.capture.exemplars import TopExemplars
    from moe_lens.corpus.batches import Tokenized

LABELLER = "lexical"
LEAST_VISITS = 40
"""In each half; an expert with fewer has no label."""
NOT_HELD = "no token rule separates its tokens in the second half; this one was proposed for the first"
CONFIDENT_FROM = (0.1, 0.2, 0.35, 0.5)
"""J on the second half from which the confidence is 1, 2, 3 and 4."""
_PROMOTED = 2
_EXPERTS_AT_ONCE = 64


def lexical_labels(
    kept: TopExemplars,
    tokenized: Tokenized,
    tokenizer: Any,
    exemplars: pd.DataFrame,
    lens_table: pd.DataFrame | None = None,
    *,
    layers: Sequence[int] | None = None,
    experts: Collection[tuple[int, int]] | None = None,
    insist: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """A label with an executable rule for every expert, from the routing of the select split; no language model.

    Columns: `labels.LABEL_COLUMNS`. ``rule`` marks in a document exactly what was fitted: a token is positive iff
    one of its characters is in a match. ``label`` names the rule's terms, the one with most visits first, and what
    the expert writes toward, which is no part of the rule. ``evidence`` has a line per term: the share of visits it
    covers, and how many times likelier than any token its tokens are visits; then how many of the highest scores
    the rule covers. ``n_exemplars``: visits that were read. ``confidence``: 0 to 4, by J on the second half
    (`CONFIDENT_FROM`). ``status``: too_few below `LEAST_VISITS` in either half, abstained if no rule helps.

    Args:
        kept: filled from batches of `tokenized`; its sampled windows of the select split are what is fitted.
        exemplars: from `exemplar_table` on `kept`; of the select split, the highest scores.
        lens_table: from `logit_lens`, for what experts write toward.
        layers: all that were captured by default.
        experts: (layer, expert) pairs, all of `layers` by default.
        insist: where no rule holds on the second half, give the first one that was proposed, and say so in ``why``.
        seed: of the halves.

    Raises:
        BadCorpus: `kept` saw other windows than those of `tokenized`.
        OutOfRange: a layer that was not captured.

    The second half decides which terms stay, so a rule's own numbers flatter it: score it on validate. A rule says
    where an expert is chosen, not what it does there, and it is one of many that fit about as well.
    """
    from tqdm.auto import tqdm

    wanted = _wanted(kept, layers, experts)
    if not any(wanted.values()):
        return label_frame([])
    text = SampledText(kept, tokenized, tokenizer)
    proposing = _half(text, seed)
    search = Search(text, Candidates(text, proposing), proposing)
    high = exemplars[(exemplars["split"] == str(Split.SELECT)) & (exemplars["kind"] == "top")]
    high_of = dict(iter(high.groupby(["layer", "expert"])))
    promoted = _promoted(lens_table)
    rows = []
    total = sum(map(len, wanted.values()))
    with tqdm(total=total, desc="lexical labels", unit="expert", disable=None if progress else True) as bar:
        for layer, mine in wanted.items():
            for expert, routed, found in _rules(search, layer, mine, seed, insist=insist):
                row = {"layer": layer, "expert": expert, "labeller": LABELLER, "n_exemplars": int(routed.sum())}
                if isinstance(found, Found):
                    row |= _label(found, routed, promoted.get((layer, expert), []))
                    row["why"] = "" if found.held else NOT_HELD
                    row["evidence"] += _on_high_scores(text, row["rule"], high_of.get((layer, expert)))
                else:
                    row |= {"status": str(found), "why": _WHY[found]}
                rows.append(row)
                bar.update()
    return label_frame(rows)


_WHY = {
    Status.TOO_FEW: f"fewer than {LEAST_VISITS} visits in one half of the sampled select documents",
    Status.ABSTAINED: "no token rule separates its tokens",
}


def _wanted(
    kept: TopExemplars, layers: Sequence[int] | None, experts: Collection[tuple[int, int]] | None
) -> dict[int, list[int]]:
    """Experts to label, by layer."""
    chosen = kept.check_layers(layers)
    if experts is None:
        return {layer: list(range(len(kept.n_visits(layer, Split.SELECT)))) for layer in chosen}
    return {layer: sorted({e for at, e in experts if at == layer}) for layer in chosen}


def _half(text: SampledText, seed: int) -> Bool[ndarray, "token"]:
    """Tokens of the documents that propose."""
    documents = np.unique(text.document)
    mixed = np.random.default_rng(seed).permutation(documents)
    return np.isin(text.document, mixed[: (len(mixed) + 1) // 2])


def _rules(
    search: Search, layer: int, experts: Sequence[int], seed: int, *, insist: bool
) -> Iterator[tuple[int, Bool[ndarray, "token"], Found | Status]]:
    """Of each expert which tokens it got, and its rule or why it has none."""
    chosen = search.text.chosen(layer)
    for at in range(0, len(experts), _EXPERTS_AT_ONCE):
        part = np.array(experts[at : at + _EXPERTS_AT_ONCE])
        routed = (chosen[:, :, None] == part).any(1)
        few = np.minimum(routed[search.proposing].sum(0), routed[~search.proposing].sum(0)) < LEAST_VISITS
        gains = search.gains(routed)
        for i, expert in enumerate(part.tolist()):
            found = Status.TOO_FEW
            if not few[i]:
                rng = np.random.default_rng([seed, layer, expert])
                found = search.rule(routed[:, i], gains[:, i], rng, insist=insist) or Status.ABSTAINED
            yield expert, routed[:, i], found


def _label(found: Found, routed: Bool[ndarray, "token"], promoted: Sequence[str]) -> dict[str, Any]:
    covered = np.array([routed[bits].sum() for bits in found.bits])
    order = np.argsort(-covered, kind="stable").tolist()
    terms = [found.terms[i] for i in order]
    evidence = []
    for i in order:
        share = covered[i] / routed.sum()
        times = routed[found.bits[i]].mean() / routed.mean()
        evidence.append(f"{phrase(found.terms[i])}: covers {share:.0%} of visits, {times:.1f}x the base rate")
    confidence = int(np.searchsorted(CONFIDENT_FROM, found.j, side="right"))
    rule = rule_of(terms)
    return {"label": sentence(terms, promoted), "rule": rule, "evidence": evidence, "confidence": confidence}


def _on_high_scores(text: SampledText, rule: str, high: pd.DataFrame | None) -> list[str]:
    if high is None or not len(high):
        return []
    covered = text.fits(rule, high).sum()
    return [f"covers {covered} of its {len(high)} highest scores"]


def _promoted(lens_table: pd.DataFrame | None) -> dict[tuple[int, int], list[str]]:
    """By expert, of the tokens that its mean write promotes most, the first that can be shown."""
    if lens_table is None:
        return {}
    own = lens_table[lens_table["document"].isna()]
    places = zip(own["layer"].tolist(), own["expert"].tolist(), strict=True)
    return {
        at: [token for token in tokens if legible(token)][:_PROMOTED]
        for at, tokens in zip(places, own["promoted"], strict=True)
    }
