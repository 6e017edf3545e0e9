"""Corpora of conversations: rows with `messages` (or ShareGPT's `conversations`), and concepts of who speaks.

A row becomes a document in a neutral rendering, blocks of ``role:`` and content, which splits and the corpus' hash
are made from. `tokenize` then renders it with the chat template of the model that will read it (`rendered`), so a
model and its baseline each see their own markers; a model without a template reads the neutral rendering.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moe_lens.corpus.concepts import CHAT_COLUMN, Column, Concept
from moe_lens.errors import BadCorpus
from moe_lens.models.chat import ROLES, THINKING_FIELDS, check_messages, pieces, render, strings
from moe_lens.types import Granularity

if TYPE_CHECKING:
    from moe_lens.corpus.text import Corpus, Document

log = logging.getLogger("moe_lens")

COLUMNS = ("messages", "conversations", "conversation")
"""Where conversations are looked for in a row without a text column."""
MESSAGES = "chat_messages"
"""Document field with the messages, as JSON."""

_ROLES = {
    "system": "what the system prompt says",
    "user": "what the user says",
    "assistant": "what the assistant says, without its thinking",
    "thinking": "what the assistant thinks",
    "tool": "what tools return",
}

CONCEPTS: tuple[Concept, ...] = tuple(
    Concept(
        f"chat.{role}", "chat", Column((CHAT_COLUMN,), (role,)), Granularity.SPAN, doc=doc, collection="chat"
    )
    for role, doc in _ROLES.items()
)  # fmt: skip


def conversation_column(record: Mapping[str, Any], text_column: str) -> str | None:
    """The column of a row that holds a conversation, None if the row is plain text."""
    columns = (text_column,) if text_column in record or text_column != "text" else COLUMNS
    for column in columns:
        value = record.get(column)
        if isinstance(value, list) and value and all(isinstance(message, Mapping) for message in value):
            return column
        if column in COLUMNS and column in record and not value:
            return column
    return None


def read_messages(value: Sequence[Mapping[str, Any]] | None) -> tuple[str, dict[str, str]]:
    """The neutral rendering of a conversation, and the fields of its document; no text if nobody says anything.

    Raises:
        BadCorpus: a message without role or content, or with an unknown role.
    """
    if not value:
        return "", {}
    messages = check_messages([_named(message) for message in value])
    found = pieces(messages)
    text, spans = "", []
    for i, message in enumerate(messages):
        text += f"{message['role']}:\n"
        for path, part in strings(message):
            is_thinking = path[0] in THINKING_FIELDS
            text += "<think>\n" if is_thinking else ""
            here = [piece for piece in found if (piece.message, piece.path) == (i, path) and piece.text.strip()]
            spans += [_span(piece.role, len(text) + piece.start, len(piece.text)) for piece in here]
            text += part + ("\n</think>\n\n" if is_thinking else "\n\n")
    if not spans:
        return "", {}
    fields = {MESSAGES: messages, CHAT_COLUMN: spans}
    return text.rstrip("\n") + "\n", {k: json.dumps(v, ensure_ascii=False) for k, v in fields.items()}


def rendered(corpus: Corpus, tokenizer: Any, wanted: Collection[int], *, bos: str = "") -> Corpus:
    """`corpus` with its conversations rendered by the chat template of `tokenizer`; other documents as they are.

    A conversation with text that the template rewrites loses its concepts of roles, and one that the template cuts
    (thinking of earlier turns) keeps them; both are counted in a warning.

    Args:
        wanted: numbers of the documents that will be read; others are not rendered.
        bos: left out where the template starts with it, because windows bring their own.

    Raises:
        BadCorpus: the template refuses a conversation; names the document.
    """
    chats = [i for i in sorted(wanted) if {MESSAGES, CHAT_COLUMN} <= corpus.documents[i].fields.keys()]
    if not chats:
        return corpus
    if not getattr(tokenizer, "chat_template", None):
        log.warning("the tokenizer has no chat template: conversations are read as blocks of 'role:' and content")
        return corpus
    documents = list(corpus.documents)
    missing: dict[str, str] = {}
    for i in chats:
        documents[i], notes = _rendered(documents[i], tokenizer, bos)
        if notes:
            missing[documents[i].id] = notes[0]
    if missing:
        first = next(iter(missing))
        log.warning(
            "in %d of %d conversations not all text is found after the chat template (first: %s, %s)",
            len(missing), len(chats), first, missing[first],
        )  # fmt: skip
    from moe_lens.corpus.text import fingerprint

    return replace(corpus, documents=tuple(documents), sha256=fingerprint(documents))


def _rendered(document: Document, tokenizer: Any, bos: str) -> tuple[Document, tuple[str, ...]]:
    try:
        chat = render(tokenizer, json.loads(document.fields[MESSAGES]), add_generation_prompt=False)
    except BadCorpus as error:
        raise BadCorpus(f"{document.id}: {error}") from error
    cut = len(bos) if bos and chat.text.startswith(bos) else 0
    fields = {k: v for k, v in document.fields.items() if k != CHAT_COLUMN}
    if all(mark.role is not None for mark in chat.marks):
        spans = [_span(str(mark.role), mark.start - cut, mark.stop - mark.start) for mark in chat.marks]
        fields[CHAT_COLUMN] = json.dumps(spans)
    return replace(document, text=chat.text[cut:], fields=fields), chat.missing


def _span(role: str, start: int, length: int) -> dict[str, Any]:
    return {"start": start, "end": start + length, "tag": role}


def _named(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message of ShareGPT's shape, ``{"from": "human", "value": ...}``, with the usual keys."""
    if "role" in message or "from" not in message:
        return dict(message)
    role = str(message["from"])
    rest = {k: v for k, v in message.items() if k not in ("from", "value")}
    return {"role": ROLES.get(role, role), "content": message.get("value"), **rest}
