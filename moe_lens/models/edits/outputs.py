"""Modes that leave the routing alone and put something else in place of an expert's output f_e(x_t)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from moe_lens.errors import BadConfig, BadCorpus
from moe_lens.models.edits.base import Addresses, Bound, Mode, read_addresses
from moe_lens.models.reference import Reference, collect, run_expert
from moe_lens.types import ExpertAddress, ExpertTap, Role

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    from moe_lens.models.edits.record import EditRecord
    from moe_lens.models.lens import Lens
    from moe_lens.models.reference import Texts


class Substitution(Mode, ABC):
    """A mode that is a rule for new output rows of one expert."""

    @abstractmethod
    def rows_of(
        self, bound: Bound, tap: ExpertTap, expert: ExpertAddress, rows: Bool[Tensor, "row"]
    ) -> Float[Tensor, "chosen d_model"]:
        """New outputs for the chosen `rows`, all of them visits of `expert`."""

    def output(self, bound: Bound, tap: ExpertTap) -> Tensor | None:
        """The layer's outputs with the visits in scope replaced, expert by expert."""
        output = tap.output.clone()
        for number in bound.experts_in(tap.layer):
            rows = bound.rows(tap, [number])
            visits = int(rows.sum())
            bound.record.add(self.name, tap.layer, visits=visits)
            if visits:
                output[rows] = self.rows_of(bound, tap, ExpertAddress(tap.layer, number), rows).to(output)
        tokens = tap.token[bound.rows(tap, bound.experts_in(tap.layer))]
        bound.record.add(self.name, tap.layer, tokens=int(tokens.unique().numel()))
        return output


@dataclass(frozen=True, eq=False)
class Zero(Substitution):
    name: ClassVar[str] = "zero"
    takes_neurons: ClassVar[bool] = True

    def activation(self, bound: Bound, tap: ExpertTap) -> Tensor | None:
        """The layer's activations with the named neurons zeroed; whole experts are left to `output`."""
        neurons = [e for e in self.experts if e.layer == tap.layer and e.neuron is not None]
        if not neurons:
            return None
        activation, touched = tap.activation.clone(), torch.zeros_like(tap.token, dtype=torch.bool)
        for neuron in neurons:
            rows = bound.rows(tap, [neuron.expert])
            activation[rows, neuron.neuron] = 0
            touched |= rows
        tokens = int(tap.token[touched].unique().numel())
        bound.record.add(self.name, tap.layer, tokens=tokens, visits=int(touched.sum()))
        return activation

    def rows_of(self, bound: Bound, tap: ExpertTap, expert: ExpertAddress, rows: Tensor) -> Tensor:
        return torch.zeros_like(tap.output[rows])


@dataclass(frozen=True, eq=False)
class FromReference(Substitution):
    """A mode that needs to know what experts do on a reference text."""

    reference: Any = None

    def prepare(self, lens: Lens, record: EditRecord) -> dict[ExpertAddress, Tensor]:
        found = self.reference
        if not isinstance(found, Reference):
            found = collect(lens, found, experts=self.experts)
        record.references[self.name] = found.digest[:16]
        return {expert: self.vector(lens, found, expert) for expert in self.experts}

    @abstractmethod
    def vector(self, lens: Lens, reference: Reference, expert: ExpertAddress) -> Tensor:
        """What stands in for the expert: one vector, or rows to draw from."""

    def rows_of(self, bound: Bound, tap: ExpertTap, expert: ExpertAddress, rows: Tensor) -> Tensor:
        return bound.state[expert].to(tap.output.device).expand(int(rows.sum()), -1)


@dataclass(frozen=True, eq=False)
class Mean(FromReference):
    name: ClassVar[str] = "mean"

    def vector(self, lens: Lens, reference: Reference, expert: ExpertAddress) -> Tensor:
        return reference.mean_of(expert)


@dataclass(frozen=True, eq=False)
class MeanOff(FromReference):
    name: ClassVar[str] = "mean_off"
    needs_router: ClassVar[bool] = True

    def vector(self, lens: Lens, reference: Reference, expert: ExpertAddress) -> Tensor:
        """Mean output of the expert on sampled inputs that are not routed to it."""
        if expert.layer not in reference.inputs:
            raise BadConfig(f"the reference keeps no inputs of layer {expert.layer}: collect it with {expert}")
        elsewhere = ~reference.chosen[expert.layer][:, expert.expert]
        if not elsewhere.any():
            raise BadCorpus(
                f"every token of the reference text is routed to {expert}, so it has no mean off its route: use zero"
            )
        site = next(s for s in lens.sites if s.layer == expert.layer and s.role is Role.MOE)
        inputs = reference.inputs[expert.layer][elsewhere].to(lens.device)
        return run_expert(site, inputs, expert.expert).float().mean(dim=0)


@dataclass(frozen=True, eq=False)
class Resample(FromReference):
    name: ClassVar[str] = "resample"
    seed: int = 0

    def prepare(self, lens: Lens, record: EditRecord) -> tuple[dict[ExpertAddress, Tensor], torch.Generator]:  # type: ignore[override]
        return super().prepare(lens, record), torch.Generator().manual_seed(self.seed)

    def vector(self, lens: Lens, reference: Reference, expert: ExpertAddress) -> Tensor:
        return reference.outputs_of(expert)

    def rows_of(self, bound: Bound, tap: ExpertTap, expert: ExpertAddress, rows: Tensor) -> Tensor:
        pools, generator = bound.state
        pool = pools[expert]
        return pool[torch.randint(len(pool), (int(rows.sum()),), generator=generator)]


@dataclass(frozen=True, eq=False)
class Noise(Substitution):
    name: ClassVar[str] = "noise"
    seed: int = 0

    def prepare(self, lens: Lens, record: EditRecord) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def rows_of(self, bound: Bound, tap: ExpertTap, expert: ExpertAddress, rows: Tensor) -> Tensor:
        old = tap.output[rows].float()
        direction = torch.randn(old.shape, generator=bound.state).to(old.device)
        return direction * (old.norm(dim=1) / direction.norm(dim=1))[:, None]


@dataclass(frozen=True, eq=False)
class Patch(Substitution):
    name: ClassVar[str] = "patch"
    source: str = ""

    def prepare(self, lens: Lens, record: EditRecord) -> tuple[int, dict[ExpertAddress, dict[int, Tensor]]]:
        """Length of the source in tokens, and what each expert writes at each of its positions."""
        if lens.is_edited:
            raise BadConfig(
                "patch reads its source from the clean model, but a lens.edit block is open: do not nest it"
            )
        trace = lens.trace(self.source, layers=sorted({e.layer for e in self.experts}))
        visits = {expert: trace[expert] for expert in self.experts}
        written = {e: dict(zip(v.token.tolist(), v.output, strict=True)) for e, v in visits.items()}
        return len(trace.tokens), written

    def rows_of(self, bound: Bound, tap: ExpertTap, expert: ExpertAddress, rows: Tensor) -> Tensor:
        """What the source writes at the position of each visit, zero where it does not visit the expert."""
        length, written = bound.state
        position = bound.scope.position
        assert position is not None
        if bound.is_frozen and (n_tokens := int(position.max()) + 1) != length:
            raise BadConfig(
                f"the source of patch has {length} tokens and the text {n_tokens}: frozen routing compares position by "
                "position, so give texts of equal length or use routing='live'"
            )
        wanted = position[tap.token[rows]].tolist()
        nothing = torch.zeros(tap.output.shape[1])
        bound.record.add(self.name, tap.layer, unaligned=sum(p not in written[expert] for p in wanted))
        return torch.stack([written[expert].get(p, nothing) for p in wanted])


def zero(*experts: Addresses) -> Zero:
    """Drop the experts' writes; other gates stay. An address of a neuron (``L7.E12.N304``) zeroes its activation.

    The marginal write of the expert. The residual stream loses norm, which RMSNorm makes up for: part of an
    effect may be that.
    """
    return Zero(read_addresses(experts))


def mean(*experts: Addresses, reference: Reference | Texts) -> Mean:
    """Replace f_e(x) by its mean over reference tokens routed to e.

    What the expert says beyond its average write; an expert that always writes the same shows no effect. The
    mean belongs to the reference text.
    """
    return Mean(read_addresses(experts), reference)


def mean_off(*experts: Addresses, reference: Reference | Texts) -> MeanOff:
    """Replace f_e(x) by the mean of f_e over up to 512 router inputs of the reference that are not routed to e.

    The expert's own write, its constant part included; the inputs are off the expert's distribution.
    """
    return MeanOff(read_addresses(experts), reference)


def resample(*experts: Addresses, reference: Reference | Texts, seed: int = 0) -> Resample:
    """Replace f_e(x) by f_e of a random reference token routed to e: like `mean`, on the manifold, noisier.

    One draw; average over at least 8 seeds.
    """
    return Resample(read_addresses(experts), reference, seed=seed)


def patch(*experts: Addresses, source: str) -> Patch:
    """Replace f_e(x_t) by what e writes at the same position of `source`, zero where it is not visited there.

    The two texts should have equal length in tokens; the record counts visits without a counterpart.
    """
    return Patch(read_addresses(experts), source)


def noise(*experts: Addresses, seed: int = 0) -> Noise:
    """Replace f_e(x) by a random direction of the same norm: content against magnitude. A control, not an ablation."""
    return Noise(read_addresses(experts), seed)
