"""Run a model again from the layer that an edit changes; what lies before is replayed from a clean pass.

1. The clean pass keeps what every decoder layer and every token mixer returned, and the routing.
2. The edited layer runs for the touched tokens alone: its token mixers give what they gave, everything else in a
   layer acts on one token at a time. The result goes into the layer's clean output.                  ("tokens")
3. The later layers run for the windows that hold a touched token; those of several edits of a layer in one pass.
4. Where step 2 is not exact for a family (an experts' output that is convolved over tokens, say), the edited layer
   runs as a whole ("layers"); where replaying itself is not, all of the model ("full"). `Replay.reach` finds out,
   layer by layer, by comparing final hidden states on a few tokens.

Nothing here knows a family: layers and mixers are stubbed from outside, masks and position embeddings are made by
the model's own forward.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from moe_lens.causal.ablation import Ablation, prepare
from moe_lens.models import families
from moe_lens.models.adapters.base import replace_forward
from moe_lens.models.edits import zero
from moe_lens.models.seam import Edit, Routing, StopForward, tapping
from moe_lens.models.sites import decoder_layers
from moe_lens.types import ExpertAddress, Role

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from moe_lens.models.lens import Lens

log = logging.getLogger("moe_lens")

Reach = Literal["tokens", "layers", "full"]
ROUNDING = 50 * torch.finfo(torch.float32).eps
"""Largest difference of hidden states, over their largest value, that other shapes of the same products make."""
OF_EFFECT = 0.02
"""In low precision rounding is larger: then the difference may be this share of what the edit itself does."""
TRIAL = (2, 32)
"""Windows and tokens of each on which a shortcut is tried."""


@dataclass(eq=False)
class Clean:
    """One batch through the clean model, with what later passes replay."""

    ids: Int[Tensor, "window seq"]
    mask: Int[Tensor, "window seq"]
    token: Int[Tensor, "window seq"]
    """Index in the tokenised corpus, -1 on padding; on the CPU."""
    embedded: Any = None
    """First argument of the first decoder layer."""
    blocks: list[Any] = field(default_factory=list)
    """What each decoder layer returned."""
    mixers: list[dict[nn.Module, Any]] = field(default_factory=list)
    """What each token mixer of each layer returned."""
    routing: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Experts and weights (token, slot) of each MoE layer."""
    output: Any = None
    """What the decoder returned."""

    @property
    def hidden(self) -> Float[Tensor, "window seq d_model"]:
        return self.output.last_hidden_state

    @property
    def n_bytes(self) -> int:
        """Memory of everything that is kept."""
        found: list[int] = []
        count = lambda x: found.append(x.numel() * x.element_size()) or x  # noqa: E731
        _map((self.embedded, self.blocks, [list(m.values()) for m in self.mixers], self.hidden), count)
        return sum(found)


class _Record(Edit):
    def __init__(self, into: dict[int, tuple[Tensor, Tensor]]) -> None:
        self.into = into

    def routing(self, routing: Routing) -> None:
        self.into[routing.site.layer] = (routing.index.clone(), routing.weight.clone())


class _Freeze(Edit):
    """Every layer chooses what it chose in the clean pass."""

    def __init__(self, clean: Clean, windows: Tensor) -> None:
        self.clean, self.windows = clean, windows

    def routing(self, routing: Routing) -> Routing:
        index, weight = (self._rows(x) for x in self.clean.routing[routing.site.layer])
        return replace(routing, index=index, weight=weight)

    def _rows(self, x: Tensor) -> Tensor:
        return x.view(*self.clean.ids.shape, -1)[self.windows].flatten(0, 1)


class Replay:
    """A lens whose passes can start at a layer."""

    def __init__(self, lens: Lens, *, reach: Reach | None = None) -> None:
        """`reach`: use this shortcut and no other, unchecked; None checks each layer when it is first edited."""
        self.lens = lens
        self.forced: Reach | None = reach
        self.notes: dict[int, str] = {}
        """Layers that cannot be edited alone, and why."""
        self._reach: dict[int, Reach] = {}
        self._routed = [site for site in lens.sites if site.routed and site.role is Role.MOE]
        self._mixers = [_mixers_of(block) for block in lens.blocks]

    @torch.no_grad()
    def clean(
        self, ids: Int[Tensor, "window seq"], mask: Int[Tensor, "window seq"], token: Int[Tensor, "window seq"]
    ) -> Clean:
        """Run the model as it is and keep what `edited` needs."""
        found = Clean(ids, mask, token, blocks=[None] * len(self.lens.blocks), mixers=[{} for _ in self.lens.blocks])

        def first(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.embedded = (args[0] if args else kwargs["hidden_states"]).clone()

        with ExitStack() as stack:
            stack.enter_context(self._tapping(_Record(found.routing)))
            stack.callback(self.lens.blocks[0].register_forward_pre_hook(first, with_kwargs=True).remove)
            for layer, block in enumerate(self.lens.blocks):
                stack.callback(block.register_forward_hook(_keeper(found.blocks, layer)).remove)
                for mixer in self._mixers[layer]:
                    stack.callback(mixer.register_forward_hook(_keeper(found.mixers[layer], mixer)).remove)
            found.output = self.decode(ids, mask)
        return found

    @torch.no_grad()
    def edited(
        self, clean: Clean, ablation: Ablation
    ) -> tuple[Bool[Tensor, "window seq"], Float[Tensor, "affected d_model"]]:
        """Run the edited model where the edit can reach.

        Returns:
            The tokens that may differ from the clean pass, and their final hidden states. Every other token is
            as in the clean pass, by construction: no path leads there from a touched one.
        """
        return self._run(clean, ablation, self.reach(ablation, clean))

    def can_share(self, clean: Clean, ablation: Ablation) -> bool:
        """Whether the later layers of an edit can run in one pass with those of others (`edited_together`)."""
        return len(ablation.layers) == 1 and self.reach(ablation, clean) == "tokens"

    @torch.no_grad()
    def edited_together(
        self, clean: Clean, ablations: Sequence[Ablation]
    ) -> list[tuple[Bool[Tensor, "window seq"], Float[Tensor, "affected d_model"]]]:
        """`edited` for several edits of one layer and one routing, each on its own, that `can_share` passes.

        Each computes its tokens of the edited layer; then the windows of all of them go through the later layers
        at once.
        """
        layer, is_last = ablations[0].layers[0], ablations[0].layers[0] == len(self.lens.blocks) - 1
        touched = [ablation.touched(clean.token, clean.routing) for ablation in ablations]
        found = [(at, clean.hidden[at]) for at in touched]
        some = [i for i, at in enumerate(touched) if at.any()]
        if not some:
            return found
        windows = [touched[i].any(dim=1).nonzero().squeeze(1) for i in some]
        blocks = [self._block(clean, ablations[i], layer, touched[i]) for i in some]
        hidden = self._later_together(clean, ablations[0].routing, layer, windows, blocks)
        for i, at, own in zip(some, windows, hidden.split([len(at) for at in windows]), strict=True):
            affected = touched[i] if is_last else (touched[i].cumsum(dim=1) > 0) & (clean.token >= 0)
            found[i] = affected, own[affected[at]]
        return found

    def _later_together(
        self, clean: Clean, routing: str, layer: int, windows: Sequence[Tensor], blocks: Sequence[Any]
    ) -> Float[Tensor, "chosen seq d_model"]:
        """Final hidden states of the windows of all edits, one edit after the other; `layer` returned `blocks`."""
        n, chosen = len(clean.ids), torch.cat(list(windows))

        def select(x: Tensor) -> Tensor:
            return x[chosen] if x.dim() and len(x) == n else x

        def join(*each: Tensor) -> Tensor:
            if not each[0].dim() or len(each[0]) != n:
                return each[0]
            return torch.cat([x[at] for x, at in zip(each, windows, strict=True)])

        with ExitStack() as stack:
            self._stub_blocks(clean, layer + 1, select, _zip_all(blocks, join), stack)
            if routing == "frozen" and self._routed:
                stack.enter_context(self._tapping(_Freeze(clean, chosen)))
            return self.decode(clean.ids[chosen], clean.mask[chosen]).last_hidden_state

    def _run(self, clean: Clean, ablation: Ablation, reach: Reach) -> tuple[Tensor, Tensor]:
        layer = ablation.layers[0]
        if reach == "full":
            with ablation.at(self.lens, clean.token, routing=ablation.routing):
                hidden = self.decode(clean.ids, clean.mask).last_hidden_state
            affected = clean.token >= 0
            return affected, hidden[affected]
        touched = ablation.touched(clean.token, clean.routing)
        if not touched.any():
            return touched, clean.hidden[touched]
        is_last = reach == "tokens" and layer == len(self.lens.blocks) - 1
        affected = touched if is_last else (touched.cumsum(dim=1) > 0) & (clean.token >= 0)
        windows = touched.any(dim=1).nonzero().squeeze(1)
        block = self._block(clean, ablation, layer, touched) if reach == "tokens" else None
        hidden = self._later(clean, ablation, layer, windows, block)
        return affected, hidden[affected[windows]]

    def reach(self, ablation: Ablation, clean: Clean) -> Reach:
        """The shortest way that is exact for an ablation that starts in this layer."""
        layer = ablation.layers[0]
        if ablation.routing == "frozen" and len(ablation.layers) > 1:  # each edit chooses from clean logits
            return "full"
        if self.forced is None and layer not in self._reach:
            self._reach[layer] = self._try(layer, clean)
        reach = self.forced or self._reach[layer]
        if reach == "tokens" and ablation.is_positional:  # a selection of tokens has lost its positions
            return "layers"
        return reach

    def _block(self, clean: Clean, ablation: Ablation, layer: int, touched: Tensor) -> Any:
        """What `layer` returns when edited: its clean return with the touched tokens computed anew."""
        at, shape = touched.nonzero(as_tuple=True), clean.ids.shape
        kept: list[Any] = []

        def pick(x: Tensor) -> Tensor:
            return x[at].unsqueeze(0) if x.shape[:2] == shape else x

        def put(old: Tensor, new: Tensor) -> Tensor:
            if old.shape[:2] != shape or new.shape[:2] != (1, len(at[0])):
                return old
            patched = old.clone()
            patched[at] = new[0]
            return patched

        def begin(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = pick(clean.embedded)
            return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

        with ExitStack() as stack:
            self._stub_blocks(clean, layer, pick, _map(clean.blocks[layer - 1], pick) if layer else None, stack)
            for mixer, value in clean.mixers[layer].items():
                replace_forward(mixer, _returns(_map(value, pick)), stack)
            block = self.lens.blocks[layer]
            if layer == 0:  # embeddings may depend on positions, which a selection of tokens has lost
                stack.callback(block.register_forward_pre_hook(begin, with_kwargs=True).remove)
            stack.enter_context(_stopping_after(block, kept))
            stack.enter_context(ablation.at(self.lens, clean.token[touched].unsqueeze(0)))
            with suppress(StopForward):
                self.decode(pick(clean.ids), None)
        return _zip(clean.blocks[layer], kept[0], put)

    def _later(
        self, clean: Clean, ablation: Ablation, layer: int, windows: Tensor, block: Any
    ) -> Float[Tensor, "chosen seq d_model"]:
        """Final hidden states of `windows`; `layer` returned `block`, or runs itself if that is None."""
        n = len(clean.ids)

        def select(x: Tensor) -> Tensor:
            return x[windows] if x.dim() and len(x) == n and len(windows) < n else x

        first = layer if block is None else layer + 1
        with ExitStack() as stack:
            last = clean.blocks[first - 1] if block is None else block
            self._stub_blocks(clean, first, select, _map(last, select) if first else None, stack)
            if ablation.routing == "frozen" and self._routed:
                stack.enter_context(self._tapping(_Freeze(clean, windows)))
            if block is None or len(ablation.layers) > 1:
                stack.enter_context(ablation.at(self.lens, clean.token[windows]))
            return self.decode(clean.ids[windows], clean.mask[windows]).last_hidden_state

    def _stub_blocks(self, clean: Clean, n: int, pick: Callable[[Tensor], Tensor], last: Any, stack: ExitStack) -> None:
        """Let the first `n` layers return what `pick` leaves of what they returned; the last of them `last`.

        What a layer hands to a replayed one is read by nobody, so a plain tensor need not be the layer's own.
        """
        if n == 0:
            return
        for layer, block in enumerate(self.lens.blocks[:n]):
            is_plain = isinstance(last, Tensor) and isinstance(clean.blocks[layer], Tensor)
            value = last if is_plain or layer == n - 1 else _map(clean.blocks[layer], pick)
            replace_forward(block, _returns(value), stack)

    def _try(self, layer: int, clean: Clean) -> Reach:
        """Compare shortcuts with a full pass: zero the busiest expert of `layer` in a few short windows."""
        windows, seq = TRIAL
        part = [x[:windows, :seq].contiguous() for x in (clean.ids, clean.mask, clean.token)]
        trial = self.clean(*part)
        busiest = 0
        if layer in trial.routing:
            real = (part[2] >= 0).reshape(-1).to(clean.ids.device)
            busiest = int(trial.routing[layer][0][real].flatten().bincount().argmax())
        ablation = prepare(self.lens, zero(ExpertAddress(layer, busiest)), whole_layers=True)
        with ablation.at(self.lens, trial.token):
            wanted = self.decode(trial.ids, trial.mask).last_hidden_state
        reasons: list[str] = []
        shortcuts: tuple[Reach, ...] = ("tokens", "layers")
        for reach in shortcuts:
            try:
                affected, got = self._run(trial, ablation, reach)
            except Exception as error:  # whatever a family's forward makes of a stubbed layer
                reasons.append(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
                continue
            whole = trial.hidden.clone()
            whole[affected] = got
            if (why := _differs(whole, wanted, trial.hidden, trial.token >= 0)) == "":
                return self._noted(layer, reach, reasons)
            reasons.append(why)
        return self._noted(layer, "full", reasons)

    def _noted(self, layer: int, reach: Reach, reasons: list[str]) -> Reach:
        if reach != "tokens":
            ran = "the whole layer runs again" if reach == "layers" else "the whole model runs for each edit"
            self.notes[layer] = f"L{layer} cannot be edited token by token, so {ran} ({reasons[-1]})"
            log.info("%s", self.notes[layer])
        return reach

    def decode(self, ids: Int[Tensor, "window seq"], mask: Int[Tensor, "window seq"] | None) -> Any:
        """Run the decoder, without the LM head."""
        decoder, base = decoder_of(self.lens), self.lens.model.base_model
        if decoder is base:
            return base(input_ids=ids, attention_mask=mask, use_cache=False)
        kept: list[Any] = []
        with _stopping_after(decoder, kept), suppress(StopForward):
            base(input_ids=ids, attention_mask=mask, use_cache=False)
        return kept[0] if kept else None  # somebody stopped it earlier

    @contextmanager
    def _tapping(self, edit: Edit) -> Iterator[None]:
        with tapping(self.lens.model, self._routed, lambda _tap: None, kernel=self.lens.kernel, edit=edit):
            yield


def decoder_of(lens: Lens) -> Any:
    """The part of a causal language model that ends with the final hidden states."""
    if lens.model.base_model is not lens.model:
        return lens.model.base_model
    path = decoder_layers(lens.model)[0][0]  # Llama 4 does not say what its base model is
    return lens.model.get_submodule(path.rsplit(".", 2)[0])


@contextmanager
def _stopping_after(module: nn.Module, kept: list[Any]) -> Iterator[None]:
    """End the forward pass once `module` has run, and keep what it returned."""

    def stop(_module: nn.Module, _args: Any, out: Any) -> None:
        kept.append(out)
        raise StopForward

    handle = module.register_forward_hook(stop)
    try:
        yield
    finally:
        handle.remove()


def _mixers_of(block: nn.Module) -> list[nn.Module]:
    """The outermost modules of a layer that mix tokens."""
    found: dict[str, nn.Module] = {}
    for name, module in block.named_modules():
        words = f"{name.rpartition('.')[2]} {type(module).__name__}".lower()
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if name and not inside and "norm" not in words and any(word in words for word in families.MIXER_WORDS):
            found[name] = module
    return list(found.values())


def _keeper(into: Any, key: Any) -> Callable[..., None]:
    def keep(_module: nn.Module, _args: Any, out: Any) -> None:
        into[key] = _map(out, lambda x: x.clone())  # a later layer may write in place

    return keep


def _returns(value: Any) -> Callable[..., Any]:
    return lambda *_args, **_kwargs: value


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every tensor in tuples, lists and dicts changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)([_map(part, change) for part in value])
    if isinstance(value, dict):
        return {key: _map(part, change) for key, part in value.items()}
    return value


def _zip(old: Any, new: Any, put: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """`old` with its tensors replaced by `put(old, new)`, part by part."""
    if isinstance(old, Tensor):
        return put(old, new)
    if isinstance(old, (tuple, list)):
        return type(old)([_zip(a, b, put) for a, b in zip(old, new, strict=True)])
    return old


def _zip_all(values: Sequence[Any], join: Callable[..., Tensor]) -> Any:
    """One value of the shape of each of `values`, with their tensors joined."""
    first = values[0]
    if isinstance(first, Tensor):
        return join(*values)
    if isinstance(first, (tuple, list)):
        return type(first)([_zip_all(parts, join) for parts in zip(*values, strict=True)])
    return first


def _differs(got: Tensor, wanted: Tensor, clean: Tensor, real: Tensor) -> str:
    """Why `got` is not `wanted` up to rounding, "" if it is."""
    is_low = wanted.dtype.itemsize < 4
    got, wanted, clean = (x.detach()[real].double() for x in (got, wanted, clean))
    off, effect = (got - wanted).abs(), (wanted - clean).abs()
    is_rounding = float(off.max()) <= ROUNDING * float(wanted.abs().max())
    if is_rounding or (is_low and float(off.norm()) <= OF_EFFECT * float(effect.norm())):
        return ""
    return f"hidden states would be off by up to {float(off.max()):.2g}"
