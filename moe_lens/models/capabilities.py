"""What a checkpoint offers: its family's quirks, where it lives, and which uses of it work."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from moe_lens.models import checks, evidence, reruns
from moe_lens.models.evidence import Evidence
from moe_lens.types import Role

if TYPE_CHECKING:
    from moe_lens.models.lens import Lens

GRADIENT_TOKENS = 16
NOT_FINITE = "not tried: needs finite numbers"


def capabilities(found: Evidence, free_bytes: int) -> dict[str, str]:
    """The table, in words."""
    lens, model = found.lens, found.lens.model
    devices = getattr(model, "hf_device_map", None)
    places = Counter(str(place) for place in devices.values()) if devices else None
    settings = "/".join(sorted({str(name) for name in found.state[0].implementation.values()}))
    dtypes = Counter(str(p.dtype).removeprefix("torch.") for p in model.parameters())
    return {
        "family": f"{lens.spec.architecture} ({lens.spec.model_type})",
        "layers": _layers(lens),
        "experts": _experts(found),
        "gate": str(checks.gate_rule(*found.moe[0]) or "of no known form") if found.is_finite else NOT_FINITE,
        "choice": checks.explain(*found.moe[0], lens.model.config)[0] if found.is_finite else NOT_FINITE,
        "parameters": f"{lens.spec.total_parameters:,}, {lens.spec.active_parameters:,} active per token",
        "dtype": ", ".join(f"{dtype} ({n} tensors)" if len(dtypes) > 1 else dtype for dtype, n in dtypes.items()),
        "quantisation": lens.spec.quantisation or "none",
        "devices": ", ".join(f"{place}: {n} modules" for place, n in places.items()) if places else str(lens.device),
        "offload": "yes: some weights are moved in for each pass" if found.offloaded else "no",
        "implementation": f"{settings}; taps follow {found.kernel}",
        "gradients": _gradients(found, free_bytes),
        "generation": _generation(found),
        "chat template": "yes" if getattr(lens.tokenizer, "chat_template", None) else "no",
        "context": "unknown" if lens.spec.max_positions is None else f"{lens.spec.max_positions:,} tokens",
    }


def _layers(lens: Lens) -> str:
    spec = lens.spec
    shared = sum(entry.shared_d_ff is not None for entry in spec.layers)
    without = spec.n_layers - len(spec.layers)
    counts = {"MoE": len(spec.moe_layers), "dense": len(spec.dense_layers), "without a feed-forward part": without}
    text = ", ".join(f"{n} {kind}" for kind, n in counts.items() if n)
    return text + (f"; a shared expert in {shared}" if shared else "; no shared expert")


def _experts(found: Evidence) -> str:
    witness, tap = found.moe[0]
    module: Any = witness.site.module
    flags = {
        "gated": bool(getattr(module, "has_gate", True)),
        "biases": bool(getattr(module, "has_bias", False)),
        "transposed weights": bool(getattr(module, "is_transposed", False)),
        "interleaved gate and up": not getattr(module, "is_concatenated", True),
        "norm after each expert": bool(getattr(module, "has_post_expert_norm", False)),
    }
    words = [name if on else f"no {name}" for name, on in flags.items() if on or name in ("gated", "biases")]
    words[0] = "gated" if flags["gated"] else "not gated"
    return f"{tap.n_experts}, top-{witness.site.top_k}, {tap.d_ff} neurons each; {', '.join(words)}"


def _gradients(found: Evidence, free_bytes: int) -> str:
    """Run one backward pass through taps to the experts of the first MoE layer."""
    lens, site = found.lens, next(site for site in found.lens.sites if site.role is Role.MOE)
    weight: Any = max(site.module.parameters(), key=lambda parameter: parameter.numel())
    if found.offloaded:
        return "no: weights are offloaded"
    if (why := reruns.no_time(found)) is not None:
        return f"not tried: {why}"
    if 2 * weight.numel() * weight.element_size() > free_bytes:
        return "not tried: no memory for the gradient of one layer's experts"
    wanted = [(p, p.requires_grad, p.grad) for p in lens.model.parameters()]
    try:
        for parameter, _, _ in wanted:
            parameter.requires_grad_(parameter is weight)
        ids = found.ids[:, :GRADIENT_TOKENS]
        with torch.enable_grad(), lens.tapping(lambda _tap: None):
            lens.model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss.backward()
        gradient = weight.grad
        if gradient is None or not bool(gradient.isfinite().all()):
            return "no: the gradient of an expert's weights is missing or not finite"
        return "yes" if bool(gradient.any()) else "no: the gradient of the experts' weights is zero"
    except Exception as error:  # a kernel without a backward pass
        return f"no: {(str(error).splitlines() or [type(error).__name__])[0]}"
    finally:
        for parameter, required, gradient in wanted:
            parameter.requires_grad_(required)
            parameter.grad = gradient


def _generation(found: Evidence) -> str:
    """Two tokens with a key-value cache, against the greedy tokens of whole passes."""
    if not found.is_finite:
        return NOT_FINITE
    model, prompt = found.lens.model, found.ids[:, :8]
    try:
        with torch.no_grad():
            out = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=2, min_new_tokens=2, do_sample=False,
                use_cache=True, pad_token_id=getattr(found.lens.tokenizer, "pad_token_id", None),
            )  # fmt: skip
    except Exception as error:
        return f"no: {(str(error).splitlines() or [type(error).__name__])[0]}"
    whole = evidence.native(found.lens, out[:, :-1], found.kernel)
    return "yes, with a cache" if int(whole[0, -1].argmax()) == int(out[0, -1]) else "yes; the cache changes a near tie"
