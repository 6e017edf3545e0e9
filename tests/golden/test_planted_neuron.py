"""A model in which one neuron of one expert fires on digits and nothing else: the probe must name it."""

import pytest
import torch

import moe_lens as ml
from moe_lens.models.lens import Lens
from tests.models import tiny
from tests.probing.conftest import soup

LAYER, EXPERT, NEURON = 1, 3, 7


def planted() -> Lens:
    model = tiny.build("olmoe")
    digits = torch.tensor([ord(c) for c in "0123456789"])
    names = tiny.tokenizer().convert_ids_to_tokens(list(range(256)))
    ids = torch.tensor([i for i, name in enumerate(names) if name in "0123456789"])
    assert len(ids) == len(digits)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0
        model.model.embed_tokens.weight[ids, 0] = 1
        for layer in model.model.layers:  # dimension 0 carries "digit" and nobody else reads or writes it
            layer.self_attn.o_proj.weight.mul_(4)[0] = 0  # context matters, but not to dimension 0
            layer.mlp.gate.weight[:, 0] = 0
            layer.mlp.experts.gate_up_proj[..., 0] = 0
            layer.mlp.experts.down_proj[:, 0] = 0
        experts = model.model.layers[LAYER].mlp.experts
        for row in (NEURON, NEURON + experts.gate_up_proj.shape[1] // 2):
            experts.gate_up_proj[EXPERT, row] = 0
            experts.gate_up_proj[EXPERT, row, 0] = 3
    return Lens(model, tiny.tokenizer(), name="planted")


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    corpus = ml.corpus(str(soup(tmp_path_factory.mktemp("soup") / "soup.jsonl")))
    return ml.probe(planted(), corpus, concepts=["contains_digit", "domain_up"], k=(1,), progress=False)


def test_the_planted_neuron_is_found_with_perfect_held_out_score(result):
    best = result.best().set_index("concept").loc["contains_digit"]
    assert (best.layer, best.expert, best.neurons[0], best.sign[0]) == (LAYER, EXPERT, NEURON, 1)
    assert best.f1 == 1.0
    assert best.auroc == 1.0
    assert best.status == "separable"


def test_the_planted_neuron_does_not_tell_domains_with_equally_many_digits_apart(result):
    cells = result.cells
    here = cells[(cells.layer == LAYER) & (cells.expert == EXPERT) & (cells.concept == "domain_up")]
    assert here.status.iloc[0] == "ok"
    assert here.neurons.iloc[0][0] != NEURON
