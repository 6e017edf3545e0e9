"""Which experts does one domain need? Chosen on half of the documents, measured on the other half.

1. Documents are halved by the hash of their id.
2. On the first half, a domain's candidates are the experts it uses more than other domains do; each is really
   zeroed, and the domain keeps the one with the largest specific rise (its own rise minus five times the rest's).
3. On the second half the chosen expert is zeroed again: rise of the domain's loss, of the rest's, and of the
   domain's when the expert of the same layer with the nearest overall load is zeroed instead.
4. Intervals resample documents. `meets` compares the point estimates (and asks for `MIN_RISE`); `meets_clearly`
   also asks that the intervals of (rise - 5 x rest) and of (rise - control) stay above zero.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from moe_lens.organisms.forward import LayeredForward, per_document, windows

if TYPE_CHECKING:
    from transformers import OlmoeForCausalLM, PreTrainedTokenizerFast

    from moe_lens.organisms.corpus import Document

FACTOR = 5.0
MIN_RISE = 0.02
"""Nats per token; a smaller rise is called nothing, however sharply it is measured."""


@dataclass(frozen=True)
class AblationConfig:
    length: int = 128
    """Ids per document, from its beginning."""
    choose_documents: int = 6
    """Most documents per domain on the choosing half."""
    candidates: int = 2
    """Experts per domain that are really zeroed on the choosing half."""
    min_documents: int = 5
    """On the measuring half; a domain with fewer is not reported."""
    bootstrap: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class DomainExpert:
    """One domain, its expert, and what zeroing it did on documents that did not choose it. Nats per token."""

    domain: str
    layer: int
    expert: int
    documents: int
    rest_documents: int
    load: float
    """Share of all routed pairs of the layer, in multiples of the uniform share."""
    load_in_domain: float
    rise: float
    rise_low: float
    rise_high: float
    rest: float
    control_expert: int
    control_load: float
    control: float
    control_low: float
    control_high: float
    specific_low: float
    """Lower end of the interval of ``rise - 5 * rest``."""
    beats_control_low: float
    """Lower end of the interval of ``rise - control``."""
    meets: bool
    meets_clearly: bool

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def half(document_id: str) -> int:
    """0 (choose) or 1 (measure), by hash."""
    return hashlib.sha256(document_id.encode()).digest()[0] & 1


class _Half:
    """Losses and loads of one half."""

    def __init__(
        self, model: OlmoeForCausalLM, documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast, length: int
    ) -> None:
        self.domains = np.array([d.domain for d in documents])
        data = windows(documents, tokenizer, length, per_document=1)
        self.forward = LayeredForward(model, data, batch=16)
        self.tokens = self.forward.targets().astype(float)
        self._rises: dict[tuple[int, int], np.ndarray] = {}
        n_experts = model.config.num_experts
        real = data.real.numpy().reshape(-1)
        owner = np.repeat(np.arange(len(documents)), data.ids.shape[1])[real]
        self.use = np.stack(
            [
                np.stack(
                    [
                        np.bincount(owner, (self.forward.routing(layer)[real] == e).sum(1), len(documents))
                        for e in range(n_experts)
                    ],
                    1,
                )
                for layer in range(self.forward.n_layers)
            ],
            1,
        )
        """Routed pairs of every document, [document, layer, expert]."""

    def rise(self, layer: int, expert: int) -> np.ndarray:
        """Rise of every document's loss in nats per token."""
        if (layer, expert) not in self._rises:
            gain = self.forward.ablated(layer, expert) - self.forward.base
            self._rises[layer, expert] = per_document(gain, self.forward.data.document, len(self.domains)) / self.tokens
        return self._rises[layer, expert]

    def load(self, mask: np.ndarray | None = None) -> np.ndarray:
        """[layer, expert] in multiples of the uniform share."""
        use = self.use.sum(0) if mask is None else self.use[mask].sum(0)
        return use / use.sum(1, keepdims=True) * use.shape[1]


def _choose(side: _Half, domain: str, candidates: int) -> tuple[int, int]:
    mine = side.domains == domain
    lift = side.load(mine) - side.load(~mine)
    best = np.argsort(-lift, axis=None)[:candidates]
    pairs = [divmod(int(index), lift.shape[1]) for index in best]
    return max(
        pairs, key=lambda pair: side.rise(*pair)[mine].mean() - FACTOR * max(side.rise(*pair)[~mine].mean(), 0.0)
    )


def _resampled(values: np.ndarray, rng: np.random.Generator, times: int) -> np.ndarray:
    """Bootstrap means of rows of ``values`` [document, column] -> [time, column]."""
    return np.stack([values[rng.integers(0, len(values), len(values))].mean(0) for _ in range(times)])


def _measure(side: _Half, domain: str, layer: int, expert: int, config: AblationConfig) -> DomainExpert:
    mine = side.domains == domain
    load = side.load()[layer]
    distance = np.abs(load - load[expert])
    distance[expert] = np.inf
    control = int(distance.argmin())
    rises = side.rise(layer, expert)
    own = np.stack([rises[mine], side.rise(layer, control)[mine]], 1)
    rng = np.random.default_rng(config.seed)
    own_boot = _resampled(own, rng, config.bootstrap)
    rest_boot = _resampled(rises[~mine, None], rng, config.bootstrap)[:, 0]
    rise, control_rise = own.mean(0)
    rest = float(rises[~mine].mean())
    low, high = np.percentile(own_boot, [2.5, 97.5], axis=0)
    specific_low = float(np.percentile(own_boot[:, 0] - FACTOR * rest_boot, 2.5))
    beats_low = float(np.percentile(own_boot[:, 0] - own_boot[:, 1], 2.5))
    meets = bool(rise >= MIN_RISE and rise > FACTOR * rest and rise > control_rise)
    return DomainExpert(
        domain=domain,
        layer=layer,
        expert=expert,
        documents=int(mine.sum()),
        rest_documents=int((~mine).sum()),
        load=float(load[expert]),
        load_in_domain=float(side.load(mine)[layer, expert]),
        rise=float(rise),
        rise_low=float(low[0]),
        rise_high=float(high[0]),
        rest=rest,
        control_expert=control,
        control_load=float(load[control]),
        control=float(control_rise),
        control_low=float(low[1]),
        control_high=float(high[1]),
        specific_low=specific_low,
        beats_control_low=beats_low,
        meets=meets,
        meets_clearly=bool(meets and low[0] > 0 and specific_low > 0 and beats_low > 0),
    )


def domain_experts(
    model: OlmoeForCausalLM,
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerFast,
    config: AblationConfig | None = None,
) -> list[DomainExpert]:
    """One row per domain with enough documents, largest rise first."""
    config = config or AblationConfig()
    halves: tuple[list[Document], list[Document]] = ([], [])
    for document in sorted(documents, key=lambda d: d.id):
        halves[half(document.id)].append(document)
    count: dict[str, int] = {}
    choosing = []
    for document in halves[0]:
        count[document.domain] = count.get(document.domain, 0) + 1
        if count[document.domain] <= config.choose_documents:
            choosing.append(document)
    enough = [
        d for d in sorted({d.domain for d in choosing}) if sum(x.domain == d for x in halves[1]) >= config.min_documents
    ]
    chooser = _Half(model, choosing, tokenizer, config.length)
    chosen = {domain: _choose(chooser, domain, config.candidates) for domain in enough}
    del chooser
    measurer = _Half(model, halves[1], tokenizer, config.length)
    rows = [_measure(measurer, domain, *pair, config) for domain, pair in chosen.items()]
    return sorted(rows, key=lambda row: -row.rise)
