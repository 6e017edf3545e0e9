"""What experts write on a reference text: the means and samples that ablation modes put in place of an output.

One pass over the text gives, for every layer asked for: the mean output of each expert over the tokens routed
to it, a uniform sample of the inputs of the experts with the experts each of them chose, and a uniform sample of
the outputs of the experts under test.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moe_lens.errors import BadConfig, BadCorpus
from moe_lens.types import ExpertAddress, ExpertTap, Role, TokenBatch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from moe_lens.models.lens import Lens
    from moe_lens.models.sites import Site

    Texts = str | Sequence[str] | TokenBatch | Iterable[TokenBatch]

ROWS = 512
"""Rows kept per layer (inputs) and per expert (outputs)."""


@dataclass(frozen=True, eq=False)
class Reference:
    """Statistics of expert outputs on one text. The first token of each window and padding are left out.

    It describes that text: a mean over other text is another ablation. `digest` names the tokens.
    """

    digest: str
    n_tokens: int
    count: dict[int, Int[Tensor, "expert"]] = field(repr=False)
    mean: dict[int, Float[Tensor, "expert d_model"]] = field(repr=False)
    """Mean unweighted output over the tokens routed to each expert, zero where `count` is zero."""
    inputs: dict[int, Float[Tensor, "row d_model"]] = field(repr=False)
    chosen: dict[int, Bool[Tensor, "row expert"]] = field(repr=False)
    """Which experts each row of `inputs` was routed to."""
    outputs: dict[ExpertAddress, Float[Tensor, "row d_model"]] = field(repr=False)

    def mean_of(self, expert: ExpertAddress) -> Float[Tensor, "d_model"]:
        """Mean output over tokens routed to `expert`.

        Raises:
            BadCorpus: the reference text never visits it.
        """
        self._visited(expert)
        return self.mean[expert.layer][expert.expert]

    def outputs_of(self, expert: ExpertAddress) -> Float[Tensor, "row d_model"]:
        """Sampled outputs on tokens routed to `expert`.

        Raises:
            BadCorpus: the reference text never visits it.
            BadConfig: the reference was collected without it.
        """
        self._visited(expert)
        if expert not in self.outputs:
            raise BadConfig(
                f"the reference keeps no outputs of {expert}: name it in lens.reference(..., experts=[...])"
            )
        return self.outputs[expert]

    def _visited(self, expert: ExpertAddress) -> None:
        if expert.layer not in self.count:
            known = ", ".join(f"L{layer}" for layer in self.count)
            raise BadConfig(f"the reference was collected for {known}, not for {expert}: collect it with that layer")
        if not self.count[expert.layer][expert.expert]:
            raise BadCorpus(f"the reference text never visits {expert}: give a longer text, or use zero")


class _Sample:
    """A uniform sample of a stream: the rows with the smallest random keys."""

    def __init__(self, size: int, generator: torch.Generator) -> None:
        self.size, self.generator = size, generator
        self.keys = torch.empty(0, dtype=torch.float64)
        self.columns: list[Tensor] = []

    def add(self, *columns: Tensor) -> None:
        keys = torch.cat([self.keys, torch.rand(len(columns[0]), generator=self.generator, dtype=torch.float64)])
        merged = [torch.cat(pair) for pair in zip(self.columns, columns, strict=True)] if self.columns else columns
        kept = keys.argsort(stable=True)[: self.size]
        self.keys, self.columns = keys[kept], [column[kept] for column in merged]


@torch.no_grad()
def collect(
    lens: Lens, texts: Texts, *, experts: Sequence[ExpertAddress], rows: int = ROWS, seed: int = 0
) -> Reference:
    """Run the clean model over `texts` and keep what `experts` and their layers do there.

    Raises:
        BadConfig: called inside `lens.edit`, where the model is not clean.
        BadCorpus: the texts have no token to count.
    """
    if lens.is_edited:
        raise BadConfig(
            "a reference describes the clean model, but a lens.edit block is open: call lens.reference before it"
        )
    layers = sorted({expert.layer for expert in experts})
    generator = torch.Generator().manual_seed(seed)
    sums: dict[int, Tensor] = {}
    counts: dict[int, Tensor] = {}
    inputs = {layer: _Sample(rows, generator) for layer in layers}
    outputs = {expert: _Sample(rows, generator) for expert in sorted(set(experts))}
    hidden: dict[int, Tensor] = {}
    counted = torch.empty(0)

    def on_tap(tap: ExpertTap) -> None:
        keep = counted.to(tap.token.device)[tap.token]
        expert, output = tap.expert[keep].cpu(), tap.output[keep].float().cpu()
        total = sums.setdefault(tap.layer, torch.zeros(tap.n_experts, output.shape[1], dtype=torch.float64))
        total.index_add_(0, expert, output.double())
        counts[tap.layer] = counts.get(tap.layer, 0) + expert.bincount(minlength=tap.n_experts)
        for address, sample in outputs.items():
            if address.layer == tap.layer:
                sample.add(output[expert == address.expert])
        visited = torch.zeros(tap.n_tokens, tap.n_experts, dtype=torch.bool)
        visited[tap.token.cpu(), tap.expert.cpu()] = True
        if tap.layer in hidden:
            inputs[tap.layer].add(hidden.pop(tap.layer)[counted].cpu(), visited[counted])

    digest, n_tokens = hashlib.sha256(), 0
    with ExitStack() as stack:
        for site in _sites(lens, layers):
            stack.callback(_keep_input(site, hidden).remove)
        for batch in _batches(lens, texts):
            counted = batch.token_eligible.cpu()
            digest.update(batch.input_ids.cpu().numpy().tobytes())
            n_tokens += int(counted.sum())
            lens.forward(batch, on_tap, layers=layers, roles=(Role.MOE, Role.DENSE))
    if not n_tokens:
        raise BadCorpus("the reference text has no token to count: the first of each text is left out, so give more")
    return Reference(
        digest.hexdigest(), n_tokens, counts,
        {layer: (sums[layer] / counts[layer].clamp(min=1)[:, None]).float() for layer in layers},
        {layer: sample.columns[0] for layer, sample in inputs.items() if sample.columns},
        {layer: sample.columns[1] for layer, sample in inputs.items() if sample.columns},
        {expert: sample.columns[0] for expert, sample in outputs.items()},
    )  # fmt: skip


@torch.no_grad()
def run_expert(site: Site, x: Float[Tensor, "row d_model"], expert: int) -> Float[Tensor, "row d_model"]:
    """Unweighted output of one expert on any inputs, through the module's own forward.

    A module call, so that weights which accelerate keeps elsewhere are brought in.
    """
    parameter = next(site.module.parameters())
    device = x.device if parameter.device.type == "meta" else parameter.device
    if site.adapter is not None:
        return site.adapter.run_expert(site, x.to(device, parameter.dtype), expert)
    index = torch.full((len(x), 1), expert, dtype=torch.long, device=device)
    return site.module(x.to(device, parameter.dtype), index, torch.ones_like(index, dtype=parameter.dtype))


def _sites(lens: Lens, layers: Sequence[int]) -> list[Site]:
    return [site for site in lens.sites if site.layer in layers and site.role is Role.MOE]


def _keep_input(site: Site, hidden: dict[int, Tensor]) -> Any:
    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        hidden[site.layer] = x.reshape(-1, x.shape[-1])

    module = site.module if site.adapter is None else site.adapter.takes_input(site)
    return module.register_forward_pre_hook(keep, with_kwargs=True)


def _batches(lens: Lens, texts: Texts) -> Iterator[TokenBatch]:
    if isinstance(texts, TokenBatch):
        yield texts
        return
    if isinstance(texts, str) and texts.startswith("bundled:"):
        raise BadConfig(f"a reference is text, and {texts!r} names a corpus: give ml.corpus({texts!r})")
    documents = getattr(texts, "documents", None)
    items: Any = [texts] if isinstance(texts, str) else texts if documents is None else [d.text for d in documents]
    if not isinstance(items, Iterable):
        raise BadConfig(f"a reference is a text, a list of texts, a corpus or batches, not {texts!r}")
    for number, item in enumerate(items):
        if not isinstance(item, str | TokenBatch):
            raise BadConfig(f"a reference is a text, a list of texts, a corpus or batches; {item!r} is none of them")
        if isinstance(item, TokenBatch):
            yield item
            continue
        for _, ids, mask in lens.windows(item):
            eligible = mask.bool().clone()
            eligible[:, 0] = False
            nothing = torch.zeros(1, 0, dtype=torch.bool)
            yield TokenBatch(
                ids, mask, torch.tensor([number]), torch.full_like(ids, -1), torch.full_like(ids, -1), eligible,
                nothing.unsqueeze(1).expand(1, ids.shape[1], 0), nothing,
            )  # fmt: skip
