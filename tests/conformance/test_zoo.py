"""The zoo is complete: every decorated causal-LM family of the installed transformers is in it, or refused."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

import moe_lens
from moe_lens.errors import UnsupportedModel
from moe_lens.models import families
from moe_lens.models.sites import find_sites
from tests.conformance import zoo

MODELS = Path(transformers.__file__).parent / "models"


@functools.cache
def decorated() -> dict[str, list[str]]:
    """Folder of transformers/models -> model types, for each folder that decorates an experts class."""
    types: dict[str, list[str]] = {}
    for model_type in CONFIG_MAPPING_NAMES:
        types.setdefault(model_type_to_module_name(model_type), []).append(model_type)
    files = [
        file
        for file in sorted(MODELS.glob("*/modeling_*.py"))
        if re.search(r"^@use_experts_implementation\b", file.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    return {file.parent.name: types.get(file.parent.name, []) for file in files}


def test_every_decorated_causal_family_is_in_the_zoo():
    known = {family.config.model_type for family in zoo.ZOO.values()}
    wanted = {t for types in decorated().values() for t in types if t in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    assert wanted - known == set(), "add them to ZOO"
    assert known - wanted == set(), "transformers has no such decorated causal family"
    assert len(wanted) > 40


def test_every_other_decorated_model_is_listed_as_refused():
    """Families without a causal language model, and multimodal wholes of which only the text model is one."""
    listed, wholes = set(zoo.REFUSED), set(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)
    for folder, types in decorated().items():
        causal = set(types) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        assert causal or listed & set(types), f"{folder} is neither in ZOO nor in REFUSED"
        assert (wholes & set(types)) - causal <= listed, f"add a model of {folder} to ZOO or REFUSED"


@pytest.mark.parametrize("model_type", list(zoo.REFUSED))
def test_a_family_that_is_no_causal_language_model_is_refused_in_one_sentence(model_type, tmp_path):
    config = getattr(transformers, f"{zoo.REFUSED[model_type]}Config")()
    assert config.model_type == model_type
    config.save_pretrained(tmp_path)
    for enter in (moe_lens.inspect, moe_lens.load):
        with pytest.raises(UnsupportedModel) as error:
            enter(str(tmp_path))
        message = str(error.value)
        assert f"({model_type})" in message
        assert "causal language model" in message  # why
        assert re.search(r": (give|build|pass|choose) ", message)  # what to do
        assert "\n" not in message


def test_titles_tell_families_apart():
    titles = [family.title for family in zoo.ZOO.values()]
    assert len(set(titles)) == len(titles)


@pytest.mark.parametrize("name", list(zoo.ZOO))
def test_no_family_name_is_needed_to_find_the_experts(name, monkeypatch, specimen_of):
    """Discovery reads module flags: it works on a config whose model_type nobody has heard of."""
    specimen = specimen_of(name)
    text = families.text_config(specimen.model.config)
    monkeypatch.setattr(type(text), "model_type", "unheard_of", raising=False)
    if "model_type" in vars(text):
        monkeypatch.setitem(vars(text), "model_type", "unheard_of")
    assert [(s.path, s.n_experts, s.top_k, s.d_ff) for s in find_sites(specimen.model)] == [
        (s.path, s.n_experts, s.top_k, s.d_ff) for s in specimen.lens.sites
    ]
