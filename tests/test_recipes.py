"""Recipes: published values, JSON, and errors for values out of range."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, cast, get_args

import pytest

from mobilevit.data.sampler import VARIANTS, BatchShapes, EpochBatches
from mobilevit.models.mobilevit import ARCHITECTURES
from mobilevit.recipes import (
    RECIPES,
    Compute,
    Data,
    Distill,
    Imbalance,
    Multilabel,
    Optimizer,
    Recipe,
    Sampler,
    Size,
    Variant,
    describe,
    from_dict,
    to_dict,
)

OTHER = Recipe(
    task="detect",
    architecture="xs",
    epochs=7,
    batch_size=9,
    label_smoothing=0.0,
    ema_decay=0.5,
    seed=2**63,
    data=Data(
        65,
        1.5,
        1.0,
        policy="advanced",
        flip=False,
        val_fraction=0.3,
        num_workers=5,
        max_unreadable=2,
        max_megapixels=9,
        crops_per_image=3,
        cache_mb=0.5,
    ),
    sampler=Sampler(variant="v0.1", sizes_px=(32, 99)),
    optimizer=Optimizer(
        start_lr=0.0,
        lr=1e-5,
        end_lr=3e-7,
        warmup_steps=0,
        schedule="wsd",
        cooldown_fraction=0.5,
        cosine="epoch",
        weight_decay=0.0,
        decay_all=False,
        clip_norm=1.5,
        freeze="stage3",
        backbone_lr_scale=0.25,
    ),
    compute=Compute("float16", compile=True, sync_batch_norm=True, micro_batch_size=2, quantization_aware=True),
    distill=Distill(0.25, 3.5, 1.5, 96),
    multilabel=Multilabel("asymmetric", 2.0, 1.0, 0.1),
    imbalance=Imbalance(logit_adjustment=0.5),
    patience=4,
    metric="macro_f1",
)
CLASSES: dict[str, Callable[..., Any]] = {
    "": Recipe,
    "data.": Data,
    "sampler.": Sampler,
    "optimizer.": Optimizer,
    "compute.": Compute,
    "distill.": Distill,
    "multilabel.": Multilabel,
    "imbalance.": Imbalance,
}


@pytest.mark.parametrize("recipe", [*RECIPES.values(), OTHER], ids=[*RECIPES, "other"])
def test_json_round_trip(recipe: Recipe):
    assert from_dict(json.loads(json.dumps(to_dict(recipe)))) == recipe


def test_the_round_trip_covers_every_field():
    for other, default in (
        (OTHER, Recipe()),
        (OTHER.data, Data()),
        (OTHER.sampler, Sampler()),
        (OTHER.optimizer, Optimizer()),
        (OTHER.distill, Distill()),
        (OTHER.multilabel, Multilabel()),
        (OTHER.compute, Compute()),
    ):
        for field in fields(cast(Any, other)):
            assert getattr(other, field.name) != getattr(default, field.name), field.name


def test_missing_fields_have_their_defaults():
    assert from_dict({"epochs": 2, "data": {"size_px": 64}}) == Recipe(epochs=2, data=Data(size_px=64))


@pytest.mark.parametrize("values", [{"epoch": 3}, {"data": {"epoch": 3}}, {"optimizer": {"epoch": 3, "lr": 1e-3}}])
def test_unknown_field(values: dict[str, Any]):
    with pytest.raises(ValueError, match=r"^this version has no (recipe|data|optimizer) field called epoch$"):
        from_dict(values)


OUT_OF_RANGE = [
    ("architecture", "xl"),
    ("epochs", 0),
    ("batch_size", 1),
    ("sampler.variant", "cvnets"),
    ("sampler.sizes_px", ()),
    ("sampler.sizes_px", (64, 31)),
    ("label_smoothing", -0.1),
    ("label_smoothing", 1.0),
    ("ema_decay", -0.1),
    ("ema_decay", 1.0),
    ("seed", -1),
    ("seed", 2**64),
    ("task", "count"),
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
    ("label_smoothing", math.nan),
    ("ema_decay", math.nan),
    ("data.policy", "autoaugment"),
    ("data.max_unreadable", -1),
    ("data.max_megapixels", 0.0),
    ("optimizer.start_lr", math.inf),
    ("optimizer.end_lr", math.nan),
    ("optimizer.cosine", "half"),
    ("optimizer.clip_norm", -0.1),
    ("optimizer.clip_norm", math.inf),
    ("optimizer.freeze", "stage6"),
    ("optimizer.backbone_lr_scale", 0.0),
    ("optimizer.backbone_lr_scale", 1.01),
    ("compute.precision", "float8"),
    ("compute.micro_batch_size", -1),
    ("compute.micro_batch_size", 1),
    ("data.crops_per_image", 0),
    ("data.cache_mb", -1.0),
    ("distill.soft_weight", 1.01),
    ("distill.temperature", 0.0),
    ("distill.feature_weight", -0.1),
    ("distill.size_px", -1),
    ("multilabel.loss", "focal"),
    ("multilabel.gamma_negative", -0.1),
    ("multilabel.gamma_positive", -1.0),
    ("multilabel.margin", 1.0),
    ("imbalance.class_weights", 1.01),
    ("imbalance.class_weights", -0.1),
    ("imbalance.logit_adjustment", -0.1),
    ("imbalance.logit_adjustment", math.inf),
    ("metric", "top5"),
    ("patience", -1),
    ("optimizer.schedule", "linear"),
    ("optimizer.cooldown_fraction", 0.0),
    ("optimizer.cooldown_fraction", 1.0),
]


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_values_out_of_range(name: str, value: object):
    prefix, _, field = name.rpartition(".")
    shown = {(): "empty", (64, 31): "31"}.get(cast(Any, value), str(value))
    with pytest.raises(ValueError, match=rf"^{name} is {re.escape(shown)}; it must .+$"):
        CLASSES[prefix and prefix + "."](**{field: value})


@pytest.mark.parametrize(
    ("make", "name", "value", "type_"),
    [
        (Recipe, "epochs", "2", "int"),
        (Recipe, "epochs", 2.0, "int"),
        (Recipe, "seed", True, "int"),
        (Recipe, "data", {"size_px": 64}, "Data"),
        (Optimizer, "lr", "0.1", "float"),
        (Data, "flip", 1, "bool"),
        (Sampler, "sizes_px", [64], "tuple"),
        (Sampler, "sizes_px", (64, "96"), "int"),
    ],
)
def test_values_of_the_wrong_type(make: Callable[..., Any], name: str, value: object, type_: str):
    shown = "'96'" if value == (64, "96") else repr(value)
    with pytest.raises(TypeError, match=rf"{name} is {re.escape(shown)}; it must be of type {type_}$"):
        make(**{name: value})
    assert Optimizer(lr=1).lr == 1  # a whole number is a float


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"class_weights": 0.5, "balanced_sampler": True},
            "class_weights is 0.5 and imbalance.balanced_sampler is True",
        ),
        ({"class_weights": 1.0, "logit_adjustment": 1.0}, "class_weights is 1.0 and imbalance.logit_adjustment is 1.0"),
        (
            {"balanced_sampler": True, "logit_adjustment": 1},
            "balanced_sampler is True and imbalance.logit_adjustment is 1",
        ),
    ],
)
def test_several_corrections_of_imbalance(values: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=rf"^imbalance.{message}, .*; use one of them$"):
        Imbalance(**values)


def test_every_field_is_checked():
    names = {
        prefix + field.name
        for prefix, part in CLASSES.items()
        for field in fields(cast(Any, part))
        if field.name not in CLASSES and field.type != "bool" and field.name + "." not in CLASSES
    }
    assert {name for name, _ in OUT_OF_RANGE} == names


# ---------------------------------------------------------------------------------------------------------------------
# The named recipes


@pytest.mark.parametrize("name", RECIPES)
def test_description_of_a_named_recipe(name: str):
    text = describe(name)
    first, _, rest = text.partition("\n\n")
    assert first.endswith(".")
    assert "\n" not in first
    command = re.search(r"^Command: (torchrun --nproc-per-node \d+ -m )?mobilevit train (\S+) --data \S+", rest, re.M)
    assert command is not None
    assert command[2] in RECIPES
    size = "-(xxs|xs|s)$"
    assert re.sub(size, "", command[2]) == re.sub(size, "", name)
    assert re.search(r"\bnot run here\b", text, re.I) or (
        re.search("Time", text) and re.search(r"(?i)\baccuracy\b|AP50|mIoU \d", text)
    )


@pytest.mark.parametrize("size", get_args(Size))
def test_recipe_of_the_paper(size: str):
    recipe = RECIPES[f"paper-{size}"]
    assert (recipe.architecture, recipe.epochs, recipe.batch_size) == (size, 300, 1024)
    assert (recipe.label_smoothing, recipe.ema_decay) == (0.1, 0.9995)
    o = recipe.optimizer
    assert (o.start_lr, o.lr, o.end_lr, o.warmup_steps, o.cosine) == (2e-4, 2e-3, 2e-4, 3000, "step")
    assert (o.weight_decay, o.decay_all, o.clip_norm, o.freeze, o.backbone_lr_scale) == (0.01, True, 0, "nothing", 1)
    d = recipe.data
    assert (d.size_px, d.eval_resize * 256, d.min_scale, d.policy, d.flip) == (256, 288, 0.08, "basic", True)
    assert recipe.sampler == Sampler("listing", (160, 192, 256, 288, 320))


@pytest.mark.parametrize("size", get_args(Size))
def test_recipes_of_the_released_code(size: str):
    paper, released, later = (RECIPES[f"{name}-{size}"] for name in ("paper", "v0.1", "main"))
    assert (released.optimizer.cosine, released.compute.precision, released.sampler.variant) == (
        "epoch",
        "float16",
        "v0.1",
    )
    assert paper == replace(
        released, optimizer=replace(released.optimizer, cosine="step"), sampler=paper.sampler, compute=paper.compute
    )
    assert (later.optimizer.warmup_steps, later.sampler.variant) == (20_000, "main")
    assert released == replace(
        later, optimizer=replace(later.optimizer, warmup_steps=3000), sampler=replace(later.sampler, variant="v0.1")
    )
    assert paper.sampler.sizes_px == released.sampler.sizes_px == later.sampler.sizes_px


def test_number_of_updates_in_the_description():
    recipe = RECIPES["paper-s"]
    shapes = BatchShapes(recipe.sampler.sizes_px, recipe.batch_size, recipe.data.size_px, recipe.sampler.variant)
    num_steps = 30 * sum(len(EpochBatches(1_281_167, shapes, epoch=epoch)) for epoch in range(10))  # 10 of 300 epochs
    stated = re.search(r"(\d+)k updates", describe("paper-s"))
    assert stated is not None
    assert 1000 * int(stated[1]) == pytest.approx(num_steps, rel=0.01)


def test_recipes_do_not_import_torch():
    code = "import sys, mobilevit.recipes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_names_match_the_modules_that_recipes_cannot_import():
    assert get_args(Variant) == VARIANTS
    assert get_args(Size) == tuple(ARCHITECTURES)
