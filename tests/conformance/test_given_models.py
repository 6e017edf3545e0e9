"""A model that AutoModelForCausalLM does not load can be built by the user and handed to `Lens`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_lens.models.lens import Lens
from tests.conformance import test_families as claims
from tests.conformance import zoo
from tests.conformance.specimen import IMPLEMENTATIONS, Specimen
from tests.models import tiny

CLAIMS = [
    claims.test_tapped_logits_are_bit_equal_to_native,
    claims.test_rows_equal_a_row_by_row_computation,
    claims.test_weighted_outputs_and_shared_expert_sum_to_the_block,
    claims.test_routing_is_what_the_router_returned,
    claims.test_everything_is_restored_after_exit_and_after_an_exception,
]


@pytest.fixture(scope="module", params=list(zoo.GIVEN))
def given(request: pytest.FixtureRequest) -> Specimen:
    family = zoo.GIVEN[request.param]
    specimen = Specimen(request.param, family, Path())
    specimen.lens = Lens(zoo.build(family), tiny.tokenizer())
    return specimen


@pytest.mark.parametrize("native", IMPLEMENTATIONS)
@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.__name__)
def test_a_model_handed_over_keeps_the_claim(given: Specimen, claim, native: str):
    claim(given, native)


def test_router_logits_of_a_model_handed_over_explain_the_choice(given: Specimen):
    claims.test_router_logits_explain_the_choice(given)


def test_a_norm_on_expert_outputs_is_part_of_the_output():
    """Muse Spark normalises each expert's output before the router's weight: `output` is what is weighted."""
    model, taps = zoo.build(zoo.GIVEN["muse_spark"]), []
    with Lens(model, None).tapping(taps.append), torch.no_grad():
        model(input_ids=tiny.ids(1, 5), use_cache=False)
    experts = model.get_decoder().layers[0].mlp.experts
    with torch.no_grad():
        before = torch.stack(
            [experts.down_proj[e] @ h for e, h in zip(taps[0].expert, taps[0].activation, strict=True)]
        )
        torch.testing.assert_close(taps[0].output, experts.post_expert_norm(before), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(taps[0].output, before, rtol=0.1)
