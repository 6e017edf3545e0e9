"""``routing_only`` on hand-made counts, and through the whole pipeline on a planted router."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import moe_lens as ml
from moe_lens.models.lens import Lens
from moe_lens.probing.arms import METRICS
from moe_lens.probing.compare import compare
from moe_lens.stats import document_multiplicities
from moe_lens.types import Split
from tests.models import tiny
from tests.probing.conftest import soup
from tests.probing.scanned import Concept, Store, Table, scores


class TestRoutingOnly:
    """20 documents of 10 tokens, the first 4 of each positive; odd documents are test."""

    SPLIT = (Split.VALIDATE, Split.TEST) * 10
    DOCUMENT = np.repeat(np.arange(20), 10)
    LABELS = np.tile(np.arange(10) < 4, 20)[:, None]
    TEST = np.arange(1, 20, 2)

    def score(self, visits, *, names=("a",), labels=LABELS, in_scope=None, **more):
        table = Table(self.DOCUMENT, np.repeat(labels, len(names), 1) if labels.shape[1] == 1 else labels, in_scope)
        h = {layer: np.zeros((200, len(names))) for layer, _ in visits}
        return scores(Store(table, visits, h), list(self.SPLIT), list(names), **more)

    def visits(self, validate, test):
        """Tokens whose position is in `validate` on validate documents, in `test` on test documents."""
        position, is_test = np.arange(200) % 10, (self.DOCUMENT % 2).astype(bool)
        return np.flatnonzero(np.where(is_test, np.isin(position, test), np.isin(position, validate)))

    def rows(self, moe, dense=None):
        sides = [[moe], [dense] if dense is not None else []]
        table = compare(*sides, [Concept("a")], [self.TEST], n_resamples=200)  # type: ignore[arg-type]
        return table[(table.arm == "routing_only") & (table.concept == "a")].set_index("metric")

    MOE = property(
        lambda self: self.score({
            (0, 0): self.visits([0, 1, 2, 9], [0, 1, 2, 9]),  # 3 of 4 positives, 1 of 6 negatives
            (0, 1): self.visits([3, 4, 5, 6, 7, 8], [3, 4, 5, 6, 7, 8]),
            (1, 0): self.visits([0, 1, 4, 5, 6, 7, 8, 9], [0, 1, 2, 3]),  # perfect, but on test only
            (1, 1): self.visits([2, 3], [4, 5, 6, 7, 8, 9]),
        })
    )  # fmt: skip

    def test_scores_follow_from_the_counts_of_the_cell_chosen_on_validate(self):
        moe = self.MOE
        (chosen,) = moe.evidence["routing_only"].frame.itertuples()
        assert (chosen.layer, chosen.expert) == (0, 0)
        assert chosen.auroc_validate == pytest.approx((1 + 3 / 4 - 1 / 6) / 2)
        rows = self.rows(moe)
        assert rows.moe["f1"] == pytest.approx(2 * 30 / (2 * 30 + 10 + 10))
        assert rows.moe["f1_balanced"] == pytest.approx(2 * 0.75 / (0.75 + 1 / 6 + 1))
        assert rows.moe["auroc"] == pytest.approx((1 + 3 / 4 - 1 / 6) / 2)
        assert rows.chance_moe["f1"] == pytest.approx(2 * 0.4 / 1.4)
        assert (rows.n_cells_moe == 4).all()
        assert (rows.n_distinct_neurons_moe == 0).all()

    def test_a_dense_layer_knows_nothing_and_scores_as_always_yes(self):
        dense = self.score({(layer, 0): np.arange(200) for layer in range(3)}, role="dense")
        rows = self.rows(self.MOE, dense)
        assert rows.dense.to_dict() == pytest.approx({"f1": 2 * 0.4 / 1.4, "f1_balanced": 2 / 3, "auroc": 0.5})
        assert (rows.dense_low["auroc"], rows.dense_high["auroc"]) == (0.5, 0.5)
        assert dense.evidence["routing_only"].frame.layer.tolist() == [0], "ties go to the lower address"

    def test_the_interval_comes_from_whole_documents(self):
        """Half of the test documents are perfectly routed and half not at all: tokens would say .75 +- .03."""
        good = np.flatnonzero((self.DOCUMENT % 4 < 2) & self.LABELS[:, 0])
        other = np.setdiff1d(np.arange(200), good)
        row = self.rows(self.score({(0, 0): good, (0, 1): other})).loc["auroc"]
        assert row.moe == pytest.approx(0.75)
        times = document_multiplicities(10, 20000, seed=5)
        shares = times[:, (self.TEST % 4 < 2)].sum(1) / 10
        low, high = np.percentile(0.5 + shares / 2, [2.5, 97.5])
        assert (row.moe_low, row.moe_high) == pytest.approx((low, high), abs=0.051)

    def test_documents_on_which_the_concept_is_not_defined_do_not_count(self):
        """Documents 16 to 19 are out of scope; there the expert sees nothing but negatives."""
        in_scope = np.repeat(np.arange(20) < 16, 10)[:, None]
        labels = self.LABELS & in_scope
        at = np.flatnonzero(np.where(in_scope[:, 0], labels[:, 0], True))
        moe = self.score({(0, 0): at, (0, 1): np.setdiff1d(np.arange(200), at)}, labels=labels, in_scope=in_scope)
        frame, counts = moe.evidence["routing_only"].frame, moe.evidence["routing_only"].counts
        assert frame.auroc_validate[0] == 1.0
        assert counts[0].sum(0).tolist() == [32, 0, 0, 48]

    def test_a_concept_with_too_few_tokens_has_no_number(self):
        labels = self.LABELS & (self.DOCUMENT < 8)[:, None]  # 16 positives in each split
        moe = self.score({(0, 0): np.flatnonzero(labels)}, labels=labels)
        assert self.rows(moe).moe.isna().all()
        assert (self.rows(moe).status == "too_few").all()

    def test_an_expert_that_sees_only_the_concept_counts_although_its_neurons_cannot_be_probed(self):
        at = np.flatnonzero(self.LABELS[:, 0])
        moe = self.score({(0, 0): at, (0, 1): np.setdiff1d(np.arange(200), at)})
        assert (moe.cells.status == "too_few").all()
        assert (self.rows(moe).moe == 1.0).all()


class TestPlantedRouter:
    """A model whose router sends the digits, all of them and nothing else, to one expert."""

    LAYER, EXPERT = 1, 3

    @pytest.fixture(scope="class")
    @classmethod
    def result(cls, tmp_path_factory):
        model = tiny.build("olmoe")
        names = tiny.tokenizer().convert_ids_to_tokens(list(range(256)))
        digits = torch.tensor([i for i, name in enumerate(names) if name in "0123456789"])
        with torch.no_grad():
            # dimension 0 carries "digit" and dimension 1 a constant; nobody else reads or writes them
            model.model.embed_tokens.weight[:, 0] = 0
            model.model.embed_tokens.weight[digits, 0] = 2
            model.model.embed_tokens.weight[:, 1] = 1
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight[:2] = 0
                layer.mlp.gate.weight[:, :2] = 0
                layer.mlp.experts.gate_up_proj[..., :2] = 0
                layer.mlp.experts.down_proj[:, :2] = 0
                layer.post_attention_layernorm.weight[:2] = 1
            gate = model.model.layers[cls.LAYER].mlp.gate.weight
            gate[cls.EXPERT] = 0
            gate[cls.EXPERT, :2] = torch.tensor([100.0, -100.0])
        corpus = ml.corpus(str(soup(tmp_path_factory.mktemp("soup") / "soup.jsonl")))
        lens = Lens(model, tiny.tokenizer(), name="planted-router")
        dense = Lens(tiny.build("llama"), tiny.tokenizer(), name="tiny-llama")
        concepts = ["contains_digit", "domain_up"]
        return ml.probe(lens, corpus, baseline=dense, concepts=concepts, k=(1,), progress=False)

    def row(self, result, concept, metric):
        table = result.comparison
        (row,) = table[
            (table.arm == "routing_only") & (table.concept == concept) & (table.metric == metric)
        ].itertuples()
        return row

    @pytest.mark.parametrize("metric", METRICS)
    def test_routing_alone_detects_the_planted_concept_perfectly(self, result, metric):
        row = self.row(result, "contains_digit", metric)
        assert (row.moe, row.moe_low, row.moe_high) == (1.0, 1.0, 1.0)
        assert row.n_cells_moe == 2 * 6

    def test_a_dense_model_has_no_routing_to_read(self, result):
        assert self.row(result, "contains_digit", "auroc").dense == 0.5
        f1 = self.row(result, "contains_digit", "f1")
        assert f1.dense == f1.chance_dense == f1.chance_moe

    def test_the_planted_router_does_not_tell_documents_apart(self, result):
        assert self.row(result, "domain_up", "auroc").moe < 0.7
