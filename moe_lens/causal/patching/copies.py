"""One prompt many times in a batch, with other experts patched in each copy.

1. One pass over each prompt keeps what every expert writes at every position (`record`).
2. One clean pass over a batch of copies of the prompt that runs; `Replay` starts from it at the patched layer.
3. In copy c, what expert e writes at position t is replaced by what it writes in the other prompt, for all cells
   (t, e) of patch c. Writes that a token has no row for (e is visited in the other prompt only) ride on the row with
   the token's largest weight: only the sum over a token's rows reaches the residual stream.
4. The LM head reads the last position of each copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from moe_lens.causal.ablation import Ablation
from moe_lens.causal.replay import Clean, Replay
from moe_lens.causal.scoring import Head
from moe_lens.models.edits import Mode
from moe_lens.types import ExpertAddress, ExpertTap, Role

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from numpy import ndarray

    from moe_lens.models.edits.apply import DownstreamRouting
    from moe_lens.models.edits.base import Bound
    from moe_lens.models.lens import Lens

    Cells = Mapping[int, Bool[ndarray, "position expert"]]
    """What one patch replaces, by layer."""

What = Literal["write", "output"]


@dataclass(frozen=True, eq=False)
class Writes:
    """What experts do with one prompt."""

    row: dict[int, Int[Tensor, "position expert"]]
    """Row of each visit in `output` and `weight` of the layer, -1 where the expert is not visited."""
    output: dict[int, Float[Tensor, "row d_model"]]
    weight: dict[int, Float[Tensor, "row"]]
    logits: Float[Tensor, "vocab"]
    """Of the token after the last position."""


@torch.no_grad()
def record(lens: Lens, ids: Sequence[int], layers: Sequence[int]) -> Writes:
    """Run a prompt and keep what every expert of `layers` writes."""
    rows: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}
    weights: dict[int, Tensor] = {}

    def keep(tap: ExpertTap) -> None:
        at = torch.full((tap.n_tokens, tap.n_experts), -1, device=tap.token.device)
        at[tap.token, tap.expert] = torch.arange(len(tap.token), device=tap.token.device)
        rows[tap.layer], outputs[tap.layer], weights[tap.layer] = at, tap.output.clone(), tap.weight.clone()

    batch = torch.tensor([list(ids)], device=lens.device)
    with lens.tapping(keep, layers=layers, roles=(Role.MOE, Role.DENSE)):
        logits = lens.model(input_ids=batch, use_cache=False).logits[0, -1].float()
    return Writes(rows, outputs, weights, logits)


@dataclass(frozen=True, eq=False)
class Put(Mode):
    """Put what experts write in another prompt in place of what they write here, cell by cell."""

    name: ClassVar[str] = "put"
    cells: dict[int, Bool[Tensor, "copy position expert"]] = field(default_factory=dict)
    source: dict[int, Int[Tensor, "position expert"]] = field(default_factory=dict)
    """Row of `writes` for each position of the prompt that runs, -1 where the other prompt has no such visit."""
    writes: Writes | None = None
    what: What = "write"
    current: list[Tensor] = field(default_factory=list)
    """Number of each token of the batch that is running: copy x length + position."""

    def output(self, bound: Bound, tap: ExpertTap) -> Tensor | None:
        """The layer's rows, with patched ones replaced."""
        cells = self.cells.get(tap.layer)
        if cells is None:
            return None
        number = self.current[0].to(tap.token.device)
        copy, position = number // cells.shape[1], number % cells.shape[1]
        chosen = cells.to(number.device)[copy, position]
        hit, output = chosen[tap.token, tap.expert], tap.output.clone()
        output[hit] = 0
        assert self.writes is not None
        theirs, source = self.writes.output[tap.layer].to(output), self.source[tap.layer][position]
        if self.what == "output":
            row = source[tap.token, tap.expert]
            found = hit & (row >= 0)
            output[found] = theirs[row[found]]
            return output
        token, expert = (chosen & (source >= 0)).nonzero(as_tuple=True)
        row = source[token, expert]
        total = output.new_zeros(len(number), output.shape[1])
        total.index_add_(0, token, theirs[row] * self.writes.weight[tap.layer].to(output)[row, None])
        carrier = _heaviest(tap)
        weight = tap.weight.to(output)[carrier, None]
        output[carrier] += torch.where(weight != 0, total[tap.token[carrier]] / weight, 0)
        return output


def _heaviest(tap: ExpertTap) -> Int[Tensor, "token"]:
    """The row with the largest weight of each token."""
    size, row = tap.weight.abs().float(), torch.arange(len(tap.token), device=tap.token.device)
    largest = size.new_full((tap.n_tokens,), -1).scatter_reduce(0, tap.token, size, "amax")
    is_largest = size == largest[tap.token]
    first = row.new_full((tap.n_tokens,), len(row))
    first = first.scatter_reduce(0, tap.token[is_largest], row[is_largest], "amin")
    return first[first < len(row)]


@dataclass(frozen=True, eq=False)
class PutEach(Ablation):
    """`Put` as what `Replay` runs under."""

    visited: dict[int, Bool[Tensor, "position expert"]] = field(default_factory=dict)
    """Cells that change anything where only their layer is patched."""

    @property
    def put(self) -> Any:
        return self.modes[0]

    @property
    def is_positional(self) -> bool:
        return False  # tokens carry their number

    def touched(self, token: Int[Tensor, "window seq"], routing: Any) -> Bool[Tensor, "window seq"]:
        """Tokens with a cell that can change anything; later visits come about after one of these."""
        found = torch.zeros_like(token, dtype=torch.bool)
        for layer, cells in self.put.cells.items():
            found |= (cells & self.visited[layer]).any(dim=2).cpu()
        return found

    @contextmanager
    def at(
        self, lens: Lens, token: Int[Tensor, "window seq"], *, routing: DownstreamRouting = "live"
    ) -> Iterator[None]:
        self.put.current[:] = [token.reshape(-1)]
        with lens.edit(self.put, routing=routing, whole_layers=True):
            yield


class Copies:
    """A prompt that runs, ready to be patched."""

    def __init__(
        self,
        lens: Lens,
        ids: Sequence[int],
        theirs: Writes,
        source_of: Mapping[int, int],
        visited: Cells,
        pair: tuple[int, int],
        *,
        what: What,
        routing: DownstreamRouting,
        batch_tokens: int,
    ) -> None:
        """Run the clean pass.

        Args:
            ids: tokens of the prompt that runs.
            theirs: what experts write in the other prompt.
            source_of: position in the other prompt of each position that may be patched.
            visited: cells that change anything where only their layer is patched.
            pair: token ids (target, foil).
        """
        self.lens, self.pair, self.theirs = lens, pair, theirs
        self.what: What = what
        self.routing: DownstreamRouting = routing
        self.n_patches = self.n_passes = 0
        self.visited = visited
        n, seq = max(1, batch_tokens // len(ids)), len(ids)
        self.source: dict[int, Tensor] = {}
        for layer, row in theirs.row.items():
            source = row.new_full((seq, row.shape[1]), -1)
            source[list(source_of)] = row[list(source_of.values())]
            self.source[layer] = source
        self.replay, self.head = Replay(lens), Head(lens)
        batch = torch.tensor([list(ids)] * n, device=lens.device)
        token = torch.arange(n * seq).view(n, seq)
        self.clean: Clean = self.replay.clean(batch, torch.ones_like(batch), token)
        with torch.no_grad():
            self.head.check(self.clean.hidden[:1], batch[:1])
            self.unpatched = float(self._difference(self.clean.hidden[:1, -1])[0])
        """Logit difference of the prompt as it is."""

    @torch.no_grad()
    def differences(self, patches: Sequence[Cells], *, title: str, progress: bool) -> Float[ndarray, "patch"]:
        """Logit of target minus foil after the last position, under each patch. Patches of no cells change nothing."""
        found = np.full(len(patches), self.unpatched)
        order: dict[int, list[int]] = {}
        for number, cells in enumerate(patches):
            layers = [layer for layer, at in cells.items() if at.any()]
            if layers:
                order.setdefault(min(layers), []).append(number)
        total, n = sum(map(len, order.values())), len(self.clean.ids)
        with tqdm(total=total, desc=title, unit="patch", disable=None if progress and total > 1 else True) as bar:
            for numbers in order.values():
                for start in range(0, len(numbers), n):
                    part = numbers[start : start + n]
                    found[part] = self._run([patches[number] for number in part])
                    bar.update(len(part))
        self.n_patches += total
        return found

    def _run(self, patches: Sequence[Cells]) -> Float[ndarray, "patch"]:
        cells: dict[int, Tensor] = {}
        for layer, visits in self.visited.items():
            if any(layer in patch and patch[layer].any() for patch in patches):
                nothing = np.zeros_like(visits)
                stacked = np.stack([patch.get(layer, nothing) for patch in patches])
                pad = np.zeros((len(self.clean.ids) - len(patches), *visits.shape), bool)
                cells[layer] = torch.from_numpy(np.concatenate([stacked, pad])).to(self.lens.device)
        experts = tuple(
            ExpertAddress(layer, int(e)) for layer, at in cells.items() for e in at.any(0).any(0).nonzero()[:, 0]
        )
        put = Put(experts, cells, self.source, self.theirs, self.what)
        visited = {layer: torch.from_numpy(self.visited[layer]).to(self.lens.device) for layer in cells}
        ablation = PutEach((put,), self.routing, whole_layers=True, visited=visited)
        affected, hidden = self.replay.edited(self.clean, ablation)
        self.n_passes += 1
        last = self.clean.hidden[: len(patches), -1].clone()
        number = torch.full(affected.shape, -1)
        number[affected] = torch.arange(int(affected.sum()))
        at = number[: len(patches), -1]
        last[(at >= 0).to(last.device)] = hidden[at[at >= 0].to(hidden.device)]
        return self._difference(last)

    def _difference(self, hidden: Float[Tensor, "copy d_model"]) -> Float[ndarray, "copy"]:
        parts = [self.head.logits(hidden[rows]).double() for rows in self.head.slices(len(hidden))]
        return torch.cat([part[:, self.pair[0]] - part[:, self.pair[1]] for part in parts]).cpu().numpy()
