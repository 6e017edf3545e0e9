"""What capture costs on top of plain forward passes of the same batches."""

from __future__ import annotations

from typing import Any

import torch
from timing import ROUNDS, ratio, show
from transformers import OlmoeConfig, OlmoeForCausalLM

import moe_lens as ml
from moe_lens.capture.exemplars import TopExemplars
from moe_lens.capture.moments import ClassMoments
from moe_lens.capture.rows import RowStore
from moe_lens.capture.stream import stream
from moe_lens.capture.tokens import TokenTable
from moe_lens.corpus.batches import Tokenized, batches, tokenize
from moe_lens.models.lens import Lens
from moe_lens.probing.scan import scope_numbers
from moe_lens.types import Split


def capture_cost(lens: Lens, tokenized: Tokenized, title: str) -> dict[str, float]:
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
        print(f"    moments / forward with LM head      {whole:.3f}", flush=True)
        found |= {f"{kernel}_moments": tapped, f"{kernel}_moments_and_rows": rows, f"{kernel}_moments_vs_full": whole}
    lens.model.set_experts_implementation("grouped_mm")
    return found


def exemplar_cost(lens: Lens, title: str, *, n_batches: int, rounds: int = ROUNDS) -> float:
    """Streamed exemplars of all layers, from an empty start, against the same forward passes without LM head."""
    tokenized = tokenize(ml.corpus("bundled:"), lens.tokenizer, [], limit_tokens=60_000)
    loader = list(batches(tokenized, split=None, tokens_per_batch=4096))[:n_batches]

    def plain() -> None:
        with torch.no_grad():
            for batch in loader:
                lens.model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)

    def collected() -> None:
        stream(lens, loader, [TopExemplars(tokenized.splits)], progress=False)

    found, base = ratio(collected, plain, rounds)
    n = sum(int(batch.attention_mask.sum()) for batch in loader)
    show(f"exemplars, {title}", [(f"stream / forward, {n} tokens at {n / base:,.0f} a second", f"{found:.3f}", "1.15")])
    return found


def wide_model() -> Lens:
    """2 layers, H 512, 64 experts, top-8, d_ff 256."""
    return _random_olmoe(hidden_size=512, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8)


def true_width_layer() -> Lens:
    """One layer of OLMoE-1B-7B: H 2048, 64 experts, top-8, d_ff 1024, bfloat16."""
    return _random_olmoe(
        hidden_size=2048, intermediate_size=1024, num_hidden_layers=1, num_attention_heads=16, dtype=torch.bfloat16
    )


def _random_olmoe(*, dtype: torch.dtype = torch.float32, num_attention_heads: int, **size: Any) -> Lens:
    """Random weights, with the bundled tokenizer."""
    tokenizer = ml.load("bundled:tiny-moe").tokenizer
    config = OlmoeConfig(
        vocab_size=len(tokenizer), num_attention_heads=num_attention_heads, num_key_value_heads=num_attention_heads,
        num_experts=64, num_experts_per_tok=8, pad_token_id=1, **size,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = OlmoeForCausalLM(config)
    return Lens(model.to(dtype).eval(), tokenizer, name="random-olmoe")
