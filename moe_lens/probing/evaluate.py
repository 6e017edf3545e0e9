"""Score fitted probes on the validate and test splits, and keep what a document bootstrap needs.

Every document of validate and test is streamed once; of each expert only the neurons that some probe uses are
kept. All probes of an expert are then one matrix product away.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moe_lens.probing.document_sums import COUNTS, document_sums
from moe_lens.probing.fit import Probe, distinct_documents
from moe_lens.probing.settings import MINIMUM_EVAL
from moe_lens.stats import Confusion, ranking_scores
from moe_lens.types import Split, Status

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from moe_lens.capture.rows import RowStore

_CHUNK = 128  # probes scored together; bounds memory at rows * _CHUNK * 8 bytes a few times over
_TOKENS = 1 << 16  # tokens counted together; bounds memory at _TOKENS * concepts * 8 bytes
NUMBERS = (
    "prevalence", "f1", "f1_always_positive", "f1_balanced", "precision", "recall", "auroc", "average_precision",
    "balanced_accuracy", "mcc", "auroc_validate", "f1_balanced_validate",
)  # fmt: skip


def columns_needed(probes: Sequence[Probe], n_experts: Mapping[int, int]) -> dict[int, Int[Tensor, "expert column"]]:
    """Neurons that some probe of an expert reads, per layer; shorter lists are padded with neuron 0."""
    needed: dict[int, list[set[int]]] = {layer: [set() for _ in range(n)] for layer, n in n_experts.items()}
    for probe in probes:
        needed[probe.layer][probe.expert].update(int(j) for j in probe.neurons)
    table = {}
    for layer, experts in needed.items():
        width = max(1, *(len(neurons) for neurons in experts))
        columns = torch.zeros(len(experts), width, dtype=torch.long)
        for e, neurons in enumerate(experts):
            columns[e, : len(neurons)] = torch.tensor(sorted(neurons), dtype=torch.long)
        table[layer] = columns
    return table


@dataclass(frozen=True)
class _Cell:
    """Evaluation rows of one expert."""

    activation: Float[Tensor, "row column"]
    weight: Float[Tensor, "row"]
    """Router weight."""
    column_of: dict[int, int]
    labels: Bool[Tensor, "row concept"]
    in_scope: Bool[Tensor, "row concept"]
    document: Int[Tensor, "row"]
    split: Int[np.ndarray, "row"]

    def logits(self, probes: Sequence[Probe], *, two_part: bool = False) -> Float[np.ndarray, "row probe"]:
        """Scores of the rows by the probes, or by their two-part scores, which all of them must have."""
        h, lines = self.activation, list(probes)
        if two_part:
            h, lines = h * self.weight[:, None], [p.two_part for p in probes if p.two_part is not None]
        coef = torch.zeros(h.shape[1], len(probes))
        for i, (probe, line) in enumerate(zip(probes, lines, strict=True)):
            coef[[self.column_of[int(j)] for j in probe.neurons], i] = torch.from_numpy(line.coef).float()
        return (h @ coef + torch.tensor([line.intercept for line in lines], dtype=torch.float32)).numpy()


@dataclass(frozen=True)
class Routed:
    """Two-part scores (``fit.TwoPart``) of the tokens of one split that visit a cell."""

    logit: Float[np.ndarray, "row probe"]
    truth: Bool[np.ndarray, "row probe"]
    used: Bool[np.ndarray, "row probe"]
    """Tokens on whose document the concept is defined."""
    document: Int[np.ndarray, "row"]


class Evaluator:
    """Scores probes on stored validate and test rows.

    Args:
        rows: unbounded store of the needed columns, validate and test documents.
        columns: what ``columns_needed`` returned and the store was given.
        split_of: split of every document, as ``Split`` values.
    """

    def __init__(
        self, rows: RowStore, columns: Mapping[int, Int[Tensor, "expert column"]], split_of: Sequence[Split]
    ) -> None:
        self.rows = rows
        self.columns = columns
        self.split_of = np.asarray([s.value for s in split_of])

    def _cell(self, layer: int, expert: int) -> _Cell:
        rows, tokens = self.rows.rows(layer, expert), self.rows.tokens
        ids = self.columns[layer][expert].tolist()
        column_of = {neuron: i for i, neuron in reversed(list(enumerate(ids)))}
        document = tokens.document[rows.token]
        return _Cell(
            rows.activation.float(), rows.weight.float(), column_of, tokens.labels[rows.token],
            tokens.in_scope[rows.token], document, self.split_of[document.numpy()],
        )  # fmt: skip

    def score(self, layer: int, expert: int, probes: Sequence[Probe]) -> list[dict[str, Any]]:
        """One row of ``probe.parquet`` (numbers, counts and status) per probe of this cell, in order."""
        cell = self._cell(layer, expert)
        out: list[dict[str, Any]] = []
        for start in range(0, len(probes), _CHUNK):
            out += self._score_chunk(cell, probes[start : start + _CHUNK])
        return out

    def _score_chunk(self, cell: _Cell, probes: Sequence[Probe]) -> list[dict[str, Any]]:
        concepts = [p.concept for p in probes]
        logit = cell.logits(probes)
        results: dict[str, dict[str, np.ndarray]] = {}
        for split in (Split.VALIDATE, Split.TEST):
            here = np.flatnonzero(cell.split == split.value)
            positive = (cell.labels & cell.in_scope)[here][:, concepts]
            negative = (cell.in_scope & ~cell.labels)[here][:, concepts]
            results[split.value] = _split_numbers(logit[here], positive, negative, cell.document[here])
        rows = []
        for i, probe in enumerate(probes):
            validate, test = ({k: v[i] for k, v in results[s].items()} for s in ("validate", "test"))
            rows.append(_probe_row(probe, validate, test))
        return rows

    def document_counts(self, probes: Sequence[Probe], n_documents: int) -> Float[np.ndarray, "probe document count"]:
        """`document_sums` of every test document, for each probe of one cell; 0 for other documents."""
        cell = self._cell(probes[0].layer, probes[0].expert)
        test = np.flatnonzero(cell.split == Split.TEST.value)
        at, document = np.unique(cell.document[test].numpy(), return_inverse=True)
        out = np.zeros((len(probes), n_documents, len(COUNTS)))
        for start in range(0, len(probes), _CHUNK):
            some = probes[start : start + _CHUNK]
            concepts = [p.concept for p in some]
            truth = (cell.labels & cell.in_scope)[test][:, concepts].numpy()
            used = cell.in_scope[test][:, concepts].numpy()
            sums = document_sums(cell.logits(some)[test], truth, used, document[:, None], len(at))
            out[start : start + len(some), at] = sums
        return out

    def routed(self, probes: Sequence[Probe], split: Split) -> Iterator[tuple[Sequence[Probe], Routed]]:
        """Two-part scores of one cell's `probes` over the tokens of a split that visit it, some probes at a time.

        Args:
            probes: all with a two-part score.
        """
        if not probes:
            return
        cell = self._cell(probes[0].layer, probes[0].expert)
        here = np.flatnonzero(cell.split == split.value)
        for start in range(0, len(probes), _CHUNK):
            some = probes[start : start + _CHUNK]
            concepts = [p.concept for p in some]
            used = cell.in_scope[here][:, concepts]
            truth = cell.labels[here][:, concepts] & used
            logit = cell.logits(some, two_part=True)[here]
            yield some, Routed(logit, truth.numpy(), used.numpy(), cell.document[here].numpy())

    def class_counts(
        self, n_documents: int, layer: int | None = None, expert: int | None = None
    ) -> Int[np.ndarray, "document concept class"]:
        """Eligible tokens of every validate and test document that are positive, and that are negative.

        Args:
            layer, expert: count only the tokens that visit this expert.
        """
        tokens = self.rows.tokens
        if layer is None or expert is None:
            token = tokens.eligible.nonzero().squeeze(1)
        else:
            token = self.rows.rows(layer, expert).token
        counts = torch.zeros(n_documents, tokens.labels.shape[1], 2, dtype=torch.int32)
        for some in token.split(_TOKENS):
            labels, in_scope = tokens.labels[some], tokens.in_scope[some]
            both = torch.stack([labels & in_scope, in_scope & ~labels], -1)
            counts.index_add_(0, tokens.document[some], both.int())
        return counts.numpy()


def _split_numbers(
    logit: Float[np.ndarray, "row probe"],
    positive: Bool[Tensor, "row probe"],
    negative: Bool[Tensor, "row probe"],
    document: Int[Tensor, "row"],
) -> dict[str, Float[np.ndarray, "probe"]]:
    truth, used = positive.numpy(), (positive | negative).numpy()
    if not len(logit):
        empty = np.zeros(logit.shape[1])
        return {"n": empty, "n_pos": empty, "docs_pos": empty, "docs_neg": empty}
    confusion = Confusion.count(logit >= 0, truth, used)
    auroc, ap = ranking_scores(logit, truth, used)
    return {
        "n": used.sum(0),
        "n_pos": truth.sum(0),
        "docs_pos": distinct_documents(document, positive).numpy(),
        "docs_neg": distinct_documents(document, negative).numpy(),
        "auroc": auroc,
        "average_precision": ap,
        **{
            name: getattr(confusion, name)
            for name in ("prevalence", "f1", "f1_balanced", "precision", "recall", "balanced_accuracy", "mcc")
        },
    }


def _probe_row(probe: Probe, validate: dict[str, Any], test: dict[str, Any]) -> dict[str, Any]:
    status = probe.status
    if probe.fitted and not (_enough(validate) and _enough(test)):
        status = Status.TOO_FEW
    row: dict[str, Any] = {
        "layer": probe.layer, "expert": probe.expert, "concept": probe.concept, "k": probe.k,
        "neurons": [int(j) for j in probe.neurons], "sign": [int(np.sign(c)) for c in probe.coef],
        "n_select": probe.n_select, "n_validate": int(validate["n"]), "n_test": int(test["n"]),
        "n_pos_select": probe.n_pos_select, "n_pos_validate": int(validate["n_pos"]), "n_pos_test": int(test["n_pos"]),
        "auroc_select": probe.auroc_select, **dict.fromkeys(NUMBERS, np.nan), "status": status.value,
    }  # fmt: skip
    if status in (Status.OK, Status.SEPARABLE):
        row |= {name: float(test[name]) for name in NUMBERS if name in test}
        row["f1_always_positive"] = 2 * row["prevalence"] / (1 + row["prevalence"])
        row["auroc_validate"] = float(validate["auroc"])
        row["f1_balanced_validate"] = float(validate["f1_balanced"])
    return row


def _enough(split: dict[str, Any]) -> bool:
    need = MINIMUM_EVAL
    n_neg = split["n"] - split["n_pos"]
    return bool(
        split["n_pos"] >= need.tokens and n_neg >= need.tokens
        and split["docs_pos"] >= need.documents and split["docs_neg"] >= need.documents
    )  # fmt: skip
