"""Which tokens ``herbst2026`` samples: texts and their cuts, matches, negatives, the stop rule, parts of speech."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

import moe_lens as ml
from moe_lens.corpus.concepts import Column, Concept, builtin_concepts, concept
from moe_lens.corpus.text import Corpus, Document
from moe_lens.probing.herbst2026.sampling import Sample, Sampler, first_sentence
from tests.models import tiny
from tests.probing.herbst_reference import CAPITAL_RUN, DIGIT, long_texts


class TestSampling:
    def sampler(self, documents: list[Document], lens_or_tokenizer: Any = None, **changes: Any) -> Sampler:
        tokenizer = lens_or_tokenizer or tiny.tokenizer()
        options = {"num_tokens": 5000, "batch_size": 1, "max_length": None, "seed": 42, **changes}
        return Sampler(Corpus.of(documents, id="s"), tokenizer, **options)

    @staticmethod
    def read(sampler: Sampler, sample: Sample, *, positive: bool) -> str:
        """The characters of the positives or negatives, with the byte-level tokenizer."""
        mine = np.flatnonzero(sample.positive == positive)
        spans = [sampler.texts[sample.text[i]].spans[sample.position[i]] for i in mine]
        texts = [sampler.texts[sample.text[i]].piece for i in mine]
        documents = sampler._corpus.documents
        return "".join(
            documents[p.document].text[p.start + a : p.start + b] for p, (a, b) in zip(texts, spans, strict=True)
        )

    @given(st.integers(1, 400), st.integers(1, 400), st.sampled_from(["text", "code"]))
    @settings(max_examples=30, deadline=None)
    def test_positives_are_all_matched_tokens_and_negatives_as_many_others(self, digits, letters, category):
        sampler = self.sampler([Document("a", "1" * digits + "x" * letters)])
        sample = sampler.sample(concept("c", category=category, regex=r"\d"))
        cut = ("1" * digits + "x" * letters)[-300 if category == "code" else 0 :][:300]
        if "1" not in cut:
            assert len(sample) == 0
            return
        assert self.read(sampler, sample, positive=True) == "1" * cut.count("1")
        assert self.read(sampler, sample, positive=False) == "x" * min(cut.count("1"), cut.count("x"))

    def test_sampling_stops_after_the_batch_that_has_enough(self):
        documents = [Document(f"{i}", "1" * 60 + "x" * 60) for i in range(9)]
        digit = concept("c", regex=r"\d")
        sizes = {n: len(self.sampler(documents, num_tokens=100, batch_size=n).sample(digit)) for n in (1, 2, 3, 4)}
        assert sizes == {1: 120, 2: 120, 3: 180, 4: 240}
        only = self.sampler(documents, num_tokens=60).sample(digit)
        assert only.positive.all()

    def test_texts_without_a_match_and_out_of_scope_are_skipped(self):
        documents = [Document("a", "none here"), Document("b", "1 here"), Document("c", "2", {"kind": "prose"})]
        sampler = self.sampler(documents)
        sample = sampler.sample(concept("c", regex=r"\d", scope={"kind": "code"}))
        assert [text.piece.document for text in sampler.texts] == [1]
        assert self.read(sampler, sample, positive=True) == "1"

    def test_a_concept_has_the_same_tokens_whatever_else_is_sampled(self):
        texts = long_texts()
        alone = Sampler(texts, tiny.tokenizer(), num_tokens=900, batch_size=1, max_length=None, seed=42)
        after = Sampler(texts, tiny.tokenizer(), num_tokens=900, batch_size=1, max_length=None, seed=42)
        after.sample(CAPITAL_RUN)
        a, b = alone.sample(DIGIT), after.sample(DIGIT)
        np.testing.assert_array_equal(a.position, b.position)
        pieces = [[s.texts[i].piece for i in x.text] for s, x in ((alone, a), (after, b))]
        assert pieces[0] == pieces[1]

    def test_a_corpus_sorted_by_domain_is_read_from_every_domain_in_turn(self):
        documents = [Document(f"{i}", "1x" * 20, {"domain": "ab"[i // 50]}) for i in range(100)]
        sampler = self.sampler(documents, num_tokens=400)
        sampler.sample(concept("c", regex=r"\d"))
        read = [sampler._corpus.documents[text.piece.document].fields["domain"] for text in sampler.texts]
        assert abs(read.count("a") - read.count("b")) <= 1

    def test_a_text_is_cut_to_what_the_model_reads(self):
        sampler = self.sampler([Document("a", "x" * 90 + "1" * 90)], max_length=100)
        sample = sampler.sample(concept("c", regex=r"\d"))
        assert self.read(sampler, sample, positive=True) == "1" * 10
        assert sampler.texts[0].is_cut

    def test_a_column_speaks_of_the_whole_text(self):
        spans = json.dumps([{"start": 500, "end": 510, "tag": "NAME"}])
        name = Concept("name", "code", Column(("spans",), ("NAME",)))
        sampler = self.sampler([Document("a", "x" * 495 + "y" * 20 + "x" * 200, {"spans": spans})])
        assert self.read(sampler, sampler.sample(name), positive=True) == "y" * 10


class TestPartsOfSpeech:
    NOUN = next(c for c in builtin_concepts() if c.name == "noun")

    def sample(self, text: str, sentences: Any, tokenizer: Any = None) -> tuple[Sampler, Sample]:
        document = Document("a", text, {"pos_tags": json.dumps(sentences)})
        sampler = TestSampling().sampler([document], tokenizer)
        return sampler, sampler.sample(self.NOUN)

    def test_only_words_of_the_first_sentence_count(self):
        sentences = [[["A", "DET"], ["cat", "NOUN"], ["sat", "VERB"]], [["Dogs", "NOUN"], ["ran", "VERB"]]]
        sampler, sample = self.sample("A cat sat. Dogs ran.", sentences)
        assert TestSampling.read(sampler, sample, positive=True) == "cat"
        assert set(TestSampling.read(sampler, sample, positive=False)) <= set("Asat")

    def test_a_sentence_that_does_not_fit_400_characters_skips_the_text(self):
        words = [["cat", "NOUN"]] * 120
        _, sample = self.sample("cat " * 120, [words])
        assert len(sample) == 0
        _, sample = self.sample("cat " * 120, [words[:90]])
        assert len(sample) == 270

    def test_special_tokens_are_read_but_never_sampled(self):
        tokenizer = ml.load("bundled:tiny-moe").tokenizer
        special = _with_bos(tokenizer)
        sampler, sample = self.sample("cat sat", [[["cat", "NOUN"], ["sat", "VERB"]]], special)
        assert sampler.texts[0].input_ids[0] == special.bos_token_id
        assert sample.position.min() >= 1
        digit = sampler.sample(concept("c", regex="c"))
        assert sampler.texts[digit.text[0]].input_ids[0] != special.bos_token_id

    def test_a_token_over_two_words_can_be_in_both_classes(self):
        tokenizer = ml.load("bundled:tiny-moe").tokenizer  # "the" is one token there
        _, sample = self.sample("the", [[["th", "NOUN"], ["e", "X"]]], tokenizer)
        assert list(zip(sample.position.tolist(), sample.positive.tolist(), strict=True)) == [(0, True), (0, False)]

    @pytest.mark.parametrize("value", ['"x"', "[]", "[[]]", "3", "{}", "not json", '[{"token": "x", "tag": "NOUN"}]'])
    def test_a_column_of_another_shape_is_no_sentence(self, value):
        assert not first_sentence(Document("a", "x", {"pos_tags": value}), ("pos_tags",))

    def test_pairs_without_sentences_are_one_sentence(self):
        document = Document("a", "x", {"pos_tags": '[["x", "NOUN"]]'})
        assert first_sentence(document, ("other", "pos_tags")) == [("x", "NOUN")]


def _with_bos(tokenizer: Any) -> Any:
    """A copy of the tokenizer that puts a beginning-of-text token in front."""
    changed = deepcopy(tokenizer)
    if changed.bos_token is None:
        changed.bos_token = changed.eos_token
    bos = (changed.bos_token, changed.bos_token_id)
    changed.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    return changed
