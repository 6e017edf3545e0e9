"""Does moe-lens see this checkpoint right? Run it once as it is and once with taps, and compare.

1. a short text through the model, untouched, with plain hooks that witness what the MoE blocks do
2. the same text with taps; what they deliver is held against the witnesses (`checks`)
3. an expert ablated by an edit, against the same expert ablated by surgery on its weights (`reruns`)
4. the model must be what it was (`reruns`); then a table of what the checkpoint offers (`capabilities`)
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from moe_lens.errors import BadConfig, BadCorpus, OutOfRange
from moe_lens.models import checks, reruns
from moe_lens.models.capabilities import capabilities
from moe_lens.models.checks import Check, Outcome
from moe_lens.models.evidence import Evidence, gather
from moe_lens.models.lens import Lens
from moe_lens.models.load import load, require_moe
from moe_lens.types import ExpertAddress

if TYPE_CHECKING:
    import pandas as pd
    from jaxtyping import Int

    from moe_lens.models.spec import Spec

TEXT = (
    "The committee met on 14 March 1987. def mean(xs): return sum(xs) / len(xs)  # empty list? "
    "Das Wasser kocht bei 100 Grad; l'eau bout. SELECT name FROM users WHERE age >= 18; "
    "If f is continuous on [a, b], then it attains its maximum there."
)
"""Prose, code, numbers and three languages, so that many experts are visited."""
MAX_TOKENS = 64


@dataclass(frozen=True)
class Diagnosis:
    """What `doctor` found."""

    name: str
    revision: str | None
    checks: tuple[Check, ...]
    capabilities: dict[str, str]
    """What this checkpoint offers."""

    @property
    def ok(self) -> bool:
        """No check failed."""
        return not self.failed

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.status is Outcome.FAILED)

    @property
    def verdict(self) -> str:
        """One sentence."""
        skipped = sum(check.status is Outcome.SKIPPED for check in self.checks)
        n_run = len(self.checks) - skipped
        ending = f" ({skipped} skipped)" if skipped else ""
        if self.ok:
            return f"all {n_run} checks passed{ending}: moe-lens sees what {self.name} computes"
        names = ", ".join(check.check for check in self.failed)
        return f"{len(self.failed)} of {n_run} checks failed{ending}: {names}"

    @cached_property
    def frame(self) -> pd.DataFrame:
        """One row per check: check, status, value, threshold, detail."""
        import pandas as pd

        columns = ["check", "status", "value", "threshold", "detail"]
        frame = pd.DataFrame([asdict(check) for check in self.checks])[columns]
        return frame.astype({"status": str, "value": float, "threshold": float})

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "model": self.name,
            "revision": self.revision,
            "ok": self.ok,
            "verdict": self.verdict,
            "checks": [{**asdict(check), "status": check.status.value} for check in self.checks],
            "capabilities": dict(self.capabilities),
        }

    def _repr_html_(self) -> str:
        import pandas as pd

        offers = pd.DataFrame({"this checkpoint": self.capabilities.values()}, index=list(self.capabilities))
        return f"<p>{html.escape(self.verdict)}</p>{self.frame.to_html(index=False)}{offers.to_html()}"


def doctor(
    model: str | Lens,
    *,
    experts: Sequence[str | ExpertAddress] | None = None,
    text: str | None = None,
    progress: bool = True,
) -> Diagnosis:
    """Check that taps, edits and restoration work on a checkpoint, and list what it offers.

    About ten forward passes over 64 tokens. The model is left as it was, also when this raises.

    Args:
        model: a name for `load`, or a lens.
        experts: addresses to ablate; None means the busiest of the first and of the last MoE layer.
        text: None means a short text of prose, code and numbers; of a longer one, the first 64 tokens count.
        progress: show a bar on stderr if that is a terminal.

    Raises:
        NotAnMoE: a dense model.
        OutOfRange: an expert that the model does not have.
        BadConfig: every expert of a layer is named, a `lens.edit` block is open, or a text without a tokenizer.
        BadCorpus: a text without two tokens.
    """
    lens = model if isinstance(model, Lens) else load(model)
    require_moe(lens.spec)
    if lens.is_edited:
        raise BadConfig("doctor examines the model as it is, but an edit is open: leave the lens.edit block first")
    if text is not None and lens.tokenizer is None:
        raise BadConfig("the lens has no tokenizer to read the text with: leave the text out, or give Lens a tokenizer")
    chosen = None if experts is None else to_ablate(lens.spec, experts)
    ids = _tokens(lens, TEXT if text is None else text)
    found = gather(lens, ids)
    chosen = _busiest(found) if chosen is None else chosen
    free = _free_bytes(lens.device)
    steps: list[Callable[[], Check]] = [
        lambda: checks.loading(lens, found.offloaded),
        lambda: checks.tokenizer(lens, TEXT if text is None else text),
        lambda: checks.finite(found),
        lambda: checks.widths(found),
        *[lambda at=name, step=step: step() if found.is_finite else checks.skipped(at, "needs finite numbers")
          for name, step in _comparisons(found, chosen, free).items()],
        lambda: reruns.restored(found),
    ]  # fmt: skip
    bar = tqdm(steps, desc="doctor", unit="check", leave=False, disable=None if progress else True)
    lines = tuple(step() for step in bar)
    return Diagnosis(lens.name, lens.revision, lines, capabilities(found, free))


def _comparisons(found: Evidence, experts: Sequence[ExpertAddress], free_bytes: int) -> dict[str, Callable[[], Check]]:
    """The lines that compare numbers, by name; NaN would fail each of them without saying why."""
    return {
        "logits, grouped_mm": lambda: reruns.logits_equal(found, "grouped_mm"),
        "logits, eager": lambda: reruns.logits_equal(found, "eager"),
        "logits, bfloat16": lambda: reruns.logits_equal_in_bfloat16(found, free_bytes),
        "block output": lambda: checks.block_output(found),
        "row by row": lambda: checks.row_by_row(found),
        "router": lambda: checks.router_order(found),
        "choice": lambda: checks.choice(found),
        **{f"ablation {at}": lambda at=at: reruns.ablation(found, at) for at in experts},
    }


def to_ablate(spec: Spec, experts: Sequence[str | ExpertAddress]) -> tuple[ExpertAddress, ...]:
    """Read addresses of experts to ablate, by the spec alone.

    Raises:
        OutOfRange: unreadable, a neuron, or an expert or MoE layer that the model does not have.
        BadConfig: every expert of a layer is named.
    """
    found = tuple(dict.fromkeys(ExpertAddress.parse(text) for text in experts))
    if not found:
        raise BadConfig("--experts names no expert: write it as L1.E3,L2.E0, or leave it out")
    for at in found:
        entry = spec.at(at.layer)
        if entry is None or at.layer not in spec.moe_layers:
            layers = ", ".join(map(str, spec.moe_layers))
            raise OutOfRange(f"{spec.name!r} has no experts in layer {at.layer}: give --experts in one of {layers}")
        if at.expert >= entry.n_experts:
            raise OutOfRange(
                f"layer {at.layer} of {spec.name!r} has no expert {at.expert}: give --experts from "
                f"L{at.layer}.E0 to L{at.layer}.E{entry.n_experts - 1}"
            )
        if at.neuron is not None:
            raise OutOfRange(f"{at} is a neuron: give --experts whole experts, such as L{at.layer}.E{at.expert}")
        if sum(other.layer == at.layer for other in found) == entry.n_experts:
            raise BadConfig(
                f"--experts names all {entry.n_experts} experts of layer {at.layer}, and a layer without experts says "
                "nothing about one: leave at least one out"
            )
    return found


def _tokens(lens: Lens, text: str) -> Int[torch.Tensor, "1 seq"]:
    n_rows, most = checks.n_embedded(lens), min(MAX_TOKENS, lens.spec.max_positions or MAX_TOKENS)
    any_ids = torch.arange(min(most, n_rows), device=lens.device)[None]
    if lens.tokenizer is None:
        return any_ids
    ids = lens.tokenizer(text, verbose=False)["input_ids"]
    if len(ids) < 2:
        raise BadCorpus("the text has fewer than two tokens: give a sentence")
    known = [token for token in ids if token < n_rows][:most]  # the tokenizer's own line reports the others
    return torch.tensor([known], device=lens.device) if len(known) > 1 else any_ids


def _busiest(found: Evidence) -> tuple[ExpertAddress, ...]:
    """The most visited expert of the first and of the last MoE layer."""
    layers = sorted({min(found.taps), max(found.taps)})
    return tuple(ExpertAddress(layer, int(found.taps[layer].offsets.diff().argmax())) for layer in layers)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


__all__ = ["TEXT", "Diagnosis", "doctor", "to_ablate"]
