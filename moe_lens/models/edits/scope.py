"""Which tokens of the pass under way an edit may touch."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_lens.errors import BadConfig

if TYPE_CHECKING:
    from jaxtyping import Bool, Int

    Tokens = Bool[Tensor, "window seq"] | Callable[[Int[Tensor, "window seq"]], Bool[Tensor, "window seq"]]


@dataclass
class Scope:
    """Tokens and documents chosen by the user, and what they mean for the batch that is running."""

    tokens: Tokens | None = None
    documents: Collection[int] | None = None
    mask: Bool[Tensor, "token"] | None = None
    """Flat tokens of the current batch that may be touched; None means all of them."""
    seen: set[int] = field(default_factory=set)
    """Documents that came by."""
    position: Int[Tensor, "token"] | None = None
    """Index of each flat token among the attended tokens of its window, tokens in a KV cache included."""

    def __post_init__(self) -> None:
        """Refuse what cannot say which tokens or documents are meant.

        Raises:
            BadConfig: see the sentence.
        """
        if self.tokens is not None and not callable(self.tokens):
            try:
                self.tokens = torch.as_tensor(self.tokens).bool()
            except (TypeError, ValueError, RuntimeError) as error:
                raise BadConfig("tokens= must be a mask of the batch's shape or a function of input_ids") from error
        numbers = isinstance(self.documents, Collection) and all(isinstance(d, int) for d in self.documents)
        if self.documents is not None and not numbers:
            raise BadConfig(f"documents= must be a list of numbers, such as [0, 2], not {self.documents!r}")

    def begin(self, inputs: Tensor, kwargs: dict[str, Any], window_documents: Int[Tensor, "window"] | None) -> None:
        """Work out the masks for one forward pass.

        Args:
            inputs: token ids (window, seq), or embeddings (window, seq, d_model).
            kwargs: of the forward call; attention mask and cache are read.
            window_documents: document of each window; None means one document per window.

        Raises:
            BadConfig: a token mask of another shape than the batch, or a function of token ids on embeddings.
        """
        shape, device = inputs.shape[:2], inputs.device
        self.mask = None
        if self.tokens is not None:
            self.mask = self._token_mask(inputs, shape).to(device).reshape(-1)
        if self.documents is not None:
            ids = torch.arange(shape[0]) if window_documents is None else window_documents.cpu()
            self.seen.update(ids.tolist())
            chosen = torch.isin(ids, torch.tensor(sorted(self.documents), dtype=ids.dtype))
            windows = chosen.to(device).repeat_interleave(shape[1])
            self.mask = windows if self.mask is None else self.mask & windows
        self.position = _positions(shape, kwargs, device)

    def _token_mask(self, inputs: Tensor, shape: torch.Size) -> Tensor:
        if isinstance(self.tokens, Tensor):
            if self.tokens.shape != shape:
                raise BadConfig(
                    f"the token mask has shape {tuple(self.tokens.shape)} but the batch has {tuple(shape)}: "
                    "give a mask of the batch's shape, or a function of input_ids"
                )
            return self.tokens.bool()
        assert self.tokens is not None
        if inputs.dim() != 2:
            raise BadConfig("tokens= is a function of input_ids, but the model was called with embeddings: give a mask")
        mask = self.tokens(inputs)
        if not isinstance(mask, Tensor) or mask.shape != shape:
            raise BadConfig(f"the function given as tokens= must return a bool tensor of shape {tuple(shape)}")
        return mask.bool()


def _positions(shape: torch.Size, kwargs: dict[str, Any], device: torch.device) -> Int[Tensor, "token"]:
    attended = kwargs.get("attention_mask")
    cache = kwargs.get("past_key_values")
    seen = 0 if cache is None else int(cache.get_seq_length())
    if isinstance(attended, Tensor) and attended.dim() == 2 and attended.shape[1] == seen + shape[1]:
        return (attended.to(device).cumsum(dim=1) - 1)[:, seen:].clamp(min=0).reshape(-1)
    return (torch.arange(shape[1], device=device) + seen).repeat(shape[0])
