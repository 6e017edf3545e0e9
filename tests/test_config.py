"""The settings' small languages, the YAML file, and the prompts' hashes."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_lens.config import ProbeConfig, parse_ints, parse_names, parse_size, prompt_hashes, prompts_dir
from moe_lens.errors import BadConfig


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("4GB", 4 * 10**9), ("4gib", 4 * 2**30), ("1.5 MB", 1_500_000), ("512", 512), (77, 77), ("2k", 2000), ("8B", 8)],
)
def test_a_size_is_read_in_powers_of_1000_or_1024(text: str | int, n_bytes: int) -> None:
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize("text", ["", "4XB", "-1GB", "GB", "0", "1e9", "4 G B"])
def test_a_bad_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(BadConfig, match="write it as 4GB"):
        parse_size(text)


@given(st.lists(st.integers(0, 10_000), min_size=1))
def test_numbers_survive_writing_and_reading(numbers: list[int]) -> None:
    assert parse_ints(",".join(map(str, numbers))) == list(dict.fromkeys(numbers))


def test_ranges_include_both_ends_and_keep_order() -> None:
    assert parse_ints("9,4-6,5") == [9, 4, 5, 6]
    assert parse_ints([3, "0-1"]) == [3, 0, 1]


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,,2", "-1", "1.5"])
def test_bad_numbers_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(BadConfig, match="write them as 0,2,4-6"):
        parse_ints(text)


def test_names_are_split_at_commas_and_repeats_dropped() -> None:
    assert parse_names(["a, b", "c,a,"]) == ["a", "b", "c"]


def write(folder: Path, text: str) -> Path:
    file = folder / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_flags_override_the_file_and_the_file_overrides_the_defaults(tmp_path: Path) -> None:
    file = write(tmp_path, "model: a\nmax-memory: 2GB\nlayers: [0, 2]\nk: 1,8\nseed: 5\nall_cells: true\n")
    settings = ProbeConfig.build(file, model="b", seed=None, limit="7")
    assert (settings.model, settings.max_memory, settings.layers, settings.k) == ("b", 2 * 10**9, [0, 2], [1, 8])
    assert (settings.seed, settings.limit, settings.all_cells, settings.dataset) == (5, 7, True, "bundled:")


def test_batch_size_is_a_number_or_auto() -> None:
    assert ProbeConfig.build(model="m", batch_size="16").batch_windows == 16
    assert ProbeConfig.build(model="m", batch_size="auto").batch_windows is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: a\nconcpets: x", r"unknown setting 'concpets' in .*, did you mean 'concepts'\?"),
        ("model: a\nlimit: 0", "--limit cannot be '0'"),
        ("model: a\nseed: soon", "--seed cannot be 'soon'"),
        ("model: a\nbatch-size: huge", "--batch-size cannot be 'huge'"),
        ("- model", "is a list"),
        ("model: [", "is not YAML at line"),
        ("seed: 1", "no model was named"),
        ("", "no model was named"),
    ],
)
def test_a_bad_file_is_refused_in_the_users_words(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(BadConfig, match=message) as caught:
        ProbeConfig.build(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="No such file"):
        ProbeConfig.build(tmp_path / "none.yaml", model="m")


def test_every_setting_has_a_help_text() -> None:
    assert [name for name, field in ProbeConfig.model_fields.items() if not field.description] == []


def test_every_prompt_is_hashed_by_content_and_carries_a_version() -> None:
    hashes = prompt_hashes()
    assert {"explain.md", "facets.md", "detection.md", "fuzz.md", "trigger.md"} <= hashes.keys()
    for name, found in hashes.items():
        content = (prompts_dir() / name).read_bytes()
        assert found == hashlib.sha256(content).hexdigest()
        assert re.match(rb"---\nversion: [1-9]\d*\n", content)
