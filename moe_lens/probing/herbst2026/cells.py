"""Rows of the sampled tokens, and the probes of every (layer, expert).

In a cell the tokens of a concept stand as the source has them: by batch of copies, then by the slot in which the
router chose the expert, then by position. The shuffled split depends on this order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moe_lens.probing.solve import LogisticFit, balanced_weights, fit_logistic
from moe_lens.stats import Confusion
from moe_lens.types import ExpertTap, Role, Status, TokenBatch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from numpy import ndarray
    from torch import Tensor

    from moe_lens.models.lens import Lens
    from moe_lens.probing.herbst2026.sampling import Sample, Text

MINIMUM = 50
"""Tokens of either class below which the source writes ``Not Enough Samples``."""
TEST_SHARE = 0.25
_TOLERANCE = 1e-10
_CHUNK_BYTES = 256 << 20


@dataclass(frozen=True)
class CellRows:
    """Sampled tokens that one expert was routed."""

    token: Int[ndarray, "row"]
    """Number among the sampled tokens of all concepts."""
    slot: Int[ndarray, "row"]
    activation: Float[Tensor, "row d_ff"]


@dataclass(frozen=True)
class Problem:
    """One concept in one cell: rows of the cell, split, and ranked neurons."""

    concept: int
    train: Int[ndarray, "train"]
    test: Int[ndarray, "test"]
    y_train: Bool[ndarray, "train"]
    y_test: Bool[ndarray, "test"]
    neurons: Int[ndarray, "k"]
    """Largest mean difference first."""


@dataclass(frozen=True)
class SampledTokens:
    """The tokens of all concepts together, each once."""

    first: Int[ndarray, "text"]
    """Place of each text's first token when texts are laid end to end."""
    number: Int[ndarray, "place"]
    """Number of the sampled token at each place, -1 where no concept wants it."""
    n_tokens: int
    samples: tuple[Sample, ...]

    @classmethod
    def of(cls, texts: Sequence[Text], samples: Sequence[Sample]) -> SampledTokens:
        """Number the tokens that some sample holds, text by text."""
        ends = np.cumsum([0, *(len(text.input_ids) for text in texts)])
        wanted = np.zeros(ends[-1], bool)
        for sample in samples:
            wanted[ends[sample.text] + sample.position] = True
        number = np.where(wanted, np.cumsum(wanted) - 1, -1)
        return cls(ends[:-1], number, int(wanted.sum()), tuple(samples))

    def tokens(self, sample: Sample) -> Int[ndarray, "entry"]:
        """Number of the token behind every entry of a sample."""
        return self.number[self.first[sample.text] + sample.position]


class LayerRows:
    """Rows of one layer, gathered tap by tap, read expert by expert."""

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, ...]] = []

    def add(self, tap: ExpertTap, number: Int[Tensor, "token"]) -> None:
        """Keep the rows of sampled tokens; `number` is -1 on all others."""
        keep = (number.to(tap.token.device)[tap.token] >= 0).nonzero().squeeze(1)
        columns = (tap.expert[keep], tap.token[keep], tap.slot[keep], tap.activation.detach()[keep])
        expert, token, slot, h = (column.cpu() for column in columns)
        self._parts.append((expert, number[token], slot, h))

    def cells(self, n_experts: int) -> Iterator[tuple[int, CellRows]]:
        """Every expert with its rows."""
        expert, token, slot, h = (torch.cat(column) for column in zip(*self._parts, strict=True))
        self._parts = []
        order = expert.argsort(stable=True)
        bounds = np.r_[0, torch.bincount(expert, minlength=n_experts).cumsum(0).numpy()]
        for e in range(n_experts):
            mine = order[bounds[e] : bounds[e + 1]]
            yield e, CellRows(token[mine].numpy(), slot[mine].numpy(), h[mine].float())


def batches_of(texts: Sequence[Text], *, pad_id: int, batch_tokens: int) -> Iterator[tuple[list[int], TokenBatch]]:
    """Right-padded batches of texts, longest first, with the numbers of their texts."""
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i].input_ids))
    while order:
        many = max(1, batch_tokens // len(texts[order[0]].input_ids))
        chosen, order = order[:many], order[many:]
        yield chosen, _batch([texts[i] for i in chosen], pad_id)


def _batch(texts: Sequence[Text], pad_id: int) -> TokenBatch:
    def padded(columns: list[ndarray], value: int) -> Tensor:
        tensors = [torch.from_numpy(column) for column in columns]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    mask = padded([np.ones_like(t.input_ids) for t in texts], 0)
    start, end = (padded([t.spans[:, i] + t.piece.start for t in texts], -1) for i in (0, 1))
    return TokenBatch(
        input_ids=padded([t.input_ids for t in texts], pad_id),
        attention_mask=mask,
        document=torch.tensor([t.piece.document for t in texts]),
        char_start=start,
        char_end=end,
        eligible=mask.bool(),
        labels=torch.zeros(*mask.shape, 0, dtype=torch.bool),
        in_scope=torch.zeros(len(texts), 0, dtype=torch.bool),
    )


def gather(
    lens: Lens, texts: Sequence[Text], wanted: SampledTokens, layers: Sequence[int], *, batch_tokens: int,
    progress: bool, describe: str,
) -> dict[int, LayerRows]:  # fmt: skip
    """One forward pass over `texts`; the rows of the sampled tokens in `layers`."""
    from tqdm.auto import tqdm

    rows = {layer: LayerRows() for layer in layers}
    pad_id = lens.tokenizer.pad_token_id
    pad_id = int(lens.tokenizer.eos_token_id or 0) if pad_id is None else int(pad_id)  # masked, so any id will do
    bar = tqdm(total=len(texts), desc=describe, unit="text", disable=None if progress else True)
    for chosen, batch in batches_of(texts, pad_id=pad_id, batch_tokens=batch_tokens):
        number = torch.full(tuple(batch.input_ids.shape), -1)
        for row, i in enumerate(chosen):
            n, first = len(texts[i].input_ids), wanted.first[i]
            number[row, :n] = torch.from_numpy(wanted.number[first : first + n])

        flat = number.reshape(-1)

        def keep(tap: ExpertTap, number: Tensor = flat) -> None:
            rows[tap.layer].add(tap, number)

        lens.forward(batch, keep, layers=layers, roles=(Role.MOE, Role.DENSE))
        bar.update(len(chosen))
    bar.close()
    return rows


def probe_cell(rows: CellRows, wanted: SampledTokens, ks: Sequence[int], *, seed: int) -> list[dict[str, Any]]:
    """One row per (concept, k), in that order.

    A probe that says yes to no test token has F1 0 and no precision, as in the source.
    """
    counts, problems = [], []
    for concept, sample in enumerate(wanted.samples):
        at, y = in_source_order(rows, wanted, sample)
        counts.append((int(y.sum()), int((~y).sum())))
        if min(counts[-1]) >= MINIMUM:
            problems.append(split_and_rank(rows, concept, at, y, most=max(ks), seed=seed))
    scores = {
        (problem.concept, k): scored
        for k in ks
        for chunk in _chunks(problems, k)
        for problem, scored in zip(chunk, _fit_and_score(rows, chunk, k), strict=True)
    }
    empty = {"f1": np.nan, "recall": np.nan, "precision": np.nan, "neurons": [], "status": Status.TOO_FEW.value}
    return [
        {"concept": c, "k": k, "num_positive": n_pos, "num_negative": n_neg, **scores.get((c, k), empty)}
        for c, (n_pos, n_neg) in enumerate(counts)
        for k in ks
    ]


def in_source_order(
    rows: CellRows, wanted: SampledTokens, sample: Sample
) -> tuple[Int[ndarray, "entry"], Bool[ndarray, "entry"]]:
    """Rows of the cell that hold a concept's tokens, and their labels: by batch of copies, slot, position."""
    row_of = np.full(wanted.n_tokens, -1)
    row_of[rows.token] = np.arange(len(rows.token))
    at = row_of[wanted.tokens(sample)]
    here = np.flatnonzero(at >= 0)
    here = here[np.lexsort((rows.slot[at[here]], sample.batch[here]))]
    return at[here], sample.positive[here]


def split_and_rank(
    rows: CellRows, concept: int, at: Int[ndarray, "entry"], y: Bool[ndarray, "entry"], *, most: int, seed: int
) -> Problem:
    """The stratified 75/25 token split of scikit-learn, and the neurons by ``|mean1 - mean0|`` on the 75 %.

    Means are float32 and equal differences are ordered as numpy's default sort leaves them, as in the source.
    """
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(
        np.arange(len(at)), test_size=TEST_SHARE, random_state=seed, shuffle=True, stratify=y.astype(np.int8)
    )
    x, y_train = rows.activation.numpy()[at[train]], y[train]
    difference = np.abs(x[y_train].mean(axis=0) - x[~y_train].mean(axis=0))
    neurons = np.argsort(difference)[::-1][:most].copy()
    return Problem(concept, at[train], at[test], y_train, y[test], neurons)


def _chunks(problems: Sequence[Problem], k: int) -> Iterator[Sequence[Problem]]:
    """Consecutive problems whose padded features fit into one batch."""
    longest = max((len(p.train) for p in problems), default=1)
    step = max(1, _CHUNK_BYTES // (longest * (k + 1) * 8 * 3))
    for start in range(0, len(problems), step):
        yield problems[start : start + step]


def _fit_and_score(rows: CellRows, problems: Sequence[Problem], k: int) -> list[dict[str, Any]]:
    columns = torch.from_numpy(np.stack([p.neurons[:k] for p in problems]))
    x, y, used = _padded(rows.activation, columns, [p.train for p in problems], [p.y_train for p in problems])
    fit = fit_to_optimum(x, y, used)
    x, y, used = _padded(rows.activation, columns, [p.test for p in problems], [p.y_test for p in problems])
    says_yes = torch.bmm(x, fit.coef[..., None]).squeeze(-1) + fit.intercept[:, None] > 0
    outcome = Confusion.count(says_yes.T.numpy(), (y.T > 0.5).numpy(), used.T.numpy())
    f1, recall = np.asarray(outcome.f1), np.asarray(outcome.recall)
    precision = np.asarray(np.where(outcome.tp + outcome.fp > 0, outcome.precision, np.nan))
    return [
        {
            "f1": float(f1[i]), "recall": float(recall[i]), "precision": float(precision[i]),
            "neurons": problem.neurons[:k].tolist(), "status": Status.OK.value,
        }
        for i, problem in enumerate(problems)
    ]  # fmt: skip


def fit_to_optimum(
    x: Float[Tensor, "problem row k"], y: Float[Tensor, "problem row"], used: Bool[Tensor, "problem row"]
) -> LogisticFit:
    """L2-penalised logistic regression (C = 1) on raw features, classes balanced, at its optimum.

    A problem too badly scaled for the batched Newton steps is solved by scikit-learn's, one at a time.
    """
    fit = fit_logistic(x, y, balanced_weights(y, used), tolerance=_TOLERANCE)
    for i in (~fit.converged).nonzero().squeeze(1).tolist():
        from sklearn.linear_model import LogisticRegression

        model = LogisticRegression(solver="newton-cholesky", class_weight="balanced", tol=1e-10, max_iter=500)
        model.fit(x[i][used[i]].numpy(), y[i][used[i]].numpy() > 0.5)
        fit.coef[i], fit.intercept[i] = torch.from_numpy(model.coef_[0]), torch.as_tensor(model.intercept_)[0]
    return fit


def _padded(
    h: Float[Tensor, "row d_ff"], columns: Int[Tensor, "problem k"], at: Sequence[ndarray], labels: Sequence[ndarray]
) -> tuple[Float[Tensor, "problem entry k"], Float[Tensor, "problem entry"], Bool[Tensor, "problem entry"]]:
    """The chosen neurons of each problem's rows in float64, padded to the longest."""
    pad = torch.nn.utils.rnn.pad_sequence
    rows = pad([torch.from_numpy(r) for r in at], batch_first=True, padding_value=-1)
    y = pad([torch.from_numpy(one).double() for one in labels], batch_first=True)
    used = rows >= 0
    x = h[rows.clamp(min=0)[:, :, None], columns[:, None, :]].double() * used[..., None]
    return x, y, used
