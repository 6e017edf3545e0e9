"""WindowSample keeps the windows with the least keys, wherever the stream is cut."""

from __future__ import annotations

import pytest
import torch

from moe_lens.capture.window_sample import WindowSample


def sample_of(key: torch.Tensor, length: torch.Tensor) -> WindowSample:
    """A sample of 50 tokens; token ``i`` of a window is the window's key."""
    sample = WindowSample(50)
    columns = {name: torch.zeros_like(key) for name in WindowSample.PER_WINDOW}
    sample.add({**columns, "key": key, "length": length, "input_ids": key.repeat_interleave(length)})
    sample.settle()
    return sample


@pytest.mark.parametrize("seed", range(20))
def test_long_windows_that_were_dropped_still_stand_in_the_way_of_later_ones(seed):
    g = torch.Generator().manual_seed(seed)
    key = torch.randperm(30, generator=g)
    length = torch.where(torch.rand(30, generator=g) < 0.3, 35, 3)
    order = key.argsort()
    fits = length[order].cumsum(0) <= 50
    want = key[order][fits].tolist()
    for cut in (7, 15, 23):
        merged = sample_of(key[:cut], length[:cut])
        merged.merge(sample_of(key[cut:], length[cut:]).state())
        assert merged.column("key").tolist() == want
        assert (
            merged.column("input_ids").tolist()
            == key[order].repeat_interleave(torch.where(fits, length[order], 0)).tolist()
        )
        assert merged.open(key[order], torch.zeros(30, dtype=torch.long)).tolist() == fits.tolist()
