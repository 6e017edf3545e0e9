"""A stand-in for a loaded model whose neurons and routing are drawn to order."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from moe_lens.corpus.batches import Tokenized
from moe_lens.models.spec import LayerSpec
from moe_lens.types import Role, TokenBatch
from tests.synthetic import make_tap

NOISE = 16
POSITIONS = 4096


class FakeLens:
    """Neurons read concept labels (as strongly as `signal` says), the token's noise and its document's noise.

    Args:
        weights: (layer, expert, feature, d_ff), see `neurons`.
        copies: each expert stands `copies` times, and every token picks one of the copies, always the same.
    """

    def __init__(self, weights: torch.Tensor, *, top_k: int = 1, copies: int = 1, name: str = "fake", seed: int = 0):
        self.weights, self.top_k, self.copies, self.name = weights, top_k, copies, name
        n_layers, n_experts, _, d_ff = weights.shape
        role = Role.MOE if n_experts > 1 else Role.DENSE
        entry = [LayerSpec(i, role, n_experts * copies, top_k, d_ff, None, False) for i in range(n_layers)]
        self.spec = SimpleNamespace(
            is_moe=n_experts > 1, n_layers=n_layers, layers=tuple(entry), d_model=8, name=name, max_positions=None
        )
        self.layers = tuple(range(n_layers))
        self.model = SimpleNamespace(dtype=torch.float32)
        self.seed = seed
        self.reads: Tokenized | None = None  # labels to follow instead of those of the batch
        g = torch.Generator().manual_seed(99)  # the text is the same for every model
        self._token = torch.randn(POSITIONS, NOISE, generator=g)
        self._document = 0.7 * torch.randn(POSITIONS, NOISE, generator=g)

    def check_layers(self, layers):
        return self.layers if layers is None else tuple(layers)

    def forward(self, batch: TokenBatch, on_tap, *, layers=None, roles=(), **_):
        document, place = batch.token_document, batch.char_start.reshape(-1).clamp(min=0)
        at = (document * 1009 + place * 9176) % POSITIONS
        labels = batch.token_labels if self.reads is None else self._true_labels(batch)
        x = torch.cat([labels.float(), self._token[at] + self._document[document % POSITIONS]], 1)
        for layer in layers:
            n_experts = self.weights.shape[1]
            router = torch.Generator().manual_seed(7 * layer + self.seed)
            scores = torch.rand(POSITIONS, n_experts, generator=router)[(at + 31 * document) % POSITIONS]
            experts = scores.topk(self.top_k).indices
            h = torch.einsum("tf,tkfd->tkd", x, self.weights[layer][experts]).relu()
            copy = ((at * 2654435761 + document) >> 7) % self.copies
            chosen = experts * self.copies + copy[:, None]
            role = Role.MOE if self.spec.is_moe else Role.DENSE
            if role in roles:
                on_tap(make_tap(batch, chosen, h, n_experts=n_experts * self.copies, layer=layer, role=role))

    def _true_labels(self, batch: TokenBatch) -> torch.Tensor:
        assert self.reads is not None
        t = self.reads
        keys = t.document[t.window_of].astype(np.int64) * POSITIONS + t.char_start
        order = keys.argsort(kind="stable")
        wanted = (batch.token_document * POSITIONS + batch.char_start.reshape(-1)).numpy()
        at = order[np.searchsorted(keys[order], wanted).clip(max=len(keys) - 1)]
        return torch.from_numpy(t.labels()[at])


def neurons(n_layers: int, n_experts: int, n_concepts: int, d_ff: int, *, signal: float, seed: int) -> torch.Tensor:
    """Random neurons, all of one distribution: (layer, expert, concept + noise, d_ff)."""
    g = torch.Generator().manual_seed(seed)
    reads = signal * torch.randn(n_layers, n_experts, n_concepts, d_ff, generator=g)
    hears = torch.randn(n_layers, n_experts, NOISE, d_ff, generator=g) / NOISE**0.5
    return torch.cat([reads, hears], 2)
