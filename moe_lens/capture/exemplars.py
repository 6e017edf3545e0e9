"""``TopExemplars``: what every expert of every layer was sent, in one pass, kept small.

1. A visit's score is ``router weight * ||expert output||_2`` (arXiv 2604.02178; METRICS 1.6).
2. Per (layer, split, expert) two samples of visits: the `n_top` highest scores, and `n_sample` visits at
   random, those with the smallest hash keys. Score quantiles are read off the second.
3. Per split one sample of whole windows, again by hash key, with the routing of all their tokens in all
   layers: where an expert was *not* chosen is looked up there.

A row of the best n of two streams is among the best n of one of them, so all three samples merge exactly and
depend on neither batch size nor order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from moe_lens.capture.rows import row_keys
from moe_lens.capture.window_sample import LAST_KEY, WindowSample, join_parts, nobody
from moe_lens.corpus.splits import code_of
from moe_lens.errors import OutOfRange
from moe_lens.types import ExpertTap, Role, Split, TokenBatch

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy import ndarray
    from torch import Tensor

CONTEXT = 32
"""Tokens of the context in which a visit is shown."""
SPLITS = (Split.SELECT, Split.VALIDATE)
"""Experts are explained from the first and labels scored on the second; test documents are never kept."""
_NORM_ELEMENTS = 1 << 17


def context_start(position: Int[Tensor, "row"], length: Int[Tensor, "row"]) -> Int[Tensor, "row"]:
    """First token of each context: the focal token is in the middle unless the window ends sooner."""
    return (position - CONTEXT // 2).minimum(length - CONTEXT).clamp(min=0)


@dataclass(frozen=True)
class ScoredVisits:
    """Kept visits of one layer and split, sorted by expert, then key."""

    expert: Int[Tensor, "row"]
    key: Int[Tensor, "row"]
    """Uniform hash of where the token stands."""
    score: Float[Tensor, "row"]
    """``weight * ||output||``."""
    weight: Float[Tensor, "row"]
    document: Int[Tensor, "row"]
    first_char: Int[Tensor, "row"]
    """First character of the token's window; with `document` it names the window."""
    position: Int[Tensor, "row"]
    """Index of the token in its window."""
    experts: Int[Tensor, "row context slot"]
    """Experts chosen by each token of the context, `nobody` of the dtype where there is none."""
    direction: Float[Tensor, "row d_model"]
    """``output / ||output||`` in float16, so that ``score * direction`` is what the visit wrote. No columns in
    the validate split."""

    def __len__(self) -> int:
        return len(self.expert)

    def take(self, rows: Tensor | slice) -> ScoredVisits:
        return ScoredVisits(*(getattr(self, name)[rows] for name in _VISIT))


_VISIT = tuple(ScoredVisits.__dataclass_fields__)


def _joined(parts: Iterable[ScoredVisits]) -> ScoredVisits:
    parts = list(parts)
    return ScoredVisits(*(join_parts([getattr(part, name) for part in parts]) for name in _VISIT))


class _Pool:
    """The best visits, by score and by key, of every expert of one layer and split."""

    def __init__(self, n_experts: int, n_top: int, n_sample: int) -> None:
        self.n_top, self.n_sample = n_top, n_sample
        self.n_visits = torch.zeros(n_experts, dtype=torch.long)
        self.parts: list[ScoredVisits] = []
        self._pending = 0
        self._least_score = torch.full((n_experts,), -torch.inf)
        self._last_key = torch.full((n_experts,), LAST_KEY)

    def wanted(self, expert: Tensor, key: Tensor, score: Tensor) -> Int[Tensor, "kept"]:
        """Rows that this batch could add to either sample."""
        near = (score >= self._least_score[expert]) | (key <= self._last_key[expert])
        at = near.nonzero().squeeze(1)
        top, sampled = self.ranks(expert[at], key[at], score[at])
        return at[(top < self.n_top) | (sampled < self.n_sample)]

    def ranks(self, expert: Tensor, key: Tensor, score: Tensor) -> tuple[Int[Tensor, "row"], Int[Tensor, "row"]]:
        """Place of each row among its expert's rows by falling score, and by rising key."""
        by_key = key.argsort()
        by_score = by_key[score[by_key].argsort(descending=True, stable=True)]
        return self._places(expert, by_score), self._places(expert, by_key)

    def _places(self, expert: Tensor, order: Tensor) -> Int[Tensor, "row"]:
        order = order[expert[order].argsort(stable=True)]
        counts = torch.bincount(expert, minlength=len(self.n_visits))
        first = counts.cumsum(0) - counts
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order)) - first[expert[order]]
        return places

    def add(self, visits: ScoredVisits) -> None:
        if self.parts and not len(visits):
            return
        self.parts.append(visits)
        self._pending += len(visits)
        if self._pending > len(self.n_visits) * (self.n_top + self.n_sample):
            self.kept()

    def kept(self) -> ScoredVisits:
        """Both samples, sorted by expert and key."""
        if self._pending:
            visits = _joined(self.parts)
            top, sampled = self.ranks(visits.expert, visits.key, visits.score)
            for places, last, value, limit in (
                (top, self.n_top - 1, visits.score, self._least_score),
                (sampled, self.n_sample - 1, visits.key, self._last_key),
            ):
                at = places == last
                limit[visits.expert[at]] = value[at]
            at = ((top < self.n_top) | (sampled < self.n_sample)).nonzero().squeeze(1)
            at = at[visits.key[at].argsort()]
            self.parts = [visits.take(at[visits.expert[at].argsort(stable=True)])]
            self._pending = 0
        return self.parts[0]


class TopExemplars:
    """Visits and non-visits of every expert, enough to explain it and to score an explanation (METRICS 1.6).

    Args:
        splits: split code of every document (``Tokenized.splits``). Select and validate are sampled apart, so what
            explains and what scores come from different documents.
        n_top: highest scores kept per expert and split, exactly.
        n_sample: random visits kept per expert and split.
        window_tokens: tokens of the windows kept per split for non-visits.
        directions: keep what the visits of the select split wrote (for the logit lens).
        seed: of the hash keys.

    Memory between batches, for up to 255 experts a layer: per expert
    ``(n_top + n_sample) * (2 * d_model + 64 * top_k + 96)`` bytes, and at most twice that until old rows are
    dropped; for the windows at most ``8 * window_tokens * (layers * top_k + 3)``. OLMoE-1B-7B: 0.4 to 0.8 GB, of
    which directions are nine tenths, and at most 0.14 GB. Neither grows with the corpus.

    Scores are as exact as the forward pass: another batch shape can change the last bits of an output and
    with them the order of two nearly equal scores. A high score says that an expert writes much at a token, not
    that the model needs it there.
    """

    roles = frozenset({Role.MOE})

    def __init__(
        self,
        splits: Sequence[int] | Int[ndarray, "document"],
        *,
        n_top: int = 20,
        n_sample: int = 64,
        window_tokens: int = 1 << 17,
        directions: bool = True,
        seed: int = 0,
    ) -> None:
        self.splits = torch.as_tensor(splits).long()
        self.n_top, self.n_sample = n_top, n_sample
        self.directions = directions
        self.seed = seed
        self.windows = WindowSample(window_tokens)
        self._pools: dict[tuple[int, int], _Pool] = {}
        self._codes = [code_of(split) for split in SPLITS]

    def start_batch(self, batch: TokenBatch) -> None:
        """Name every window and token of the batch, and admit windows to the sample of windows."""
        if self.windows.overfull:
            self.windows.settle()
        document, mask = batch.document.cpu(), batch.attention_mask.cpu().bool()
        char = batch.char_start.cpu()
        first_char = torch.where(char >= 0, char, LAST_KEY).amin(1)
        split = self.splits[document]
        key = row_keys(document, first_char, self.seed)
        n_windows, seq = mask.shape
        position = torch.arange(seq).repeat(n_windows)
        self._length = mask.sum(1)
        self._seq = seq
        self._place = (document, first_char)
        # several tokens of one character share its offsets, so a token's key is made of its place in the window
        self._key = row_keys(key.repeat_interleave(seq), position, self.seed)
        self._split = torch.where(batch.token_eligible.cpu(), split.repeat_interleave(seq), -1)
        used = torch.isin(split, torch.tensor(self._codes)) & (first_char < LAST_KEY)
        admitted = (used & self.windows.open(key, split)).nonzero().squeeze(1)
        real = mask[admitted]
        self._sampled = (admitted[:, None] * seq + torch.arange(seq))[real]
        per_window = (key, split, document, first_char, self._length)
        columns = {name: value[admitted] for name, value in zip(WindowSample.PER_WINDOW, per_window, strict=True)}
        ids, eligible = batch.input_ids.cpu().reshape(-1), batch.token_eligible.cpu()
        self.windows.add({**columns, "input_ids": ids[self._sampled].int(), "eligible": eligible[self._sampled]})

    def update(self, tap: ExpertTap, batch: TokenBatch) -> None:
        """Add the visits of one layer, and the routing of the windows in the sample."""
        chosen = _chosen(tap)
        passed = self._passed_over(tap, chosen)
        chosen = chosen.cpu()
        self.windows.add({f"chosen.{tap.layer}": chosen[self._sampled], f"passed.{tap.layer}": passed})
        norm = _norms(tap.output.detach())
        weight = tap.weight.detach().float().cpu()
        score = weight * norm.cpu()
        token, expert = tap.token.cpu(), tap.expert.cpu()
        key, split = self._key[token], self._split[token]
        for code in self._codes:
            rows = (split == code).nonzero().squeeze(1)
            pool = self._pools.get((tap.layer, code))
            if pool is None:
                pool = self._pools[tap.layer, code] = _Pool(tap.n_experts, self.n_top, self.n_sample)
            pool.n_visits += torch.bincount(expert[rows], minlength=tap.n_experts)
            rows = rows[pool.wanted(expert[rows], key[rows], score[rows])]
            wide = self.directions and code == self._codes[0]
            direction = _directions(tap, rows, norm) if wide else torch.zeros(len(rows), 0, dtype=torch.float16)
            at, place = token[rows], (expert[rows], key[rows], score[rows], weight[rows])
            pool.add(ScoredVisits(*place, *self._where(at), self._context(at, chosen), direction))

    def _where(self, token: Int[Tensor, "row"]) -> tuple[Tensor, Tensor, Tensor]:
        """Document, first character of the window and position of flat tokens."""
        window = token // self._seq
        return self._place[0][window], self._place[1][window], token % self._seq

    def _context(self, token: Int[Tensor, "row"], chosen: Int[Tensor, "token slot"]) -> Int[Tensor, "row context slot"]:
        window, position = token // self._seq, token % self._seq
        length = self._length[window]
        near = context_start(position, length)[:, None] + torch.arange(CONTEXT)
        inside = near < length[:, None]
        flat = window[:, None] * self._seq + near.minimum(length[:, None] - 1)
        return torch.where(inside[..., None], chosen[flat], nobody(chosen))

    def _passed_over(self, tap: ExpertTap, chosen: Int[Tensor, "token slot"]) -> Int[Tensor, "token rank"]:
        """Of the sampled tokens as many experts as were chosen, from those that were not, by falling logit.

        No columns without logits. A family with a bias on the choice (DeepSeek-V3) chooses by another number, so
        there these need not be the next in line.
        """
        top_k, n_experts, none = chosen.shape[1], tap.n_experts, nobody(chosen)
        if tap.router_logits is None:
            return chosen.new_zeros(len(self._sampled), 0).cpu()
        at = self._sampled.to(chosen.device)
        logits = tap.router_logits.detach()[at].float()
        taken = chosen[at].long().clamp(max=n_experts)
        # a column more, for the empty slots
        rest = torch.nn.functional.pad(logits, (0, 1)).scatter(1, taken, -torch.inf)[:, :n_experts]
        best, index = rest.topk(min(top_k, n_experts - top_k), dim=1)
        return torch.where(best > -torch.inf, index, none).to(chosen.dtype).cpu()

    @property
    def layers(self) -> list[int]:
        return sorted({layer for layer, _ in self._pools})

    def check_layers(self, layers: Sequence[int] | None) -> list[int]:
        """`layers`, or all that were captured.

        Raises:
            OutOfRange: a layer that was not captured.
        """
        known = self.layers
        for layer in layers or ():
            if layer not in known:
                raise OutOfRange(f"layer {layer} was not captured: choose from {', '.join(map(str, known))}")
        return known if layers is None else list(layers)

    def n_visits(self, layer: int, split: Split | str) -> Int[Tensor, "expert"]:
        """Eligible visits of every expert in one split."""
        return self._pools[layer, code_of(split)].n_visits

    def visits(self, layer: int, split: Split | str) -> ScoredVisits:
        """Kept visits of one layer and split."""
        return self._pools[layer, code_of(split)].kept()

    def places(self, layer: int, split: Split | str) -> tuple[Int[Tensor, "row"], Int[Tensor, "row"]]:
        """Of each of ``visits(layer, split)`` its place among the expert's visits by falling score and by rising key.

        Those below `n_top` in the first are the expert's highest scores, those below `n_sample` in the second its
        random visits. Places beyond are of kept rows only and mean nothing.
        """
        pool = self._pools[layer, code_of(split)]
        kept = pool.kept()
        return pool.ranks(kept.expert, kept.key, kept.score)

    def merge(self, other: TopExemplars) -> None:
        """Add what `other`, made with the same settings, saw of other windows in the same layers."""
        for at, theirs in other._pools.items():
            ours = self._pools.setdefault(at, _Pool(len(theirs.n_visits), self.n_top, self.n_sample))
            ours.n_visits += theirs.n_visits
            ours.add(theirs.kept())
        self.windows.merge(other.windows.state())

    def state_dict(self) -> dict[str, Any]:
        """Samples and counts; the settings are those of the consumer that reads it."""
        state: dict[str, Any] = {f"windows.{name}": value for name, value in self.windows.state().items()}
        for (layer, code), pool in self._pools.items():
            state[f"{layer}.{code}.n_visits"] = pool.n_visits
            state |= {f"{layer}.{code}.{name}": getattr(pool.kept(), name) for name in _VISIT}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace what was seen by the state of a consumer with the same settings."""
        self.windows = WindowSample(self.windows.max_tokens)
        self.windows.merge({k.removeprefix("windows."): v for k, v in state.items() if k.startswith("windows.")})
        self._pools = {}
        for name in [name for name in state if name.endswith(".n_visits")]:
            at = name.removesuffix("n_visits")
            layer, code = at.split(".")[:2]
            pool = self._pools[int(layer), int(code)] = _Pool(len(state[name]), self.n_top, self.n_sample)
            pool.n_visits = state[name].clone()
            pool.add(ScoredVisits(*(state[at + column] for column in _VISIT)))


def _chosen(tap: ExpertTap) -> Int[Tensor, "token slot"]:
    """Experts of every token in slot order; a family may leave a slot empty."""
    top_k = int(tap.slot.max()) + 1 if len(tap.slot) else 1
    dtype = torch.uint8 if tap.n_experts <= torch.iinfo(torch.uint8).max else torch.int16
    chosen = torch.full((tap.n_tokens, top_k), torch.iinfo(dtype).max, dtype=dtype, device=tap.token.device)
    chosen[tap.token, tap.slot] = tap.expert.to(dtype)
    return chosen


def _norms(output: Float[Tensor, "row d_model"]) -> Float[Tensor, "row"]:
    """``||output||`` in float32; a CPU widens into a copy first, much faster in pieces that stay in its cache."""
    n = _NORM_ELEMENTS // output.shape[1] + 1 if output.device.type == "cpu" else max(len(output), 1)
    return torch.cat([torch.linalg.vector_norm(part, dim=-1, dtype=torch.float32) for part in output.split(n)])


def _directions(tap: ExpertTap, rows: Tensor, norm: Float[Tensor, "row"]) -> Float[Tensor, "row d_model"]:
    """Unit vectors: float16 would overflow on the outputs of super experts."""
    at = rows.to(norm.device)
    output, length = tap.output.detach()[at].float(), norm[at, None]
    return torch.where(length > 0, output / length, 0).half().cpu()
