"""Every number in the report's sentences is a claim, which `verify` takes from the tables again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import pandas as pd
import pytest

from moe_lens.capture.run import open_run
from moe_lens.report.page import sections_of
from moe_lens.report.parts import Answer, Answers, Prose
from tests.report import made

PLAIN = [r"L\d+\.E\d+", r"\bF1\b", r"\bk = 1\b", r"95 %", r"q ≤ 0\.05", r"each takes 30", r"[Ww]ith 6 random sets"]
"""Numbers that name something, or a level that the words fix; the last one is a note of the made manifest."""
_FAITHFULNESS = tuple(name for name in made.tables() if name.startswith("faithfulness"))
WAYS = [(), ("routing",), ("validation", "labels"), _FAITHFULNESS, ("routing", "probe", "comparison", "waterfall"),
        tuple(name for name in made.tables() if name != "waterfall")]  # fmt: skip
"""Runs with all tables and with some."""


def sentences(folder: Path) -> Iterator[tuple[str, str]]:
    """Section, and the HTML of each sentence in it."""
    for section in sections_of(open_run(folder)):
        yield section.id, str(section.lead)
        for part in section.parts:
            if isinstance(part, Prose) and "<details>" not in part.text:
                yield section.id, str(part.text)
            for answer in part.answers if isinstance(part, Answers) else ():
                if isinstance(answer, Answer):
                    bars = [piece.text for strip in answer.strips for piece in strip.pieces]
                    said = (answer.headline, *answer.said, *(strip.said for strip in answer.strips), *bars)
                    yield from ((section.id, str(text)) for text in said)


def plain_numbers(html: str) -> list[str]:
    text = re.sub(r"<data .*?</data>", "", html, flags=re.DOTALL)
    text = unescape(re.sub(r"<[^>]+>", "", text))
    return re.findall(r"\d[\d.,]*", re.sub("|".join(PLAIN), "", text))


@pytest.mark.parametrize("names", WAYS)
def test_no_number_in_a_sentence_is_plain(tmp_path: Path, names: tuple[str, ...]) -> None:
    folder = made.write_run(tmp_path / "run", *names)
    found = {(section, number, html) for section, html in sentences(folder) for number in plain_numbers(html)}
    assert not found


def test_every_section_with_sentences_about_tables_has_claims(full: Path) -> None:
    quoted = {section for section, html in sentences(full) if "<data " in html}
    assert quoted == {"findings", "routing", "probing", "experts", "trial", "faithfulness"}


def test_a_plain_number_would_be_found() -> None:
    html = '<data class="claim" title="a">3</data> of 16 experts such as L1.E2 have F1 above <b>0.75</b> and −0.004'
    assert plain_numbers(html) == ["16", "0.75", "0.004"]


def test_the_lead_of_the_trial_counts_what_the_table_holds(full: Path) -> None:
    (lead,) = [html for section, html in sentences(full) if section == "trial"]
    text = unescape(re.sub(r"<[^>]+>", "", lead))
    assert text.startswith(
        "Of 4 labels on trial, a sample of 9 that holds experts of all loads: 1 supported, 1 routing-only, 0 refuted, "
        "1 undecided, 1 underpowered. Of 2 false labels, 1 supported. "
    )


def test_the_lead_of_probing_names_the_null_beside_the_score(full: Path) -> None:
    (lead,) = [html for section, html in sentences(full) if section == "probing"]
    text = unescape(re.sub(r"<[^>]+>", "", lead))
    assert "reaches AUROC 0.700 [0.650, 0.750] in the MoE and 0.700 [0.650, 0.750] in the dense model" in text
    assert "with labels exchanged the same search reaches 0.700 [0.650, 0.750]. 5 of 5 concepts" in text


def test_probes_that_could_not_be_scored_say_so(tmp_path: Path) -> None:
    folder = made.write_run(tmp_path / "run", "routing", "probe", "comparison")
    table = made.comparison()
    table.loc[table["arm"] == "held_out", "moe"] = float("nan")
    table.to_parquet(folder / "comparison.parquet")
    (lead,) = [html for section, html in sentences(folder) if section == "probing"]
    assert "No concept has enough tokens and documents to score: use a larger corpus." in lead


def test_few_matches_are_said_and_their_gap_is_not_quoted(tmp_path: Path) -> None:
    folder = made.write_run(tmp_path / "run")
    with_matches(folder, share=0.25)
    text = faithfulness(folder)
    assert "Only 25% to 25% of their experts have a match of like load, too few to say more." in text
    with_matches(folder, share=0.75)
    text = faithfulness(folder)
    assert "Ahead of sets of like load are 1 of 2; 75% to 75% of their experts have such a match." in text
    section = next(s for s in sections_of(open_run(folder)) if s.id == "faithfulness")
    table = next(p for p in section.parts if getattr(p, "id", "") == "faithfulness-gaps")
    rows = table.rows  # type: ignore[union-attr]
    assert set(rows.loc[rows["control"] == "load-matched", "matched"]) == {0.75}
    assert rows.loc[rows["control"] == "random", "matched"].isna().all()


def faithfulness(folder: Path) -> str:
    said = " ".join(html for section, html in sentences(folder) if section == "faithfulness")
    return unescape(re.sub(r"<[^>]+>", "", said))


def with_matches(folder: Path, *, share: float) -> None:
    """Load-matched sets that do as well as the random ones, for a share of the experts."""
    for name, table in made.faithfulness().items():
        if name in ("faithfulness", "faithfulness_gaps", "faithfulness_draws"):
            like = table[table["control"] == "random"].assign(control="load-matched")
            if "matched_share" in like:
                like["matched_share"] = like["matched_share"].where(like["quantity"] != "bin", share)
            pd.concat([table, like]).to_parquet(folder / f"{name}.parquet")


def test_passes_that_differ_are_said_in_numbers_of_the_manifest(tmp_path: Path) -> None:
    folder = made.write_run(tmp_path / "run")
    manifest = made.manifest()
    manifest["commands"]["faithfulness"]["noise"] = {"nll": 0.0, "kl": 2e-6, "mean_nll": 3e-5}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert "two clean passes differ by 2.0e−06 nats of KL, 3.0e−05 of the mean." in faithfulness(folder)
