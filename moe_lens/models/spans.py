"""Characters with roles to tokens with roles, for a conversation and for what the model replied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from moe_lens.errors import BadCorpus, UnsupportedModel
from moe_lens.models.chat import Delimiters, Mark, SpanRole, split_thinking


@dataclass(frozen=True)
class Span:
    """Consecutive tokens with one role. Token and character positions are half-open."""

    role: SpanRole | None
    start: int
    stop: int
    char_start: int
    char_stop: int
    generated: bool
    message: int | None
    """Number of the message; None for the template and for a generated reply."""


def encode(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a rendered conversation, and the characters of each.

    Blanks that a tokenizer leaves out of its offsets belong to the token after them.

    Raises:
        UnsupportedModel: the tokenizer reports no character offsets.
        BadCorpus: the text has characters that no tokenizer reads.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UnsupportedModel(
            f"{type(tokenizer).__name__} reports no character offsets, which the roles of tokens need: "
            "use the model's fast tokenizer (a tokenizer.json beside the weights)"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadCorpus(f"the messages hold a lone surrogate ({text[error.start]!r}): remove it") from None
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    reached, extents = 0, []
    for start, stop in coded["offset_mapping"]:
        extents.append((min(start, reached), stop))
        reached = max(reached, stop)
    return list(coded["input_ids"]), extents


def decode_reply(tokenizer: Any, prompt: Sequence[int], reply: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """Text of generated tokens, and the characters of each; tokens that share a character all have it."""
    from tokenizers.decoders import DecodeStream

    def stream_after(ids: Sequence[int]) -> DecodeStream:
        fresh = DecodeStream(skip_special_tokens=False)
        for token in ids:
            fresh.step(tokenizer.backend_tokenizer, token)
        return fresh

    stream = stream_after(prompt[-8:])  # some decoders strip the blank of a first token
    text, waiting, extents = "", 0, []
    for n, token in enumerate(reply):
        waiting += 1
        try:
            chunk = stream.step(tokenizer.backend_tokenizer, token)
        except Exception:  # the stream gives up on some byte sequences; tokenizers has no type for it
            stream, chunk = stream_after([]), tokenizer.decode(reply[n + 1 - waiting : n + 1])
        if chunk:
            extents += [(len(text), len(text) + len(chunk))] * waiting
            text, waiting = text + chunk, 0
    if waiting:  # cut off inside a character
        extents += [(len(text), len(text) + 1)] * waiting
        text += "\ufffd"
    return text, extents


def mark_reply(tokenizer: Any, text: str, *, offset: int, inside: Delimiters | None) -> list[Mark]:
    """Who says what in a generated reply that starts at character `offset`."""
    specials = [word for word in tokenizer.all_special_tokens if word != tokenizer.unk_token]
    parts = split_thinking(text, reply=True, inside=inside, specials=specials)
    return [Mark(role, offset + a, offset + b, None, generated=True) for role, a, b in parts]


def spans_of(marks: Sequence[Mark], extents: Sequence[tuple[int, int]], *, n_prompt: int) -> tuple[Span, ...]:
    """Runs of tokens with one role, from first to last token without a gap.

    A token that covers the end of the template and the start of a content belongs to the content; one that covers
    two contents belongs to the first. Tokens from `n_prompt` on were generated.
    """
    owners: list[tuple[Mark | None, bool]] = []
    passed = 0
    for position, (start, stop) in enumerate(extents):
        while passed < len(marks) and marks[passed].stop <= start:
            passed += 1
        over = []
        while (at := passed + len(over)) < len(marks) and marks[at].start < stop:
            over.append(marks[at])
        first = next((mark for mark in over if mark.role is not None), over[0] if over else None)
        owners.append((first, position >= n_prompt))
    spans = []
    start = 0
    for (mark, generated), run in groupby(owners):
        stop = start + len(list(run))
        chars = (mark.start, mark.stop) if mark else (extents[start][0], extents[stop - 1][1])
        role = mark.role if mark else "template"
        spans.append(Span(role, start, stop, *chars, generated, mark.message if mark else None))
        start = stop
    return tuple(spans)
