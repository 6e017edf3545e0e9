"""What a report says of where its numbers come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_lens.capture.run import open_run
from moe_lens.config import prompt_hashes, prompts_dir
from moe_lens.report.claims import Claims
from moe_lens.report.parts import Prose, Table
from moe_lens.report.sections.provenance import section
from tests.report import made


def provenance(folder: Path) -> Any:
    run = open_run(folder)
    return section(run, Claims(run))


def folded(folder: Path) -> list[str]:
    return [str(part.text) for part in provenance(folder).parts if isinstance(part, Prose)]


def used(folder: Path) -> dict[str, str]:
    table = next(part for part in provenance(folder).parts if getattr(part, "id", "") == "provenance-prompts")
    assert isinstance(table, Table)
    return dict(zip(table.rows["prompt"], table.rows["used"], strict=True))


def a_run(
    folder: Path, hashes: dict[str, str], *, explain: str = "", judge: str = "rule", scorer: str = "rule"
) -> Path:
    """A run whose tables say in which prompt's words labels were made, scored and judged."""
    made.write_run(folder, "routing", "exemplars")
    (folder / "manifest.json").write_text(json.dumps(made.manifest() | {"prompts": hashes}), encoding="utf-8")
    made.labels().assign(prompt_hash=explain).to_parquet(folder / "labels.parquet")
    made.label_scores().assign(scorer=scorer).to_parquet(folder / "label_scores.parquet")
    made.validation().assign(judge=judge).to_parquet(folder / "validation.parquet")
    return folder


def test_without_a_language_model_no_prompt_was_used(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "run", prompt_hashes())
    assert folded(folder) == ["No language model was asked in this run, so none of the prompts was used."]
    assert set(used(folder).values()) == {"no"}


@pytest.mark.parametrize(
    ("told", "names"),
    [
        ({"explain": prompt_hashes()["facets.md"]}, {"facets.md"}),
        ({"scorer": "fuzz"}, {"fuzz.md"}),
        ({"judge": "openai:m"}, {"detection.md"}),
        ({"explain": prompt_hashes()["explain.md"], "scorer": "detection"}, {"explain.md", "detection.md"}),
    ],
)
def test_prompts_that_were_used_are_shown_whole_and_escaped(
    tmp_path: Path, told: dict[str, str], names: set[str]
) -> None:
    from markupsafe import escape

    folder = a_run(tmp_path / "run", prompt_hashes(), **told)
    assert {name for name, found in used(folder).items() if found == "yes"} == names
    texts = folded(folder)
    assert len(texts) == len(names)
    for name in names:
        (text,) = [text for text in texts if f"<summary>{name}, sha256 {prompt_hashes()[name]}</summary>" in text]
        assert str(escape((prompts_dir() / name).read_text(encoding="utf-8"))) in text


def test_a_prompt_of_another_version_is_not_shown_as_the_one_that_was_used(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "run", {**prompt_hashes(), "explain.md": "old"}, explain="old")
    (text,) = folded(folder)
    assert "explain.md, sha256 old" in text
    assert "another version" in text
    assert "You " not in text


def test_a_long_setting_is_cut_in_the_table_and_whole_below_it(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "run", {})
    manifest = made.manifest()
    manifest["commands"]["validate"]["experts"] = [f"L{n}.E{n}" for n in range(100)] + [made.SCRIPT]
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    parts = provenance(folder).parts
    values = dict(parts[0].rows.to_numpy().tolist())
    assert values["commands.validate.experts"].endswith("…")
    assert len(values["commands.validate.experts"]) < 210
    whole = str(parts[1].text)
    assert "commands.validate.experts" in whole
    assert "L99.E99" in whole
    assert "&lt;script&gt;" in whole
    assert "<script" not in whole
