"""``ml.patch(lens, clean, corrupt)``: which experts carry the difference between two prompts.

1. Tokenise, align, choose target and foil; record what every expert writes in either prompt.
2. Run one prompt with what one expert writes in the other, for every expert that either of them visits; whole layers,
   layers at single positions and coalitions likewise, many copies in a batch.
3. Controls: the other experts of the layer, random experts chosen beside it, random coalitions; p by rank.

Activation patching: Meng et al. 2022 (arXiv 2202.05262), Heimersheim & Nanda 2024 (arXiv 2404.15255); of experts,
METRICS 2.3 (`patch`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch

from moe_lens.causal.effects import BATCH_TOKENS, BATCH_TOKENS_ELSEWHERE
from moe_lens.causal.patching.copies import Copies, What, Writes, record
from moe_lens.causal.patching.measure import Measure
from moe_lens.causal.patching.plan import Grid, read_coalitions
from moe_lens.causal.patching.prompts import contrast_of, name_of, pair_of
from moe_lens.causal.patching.result import Patching
from moe_lens.errors import BadConfig, nearest
from moe_lens.models.edits import ROUTING

if TYPE_CHECKING:
    from moe_lens.causal.patching.prompts import Positions, Prompt, Token
    from moe_lens.models.edits.apply import DownstreamRouting
    from moe_lens.models.lens import Lens

Direction = Literal["denoise", "noise"]
MIN_GAP = 0.1
"""Logits: a smaller difference between the two prompts is no denominator."""
MAX_COALITION = 32


def patch(
    lens: Lens,
    clean: Prompt,
    corrupt: Prompt,
    *,
    units: str = "experts",
    target: Token | None = None,
    foil: Token | None = None,
    positions: Positions = "all",
    layers: Sequence[int] | None = None,
    coalitions: int | Sequence[Any] | None = None,
    direction: Direction = "denoise",
    what: What = "write",
    each_position: bool = False,
    routing: DownstreamRouting = "live",
    n_random: int = 20,
    seed: int = 0,
    progress: bool = True,
) -> Patching:
    """Run one prompt with what experts write in the other, and see how far the prediction moves.

    The score is the logit of `target` minus that of `foil` after the last position. Recovery is the share of the gap
    between the two prompts that a patch crosses.

    Args:
        clean, corrupt: prompts, best of equal length in tokens and different in few; texts or token ids.
        target, foil: next tokens, as text or id. Default: the most likely one after `clean`, and after `corrupt`.
        positions: where experts are patched: "all", "last", or a list of numbers (negative from the end of each
            prompt) or of pairs (in clean, in corrupt). Where the prompts begin alike nothing needs to be patched.
        layers: None means all with routed experts.
        coalitions: lists of experts to patch together, or a number n: add the expert that helps most, n times.
        direction: "denoise" runs `corrupt` with writes of `clean`: what suffices to bring the prediction back.
            "noise" runs `clean` with writes of `corrupt`: what is needed for it. The two can differ.
        what: "write" puts in gate times output, zero where the other prompt does not visit the expert, and also where
            only the other prompt visits it. "output" puts in the output at the gates of the prompt that runs, as the
            mode `ml.edits.patch` does; experts that only the other prompt visits stay out.
        each_position: also patch each expert at each position alone.
        routing: "live" lets later layers choose anew; "frozen" keeps their choice in the unpatched prompt.
        n_random: random controls for a coalition and for each of the 10 experts with the largest recovery.

    Raises:
        BadConfig: prompts that cannot be compared (see the sentence), an unknown option.
        BadCorpus: a prompt without tokens.
        OutOfRange: a layer, expert, position or token that is not there.
        UnsupportedModel: logits that are no function of the final hidden states.

    Recovery is about this pair of prompts. It says that an expert carries the difference here, not that no other
    could; experts that stand in for each other show nothing alone and something as a coalition.
    """
    _check(lens, units, {"direction": direction, "what": what, "routing": routing}, n_random, coalitions)
    n_greedy = coalitions if isinstance(coalitions, int) else 0
    named = [] if n_greedy or coalitions is None else read_coalitions(lens, coalitions)
    chosen = sorted({*lens.check_layers(layers), *(expert.layer for members in named for expert in members)})
    pair = pair_of(lens, clean, corrupt, positions, routing)
    writes = {name: record(lens, pair.ids(name), chosen) for name in ("clean", "corrupt")}
    contrast = contrast_of(lens, writes["clean"].logits, writes["corrupt"].logits, target, foil)
    base, source = ("corrupt", "clean") if direction == "denoise" else ("clean", "corrupt")
    grid = Grid.of(pair, writes, base, what)
    copies = Copies(
        lens, pair.ids(base), writes[source], pair.source_of(base), grid.visited, contrast, what=what,
        routing=routing, batch_tokens=BATCH_TOKENS.get(lens.device.type, BATCH_TOKENS_ELSEWHERE),
    )  # fmt: skip
    gap = _difference(writes[source], contrast) - copies.unpatched
    rounding = _rounding(lens, writes)
    scale = gap if abs(gap) >= max(MIN_GAP, 2 * rounding) else float("nan")
    measure = Measure(copies, grid, gap, scale, n_random, np.random.default_rng(seed), progress)
    frame = measure.singles(each_position)
    table = measure.coalitions(named, n_greedy, frame)
    ends = {base: copies.unpatched, source: copies.unpatched + gap}
    return Patching(
        frame, table, measure.control_table(),
        tokens_clean=tuple(name_of(lens, i) for i in pair.clean),
        tokens_corrupt=tuple(name_of(lens, i) for i in pair.corrupt),
        patched=pair.patched, target=name_of(lens, contrast[0]), foil=name_of(lens, contrast[1]),
        difference_clean=ends["clean"], difference_corrupt=ends["corrupt"],
        direction=direction, what=what, routing=routing, n_patches=copies.n_patches, n_passes=copies.n_passes,
        notes=(*measure.notes(base, source), *_notes(lens, rounding), *copies.replay.notes.values()),
    )  # fmt: skip


def _rounding(lens: Lens, writes: Mapping[str, Writes]) -> float:
    """Logits by which rounding in the model's precision can move a difference."""
    largest = max(float(w.logits.abs().max()) for w in writes.values())
    return 2 * torch.finfo(lens.model.dtype).eps * largest


def _notes(lens: Lens, rounding: float) -> tuple[str, ...]:
    if torch.finfo(lens.model.dtype).bits > 16:
        return ()
    name = str(lens.model.dtype).removeprefix("torch.")
    return (f"the model runs in {name}: effects below {rounding:.1g} logits may be rounding, load it in float32",)


def _difference(writes: Writes, contrast: tuple[int, int]) -> float:
    return float(writes.logits[contrast[0]].double() - writes.logits[contrast[1]].double())


def _check(lens: Lens, units: str, options: Mapping[str, str], n_random: int, coalitions: object) -> None:
    known = {"direction": get_args(Direction), "what": get_args(What), "routing": ROUTING}
    if units != "experts":
        raise BadConfig(f"unknown units {units!r}: patch takes experts")
    for name, value in options.items():
        if value not in known[name]:
            raise BadConfig(f"unknown {name} {value!r}{nearest(str(value), known[name])}: use {_either(known[name])}")
    if n_random < 0:
        raise BadConfig(f"n_random={n_random}: give 0 or a positive number of controls")
    if isinstance(coalitions, int) and not 0 < coalitions <= MAX_COALITION:
        raise BadConfig(f"coalitions={coalitions}: give a number from 1 to {MAX_COALITION}, or lists of experts")
    if lens.is_edited:
        raise BadConfig("patch compares two prompts on the clean model: leave the lens.edit block first")


def _either(names: Sequence[str]) -> str:
    return " or ".join(names)
