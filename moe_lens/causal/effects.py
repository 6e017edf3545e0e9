"""What an edit does to a model's predictions, token by token: ``Effects(lens, tokenized).of(edit)``.

1. One clean pass: NLL of every prediction, the routing of every token, and what `replay` needs to start at a layer.
2. For an edit: the tokens it touches (visits of its experts, within scope), then only what these can reach: the
   edited layer at those tokens, later layers in their windows, the LM head at tokens from the first touched one on.
   Everything else keeps its clean numbers, exactly.
3. Clean passes stay in memory up to `max_memory`; beyond that each is made anew and serves all edits of one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from moe_lens.causal.ablation import Ablation, prepare
from moe_lens.causal.evaluation import Part, evaluation
from moe_lens.causal.replay import Clean, Reach, Replay
from moe_lens.causal.result import TokenEffects
from moe_lens.causal.scoring import CleanPredictions, Head, Wanted
from moe_lens.errors import BadConfig
from moe_lens.models.edits import MODES, Mode
from moe_lens.types import ExpertAddress, Split

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from numpy import ndarray

    from moe_lens.corpus.batches import Tokenized
    from moe_lens.models.edits.apply import DownstreamRouting
    from moe_lens.models.lens import Lens

BATCH_TOKENS = {"cpu": 1024}
"""Tokens of a pass by device: what a processor's cache holds (measured by `tests/bench/ablating.py`)."""
BATCH_TOKENS_ELSEWHERE = 4096
TOGETHER = 64
"""Edits that are measured together where that gains something (`Effects.one_by_one`)."""
SHARED = {"cpu": 1}
SHARED_ELSEWHERE = 4
"""Batches' worth of tokens that several edits may put through later layers at once, by device."""


@dataclass(frozen=True, eq=False)
class _Kept:
    clean: Clean
    predictions: CleanPredictions

    @property
    def n_bytes(self) -> int:
        """Memory, with the clean probabilities that KL will need."""
        return self.clean.n_bytes + self.predictions.n_bytes


@dataclass(frozen=True)
class NoiseFloor:
    """99th percentiles of differences between two clean passes (METRICS 2.2): no smaller effect is called non-zero.

    They come from other batches and other shapes of the same products, in the model's own precision.
    """

    nll: float
    """Of |NLL - NLL|, nats per token."""
    kl: float
    mean_nll: float
    """|Mean NLL - mean NLL|: the floor of an average over the whole text."""


class Effects:
    """The clean model on an evaluation text, ready to be compared with itself under edits."""

    def __init__(
        self,
        lens: Lens,
        tokenized: Tokenized,
        *,
        split: Split | str | None = Split.TEST,
        max_tokens: int | None = None,
        batch_tokens: int | None = None,
        include_first: bool = False,
        max_memory: int = 2 * 2**30,
        reach: Reach | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        """Run the clean pass.

        A model in bfloat16 rounds its logits to two or three digits: load it in float32 where that fits, and look
        at `noise_floor`.

        Args:
            split: documents to use; None means all.
            max_tokens: whole documents in a random order by `seed`, up to this many tokens; at least one.
            batch_tokens: tokens of one pass, padding included; None means 1,024 on a CPU, else 4,096.
            include_first: count predictions made at the first token of a window, BOS included.
            max_memory: bytes of clean passes that may be kept.
            reach: force one way of running edits, for tests and benches: "full" is the whole model. None takes the
                shortest that is found exact for the layer (`notes` says where that is not "tokens").

        Raises:
            BadConfig: inside a `lens.edit` block, or a number of tokens that is not positive.
            BadCorpus: no document of the split has a token to predict.
            UnsupportedModel: logits that are no function of the final hidden states.
        """
        if lens.is_edited:
            raise BadConfig("effects are measured against the clean model: leave the lens.edit block first")
        if batch_tokens is not None and batch_tokens < 1:
            raise BadConfig(f"batch_tokens={batch_tokens}: give a positive number of tokens")
        self.lens, self.progress, self.seed = lens, progress, seed
        self.batch_tokens = batch_tokens or BATCH_TOKENS.get(lens.device.type, BATCH_TOKENS_ELSEWHERE)
        self.text = evaluation(tokenized, split=split, max_tokens=max_tokens, include_first=include_first, seed=seed)
        self.replay, self.head = Replay(lens, reach=reach), Head(lens)
        self.parts = self.text.parts(self.batch_tokens)
        self.nll: Float[ndarray, "prediction"] = np.zeros(len(self.text.token), np.float32)
        """Clean negative log-likelihood of the next token, nats."""
        self.routing: dict[int, tuple[Int[ndarray, "read_token slot"], Float[ndarray, "read_token slot"]]] = {}
        """Clean experts and weights of every token of `text.read`, by MoE layer."""
        self._kept: list[_Kept | None] = [None] * len(self.parts)
        self._first_pass(max_memory)

    @property
    def notes(self) -> tuple[str, ...]:
        """Layers for which a shortcut was found not to be exact, so far."""
        return tuple(self.replay.notes.values())

    @property
    def is_kept(self) -> bool:
        """Whether all clean passes are in memory."""
        return all(kept is not None for kept in self._kept)

    @property
    def one_by_one(self) -> bool:
        """Whether nothing is gained by measuring several edits together: clean passes are kept, batches are full."""
        return self.is_kept and SHARED.get(self.lens.device.type, SHARED_ELSEWHERE) == 1

    def visits(self, expert: str | ExpertAddress) -> Bool[ndarray, "prediction"]:
        """Whether each predicting token is routed to `expert` in the clean pass (r of METRICS 3)."""
        found = self.lens.address(expert)
        if found.layer not in self.routing:
            return np.ones(len(self.text.token), bool)
        return (self._chosen(found.layer)[0] == found.expert).any(axis=1)

    def gates(self, expert: str | ExpertAddress) -> Float[ndarray, "prediction"]:
        """Clean router weight of `expert` at each predicting token, 0 where it is not visited, 1 in a dense layer."""
        found = self.lens.address(expert)
        if found.layer not in self.routing:
            return np.ones(len(self.text.token), np.float32)
        index, weight = self._chosen(found.layer)
        return np.where(index == found.expert, weight, 0).sum(axis=1)

    def _chosen(self, layer: int) -> tuple[Int[ndarray, "prediction slot"], Float[ndarray, "prediction slot"]]:
        rows = np.searchsorted(self.text.read, self.text.token)
        index, weight = self.routing[layer]
        return index[rows], weight[rows]

    def co_selected(self, expert: str | ExpertAddress, *, seed: int = 0) -> Int[ndarray, "corpus_token"]:
        """A random one of the other experts chosen at each token that visits `expert`, -1 elsewhere.

        For `per_visit`: the within-token control of METRICS 2.5 in one pass.

        Raises:
            BadConfig: a layer that routes each token to one expert, or a dense one.
        """
        found = self.lens.address(expert)
        index = self.routing[found.layer][0] if found.layer in self.routing else np.zeros((0, 1), np.int64)
        top_k = index.shape[1]
        if top_k < 2:
            raise BadConfig(f"layer {found.layer} sends a token to one expert only, so {found} has no co-selected one")
        rows, slots = np.nonzero(index == found.expert)
        other = (slots + np.random.default_rng(seed).integers(1, top_k, len(rows))) % top_k
        choice = np.full(self.text.tokenized.n_tokens, -1)
        choice[self.text.read[rows]] = index[rows, other]
        return choice

    def of(
        self,
        edit: Mode | Sequence[Mode],
        *,
        routing: DownstreamRouting = "live",
        tokens: Bool[ndarray, "corpus_token"] | None = None,
        quantities: Sequence[str] = ("nll", "kl"),
        pairs: Sequence[tuple[int, int]] = (),
        whole_layers: bool = False,
    ) -> TokenEffects:
        """Effect of one edit on every prediction.

        Args:
            edit: an ablation mode, or several to apply together (`moe_lens.zero("L7.E12")`).
            routing: see `Lens.edit`.
            tokens: which tokens of the tokenised corpus may be edited; None means all.
            quantities: of nll (always there), kl, top1.
            pairs: token ids (a, b), for the logit of a minus that of b.
            whole_layers: allow naming every expert of a layer.

        Raises:
            BadConfig: what `Lens.edit` refuses, an unknown quantity, or a scope of another length.
            OutOfRange: an expert that the model does not have.
            BadCorpus: a reference text that never visits an expert.
        """
        return self.of_each(
            [edit], routing=routing, tokens=tokens, quantities=quantities, pairs=pairs, whole_layers=whole_layers
        )[0]

    def of_each(
        self,
        edits: Sequence[Mode | Sequence[Mode]],
        *,
        routing: DownstreamRouting = "live",
        tokens: Bool[ndarray, "corpus_token"] | None = None,
        quantities: Sequence[str] = ("nll", "kl"),
        pairs: Sequence[tuple[int, int]] = (),
        whole_layers: bool = False,
    ) -> list[TokenEffects]:
        """`of` for many edits, each on its own; clean passes that are not kept are made once for all of them."""
        n_tokens = self.text.tokenized.n_tokens
        if tokens is not None and np.shape(tokens) != (n_tokens,):
            raise BadConfig(
                f"tokens= has shape {np.shape(tokens)}: give one entry for each of {n_tokens} corpus tokens"
            )
        scope = None if tokens is None else np.asarray(tokens, bool)
        wanted = Wanted.checked(quantities, pairs, self.head.n_tokens)
        ablations = [
            prepare(self.lens, edit, routing=routing, tokens=scope, whole_layers=whole_layers) for edit in edits
        ]
        found = [self._unchanged(ablation, wanted) for ablation in ablations]
        with tqdm(total=len(self.parts) * len(edits), desc="ablate", unit="pass", disable=self._silent(edits)) as bar:
            for part, kept in self.clean_passes():
                for group in self._groups(kept.clean, ablations):
                    reached = self._reached(kept.clean, [ablations[i] for i in group])
                    for i, (affected, hidden) in zip(group, reached, strict=True):
                        self._note_clean(part, kept, ablations[i], found[i], wanted)
                        self._score(part, kept, affected, hidden, found[i], wanted)
                    bar.update(len(group))
        return found

    def _groups(self, clean: Clean, ablations: Sequence[Ablation]) -> Iterator[list[int]]:
        """Edits that run in one pass: neighbours of one layer that fit together, padding included."""
        limit = self.batch_tokens * SHARED.get(self.lens.device.type, SHARED_ELSEWHERE)
        group: list[int] = []
        room, shared = 0, None
        for i, ablation in enumerate(ablations):
            alone = not self.replay.can_share(clean, ablation)
            key = None if alone else (ablation.layers, ablation.routing)
            size = clean.ids.numel()
            if not alone:
                windows = ablation.touched(clean.token, clean.routing).any(dim=1)
                size = int(windows.sum()) * clean.ids.shape[1]
            if group and (alone or key != shared or size > room):
                yield group
                group = []
            if not group:
                room, shared = limit, key
            group.append(i)
            room -= size
        if group:
            yield group

    def _reached(self, clean: Clean, group: Sequence[Ablation]) -> Sequence[tuple[torch.Tensor, torch.Tensor]]:
        """Affected tokens of each edit of a group, and their final hidden states."""
        if len(group) == 1:
            return [self.replay.edited(clean, group[0])]
        return self.replay.edited_together(clean, group)

    def leave_one_out(
        self,
        units: Sequence[str | ExpertAddress] | None = None,
        mode: str | Callable[..., Mode] = "zero",
        *,
        routing: DownstreamRouting = "live",
        quantities: Sequence[str] = ("nll", "kl"),
        options: Mapping[str, Any] | None = None,
    ) -> Iterator[tuple[ExpertAddress, TokenEffects]]:
        """Effect of each expert on its own, as they are measured.

        Args:
            units: None means every expert of `Lens.layers`.
            mode: name of a mode, or a function that makes one from an address.
            options: further arguments of the mode; mean, mean_off and resample need a ``reference``, best one that
                `Lens.reference` collected once for all units.

        Raises:
            BadConfig: an unknown mode, a missing argument, and what `of` refuses.
            OutOfRange: an expert that the model does not have.
        """
        chosen = self._units(units)
        if isinstance(mode, str) and mode not in MODES:
            raise BadConfig(f"unknown mode {mode!r}: use one of {', '.join(MODES)}")
        make = MODES[mode] if isinstance(mode, str) else mode
        try:
            edits = [make(unit, **(options or {})) for unit in chosen]
        except TypeError as error:
            raise BadConfig(
                f"mode {mode!r} cannot be made of one expert ({error}): give what it needs in options="
            ) from error
        together = 1 if self.one_by_one else TOGETHER
        with tqdm(total=len(chosen), desc="leave one out", unit="expert", disable=self._silent(chosen)) as bar:
            for at in range(0, len(chosen), together):
                found = self.of_each(edits[at : at + together], routing=routing, quantities=quantities)
                for unit, result in zip(chosen[at : at + together], found, strict=True):
                    bar.update()
                    yield unit, result

    def noise_floor(self) -> NoiseFloor:
        """Compare the clean model with itself in other batches: shuffled windows, three quarters of the tokens."""
        hidden: Any = None
        for part in self.text.parts(max(1, self.batch_tokens * 3 // 4), shuffled=self.seed + 1):
            device = self.lens.device
            with torch.no_grad():
                found = self.replay.decode(part.ids.to(device), part.mask.to(device)).last_hidden_state
            if hidden is None:
                hidden = found.new_empty(len(self.nll), found.shape[-1])
            hidden[part.slot[part.counted].to(device)] = found[part.counted.to(device)]
        again, kl = np.zeros_like(self.nll), np.zeros_like(self.nll)
        for part, kept in self.clean_passes():
            slot = part.slot[part.counted]
            chosen = torch.arange(len(slot), device=self.lens.device)
            scores = kept.predictions.score(hidden[slot], chosen, Wanted(kl=True))
            assert scores.kl is not None
            again[slot], kl[slot] = scores.nll.cpu(), scores.kl.cpu()
        off = np.abs(again - self.nll)
        means = abs(float(again.mean(dtype=np.float64) - self.nll.mean(dtype=np.float64)))
        return NoiseFloor(float(np.percentile(off, 99)), float(np.percentile(kl, 99)), means)

    # the passes

    def _first_pass(self, max_memory: int) -> None:
        with tqdm(total=len(self.parts), desc="clean", unit="pass", disable=self._silent(self.parts)) as bar:
            for number, part in enumerate(self.parts):
                kept = self._clean(part)
                if number == 0:
                    self._check_head(kept.clean.ids[:1, :16])
                    keep = kept.n_bytes * len(self.parts) <= max_memory
                self.nll[part.slot[part.counted]] = kept.predictions.scores(Wanted()).nll.cpu()
                self._note_routing(part, kept.clean)
                self._kept[number] = kept if keep else None
                bar.update()

    @torch.no_grad()
    def _check_head(self, ids: Int[torch.Tensor, "window seq"]) -> None:
        self.head.check(self.replay.decode(ids, None).last_hidden_state, ids)

    def _clean(self, part: Part) -> _Kept:
        device = self.lens.device
        clean = self.replay.clean(part.ids.to(device), part.mask.to(device), part.token)
        row, column = part.counted.nonzero(as_tuple=True)
        hidden, target = clean.hidden[row, column], clean.ids[row, column + 1]
        return _Kept(clean, CleanPredictions(self.head, hidden, target))

    def clean_passes(self) -> Iterator[tuple[Part, _Kept]]:
        """Every batch with its clean pass, made anew where it was not kept."""
        for part, kept in zip(self.parts, self._kept, strict=True):
            yield part, kept or self._clean(part)

    def _note_routing(self, part: Part, clean: Clean) -> None:
        real = part.token.reshape(-1) >= 0
        rows = np.searchsorted(self.text.read, part.token.reshape(-1)[real].numpy())
        for layer, (index, weight) in clean.routing.items():
            if layer not in self.routing:
                shape = (len(self.text.read), index.shape[1])
                self.routing[layer] = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
            self.routing[layer][0][rows] = index.cpu()[real].numpy()
            self.routing[layer][1][rows] = weight.cpu().float()[real].numpy()

    def _unchanged(self, ablation: Ablation, wanted: Wanted) -> TokenEffects:
        """Arrays with the clean NLL, for `_measure` to write to."""
        n = len(self.nll)
        return TokenEffects(
            ablation.title, ablation.routing, self.text, touched=np.zeros(n, bool), nll_clean=self.nll,
            nll=self.nll.copy(), kl=np.full(n, 0 if wanted.kl else np.nan, np.float32),
            top1_clean=np.full(n, -1), top1=np.full(n, -1),
            logit_difference_clean=np.zeros((n, len(wanted.pairs)), np.float32),
            logit_difference=np.zeros((n, len(wanted.pairs)), np.float32), record=ablation.record, wanted=wanted,
        )  # fmt: skip

    def _note_clean(self, part: Part, kept: _Kept, ablation: Ablation, into: TokenEffects, wanted: Wanted) -> None:
        """What an edit touches, and clean numbers that are made only where they are wanted."""
        slot = part.slot[part.counted]
        into.touched[slot] = ablation.touched(part.token, kept.clean.routing)[part.counted].numpy()
        clean = kept.predictions.scores(wanted)
        for name in ("top1", "logit_difference"):
            if (values := getattr(clean, name)) is not None:
                getattr(into, f"{name}_clean")[slot] = getattr(into, name)[slot] = values.cpu()

    def _score(
        self, part: Part, kept: _Kept, affected: torch.Tensor, hidden: torch.Tensor, into: TokenEffects, wanted: Wanted
    ) -> None:
        """Predictions of the affected tokens under an edit."""
        predicts = part.counted[affected]
        if not predicts.any():
            return
        chosen = affected[part.counted].nonzero().squeeze(1).to(hidden.device)
        scores = kept.predictions.score(hidden[predicts.to(hidden.device)], chosen, wanted)
        slot = part.slot[part.counted & affected]
        for name in ("nll", "kl", "top1", "logit_difference"):
            if (values := getattr(scores, name)) is not None:
                getattr(into, name)[slot] = values.cpu()

    def _units(self, units: Sequence[str | ExpertAddress] | None) -> list[ExpertAddress]:
        if units is not None:
            return [self.lens.address(unit) for unit in units]
        entries = [entry for entry in self.lens.spec.layers if entry.layer in self.lens.layers]
        return [ExpertAddress(entry.layer, e) for entry in entries for e in range(entry.n_experts)]

    def _silent(self, work: Sequence[Any]) -> bool | None:
        return None if self.progress and len(work) > 1 else True
