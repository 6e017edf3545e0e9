"""What an edit did: how many tokens it touched, and where it could not do what was asked."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

COUNTS = ("tokens", "visits", "refilled", "short", "unsatisfied", "emptied", "unaligned")


@dataclass(repr=False)
class EditRecord:
    """Counts over all forward passes of one `lens.edit` block, by mode and layer.

    `frame` has the columns
        tokens       tokens in scope that had at least one edited expert
        visits       (token, expert) visits changed
        refilled     visits that went to another expert instead (mask_refill, mask_refill_keep)
        short        tokens left with fewer than top_k experts because fewer survive in the layer
        unsatisfied  tokens whose router found no allowed replacement although experts survive
                     (group-limited or fixed routing); the removed expert counts as dropped there
        emptied      tokens all of whose experts were removed (drop_renorm falls back to zero)
        unaligned    visits whose counterfactual has no such visit (patch writes zero)
        mass_ratio   gate mass of the touched tokens after the edit, over that before it
        reference    digest of the reference text (mean, mean_off, resample), empty for other modes

    It says what was changed, not what the change means: an expert that no token visits changes nothing.
    """

    counts: dict[tuple[str, int], Counter[str]] = field(default_factory=dict)
    mass: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    references: dict[str, str] = field(default_factory=dict)
    """Digest of the reference text that a mode took its values from."""

    def add(self, mode: str, layer: int, *, mass: tuple[float, float] | None = None, **counts: int) -> None:
        """Add to the counts of one mode in one layer; `mass` is the gate mass before and after."""
        self.counts.setdefault((mode, layer), Counter()).update(counts)
        if mass is not None:
            total = self.mass.setdefault((mode, layer), [0.0, 0.0])
            total[0] += mass[0]
            total[1] += mass[1]

    def total(self, count: str) -> int:
        """Sum of one count over modes and layers."""
        return sum(found[count] for found in self.counts.values())

    @property
    def frame(self) -> pd.DataFrame:
        """One row per mode and layer that an edit touched."""
        import pandas as pd

        rows = []
        for (mode, layer), counts in sorted(self.counts.items()):
            before, after = self.mass.get((mode, layer), (0.0, 0.0))
            ratio = after / before if before else float("nan")
            rows.append({"mode": mode, "layer": layer, **{n: counts[n] for n in COUNTS}, "mass_ratio": ratio})
            rows[-1]["reference"] = self.references.get(mode, "")
        return pd.DataFrame(rows, columns=["mode", "layer", *COUNTS, "mass_ratio", "reference"])

    def warning(self) -> str | None:
        """One sentence if some tokens could not be treated as asked, else None."""
        tokens = self.total("unsatisfied")
        if not tokens:
            return None
        layers = sorted({layer for (_, layer), found in self.counts.items() if found["unsatisfied"]})
        where = ", ".join(f"L{layer}" for layer in layers)
        return (
            f"the router of {where} found no replacement for {tokens} tokens, where the removed expert was dropped "
            "instead: its choice is limited to groups or fixed by the token (see `unsatisfied` in the record)"
        )

    def __repr__(self) -> str:
        return self.frame.to_string(index=False) if self.counts else "EditRecord(nothing touched yet)"

    def _repr_html_(self) -> str:
        return self.frame.to_html(index=False)
