"""Tiny random models of many families, built from config classes and saved as a user's checkpoint would be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

VOCAB = 260
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 256, "bos_token_id": 257,
    "eos_token_id": 258, "tie_word_embeddings": False,
}  # fmt: skip

MOE: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe": ("Olmoe", {"intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2}),
    "mixtral": ("Mixtral", {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2Moe", {
        "intermediate_size": 40, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 20,
        "num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": False,
    }),
    "qwen3_moe": ("Qwen3Moe", {
        "intermediate_size": 40, "moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 3,
        "norm_topk_prob": True, "head_dim": 16, "mlp_only_layers": [0], "decoder_sparse_step": 1,
    }),
}  # fmt: skip
"""family -> (transformers class prefix, config keys): the four that get the full battery."""

DENSE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"intermediate_size": 48}),
    "olmo": ("Olmo", {"intermediate_size": 48}),
    "olmo2": ("Olmo2", {"intermediate_size": 48}),
    "qwen2": ("Qwen2", {"intermediate_size": 48}),
    "qwen3": ("Qwen3", {"intermediate_size": 48, "head_dim": 16}),
    "mistral": ("Mistral", {"intermediate_size": 48}),
    "gpt_neox": ("GPTNeoX", {"intermediate_size": 48}),
    "gpt2": ("GPT2", {"n_inner": 48}),
    "phi": ("Phi", {"intermediate_size": 48}),
    "phi3": ("Phi3", {"intermediate_size": 48}),
    "gemma2": ("Gemma2", {"intermediate_size": 48, "head_dim": 16}),
    "opt": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
}


def build(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A random model of `family` with lively routers (default initialisation routes almost uniformly)."""
    prefix, keys = {**MOE, **DENSE}[family]
    config = getattr(transformers, f"{prefix}Config")(**{**COMMON, **keys, **changes})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    enliven(model)
    return model.to(dtype).eval()


def enliven(model: torch.nn.Module) -> None:
    """Redraw the parameters so that experts differ, routers have opinions and norms are not ones."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(0, 0.1)
            else:
                parameter.normal_(0, 0.15)


def tokenizer() -> Any:
    """A byte-level tokenizer of 256 bytes and four special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: i for i, character in enumerate(alphabet)}
    core = Tokenizer(BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<pad>", "<s>", "</s>", "<unk>"])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def save(model: Any, folder: Path) -> Path:
    """Write `model` and a tokenizer as a checkpoint folder."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))
