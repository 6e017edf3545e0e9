"""A loaded model that can be looked into."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_lens.errors import BadConfig, BadCorpus, OutOfRange
from moe_lens.models.seam import Edit, Kernel, OnTap, StopForward, tapping
from moe_lens.models.sites import Site, decoder_layers, find_sites
from moe_lens.models.spec import Spec, spec_of
from moe_lens.types import ExpertAddress, Role, TokenBatch

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from moe_lens.models.edits.base import Mode
    from moe_lens.models.edits.record import EditRecord
    from moe_lens.models.edits.scope import Tokens
    from moe_lens.models.nnsight import ExpertHandle, LayerHandle, LensModel
    from moe_lens.models.reference import Reference
    from moe_lens.models.trace import Trace

ALL_ROLES = (Role.MOE, Role.DENSE, Role.SHARED)


class Lens:
    """A model, its tokenizer and its anatomy.

    What can be tapped, for an MoE layer and for a dense one::

        model.layers[7]
        └── mlp                              L7
            ├── gate                         router_logits (token, expert)
            ├── experts                      role moe: L7.E0 .. L7.E63
            │   ├── act(gate) * up           activation (row, d_ff)
            │   └── down_proj                output (row, d_model), before the router's weight
            └── shared_expert                role shared: one expert that every token visits
        model.layers[0]
        └── mlp                              role dense: L0.E0, one expert that every token visits
            └── down_proj                    input is activation, output is output
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        name: str | None = None,
        revision: str | None = None,
        kernel: Kernel = "native",
    ) -> None:
        """Wrap a transformers model that you built or loaded yourself; `moe_lens.load` does it for a name.

        Raises:
            UnsupportedModel: the model has no feed-forward layers that can be tapped.
        """
        self.model: Any = model
        self.tokenizer = tokenizer
        self.sites: tuple[Site, ...] = find_sites(model)
        self.name: str = name or getattr(model.config, "name_or_path", "") or type(model).__name__  # type: ignore[union-attr]
        self.revision = revision
        self.kernel: Kernel = kernel
        self.window_documents: Int[Tensor, "window"] | None = None
        """Document of each window of the batch that is running, when we run it."""
        self.spec: Spec = spec_of(model, name=self.name, revision=revision, sites=self.sites)

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the embedding, or where accelerate brings it to run."""
        embedding = self.model.get_input_embeddings()
        if embedding.weight.device.type != "meta":
            return embedding.weight.device
        hooks = (vars(module).get("_hf_hook") for module in (embedding, *self.model.modules()))
        found = (getattr(hook, "execution_device", None) for hook in hooks)
        return torch.device(next((device for device in found if device is not None), "cpu"))

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers with routed experts; of a dense model, all layers with an FFN."""
        return self.spec.moe_layers or self.spec.dense_layers

    @property
    def n_experts(self) -> int:
        """Most experts that any of `layers` has."""
        return max(entry.n_experts for entry in self.spec.layers if entry.layer in self.layers)

    def check_layers(self, layers: Sequence[int] | None) -> tuple[int, ...]:
        """`layers` sorted and without repeats; None means `self.layers`.

        Raises:
            OutOfRange: a layer that has no feed-forward part, or an empty list.
        """
        if layers is None:
            return self.layers
        known = {entry.layer for entry in self.spec.layers}
        for layer in layers:
            if layer not in known:
                raise OutOfRange(
                    f"{self.name!r} has no layer {layer} to look into: choose from {_ranges(sorted(known))}"
                )
        if not layers:
            raise OutOfRange(f"no layer was chosen: choose from {_ranges(sorted(known))}")
        return tuple(sorted(set(layers)))

    def address(self, text: str | ExpertAddress) -> ExpertAddress:
        """Read ``L7.E12`` or ``L7.E12.N304`` and check that the model has it.

        Raises:
            OutOfRange: unreadable, or outside the model; the message names the valid range.
        """
        found = ExpertAddress.parse(text)
        self.check_layers([found.layer])
        entry = self.spec.at(found.layer)
        assert entry is not None
        if not 0 <= found.expert < entry.n_experts:
            raise OutOfRange(
                f"layer {found.layer} has no expert {found.expert}: its experts are 0 to {entry.n_experts - 1}"
            )
        if found.neuron is not None and found.neuron >= entry.d_ff:
            raise OutOfRange(f"{found} does not exist: neurons are 0 to {entry.d_ff - 1}")
        return found

    @contextmanager
    def tapping(
        self,
        on_tap: OnTap,
        *,
        layers: Sequence[int] | None = None,
        roles: Sequence[Role] = ALL_ROLES,
        edit: Edit | None = None,
    ) -> Iterator[None]:
        """Deliver taps of `layers` whenever `lens.model` runs inside the block (see `seam.tapping`).

        Raises:
            OutOfRange: a layer that the model does not have.
        """
        chosen = set(self.check_layers(layers))
        sites = [site for site in self.sites if site.layer in chosen and site.role in roles]
        with tapping(self.model, sites, on_tap, kernel=self.kernel, edit=edit):
            yield

    def forward(
        self,
        batch: TokenBatch,
        on_tap: OnTap,
        *,
        layers: Sequence[int] | None = None,
        roles: Sequence[Role] = ALL_ROLES,
        logits: bool = False,
        edit: Edit | None = None,
    ) -> Float[Tensor, "window seq vocab"] | None:
        """Run one forward pass without gradients and hand over the taps of `layers`.

        Without `logits` the LM head is skipped and the pass ends after the last of `layers`.

        Returns:
            The logits if asked for, else None.

        Raises:
            OutOfRange: a layer that the model does not have.
        """
        chosen = self.check_layers(layers)
        ids, mask = batch.input_ids.to(self.device), batch.attention_mask.to(self.device)
        with (
            torch.no_grad(),
            self._running(batch.document),
            self.tapping(on_tap, layers=chosen, roles=roles, edit=edit),
        ):
            if logits:
                return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            with self._stop_after(chosen[-1]):
                self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        return None

    @contextmanager
    def edit(
        self,
        *modes: Mode,
        routing: Literal["live", "frozen"] = "live",
        tokens: Tokens | None = None,
        documents: Collection[int] | None = None,
        whole_layers: bool = False,
    ) -> Iterator[EditRecord]:
        """Change what experts compute, for any code that runs `lens.model` inside the block.

        Your own loop, `lens.loss`, `lens.trace`, `generate`: all see the edited model. Blocks nest, outer edits
        first; on exit, also by an exception, the model is what it was.

        Args:
            modes: from `moe_lens`: zero, mean, mean_off, resample, drop_renorm, mask_refill, mask_refill_keep, swap,
                noise, and `moe_lens.edits.patch` (METRICS 2.3). Applied in order.
            routing: "live" lets later layers choose their experts anew; "frozen" replays the choice and the weights
                of a clean pass over the same inputs (two passes, no KV cache), so that what an edit does by
                re-routing is live minus frozen. A frozen block does not nest.
            tokens: only these tokens: a mask of the batch's shape, or a function of its `input_ids`. None means all.
            documents: only these: index among the texts of `loss`, `TokenBatch.document`, else row of the batch (in
                `generate`, after its expansion by beams and samples).
            whole_layers: allow naming every expert of a layer.

        Yields:
            The record of what was changed, see `EditRecord`.

        Raises:
            OutOfRange: an expert that the model does not have.
            BadConfig: a mode that is not defined there, a mask of the wrong shape, every expert of a layer, or frozen
                routing with a KV cache.
            BadCorpus: a reference text that never visits an expert.
        """
        from moe_lens.models import edits

        with edits.edit(
            self, modes, routing=routing, tokens=tokens, documents=documents, whole_layers=whole_layers
        ) as record:
            yield record

    @property
    def is_edited(self) -> bool:
        """Whether an `edit` block is open on this model."""
        from moe_lens.models.edits.apply import MARK

        return MARK in vars(self.model)

    def reference(
        self,
        texts: str | Sequence[str] | TokenBatch | Iterable[TokenBatch],
        *,
        experts: Sequence[str | ExpertAddress],
        rows: int = 512,
        seed: int = 0,
    ) -> Reference:
        """What experts and their layers do on a reference text, for the modes mean, mean_off and resample.

        Args:
            experts: whose outputs to sample; means and inputs are kept for their whole layers.
            rows: size of the samples.

        Raises:
            OutOfRange: an expert that the model does not have.
            BadConfig: called inside `lens.edit`.
            BadCorpus: the texts have no token to count.
        """
        from moe_lens.models.reference import collect

        return collect(self, texts, experts=[self.address(e) for e in experts], rows=rows, seed=seed)

    def loss(self, texts: str | Sequence[str] | TokenBatch) -> float:
        """Mean negative log-likelihood in nats per predicted token.

        Texts longer than the context are cut into windows. Padding is neither predicted nor read.

        Raises:
            BadCorpus: no text has two tokens.
        """
        total, count = 0.0, 0
        for documents, ids, mask in self.windows(texts):
            with torch.no_grad(), self._running(documents):
                logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            nll = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
            counted = (mask[:, 1:] * mask[:, :-1]).bool()
            total += float(nll[counted].double().sum())
            count += int(counted.sum())
        if count == 0:
            raise BadCorpus("no text has two tokens, so there is nothing to predict: give longer texts")
        return total / count

    def trace(
        self, text: str | Sequence[Mapping[str, Any]], *, layers: Sequence[int] | None = None, generate: int = 0
    ) -> Trace:
        """Follow one text or conversation through the model: which experts each token visits, and what they do.

        With `generate` the model first continues greedily with its KV cache. The taps are those of one pass over the
        whole sequence afterwards, not of the incremental passes: they equal what was computed while generating up to
        rounding, and a model near a tie between two experts may route a token otherwise.

        Args:
            text: a text, or messages: dicts with `role` and `content`, and maybe `reasoning_content`. They go through
                the tokenizer's chat template, with a generation prompt if `generate` is positive or the last message
                is the user's; `Trace.spans` then says which tokens are whose.
            layers: None means all of `self.layers`.
            generate: continue greedily by up to this many tokens, traced as well; stops at the end of the turn.

        Raises:
            BadCorpus: neither text nor messages, a text without tokens, no chat template, or one that refuses the
                messages.
            OutOfRange: a layer that the model does not have, a negative `generate`, or a text longer than the context.
            UnsupportedModel: messages, and a tokenizer that reports no character offsets.
        """
        from moe_lens.models.trace import trace

        return trace(self, text, layers=layers, generate=generate)

    def windows(
        self, texts: str | Sequence[str] | TokenBatch
    ) -> Iterator[tuple[Int[Tensor, "window"], Int[Tensor, "window seq"], Int[Tensor, "window seq"]]]:
        """Document numbers, token ids and attention mask of texts, cut into windows that fit the context.

        Raises:
            BadConfig: texts, but no tokenizer.
        """
        if isinstance(texts, TokenBatch):
            yield texts.document, texts.input_ids.to(self.device), texts.attention_mask.to(self.device)
            return
        if self.tokenizer is None:
            raise BadConfig("this lens has no tokenizer: give token ids in a TokenBatch, or Lens(model, tokenizer)")
        width = self.spec.max_positions or 2048
        for number, text in enumerate([texts] if isinstance(texts, str) else texts):
            ids = torch.tensor([self.tokenizer(text, verbose=False)["input_ids"]], dtype=torch.long, device=self.device)
            for window in ids.split(width, dim=1):
                if window.shape[1] > 1:
                    yield torch.tensor([number]), window, torch.ones_like(window)

    @contextmanager
    def _running(self, documents: Int[Tensor, "window"]) -> Iterator[None]:
        """Tell edits which documents the windows of the next pass belong to."""
        before, self.window_documents = self.window_documents, documents
        try:
            yield
        finally:
            self.window_documents = before

    @contextmanager
    def _stop_after(self, layer: int) -> Iterator[None]:
        def stop(*_: Any) -> None:
            raise StopForward

        handle = self.blocks[layer].register_forward_hook(stop)
        try:
            yield
        except StopForward:
            pass
        finally:
            handle.remove()

    @cached_property
    def nnsight(self) -> LensModel:
        """An `nnsight.LanguageModel` on the same weights, with the experts reachable by `at`.

        ::

            with lens.nnsight.trace("The theorem holds."):
                h = lens.at("L7.E12").activation.save()
                lens.at("L7.E12").output = 0

        It gives modules of the model a `forward` of their own, which computes the same.

        Raises:
            UnsupportedModel: nnsight is not installed.
            ModelNotFound: the lens has no tokenizer.
        """
        from moe_lens.models.nnsight import LensModel

        return LensModel(self)

    def at(self, address: str | int | ExpertAddress) -> ExpertHandle | LayerHandle:
        """An expert ``L7.E12``, a neuron ``L7.E12.N304`` or a layer ``L7`` inside `lens.nnsight.trace`.

        Of an expert: `activation`, `output`, `weight`, `token`. Of a neuron: `activation`, `weight`, `token`. Of
        a layer: `router_logits`, `expert_indices`, `expert_weights`, `block_output`, `shared`. Values arrive in
        the order in which the model computes them; the first two of an expert, and all of a layer but the router
        logits, can be set.

        Raises:
            OutOfRange: the model has no such layer, expert or neuron.
            UnsupportedModel: nnsight is not installed.
        """
        from moe_lens.models.nnsight import at

        return at(self, address)

    @cached_property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The decoder layers, as transformers counts them."""
        return tuple(block for _, block in decoder_layers(self.model))

    def __repr__(self) -> str:
        return f"Lens({self.name!r}, layers={_ranges(list(self.layers))}, kernel={self.kernel!r}, device={self.device})"


def _ranges(layers: list[int]) -> str:
    """``"0 to 15"``, or ``"1, 3, 5"`` when there are gaps."""
    if len(layers) > 2 and layers == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers))
