"""Who labels and who scores: names, defaults, and one budget for all models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from moe_lens.autointerp.endpoint import Clients, Name, read_name, served_model
from moe_lens.autointerp.labels import label_frame
from moe_lens.autointerp.pipeline import settle
from moe_lens.autointerp.replies import Outcome
from moe_lens.errors import BadConfig
from tests.autointerp.asking import GOOD, question
from tests.autointerp.llm_server import Answer, Asked, Behave, LLMServer

LIST = '{"object": "list", "data": [{"id": "first/model", "object": "model", "created": 0, "owned_by": "me"}]}'
NO_RULE = label_frame([{"layer": 0, "expert": 0, "label": "digits"}])
WITH_RULE = label_frame([{"layer": 0, "expert": 0, "label": "digits", "rule": r"\d"}])


def listing(asked: Asked) -> Answer:
    return Answer(raw=LIST) if asked.path.endswith("/models") else GOOD


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("lexical", Name("lexical")),
        ("openai:gpt-5", Name("openai", "gpt-5")),
        ("openai:org/model:7b", Name("openai", "org/model:7b")),
        ("gguf:/a/b.gguf", Name("gguf", "/a/b.gguf")),
    ],
)
def test_labellers_have_these_forms(text: str, name: Name) -> None:
    assert read_name(text, option="--labeller", without_model="lexical") == name


@pytest.mark.parametrize("text", ["", "lexicl", "openai:", "openai", "gpt-5", "lexical:x", "embedding:x"])
def test_other_labellers_are_refused(text: str) -> None:
    with pytest.raises(BadConfig, match=r"--labeller cannot be .*: write lexical or openai:MODEL or gguf:FILE"):
        read_name(text, option="--labeller", without_model="lexical")


def test_a_name_shows_no_path() -> None:
    assert str(Name("gguf", "/home/someone/smol.gguf")) == "gguf:smol.gguf"


def test_the_labeller_is_lexical_unless_a_server_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    asked = settle(None, None, None, None)
    assert asked.name == "lexical"
    assert asked.scorers == (Name("rule"),)


@pytest.mark.usefixtures("api_key")
def test_a_server_labels_and_scores_with_the_first_model_that_it_lists(
    serve: Callable[[Behave], LLMServer],
) -> None:
    asked = settle(None, None, None, serve(listing).url)
    assert asked.labeller == Name("openai", "first/model")
    assert asked.scorers == (Name("openai", "first/model"), Name("rule"))


@pytest.mark.usefixtures("api_key")
@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (Answer.error(401), "wants another API key"),
        (Answer.error(404), "lists no model"),
        (Answer(raw='{"object": "list", "data": []}'), "lists no model"),
        (Answer(raw="not json"), "lists no model"),
    ],
)
def test_a_server_that_lists_nothing_is_refused(
    serve: Callable[[Behave], LLMServer], answer: Answer, says: str
) -> None:
    with pytest.raises(BadConfig, match=says):
        served_model(serve(lambda _: answer).url)


@pytest.mark.usefixtures("api_key")
def test_a_server_that_is_off_is_refused() -> None:
    with pytest.raises(BadConfig, match="cannot reach"):
        served_model("http://127.0.0.1:9/v1")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("lexical", NO_RULE, None, None), "exclude each other"),
        ((None, NO_RULE, None, None), "none of these labels has a rule"),
        ((None, NO_RULE.iloc[:0], None, None), "there is no label"),
        (("lexical", None, ["openai:a", "openai:b"], None), "more than one chat model"),
        (("lexical", None, "reading", None), "--scorer cannot be 'reading'"),
    ],
)
def test_what_cannot_be_done_is_refused(arguments: tuple, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(BadConfig, match=says):
        settle(*arguments)


def test_facets_need_a_language_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(BadConfig, match="--facets needs a language model"):
        settle("lexical", None, None, None, facets=3)


def test_given_labels_with_rules_need_no_scorer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    asked = settle(None, WITH_RULE, None, None)
    assert asked.scorers == (Name("rule"),)
    pd.testing.assert_frame_equal(asked.given, WITH_RULE.assign(labeller="given"))


@pytest.mark.usefixtures("api_key")
def test_all_models_share_one_budget(serve: Callable[[Behave], LLMServer], tmp_path: Path) -> None:
    server = serve(lambda _: GOOD)
    with Clients(base_url=server.url, cache=tmp_path / "r.sqlite", max_calls=3, reply_tokens=None) as clients:
        first = clients.of(Name("openai", "a")).ask_all([question(i) for i in range(2)], progress=False)
        second = clients.of(Name("openai", "b")).ask_all([question(i) for i in range(2)], progress=False)
        assert clients.spent["calls"] == len(server.asked) == 3
        assert clients.outcomes[Outcome.BUDGET] == 1
    assert [reply.status for reply in first] == [Outcome.OK, Outcome.OK]
    assert sorted(reply.status for reply in second) == [Outcome.BUDGET, Outcome.OK]
