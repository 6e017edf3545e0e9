"""``shuffled_labels(captured)``: labels made by the same labeller from shuffled activations (METRICS 3, item 6).

What a label owes to the labeller and not to the expert: the words it finds where text and expert have nothing to do
with each other.

``lexical``
    Per layer, the routing of the sampled select tokens is taken document after document in a random order, each
    rotated by a random number of tokens, and laid over the same tokens. Every expert keeps its number of tokens, the
    company of the experts chosen beside it, its bursts, which are what fools a search, and its number of documents
    (exactly if all are of one length); only the text is no longer that of its tokens.
``openai:MODEL, gguf:FILE``
    Per layer, the examples of the select split change owners: of each kind an expert gets as many as before, drawn
    from those of all experts of the layer, and with them the scores of its own.

What an expert writes toward is left out of the labels: it was not shuffled.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from moe_lens.autointerp.endpoint import LEXICAL, read_name
from moe_lens.autointerp.exemplars import NEGATIVES, POSITIVES
from moe_lens.capture.exemplars import TopExemplars
from moe_lens.corpus.splits import code_of
from moe_lens.errors import BadConfig
from moe_lens.types import Split

if TYPE_CHECKING:
    import pandas as pd
    from jaxtyping import Int
    from numpy import ndarray
    from torch import Tensor

    from moe_lens.autointerp.captured import Captured
    from moe_lens.autointerp.endpoint import Clients
    from moe_lens.capture.window_sample import WindowSample

_PLACE = (
    "document", "window_char", "position", "token_id", "token", "text", "char_start", "char_end", "token_starts",
    "token_ends", "routed_tokens",
)  # fmt: skip
"""Columns of the exemplars that say where a token stands; the others say what it is to its expert."""


def shuffled_labels(
    captured: Captured,
    *,
    experts: Collection[tuple[int, int]] | None = None,
    labeller: str = LEXICAL,
    clients: Clients | None = None,
    insist: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """A table of labels (``labels.LABEL_COLUMNS``) that say nothing about their experts.

    The lexical labeller keeps a rule only if documents that did not propose it bear it out, and of shuffled routing
    hardly any rule is. That is a result by itself, but leaves nothing to try; with `insist` its first proposal
    stands for the label then, and ``why`` says so. Labels with an empty ``why`` are those that it would have given.

    Args:
        captured: of a run directory, from ``captured_of(run, corpus, tokenizer)``; else from ``capture_exemplars``.
        experts: (layer, expert) pairs, all that were captured by default.
        labeller: ``lexical``, ``openai:MODEL`` or ``gguf:FILE``: the one that the real labels are from.
        clients: speak for the latter two.
        insist: of the lexical labeller, see above.
        seed: of the shuffle; and of the halves, as in ``lexical_labels``.

    Raises:
        BadConfig: another labeller, or a language model without `clients`.
        BadConfig, BadOutput, WriteFailed: as ``explain``, of a language model.
        NoServer: its server answered no request.

    Not every such label is false: a search over noise can hit on a property that the expert's tokens have. Examples
    that change owners within a layer leave what the tokens of the whole layer have in common, and an expert keeps
    about one in as many as there are experts.
    """
    name = read_name(labeller, option="--labeller", without_model=LEXICAL)
    layers = sorted({layer for layer, _ in experts}) if experts is not None else captured.kept.layers
    if name.kind == LEXICAL:
        from moe_lens.autointerp.lexical import lexical_labels

        return lexical_labels(
            shuffled_routing(captured.kept, seed=seed),
            captured.tokenized,
            captured.tokenizer,
            captured.exemplars[:0],  # those of the real routing
            layers=layers,
            experts=experts,
            insist=insist,
            seed=seed,
            progress=progress,
        )
    if clients is None:
        raise BadConfig(f"{name} writes labels through a server: pass clients= that speak for it")
    from moe_lens.autointerp.explain import explain

    found = explain(
        clients.of(name),
        shuffled_exemplars(captured.exemplars, seed=seed),
        None,
        experts=None if experts is None else sorted(experts),
        corpus_name=captured.tokenized.corpus.name,
        labeller=str(name),
        progress=progress,
    )
    clients.check()
    return found


def shuffled_routing(kept: TopExemplars, *, seed: int = 0) -> TopExemplars:
    """`kept` with the routing of its sampled select windows shuffled as above; its visits are as they were.

    A layer's shuffle does not depend on which other layers are there.
    """
    at, document = _select_tokens(kept.windows)
    state = kept.state_dict()
    for layer in kept.layers:
        name = f"windows.chosen.{layer}"
        to, source = _moves(document, np.random.default_rng([seed, layer]))
        chosen = state[name].clone()
        chosen[at[to]] = state[name][at[source]]
        state[name] = chosen
    shuffled = TopExemplars(
        kept.splits.numpy(),
        n_top=kept.n_top,
        n_sample=kept.n_sample,
        window_tokens=kept.windows.max_tokens,
        directions=kept.directions,
        seed=kept.seed,
    )
    shuffled.load_state_dict(state)
    return shuffled


def _select_tokens(sample: WindowSample) -> tuple[Int[Tensor, "eligible"], Int[ndarray, "eligible"]]:
    """Eligible tokens of the select windows, as rows of the sample, and the document of each."""
    length = sample.column("length")
    select = (sample.column("split") == code_of(Split.SELECT)).repeat_interleave(length)
    at = (select & sample.column("eligible")).nonzero().squeeze(1)
    return at, sample.column("document").repeat_interleave(length)[at].numpy()


def _moves(
    document: Int[ndarray, "eligible"], rng: np.random.Generator
) -> tuple[Int[ndarray, "eligible"], Int[ndarray, "eligible"]]:
    """Where routing goes to, document after document; and where it is from, documents in another order and rotated."""
    _, number = np.unique(document, return_inverse=True)
    length = np.bincount(number)
    order, shift = rng.permutation(len(length)), rng.integers(np.maximum(length, 1))
    turn = np.argsort(order)  # of each document
    length, shift = length[order], shift[order]
    first = np.cumsum(length) - length
    place = np.arange(len(number)) - np.repeat(first, length)
    rotated = np.repeat(first, length) + (place + np.repeat(shift, length)) % np.repeat(length, length)
    return np.argsort(number, kind="stable"), np.argsort(turn[number], kind="stable")[rotated]


def shuffled_exemplars(exemplars: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """The select rows of `exemplars`, those of one layer and kind in each other's places.

    Negatives with the token id of an example are mixed among themselves too, and no longer match in id.
    """
    rows = exemplars[exemplars["split"] == str(Split.SELECT)]
    source = np.arange(len(rows))
    kinds = (*POSITIVES, *NEGATIVES)
    kind = rows["kind"].map({name: i for i, name in enumerate(kinds)}).to_numpy()
    layers = rows["layer"].to_numpy()
    for layer in np.unique(layers).tolist():
        for code in range(len(kinds)):
            at = np.flatnonzero((layers == layer) & (kind == code))
            source[at] = np.random.default_rng([seed, layer, code]).permutation(at)
    return rows.assign(**{name: rows[name].to_numpy()[source] for name in _PLACE})
