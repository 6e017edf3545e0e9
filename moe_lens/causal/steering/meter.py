"""How far steering moves the next token: KL(clean || steered) along the clean texts, read in few padded passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from moe_lens.causal.effects import BATCH_TOKENS, BATCH_TOKENS_ELSEWHERE
from moe_lens.types import ExpertTap, Role

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy import ndarray
    from torch import Tensor

    from moe_lens.models.edits import Mode
    from moe_lens.models.lens import Lens

PREDICTIONS = 1024
"""Next-token distributions of the clean model that are kept, over all prompts."""


@dataclass(frozen=True)
class Reading:
    """A text, and where its next-token predictions are read."""

    ids: tuple[int, ...]
    at: tuple[int, ...]
    """Positions that predict."""


def along(prompt: Sequence[int], reply: Sequence[int], *, most: int) -> Reading:
    """The predictions of a reply's tokens, the end of the text included: evenly spaced if there are more than `most`.

    The first is made at the last token of the prompt.
    """
    ids = (*prompt, *reply)
    positions = np.arange(len(prompt) - 1, max(len(ids) - 1, len(prompt)))
    chosen = np.unique(np.linspace(0, len(positions) - 1, min(most, len(positions))).round().astype(int))
    return Reading(ids, tuple(positions[chosen].tolist()))


def predictions(lens: Lens, readings: Sequence[Reading]) -> Iterator[tuple[int, Float[Tensor, "prediction vocab"]]]:
    """Number of each reading and its log-probabilities. Texts are padded on the right, which no token before sees."""
    limit = BATCH_TOKENS.get(lens.device.type, BATCH_TOKENS_ELSEWHERE)
    order = sorted(range(len(readings)), key=lambda i: len(readings[i].ids))
    while order:
        width = len(readings[order[0]].ids)
        batch = [order.pop(0)]
        while order and (len(batch) + 1) * max(width, len(readings[order[0]].ids)) <= limit:
            batch.append(order.pop(0))
        ids, mask = _padded(lens, [readings[i].ids for i in batch])
        with torch.no_grad():
            logits = lens.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for row, number in enumerate(batch):
            yield number, logits[row, list(readings[number].at)].float().log_softmax(-1)


def _padded(lens: Lens, texts: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "text seq"], Int[Tensor, "text seq"]]:
    width = max(map(len, texts))
    pad = getattr(lens.tokenizer, "pad_token_id", None) or 0
    ids = torch.full((len(texts), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
        mask[row, : len(text)] = 1
    return ids.to(lens.device), mask.to(lens.device)


class Meter:
    """The clean model's predictions along texts, ready to be compared with those of the steered one."""

    def __init__(self, lens: Lens, readings: Sequence[Reading]) -> None:
        self.lens, self.readings = lens, list(readings)
        self._clean = dict(predictions(lens, self.readings))

    def kl(self, edit: Mode) -> Float[ndarray, "prompt"]:
        """KL(clean || edited) of the next token in nats, mean over each text's predictions."""
        found = np.zeros(len(self.readings))
        with self.lens.edit(edit, whole_layers=True):
            for number, log_p in predictions(self.lens, self.readings):
                clean = self._clean[number]
                found[number] = float((clean.exp() * (clean - log_p)).sum(-1).double().mean())
        return found

    def visits(self, layers: Sequence[int]) -> dict[int, tuple[Float[ndarray, "expert"], Float[ndarray, "expert"]]]:
        """Load (tokens) and gate mass of every expert of `layers` over the texts, prompts included."""
        load: dict[int, ndarray] = {}
        mass: dict[int, ndarray] = {}

        def count(tap: ExpertTap) -> None:
            weight = torch.zeros(tap.n_experts, dtype=torch.float64)
            weight.index_add_(0, tap.expert.cpu(), tap.weight.detach().double().cpu())
            load[tap.layer] = load.get(tap.layer, 0) + tap.offsets.diff().double().cpu().numpy()
            mass[tap.layer] = mass.get(tap.layer, 0) + weight.numpy()

        for reading in self.readings:
            ids, mask = _padded(self.lens, [reading.ids])
            with torch.no_grad(), self.lens.tapping(count, layers=layers, roles=[Role.MOE]):
                self.lens.model(input_ids=ids, attention_mask=mask, use_cache=False)
        return {layer: (load[layer], mass[layer]) for layer in load}
