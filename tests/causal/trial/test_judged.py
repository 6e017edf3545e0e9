"""Judges other than rules: concepts, and objects (a language model) that are asked about a sample of tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import pytest
import regex
from sklearn.metrics import cohen_kappa_score

import moe_lens as ml
from moe_lens.causal.effects import Effects
from moe_lens.causal.trial.claims import Claim
from moe_lens.causal.trial.hearing import heard
from moe_lens.causal.trial.judge import ABSTAINS, NOT_ASKED, YES, cohen_kappa
from moe_lens.causal.trial.run import validate
from moe_lens.corpus.batches import tokenize
from moe_lens.errors import BadConcept, BadConfig, UnknownConcept
from moe_lens.types import ExpertAddress
from tests.causal.trial.made import LABELS, made, text

TEXT = text()
RULE_OF = dict(zip(LABELS["label"], LABELS["rule"], strict=True))
DIGITS = ml.concept("some_digits", regex="[0-9]")


@dataclass
class Reader:
    """Answers as the rule of the label does, from what it is shown; every so often it abstains."""

    name: str = "reader"
    abstains: float = 0.0
    errs: float = 0.0
    asked: list[pd.DataFrame] = field(default_factory=list)

    def __call__(self, items: pd.DataFrame) -> np.ndarray:
        self.asked.append(items)
        rng = np.random.default_rng(len(self.asked))
        fits = [
            any(found.start() < end and found.end() > start for found in regex.finditer(RULE_OF[label], context))
            for label, context, start, end in items[["label", "context", "start", "end"]].itertuples(index=False)
        ]
        wrong = rng.random(len(items)) < self.errs
        grade = np.where(np.array(fits) ^ wrong, rng.integers(3, 5, len(items)), rng.integers(0, 3, len(items)))
        return np.where(rng.random(len(items)) < self.abstains, np.nan, grade)


def trial(labels=LABELS, **options):
    settings = {"progress": False, "draws": 500, "null_labels": (), **options}
    return validate(settings.pop("lens", None) or made(), TEXT, labels, **settings)


def verdicts(found) -> dict[str, str]:
    return dict(zip(found.verdicts["address"], found.verdicts["verdict"], strict=True))


@pytest.fixture(scope="module")
def ruled():
    return trial(null_labels=("other-expert",))


@pytest.fixture(scope="module")
def reader():
    return Reader(abstains=0.1)


@pytest.fixture(scope="module")
def read(reader):
    return trial(judge=reader, judge_positions=900, null_labels=("other-expert",))


def test_a_judge_that_reads_as_the_rule_does_comes_to_the_same_verdicts(ruled, read):
    assert verdicts(read) == verdicts(ruled)
    voting = {"judge": "reader", "second_judge": None, "judge_positions": 900}
    assert {name: read.settings[name] for name in voting} == voting


def test_numbers_from_a_sample_are_near_those_of_the_whole(ruled, read):
    columns = ["contrast", "need", "auroc_routing", "auroc_effect", "pr_auc"]
    both = [
        t.frame.query("expert in (3, 4)").set_index(["label_kind", "expert", "mode"])[columns] for t in (ruled, read)
    ]
    np.testing.assert_allclose(*both, atol=0.06)


def test_the_judge_is_asked_about_visits_and_as_many_others_and_never_told_which(read, reader):
    items = pd.concat(reader.asked[:1])
    assert list(items) == ["item", "layer", "expert", "facet", "label", "document", "token", "context", "start", "end"]
    assert items["item"].tolist() == list(range(len(items)))
    of_digits = items[items["expert"] == 3]
    assert len(of_digits) == 593 + 900
    assert not of_digits["token"].duplicated().any()
    focal = [c[a:b] for c, a, b in zip(of_digits["context"], of_digits["start"], of_digits["end"], strict=True)]
    assert sum(map(str.isdigit, focal)) == 593  # E3 is visited at digits alone, and these are all
    assert of_digits["context"].str.len().max() <= 32


def test_false_labels_are_asked_about_where_their_own_expert_is_tried(read, reader):
    kinds = [set(zip(items["expert"], items["label"], strict=True)) for items in reader.asked]
    assert len(kinds) == 2
    assert {expert for expert, _ in kinds[0]} == {expert for expert, _ in kinds[1]} == {2, 3, 4, 5}
    assert not kinds[0] & kinds[1]
    tokens = [items[items["expert"] == 3]["token"].tolist() for items in reader.asked]
    assert tokens[0] == tokens[1]


def test_what_was_not_asked_is_no_abstention(read):
    assert (read.frame["abstained"] < 0.15).all()
    assert (read.frame["abstained"] > 0.05).all()
    row = trial(judge=Reader(), judge_positions=100)["L0.E3"].iloc[0]
    assert (row["abstained"], row["load"]) == (0, 593)
    assert [row["n_tokens_z1r1"], row["n_tokens_z0r0"]] == [100, 100]
    assert row["verdict"] == "supported"  # 593 tokens are routed to it, though 100 were read


def test_a_judge_that_abstains_on_more_than_a_fifth_leaves_labels_underpowered():
    assert set(verdicts(trial(judge=Reader(abstains=0.3))).values()) == {"underpowered"}


def test_a_judge_that_abstains_on_everything_is_refused_by_name():
    with pytest.raises(BadConfig, match="the judge reader abstained on every token"):
        trial(judge=Reader(abstains=1.1))


@pytest.mark.parametrize(
    ("answer", "match"), [(lambda items: np.zeros(3), "for .* items"), (lambda items: np.full(len(items), 5), "0 to 4")]
)
def test_a_judge_that_does_not_grade_every_item_is_refused(answer, match):
    class Wrong:
        name = "wrong"

        def __call__(self, items):
            return answer(items)

    with pytest.raises(BadConfig, match=match):
        trial(judge=Wrong())


def test_a_label_without_a_rule_can_be_judged_by_a_reader():
    found = trial(LABELS[["layer", "expert", "label"]], judge=Reader())
    assert verdicts(found)["L0.E3"] == "supported"
    assert found.frame["kappa_judge"].isna().all()


def test_the_rule_of_a_label_is_the_second_judge_of_a_reader():
    exact, sloppy = (trial(judge=Reader(errs=errs)).frame.set_index("expert")["kappa_judge"] for errs in (0, 0.2))
    assert (exact == 1).all()
    assert sloppy[[3, 4]].between(0.4, 0.8).all()


def test_a_second_judge_reads_a_tenth_of_the_same_tokens():
    first, second = Reader(), Reader("other", errs=0.1)
    found = trial(judge=first, second_judge=second)
    (items,) = second.asked
    asked = first.asked[0]
    assert len(items) == pytest.approx(len(asked) / 10, abs=4)
    assert set(zip(items["expert"], items["token"], strict=True)) <= set(
        zip(asked["expert"], asked["token"], strict=True)
    )
    assert (found["L0.E3"]["kappa_judge"] < 1).all()
    rules = trial(second_judge=Reader())
    assert (rules["L0.E3"]["kappa_judge"] == 1).all()
    assert (rules.frame["judge"] == "rule").all()


def test_kappa_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 200)) < 0.3
    assert cohen_kappa(a, b) == pytest.approx(cohen_kappa_score(a, b))
    assert cohen_kappa(a, a) == 1
    assert np.isnan(cohen_kappa(a[:0], b[:0]))
    assert np.isnan(cohen_kappa(np.ones(5, bool), np.ones(5, bool)))


def test_grades_of_3_and_4_hold_and_weights_stand_for_all_tokens():
    lens = made()
    effects = Effects(lens, tokenize(TEXT, lens.tokenizer, []), max_tokens=3000, progress=False)
    claim = Claim("real", ExpertAddress(0, 3), 0, "digits")
    used = np.arange(len(effects.nll)) % 3 > 0

    class Grades:
        name = "grades"

        def __call__(self, items):
            return np.resize([0, 1, 2, 3, 4, np.nan], len(items))

    case = heard([claim], effects, used=used, judge=Grades(), positions=50)[0]
    asked = case.z != NOT_ASKED
    assert asked.sum() == 100
    assert not (asked & ~used).any()
    assert case.z[asked][:6].tolist() == [0, 0, 0, YES, YES, ABSTAINS]
    assert case.weight is not None
    visits = effects.visits("L0.E3")
    for group in (visits, ~visits):
        assert (asked & group).sum() == 50
        assert case.weight[group & used].sum() == pytest.approx((group & used).sum())
    assert (case.weight[~asked] == 0).all()


def test_a_concept_judges_like_a_rule_with_the_same_expression(ruled):
    table = LABELS[:2].assign(rule=[None, "[A-Z]"], concept=pd.Series([DIGITS, None]))
    found = trial(table, null_labels=("other-expert",))
    assert found["L0.E3"].query("label_kind == 'real'")["judge"].eq("concept:some_digits").all()
    a, b = (t["L0.E3"].query("label_kind == 'real'") for t in (found, ruled))
    columns = ["need", "contrast", "auroc_routing", "pr_auc", "p"]
    np.testing.assert_allclose(a[columns], b[columns], atol=1e-9)
    false = found["L0.E4"].query("label_kind == 'other-expert'")
    assert false["judge"].eq("concept:some_digits").all()


def test_concepts_are_called_by_name_built_in_or_of_the_corpus_that_was_tokenised():
    lens = made()
    tokenized = tokenize(TEXT, lens.tokenizer, [DIGITS], max_length=64)
    for name, wanted in (("some_digits", "some_digits"), ("domain_x", "domain_x")):
        table = LABELS[:1].assign(concept=name)
        row = validate(lens, tokenized, table, null_labels=(), draws=200, progress=False).frame.iloc[0]
        assert row["judge"] == f"concept:{wanted}"


@pytest.mark.parametrize(
    ("name", "error", "match"), [("digts", UnknownConcept, "digts"), ("fields", BadConcept, "stands for 2")]
)
def test_a_concept_that_is_none_or_several_is_refused(name, error, match):
    with pytest.raises(error, match=match):
        trial(LABELS[:1].assign(concept=name))
