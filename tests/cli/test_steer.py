"""``moe-lens steer`` as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from tests.causal.steering.cycle import cycle
from tests.cli.conftest import Cli, contents
from tests.models import tiny


@pytest.fixture(scope="session")
def cycle_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that writes abcd, saved."""
    return tiny.save(cycle().model, tmp_path_factory.mktemp("models") / "cycle")


def test_texts_stand_side_by_side_and_nothing_is_written(cli: Cli, cycle_folder: Path, tmp_path: Path) -> None:
    words = ("--prompt", "ab", "--suppress", "L0.E1", "--controls", 2, "--target", "c", "--max-new-tokens", 8)
    outcome = cli("steer", "--model", cycle_folder, *words)
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    side_by_side = next(line for line in lines if line.split()[1:] == ["cdabcdab", "dabdabda", "cdacdacd"])
    head = lines[lines.index(side_by_side) - 2]
    assert head.split() == ["after", "clean", "steered:", "L0.E1", "control_1:", "L0.E0"]
    assert any(line.startswith("With L0.E1 suppressed by") for line in lines)
    more = cli("steer", "--model", cycle_folder, *words, "--details").out.splitlines()
    assert ["steered", "L0.E1"] in [line.split()[:2] for line in more]
    assert contents(tmp_path) == {}


def test_with_a_folder_the_table_is_written_and_shown_again(cli: Cli, cycle_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("ab\n\ndab\n")
    words = ("--model", cycle_folder, "--prompts", "prompts.txt", "--force", "L0.E5", "--controls", 1, "-o", "run")
    first = cli("steer", *words, "--max-new-tokens", 6)
    assert (first.code, first.last_line) == (0, "run")
    table = pd.read_parquet("run/steering.parquet")
    assert table.groupby("arm").size().to_dict() == {"clean": 2, "steered": 2, "control_1": 2}
    assert set(table.loc[table["arm"] == "steered", "text"]) == {"!!!!!!"}
    before = contents(tmp_path)
    assert cli("steer", *words, "--max-new-tokens", 6).out == first.out
    assert contents(tmp_path) == before
    assert cli("steer", *words, "--max-new-tokens", 6, "--no-resume").out == first.out
    assert contents(tmp_path)["run/manifest.json"] != before["run/manifest.json"]  # its times


def test_json_is_one_object(cli: Cli, cycle_folder: Path) -> None:
    words = ("--prompt", "ab", "--bias", "L0.E1=-2,L0.E4=1", "--kl", "0.5", "--controls", 1, "--target-text", "cd")
    found = json.loads(cli("steer", "--model", cycle_folder, *words, "--json").out)
    assert [arm["arm"] for arm in found["arms"]] == ["clean", "steered", "control_1"]
    assert found["arms"][1]["kl"] == pytest.approx(0.5, abs=0.05)
    assert found["settings"]["pushes"] == [["L0.E1", "bias", -2], ["L0.E4", "bias", 1]]
    assert found["contrast"]["n_controls"] in (0, 1)
    assert found["run"] is None


def test_jsonl_holds_texts_objects_and_conversations(cli: Cli, cycle_folder: Path) -> None:
    lines = ['"ab"', '{"prompt": "abc"}', '{"text": "abcd"}']
    Path("prompts.jsonl").write_text("\n".join(lines))
    words = ("--prompts", "prompts.jsonl", "--prompt", "a", "--suppress", "L0.E1", "--controls", 0)
    found = json.loads(cli("steer", "--model", cycle_folder, *words, "--max-new-tokens", 4, "--json").out)
    assert found["settings"]["prompts"] == ["a", "ab", "abc", "abcd"]
    Path("prompts.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}')
    assert "no chat template" in cli("steer", "--model", cycle_folder, *words).err


def test_kl_none_takes_the_bias_as_it_is(cli: Cli, cycle_folder: Path) -> None:
    words = ("--prompt", "ab", "--bias", "L0.E1=-0.5", "--kl", "none", "--controls", 0)
    found = json.loads(cli("steer", "--model", cycle_folder, *words, "--json").out)
    assert found["arms"][1]["strength"] == 0.5


def test_a_text_without_blanks_is_folded_and_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    from moe_lens.cli.render_steer import texts

    arms = {"clean": "clean", "steered": "steered", "control_1": "control_1"}
    written = {"clean": "x" * 90, "steered": "y" * 90, "control_1": "z" * 90}
    texts(SimpleNamespace(side_by_side=arms, settings={"prompts": ["a"]}, text=lambda _, arm: written[arm]))  # type: ignore
    out = capsys.readouterr().out
    assert (out.count("x"), out.count("y"), out.count("z"), out.count("…")) == (90, 90, 90, 0)


def test_control_characters_in_a_text_are_spelled_out() -> None:
    from moe_lens.cli.terminal import printable

    assert printable("a\x1b[31mb\nc\r") == "a\\x1b[31mb\nc\\r"


@pytest.mark.parametrize("json_too", [False, True])
def test_a_dry_run_counts_and_loads_no_weights(cli: Cli, cycle_folder: Path, monkeypatch, json_too: bool) -> None:
    import moe_lens

    monkeypatch.setattr(moe_lens, "load", lambda *_args, **_kwargs: pytest.fail("weights were read"))
    words = ("--prompt", "a", "--prompt", "b", "--suppress", "L0.E1", "--controls", 3, "--dry-run", "-o", "run")
    outcome = cli("steer", "--model", cycle_folder, *words, *(["--json"] if json_too else []))
    assert outcome.code == 0
    assert not Path("run").exists()
    if json_too:
        assert {k: json.loads(outcome.out)[k] for k in ("prompts", "texts", "measurements")} == {
            "prompts": 2, "texts": 10, "measurements": 60,
        }  # fmt: skip
    else:
        assert "2 prompts x 5 arms = 10 texts" in outcome.out


PROMPT, EXPERT = ("--prompt", "ab"), ("--suppress", "L0.E1")
WRONG = {
    "too few experts left": (
        (*PROMPT, "--suppress", "L0.E0,L0.E1,L0.E2,L0.E3,L0.E4"), ["has 1 left", "suppress at most 4"],
    ),
    "too many forced": ((*PROMPT, "--force", "L0.E0,L0.E1,L0.E2"), ["3 experts are forced", "at most 2"]),
    "no such expert": ((*PROMPT, "--suppress", "L0.E6"), ["no expert 6", "0-5"]),
    "an unreadable expert": ((*PROMPT, "--force", "E6"), ["'E6'", "L7.E12"]),
    "a neuron": ((*PROMPT, "--force", "L0.E1.N3"), ["whole experts", "name L0.E1"]),
    "no prompt": (EXPERT, ["no prompt", "--prompt TEXT or --prompts FILE"]),
    "an empty prompt": (("--prompt", " ", *EXPERT), ["prompt 1 is empty"]),
    "no experts": (PROMPT, ["nothing to steer", "L2.E3"]),
    "suppressed and forced": ((*PROMPT, *EXPERT, "--force", "L0.E1"), ["L0.E1", "choose one"]),
    "two biases": ((*PROMPT, "--bias", "L0.E1=1,L0.E1=2"), ["L0.E1 has two biases"]),
    "an unreadable bias": ((*PROMPT, "--bias", "L0.E1"), ["--bias", "L2.E3=2.0"]),
    "a wrong expression": ((*PROMPT, *EXPERT, "--target", "[a"), ["'[a' is no regular expression", "escape"]),
    "two targets": ((*PROMPT, *EXPERT, "--target", "a", "--target-text", "b"), ["two targets"]),
    "a kl of 0": ((*PROMPT, *EXPERT, "--kl", "0"), ["--kl", "'0'"]),
    "a kl of words": ((*PROMPT, *EXPERT, "--kl", "much"), ["--kl", "'much'"]),
    "no tokens": ((*PROMPT, *EXPERT, "--max-new-tokens", "0"), ["--max-new-tokens"]),
    "a text too long": (("--prompt", "a" * 60, *EXPERT), ["60 tokens", "holds 64"]),
    "a missing file": (("--prompts", "none.txt", *EXPERT), ["none.txt", "readable"]),
    "an empty file": (("--prompts", "empty.txt", *EXPERT), ["empty.txt holds no prompt"]),
    "a file of another kind": (("--prompts", "table.csv", *EXPERT), ["neither .txt nor .jsonl"]),
    "broken JSON": (("--prompts", "broken.jsonl", *EXPERT), ["broken.jsonl:1 is not JSON"]),
    "JSON without a prompt": (("--prompts", "other.jsonl", *EXPERT), ["other.jsonl:1 has no 'prompt'"]),
    "a setting of other commands": ((*PROMPT, *EXPERT, "--config", "text.yaml"), ["unknown setting 'dataset'"]),
    "an output that is a file": ((*PROMPT, *EXPERT, "-o", "empty.txt"), ["empty.txt is a file"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_sentence_before_weights_are_read(
    cli: Cli, cycle_folder: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    import moe_lens

    monkeypatch.setattr(moe_lens, "load", lambda *_args, **_kwargs: pytest.fail("weights were read first"))
    files = {"empty.txt": "\n", "table.csv": "a", "broken.jsonl": "{", "other.jsonl": "{}", "text.yaml": "dataset: x"}
    for name, text in files.items():
        Path(name).write_text(text)
    words, expected = WRONG[case]
    outcome = cli("steer", "--model", cycle_folder, *words)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1), outcome
    for word in expected:
        assert word in outcome.err


def test_a_dense_model_is_refused(cli: Cli, dense_folder: Path) -> None:
    outcome = cli("steer", "--model", dense_folder, *PROMPT, *EXPERT)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert "is a dense model" in outcome.err


def test_options_about_a_text_are_not_offered(cli: Cli) -> None:
    text = cli("steer", "--help").out
    assert "--dataset" not in text
    assert "--layers" not in text
    assert "--suppress EXPERTS" in text
