"""Everything the model card reports, computed: compression, load, information, ablation. At most a few minutes.

- bits per byte of both models on held-out files, overall and per domain, with an interval of their difference
  from resampled documents;
- load per expert and layer on the probe set, and the domains each expert is over-used by;
- mutual information of domain and expert, and given the token, with shuffled nulls (`information`);
- the experts that one domain needs, chosen and measured on different documents (`ablation`).
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_lens.organisms.corpus import Document, read_jsonl
from moe_lens.organisms.tokenizer import END, PAD, PAD_ID

if TYPE_CHECKING:
    from transformers import OlmoeForCausalLM, PreTrainedTokenizerFast

log = logging.getLogger(__name__)

MODELS = {"moe": "tiny-moe", "dense": "tiny-dense"}
EVAL_WINDOWS = 1
"""Most windows read of one held-out document."""
BATCH = 16
DEAD_LOAD = 0.02
"""An expert with less than this multiple of the uniform share of routed pairs is called dead."""


def document_nats(
    model: OlmoeForCausalLM,
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerFast,
    *,
    per_document: int = EVAL_WINDOWS,
) -> tuple[np.ndarray, np.ndarray]:
    """Summed nats and bytes of every document's first windows."""
    import torch

    from moe_lens.organisms.forward import per_document as by_document
    from moe_lens.organisms.forward import windows

    data = windows(documents, tokenizer, model.config.max_position_embeddings, per_document=per_document)
    nats = []
    with torch.no_grad():
        for ids in data.ids.split(BATCH):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(
                logits.reshape(-1, logits.shape[-1]),
                ids[:, 1:].reshape(-1),
                reduction="none",
                ignore_index=PAD_ID,
            )
            nats.append(loss.view(ids.shape[0], -1).sum(1))
    # a byte-level token is spelled with one character per byte
    spelled = tokenizer.convert_ids_to_tokens(list(range(model.config.vocab_size)))
    width = torch.tensor([0 if token in (END, PAD) else len(token) for token in spelled])
    read = width[data.ids].sum(1).numpy()
    total = len(documents)
    return by_document(torch.cat(nats).numpy(), data.document, total), by_document(read, data.document, total)


def bits_per_byte(
    nats: dict[str, np.ndarray], size: np.ndarray, domains: np.ndarray, *, seed: int = 0, times: int = 1000
) -> dict[str, Any]:
    """Overall and per-domain bits per byte of each model; the MoE's advantage with its interval."""

    def rate(values: np.ndarray, index: np.ndarray | slice = slice(None)) -> float:
        return float(values[index].sum() / math.log(2) / size[index].sum())

    rng = np.random.default_rng(seed)
    draws = [rng.integers(0, len(size), len(size)) for _ in range(times)]
    gaps = [rate(nats["dense"], draw) - rate(nats["moe"], draw) for draw in draws]
    low, high = np.percentile(gaps, [2.5, 97.5])
    return {
        "documents": len(size),
        "bytes": int(size.sum()),
        "overall": {role: rate(values) for role, values in nats.items()},
        "dense_minus_moe": {
            "estimate": rate(nats["dense"]) - rate(nats["moe"]),
            "low": float(low),
            "high": float(high),
        },
        "by_domain": {
            str(domain): {role: rate(values, domains == domain) for role, values in nats.items()}
            | {"documents": int((domains == domain).sum())}
            for domain in np.unique(domains)
        },
    }


def routing_report(
    model: OlmoeForCausalLM, documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast
) -> dict[str, Any]:
    """Load, over-used domains and information of every layer, on the first window of every document."""
    from moe_lens.organisms.forward import LayeredForward, windows
    from moe_lens.organisms.information import entropy, information

    data = windows(documents, tokenizer, model.config.max_position_embeddings, per_document=1)
    forward = LayeredForward(model, data, batch=BATCH, keep_hidden=False)
    names = sorted({d.domain for d in documents})
    domain = np.array([names.index(d.domain) for d in documents])
    real = data.real.numpy().reshape(-1)
    tokens = data.ids.numpy().reshape(-1)[real]
    owner = np.repeat(data.document, data.ids.shape[1])[real]
    n_experts, n_tokens = model.config.num_experts, model.config.vocab_size
    loads, info, top = [], [], []
    for layer in range(forward.n_layers):
        experts = forward.routing(layer)[real]
        counts = np.zeros((len(names), n_experts))
        for column in experts.T:
            np.add.at(counts, (domain[owner], column), 1)
        share = counts.sum(0) / counts.sum()
        lift = counts / counts.sum(1, keepdims=True) / np.maximum(share, 1e-12)
        loads.append((share * n_experts).tolist())
        info.append(
            information(layer, experts, tokens, owner, domain, n_experts=n_experts, n_tokens=n_tokens).to_dict()
        )
        for expert in range(n_experts):
            best = np.argsort(-lift[:, expert])[:3]
            # a token visits top_k experts, so the share of a domain's tokens is top_k times its share of pairs
            row = [
                {
                    "domain": names[d],
                    "lift": float(lift[d, expert]),
                    "tokens": float(counts[d, expert] / counts[d].sum() * experts.shape[1]),
                }
                for d in best
            ]
            top.append({"layer": layer, "expert": expert, "load": loads[-1][expert], "domains": row})
    return {
        "documents": len(documents),
        "tokens": int(real.sum()),
        "domain_entropy": entropy(np.bincount(domain[owner])),
        "load": loads,
        "load_min": float(np.min(loads)),
        "load_max": float(np.max(loads)),
        "dead_experts": int((np.array(loads) < DEAD_LOAD).sum()),
        "dead_threshold": DEAD_LOAD,
        "information": info,
        "experts": top,
    }


def training_report(work: Path, role: str) -> dict[str, Any]:
    """What the training log says, and its curve."""
    rows = [json.loads(line) for line in (work / "runs" / role / "log.jsonl").read_text().splitlines()]
    last = rows[-1]
    keep = ("tokens", "train", "held_out", "rate", "balance", "load_min", "load_max")
    return {
        "tokens": last["tokens"],
        "steps": last["step"],
        "seconds": last["seconds"],
        "tokens_per_second": last["tokens"] / last["seconds"],
        "final": last,
        "curve": [{key: row[key] for key in keep if key in row} for row in rows],
    }


def evaluate_pair(out: Path, work: Path, *, threads: int = 1) -> dict[str, Any]:
    """The card as plain numbers."""
    import torch
    import transformers
    from transformers import AutoTokenizer

    from moe_lens.organisms.ablation import FACTOR, MIN_RISE, AblationConfig, domain_experts
    from moe_lens.organisms.forward import load

    started = time.monotonic()
    torch.set_num_threads(threads)
    models = {role: load(out / name) for role, name in MODELS.items()}
    tokenizer = AutoTokenizer.from_pretrained(out / MODELS["moe"])
    held_out, probe = read_jsonl(work / "corpus/eval.jsonl"), read_jsonl(work / "corpus/probe.jsonl")
    nats = {}
    for role, model in models.items():
        nats[role], size = document_nats(model, held_out, tokenizer)
    log.info("bits per byte done after %.0f s", time.monotonic() - started)
    moe = models["moe"]
    routing = routing_report(moe, probe, tokenizer)
    log.info("routing done after %.0f s", time.monotonic() - started)
    config = AblationConfig()
    ablation = domain_experts(moe, probe, tokenizer, config)
    log.info("ablation done after %.0f s", time.monotonic() - started)
    keys = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "num_experts",
        "num_experts_per_tok",
        "intermediate_size",
        "max_position_embeddings",
    )
    return {
        "schema": 1,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "models": {
            role: {key: getattr(model.config, key) for key in keys}
            | {
                "parameters": sum(p.numel() for p in model.parameters()),
                "active_ffn_width": model.config.num_experts_per_tok * model.config.intermediate_size,
            }
            for role, model in models.items()
        },
        "training": {role: training_report(work, role) for role in models},
        "corpus": {
            side: {
                "documents": len(documents),
                "bytes": sum(len(d.text.encode()) for d in documents),
                "domains": len({d.domain for d in documents}),
                "files": len({(d.source, d.file) for d in documents}),
            }
            for side, documents in (
                ("train", read_jsonl(work / "corpus/train.jsonl")),
                ("eval", held_out),
                ("probe", probe),
            )
        },
        "bits_per_byte": bits_per_byte(nats, size, np.array([d.domain for d in held_out])),
        "routing": routing,
        "ablation": {
            "factor": FACTOR,
            "min_rise": MIN_RISE,
            "length": config.length,
            "bootstrap": config.bootstrap,
            "domains": [row.to_dict() for row in ablation],
        },
        "seconds": time.monotonic() - started,
    }
