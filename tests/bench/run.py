"""``make bench``: what capture and probing cost, as ratios inside one run.

Rounds alternate between the arms and the median over rounds of the paired ratio is printed, so a machine whose
speed drifts gives the same answer. One thread a side. Nothing here asserts: tests check results, not times.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from transformers import OlmoeConfig, OlmoeForCausalLM

import moe_lens as ml
from moe_lens.capture.moments import ClassMoments
from moe_lens.capture.rows import RowStore
from moe_lens.capture.stream import stream
from moe_lens.capture.tokens import TokenTable
from moe_lens.corpus.batches import batches, tokenize
from moe_lens.corpus.concepts import concepts_for
from moe_lens.models.lens import Lens
from moe_lens.probing.fit import LayerFitter, draw_rows
from moe_lens.probing.scan import scope_numbers
from moe_lens.probing.settings import ProbeSettings
from moe_lens.types import Split

ROUNDS = 7


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def ratio(arm: Callable[[], object], base: Callable[[], object], rounds: int = ROUNDS) -> tuple[float, float]:
    """Median paired ratio arm / base, and the median seconds of base."""
    arm(), base()
    pairs = [(seconds(arm), seconds(base)) for _ in range(rounds)]
    return statistics.median(a / b for a, b in pairs), statistics.median(b for _, b in pairs)


def capture_cost(lens: Lens, tokenized, title: str) -> dict[str, float]:
    """Streamed class moments of all concepts against the same forward passes without capture, for each kernel."""
    loader = list(batches(tokenized, split=Split.SELECT, tokens_per_batch=4096))[:1]
    scopes = scope_numbers(tokenized)
    n = sum(int(b.attention_mask.sum()) for b in loader)

    def plain(head: bool) -> None:
        model = lens.model if head else lens.model.base_model
        with torch.no_grad():
            for batch in loader:
                model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)

    def captured() -> None:
        stream(lens, loader, [ClassMoments(scopes)], progress=False)

    def with_rows() -> None:
        tokens = TokenTable()
        stream(lens, loader, [tokens, ClassMoments(scopes), RowStore(tokens, scopes)], progress=False)

    print(f"{title}: {n} tokens, {len(scopes)} concepts")
    found: dict[str, float] = {}
    for kernel in ("grouped_mm", "eager"):
        lens.model.set_experts_implementation(kernel)
        tapped, base = ratio(captured, lambda: plain(False))
        rows, _ = ratio(with_rows, lambda: plain(False))
        whole, _ = ratio(captured, lambda: plain(True))
        print(f"  {kernel}: plain forward {n / base:,.0f} tokens/s")
        print(f"    moments / forward without LM head   {tapped:.3f}")
        print(f"    moments and rows / the same         {rows:.3f}")
        print(f"    moments / forward with LM head      {whole:.3f}")
        found |= {f"{kernel}_moments": tapped, f"{kernel}_moments_and_rows": rows, f"{kernel}_moments_vs_full": whole}
    lens.model.set_experts_implementation("grouped_mm")
    return found


def wide_model() -> Lens:
    """2 layers, H 512, 64 experts, top-8, d_ff 256, random weights, with the bundled tokenizer."""
    tiny = ml.load("bundled:tiny-moe")
    config = OlmoeConfig(
        vocab_size=len(tiny.tokenizer), hidden_size=512, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=8, num_experts=64, num_experts_per_tok=8, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    return Lens(OlmoeForCausalLM(config).eval(), tiny.tokenizer, name="random-olmoe")


def probing_cost(lens: Lens, tokenized, n_cells: int = 8) -> dict[str, float]:
    """Batched fits against one saga ``LogisticRegression`` per (cell, concept, k) on the same rows."""
    settings = ProbeSettings()
    scopes = scope_numbers(tokenized)
    tokens, moments = TokenTable(), ClassMoments(scopes)
    rows = RowStore(tokens, scopes)
    stream(lens, batches(tokenized, split=Split.SELECT), [tokens, moments, rows], progress=False)
    ours = reference = 0.0
    differences, failed, n_fits = [], 0, 0
    for layer in moments.layers[: max(1, n_cells // 2)]:
        fitter = LayerFitter(layer, moments.moments(layer), tokens, settings)
        for expert in range(n_cells // max(1, len(moments.layers[: max(1, n_cells // 2)]))):
            mine = rows.rows(layer, expert)
            probes: list = []
            ours += seconds(lambda: probes.extend(fitter.fit(expert, mine, range(len(scopes)), settings.k)))  # noqa: B023
            drawn = draw_rows(mine, tokens, settings.max_rows)
            for probe in (p for p in probes if p.fitted):
                used = drawn.used[:, probe.concept].numpy()
                x = drawn.activation.numpy()[used][:, probe.neurons].astype(np.float64)
                y = drawn.positive[:, probe.concept].numpy()[used]
                sd = x.std(0)
                z = (x - x.mean(0)) / np.where(sd > 0, sd, 1)
                model = LogisticRegression(solver="saga", max_iter=500, class_weight="balanced", random_state=0)
                reference += seconds(lambda: model.fit(z, y))  # noqa: B023
                n_fits += 1
                if model.n_iter_[0] >= 500:
                    failed += 1
                else:
                    mine_f1 = f1_score(y, x @ probe.coef + probe.intercept >= 0, zero_division=0)
                    differences.append(abs(mine_f1 - f1_score(y, model.predict(z), zero_division=0)))
    mean = float(np.mean(differences)) if differences else float("nan")
    passes = 2 * len(tokenized.concepts)
    print(f"probing: {n_fits} fits of {n_cells} cells, k {settings.k}")
    print(f"  fits, saga one by one / batched Newton   {reference / ours:.1f}x")
    print(f"  |F1 difference| where saga converged     {mean:.4f} (saga stopped at 500 steps in {failed})")
    print(f"  forward passes, two per concept / one    {passes}x")
    return {"fit_ratio": reference / ours, "f1_difference": mean, "saga_failed": failed, "passes_saved": passes}


def start_up() -> dict[str, float]:
    """Seconds of ``import moe_lens`` and ``moe-lens --help``, the fastest of five whole processes."""
    found = {}
    for name, command in {
        "import": [sys.executable, "-c", "import moe_lens"],
        "help": [sys.executable, "-m", "moe_lens", "--help"],
        "python": [sys.executable, "-c", "pass"],
    }.items():
        found[name] = min(seconds(lambda: subprocess.run(command, check=True, capture_output=True)) for _ in range(5))  # noqa: B023
        print(f"start-up: {name:7s} {found[name]:.2f} s")
    return found


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ConvergenceWarning)  # counted and printed instead
    lens, corpus = ml.load("bundled:tiny-moe"), ml.corpus("bundled:")
    tokenized = tokenize(corpus, lens.tokenizer, concepts_for(corpus, None), limit_tokens=60_000)
    results = {"start_up": start_up(), "bundled": capture_cost(lens, tokenized, "bundled:tiny-moe")}
    fifty_eight = tokenize(corpus, lens.tokenizer, concepts_for(corpus, None)[:58], limit_tokens=60_000)
    results["wide"] = capture_cost(wide_model(), fifty_eight, "2-layer OLMoE, H 512, 64 experts, top-8, d_ff 256")
    results["probing"] = probing_cost(lens, tokenized)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
