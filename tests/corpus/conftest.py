"""A tiny byte-level BPE tokenizer and corpora that tests write by hand."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TRAINING = [
    "def add(a, b):\n    return a + b  # sum of a and b\n",
    "The cat sat on the mat. The dog did not. Nine, 10 and 2024.",
    "Größe über alles, naïve café; straße.",
    "\\begin{equation} x^2 + y_1 = 3 \\end{equation}",
] * 4


def byte_level(*, trim_offsets: bool = False, bos_template: bool = False, vocab: int = 340):
    """A fast tokenizer; Cyrillic, Chinese and emoji are not in its training text, so they split into bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<bos>", "<eos>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    model.train_from_iterator(TRAINING, trainer)
    byte_offsets = processors.ByteLevel(trim_offsets=trim_offsets)
    if bos_template:
        bos = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
        model.post_processor = processors.Sequence([byte_offsets, bos])
    else:
        model.post_processor = byte_offsets
    return PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", model_max_length=32
    )


@pytest.fixture(scope="session")
def make_tokenizer():
    return byte_level


@pytest.fixture(scope="session")
def tokenizer():
    return byte_level()


@pytest.fixture(scope="session")
def bos_tokenizer():
    return byte_level(bos_template=True)
