"""Run a pair's model layer by layer: document losses, routing, and zero-ablation from the layer on.

Built on plain transformers so that the card does not depend on the package it is used to test. Ablating an
expert leaves everything below its layer unchanged, so those hidden states are computed once and kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from moe_lens.organisms.model import EXPERTS_IMPLEMENTATION, register_experts
from moe_lens.organisms.tokenizer import END_ID, PAD_ID

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import OlmoeForCausalLM, PreTrainedTokenizerFast

    from moe_lens.organisms.corpus import Document


def load(path: Path) -> OlmoeForCausalLM:
    """The checkpoint in fp32, with the fast experts loop."""
    from transformers import OlmoeForCausalLM

    register_experts()
    model = OlmoeForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model.config._experts_implementation = EXPERTS_IMPLEMENTATION
    return model


@dataclass(frozen=True)
class Windows:
    """Documents as right-padded rows of ids, each beginning with the end-of-text token."""

    ids: Tensor
    """[row, position]"""
    document: np.ndarray
    """[row] -> index of the document"""

    @property
    def real(self) -> Tensor:
        """[row, position]; False on padding."""
        return self.ids != PAD_ID


def windows(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast, length: int, *, per_document: int | None = None
) -> Windows:
    """Cut every document into windows of ``length`` ids (the first ``per_document`` of them)."""
    rows, owner = [], []
    for index, encoded in enumerate(tokenizer([d.text for d in documents], add_special_tokens=False)["input_ids"]):
        step = length - 1
        starts = range(0, max(len(encoded) - 1, 1), step)
        for start in list(starts)[:per_document]:
            row = [END_ID, *encoded[start : start + step]]
            rows.append(row + [PAD_ID] * (length - len(row)))
            owner.append(index)
    return Windows(torch.tensor(rows), np.array(owner))


class LayeredForward:
    """Losses of fixed windows, with any one expert zeroed, from cached hidden states."""

    def __init__(self, model: OlmoeForCausalLM, data: Windows, *, batch: int = 16, keep_hidden: bool = True) -> None:
        self.model, self.data, self.batch, self.keep_hidden = model, data, batch, keep_hidden
        self.n_layers = model.config.num_hidden_layers
        self.inputs: list[list[Tensor]] = [[] for _ in range(self.n_layers)]
        """Hidden states that enter each layer, batch by batch; empty (and no ablation) without ``keep_hidden``."""
        self.experts: list[list[Tensor]] = [[] for _ in range(self.n_layers)]
        """Chosen experts, [row * position, top_k], batch by batch."""
        with torch.no_grad():
            self.base = np.concatenate(
                [self._run(ids, self.model.model.embed_tokens(ids), 0, keep=True) for ids in self._parts()]
            )
        """Summed nats of each row without ablation."""

    def _parts(self) -> tuple[Tensor, ...]:
        return self.data.ids.split(self.batch)

    def _mlp(self, layer: int) -> Any:
        return self.model.model.layers[layer].mlp

    def _run(self, ids: Tensor, hidden: Tensor, first: int, *, keep: bool = False) -> np.ndarray:
        body = self.model.model
        positions = torch.arange(ids.shape[1]).unsqueeze(0)
        rotary = body.rotary_emb(hidden, positions)
        for layer in range(first, self.n_layers):
            if keep:
                if self.keep_hidden:
                    self.inputs[layer].append(hidden)
                hook = self._mlp(layer).gate.register_forward_hook(
                    lambda _m, _i, out, layer=layer: self.experts[layer].append(out[2])
                )
            # right padding and a causal mask: padding is only seen by padding
            hidden = body.layers[layer](
                hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary, use_cache=False
            )
            if keep:
                hook.remove()
        logits = self.model.lm_head(body.norm(hidden))[:, :-1]
        losses = F.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1), reduction="none", ignore_index=PAD_ID
        )
        return losses.view(ids.shape[0], -1).sum(1).numpy()

    def routing(self, layer: int) -> np.ndarray:
        """Chosen experts of all positions, [row * position, top_k]."""
        return torch.cat(self.experts[layer]).numpy()

    def targets(self) -> np.ndarray:
        """Predicted tokens of each row."""
        return self.data.real[:, 1:].sum(1).numpy()

    def ablated(self, layer: int, expert: int) -> np.ndarray:
        """Summed nats of each row with one expert's output set to zero."""

        def zero(_module: torch.nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden, indices, weights = arguments
            return hidden, indices, weights * (indices != expert)

        hook = self._mlp(layer).experts.register_forward_pre_hook(zero)
        nats = self.base.copy()
        start = 0
        try:
            for ids, hidden, chosen in zip(self._parts(), self.inputs[layer], self.experts[layer], strict=True):
                # a row that never visits the expert cannot change
                rows = (chosen == expert).view(len(ids), -1).any(1).nonzero().squeeze(1)
                if len(rows):
                    with torch.no_grad():
                        nats[start + rows.numpy()] = self._run(ids[rows], hidden[rows], layer)
                start += len(ids)
        finally:
            hook.remove()
        return nats


def per_document(values: np.ndarray, owner: np.ndarray, n_documents: int) -> np.ndarray:
    """Sum row values by document."""
    return np.bincount(owner, weights=values, minlength=n_documents)
