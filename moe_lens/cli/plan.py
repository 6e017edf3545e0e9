"""``--dry-run``: what a probe run would need and could not measure, from configs, tokenizers and text alone.

Tokens per expert assume an even router; a real one is uneven, so some experts see far fewer. Memory is the same
prediction that the run itself cuts its layers by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from moe_lens.corpus.batches import Tokenized, tokenize
from moe_lens.corpus.checks import check_scorable
from moe_lens.corpus.concepts import Concept, concepts_for
from moe_lens.models import source
from moe_lens.models.spec import LayerSpec, Spec
from moe_lens.probing.memory import layer_bytes, working_bytes
from moe_lens.probing.settings import DOCUMENTS_NEEDED, MINIMUM_EVAL, MINIMUM_SELECT, ProbeSettings, check_k
from moe_lens.types import Split

if TYPE_CHECKING:
    import pandas as pd

    from moe_lens.config import ProbeConfig
    from moe_lens.corpus.text import Corpus

BYTES_PER_PROBE = 110
"""Disk that one row of probe.parquet takes with its share of the other tables (measured on the demo, rounded up)."""


@dataclass(frozen=True)
class Share:
    """Layers of one shape, and the tokens each of their experts would see."""

    layers: tuple[int, ...]
    n_experts: int
    top_k: int
    tokens_per_expert: dict[str, int]
    """By split."""


@dataclass(frozen=True)
class Shortage:
    """A concept without enough tokens of one class in some split."""

    concept: str
    split: str
    tokens: int
    """Tokens of the rarer class in the whole split."""
    per_expert: float
    """The same for an average expert."""
    needed: int
    documents: int
    """Documents with a positive token in the split."""
    documents_needed: int
    impossible: bool
    """True: too few even for a cell that sees every token. False: only experts that the concept prefers may do."""


@dataclass(frozen=True)
class ModelPlan:
    """One of the two models."""

    name: str
    tokens: dict[str, int]
    """Eligible tokens by split."""
    shares: tuple[Share, ...]
    shortages: tuple[Shortage, ...]
    weight_bytes: int
    least_bytes: int
    """Beside the weights, when layers are captured one at a time."""
    most_bytes: int
    """Beside the weights, when all are captured in one pass."""


@dataclass(frozen=True)
class Plan:
    """What a run would take."""

    models: tuple[ModelPlan, ...]
    n_documents: int
    n_concepts: int
    disk_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_plan(settings: ProbeConfig, specs: Sequence[Spec], corpus: Corpus) -> Plan:
    """Predict tokens per expert, concepts out of reach, memory and disk.

    Raises:
        ModelNotFound: a model without tokenizer.
        BadCorpus, UnsupportedModel: see the message.
    """
    concepts = concepts_for(corpus, settings.concepts)
    models = tuple(
        _model_plan(settings, spec, corpus, concepts, layers=settings.layers if i == 0 else None)
        for i, spec in enumerate(specs)
    )
    probes = sum(_n_probes(spec, settings, len(concepts)) for spec in specs) * settings.splits
    return Plan(models, len(corpus), len(concepts), probes * BYTES_PER_PROBE)


def _model_plan(
    settings: ProbeConfig, spec: Spec, corpus: Corpus, concepts: Sequence[Concept], *, layers: Sequence[int] | None
) -> ModelPlan:
    where = source.resolve(spec.name)
    options = source.Options(spec.revision, settings.local_files_only, settings.trust_remote_code)
    itemsize = _itemsize(settings.dtype, source.read_config(where, options))
    length = min(settings.max_length, spec.max_positions or settings.max_length)
    probing = ProbeSettings(max_rows=settings.max_rows, max_length=length)
    tokenized = tokenize(
        corpus,
        source.read_tokenizer(where, options),
        concepts,
        max_length=probing.max_length,
        limit_tokens=settings.max_tokens,
        document_tokens=settings.document_tokens,
        seed=settings.seed,
    )
    check_scorable(tokenized, DOCUMENTS_NEEDED)
    wanted = set(layers or spec.moe_layers or spec.dense_layers)
    chosen = [entry for entry in spec.layers if entry.layer in wanted]
    tokens = tokens_by_split(tokenized)
    per_layer = [
        layer_bytes(entry, n_classes=len(concepts) + 2, n_rows=tokens["select"], settings=probing, itemsize=itemsize)
        for entry in chosen
    ]
    working = working_bytes(chosen, d_model=spec.d_model, settings=probing, itemsize=itemsize)
    share = min(entry.top_k / entry.n_experts for entry in chosen)
    return ModelPlan(
        name=spec.name,
        tokens=tokens,
        shares=tuple(shares_of(chosen, tokens)),
        shortages=tuple(_shortages(tokenized.counts(), share)),
        weight_bytes=spec.total_parameters * itemsize,
        least_bytes=working + max(per_layer),
        most_bytes=working + sum(per_layer),
    )


def tokens_by_split(tokenized: Tokenized) -> dict[str, int]:
    code = tokenized.window_split[tokenized.window_of][tokenized.eligible]
    return {split.value: int((code == i).sum()) for i, split in enumerate(Split)}


def shares_of(chosen: Sequence[LayerSpec], tokens: dict[str, int]) -> list[Share]:
    shapes: dict[tuple[int, int], list[int]] = {}
    for entry in chosen:
        shapes.setdefault((entry.n_experts, entry.top_k), []).append(entry.layer)
    return [
        Share(tuple(layers), n, k, {split: count * k // n for split, count in tokens.items()})
        for (n, k), layers in shapes.items()
    ]


def _shortages(counts: pd.DataFrame, share: float) -> list[Shortage]:
    """The worst split of every concept that falls short in an average expert."""
    found = []
    for name, rows in counts.groupby("concept", sort=False):
        worst: Shortage | None = None
        for row in rows.to_dict("records"):
            need = MINIMUM_SELECT if row["split"] == Split.SELECT else MINIMUM_EVAL
            rarer = int(min(row["positives"], row["tokens"] - row["positives"]))
            if rarer * share >= need.tokens and row["documents"] >= need.documents:
                continue
            impossible = rarer < need.tokens or row["documents"] < need.documents
            here = Shortage(
                str(name),
                row["split"],
                rarer,
                rarer * share,
                need.tokens,
                int(row["documents"]),
                need.documents,
                impossible,
            )
            worst = here if worst is None else max(worst, here, key=lambda s: (s.impossible, -s.tokens / s.needed))
        found += [worst] if worst else []
    return sorted(found, key=lambda s: (not s.impossible, s.per_expert / s.needed, s.concept))


def _n_probes(spec: Spec, settings: ProbeConfig, n_concepts: int) -> int:
    wanted = spec.moe_layers or spec.dense_layers
    cells = sum(entry.n_experts for entry in spec.layers if entry.layer in wanted)
    return n_concepts * cells * len(check_k(settings.k, [spec]))


def _itemsize(dtype: str | None, config: Any) -> int:
    from moe_lens.models.load import DTYPES

    found = DTYPES.get(dtype or "") or getattr(config, "dtype", None)
    return getattr(found, "itemsize", 4)
