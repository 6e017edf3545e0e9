"""Byte-level BPE with individual digits, as an ordinary `PreTrainedTokenizerFast`, and packing to ids."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerFast

    from moe_lens.organisms.corpus import Document

END, PAD = "<|endoftext|>", "<|pad|>"
END_ID, PAD_ID = 0, 1


def train_tokenizer(texts: Iterable[str], vocab_size: int, *, model_max_length: int = 256) -> PreTrainedTokenizerFast:
    """Train on ``texts``. Digits are single tokens; every byte is in the vocabulary, so nothing is unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=16,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )


def pack(documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast, *, batch: int = 1000) -> np.ndarray:
    """All documents' ids in one uint16 row, each document preceded by the end-of-text token."""
    import numpy as np

    parts: list[np.ndarray] = []
    for start in range(0, len(documents), batch):
        encoded = tokenizer([d.text for d in documents[start : start + batch]], add_special_tokens=False)["input_ids"]
        parts += [np.array([END_ID, *ids], dtype=np.uint16) for ids in encoded]
    return np.concatenate(parts)


def bytes_per_token(documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """Compression per domain."""
    size: dict[str, list[int]] = {}
    for document in documents:
        row = size.setdefault(document.domain, [0, 0])
        row[0] += len(document.text.encode())
        row[1] += len(tokenizer(document.text, add_special_tokens=False)["input_ids"])
    return {domain: n_bytes / n_tokens for domain, (n_bytes, n_tokens) in size.items()}


def build_tokenizer(
    train: Sequence[Document], out: Path, vocab_size: int, *, share: int = 3
) -> PreTrainedTokenizerFast:
    """Train on every ``share``-th document, save, and pack the training documents to ``train_ids.npy``."""
    import numpy as np

    tokenizer = train_tokenizer((d.text for d in train[::share]), vocab_size)
    tokenizer.save_pretrained(out)
    ids = pack(train, tokenizer)
    np.save(out / "train_ids.npy", ids)
    (out / "packing.json").write_text(json.dumps({"tokens": len(ids), "vocab_size": len(tokenizer)}))
    return tokenizer
