"""A trace of every family: shares of a block sum to one, and contributions are what an ablation takes away."""

from __future__ import annotations

import pytest
import torch

import moe_lens as ml
from moe_lens.errors import UnsupportedModel
from moe_lens.models import families, norms
from moe_lens.types import Role
from tests.conformance.specimen import Specimen

TEXT = "two cats & a dog"


def test_shares_of_every_block_sum_to_one(specimen: Specimen) -> None:
    t = specimen.lens.trace(TEXT)
    rows = t.routing[t.routing["role"] == "moe"] if specimen.family.entry == "fc2_latent_proj" else t.routing
    sums = rows.groupby(["position", "layer"])["share"].sum(min_count=1)
    weights = t.routing.groupby(["position", "layer"])["weight"].sum()
    written = sums[weights[sums.index] != 0]  # ZAYA's tokens may skip their expert
    assert written.to_numpy() == pytest.approx(1.0, abs=1e-3)
    assert len(written) > len(sums) / 2


def test_contributions_are_what_zeroing_the_expert_takes_from_the_logit(specimen: Specimen) -> None:
    """In the last layer nothing reads an expert's write but the final norm, whose scale is frozen."""
    lens, model = specimen.lens, specimen.model
    if families.indirect_writes(model.config) is not None:
        with pytest.raises(UnsupportedModel, match=r"not defined for it: use lens\.edit"):
            lens.trace(TEXT).contributions(-1, 65)
        return
    layer = lens.layers[-1]
    if layer != lens.spec.n_layers - 1 or norms.post_ffn_norm(lens.blocks[layer]) is not None:
        pytest.skip("a later layer or a norm reads the write")
    t = lens.trace(TEXT)
    found = t.contributions(-1, 65)
    last = len(t.tokens) - 1
    norm = norms.freeze(norms.final_norm(model), t.residual[last])
    unembed = model.get_output_embeddings().weight[65].detach().float()
    for row in found[(found["layer"] == layer) & (found["role"] == str(Role.MOE))].itertuples():
        with lens.edit(ml.zero(f"L{layer}.E{row.expert}")):
            lost = t.residual[last] - lens.trace(TEXT).residual[last]
        taken = float(norm(lost) @ unembed) / families.logit_divisor(model.config)
        assert row.logit == pytest.approx(taken, rel=1e-2, abs=2e-4)
    assert torch.isfinite(torch.tensor(found["logit"].to_numpy())).all()
