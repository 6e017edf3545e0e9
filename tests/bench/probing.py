"""k-sparse probes of the bundled MoE: moe-lens against the protocol of its source, on the same tokens and rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import reference
from sklearn.metrics import f1_score
from timing import seconds, show, timed

from moe_lens.capture.moments import ClassMoments
from moe_lens.capture.rows import RowStore
from moe_lens.capture.stream import stream
from moe_lens.capture.tokens import TokenTable
from moe_lens.corpus.batches import Tokenized, batches
from moe_lens.models.lens import Lens
from moe_lens.probing.fit import LayerFitter, Probe, draw_rows
from moe_lens.probing.polysemanticity.auroc import neuron_aurocs
from moe_lens.probing.scan import scan, scope_numbers
from moe_lens.probing.settings import MINIMUM_EVAL, ProbeSettings
from moe_lens.types import Role, Split

SETTINGS = ProbeSettings(permutations=0, draws=0, neurons=False)
N_TIMED_CONCEPTS = 4
N_NEURONS = 32


def sample(lens: Lens) -> list[tuple[int, int]]:
    """Two experts of every layer: 8 cells of the bundled MoE."""
    return [(a.layer, e) for a in lens.spec.layers for e in (a.n_experts // 4, 3 * a.n_experts // 4)]


@dataclass
class Fits:
    """What both sides took and gave on the sampled cells."""

    ours: float = 0.0
    reference: float = 0.0
    n: int = 0
    failed: Counter[int] = field(default_factory=Counter)
    """Fits of the reference that stopped at its limit of steps, by k."""
    converged_difference: list[float] = field(default_factory=list)
    """|F1 difference| on test rows where the reference converged."""
    failed_difference: list[float] = field(default_factory=list)


def fit_cells(lens: Lens, tokenized: Tokenized) -> Fits:
    """Fit all concepts and ks of the sampled cells with both, and score the probes on the cells' test rows.

    Our time is all that follows the forward pass: sorting rows and ranking neurons (the expert's share of its layer),
    drawing rows, the fits and their AUROC on select, the two-part score at k = 1. That of the reference is its fits.
    """
    scopes = scope_numbers(tokenized)
    tokens, moments = TokenTable(), ClassMoments(scopes)
    rows = RowStore(tokens, scopes)
    stream(lens, batches(tokenized, split=Split.SELECT), [tokens, moments, rows], progress=False)
    test_tokens = TokenTable()
    test = RowStore(test_tokens, scopes, max_rows=None)
    stream(lens, batches(tokenized, split=Split.TEST), [test_tokens, test], progress=False)
    found = Fits()
    for layer, expert in sample(lens):
        shared, fitter = timed(partial(_fitter, layer, moments, tokens, rows))
        mine = rows.rows(layer, expert)
        took, probes = timed(partial(fitter.fit, expert, mine, range(len(scopes)), SETTINGS.k))
        found.ours += took + shared / len(moments.counts(layer))
        drawn = draw_rows(mine, tokens, SETTINGS.max_rows)
        h, used, positive = drawn.activation.numpy(), drawn.used.numpy(), drawn.positive.numpy()
        unseen = _test_rows(test, test_tokens, layer, expert)
        for probe in (p for p in probes if p.fitted):
            at = used[:, probe.concept]
            _compare(found, probe, reference.fit(h[at][:, probe.neurons], positive[at, probe.concept]), *unseen(probe))
    return found


def _fitter(layer: int, moments: ClassMoments, tokens: TokenTable, rows: RowStore) -> LayerFitter:
    rows.rows(layer, 0)  # sorts those of all experts, once
    return LayerFitter(layer, moments.moments(layer), tokens, SETTINGS)


def _test_rows(
    store: RowStore, tokens: TokenTable, layer: int, expert: int
) -> Callable[[Probe], tuple[np.ndarray, np.ndarray]]:
    rows = store.rows(layer, expert)
    h, labels, in_scope = rows.activation.float().numpy(), tokens.labels[rows.token], tokens.in_scope[rows.token]

    def of(probe: Probe) -> tuple[np.ndarray, np.ndarray]:
        used = in_scope[:, probe.concept].numpy()
        return h[used][:, probe.neurons].astype(np.float64), labels[:, probe.concept].numpy()[used]

    return of


def _compare(found: Fits, probe: Probe, fit: reference.Fit, x: np.ndarray, y: np.ndarray) -> None:
    found.reference += fit.seconds
    found.n += 1
    found.failed[probe.k] += not fit.converged
    if min(y.sum(), (~y).sum()) < MINIMUM_EVAL.tokens:
        return
    ours, theirs = x @ probe.coef + probe.intercept >= 0, fit.predict(x)
    difference = abs(f1_score(y, ours) - f1_score(y, theirs))
    (found.converged_difference if fit.converged else found.failed_difference).append(float(difference))


def reference_speed(lens: Lens, tokenized: Tokenized) -> float:
    """Tokens per second of its forward passes, over some concepts spread over the list."""
    spread = np.linspace(0, len(tokenized.concepts) - 1, N_TIMED_CONCEPTS).astype(int).tolist()
    timed = [reference.forward_seconds(lens, tokenized, c) for c in spread]
    return sum(n for _, n in timed) / sum(took for took, _ in timed)


def auroc_cost(lens: Lens, tokenized: Tokenized) -> tuple[float, float, int]:
    """Ratio of the loop to the product on one cell, their largest difference, and the AUROCs of the loop."""
    scopes = scope_numbers(tokenized)
    tokens = TokenTable()
    rows = RowStore(tokens, scopes, max_rows=None)
    stream(lens, batches(tokenized, split=Split.TEST), [tokens, rows], layers=[0], progress=False)
    mine = rows.rows(*sample(lens)[0])
    h = mine.activation[:, :N_NEURONS].float()
    positive, used = tokens.labels[mine.token], tokens.in_scope[mine.token]
    ours, product = min((timed(partial(neuron_aurocs, h, positive, used)) for _ in range(3)), key=lambda run: run[0])
    theirs, loop = timed(partial(reference.aurocs, h.numpy(), positive.numpy(), used.numpy()))
    known = np.isfinite(loop)
    return theirs / ours, float(np.abs(product.numpy() - loop)[known].max()), int(known.sum())


def probing_cost(lens: Lens, tokenized: Tokenized) -> dict[str, Any]:
    """Print every ratio beside its goal."""
    cells, all_cells = sample(lens), sum(layer.n_experts for layer in lens.spec.layers)
    fits = fit_cells(lens, tokenized)
    whole = [
        seconds(partial(scan, lens, tokenized, replace(SETTINGS, all_cells=every), layers=lens.spec.layers,
                        role=Role.MOE, progress=False))
        for every in (False, True)
    ]  # fmt: skip
    theirs, wider = (reference.tokens_forwarded(tokenized, negatives=flag) for flag in (False, True))
    forward = theirs / reference_speed(lens, tokenized)
    end_to_end = forward + fits.reference * all_cells / len(cells)
    ours = tokenized.n_tokens
    arms = 2 * ours + sum(batches(tokenized, split=split).n_tokens for split in (Split.VALIDATE, Split.TEST))
    auroc, largest, n_aurocs = auroc_cost(lens, tokenized)
    failed = sum(fits.failed.values())
    result = {
        "passes_saved": theirs / ours, "passes_saved_with_negatives": wider / ours,
        "passes_saved_all_arms": theirs / arms, "fit_ratio": fits.reference / fits.ours,
        "n_fits": fits.n, "f1_difference": float(np.mean(fits.converged_difference)),
        "f1_difference_not_converged": float(np.mean(fits.failed_difference)) if fits.failed_difference else None,
        "saga_failed": failed, "saga_failed_by_k": dict(fits.failed), "reference_forward_seconds": forward,
        "reference_seconds": end_to_end, "seconds": whole[0], "seconds_all_cells": whole[1],
        "end_to_end": end_to_end / whole[0], "end_to_end_all_cells": end_to_end / whole[1],
        "auroc_ratio": auroc, "auroc_difference": largest,
    }  # fmt: skip
    by_k = ", ".join(f"{k}: {n}" for k, n in fits.failed.items() if n)
    show(
        f"probing bundled:tiny-moe: {ours} tokens, {len(tokenized.concepts)} concepts, k {SETTINGS.k}, one thread",
        [
            ("tokens forwarded, two per text and concept / once", f"{theirs / ours:.1f}x", "50x"),
            ("  the same, document concepts over all texts once / once", f"{wider / ours:.1f}x", ""),
            ("  the first / once for probes, again for equal cells and neurons", f"{theirs / arms:.1f}x", ""),
            (f"fit time of {len(cells)} cells, {fits.n} saga fits / ranking, rows, fits",
             f"{result['fit_ratio']:.1f}x", "8x"),
            ("mean |F1 difference| on test rows where saga converged", f"{result['f1_difference']:.4f}", "0.01"),
            (f"saga stopped at {reference.MAX_STEPS} steps (by k: {by_k or 'never'})", f"{failed / fits.n:.1%}", ""),
            ("  mean |F1 difference| there", f"{np.mean(fits.failed_difference or [np.nan]):.4f}", ""),
            ("end to end, reference / whole scan (k > 1 in the best 8 cells)", f"{result['end_to_end']:.1f}x", ""),
            ("  the same / --all-cells", f"{result['end_to_end_all_cells']:.1f}x", ""),
            (f"{n_aurocs} neuron AUROCs, loop of roc_auc_score / ranks and a product", f"{auroc:.1f}x", ""),
            ("  largest difference", f"{largest:.1e}", ""),
        ],
    )  # fmt: skip
    print(
        f"  reference: forward {forward:.0f} s from the speed of {N_TIMED_CONCEPTS} concepts, fits "
        f"{fits.reference:.0f} s for {len(cells)} cells, taken {all_cells // len(cells)} times for all {all_cells}.\n"
        f"  moe-lens: measured whole, with batches, scores and counts of all arms: {whole[0]:.0f} s, "
        f"--all-cells {whole[1]:.0f} s."
    )
    return result
