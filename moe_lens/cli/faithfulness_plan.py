"""``moe-lens faithfulness --dry-run``: passes by purpose, and minutes from one timed pass on this machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from moe_lens.causal.faithfulness.plan import predict_passes, seconds_per_pass
from moe_lens.causal.faithfulness.run import tokenized_for
from moe_lens.causal.faithfulness.settings import Texts
from moe_lens.cli import inputs
from moe_lens.cli.faithfulness import batch_tokens, length
from moe_lens.types import Split

if TYPE_CHECKING:
    from moe_lens.config import FaithfulnessConfig
    from moe_lens.corpus.text import Corpus
    from moe_lens.models.spec import Spec


@dataclass(frozen=True)
class FaithfulnessPlan:
    """What scoring rankings would take."""

    model: str
    n_experts: int
    """Experts of the universe."""
    passes: dict[str, int]
    """By purpose, at most: equal sets of one mode run once."""
    max_tokens: int
    """Tokens of a pass."""
    seconds_per_pass: float

    @property
    def n_passes(self) -> int:
        return sum(self.passes.values())

    @property
    def minutes(self) -> float:
        return self.n_passes * self.seconds_per_pass / 60

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"n_passes": self.n_passes, "minutes": self.minutes}


def make_plan(settings: FaithfulnessConfig, spec: Spec, corpus: Corpus, choices: dict[str, Any]) -> FaithfulnessPlan:
    """Count passes and time one.

    Raises:
        BadCorpus, BadConfig, UnsupportedModel: as a run.
    """
    named = inputs.expert_addresses(spec, settings.layers, settings.experts)
    wanted = set(settings.layers or spec.moe_layers) & set(spec.moe_layers)
    n_units = sum(entry.n_experts for entry in spec.layers if entry.layer in wanted) if named is None else len(named)
    counted = ("rankings", "modes", "bins", "n_random", "n_matched", "naopc", "routing")
    passes = predict_passes(spec, **{name: choices[name] for name in counted}, n_units=n_units)
    lens = inputs.load_lens(settings, settings.model, revision=settings.revision)
    texts = Texts(settings.max_tokens, (Split.SELECT, Split.TEST), settings.include_first, batch_tokens(settings, spec))
    tokenized = tokenized_for(
        corpus, lens.tokenizer, texts, document_tokens=settings.document_tokens, max_length=length(settings, spec),
        seed=settings.seed,
    )  # fmt: skip
    texts.check(tokenized, seed=settings.seed)
    seconds = seconds_per_pass(lens, tokenized, max_tokens=settings.max_tokens)
    return FaithfulnessPlan(spec.name, n_units, passes.by_purpose, settings.max_tokens, seconds)
