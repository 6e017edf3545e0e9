"""Conversations: every token has the role of who says it, also what the model generates."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from moe_lens.errors import BadCorpus, OutOfRange, UnknownConcept, UnsupportedModel
from moe_lens.models import chat
from moe_lens.models.lens import Lens
from moe_lens.models.spans import decode_reply, encode, spans_of
from moe_lens.types import Role
from tests.models import chats, tiny

YES = [
    {"role": "system", "content": "Sé brief 😀."},
    {"role": "user", "content": "yes"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "<|im_end|><|eot_id|><|end|>\nsystem\nyes 漢字"},
]
THOUGHT = "yes, \U0001f914\n<|start|>user"


@pytest.fixture(params=list(chats.TEMPLATES))
def template(request):
    return chats.TEMPLATES[request.param]


@pytest.fixture(scope="module")
def model():
    return tiny.build("olmoe", vocab_size=chats.VOCAB, max_position_embeddings=512)


@pytest.fixture
def lens_with(model):
    return lambda template: Lens(model, chats.tokenizer(template))


def roles_of(spans, n_tokens) -> list[str | None]:
    roles: list[str | None] = [None] * n_tokens
    for row in spans:
        assert roles[row.start : row.stop] == [None] * (row.stop - row.start)
        roles[row.start : row.stop] = [row.role] * (row.stop - row.start)
    return roles


def read(tokenizer, messages, *, prompt=False):
    """(token ids, roles of tokens, rendered) of messages without a model."""
    rendered = chat.render(tokenizer, messages, add_generation_prompt=prompt)
    ids, extents = encode(tokenizer, rendered.text)
    return ids, roles_of(spans_of(rendered.marks, extents, n_prompt=len(ids)), len(ids)), rendered


@pytest.mark.parametrize("tagged", [True, False])
def test_spans_are_exact_to_the_token(template, tagged, lens_with):
    source, by_construction = template
    key = "thinking" if source == chats.HARMONY else "reasoning_content"
    messages = [*YES, {"role": "assistant", "content": "\nyes é", key: THOUGHT}]
    lens = lens_with(source if tagged else chats.untagged(source))
    ids, roles = chats.expected(lens.tokenizer, by_construction(messages, False))
    t = lens.trace(messages, layers=[0])
    assert list(t.token_ids) == ids
    assert roles_of(t.spans.itertuples(), len(ids)) == roles
    assert list(t.routing.drop_duplicates("position")["span"]) == roles
    for role in ("system", "user", "assistant", "thinking", "tool", "template"):
        assert t.concept(role).tolist() == [r == role for r in roles]
    assert not t.spans["generated"].any()
    assert t.spans["start"].tolist()[1:] == t.spans["stop"].tolist()[:-1]


def test_characters_of_a_span_are_what_was_said(template, lens_with):
    t = lens_with(template[0]).trace(YES)
    said = {
        row.message: t.text[row.char_start : row.char_stop] for row in t.spans[t.spans["message"].notna()].itertuples()
    }
    assert said == {i: message["content"] for i, message in enumerate(YES)}
    assert t.spans.iloc[-1]["role"] == "template"  # the generation prompt, as a user spoke last
    assert t.text.endswith(("assistant\n", "assistant<|end_header_id|>\n\n", "<|start|>assistant"))


def test_experts_can_be_compared_by_role(lens_with):
    t = lens_with(chats.QWEN).trace(YES)
    by_role = t.routing.groupby("span")["expert"].count()
    tokens = {role: int(t.concept(role).sum()) for role in ("system", "user", "assistant", "template")}
    assert by_role.to_dict() == {role: n * 2 * 2 for role, n in tokens.items()}  # two layers, top 2


def test_a_text_has_no_roles(lens_with):
    t = lens_with(chats.QWEN).trace("a")
    assert len(t.tokens) == 1
    assert len(t.spans) == 0
    assert list(t.spans.columns) == ["role", "start", "stop", "char_start", "char_stop", "generated", "message"]
    assert t.routing["span"].isna().all()
    with pytest.raises(UnknownConcept, match="trace messages"):
        t.concept("user")


def test_the_mask_of_generation_tags_agrees(lens_with):
    """transformers' own mask is the independent witness where a template has generation tags."""
    lens = lens_with(chats.QWEN)
    messages = [*YES, {"role": "assistant", "content": "yes", "reasoning_content": "no"}]
    coded = lens.tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    t = lens.trace(messages)
    assert list(t.token_ids) == coded["input_ids"]
    tagged = torch.tensor(coded["assistant_masks"], dtype=torch.bool)
    said = t.concept("assistant") | t.concept("thinking")
    assert (said & ~tagged).sum() == 0
    assert set((tagged & ~said).nonzero().flatten().tolist()) <= set(t.concept("template").nonzero().flatten().tolist())
    assert said.sum() == len("yes") + len("no") + len("yes")


@pytest.mark.parametrize("source", [chats.LLAMA, chats.HARMONY])
def test_thinking_in_the_content_is_found_by_its_delimiters(source):
    tokenizer = chats.tokenizer(source)
    messages = [
        {"role": "user", "content": "a <think>b</think>"},
        {"role": "assistant", "content": "<think>c</think>d"},
    ]
    _, roles, rendered = read(tokenizer, messages)
    assert [(m.role, rendered.text[m.start : m.stop]) for m in rendered.marks] == [
        ("user", "a <think>b</think>"), ("thinking", "c"), ("assistant", "d"),
    ]  # fmt: skip
    assert roles.count("thinking") == 1
    assert rendered.missing == ()


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("<think>\nc\n</think>\n\nd", [("thinking", "\nc\n"), ("assistant", "\n\nd")]),
        ("c</think>d", [("thinking", "c"), ("assistant", "d")]),
        ("only <think> is said", [("assistant", "only <think> is said")]),
        ("a <think>b</think> c </think> d", [("assistant", "a "), ("thinking", "b"), ("assistant", " c </think> d")]),
        ("[THINK]c[/THINK]d", [("thinking", "c"), ("assistant", "d")]),
        ("c[/THINK]d<|end|>", [("assistant", "c[/THINK]d<|end|>")]),
        ("", []),
    ],
)
def test_delimiters_in_a_message(content, parts):
    assert [(role, content[a:b]) for role, a, b in chat.split_thinking(content)] == parts


def test_delimiters_can_be_added(monkeypatch):
    monkeypatch.setattr(chat, "THINKING", [*chat.THINKING, chat.Delimiters("<r>", "</r>")])
    assert chat.split_thinking("<r>c</r>d") == [("thinking", 3, 4), ("assistant", 8, 9)]


def test_thinking_that_the_template_drops_is_reported(lens_with, caplog):
    old = {"role": "assistant", "content": "<think>old</think>new"}
    with caplog.at_level(logging.WARNING, logger="moe_lens"):
        t = lens_with(chats.QWEN).trace([YES[1], old, YES[1]])
    assert caplog.messages == ["message 1 (thinking): the chat template leaves it out"]
    assert "old" not in t.text
    assert not t.concept("thinking").any()
    assert t.concept("assistant").sum() == len("new")


def test_rewritten_text_has_no_role_and_is_reported(lens_with, caplog):
    shouts = (
        "{% for m in messages %}<|start|>{{ m.role }}:"
        "{{ m.content | upper if loop.first else m.content }}<|end|>{% endfor %}"
    )
    messages = [{"role": "user", "content": "loud Text"}, {"role": "assistant", "content": "soft"}]
    with caplog.at_level(logging.WARNING, logger="moe_lens"):
        t = lens_with(shouts).trace(messages)
    assert "message 0 (user): the chat template rewrites it, so that its tokens have no role" in caplog.messages
    rows = [(row.role, t.text[row.char_start : row.char_stop]) for row in t.spans.itertuples()]
    assert rows == [
        ("template", "<|start|>user:"), (None, "LOUD TEXT"), ("template", "<|end|><|start|>assistant:"),
        ("assistant", "soft"), ("template", "<|end|>"),
    ]  # fmt: skip
    assert t.routing["span"].isna().sum() == len("LOUD TEXT") * 4


def test_a_dropped_system_message_is_reported():
    drops = "{% for m in messages if m.role != 'system' %}<|start|>{{ m.role }}:{{ m.content }}<|end|>{% endfor %}"
    _, roles, rendered = read(chats.tokenizer(drops), YES[:2])
    assert rendered.missing == ("message 0 (system): the chat template leaves it out",)
    assert roles.count("user") == 3


def test_a_system_message_inside_the_users_turn_is_found():
    """Mistral's way: the system message opens the first user turn."""
    inst = (
        "{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\n\n' %}"
        "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}"
        "[{{ s if loop.first and s is defined else '' }}{{ m.content }}]{% endfor %}"
    )
    text = chat.render(chats.tokenizer(inst), YES[:3], add_generation_prompt=False)
    assert text.text == "[Sé brief 😀.\n\nyes][yes]"
    assert [(m.role, text.text[m.start : m.stop]) for m in text.marks] == [
        ("system", "Sé brief 😀."), ("user", "yes"), ("assistant", "yes"),
    ]  # fmt: skip


def test_a_message_that_decides_about_others_is_still_found():
    """Replacing the first message by a stand-in changes how the second is rendered."""
    bold = (
        "{% for m in messages %}{{ '**' if messages[0].content == 'bold' else '' }}{{ m.content }}|{% endfor %}"
    )  # fmt: skip
    messages = [
        {"role": "user", "content": "bold"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    rendered = chat.render(chats.tokenizer(bold), messages, add_generation_prompt=False)
    assert rendered.text == "**bold|**b|**c|"
    marked = {m.message: rendered.text[m.start : m.stop] for m in rendered.marks if m.role is not None}
    assert (marked[1], marked[2]) == ("b", "c")
    assert rendered.missing == ("message 0 (user): the chat template rewrites it, so that its tokens have no role",)


def test_tool_calls_have_no_role_and_tool_results_do():
    calls = (
        "{% for m in messages %}<|start|>{{ m.role }}:{{ m.content }}"
        "{% for c in m.tool_calls or [] %}CALL {{ c.function | tojson }}{% endfor %}<|end|>{% endfor %}"
    )
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}
    messages = [{"role": "assistant", "content": "I look", "tool_calls": [call]}, {"role": "tool", "content": "blue"}]
    rendered = chat.render(chats.tokenizer(calls), messages, add_generation_prompt=False)
    marks = [(m.role, rendered.text[m.start : m.stop]) for m in rendered.marks]
    assert marks[0] == ("assistant", "I look")
    assert marks[1][0] is None
    assert marks[1][1].startswith("CALL {")
    assert marks[2] == ("tool", "blue")
    assert rendered.missing == ("message 0 (assistant): the tokens of its tool calls have no role",)


def test_text_parts_and_content_said_twice():
    twice = (
        "{% for m in messages %}{{ m.content[0].text }}+{{ m.content[1].text }};{{ m.content[0].text }}|{% endfor %}"
    )
    parts = [{"type": "text", "text": " a "}, {"type": "text", "text": "b"}]
    rendered = chat.render(chats.tokenizer(twice), [{"role": "user", "content": parts}], add_generation_prompt=False)
    assert [rendered.text[m.start : m.stop] for m in rendered.marks] == [" a ", "b", " a "]


def test_a_token_of_template_and_content_belongs_to_the_content():
    """One token covers the line break of the header and the first letter."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(BPE(vocab={**vocab, "Ċy": 256}, merges=[("Ċ", "y")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}:\n{{ m.content }}\n{% endfor %}"
    ids, roles, rendered = read(tokenizer, [{"role": "user", "content": "yes\n"}])
    assert rendered.text == "user:\nyes\n\n"
    assert 256 in ids
    assert roles == ["template"] * 5 + ["user"] * 4 + ["template"]


CONTENT = st.lists(
    st.sampled_from(["yes", "é", "😀", "漢", " ", "\n", "\t", "a b", "user", *chats.MARKERS[:4], "<|end|>", "{{ x }}"]),
    max_size=5,
).map("".join)


@st.composite
def conversations(draw):
    messages = []
    for i in range(draw(st.integers(1, 6))):
        role = draw(st.sampled_from(["user", "assistant", "tool"] + (["system"] if i == 0 else [])))
        messages.append({"role": role, "content": draw(CONTENT)})
        if role == "assistant" and draw(st.booleans()):
            messages[-1]["reasoning_content"] = messages[-1]["thinking"] = draw(CONTENT)
    return messages


@pytest.mark.parametrize("name", list(chats.TEMPLATES))
@settings(max_examples=150, deadline=None)
@given(messages=conversations(), prompt=st.booleans())
def test_every_content_character_lies_in_one_span_of_its_role(name, messages, prompt):
    source, by_construction = chats.TEMPLATES[name]
    tokenizer = chats.tokenizer(source)
    messages = [
        {k: v for k, v in m.items() if k != ("reasoning_content" if name == "harmony" else "thinking")}
        for m in messages
    ]
    found = by_construction(messages, prompt)
    ids, roles, rendered = read(tokenizer, messages, prompt=prompt)
    assert rendered.text == "".join(text for _, text in found)
    assert (ids, roles) == chats.expected(tokenizer, found)
    for before, after in zip(rendered.marks, rendered.marks[1:], strict=False):
        assert before.stop <= after.start
    for i, message in enumerate(messages):
        said = "".join(
            rendered.text[m.start : m.stop] for m in rendered.marks if (m.message, m.role) == (i, message["role"])
        )
        assert said.strip() == message["content"].strip()


def forced(monkeypatch, lens, reply):
    """Make the model say `reply`."""
    ids = torch.tensor([lens.tokenizer(reply, add_special_tokens=False)["input_ids"]])
    monkeypatch.setattr(lens.model, "generate", lambda given, **_: torch.cat([given, ids], dim=1))
    return ids.shape[1]


REPLIES = [
    (chats.QWEN, "<think>\nhm 😀\n</think>\n\nyés<|im_end|>", [
        ("template", "<think>"), ("thinking", "\nhm 😀\n"), ("template", "</think>"), ("assistant", "\n\nyés"),
        ("template", "<|im_end|>"),
    ]),
    (chats.QWEN, "<think>\ncut", [("template", "<think>"), ("thinking", "\ncut")]),
    (chats.QWEN.rstrip().replace("assistant\\n' }}{% endif", "assistant\\n<think>\\n' }}{% endif"), "hm</think>yes", [
        ("thinking", "hm"), ("template", "</think>"), ("assistant", "yes"),
    ]),
    (chats.HARMONY, "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>yes<|return|>",
     [
        ("template", "<|channel|>analysis<|message|>"), ("thinking", "hm"),
        ("template", "<|end|><|start|>assistant<|channel|>final<|message|>"), ("assistant", "yes"),
        ("template", "<|return|>"),
     ]),
    (chats.LLAMA, "no <|eot_id|>", [("assistant", "no "), ("template", "<|eot_id|>")]),
]  # fmt: skip


@pytest.mark.parametrize(("source", "reply", "rows"), REPLIES)
def test_a_reply_is_marked(monkeypatch, lens_with, source, reply, rows):
    lens = lens_with(source)
    n = forced(monkeypatch, lens, reply)
    t = lens.trace(YES[:2], generate=n)
    said = t.spans[t.spans["generated"]]
    assert [(row.role, t.text[row.char_start : row.char_stop]) for row in said.itertuples()] == rows
    assert t.text.endswith(reply)
    ids, roles = chats.expected(lens.tokenizer, rows)
    assert list(t.token_ids[t.n_prompt :]) == ids
    assert roles_of(t.spans.itertuples(), len(t.tokens))[t.n_prompt :] == roles
    assert said["start"].min() == t.n_prompt


def test_a_reply_cut_inside_a_character_keeps_all_its_tokens(monkeypatch, lens_with):
    lens = lens_with(chats.QWEN)
    ids = lens.tokenizer("a😀")["input_ids"][:-1]
    monkeypatch.setattr(lens.model, "generate", lambda given, **_: torch.cat([given, torch.tensor([ids])], dim=1))
    t = lens.trace(YES[:2], generate=4)
    last = t.spans.iloc[-1]
    assert (last["role"], last["stop"] - last["start"], t.text[last["char_start"] :]) == ("assistant", 4, "a\ufffd")


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, chats.VOCAB - 1), max_size=30))
def test_every_generated_token_has_characters(ids):
    tokenizer = chats.tokenizer(None)
    text, extents = decode_reply(tokenizer, tokenizer("é")["input_ids"], ids)
    assert len(extents) == len(ids)
    before = (0, 0)
    for start, stop in extents:
        assert (start, stop) == before or start == before[1] < stop
        before = (start, stop)
    assert before[1] == len(text)


def test_generated_tokens_are_what_the_model_generates(lens_with):
    lens = lens_with(chats.LLAMA)
    prompt = lens.tokenizer.apply_chat_template(YES, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    wanted = lens.model.generate(**prompt, max_new_tokens=12, do_sample=False, pad_token_id=256)[0].tolist()
    t = lens.trace(YES, generate=12)
    assert list(t.token_ids) == wanted
    assert t.n_prompt == prompt["input_ids"].shape[1]
    generated = t.spans[t.spans["generated"]]
    assert (generated["start"].min(), generated["stop"].max()) == (t.n_prompt, len(wanted))
    assert set(t.routing["position"]) == set(range(len(wanted)))


def by_token(taps, layer, expert_key=lambda tap: tap):
    rows = {}
    for offset, tap in taps:
        if tap.layer == layer and tap.role is Role.MOE:
            for row in range(len(tap.token)):
                rows[offset + int(tap.token[row]), int(tap.expert[row])] = tap.activation[row], tap.output[row]
    return rows


def test_taps_of_generated_tokens_equal_those_of_the_same_text_as_prompt(lens_with):
    lens = lens_with(chats.LLAMA)
    t = lens.trace(YES, generate=8)
    seen = []
    with torch.no_grad(), lens.tapping(lambda tap: seen.append((0, replace(tap)))):
        lens.model(input_ids=torch.tensor([t.token_ids]), use_cache=False)
    for layer in lens.layers:
        wanted, found = by_token(seen, layer), by_token([(0, tap) for tap in t.taps], layer)
        assert wanted.keys() == found.keys()
        for key, (activation, output) in wanted.items():
            assert torch.equal(activation, found[key][0])
            assert torch.equal(output, found[key][1])


def test_taps_equal_what_was_computed_while_generating(lens_with):
    lens = lens_with(chats.LLAMA)
    prompt = lens.tokenizer.apply_chat_template(YES, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    seen, at = [], [0]

    def keep(tap):
        seen.append((at[0], tap))
        at[0] += tap.n_tokens if tap.layer == lens.layers[-1] else 0

    with torch.no_grad(), lens.tapping(keep):
        lens.model.generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=256)
    t = lens.trace(YES, generate=8)
    for layer in lens.layers:
        wanted, found = by_token(seen, layer), by_token([(0, tap) for tap in t.taps], layer)
        last = len(t.tokens) - 1  # chosen, but never fed back while generating
        assert wanted.keys() == {key for key in found if key[0] != last}
        for key, (activation, output) in wanted.items():
            assert torch.allclose(activation, found[key][0], atol=1e-4)
            assert torch.allclose(output, found[key][1], atol=1e-4)


def test_generation_stops_at_eos(lens_with, model, monkeypatch):
    lens = lens_with(chats.LLAMA)
    free = lens.trace(YES, generate=8)
    reply = free.token_ids[free.n_prompt :]
    at = next(i for i in range(1, len(reply)) if reply[i] not in reply[:i])
    monkeypatch.setattr(model.generation_config, "eos_token_id", reply[at])
    t = lens.trace(YES, generate=8)
    assert t.token_ids == free.token_ids[: free.n_prompt + at + 1]
    assert t.spans["stop"].max() == len(t.tokens)


BAD = [
    ([], "there is no message: give at least one"),
    ([{"content": "a"}], "message 0 has no 'role'"),
    ([{"role": "user", "contents": "a"}], "message 0 has no 'content', did you mean 'contents'"),
    ([{"role": "usr", "content": "a"}], "the role 'usr', did you mean 'user'"),
    ([{"role": "user", "content": 3}], "the content of message 0 is not text"),
    ([{"role": "user", "content": [{"type": "image"}]}], "the content of message 0 is not text"),
    ([{"role": "assistant", "content": "<|channel|>"}], r"refuses these messages \(no channels in the content\)"),
    ([{"role": "user", "content": "a\ud800"}], "lone surrogate"),
    (["a"], "one text or a list of messages"),
    (None, "one text or a list of messages"),
]


@pytest.mark.parametrize(("messages", "message"), BAD)
def test_bad_messages_are_refused(lens_with, messages, message):
    with pytest.raises(BadCorpus, match=message) as caught:
        lens_with(chats.HARMONY).trace(messages)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_read_or_generated_is_refused(lens_with):
    with pytest.raises(BadCorpus, match=r"no chat template: give one text instead, or set tokenizer\.chat_template"):
        lens_with(None).trace(YES)
    lens = lens_with(chats.QWEN)
    with pytest.raises(OutOfRange, match="generate is -1: give the number of tokens"):
        lens.trace(YES, generate=-1)
    with pytest.raises(OutOfRange, match="the context holds 512"):
        lens.trace(YES, generate=500)
    with pytest.raises(UnknownConcept, match="no role is named 'usr', did you mean 'user'"):
        lens.trace(YES).concept("usr")
    lens.tokenizer.__class__ = type("Slow", (PreTrainedTokenizerFast,), {"is_fast": False})
    with pytest.raises(UnsupportedModel, match="Slow reports no character offsets"):
        lens.trace(YES)
