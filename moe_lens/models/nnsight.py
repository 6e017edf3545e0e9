"""Experts inside an nnsight trace: `lens.nnsight` and `lens.at("L7.E12")`.

1. `LensModel` is nnsight's `LanguageModel` on the lens's own weights. What it runs (trace, generate, pipe)
   runs inside a `tapping` block.
2. The edit of that block, `_Offers`, stops at three points of every layer: the routing, the activation, the
   output. At each it hands an `Offer` to nnsight, which addresses values by strings such as
   ``model.model.layers.7.mlp.experts.expert_output``.
3. A handle that the user reads or sets waits for that string, takes the rows of its expert from the offer,
   and the offer carries what was changed back into the model.

No step depends on the names of operations inside transformers. Values arrive in the order in which the model
computes them, which is nnsight's rule: layer by layer, and in a layer routing, activation, output, block.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode

from moe_lens.errors import BadConfig, ModelNotFound, NotAnMoE, UnsupportedModel
from moe_lens.models.offers import Offer, RoutingOffer, Window, rows_of, window_of
from moe_lens.models.seam import Edit, Kernel, Routing, tapping
from moe_lens.models.sites import Site, decoder_layers
from moe_lens.types import ExpertAddress, ExpertTap, Role

try:
    from nnsight import LanguageModel
    from nnsight.intervention.interleaver import Mediator, OutOfOrderError
except ImportError as error:
    raise UnsupportedModel("lens.nnsight needs nnsight 0.8 or newer: pip install nnsight --upgrade") from error

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from moe_lens.models.lens import Lens

ROUTING, ACTIVATION, OUTPUT = "expert_routing", "expert_activation", "expert_output"


class LensModel(LanguageModel):
    """nnsight's language model around a lens. Nothing is copied but the tokenizer, which nnsight pads on the left."""

    def __init__(self, lens: Lens) -> None:
        """Wrap the lens's own model.

        Raises:
            ModelNotFound: the lens has no tokenizer.
        """
        if lens.tokenizer is None:
            raise ModelNotFound("nnsight needs a tokenizer: make the lens as Lens(model, tokenizer)")
        self._sites: tuple[Site, ...] = lens.sites
        self._kernel: Kernel = lens.kernel
        self._visits: WeakKeyDictionary[Any, dict[str, Visits]] = WeakKeyDictionary()
        with _staying(lens.model, lens.device):
            super().__init__(lens.model, tokenizer=copy.deepcopy(lens.tokenizer))

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the first weights that are not offloaded (nnsight would take the first)."""
        return next((p.device for p in self._module.parameters() if p.device.type != "meta"), torch.device("cpu"))

    def interleave(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        """Run `fn` beside the blocks of the trace; every run of nnsight passes here."""
        if detect_fake_mode() is not None:  # a scan computes shapes only, and routing needs values
            return super().interleave(fn, *args, **kwargs)
        with tapping(self._module, self._sites, lambda _tap: None, kernel=self._kernel, edit=_Offers(self)):
            return super().interleave(fn, *args, **kwargs)

    @property
    def passes(self) -> int:
        """How many forward passes the model has begun."""
        return self.interleaver.counts.get(f"{self.path}.input", 0)

    def path_of(self, module: nn.Module) -> str:
        """nnsight's name of a module of the model."""
        return self.interleaver.envoys[id(module)].path


@contextmanager
def _staying(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Keep the transformers pipeline that nnsight builds from moving `model` to the first accelerator.

    It leaves a model alone that says where its parts are, and refuses one whose first part is on disk.
    """
    before = {key: value for key, value in vars(model).items() if key == "hf_device_map"}
    model.hf_device_map = {"": device}  # type: ignore[assignment]
    try:
        yield
    finally:
        del model.hf_device_map
        vars(model).update(before)


class Visits(NamedTuple):
    """Which tokens visit the experts of a layer, as a block last learnt it."""

    step: int
    """How many times the layer had run before, since the block began."""
    passes: int
    token: Int[Tensor, "row"]
    weight: Float[Tensor, "row"]
    offsets: Int[Tensor, "expert+1"]
    n_tokens: int


class _Offers(Edit):
    """Stops at the three points of every layer, for whoever waits there."""

    def __init__(self, model: LensModel) -> None:
        self.interleaver = model.interleaver
        self.paths = {(site.layer, site.role): model.path_of(site.module) for site in model._sites}

    def routing(self, routing: Routing) -> Routing:
        offer = RoutingOffer(routing)
        self._hand_over(routing.site.layer, routing.site.role, ROUTING, offer)
        return offer.routing

    def activation(self, tap: ExpertTap) -> Float[Tensor, "row d_ff"] | None:
        offer = Offer(tap, tap.activation)
        self._hand_over(tap.layer, tap.role, ACTIVATION, offer)
        return offer.result

    def output(self, tap: ExpertTap) -> Float[Tensor, "row d_model"] | None:
        offer = Offer(tap, tap.output)
        self._hand_over(tap.layer, tap.role, OUTPUT, offer)
        return offer.result

    def _hand_over(self, layer: int, role: Role, point: str, offer: Offer | RoutingOffer) -> None:
        if self.interleaver.interleaving:  # not while a block calls a module of its own accord
            self.interleaver.handle(f"{self.paths[layer, role]}.{point}", offer)


class _Handle:
    """A part of the model that has values while a trace runs."""

    __slots__ = ("model", "name", "site")

    def __init__(self, model: LensModel, site: Site, name: str) -> None:
        self.model, self.site, self.name = model, site, name

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    def _block(self, value: str) -> Any:
        """The block of the trace that asks."""
        try:
            return Mediator.current(value)
        except ValueError as error:
            raise BadConfig(
                f"{self.name}.{value} has a value only while the model runs: "
                f"use it inside `with lens.nnsight.trace(text):`"
            ) from error

    def _wait(self, value: str, location: str) -> Any:
        """What the model computes at `location`, once it gets there."""
        self._block(value)
        try:
            return Mediator.value(location)
        except OutOfOrderError as error:  # keep nnsight's type: it also ends an open `tracer.iter[:]`
            error.args = (
                f"{self.name}.{value} was asked for after the model had passed it: read and set values layer by layer, "
                f"and in a layer in the order routing, activation, output, block_output",
            )
            raise

    @property
    def _path(self) -> str:
        return self.model.path_of(self.site.module)

    def _broadcast(self, name: str, value: Any, like: Tensor) -> Tensor:
        """`value` as a tensor of its own with the shape, dtype and device of `like`."""
        new = torch.as_tensor(value, dtype=like.dtype, device=like.device)
        try:
            return new.broadcast_to(like.shape).clone()
        except RuntimeError as error:
            raise BadConfig(
                f"{self.name}.{name} has the shape {tuple(like.shape)} here, "
                f"which a value of shape {tuple(new.shape)} does not fit: give a number or that shape"
            ) from error


class ExpertHandle(_Handle):
    """One expert (``L7.E12``) or neuron (``L7.E12.N3``) in a trace. Rows are the tokens that visit the expert.

    Reading gives a tensor of the expert's own; editing it in place or assigning changes what the model goes on
    with. An assigned value may be anything that broadcasts to the rows, such as 0. Both come before the
    block's next request for a value that the model computes later.
    """

    __slots__ = ("expert", "neuron")

    def __init__(self, model: LensModel, site: Site, name: str, expert: int, neuron: int | None = None) -> None:
        super().__init__(model, site, name)
        self.expert, self.neuron = expert, neuron

    @property
    def activation(self) -> Float[Tensor, "row d_ff"] | Float[Tensor, "row"]:
        """Input of the down-projection, before the router's weight; of a neuron, its column."""
        return self._get("activation", ACTIVATION)

    @activation.setter
    def activation(self, value: Any) -> None:
        self._set("activation", ACTIVATION, value)

    @property
    def output(self) -> Float[Tensor, "row d_model"]:
        """After the down-projection, before the router's weight."""
        self._refuse_neuron()
        return self._get("output", OUTPUT)

    @output.setter
    def output(self, value: Any) -> None:
        self._refuse_neuron()
        self._set("output", OUTPUT, value)

    @property
    def token(self) -> Int[Tensor, "row"]:
        """Flat index of the token of each row: ``row_in_batch * seq + position``, padding counted."""
        visits, rows, window = self._visits("token")
        return visits.token[rows] - window.first

    @property
    def weight(self) -> Float[Tensor, "row"]:
        """Router weight of each row as the model applies it; a copy. Set it by `expert_weights` of the layer."""
        visits, rows, _ = self._visits("weight")
        return visits.weight[rows]

    @weight.setter
    def weight(self, value: Any) -> None:
        raise BadConfig(f"{self.name}.weight is a copy: set lens.at('L{self.site.layer}').expert_weights instead")

    def _get(self, value: str, point: str) -> Tensor:
        offer, window = self._offer(value, point)
        piece = offer.take(self.expert, window)
        return piece if self.neuron is None else piece[:, self.neuron]

    def _set(self, value: str, point: str, new: Any) -> None:
        offer, window = self._offer(value, point)
        old = offer.take(self.expert, window)
        if self.neuron is None:
            offer.put(self.expert, window, self._broadcast(value, new, old))
            return
        changed = old.clone()
        changed[:, self.neuron] = self._broadcast(value, new, old[:, self.neuron])
        offer.put(self.expert, window, changed)

    def _offer(self, value: str, point: str) -> tuple[Offer, Window]:
        location = f"{self._path}.{point}"
        offer: Offer = self._wait(value, location)
        block, tap = self._block(value), offer.tap
        self.model._visits.setdefault(block, {})[self._path] = Visits(
            block.occurrence(location), self.model.passes, tap.token, tap.weight, tap.offsets, tap.n_tokens
        )
        return offer, window_of(block, tap.n_tokens)

    def _visits(self, value: str) -> tuple[Visits, Int[Tensor, "row"], Window]:
        """Who visits. Known from the activation on, and still known when the model has gone on from there."""
        block = self._block(value)
        visits = self.model._visits.get(block, {}).get(self._path)
        pinned = block.iteration  # the step that `tracer.iter` set; None once something of that step was read
        if visits is None or not (visits.passes == self.model.passes if pinned is None else visits.step == pinned):
            self._offer(value, ACTIVATION)
            visits = self.model._visits[block][self._path]
        window = window_of(block, visits.n_tokens)
        return visits, rows_of(visits.token, visits.offsets, self.expert, window), window

    def _refuse_neuron(self) -> None:
        if self.neuron is not None:
            raise BadConfig(
                f"{self.name} has an activation but no output of its own: use lens.at('{self.name.rpartition('.')[0]}')"
            )


class LayerHandle(_Handle):
    """The feed-forward block of one layer (``L7``) in a trace. Token axes are flat: ``row_in_batch * seq + position``.

    `expert_indices` and `expert_weights` can be set, before anything of an expert is read.
    """

    __slots__ = ("shared_site",)

    def __init__(self, model: LensModel, site: Site, name: str, shared_site: Site | None) -> None:
        super().__init__(model, site, name)
        self.shared_site = shared_site

    @property
    def router_logits(self) -> Float[Tensor, "token expert"]:
        """Raw router logits. Read only: the choice of experts has been made from them already."""
        logits = self._routing("router_logits").routing.logits
        if logits is None:
            raise UnsupportedModel(f"the router of {self.name} was not found: use expert_indices and expert_weights")
        return logits[self._tokens(logits)]

    @router_logits.setter
    def router_logits(self, value: Any) -> None:
        raise BadConfig(
            f"{self.name}.router_logits is a copy, and the choice is made already: set expert_indices or expert_weights"
        )

    @property
    def expert_indices(self) -> Int[Tensor, "token slot"]:
        """Experts of each token."""
        return self._choice("expert_indices", "index")

    @expert_indices.setter
    def expert_indices(self, value: Any) -> None:
        offer = self._routing("expert_indices")
        new = self._replaced("expert_indices", offer.routing.index, value)
        if new.numel() and not 0 <= int(new.min()) <= int(new.max()) < self.site.n_experts:
            raise BadConfig(f"{self.name} has experts 0 to {self.site.n_experts - 1}: set expert_indices to those")
        offer.routing = replace(offer.routing, index=new)

    @property
    def expert_weights(self) -> Float[Tensor, "token slot"]:
        """Router weights as the model applies them."""
        return self._choice("expert_weights", "weight")

    @expert_weights.setter
    def expert_weights(self, value: Any) -> None:
        offer = self._routing("expert_weights")
        offer.routing = replace(offer.routing, weight=self._replaced("expert_weights", offer.routing.weight, value))

    @property
    def block_output(self) -> Float[Tensor, "window seq d_model"]:
        """What the module around the experts returns; with a shared expert inside it, that is included."""
        whole = self._wait("block_output", self._block_location())
        return whole[0] if isinstance(whole, tuple) else whole

    @block_output.setter
    def block_output(self, value: Any) -> None:
        location = self._block_location()
        whole = self._wait("block_output", location)
        old = whole[0] if isinstance(whole, tuple) else whole
        new = self._broadcast("block_output", value, old)
        Mediator.swap(location, (new, *whole[1:]) if isinstance(whole, tuple) else new)

    @property
    def shared(self) -> ExpertHandle:
        """The expert that every token visits beside the routed ones.

        Raises:
            NotAnMoE: the layer has none.
        """
        if self.shared_site is None:
            raise NotAnMoE(f"{self.name} has no shared expert: address its experts as {self.name}.E0")
        return ExpertHandle(self.model, self.shared_site, f"{self.name}.shared", 0)

    def _routing(self, value: str) -> RoutingOffer:
        if not self.site.routed:
            raise NotAnMoE(f"{self.name} is a dense layer and has no {value}: use lens.at('{self.name}.E0')")
        return self._wait(value, f"{self._path}.{ROUTING}")

    def _choice(self, value: str, part: str) -> Tensor:
        offer = self._routing(value)
        own = getattr(offer.routing, part).clone()  # the block may edit it in place, and the router keeps the original
        offer.routing = replace(offer.routing, **{part: own})
        tokens = self._tokens(own)
        return own if tokens == slice(0, len(own)) else own[tokens]

    def _replaced(self, name: str, old: Tensor, value: Any) -> Tensor:
        tokens = self._tokens(old)
        new = old.clone()
        new[tokens] = self._broadcast(name, value, old[tokens])
        return new

    def _tokens(self, value: Tensor) -> slice:
        return slice(*window_of(Mediator.current(self.name), value.shape[0]))

    def _block_location(self) -> str:
        parent = self.model._module.get_submodule(self.site.path.rpartition(".")[0])
        if any(parent is layer for _, layer in decoder_layers(self.model._module)):
            raise UnsupportedModel(
                f"{self.name} has no feed-forward module of its own in this family: use the outputs of its experts"
            )
        return f"{self.model.path_of(parent)}.output"


def at(lens: Lens, address: str | int | ExpertAddress) -> ExpertHandle | LayerHandle:
    """The handle of ``L7.E12``, ``L7.E12.N3``, or of the layer ``L7`` (see `Lens.at`).

    Raises:
        OutOfRange: the model has no such layer, expert or neuron.
    """
    text = str(address).strip().upper().removeprefix("L")
    if text.isdecimal():
        layer = lens.check_layers([int(text)])[0]
        return LayerHandle(lens.nnsight, _site(lens, layer), f"L{layer}", _site(lens, layer, shared=True))
    found = lens.address(address)  # type: ignore[arg-type]
    return ExpertHandle(lens.nnsight, _site(lens, found.layer), str(found), found.expert, found.neuron)


def _site(lens: Lens, layer: int, *, shared: bool = False) -> Any:
    sites: Sequence[Site] = lens.sites
    return next((s for s in sites if s.layer == layer and (s.role is Role.SHARED) == shared), None)
