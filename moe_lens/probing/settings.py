"""Settings of one probing run, and the minimum sizes below which a cell says ``too_few``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from moe_lens.errors import BadConfig
from moe_lens.types import Split

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moe_lens.models.spec import Spec

DEFAULT_K = (1, 2, 4, 8, 16, 32, 64)
BEST_CELLS = 8
"""Cells per (concept, role) that are fitted at k > 1, chosen by select-split AUROC at k = 1."""


@dataclass(frozen=True)
class Minimum:
    """Smallest class sizes of one split: tokens of each class, and documents each class must come from."""

    tokens: int
    documents: int


MINIMUM_SELECT = Minimum(tokens=50, documents=10)
MINIMUM_EVAL = Minimum(tokens=25, documents=5)
MINIMUM = {Split.SELECT: MINIMUM_SELECT, Split.VALIDATE: MINIMUM_EVAL, Split.TEST: MINIMUM_EVAL}
DOCUMENTS_NEEDED = {split: minimum.documents for split, minimum in MINIMUM.items()}


def check_k(k: Sequence[int] | None, specs: Sequence[Spec]) -> tuple[int, ...]:
    """`k` in order, each once; by default those of `DEFAULT_K` that the narrowest expert has neurons for.

    Raises:
        BadConfig: not positive, or more neurons than the narrowest expert of a model has.
    """
    if k is None:
        narrowest = min(layer.d_ff for spec in specs for layer in spec.layers)
        return tuple(n for n in DEFAULT_K if n <= narrowest)
    ks = tuple(sorted({int(n) for n in k}))
    if not ks or ks[0] < 1:
        raise BadConfig(f"--k is {list(k)}: give positive numbers of neurons, such as 1,2,4,8")
    for spec in specs:
        width = min(layer.d_ff for layer in spec.layers)
        if ks[-1] > width:
            raise BadConfig(f"--k {ks[-1]} is more than the {width} neurons of an expert of {spec.name}: lower --k")
    return ks


@dataclass(frozen=True)
class ProbeSettings:
    """Everything that can change a number of a probing run, beside model and corpus."""

    k: tuple[int, ...] = DEFAULT_K
    rank: str = "standardised"
    """Neuron ranking, see ``select.neuron_scores``."""
    max_rows: int = 2000
    """Rows used to fit one probe."""
    max_length: int = 256
    """Tokens per window."""
    max_tokens: int | None = None
    document_tokens: int | None = None
    """Tokens read from the start of each document, all of them by default."""
    batch_tokens: int = 4096
    all_cells: bool = False
    """Fit k > 1 in every cell instead of the best eight per concept."""
    seed: int = 0
    """Of the document split and of the row keys."""
    draws: int = 20
    """Random draws of equal cells in the ``equal_*`` arms; 0 leaves them out."""
    permutations: int = 999
    """Exchanges of labels behind every p-value; 0 leaves the null out."""
    neurons: bool = True
    """Count the concept groups that single neurons serve."""
    n_resamples: int = 1000
    """Bootstrap samples of documents behind every interval."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
