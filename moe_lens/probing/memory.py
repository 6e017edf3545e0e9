"""How many layers can be captured at once inside a memory limit."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moe_lens.errors import MemoryLimit

if TYPE_CHECKING:
    from moe_lens.models.spec import LayerSpec
    from moe_lens.probing.settings import ProbeSettings

DEFAULT_SHARE = 0.6
"""Share of the free memory that is used when no limit is given."""
_RESERVE = 300 << 20  # allocator slack, libraries loaded late, tables


def resident_bytes() -> int:
    """Resident set of this process now."""
    import psutil

    release()
    return psutil.Process().memory_info().rss


def release() -> None:
    """Give freed memory back to the system: glibc keeps it, and what is resident counts against the limit."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def default_limit() -> int:
    """What this process holds plus 60 % of what is free, in bytes."""
    import psutil

    return resident_bytes() + int(DEFAULT_SHARE * psutil.virtual_memory().available)


def layer_bytes(layer: LayerSpec, *, n_classes: int, n_rows: int, settings: ProbeSettings, itemsize: int) -> int:
    """Predicted bytes that one layer needs while its probes are selected and fitted.

    Moments are counted twice because ranking holds a few arrays of their size; rows one and a half times
    because joining them copies a part.
    """
    moments = 2 * 16 * layer.n_experts * n_classes * layer.d_ff
    cap = layer.n_experts * settings.max_rows * (1 + n_classes // 2)
    rows = int(1.5 * min(n_rows * layer.top_k, cap) * (layer.d_ff * itemsize + 28))
    return moments + rows


def working_bytes(layers: Sequence[LayerSpec], *, d_model: int, settings: ProbeSettings, itemsize: int) -> int:
    """Predicted bytes of one batch in flight, whatever the number of layers captured."""
    widest = max(layer.top_k * (4 * layer.d_ff + 3 * d_model) for layer in layers)
    return settings.batch_tokens * widest * itemsize + _RESERVE


def layer_groups(
    layers: Sequence[LayerSpec],
    *,
    n_classes: int,
    n_rows: int,
    d_model: int,
    settings: ProbeSettings,
    itemsize: int,
    max_memory: int | None,
) -> list[list[int]]:
    """Cut the layers into consecutive groups that fit the limit; each group costs one pass over the select split.

    Args:
        n_classes: concepts plus scopes plus one.
        n_rows: tokens of the select split.
        max_memory: limit on the resident set of the process, in bytes; None takes ``default_limit()``.

    Raises:
        MemoryLimit: a single layer does not fit.
    """
    limit = default_limit() if max_memory is None else max_memory
    taken = resident_bytes() + working_bytes(layers, d_model=d_model, settings=settings, itemsize=itemsize)
    room = limit - taken
    groups: list[list[int]] = [[]]
    used = 0
    for layer in layers:
        need = layer_bytes(layer, n_classes=n_classes, n_rows=n_rows, settings=settings, itemsize=itemsize)
        if need > room:
            raise MemoryLimit(
                f"layer {layer.layer} needs about {gigabytes(taken + need)} in all and --max-memory is "
                f"{gigabytes(limit)}: raise --max-memory, or lower --max-tokens or --batch-size"
            )
        if used + need > room:
            groups.append([])
            used = 0
        groups[-1].append(layer.layer)
        used += need
    return groups


def gigabytes(n: int) -> str:
    """``1.25GB``, as ``--max-memory`` reads it; never less than `n`."""
    return f"{math.ceil(n / 1e7) / 100:.2f}GB"
