"""Put ablation modes to work on a model: `with lens.edit(...)` around any code that runs it.

1. refuse what the model does not have, then let each mode prepare (clean reference passes)
2. tap the layers concerned; a hook on the decoder tells the scope what batch is coming
3. frozen routing: before each forward pass the same inputs run clean, and every layer replays the experts and
   weights chosen there
4. on exit, also by an exception, everything is as it was
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from moe_lens.errors import BadConfig
from moe_lens.models.edits.base import Bound, Mode, check_layers_stay
from moe_lens.models.edits.record import EditRecord
from moe_lens.models.edits.scope import Scope
from moe_lens.models.seam import Edit, Pass, Routing, StopForward, tapping
from moe_lens.types import Role

if TYPE_CHECKING:
    from moe_lens.models.edits.scope import Tokens
    from moe_lens.models.lens import Lens

log = logging.getLogger("moe_lens")

DownstreamRouting = Literal["live", "frozen"]
MARK = "_moe_lens_edits"
"""Attribute of a model that says which `routing` each open block has, outermost first."""
ROUTING: tuple[DownstreamRouting, ...] = ("live", "frozen")


@contextmanager
def edit(
    lens: Lens,
    modes: Collection[Mode],
    *,
    routing: DownstreamRouting = "live",
    tokens: Tokens | None = None,
    documents: Collection[int] | None = None,
    whole_layers: bool = False,
) -> Iterator[EditRecord]:
    """See `Lens.edit`."""
    routed = [site for site in lens.sites if site.routed and site.role is Role.MOE]
    if not routed:  # a dense model has no routing to freeze
        routing = "live" if routing == "frozen" else routing
    _check(lens, modes, routing, whole_layers)
    record, scope = EditRecord(), Scope(tokens, documents)
    clean: dict[int, Routing] = {}
    bounds = [Bound(m, lens, scope, record, clean, routing == "frozen", m.prepare(lens, record)) for m in modes]
    with ExitStack() as stack:
        current = Pass()
        if routing == "frozen":
            current = stack.enter_context(tapping(lens.model, routed, _ignore, kernel=lens.kernel, edit=_Replay(clean)))
        for bound in bounds:
            layers = {expert.layer for expert in bound.mode.experts}
            sites = [site for site in lens.sites if site.layer in layers and site.role is not Role.SHARED]
            found = stack.enter_context(tapping(lens.model, sites, _ignore, kernel=lens.kernel, edit=bound))
            current = current if routing == "frozen" else found

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if current.recording is not None:
                return
            if routing == "frozen":
                clean.clear()
                clean.update(_clean_pass(module, args, kwargs, current))
            scope.begin(_inputs(args, kwargs), kwargs, lens.window_documents)

        stack.callback(lens.model.base_model.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.enter_context(_marked(lens.model, routing))
        yield record
    if missed := sorted(set(documents or ()) - scope.seen):
        log.warning("no document %s came by inside the block, so it was not edited", ", ".join(map(str, missed)))
    if (sentence := record.warning()) is not None:
        log.warning(sentence)


@contextmanager
def _marked(model: nn.Module, routing: str) -> Iterator[None]:
    """Note on the model, which several lenses may share, that a block is open."""
    outer = vars(model).get(MARK, ())
    object.__setattr__(model, MARK, (*outer, routing))
    try:
        yield
    finally:
        if outer:
            object.__setattr__(model, MARK, outer)
        else:
            object.__delattr__(model, MARK)


class _Replay(Edit):
    """Every layer chooses what it chose in the clean pass."""

    def __init__(self, clean: dict[int, Routing]) -> None:
        self.clean = clean

    def routing(self, routing: Routing) -> Routing:
        recorded = self.clean[routing.site.layer]
        return replace(routing, index=recorded.index, weight=recorded.weight)


def _clean_pass(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], current: Pass) -> dict[int, Routing]:
    if kwargs.get("past_key_values") is not None:
        raise BadConfig(
            "frozen routing needs the whole text in one pass, so it cannot generate or use a KV cache: "
            "use routing='live'"
        )
    with current.record() as recorded, torch.no_grad(), suppress(StopForward):  # it may want only the first layers
        module(*args, **{**kwargs, "use_cache": False})
    return recorded


def _inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    given = [args[0] if args else None, kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
    found = next((value for value in given if isinstance(value, torch.Tensor)), None)
    if found is None:
        raise BadConfig("the edited model was called without input_ids: give input_ids or inputs_embeds")
    return found


def _ignore(_tap: Any) -> None:
    """Edits need no tap."""


def _check(lens: Lens, modes: Collection[Mode], routing: str, whole_layers: bool) -> None:
    if not modes:
        raise BadConfig("lens.edit was given nothing to do: pass at least one mode, such as zero('L0.E1')")
    for mode in modes:
        if not isinstance(mode, Mode):
            raise BadConfig(f"lens.edit takes modes such as zero('L0.E1'), not {mode!r}")
        mode.check(lens)
    if routing not in ROUTING:
        raise BadConfig(f"unknown routing {routing!r}: use live or frozen")
    if (outer := vars(lens.model).get(MARK, ())) and "frozen" in (routing, *outer):
        raise BadConfig(
            "a block with routing='frozen' neither nests nor holds another: give all modes to one lens.edit"
        )
    check_layers_stay(lens, list(modes), whole_layers)
