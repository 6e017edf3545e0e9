"""``moe-lens autointerp --dry-run``: tokens per expert, calls and input tokens, from config and text alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from moe_lens.autointerp.exemplars import EXPLAIN, SCORE
from moe_lens.autointerp.plan import Cost, costs
from moe_lens.cli import inputs
from moe_lens.cli.plan import Share, shares_of, tokens_by_split
from moe_lens.corpus.batches import tokenize
from moe_lens.models import source
from moe_lens.types import ExpertAddress

if TYPE_CHECKING:
    from moe_lens.autointerp.pipeline import Asked
    from moe_lens.config import AutointerpConfig
    from moe_lens.corpus.text import Corpus
    from moe_lens.models.spec import Spec


@dataclass(frozen=True)
class LabelPlan:
    """What labelling and scoring would take."""

    model: str
    labeller: str
    scorers: tuple[str, ...]
    n_documents: int
    n_experts: int
    tokens: dict[str, int]
    """Eligible tokens by split."""
    shares: tuple[Share, ...]
    needed: dict[str, int]
    """Visits that an expert needs for a full set of exemplars."""
    costs: tuple[Cost, ...]
    max_calls: int | None

    @property
    def calls(self) -> int:
        return sum(cost.calls for cost in self.costs)

    @property
    def tokens_out(self) -> int:
        return sum(cost.tokens_out for cost in self.costs)

    @property
    def tokens_in(self) -> int:
        return sum(cost.tokens_in for cost in self.costs)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"calls": self.calls, "tokens_in": self.tokens_in, "tokens_out": self.tokens_out}


def make_plan(settings: AutointerpConfig, spec: Spec, asked: Asked, corpus: Corpus) -> LabelPlan:
    """Predict visits per expert and the requests to language models.

    Raises:
        BadCorpus, UnsupportedModel: see the message.
    """
    options = source.Options(spec.revision, settings.local_files_only, settings.trust_remote_code)
    tokenized = tokenize(
        corpus,
        source.read_tokenizer(source.resolve(spec.name), options),
        [],
        max_length=min(settings.max_length, spec.max_positions or settings.max_length),
        limit_tokens=settings.max_tokens,
        document_tokens=settings.document_tokens,
        seed=settings.seed,
    )
    tokens = tokens_by_split(tokenized)
    wanted = set(settings.layers or spec.moe_layers)
    chosen = [entry for entry in spec.layers if entry.layer in wanted and entry.layer in spec.moe_layers]
    n_experts = sum(entry.n_experts for entry in chosen)
    addresses = inputs.expert_addresses(spec, settings.layers, settings.experts)
    if addresses is not None:
        n_experts = len(addresses)
    n_labels = n_experts * max(1, settings.facets)
    if asked.given is not None:
        places = zip(asked.given["layer"].tolist(), asked.given["expert"].tolist(), strict=True)
        given = [ExpertAddress(layer, expert) for layer, expert in places]
        named = None if addresses is None else set(addresses)
        given = [at for at in given if at.layer in wanted and (named is None or str(at) in named)]
        n_experts, n_labels = len(set(given)), len(given)
    read = (tokenized.char_end - tokenized.char_start).clip(min=0).sum()
    return LabelPlan(
        model=spec.name,
        labeller=asked.name,
        scorers=tuple(map(str, asked.scorers)),
        n_documents=len(corpus),
        n_experts=n_experts,
        tokens=tokens,
        shares=tuple(shares_of(chosen, tokens)),
        needed={"select": EXPLAIN.positives, "validate": SCORE.positives},
        costs=tuple(
            costs(
                asked,
                n_experts,
                n_labels,
                items=settings.items,
                fuzz=settings.fuzz,
                control=settings.control,
                facets=settings.facets,
                bytes_per_token=float(read) / max(1, tokenized.n_tokens),
            )
        ),
        max_calls=settings.max_calls,
    )
