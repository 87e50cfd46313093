"""Recipes say how other programs generate, and the command why two images of one seed differ."""

import re

import pytest

from eridiff.recipe import families, recipe, recipes
from eridiff.request import FIELDS, Request
from eridiff.schedulers.samplers import SAMPLERS
from tests import tiny

ALL = [(name, family) for name in recipes() for family in families(name)]
MODELS = {"flux": tiny.flux, "mmdit": tiny.sd35, "unet": tiny.sdxl}


@pytest.mark.parametrize(("name", "family"), ALL)
def test_every_choice_of_a_recipe_is_a_value_of_a_field_with_its_source(name: str, family: str) -> None:
    found = recipe(name, family)
    assert found.seen in ("run", "reading") and found.program
    assert set(found.samplers) <= set(SAMPLERS)
    for sampler in (None, *found.samplers):
        for field, choice in found.of(sampler).items():
            assert field in FIELDS and FIELDS[field].default is None, field
            if choice.value is not None:
                read = FIELDS[field].metadata["kind"].read(field, choice.value)
                Request.of({field: read}).check()
            assert re.search(r"\S+\.\w+(:\d+)?$", choice.source), f"{field}: {choice.source!r} names no file"
    assert all(re.search(r"\(.*\)\.?$", sentence) or "." in sentence for sentence in found.apart)


@pytest.mark.parametrize(("name", "family"), ALL)
def test_every_recipe_generates(name: str, family: str) -> None:
    model = MODELS[family]()
    for sampler in (None, *recipe(name, family).samplers):
        request = Request(prompt="a swan", recipe=name, sampler=sampler, steps=2, width=64, height=64, seed=1)
        image = model.generate(request)
        assert image.settings[0]["recipe"] == name and image.settings[0]["steps"] == 2
