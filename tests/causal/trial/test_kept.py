"""A trial that was killed goes on from the measurements that it kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from moe_lens.causal.effects import Effects
from moe_lens.causal.trial.kept import Kept
from moe_lens.causal.trial.measured import CoSelected, Measured
from moe_lens.causal.trial.run import validate
from moe_lens.corpus.batches import tokenize
from moe_lens.errors import WriteFailed
from moe_lens.types import ExpertAddress
from tests.causal.trial.made import LABELS, made, text

TEXT, EXPERT = text(120), ExpertAddress(0, 3)
SAME = {"positions": "all", "horizon": 1, "seed": 0}


def trial(store: Path | None, **options):
    settings = {"progress": False, "draws": 200, "null_labels": ("other-expert",), **options}
    return validate(made(), TEXT, LABELS, store=store, **settings).frame


@pytest.fixture
def passes(monkeypatch):
    """Edits that were run, and how many more may be."""

    class Counter(list):
        most = 10**6

    counter, of_each = Counter(), Effects.of_each

    def counted(self, edits, **options):
        if len(counter) >= counter.most:
            raise KeyboardInterrupt
        counter.extend(edits)
        return of_each(self, edits, **options)

    monkeypatch.setattr(Effects, "of_each", counted)
    return counter


def test_what_is_kept_is_not_measured_again_and_gives_the_same_table(tmp_path, passes):
    first, n_passes = trial(tmp_path), len(passes)
    assert n_passes == 4 * 2 * 2  # experts, modes, each with those beside it
    pd.testing.assert_frame_equal(trial(tmp_path), first)
    assert len(passes) == n_passes
    pd.testing.assert_frame_equal(trial(None), first)


def test_a_killed_trial_repeats_no_finished_measurement(tmp_path, passes):
    passes.most = 7
    with pytest.raises(KeyboardInterrupt):
        trial(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3  # of two passes each; the fourth was half done
    passes.most = 10**6
    pd.testing.assert_frame_equal(trial(tmp_path), trial(None))
    assert len(passes) == 7 + (16 - 6) + 16


@pytest.mark.parametrize("options", [{"seed": 1}, {"horizon": 2}, {"positions": "focal"}, {"max_tokens": 500}])
def test_other_settings_never_read_what_is_kept(tmp_path, options):
    trial(tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    pd.testing.assert_frame_equal(trial(tmp_path, **options), trial(None, **options))
    added = {path.name for path in tmp_path.iterdir()} - before
    assert len(added) == 8


def test_a_name_is_for_one_model_text_mode_and_part():
    lens = made()
    effects = Effects(lens, tokenize(TEXT, lens.tokenizer, []), max_tokens=400, progress=False)
    names = [Kept(Path("x"), effects, **SAME).path(EXPERT, mode, alone=alone) for mode, alone in
             (("zero", False), ("zero", True), ("mean", False))]  # fmt: skip
    names += [Kept(Path("x"), effects, **{**SAME, "seed": 3}).path(EXPERT, "zero", alone=False)]
    with torch.no_grad():
        lens.model.lm_head.weight[0, 0] += 1e-3
    names += [Kept(Path("x"), effects, **SAME).path(EXPERT, "zero", alone=False)]
    other = Effects(lens, tokenize(text(120, seed=1), lens.tokenizer, []), max_tokens=400, progress=False)
    names += [Kept(Path("x"), other, **SAME).path(EXPERT, "zero", alone=False)]
    assert len(set(names)) == len(names)
    assert names[-1] == Kept(Path("x"), other, **SAME).path(EXPERT, "zero", alone=False)


def flipped(raw: bytes) -> bytes:
    """The last bit of the last number is another."""
    return raw[:-1] + bytes([raw[-1] ^ 1])


@pytest.mark.parametrize("damage", [flipped, lambda raw: raw[:-9], lambda raw: b"", lambda raw: b"nonsense"])
def test_a_damaged_file_is_measured_anew(tmp_path, passes, damage):
    first = trial(tmp_path)
    whole = {path: path.read_bytes() for path in tmp_path.glob("L0.E3-*")}
    assert len(whole) == 2
    for path, raw in whole.items():
        path.write_bytes(damage(raw))
    del passes[:]
    pd.testing.assert_frame_equal(trial(tmp_path), first)
    assert len(passes) == 4
    assert {path: path.read_bytes() for path in whole} == whole


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteFailed, match="file"):
        trial(tmp_path / "file")


def test_measurements_come_back_to_the_bit(tmp_path):
    lens = made()
    effects = Effects(lens, tokenize(TEXT, lens.tokenizer, []), max_tokens=400, progress=False)
    kept, rng = Kept(tmp_path, effects, **SAME), np.random.default_rng(0)
    columns = [rng.normal(size=7).astype(np.float32) for _ in range(6)]
    number = np.arange(7)
    for beside in (None, CoSelected(number.copy(), *columns[3:])):
        found = Measured(EXPERT, "zero", number, *columns[:3], beside=beside)
        kept.write(found, alone=beside is None)
        back = kept.read(EXPERT, "zero", alone=beside is None)
        assert back is not None
        for part in (found, beside):
            for name, value in {} if part is None else vars(part).items():
                if isinstance(value, np.ndarray):
                    np.testing.assert_array_equal(getattr(back if part is found else back.beside, name), value)
    assert kept.read(EXPERT, "mean", alone=False) is None
