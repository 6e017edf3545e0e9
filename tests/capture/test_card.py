"""An expert's card says what the tables say, all of it as text, and names the command for what is not there."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest

import moe_lens as ml
from moe_lens.autointerp.exemplars import ExemplarCounts, exemplar_table
from moe_lens.autointerp.logit_lens import logit_lens
from moe_lens.capture.card import NOT_ROUTED, TOP
from moe_lens.capture.exemplars import TopExemplars
from moe_lens.capture.run import Run, capture, open_run
from moe_lens.capture.shading import NOTHING, Mark, pieces, token_name, visible
from moe_lens.corpus.batches import tokenize
from moe_lens.errors import BadConfig, BadOutput, OutOfRange
from moe_lens.models.lens import Lens
from tests.capture.card_runs import NASTY, exemplars, write_run
from tests.models import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return open_run(write_run(tmp_path_factory.mktemp("runs") / "full"))


class Page(HTMLParser):
    """What a browser makes of a card: its elements and the text it shows."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.spans: list[tuple[str, str]] = []
        self.text = ""
        self._style = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self._style = str(dict(attrs).get("style")) if tag == "span" else ""

    def handle_endtag(self, tag: str) -> None:
        self._style = ""

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._style:
            self.spans.append((self._style, data))


# pieces of contexts


def test_pieces_mark_the_focal_token_and_the_others_that_were_routed():
    text = "ab cd ef gh"
    cut = pieces(text, 3, 5, [(0, 2), (3, 5), (9, 11)])
    assert [(p.text, p.mark) for p in cut] == [
        ("ab", Mark.ROUTED), (" ", Mark.PLAIN), ("cd", Mark.FOCAL), (" ef ", Mark.PLAIN), ("gh", Mark.ROUTED),
    ]  # fmt: skip


@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_token_without_characters_is_shown_where_it_stands(at):
    cut = pieces("abcd", at, at)
    assert "".join(p.text for p in cut) == "abcd"[:at] + NOTHING + "abcd"[at:]
    assert [p.text for p in cut if p.mark is Mark.FOCAL] == [NOTHING]


def test_two_tokens_of_one_character_are_one_piece():
    assert [p.mark for p in pieces("é!", 0, 1, [(0, 1), (0, 1)])] == [Mark.FOCAL, Mark.PLAIN]


def test_nothing_that_moves_hides_or_turns_text_is_left():
    assert visible("a\nb\tc") == "a↵b⇥c"
    assert visible("\x1b[31m\x00\x9b\u202e\u200b\ufeff") == "␛[31m␀\\u009b\\u202e\\u200b\\ufeff"
    for plain in ("العربية", "👩\u200d👩", "é", "中文", "می\u200cروم"):
        assert visible(plain) == plain
    assert token_name(" the") == "␣the"
    assert token_name("") == NOTHING


# exemplars


def test_exemplars_are_the_rows_of_the_expert_in_the_split(run):
    table = exemplars()
    mine = table[(table.expert == 3) & (table.split == "select")]
    assert run.exemplars("L2.E3").token.tolist() == mine.token.tolist()
    assert run.exemplars("2:3", split="validate").token.tolist() == [f"seen{i}" for i in range(10)]
    assert set(run.exemplars("L2.E1", kind="negative_same_token").kind) == {"negative_same_token"}


@pytest.mark.parametrize(
    ("address", "changes", "error", "says"),
    [
        ("L2.E2", {}, OutOfRange, "none of the tokens of the split 'select' was routed to it"),
        ("L2.E1", {"split": "validate"}, OutOfRange, "no exemplars"),
        ("L2.E9", {}, OutOfRange, "layer 2 has experts 1 to 3"),
        ("L5.E1", {}, OutOfRange, "it has those of layers 2"),
        ("L2.E1.N4", {}, OutOfRange, "give its expert, L2.E1"),
        ("seven", {}, OutOfRange, "write it as L7.E12"),
        ("L2.E1", {"split": "test"}, BadConfig, "'select' or 'validate'"),
        ("L2.E3", {"kind": "best"}, BadConfig, "there are quantile, top, negative_same_token"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(run, address, changes, error, says):
    with pytest.raises(error, match=says) as caught:
        run.exemplars(address, **changes)
    assert "\n" not in str(caught.value)


def test_a_run_without_exemplars_says_what_makes_them(tmp_path):
    bare = open_run(write_run(tmp_path / "bare", "routing"))
    for ask in (bare.exemplars, bare.card):
        with pytest.raises(BadOutput, match="run moe-lens autointerp --model"):
            ask("L2.E1")


# the card


def test_the_card_shows_high_scores_all_quarters_and_tokens_that_were_not_routed(run):
    groups = run.card("L2.E3", n=4).groups
    assert groups[TOP].token.tolist() == ["word0", "word1", "word4", "word5"], "two of a document"
    assert groups[TOP].score.is_monotonic_decreasing
    quarters = [rows for name, rows in groups.items() if "quantiles" in name]
    assert [len(rows) for rows in quarters] == [1, 1, 1, 1]
    for i, rows in enumerate(quarters):
        assert rows["quantile"].between(0.75 - i / 4, 1 - i / 4).all()
    spread = run.card("L2.E3").frame.query("kind == 'quantile'")["quantile"]
    assert len(spread) == 8
    assert spread.is_monotonic_decreasing
    assert groups[NOT_ROUTED].token.tolist() == ["word0", "word4"], "those of the highest scores, each once first"
    same = run.card("L2.E1").groups[NOT_ROUTED]
    assert same.token.tolist() == list(NASTY[:2])
    assert not same.routed.any()


def test_scores_stand_with_the_headline_first_and_the_control_last(run):
    lines = run.card("L2.E1").facts()
    assert dict(lines)["scores"].split(" · ") == [
        "detection, the labeller itself: same token AUROC .62 [.55, .69]", "+.12 [.05, .19] over unigram",
        "-.04 [-.10, .03] over bigram", "3 abstained", "random .91", "labels shuffled .50",
        "rule: same token AUROC 1.00 [.55, .69]", "near miss too_few",
    ]  # fmt: skip
    assert dict(lines)["label"] == "<b>markup</b> & ␛[0m (by openai:m, confidence 3 of 4)"
    assert dict(lines)["rule"] == "<[^>]+>"


def test_a_label_that_is_missing_says_why(run):
    facts = dict(run.card("L2.E3").facts())
    assert facts["label"] == "none (refused, no <reason>) by openai:m"
    assert "rule" not in facts
    assert "scores" not in facts


def test_routing_tokens_and_neurons_are_those_of_the_expert(run):
    facts = dict(run.card("L2.E1").facts())
    assert "600 tokens (85.7%, 8.6x an even share)" in facts["routing"]
    assert facts["promotes"] == "␣<i>  ↵"
    assert facts["suppresses"] == "\\u202e"
    best = "c0 N0 .60, c2 N2 .70, c3 N3 .75, c4 N4 .80, c5 N5 .85"
    assert facts["neurons"] == f"{best} (AUROC on test, best on validate first)"
    assert "not run" not in facts


def test_parts_without_a_table_are_none_and_name_their_command(tmp_path):
    card = open_run(write_run(tmp_path / "bare", "exemplars")).card("L2.E1")
    parts = (card.routing, card.labels, card.scores, card.promoted, card.suppressed, card.probes)
    assert parts == (None,) * 6
    said = dict(card.facts())["not run"]
    assert said in repr(card)
    assert said in Page(card._repr_html_()).text
    by = {"routing": "probe", "labels": "autointerp", "label_scores": "autointerp", "logit_lens": "autointerp"}
    assert card.missing.keys() == {*by, "probe"}
    for table, command in by.items():
        assert f"{table}: moe-lens {command}" in said


def test_an_expert_that_a_table_leaves_out_is_not_taken_for_a_table_that_is_missing(run):
    card = run.card("L2.E3")
    assert card.promoted == ()
    assert len(card.probes) == 0
    assert dict(card.facts())["neurons"] == "no concept had enough tokens of this expert"
    assert card.missing == {}


# the page


def test_the_page_shows_every_token_as_text_and_runs_none(run):
    page = Page(run.card("L2.E1")._repr_html_())
    assert page.tags <= {"div", "table", "tr", "td", "span", "b"}
    for shown in ("<script>alert(1)</script>", "␛[31m", "\\u202e", "↵⇥", " [bold]&", "العربية", "<b>markup</b>"):
        assert shown in page.text
    assert not {"\x1b", "\u202e", "\n"} & set(page.text)


def test_shade_grows_with_the_score_and_other_routed_tokens_are_underlined(run):
    page = Page(run.card("L2.E1")._repr_html_())
    shaded = [
        (float(style.split(",")[-1].rstrip(")")), text) for style, text in page.spans if "rgba(255,140,0" in style
    ]
    opacity, tokens = zip(*shaded, strict=True)
    assert list(tokens) == [visible(t) or NOTHING for t in NASTY]
    assert list(opacity) == sorted(set(opacity), reverse=True)
    assert opacity[0] == pytest.approx(0.6)
    underlined = [text for style, text in page.spans if "underline" in style]
    assert underlined == ["one "] * len(NASTY)
    outlined = [text for style, text in page.spans if "dashed" in style]
    assert outlined == [visible(t) for t in NASTY[:2]]


def test_a_model_s_own_exemplars_make_cards(tmp_path):
    lens = Lens(tiny.build("olmoe"), tiny.tokenizer(), name="tiny-olmoe")
    path = tmp_path / "text.jsonl"
    texts = (f"A {i} naïve <b>text</b>\t{i * 7}, with é and ✓ in it." for i in range(40))
    path.write_text("\n".join(json.dumps({"text": text, "domain": "<html>"}) for text in texts))
    corpus = ml.corpus(str(path))
    tokenized = tokenize(corpus, lens.tokenizer, [], max_length=64)
    kept = TopExemplars(tokenized.splits, n_top=6, n_sample=40)
    found = capture(lens, corpus, consumers=[kept], out=tmp_path / "run", max_length=64, progress=False)
    assert isinstance(found, Run)
    counts = ExemplarCounts(top=6, quantiles=4, per_quantile=3, random=5, negatives=6)
    table = exemplar_table(kept, tokenized, lens.tokenizer, explain=counts, score=counts)
    found.write("exemplars", table)
    found.write("logit_lens", logit_lens(lens, kept, table))
    for expert in sorted(set(table.loc[table["layer"] == 1, "expert"])):
        card = found.card(f"L1.E{expert}", n=4)
        assert card.routing is not None
        assert card.routing["load"] == found.routing.query("layer == 1 and expert == @expert")["load"].item()
        assert card.promoted is not None
        assert len(card.promoted) == 5
        assert next(iter(card.groups)) == TOP
        assert list(card.groups)[-1] == NOT_ROUTED
        page = Page(card._repr_html_())
        for text in card.frame["text"]:
            assert visible(text) in page.text
