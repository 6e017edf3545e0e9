"""Wrong input: exit 2, one sentence that names the fix, and nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Cli

MOE, DENSE = "<moe>", "<dense>"


@pytest.fixture
def files(tmp_path: Path, text_file: Path) -> Path:
    """A folder of inputs that are wrong in one way each."""
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "prose.jsonl").write_text("this is no JSON\n")
    (tmp_path / "other.jsonl").write_text('{"body": "words"}\n')
    (tmp_path / "text.parquet").write_text("not parquet")
    (tmp_path / "text.csv").write_text("a,b\n")
    (tmp_path / "bare").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "keep.txt").write_text("mine")
    (tmp_path / "wrong.yaml").write_text("model: m\ncncepts: a\n")
    (tmp_path / "latin1.txt").write_bytes("Größe\ncafé\nnaïve\n".encode("latin-1"))
    (tmp_path / "few.txt").write_text("".join(f"{letter} word or two 12\n" for letter in "abcdefghijkl"))
    for name, pattern in {"never": "qqzzqq", "every": "(?s).+", "slow": "(a|aa)+$", "end": "$"}.items():
        (tmp_path / f"{name}.yaml").write_text(f"- name: {name}\n  regex: '{pattern}'\n")
    shutil.copy(text_file, tmp_path / "good.jsonl")
    trap = json.dumps({"text": "a" * 100 + "!"})
    (tmp_path / "trap.jsonl").write_text(text_file.read_text(encoding="utf-8") + "\n" + trap + "\n")
    return tmp_path


CASES = {
    "unknown bundled model": (["--model", "bundled:tiny-mo"], ["bundled:tiny-mo", "did you mean 'bundled:tiny-moe'"]),
    "unknown hub id": (["--model", "nobody/nothing"], ["nobody/nothing", "path of a folder"]),
    "a path that is not there": (["--model", "./no/such"], ["./no/such", "check the path"]),
    "a path without config": (["--model", "bare"], ["no config.json", "save_pretrained"]),
    "a dense model as --model": (["--model", DENSE], ["dense", "--baseline"]),
    "an unknown baseline": (["--model", MOE, "--baseline", "bundled:nope"], ["bundled:nope", "bundled:tiny-dense"]),
    "an unknown concept": (["--model", MOE, "--concepts", "is_opertor"], ["is_opertor", "did you mean 'is_operator'"]),
    "a layer out of range": (["--model", MOE, "--layers", "0,7"], ["no layer 7", "0,1"]),
    "unreadable layers": (["--model", MOE, "--layers", "all"], ["--layers", "'all'", "0,2,4-6"]),
    "unreadable k": (["--model", MOE, "--k", "few"], ["--k", "'few'", "0,2,4-6"]),
    "an expert out of range": (["--model", MOE, "--experts", "2,9"], ["no expert 9", "0-5"]),
    "an address out of range": (["--model", MOE, "--experts", "L1.E6"], ["no expert 6", "0-5"]),
    "an address in no layer": (["--model", MOE, "--experts", "L5.E0"], ["no layer 5"]),
    "an unreadable address": (["--model", MOE, "--experts", "seven"], ["seven", "L7.E12"]),
    "an empty corpus": (["--model", MOE, "--dataset", "empty.jsonl"], ["empty.jsonl", "give"]),
    "a corpus of blank lines": (["--model", MOE, "--dataset", "blank.txt"], ["blank.txt", "give"]),
    "prose called jsonl": (["--model", MOE, "--dataset", "prose.jsonl"], ["prose.jsonl"]),
    "a missing text column": (["--model", MOE, "--dataset", "other.jsonl"], ["other.jsonl", "body"]),
    "text called parquet": (["--model", MOE, "--dataset", "text.parquet"], ["text.parquet"]),
    "a suffix that is not read": (["--model", MOE, "--dataset", "text.csv"], [".csv", ".jsonl"]),
    "a corpus that is not there": (["--model", MOE, "--dataset", "godo.jsonl"], ["godo.jsonl", "good.jsonl"]),
    "an output that is a file": (["--model", MOE, "-o", "good.jsonl"], ["is a file"]),
    "an output with other things": (["--model", MOE, "-o", "notes"], ["no moe-lens run"]),
    "a bad size": (["--model", MOE, "--max-memory", "4 apples"], ["--max-memory", "4 apples", "4GB"]),
    "no documents": (["--model", MOE, "--limit", "0"], ["--limit", "greater than or equal to 1"]),
    "k beyond the neurons": (["--model", MOE, "--k", "1,1000"], ["--k 1000", "neurons of an expert", "lower --k"]),
    "too few documents": (
        ["--model", MOE, "--dataset", "few.txt"],
        ["few.txt has 12 documents", "needs 10 to select, 5 to validate, 5 to test", "give at least 20"],
    ),
    "a limit that leaves too few documents": (["--model", MOE, "--max-tokens", "60"], ["are read", "raise the limit"]),
    "no line of UTF-8": (["--model", MOE, "--dataset", "latin1.txt"], ["latin1.txt", "3 not UTF-8", "give a source"]),
    "a concept that never matches, alone": (
        ["--model", MOE, "--concepts", "never.yaml"],
        ["'never' matches no token", "choose or write other"],
    ),
    "a concept that always matches, alone": (
        ["--model", MOE, "--concepts", "every.yaml"],
        ["'every' matches every token", "choose or write other"],
    ),
    "a catastrophic expression": (
        ["--model", MOE, "--concepts", "slow.yaml", "--dataset", "trap.jsonl"],
        ["'slow'", "more than 0.2 s", "'trap.jsonl:81'", "without a repeat inside a repeat"],
    ),
    "an expression of nothing": (["--model", MOE, "--concepts", "end.yaml"], ["'end'", "only the empty string"]),
    "a wrong setting in the file": (["--config", "wrong.yaml"], ["cncepts", "did you mean 'concepts'"]),
}


NEEDS_TOKENS = [
    "a limit that leaves too few documents",
    "a concept that never matches, alone",
    "a concept that always matches, alone",
]
"""Cases that only show once the text is in tokens; the others are refused before weights are read."""


@pytest.mark.parametrize("dry_run", [False, True], ids=["run", "dry-run"])
@pytest.mark.parametrize("case", CASES)
def test_wrong_input_is_one_sentence_and_leaves_nothing(
    cli: Cli, files: Path, moe_folder: Path, dense_folder: Path, monkeypatch, case: str, dry_run: bool
) -> None:
    import moe_lens
    from moe_lens.corpus.tagging import Tagger

    monkeypatch.setitem(Tagger.__init__.__kwdefaults__, "timeout", 0.2)
    if case not in NEEDS_TOKENS:
        monkeypatch.setattr(moe_lens, "load", lambda *_args, **_kwargs: pytest.fail("weights were read first"))
    words, expected = CASES[case]
    words = [{MOE: str(moe_folder), DENSE: str(dense_folder)}.get(word, word) for word in words]
    defaults = {"--dataset": "good.jsonl", "-o": "out", "--k": "1"}
    for option, value in defaults.items():
        words += [] if option in words else [option, value]
    before = snapshot(files)
    outcome = cli("probe", *words, *(["--dry-run"] if dry_run else []))
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("moe-lens: ")
    assert outcome.err.count("\n") == 1, outcome.err
    assert "Traceback" not in outcome.err
    for word in expected:
        assert word in outcome.err
    assert snapshot(files) == before


def damaged_text(folder: Path) -> None:
    """The good text with a BOM, CRLF, and lines that are skipped: no UTF-8, a lone surrogate, empty."""
    lines = (folder / "good.jsonl").read_bytes().splitlines()
    lines[3:3] = [b'{"text": "caf\xe9"}', b'{"text": "\\ud800"}', b'{"text": " "}', b'{"text": "nul \\u0000 alpha 12"}']
    (folder / "damaged.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))


@pytest.mark.parametrize("dry_run", [False, True], ids=["run", "dry-run"])
def test_what_is_only_partly_bad_is_said_and_left_out(
    cli: Cli, files: Path, moe_folder: Path, caplog: pytest.LogCaptureFixture, dry_run: bool
) -> None:
    damaged_text(files)
    concepts = "never.yaml,every.yaml,contains_digit"
    words = ["--model", moe_folder, "--dataset", "damaged.jsonl", "--concepts", concepts, "--k", "1", "-o", "out"]
    outcome = cli("probe", *words, *(["--dry-run"] if dry_run else []))
    assert outcome.code == 0
    assert {record.getMessage() for record in caplog.records if record.name == "moe_lens"} == {
        "damaged.jsonl: texts left out: 2 not UTF-8, 1 empty",
        "in damaged.jsonl concept 'never' matches no token and concept 'every' matches every token: not scored",
    }
    if not dry_run:
        import pandas as pd

        texts = json.loads(Path("out/manifest.json").read_text())["commands"]["probe"]["texts"]
        assert texts == {"invalid_utf8": 2, "empty": 1, "read_in_windows": 80}
        status = pd.read_parquet("out/probe.parquet").groupby("concept")["status"].unique()
        assert set(status["never"]) == set(status["every"]) == {"too_few"}
        assert "ok" in status["contains_digit"]


@pytest.mark.parametrize("dry_run", [False, True], ids=["run", "dry-run"])
def test_a_tokenizer_without_offsets_is_refused_before_weights_are_read(
    cli: Cli, moe_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dry_run: bool
) -> None:
    import transformers

    import moe_lens

    monkeypatch.setattr(moe_lens, "load", lambda *_args, **_kwargs: pytest.fail("weights were read first"))
    folder = shutil.copytree(moe_folder, tmp_path / "model")
    no_tokenizer(folder)
    (folder / "vocab.json").write_text(json.dumps({"<unk>": 0, "a</w>": 1, "b</w>": 2, "a": 3, "b": 4}))
    (folder / "merges.txt").write_text("#version\na b 1\n")
    transformers.CTRLTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    words = ["--model", "model", "--dataset", text_file, "--k", "1", "-o", "out", *(["--dry-run"] if dry_run else [])]
    outcome = cli("probe", *words)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert "CTRLTokenizer reports no character offsets" in outcome.err
    assert "tokenizer.json" in outcome.err
    assert not (tmp_path / "out").exists()


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


def test_inspect_refuses_what_is_no_model(cli: Cli, files: Path) -> None:
    for name in ("bare", "good.jsonl", "./none", "nobody/nothing", "bundled:x"):
        outcome = cli("inspect", name)
        assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)


def test_a_dense_model_is_welcome_in_inspect(cli: Cli, dense_folder: Path) -> None:
    outcome = cli("inspect", dense_folder)
    assert outcome.code == 0
    assert "dense" in outcome.out


def edit(folder: Path, **changes: object) -> None:
    """Change the config of a checkpoint."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def encoder_decoder(folder: Path) -> None:
    import transformers

    transformers.T5Config(d_model=16, num_layers=1).save_pretrained(folder)


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("token*"):
        file.unlink()


def truncated(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def quantised(**settings: object) -> Callable[[Path], object]:
    return lambda at: edit(at, quantization_config=settings)


BROKEN: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "encoder-decoder": (encoder_decoder, ["encoder-decoder", "give a decoder-only"]),
    "fp8": (quantised(quant_method="fp8"), ["with fp8", "FineGrainedFP8Config(dequantize=True)", "save_pretrained"]),
    "mxfp4": (quantised(quant_method="mxfp4"), ["with mxfp4", "Mxfp4Config(dequantize=True)", "save_pretrained"]),
    "gptq": (quantised(quant_method="gptq", bits=4), ["with gptq", "give the original bfloat16 checkpoint"]),
    "awq": (quantised(quant_method="awq"), ["with awq", "give the original bfloat16 checkpoint"]),
    "4 bits": (quantised(quant_method="bitsandbytes", load_in_4bit=True), ["with bitsandbytes", "give the original"]),
    "8 bits, no method": (quantised(load_in_8bit=True), ["with bitsandbytes", "give the original"]),
    "an unknown method": (quantised(quant_method="zork"), ["with zork", "give the original bfloat16 checkpoint"]),
    "no method": (quantised(bits=4), ["an unnamed method", "give the original bfloat16 checkpoint"]),
    "gptq that claims to dequantise": (quantised(quant_method="gptq", dequantize=True), ["with gptq"]),
    "too many experts per token": (
        lambda at: edit(at, num_experts_per_tok=9), ["each token to 9 of 6 experts", "correct the number"],
    ),
    "a web page as tokenizer": (
        lambda at: (at / "tokenizer.json").write_text("<html>"), ["tokenizer.json", "is damaged: download it again"],
    ),
    "no tokenizer": (no_tokenizer, ["has no tokenizer", "tokenizer.json"]),
    "truncated weights": (truncated, ["model.safetensors", "is damaged: download it again"]),
    "a web page as weights": (
        lambda at: (at / "model.safetensors").write_text("<html>404</html>" * 9), ["is damaged: download it again"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("command", ["doctor", "probe"])
@pytest.mark.parametrize("case", BROKEN)
def test_a_checkpoint_that_cannot_be_used_is_one_sentence(
    cli: Cli, moe_folder: Path, text_file: Path, tmp_path: Path, case: str, command: str
) -> None:
    damage, expected = BROKEN[case]
    folder = shutil.copytree(moe_folder, tmp_path / "model")
    damage(folder)
    words = ["doctor", "model"] if command == "doctor" else ["probe", "--model", "model", "--dataset", text_file]
    outcome = cli(*words)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    for word in (*expected, "model"):
        assert word in outcome.err


@pytest.mark.parametrize("settings", [{"quant_method": "gptq"}, {"quant_method": "zork"}, {"bits": 4}])
def test_inspect_describes_what_cannot_be_loaded(cli: Cli, moe_folder: Path, tmp_path: Path, settings: dict) -> None:
    folder = shutil.copytree(moe_folder, tmp_path / "model")
    edit(folder, quantization_config=settings)
    outcome = cli("inspect", "model")
    assert (outcome.code, outcome.err) == (0, "")
    assert f"{settings.get('quant_method', 'an unnamed method')} (needs plain weights" in outcome.out


@pytest.mark.parametrize("dry_run", [False, True], ids=["run", "dry-run"])
def test_a_quantised_baseline_is_refused_before_weights_are_read(
    cli: Cli, moe_folder: Path, dense_folder: Path, text_file: Path, tmp_path: Path, monkeypatch, dry_run: bool
) -> None:
    import moe_lens

    monkeypatch.setattr(moe_lens, "load", lambda *_args, **_kwargs: pytest.fail("weights were read first"))
    edit(shutil.copytree(dense_folder, tmp_path / "twin"), quantization_config={"quant_method": "awq"})
    words = ("--model", moe_folder, "--baseline", "twin", "--dataset", text_file, *(["--dry-run"] if dry_run else []))
    outcome = cli("probe", *words)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert "'twin' is quantised with awq" in outcome.err


def test_inspect_refuses_more_experts_per_token_than_there_are(cli: Cli, moe_folder: Path, tmp_path: Path) -> None:
    edit(shutil.copytree(moe_folder, tmp_path / "model"), num_experts_per_tok=7)
    outcome = cli("inspect", "model")
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert "each token to 7 of 6 experts: correct" in outcome.err


@pytest.mark.parametrize("command", ["inspect", "doctor"])
def test_a_package_that_a_model_needs_is_named(cli: Cli, tmp_path: Path, monkeypatch, command: str) -> None:
    import transformers

    def needs_timm(*_args: object, **_kwargs: object) -> None:
        raise ImportError("TimmWrapperModel requires the timm library: `pip install timm`. Please restart.")

    transformers.OlmoeConfig(hidden_size=16, num_hidden_layers=1).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_config", needs_timm)
    outcome = cli(command, "model")
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert "needs the package timm, which is not installed: pip install timm" in outcome.err


def test_a_checkpoint_that_lacks_a_tensor_of_one_expert_is_refused(cli: Cli, tmp_path: Path) -> None:
    """transformers stacks experts on loading and raises a RuntimeError."""
    from safetensors.torch import load_file, save_file
    from transformers.utils import logging

    from tests.models import tiny

    weights = tiny.save(tiny.build("mixtral"), tmp_path / "model") / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.0.block_sparse_moe.experts.0.w1.weight"]
    save_file(tensors, weights, {"format": "pt"})
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # as the command does where it is the first to import transformers
    try:
        outcome = cli("doctor", "model")
    finally:
        logging.set_verbosity(before)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert "'model' lack tensors of some experts" in outcome.err
    assert "download the checkpoint again" in outcome.err


@pytest.mark.parametrize("command", ["inspect", "doctor"])
def test_an_old_transformers_is_named(
    cli: Cli, moe_folder: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    import transformers

    monkeypatch.setattr(transformers, "__version__", "5.6.2")
    outcome = cli(command, moe_folder)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == "moe-lens: transformers 5.6.2 is too old: pip install 'transformers>=5.7'\n"


DOCTOR = {
    "a layer out of range": ("L9.E0", ["no experts in layer 9", "--experts", "0, 1"]),
    "an expert out of range": ("L0.E99", ["no expert 99", "L0.E0 to L0.E5"]),
    "an unreadable address": ("L0.E1,nonsense", ["'nonsense'", "L7.E12"]),
    "a neuron": ("L0.E1.N2", ["is a neuron", "L0.E1"]),
    "every expert of a layer": (
        ",".join(f"L1.E{e}" for e in range(6)),
        ["all 6 experts of layer 1", "leave at least one"],
    ),
    "no expert": (",", ["names no expert", "L1.E3,L2.E0"]),
}


@pytest.mark.parametrize("case", DOCTOR)
def test_experts_that_doctor_cannot_ablate_are_refused_before_loading(
    cli: Cli, moe_folder: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    import moe_lens

    monkeypatch.setattr(moe_lens, "load", lambda *_args, **_kwargs: pytest.fail("weights were read first"))
    experts, expected = DOCTOR[case]
    outcome = cli("doctor", moe_folder, "--experts", experts)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    for word in expected:
        assert word in outcome.err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((DENSE,), ["is a dense model", "give a Mixture-of-Experts model"]),
        ((MOE, "--dtype", "int3"), ["int3", "use bfloat16"]),
        ((MOE, "--device", "warp"), ["warp", "use cpu"]),
        ((MOE, "--device", "meta"), ["meta", "use cpu"]),
        ((MOE, "--device-map", "foo"), ["'foo'", "auto, balanced, balanced_low_0, sequential", "cpu"]),
        ((MOE, "--device-map", "cuda:77"), ["'cuda:77'", "auto, balanced"]),
        ((MOE, "--kernel", "fast"), ["fast", "native"]),
        (("./none",), ["./none", "check the path"]),
    ],
)
def test_doctor_refuses_what_it_cannot_examine(
    cli: Cli, moe_folder: Path, dense_folder: Path, words: tuple[str, ...], expected: list[str]
) -> None:
    outcome = cli("doctor", *({MOE: str(moe_folder), DENSE: str(dense_folder)}.get(word, word) for word in words))
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    for word in expected:
        assert word in outcome.err
