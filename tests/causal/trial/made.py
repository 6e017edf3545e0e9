"""A checkpoint whose experts do what we know, and a text for it.

=======  ==========  ===========================================  ==========================================
tokens   visit       what the expert does there                   so the label
=======  ==========  ===========================================  ==========================================
digits   L0.E3       writes "!", which follows every digit        ``[0-9]`` is true
capitals L0.E4       writes nothing                               ``[A-Z]`` only describes routing
``#``    L0.E2       writes "!", which follows; in few documents  ``#`` has too little to show
blanks   L0.E5       writes nothing                               ``[aeiou]`` is false
=======  ==========  ===========================================  ==========================================

E0 and E1 are chosen beside them and write nothing. What E3 writes is the same for every digit, and nothing for other
tokens.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers

from moe_lens.corpus.text import Corpus, Document
from moe_lens.models.lens import Lens
from tests.models import tiny

HUGE = 1e8
DIGIT, CAPITAL, HASH, BLANK, OTHER, ONE = range(6)
BANG = 8
"""Dimensions of the residual stream: kinds of tokens, always 1, and the logit of "!"."""
KINDS = {DIGIT: "0123456789", CAPITAL: "ABCDEFGHIJ", HASH: "#", BLANK: " ", OTHER: "abcdefghij!"}
SERVES = {DIGIT: (3, 0), CAPITAL: (4, 1), HASH: (2, 1), BLANK: (5, 0), OTHER: (0, 1)}
"""Experts that each kind of token visits."""
LABELS = pd.DataFrame(
    [
        (0, 3, "digits", "[0-9]"),
        (0, 4, "capital letters", "[A-Z]"),
        (0, 2, "the hash sign", "#"),
        (0, 5, "vowels", "[aeiou]"),
    ],
    columns=["layer", "expert", "label", "rule"],
)


def made(
    *, top_k: int = 2, gates: tuple[float, float] = (2.0, 2.0), also: int | None = None, backup: bool = False
) -> Lens:
    """The model.

    Args:
        gates: router logits of a kind's own expert and of the one beside it.
        also: a kind of tokens that visits E3 too, where it writes nothing.
        backup: E1 does the same as E3 and is the next in line at digits.
    """
    config = transformers.OlmoeConfig(
        vocab_size=tiny.VOCAB, hidden_size=16, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, num_experts=6, num_experts_per_tok=top_k, norm_topk_prob=True, rms_norm_eps=HUGE,
        max_position_embeddings=64, pad_token_id=256, bos_token_id=257, eos_token_id=258, tie_word_embeddings=False,
    )  # fmt: skip
    model: Any = transformers.OlmoeForCausalLM(config).eval()
    vocabulary = tiny.tokenizer().get_vocab()
    layer = model.model.layers[0]
    router, experts = layer.mlp.gate.weight, layer.mlp.experts
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for norm in (layer.post_attention_layernorm, model.model.norm):
            norm.weight.fill_(math.sqrt(HUGE))
        embedding = model.model.embed_tokens.weight
        embedding[:, ONE] = 1
        for kind, characters in KINDS.items():
            rows = [vocabulary[{" ": "Ġ"}.get(c, c)] for c in characters]
            embedding[rows, kind] = 1
            own, beside = (3, 0) if kind == also else SERVES[kind]
            router[own, kind], router[beside, kind] = gates
        for expert, kind in ((3, DIGIT), (2, HASH)):
            experts.gate_up_proj[expert, 0, kind] = 4  # fires for its kind alone
            experts.gate_up_proj[expert, 4, ONE] = 1
            experts.down_proj[expert, BANG, 0] = 2
        if backup:
            router[1, DIGIT] = gates[0] - 1e-3
            for weight in (experts.gate_up_proj, experts.down_proj):
                weight[1] = weight[3]
        model.lm_head.weight[vocabulary["!"], BANG] = 1
    return Lens(model, tiny.tokenizer(), name="made")


def text(n_documents: int = 400, *, n_signs: int = 24, seed: int = 0) -> Corpus:
    """Letters, blanks and digits in any order; "!" after every digit and "#"; one document in 12 has "#"."""
    rng = np.random.default_rng(seed)
    plain = list("abcdefghij" + "ABCDEFGHIJ" + "      " + "01234567")
    documents = []
    for number in range(n_documents):
        signs = rng.choice(plain, n_signs).tolist()
        if number % 12 == 0 and n_signs > 8:
            signs[5:8] = "#", "a", "#"
        body = "".join(sign + "!" if sign.isdigit() or sign == "#" else sign for sign in signs)
        documents.append(Document(f"d{number}", f"a{body}b", {"domain": ["x", "y"][number % 2]}))
    return Corpus.of(documents, id=f"made-{seed}")
