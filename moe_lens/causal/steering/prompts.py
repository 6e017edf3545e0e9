"""Prompts: texts or conversations, given or read from a file, as token ids."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_lens.errors import BadConfig, BadCorpus, OutOfRange
from moe_lens.models import chat
from moe_lens.models.spans import encode

if TYPE_CHECKING:
    from moe_lens.models.spec import Spec

Messages = Sequence[Mapping[str, Any]]
Given = str | Messages
"""One prompt: a text, or messages (dicts with role and content)."""
TEXT_KEYS = ("prompt", "text", "messages", "conversations")
"""Keys of a JSON line that may hold its prompt, the first that is there."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it."""

    text: str
    """Of a conversation: what the chat template makes of it."""
    ids: tuple[int, ...]


def as_prompts(given: Given | Sequence[Given]) -> list[Given]:
    """One prompt or several as a list: a list of messages (dicts) is one conversation.

    Raises:
        BadCorpus: none, an empty one, or something that is neither text nor messages.
    """
    if isinstance(given, str) or _is_conversation(given):
        prompts: list[Any] = [given]
    elif isinstance(given, Sequence):
        prompts = list(given)
    else:
        raise BadCorpus(f"prompts are texts or lists of messages, not {type(given).__name__}")
    if not prompts:
        raise BadCorpus("there is no prompt: give at least one text")
    for number, prompt in enumerate(prompts, start=1):
        if not isinstance(prompt, str) and not _is_conversation(prompt):
            raise BadCorpus(f"prompt {number} is neither a text nor a list of messages (dicts): {prompt!r}")
        if isinstance(prompt, str) and not prompt.strip():
            raise BadCorpus(f"prompt {number} is empty: give a text of at least one character")
    return prompts


def _is_conversation(given: Any) -> bool:
    return (
        isinstance(given, Sequence)
        and not isinstance(given, str)
        and len(given) > 0
        and all(isinstance(message, Mapping) for message in given)
    )


def read_prompts(path: Path) -> list[Given]:
    """Prompts of a file: one a line in a ``.txt``; ``.jsonl`` lines are texts, lists of messages, or objects with one.

    Raises:
        BadCorpus: unreadable, without a prompt, or of another kind.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise BadCorpus(f"cannot read the prompts {path}: {error.strerror or error}; give a readable file") from error
    except UnicodeDecodeError as error:
        raise BadCorpus(f"{path} is not UTF-8: save it as UTF-8 text") from error
    if path.suffix not in (".txt", ".jsonl"):
        raise BadCorpus(f"{path} is neither .txt nor .jsonl: write one prompt a line")
    read = _of_json if path.suffix == ".jsonl" else lambda line, _where: line
    prompts = [read(line, f"{path}:{n}") for n, line in enumerate(lines, start=1) if line.strip()]
    if not prompts:
        raise BadCorpus(f"{path} holds no prompt: write one a line")
    return prompts


def _of_json(line: str, where: str) -> Given:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadCorpus(f"{where} is not JSON: write a text, a list of messages, or {{'prompt': ...}}") from error
    if isinstance(value, Mapping):
        key = next((key for key in TEXT_KEYS if key in value), None)
        if key is None:
            raise BadCorpus(f"{where} has no {' or '.join(map(repr, TEXT_KEYS[:3]))}: give it one")
        value = value[key]
    if not isinstance(value, str) and not _is_conversation(value):
        raise BadCorpus(f"{where} holds neither a text nor a list of messages")
    return value


def tokenised(tokenizer: Any, given: Sequence[Given], spec: Spec, *, more: int) -> list[Prompt]:
    """Token ids of prompts; conversations go through the chat template with a generation prompt.

    Args:
        more: tokens that must fit into the context after each prompt.

    Raises:
        BadConfig: no tokenizer.
        BadCorpus: a prompt without tokens, no chat template, or one that refuses the messages.
        OutOfRange: a prompt that does not fit.
    """
    if tokenizer is None:
        raise BadConfig("this lens has no tokenizer to read prompts with: make it as Lens(model, tokenizer)")
    prompts = []
    for number, prompt in enumerate(given, start=1):
        if isinstance(prompt, str):
            text, ids = prompt, list(tokenizer(prompt, verbose=False)["input_ids"])
        else:
            text = chat.render(tokenizer, prompt, add_generation_prompt=True).text
            ids = encode(tokenizer, text)[0]
        if not ids:
            raise BadCorpus(f"prompt {number} has no tokens: give a text of at least one character")
        if spec.max_positions is not None and len(ids) + more > spec.max_positions:
            raise OutOfRange(
                f"prompt {number} has {len(ids)} tokens, with {more} after it, and the context holds "
                f"{spec.max_positions}: give a shorter one or generate less"
            )
        prompts.append(Prompt(text, tuple(ids)))
    return prompts
