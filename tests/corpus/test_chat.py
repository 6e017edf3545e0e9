"""Corpora of conversations: rendered with the model's chat template, with the roles as concepts."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest

from moe_lens.cli.app import main
from moe_lens.corpus.batches import tokenize
from moe_lens.corpus.chat import CONCEPTS, MESSAGES, rendered
from moe_lens.corpus.concepts import CHAT_COLUMN, concepts_for
from moe_lens.corpus.text import Corpus, Document, corpus
from moe_lens.errors import BadConcept, BadCorpus
from tests.models import chats, tiny

NAMES = ["chat.system", "chat.user", "chat.assistant", "chat.thinking", "chat.tool"]
TALK = [
    {"role": "system", "content": "Sé brief 😀."},
    {"role": "user", "content": "yes 漢字"},
    {"role": "assistant", "content": "yes", "reasoning_content": "hm\nhm"},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def talks(tmp_path):
    return corpus(write(tmp_path / "chats.jsonl", [{"messages": TALK, "domain": "x"}, {"messages": TALK[1:2]}]))


def bits(tokenized):
    return {c.name: tokenized.label(i) for i, c in enumerate(tokenized.concepts)}


def said(document, role):
    return [document.text[s["start"] : s["end"]] for s in json.loads(document.fields[CHAT_COLUMN]) if s["tag"] == role]


def test_rows_with_messages_become_documents_in_a_neutral_rendering(talks):
    first, second = talks.documents
    assert first.text == ("system:\nSé brief 😀.\n\nuser:\nyes 漢字\n\nassistant:\n<think>\nhm\nhm\n</think>\n\nyes\n")
    assert second.text == "user:\nyes 漢字\n"
    assert [said(first, role) for role in ("system", "user", "thinking", "assistant")] == [
        ["Sé brief 😀."], ["yes 漢字"], ["hm\nhm"], ["yes"],
    ]  # fmt: skip
    assert json.loads(first.fields[MESSAGES]) == TALK
    assert first.fields["domain"] == "x"
    assert list(talks.frame.columns) == ["id", "group", "characters", "domain"]


def test_sharegpt_rows_mean_the_same(tmp_path):
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    shared = [{"from": names[m["role"]], "value": m["content"]} for m in TALK]
    plain = [{"role": m["role"], "content": m["content"]} for m in TALK]
    a = corpus(write(tmp_path / "a.jsonl", [{"id": "1", "conversations": shared}]))
    b = corpus(write(tmp_path / "b.jsonl", [{"id": "1", "messages": plain}]))
    assert a.documents == b.documents


def test_parquet_rows_have_empty_keys(tmp_path):
    """Arrow gives every message every key."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"messages": [TALK]}), tmp_path / "c.parquet")
    assert json.loads(corpus(tmp_path / "c.parquet").documents[0].fields[MESSAGES]) == TALK


def test_a_text_column_comes_first_and_a_named_column_is_taken(tmp_path):
    path = write(tmp_path / "c.jsonl", [{"text": "plain", "messages": TALK, "other": TALK[1:2]}])
    assert corpus(path).documents[0].text == "plain"
    assert MESSAGES not in corpus(path).documents[0].fields
    assert corpus(path, text_column="other").documents[0].text == "user:\nyes 漢字\n"


@pytest.mark.parametrize("name", list(chats.TEMPLATES))
def test_bits_are_exact_to_the_token(name, tmp_path):
    source, by_construction = chats.TEMPLATES[name]
    key = "thinking" if name == "harmony" else "reasoning_content"
    messages = [*TALK[:2], {"role": "assistant", "content": "yes", key: "hm\nhm"}]
    talks = corpus(write(tmp_path / "c.jsonl", [{"messages": messages}]))
    tokenizer = chats.tokenizer(source)
    tokenized = tokenize(talks, tokenizer, concepts_for(talks, "chat"), max_length=512)
    ids, roles = chats.expected(tokenizer, by_construction(messages, False))
    assert tokenized.input_ids.tolist() == ids
    assert list(bits(tokenized)) == NAMES
    for concept, label in bits(tokenized).items():
        assert label.tolist() == [f"chat.{role}" == concept for role in roles]
    special = np.isin(ids, tokenizer.all_special_ids)
    assert not tokenized.eligible[special].any()
    assert tokenized.in_scope.all()
    assert tokenized.corpus.documents[0].text == "".join(text for _, text in by_construction(messages, False))
    assert tokenized.corpus.id == talks.id


def test_without_a_template_the_neutral_rendering_is_read(talks, caplog):
    tokenizer = chats.tokenizer(None)
    with caplog.at_level(logging.WARNING, logger="moe_lens"):
        tokenized = tokenize(talks, tokenizer, concepts_for(talks, "chat"), max_length=512)
    assert "no chat template" in caplog.text
    assert tokenized.corpus is talks
    user = tokenized.input_ids[bits(tokenized)["chat.user"]]
    assert tokenizer.decode(user) == "yes 漢字" * 2


def test_splits_do_not_depend_on_the_template(tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"question {i} about {i * 7}"}]} for i in range(30)]
    talks = corpus(write(tmp_path / "c.jsonl", rows))
    one, other = (
        tokenize(talks, chats.tokenizer(source), [], max_length=128) for source in (chats.QWEN, chats.HARMONY)
    )
    assert one.splits.tolist() == other.splits.tolist()
    assert set(one.splits.tolist()) == {0, 1, 2}


def test_bos_is_not_doubled(talks):
    """Llama's template writes the BOS, and so does its tokenizer."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = chats.tokenizer(chats.LLAMA)
    plain = tokenize(talks, tokenizer, [], max_length=512).input_ids.tolist()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    assert tokenizer("a")["input_ids"][0] == 257
    tokenized = tokenize(talks, tokenizer, concepts_for(talks, "chat"), max_length=512)
    assert tokenized.input_ids.tolist() == plain
    assert plain.count(257) == len(talks)
    assert tokenizer.decode(tokenized.input_ids[bits(tokenized)["chat.user"]]) == "yes 漢字" * 2


def test_a_conversation_that_the_template_rewrites_is_out_of_scope(talks, caplog):
    shouts = "{% for m in messages %}<|start|>{{ m.content | upper if m.role == 'system' else m.content }}{% endfor %}"
    with caplog.at_level(logging.WARNING, logger="moe_lens"):
        tokenized = tokenize(talks, chats.tokenizer(shouts), concepts_for(talks, "chat.user"), max_length=512)
    assert tokenized.in_scope[:, 0].tolist() == [False, True]
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("in 1 of 2 conversations not all text is found after the chat template")
    assert "(first: chats.jsonl:1, message 0 (system)" in caplog.messages[0]


def test_only_the_wanted_documents_are_rendered(talks):
    out = rendered(talks, chats.tokenizer(chats.QWEN), [1])
    assert out.documents[0] is talks.documents[0]
    assert out.documents[1].text.startswith("<|im_start|>")
    assert out.sha256 != talks.sha256


def test_roles_are_used_by_default_on_conversations_only(talks):
    assert set(NAMES) <= {c.name for c in concepts_for(talks)}
    assert [c.name for c in concepts_for(talks, ["chat"])] == NAMES == [c.name for c in CONCEPTS]
    plain = Corpus.of([Document("a", "text")], id="plain")
    assert not set(NAMES) & {c.name for c in concepts_for(plain)}
    with pytest.raises(BadConcept, match="its rows need a column messages"):
        concepts_for(plain, ["chat"])
    with pytest.raises(BadConcept, match=r"chat\.user.* its rows need a column messages"):
        concepts_for(plain, ["chat.user"])


BAD = [
    ({"messages": [{"speaker": "a"}]}, r"c\.jsonl, line 1: message 0 has no 'role'"),
    ({"conversations": [{"from": "bing", "value": "a"}]}, r"c\.jsonl, line 1: message 0 has the role 'bing'"),
    ({"messages": [{"role": "user", "content": 3}]}, r"c\.jsonl, line 1: the content of message 0 is not text"),
    ({"messages": []}, r"no usable document \(1 empty\)"),
    ({"messages": [{"role": "user", "content": " "}]}, r"no usable document \(1 empty\)"),
    ({"body": [{"role": "user", "content": "a"}]}, "no column 'text'"),
    ({"messages": ["a"]}, "no column 'text'"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_bad_rows_are_named(tmp_path, row, message):
    with pytest.raises(BadCorpus, match=message):
        corpus(write(tmp_path / "c.jsonl", [row]))


def test_a_conversation_that_the_template_refuses_is_named(tmp_path):
    refuses = "{{ raise_exception('no system role') if messages[0].role == 'system' else messages[0].content }}"
    talks = corpus(write(tmp_path / "c.jsonl", [{"messages": TALK[1:]}, {"messages": TALK}]))
    with pytest.raises(BadCorpus, match=r"c\.jsonl:2: the chat template refuses .*no system role"):
        tokenize(talks, chats.tokenizer(refuses), [], max_length=512)


def test_probe_reads_conversations(tmp_path, capsys):
    """``moe-lens probe --model M --dataset chats.jsonl --concepts chat`` from files to tables."""
    import pandas as pd

    folder = tmp_path / "model"
    tiny.build("olmoe", vocab_size=chats.VOCAB, max_position_embeddings=256).save_pretrained(folder)
    chats.tokenizer(chats.QWEN).save_pretrained(folder)
    words = "alpha beta gamma delta epsilon zeta eta theta".split()
    rows = [
        {"messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": " ".join(words[(i * 3 + j) % 8] for j in range(8))},
            {"role": "assistant", "content": " ".join(words[(i * 5 + j) % 8] for j in range(8)),
             "reasoning_content": words[i % 8].upper() * 3},
        ]}
        for i in range(60)
    ]  # fmt: skip
    data = write(tmp_path / "chats.jsonl", rows)
    code = main([
        "probe", "--model", str(folder), "--dataset", str(data), "--concepts", "chat", "--k", "1",
        "--layers", "1", "-o", str(tmp_path / "run"),
    ])  # fmt: skip
    assert code == 0, capsys.readouterr().err
    counts = pd.read_parquet(tmp_path / "run" / "concepts.parquet").groupby("concept")["positives"].sum()
    assert counts["chat.system"] == 60 * len("Be brief.")
    assert counts["chat.thinking"] == sum(len(row["messages"][2]["reasoning_content"]) for row in rows)
    assert counts["chat.user"] == sum(len(row["messages"][1]["content"]) for row in rows)
    assert counts["chat.tool"] == 0
    probed = pd.read_parquet(tmp_path / "run" / "probe.parquet")
    assert (probed[probed["concept"] == "chat.user"]["status"] == "ok").any()
