"""Effects of sets on disk: everything that was saved comes back, whichever saving and mode it came with."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moe_lens.causal.faithfulness.kept import KeptSets, SetEffect


def effect(seed: int, ratio: float = 0.5) -> SetEffect:
    kl, nll = np.random.default_rng(seed).normal(size=(2, 3))
    return SetEffect(kl, nll, layers_emptied=seed, mass_ratio=ratio, short_tokens=10 * seed)


def key(mode: str, *removed: int) -> tuple[str, bytes]:
    return mode, np.isin(np.arange(5), removed).tobytes()


def test_every_saving_comes_back_to_another_process(tmp_path: Path) -> None:
    found = {key("zero", 1): effect(1), key("mean_off", 1): effect(2, float("nan")), key("zero", 0, 4): effect(3)}
    for each in found.items():  # three savings
        KeptSets(tmp_path / "sets", every=0).add(dict([each]))
    back = KeptSets(tmp_path / "sets").read()
    assert back.keys() == found.keys()
    for name, was in found.items():
        np.testing.assert_array_equal(back[name].kl, was.kl)
        np.testing.assert_array_equal(back[name].nll, was.nll)
        numbers = [(e.layers_emptied, e.mass_ratio, e.short_tokens) for e in (back[name], was)]
        np.testing.assert_array_equal(numbers[0], numbers[1])


def test_nothing_is_written_before_it_is_time_or_asked_for(tmp_path: Path) -> None:
    kept = KeptSets(tmp_path / "sets", every=1000)
    kept.add({key("zero", 1): effect(1)})
    assert not (tmp_path / "sets").exists()
    kept.save()
    kept.save()
    assert [path.name for path in (tmp_path / "sets").iterdir()] == ["000001.safetensors"]
