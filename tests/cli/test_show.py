"""``moe-lens show``: an expert in a terminal, in a pipe and as JSON."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from moe_lens.capture.run import open_run
from moe_lens.capture.shading import NOTHING, Mark, visible
from moe_lens.cli import render_card
from tests.capture.card_runs import NASTY, row, write_run
from tests.cli.conftest import Cli


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "runs" / "full")


def on_screen(run: Path, address: str, monkeypatch: pytest.MonkeyPatch, *, width: int = 100, **environ: str) -> str:
    """What a terminal of `width` columns is sent."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    screen = io.StringIO()

    def console(**settings) -> Console:
        given = {"file": screen, "force_terminal": True, "color_system": "truecolor", "width": width}
        return Console(**{**given, **settings})

    monkeypatch.setattr(render_card, "Console", console)
    render_card.card(open_run(run).card(address))
    return screen.getvalue()


def test_a_pipe_gets_every_part_and_the_token_in_brackets(cli: Cli, run: Path) -> None:
    outcome = cli("show", "L2.E1", "-o", run)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.last_line == str(run)
    for part in (
        "L2.E1", "600 tokens", "<b>markup</b>", "<[^>]+>", "same token AUROC .62 [.55, .69]", "promotes", "suppresses",
        "c0 N0 .60", "highest scores", "same token, not routed",
    ):  # fmt: skip
        assert part in outcome.out
    for token in NASTY:
        assert f"one two [[{visible(token) or NOTHING}]] and on" in outcome.out
    assert "the [[<script>alert(1)</script>]] elsewhere" in outcome.out


def test_no_control_character_of_a_token_reaches_the_terminal(cli: Cli, run: Path) -> None:
    shown = cli("show", "L2.E1", "-o", run).out
    assert not {"\x1b", "\t", "\u202e"} & set(shown)


def test_all_quarters_of_the_score_are_shown_and_n_says_how_many(cli: Cli, run: Path) -> None:
    few = cli("show", "2:3", "-o", run, "--n", "4").out
    many = cli("show", "2:3", "-o", run, "--n", "8").out
    for out, n in ((few, 10), (many, 16)):
        assert out.count("[[") == n
        for low in (0, 25, 50, 75):
            assert f"score quantiles {low} to {low + 25} %" in out


def test_several_experts_are_shown_each_once_in_the_order_given(cli: Cli, run: Path) -> None:
    out = cli("show", "L2.E3", "L2.E1", "2:3", "-o", run).out
    assert out.count("\nL2.E3\n") == 1
    assert out.index("\nL2.E3\n") < out.index("\nL2.E1\n")


def test_json_is_one_object_with_the_texts_whole(cli: Cli, run: Path) -> None:
    outcome = cli("show", "L2.E1", "--json", "-o", run)
    found = json.loads(outcome.out)
    (card,) = found["experts"]
    assert (found["directory"], card["address"]) == (str(run), "L2.E1")
    first = card["exemplars"][1]
    assert first["text"] == f"one two {NASTY[1]} and on"
    assert first["text"][first["char_start"] : first["char_end"]] == NASTY[1]
    assert first["routed_spans"] == [[0, 4], [8, 13]]
    assert card["labels"][0]["confidence"] == 3
    assert card["not_run"] == {}
    assert json.loads(cli("show", "L2.E3", "--json", "-o", run).out)["experts"][0]["labels"][0]["confidence"] is None


def test_the_newest_run_with_exemplars_is_read_by_default(cli: Cli, run: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "later", "routing")
    assert cli("show", "L2.E1").last_line == str(Path("runs") / "full")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["L2.E2"], "none of the tokens"),
        (["L2.E1", "L2.E9"], "no expert L2.E9"),
        (["L9.E1"], "layers 2"),
        (["expert"], "write it as L7.E12"),
        (["L2.E1", "--n", "0"], "--n"),
        ([], "EXPERT"),
        (["L2.E1", "-o", "nowhere"], "nowhere is no folder"),
        (["L2.E1", "-o", "bare"], "run moe-lens autointerp --model"),
    ],
)
def test_bad_input_is_one_sentence_and_shows_nothing(cli: Cli, run: Path, words: list[str], says: str) -> None:
    write_run(run.parent.parent / "bare", "routing")
    outcome = cli("show", *words)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert says in outcome.err


# terminals


def test_a_terminal_shades_by_score_and_underlines_what_else_was_routed(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = Text.from_ansi(on_screen(run, "L2.E1", monkeypatch))
    shaded, underlined = [], []
    for span in text.spans:
        style = Console().get_style(span.style) if isinstance(span.style, str) else span.style
        piece = text.plain[span.start : span.end]
        if style.bgcolor is not None and style.bgcolor.triplet is not None:
            shaded.append((piece, style.bgcolor.triplet))
        if style.underline:
            underlined.append(piece)
    routed = [(piece, colour) for piece, colour in shaded if colour.red == 255]
    assert [piece for piece, _ in routed] == [visible(t) or NOTHING for t in NASTY]
    blue = [colour.blue for _, colour in routed]
    assert blue == sorted(blue)
    assert blue[0] < blue[-1], "the higher the score, the stronger the orange"
    assert [piece for piece, colour in shaded if colour.red != 255] == [visible(t) for t in NASTY[:2]]
    assert "".join(underlined) == "one " * len(NASTY)
    assert "[[" not in text.plain


def test_a_terminal_without_colours_gets_brackets(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "two [[العربية]] and" in Text.from_ansi(on_screen(run, "L2.E1", monkeypatch, NO_COLOR="1")).plain


@pytest.mark.parametrize("width", [30, 61, 100])
def test_every_exemplar_is_one_line_of_the_terminal_with_its_token_in_one_column(
    run: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    lines = [
        line
        for address in ("L2.E1", "L2.E3")
        for line in Text.from_ansi(on_screen(run, address, monkeypatch, width=width, NO_COLOR="1")).plain.splitlines()
    ]
    shown = [line for line in lines if "[[" in line and "[[ ]]" not in line]
    assert len(shown) == len(NASTY) + 2 + 16
    assert all(cell_len(line) <= width for line in shown)
    assert len({cell_len(line[: line.index("[[")]) for line in shown}) == 1


@pytest.mark.parametrize("coloured", [True, False])
@pytest.mark.parametrize("width", [20, 40, 99])
@pytest.mark.parametrize("token", ["x", "中文字符" * 3, "e\u0301" * 30, "👩\u200d👩" * 4, "long" * 40])
def test_long_and_wide_text_is_cut_around_the_token(token: str, width: int, coloured: bool) -> None:
    around = ["字" * 50, "plain " * 20]
    values = row(1, [around[0], token, around[1]], 1)
    line = render_card.line(SimpleNamespace(**values), 5.0, width, coloured=coloured)
    assert cell_len(line.plain) <= width
    assert "…" in line.plain
    assert token[:1] in line.plain


def test_an_accent_is_not_left_without_its_letter() -> None:
    letters = [(c, Mark.PLAIN) for c in "ae\u0301b"]
    assert "".join(c for c, _ in render_card.clip(letters, 2, from_end=True)) == "…b"
    assert "".join(c for c, _ in render_card.clip(letters, 3)) == "ae\u0301b"
