"""Chat templates in the manner of Qwen3, Llama 3 and gpt-oss, and what they render, piece by piece, in Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tests.models import tiny

Message = dict[str, Any]
Pieces = list[tuple[str, str]]

MARKERS = [
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|start|>", "<|end|>",
    "<|message|>", "<|channel|>", "<|return|>",
]  # fmt: skip
VOCAB = tiny.VOCAB + len(MARKERS)

QWEN = r"""
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- if m.role != 'assistant' %}
        {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
    {%- else %}
        {%- set content = m.content %}
        {%- set reasoning = '' %}
        {%- if m.reasoning_content is string %}
            {%- set reasoning = m.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- generation %}
        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
            {{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {%- endgeneration %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}
"""

LLAMA = r"""
{{- bos_token }}
{%- for m in messages %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}
    {%- generation %}{{- m.content | trim }}{% endgeneration %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}
"""

HARMONY = r"""
{{- '<|start|>system<|message|>You are a model.<|end|>' }}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- if '<|channel|>' in m.content %}{{- raise_exception('no channels in the content') }}{% endif %}
        {%- if m.thinking is string and loop.last %}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}
        {%- endif %}
        {{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}
    {%- elif m.role == 'system' %}
        {{- '<|start|>developer<|message|># Instructions\n\n' + m.content + '\n\n<|end|>' }}
    {%- else %}
        {{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{% endif %}
"""


def untagged(template: str) -> str:
    """The template without its generation tags."""
    import re

    return re.sub(r"\{%-? *(end)?generation *-?%\}", lambda m: "{%- set _ = 0 -%}" if "-" in m[0] else "", template)


def qwen_pieces(messages: Sequence[Message], prompt: bool) -> Pieces:
    out: Pieces = []
    last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    for i, m in enumerate(messages):
        out.append(("template", f"<|im_start|>{m['role']}\n"))
        thought = m.get("reasoning_content", "")
        if m["role"] == "assistant" and i > last and (i == len(messages) - 1 or thought):
            out += [("template", "<think>\n"), ("thinking", thought.strip("\n")), ("template", "\n</think>\n\n")]
            out.append(("assistant", m["content"].lstrip("\n")))
        else:
            out.append((m["role"], m["content"]))
        out.append(("template", "<|im_end|>\n"))
    return [*out, ("template", "<|im_start|>assistant\n" if prompt else "")]


def llama_pieces(messages: Sequence[Message], prompt: bool) -> Pieces:
    out: Pieces = [("template", "<s>")]
    for m in messages:
        out.append(("template", f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n"))
        out += [(m["role"], m["content"].strip()), ("template", "<|eot_id|>")]
    return [*out, ("template", "<|start_header_id|>assistant<|end_header_id|>\n\n" if prompt else "")]


def harmony_pieces(messages: Sequence[Message], prompt: bool) -> Pieces:
    out: Pieces = [("template", "<|start|>system<|message|>You are a model.<|end|>")]
    for i, m in enumerate(messages):
        if m["role"] == "assistant":
            if "thinking" in m and i == len(messages) - 1:
                out.append(("template", "<|start|>assistant<|channel|>analysis<|message|>"))
                out += [("thinking", m["thinking"]), ("template", "<|end|>")]
            out.append(("template", "<|start|>assistant<|channel|>final<|message|>"))
            out += [("assistant", m["content"]), ("template", "<|end|>")]
        elif m["role"] == "system":
            out.append(("template", "<|start|>developer<|message|># Instructions\n\n"))
            out += [("system", m["content"]), ("template", "\n\n<|end|>")]
        else:
            out += [
                ("template", f"<|start|>{m['role']}<|message|>"),
                (m["role"], m["content"]),
                ("template", "<|end|>"),
            ]
    return [*out, ("template", "<|start|>assistant" if prompt else "")]


TEMPLATES: dict[str, tuple[str, Callable[[Sequence[Message], bool], Pieces]]] = {
    "qwen": (QWEN, qwen_pieces),
    "llama": (LLAMA, llama_pieces),
    "harmony": (HARMONY, harmony_pieces),
}
"""name -> (template, what it renders by construction)"""


def tokenizer(template: str | None) -> Any:
    """The byte tokenizer of `tiny` with the markers of all three formats and a chat template."""
    made = tiny.tokenizer()
    made.add_special_tokens({"additional_special_tokens": MARKERS}, replace_extra_special_tokens=False)
    made.chat_template = template
    return made


def expected(tokenizer: Any, pieces: Pieces) -> tuple[list[int], list[str]]:
    """Ids and roles of the tokens of pieces that are tokenised one by one."""
    ids: list[int] = []
    roles: list[str] = []
    for role, text in pieces:
        found = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        ids += found
        roles += [role] * len(found)
    return ids, roles
