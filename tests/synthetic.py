"""Hand-made batches and taps, so that consumers are tested without a model."""

from __future__ import annotations

import torch

from moe_lens.types import ExpertTap, Role, TokenBatch


def make_batch(
    labels: torch.Tensor, *, documents: list[int], eligible: torch.Tensor | None = None, first_char: int = 0
) -> TokenBatch:
    """A batch from (window, seq, concept) label bits; token i of a window covers characters 3i to 3i + 3."""
    windows, seq, concepts = labels.shape
    start = (torch.arange(seq) * 3 + first_char).expand(windows, seq)
    return TokenBatch(
        input_ids=torch.arange(windows * seq).view(windows, seq) % 50,
        attention_mask=torch.ones(windows, seq, dtype=torch.long),
        document=torch.tensor(documents),
        char_start=start,
        char_end=start + 3,
        eligible=torch.ones(windows, seq, dtype=torch.bool) if eligible is None else eligible,
        labels=labels.bool(),
        in_scope=torch.ones(windows, concepts, dtype=torch.bool),
    )


def make_tap(
    batch: TokenBatch,
    experts: torch.Tensor,
    activation: torch.Tensor,
    *,
    n_experts: int,
    layer: int = 0,
    weights: torch.Tensor | None = None,
    output: torch.Tensor | None = None,
    router_logits: torch.Tensor | None = None,
    role: Role = Role.MOE,
) -> ExpertTap:
    """A tap from (token, slot) expert choices and (token, slot, d_ff) activations."""
    n_tokens, top_k = experts.shape
    expert, order = experts.reshape(-1).sort(stable=True)
    weight = torch.full((n_tokens, top_k), 1 / top_k) if weights is None else weights
    h = activation.reshape(n_tokens * top_k, -1)[order]
    out = h if output is None else output.reshape(n_tokens * top_k, -1)[order]
    counts = torch.bincount(expert, minlength=n_experts)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
    return ExpertTap(
        layer=layer, role=role, token=order // top_k, slot=order % top_k, weight=weight.reshape(-1)[order],
        offsets=offsets, activation=h, router_logits=router_logits, n_tokens=n_tokens, make_output=lambda: out,
    )  # fmt: skip


def random_stream(
    *, n_batches: int = 3, windows: int = 4, seq: int = 20, n_experts: int = 4, top_k: int = 2, d_ff: int = 6,
    concepts: int = 3, layers: int = 1, seed: int = 0, mean: float = 0.0,
) -> list[tuple[TokenBatch, list[ExpertTap]]]:  # fmt: skip
    """Random batches with their taps; documents are numbered through, one per window."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for b in range(n_batches):
        labels = torch.rand(windows, seq, concepts, generator=g) < 0.3
        batch = make_batch(labels, documents=list(range(b * windows, (b + 1) * windows)))
        taps = []
        for layer in range(layers):
            logits = torch.randn(windows * seq, n_experts, generator=g)
            experts = logits.topk(top_k).indices
            h = torch.randn(windows * seq, top_k, d_ff, generator=g) + mean
            taps.append(make_tap(batch, experts, h, n_experts=n_experts, layer=layer, router_logits=logits))
        out.append((batch, taps))
    return out


def feed(consumers: list, stream: list) -> None:
    """Give every batch and tap to every consumer, as ``capture.stream`` does."""
    for batch, taps in stream:
        for consumer in consumers:
            consumer.start_batch(batch)
        for tap in taps:
            for consumer in consumers:
                if tap.role in consumer.roles:
                    consumer.update(tap, batch)
