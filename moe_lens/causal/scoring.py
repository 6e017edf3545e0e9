"""From final hidden states to numbers per prediction: NLL of the next token, KL from the clean prediction, and more.

Only the predictions that are wanted go through the LM head, some at a time, so that no (token, vocab) matrix of a
whole batch is made. The clean probabilities, which KL needs for every edit, are made once a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_lens.causal.replay import decoder_of
from moe_lens.errors import BadConfig, UnsupportedModel
from moe_lens.models.adapters.base import replace_forward

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from moe_lens.models.lens import Lens

QUANTITIES = ("nll", "kl", "top1")
CELLS = {"cpu": 2**21}
"""Logits made at once, by device: what stays in a processor's cache."""
CELLS_ELSEWHERE = 2**26


@dataclass(frozen=True)
class Wanted:
    """What to measure beside the NLL."""

    kl: bool = False
    top1: bool = False
    pairs: tuple[tuple[int, int], ...] = ()

    @classmethod
    def checked(cls, quantities: Sequence[str], pairs: Sequence[Sequence[int]], vocabulary: int) -> Wanted:
        """Read what a user asks for.

        Raises:
            BadConfig: an unknown quantity, or a pair that is not two token ids.
        """
        for quantity in quantities:
            if quantity not in QUANTITIES:
                raise BadConfig(f"unknown quantity {quantity!r}: use {', '.join(QUANTITIES)}")
        for pair in pairs:
            if len(pair) != 2 or not all(0 <= int(token) < vocabulary for token in pair):
                raise BadConfig(f"pairs= holds pairs of token ids below {vocabulary}, not {pair!r}")
        return cls("kl" in quantities, "top1" in quantities, tuple((int(a), int(b)) for a, b in pairs))


@dataclass(frozen=True, eq=False)
class Scores:
    """Numbers of some predictions. Nats; None where they were not asked for."""

    nll: Float[Tensor, "prediction"]
    """Negative log-likelihood of the token that follows."""
    kl: Float[Tensor, "prediction"] | None = None
    """KL(clean || edited)."""
    top1: Int[Tensor, "prediction"] | None = None
    """Most likely token."""
    logit_difference: Float[Tensor, "prediction pair"] | None = None


class _Decoded:
    """Stands in for any family's decoder output: final hidden states, and None for everything else."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int | slice) -> Any:
        return (self.last_hidden_state,)[index]


class Head:
    """The LM head of a lens, with whatever its family does to the logits (scales, caps)."""

    def __init__(self, lens: Lens) -> None:
        self.lens = lens
        cells = CELLS.get(lens.device.type, CELLS_ELSEWHERE)
        self.n_tokens = int(lens.model.config.get_text_config().vocab_size)
        self.rows = max(16, cells // self.n_tokens)
        """Predictions that go through the head at once."""

    def logits(self, hidden: Float[Tensor, "prediction d_model"]) -> Float[Tensor, "prediction vocab"]:
        """Logits of final hidden states, in float32 at least: the model's own forward around a stubbed decoder."""
        decoded = _Decoded(hidden.unsqueeze(0))
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        with ExitStack() as stack:
            replace_forward(decoder_of(self.lens), lambda *_args, **_kwargs: decoded, stack)
            logits = self.lens.model(input_ids=ids, use_cache=False).logits[0]
            return logits if logits.dtype is torch.float64 else logits.float()

    @torch.no_grad()
    def check(self, hidden: Float[Tensor, "window seq d_model"], ids: Int[Tensor, "window seq"]) -> None:
        """Compare with the model's own logits, given its final hidden states.

        Raises:
            UnsupportedModel: they differ, so what is measured would be another model's predictions.
        """
        wanted = self.lens.model(input_ids=ids, use_cache=False).logits.flatten(0, 1).float()
        self.n_tokens = wanted.shape[1]  # some heads are padded
        off = float((self.logits(hidden.flatten(0, 1)) - wanted).abs().max())
        if not off <= 1e-4 * float(wanted.abs().max()):
            raise UnsupportedModel(
                f"the logits of {self.lens.name} are not a function of its final hidden states alone (off by "
                f"{off:.2g}), so effects cannot be measured: choose another model"
            )

    def slices(self, n: int) -> Iterator[slice]:
        """`n` predictions, some at a time."""
        return (slice(at, min(n, at + self.rows)) for at in range(0, n, self.rows))


@dataclass(eq=False)
class CleanPredictions:
    """What the clean model predicts at some tokens of a batch."""

    head: Head
    hidden: Float[Tensor, "prediction d_model"]
    """Final hidden states."""
    target: Int[Tensor, "prediction"]
    """The tokens that follow."""
    _scores: dict[Wanted, Scores] = field(default_factory=dict)

    @property
    def n_bytes(self) -> int:
        """Memory once the probabilities are made."""
        return 4 * len(self.target) * self.head.n_tokens + self.hidden.numel() * self.hidden.element_size()

    @cached_property
    def probabilities(self) -> tuple[Float[Tensor, "prediction vocab"], Float[Tensor, "prediction"]]:
        """Clean probabilities, and the sum of p ln p. Made when first asked for."""
        with torch.no_grad():
            wide = torch.promote_types(self.hidden.dtype, torch.float32)
            p = self.hidden.new_empty(len(self.hidden), self.head.n_tokens, dtype=wide)
            negentropy = p.new_empty(len(p))
            for rows in self.head.slices(len(p)):
                log_p = self.head.logits(self.hidden[rows]).log_softmax(dim=-1)
                torch.exp(log_p, out=p[rows])
                negentropy[rows] = torch.linalg.vecdot(p[rows], log_p)
        return p, negentropy

    def scores(self, wanted: Wanted) -> Scores:
        """Clean scores; the divergence from itself is left out."""
        wanted = replace(wanted, kl=False)
        if wanted not in self._scores:
            chosen = torch.arange(len(self.hidden), device=self.hidden.device)
            self._scores[wanted] = self.score(self.hidden, chosen, wanted)
        return self._scores[wanted]

    @torch.no_grad()
    def score(self, hidden: Float[Tensor, "chosen d_model"], chosen: Int[Tensor, "chosen"], wanted: Wanted) -> Scores:
        """Scores of the predictions `chosen`, made from other final hidden states."""
        first, second = (list(tokens) for tokens in zip(*wanted.pairs, strict=True)) if wanted.pairs else ([], [])
        parts: list[dict[str, Tensor]] = []
        for rows in self.head.slices(len(hidden)):
            at, log_q = chosen[rows], self.head.logits(hidden[rows]).log_softmax(dim=-1)
            found = {"nll": -log_q.gather(1, self.target[at, None]).squeeze(1)}
            if wanted.kl:  # two sums in one order, so that rounding cancels where q is close to p
                p, negentropy = self.probabilities
                found["kl"] = (negentropy[at] - torch.linalg.vecdot(p[at], log_q)).clamp(min=0)
            if wanted.top1:
                found["top1"] = log_q.argmax(dim=-1)
            if wanted.pairs:
                found["logit_difference"] = log_q[:, first] - log_q[:, second]
            parts.append(found)
        return Scores(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})
