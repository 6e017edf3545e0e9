"""What is taken away, and at which tokens of the evaluation text: the one thing that passes run under."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from moe_lens.errors import BadConfig
from moe_lens.models.edits import EditRecord, Mode
from moe_lens.types import ExpertAddress, ExpertTap

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from numpy import ndarray

    from moe_lens.models.edits.base import Bound
    from moe_lens.models.lens import Lens

LOCAL = frozenset({
    "zero", "mean", "mean_off", "resample", "patch", "drop_renorm", "mask_refill_keep", "swap", "noise", "per_visit",
})  # fmt: skip
"""Modes that change nothing in their own layer at tokens that do not visit a named expert. `mask_refill` is none:
where gates are not renormalised over the top-k, every token's gates grow."""
BLIND_TO_POSITION = LOCAL - {"patch"} | {"mask_refill"}
"""Modes that do not ask where in its window a token stands."""


@dataclass(frozen=True, eq=False)
class Ablation:
    """Modes with their scope, prepared once for all passes."""

    modes: tuple[Mode, ...]
    routing: Literal["live", "frozen"] = "live"
    tokens: Bool[ndarray, "corpus_token"] | None = None
    """Tokens of the tokenised corpus that may be edited; None means all."""
    whole_layers: bool = False
    record: EditRecord = field(default_factory=EditRecord)
    """Counts over all passes."""

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted({expert.layer for mode in self.modes for expert in mode.experts}))

    @property
    def title(self) -> str:
        """The modes with their experts, shortened."""
        return ", ".join(f"{mode.name}({_names(mode)})" for mode in self.modes)

    @property
    def is_positional(self) -> bool:
        """Whether a mode may ask where in its window a token stands."""
        return any(mode.name not in BLIND_TO_POSITION for mode in self.modes)

    def in_scope(self, token: Int[Tensor, "window seq"]) -> Bool[Tensor, "window seq"]:
        """Which tokens of a batch may be edited; `token` is their index in the corpus, -1 on padding."""
        if self.tokens is None:
            return token >= 0
        return (token >= 0) & torch.from_numpy(self.tokens[token.numpy()])

    def touched(
        self, token: Int[Tensor, "window seq"], routing: dict[int, tuple[Tensor, Tensor]]
    ) -> Bool[Tensor, "window seq"]:
        """Tokens whose residual stream an edit changes directly, given the clean routing of the batch.

        A token that visits a named expert only because an earlier layer was edited stands after a token that is
        touched there, so it is no start of anything.
        """
        found = torch.zeros_like(token, dtype=torch.bool)
        for mode in self.modes:
            for layer in {expert.layer for expert in mode.experts}:
                if mode.name not in LOCAL or layer not in routing:  # a dense layer is visited by every token
                    return self.in_scope(token)
                index = routing[layer][0].cpu()
                if isinstance(mode, PerVisit):
                    named = mode.choice[token.reshape(-1).numpy()][:, None]
                    hit = torch.from_numpy((index.numpy() == named).any(axis=1))
                else:
                    numbers = [e.expert for e in mode.experts if e.layer == layer]
                    hit = torch.isin(index, torch.tensor(numbers, dtype=index.dtype)).any(dim=1)
                found |= hit.view(token.shape)
        return found & self.in_scope(token)

    @contextmanager
    def at(
        self, lens: Lens, token: Int[Tensor, "window seq"], *, routing: Literal["live", "frozen"] = "live"
    ) -> Iterator[None]:
        """Edit the forward passes over a batch whose corpus tokens are `token`."""
        for mode in self.modes:
            if isinstance(mode, PerVisit):
                mode.begin(token)
        mask = None if self.tokens is None else self.in_scope(token)
        with lens.edit(*self.modes, routing=routing, tokens=mask, whole_layers=self.whole_layers) as record:
            yield
        for (mode, layer), counts in record.counts.items():
            before_after = record.mass.get((mode, layer))
            mass = None if before_after is None else (before_after[0], before_after[1])
            self.record.add(mode, layer, mass=mass, **counts)


def prepare(
    lens: Lens,
    edit: Mode | Sequence[Mode],
    *,
    routing: Literal["live", "frozen"] = "live",
    tokens: Bool[ndarray, "corpus_token"] | None = None,
    whole_layers: bool = False,
) -> Ablation:
    """Check an edit and let each mode collect its references once, not once a batch.

    Raises:
        BadConfig: nothing to do, what `lens.edit` refuses, or called inside a `lens.edit` block.
        OutOfRange: an expert that the model does not have.
    """
    modes: tuple[Any, ...] = tuple(edit) if isinstance(edit, (list, tuple)) else (edit,)
    if lens.is_edited:
        raise BadConfig("effects are measured against the clean model: leave the lens.edit block first")
    unprepared = [prepared(mode, None) if isinstance(mode, Mode) else mode for mode in modes]
    with lens.edit(*unprepared, routing=routing, whole_layers=whole_layers):
        pass  # refuses what cannot be done
    record = EditRecord()
    ready = tuple(prepared(mode, mode.prepare(lens, record)) for mode in modes)
    return Ablation(ready, routing, tokens, whole_layers, record)


def _names(mode: Mode) -> str:
    shown = ", ".join(map(str, mode.experts[:3]))
    return shown if len(mode.experts) <= 3 else f"{shown} and {len(mode.experts) - 3} more"


def prepared(mode: Mode, state: Any) -> Any:
    """A copy of a mode whose `prepare` gives `state`: what many passes share is collected once."""
    ready = copy.copy(mode)
    object.__setattr__(ready, "prepare", lambda _lens, _record: state)
    return ready


@dataclass(frozen=True, eq=False)
class PerVisit(Mode):
    """At each token another expert of one layer: zero, or a vector in place of what it writes.

    For controls in one pass: `choice` holds a random co-selected expert at each token that visits the expert under
    test (METRICS 2.5, within-token control).
    """

    name: ClassVar[str] = "per_visit"
    choice: Int[ndarray, "corpus_token"] = field(default_factory=lambda: np.empty(0, np.int64))
    """Expert to replace at each token of the corpus, -1 for none."""
    vectors: Float[Tensor, "expert d_model"] | None = None
    """What stands in for each expert; None means zero."""
    current: list[Tensor] = field(default_factory=list)
    """Choice at the tokens of the batch that is running."""

    def begin(self, token: Int[Tensor, "window seq"]) -> None:
        """Say which tokens of the corpus the next batch holds; -1 on padding."""
        flat = token.reshape(-1)
        self.current[:] = [torch.from_numpy(self.choice)[flat].masked_fill(flat < 0, -1)]

    def output(self, bound: Bound, tap: ExpertTap) -> Tensor:
        rows = self.current[0].to(tap.token.device)[tap.token] == tap.expert
        rows &= bound.rows(tap, bound.experts_in(tap.layer))
        output = tap.output.clone()
        new = torch.zeros_like(output[rows]) if self.vectors is None else self.vectors.to(output)[tap.expert[rows]]
        output[rows] = new
        bound.record.add(self.name, tap.layer, tokens=int(rows.sum()), visits=int(rows.sum()))
        return output


def per_visit(
    layer: int, choice: Int[ndarray, "corpus_token"], *, vectors: Float[Tensor, "expert d_model"] | None = None
) -> PerVisit:
    """Replace expert `choice[t]` of `layer` at each token t of the corpus (-1: none), by zero or by `vectors`.

    A visit that the token does not make is no visit: a choice outside the token's top-k changes nothing.

    Raises:
        BadConfig: nobody is chosen anywhere.
    """
    choice = np.asarray(choice, np.int64)
    if not (choice >= 0).any():
        raise BadConfig(
            f"no expert of layer {layer} is chosen at any token: give an expert where one is to be replaced"
        )
    experts = tuple(ExpertAddress(layer, int(e)) for e in np.unique(choice[choice >= 0]))
    return PerVisit(experts, choice=choice, vectors=vectors)
