"""Recipes: there and back through JSON, and a line for every value that makes no sense."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any, cast, get_args

import pytest

from mobilevit.data.sampler import VARIANTS
from mobilevit.models.mobilevit import ARCHITECTURES
from mobilevit.recipes import RECIPES, Data, Optimizer, Recipe, Sampler, Size, Variant, from_dict, to_dict

OTHER = Recipe(
    architecture="xs",
    epochs=7,
    batch_size=9,
    label_smoothing=0.0,
    ema_decay=0.5,
    seed=2**63,
    data=Data(size_px=65, eval_resize=1.5, min_scale=1.0, flip=False, val_fraction=0.3, num_workers=5),
    sampler=Sampler(variant="v0.1", sizes_px=(32, 99)),
    optimizer=Optimizer(start_lr=0.0, lr=1e-5, end_lr=3e-7, warmup_steps=0, weight_decay=0.0),
)
CLASSES: dict[str, Callable[..., Any]] = {"": Recipe, "data.": Data, "sampler.": Sampler, "optimizer.": Optimizer}


@pytest.mark.parametrize("recipe", [*RECIPES.values(), OTHER], ids=[*RECIPES, "other"])
def test_json_there_and_back(recipe: Recipe):
    assert from_dict(json.loads(json.dumps(to_dict(recipe)))) == recipe


def test_the_other_recipe_differs_in_every_field_so_that_none_is_lost_unseen():
    for other, default in (
        (OTHER, Recipe()),
        (OTHER.data, Data()),
        (OTHER.sampler, Sampler()),
        (OTHER.optimizer, Optimizer()),
    ):
        for field in fields(cast(Any, other)):
            assert getattr(other, field.name) != getattr(default, field.name), field.name


def test_fields_left_out_have_their_defaults():
    assert from_dict({"epochs": 2, "data": {"size_px": 64}}) == Recipe(epochs=2, data=Data(size_px=64))


@pytest.mark.parametrize("values", [{"epoch": 3}, {"data": {"epoch": 3}}, {"optimizer": {"epoch": 3, "lr": 1e-3}}])
def test_unknown_field(values: dict[str, Any]):
    with pytest.raises(ValueError, match=r"^this version has no (recipe|data|optimizer) field called epoch$"):
        from_dict(values)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("architecture", "xl"),
        ("epochs", 0),
        ("batch_size", 1),
        ("sampler.variant", "cvnets"),
        ("sampler.sizes_px", ()),
        ("sampler.sizes_px", (31, 64)),
        ("label_smoothing", -0.1),
        ("label_smoothing", 1.0),
        ("ema_decay", -0.1),
        ("ema_decay", 1.0),
        ("seed", -1),
        ("seed", 2**64),
        ("data.size_px", 31),
        ("data.eval_resize", 0.99),
        ("data.eval_resize", math.inf),
        ("data.min_scale", 0.0),
        ("data.min_scale", 1.01),
        ("data.val_fraction", 0.0),
        ("data.val_fraction", 1.0),
        ("data.num_workers", -1),
        ("optimizer.start_lr", -1e-9),
        ("optimizer.lr", 0.0),
        ("optimizer.lr", math.inf),
        ("optimizer.end_lr", -1e-9),
        ("optimizer.warmup_steps", -1),
        ("optimizer.weight_decay", -1e-9),
        ("optimizer.weight_decay", math.nan),
    ],
)
def test_out_of_range_values_are_named_in_one_line(name: str, value: object):
    prefix, _, field = name.rpartition(".")
    with pytest.raises(ValueError, match=rf"^{name} is {re.escape(str(value))}; it must be .+$") as caught:
        CLASSES[prefix and prefix + "."](**{field: value})
    assert "\n" not in str(caught.value)


def test_recipes_need_no_torch():
    code = "import sys, mobilevit.recipes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_names_are_those_of_the_parts_that_recipes_may_not_import():
    assert get_args(Variant) == VARIANTS
    assert get_args(Size) == tuple(ARCHITECTURES)
