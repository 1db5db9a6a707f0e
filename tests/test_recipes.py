"""Recipes: all of them valid, and every mistake named in one line."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from acw.recipes import RECIPES, Recipe, derive, named_recipe
from acw.storage.checksums import fingerprint
from acw.storage.errors import UserError


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_valid_and_the_paper_is_its_shape(name: str) -> None:
    recipe = named_recipe(name)
    assert recipe.name == name
    heads = {"acw_v1": 20, "acw_v2": 20, "displays": 45, "gaze": 30, "modern": 45}
    assert len(recipe.backbones) * recipe.folds * recipe.seeds == heads.get(name, 60)
    assert [view.name for view in recipe.views] == list(recipe.backbones)
    assert derive(recipe, {}) == recipe
    # What the command line makes of a recipe's own values is the recipe again.
    written = {
        f.name: ",".join(value) if isinstance(value := getattr(recipe, f.name), tuple) else str(value)
        for f in dataclasses.fields(Recipe)[1:]
    }
    assert derive(recipe, written) == recipe
    assert all(f.metadata["help"] for f in dataclasses.fields(Recipe)[1:])


def test_an_unknown_recipe_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"no recipe 'gazes'; recipes are acw, gaze, gaze_small, demo, cat2000"):
        named_recipe("gazes")


def test_values_may_be_strings_or_python_values() -> None:
    changes: dict[str, Any] = {
        "seeds": 1, "sigma": 20, "learn_sigma": False, "backbones": ("lite1", "lite0"), "lr_patience": 0
    }  # fmt: skip
    strings = {
        "seeds": "1", "sigma": "2e1", "learn_sigma": "False", "backbones": "lite1, lite0", "lr_patience": "0"
    }  # fmt: skip
    recipe = derive(named_recipe("gaze_small"), changes)
    assert recipe == derive(named_recipe("gaze_small"), strings)
    assert isinstance(recipe.sigma, float)
    assert recipe.learn_sigma is False
    listed = derive(named_recipe("gaze_small"), {"backbones": ["lite1", "lite0"]})  # as JSON has it
    assert listed.backbones == ("lite1", "lite0")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learnin_rate", 0.1),
        ("name", "mine"),
        ("seeds", "three"),
        ("seeds", 2.5),
        ("seeds", "2.5"),
        ("seeds", None),
        ("seeds", True),
        ("seeds", 0),
        ("seed", math.inf),
        ("seed", -1),
        ("learning_rate", "fast"),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("learning_rate", 0),
        ("learning_rate", -1e-3),
        ("min_learning_rate", 1.0),
        ("lr_factor", 1),
        ("lr_patience", -1),
        ("learn_sigma", "maybe"),
        ("learn_sigma", []),
        ("sigma", 0),
        ("sigma", -16.0),
        ("sigma", math.inf),
        ("density_cell", math.nan),
        ("upsampling", "cubic"),
        ("upsampling_steps", "16x30"),
        ("long_side", 8),
        ("taps", "latest"),
        ("joint_patience", -1),
        ("joint_min_learning_rate", 1.0),
        ("holdout", 1.5),
        ("folds", 1),
        ("folds", 101),
        ("batch_size", 0),
        ("max_epochs", -3),
        ("heads_per_worker", 0),
        ("workers", -1),
        ("accelerator", "tpu"),
        ("gpus_per_worker", 0),
        ("gpus_per_worker", 2),
        ("center_bias", "none"),
        ("center_bias", None),
        ("backbones", ""),
        ("backbones", "lite0,vgg19"),
        ("backbones", "lite0,lite0"),
        ("backbones", 4),
        ("weights", "lite0"),
        ("weights", "densenet201=timm"),
        ("weights", "lite0=random,lite0=timm"),
    ],
)
def test_a_mistake_is_named_in_one_line(field: str, value: Any) -> None:
    with pytest.raises(UserError) as caught:
        derive(named_recipe("gaze_small"), {"seeds": 2, field: value})
    message = str(caught.value)
    assert "\n" not in message
    assert f"field '{field}'" in message


def test_weights_sources_replace_a_backbones_own() -> None:
    recipe = derive(named_recipe("gaze_small"), {"weights": "lite1=s3://bucket/a=b.pth,lite0=random"})
    sources = {backbone.name: backbone.weights for backbone in recipe.backbone_values}
    assert sources["lite1"] == "s3://bucket/a=b.pth"
    assert sources["lite0"] == "random"
    assert sources["lite2"] == named_recipe("gaze_small").backbone_values[2].weights


def test_runs_of_before_there_was_a_field_keep_their_names() -> None:
    recipe = named_recipe("acw")
    how = ("workers", "accelerator", "gpus_per_worker", "price_per_hour")
    fields = {f.name: getattr(recipe, f.name) for f in dataclasses.fields(Recipe)}
    later = ("mirrored", "refit", "gold_standard", "unseen", "dropout", "categories")
    before = {name: value for name, value in fields.items() if name not in (*how, *later)}
    assert recipe.fingerprint == fingerprint(before)


def test_the_fingerprint_leaves_out_how_a_run_is_computed() -> None:
    recipe = named_recipe("gaze_small")
    how = {"workers": 7, "accelerator": "cpu", "gpus_per_worker": 0.25, "price_per_hour": 2}
    assert derive(recipe, how).fingerprint == recipe.fingerprint
    changes = {
        "seed": 1, "holdout": 0.25, "folds": 4, "seeds": 2, "center_bias": "gaussian", "density_cell": 9,
        "sigma": 17, "learn_sigma": False, "batch_size": 9, "learning_rate": 3e-3, "lr_factor": 0.2, "lr_patience": 3,
        "weight_decay": 0.01, "initial_scale": 0.5, "center_bias_bandwidth": 0.1,
        "min_learning_rate": 2e-5, "max_epochs": 31, "heads_per_worker": 5, "backbones": "lite0", "long_side": 226,
        "heads": "/m", "taps": "earlier",
        "upsampling": "nearest", "joint": True, "category_weights": False,
        "joint_learning_rate": 2e-4, "joint_patience": 4, "joint_min_learning_rate": 1e-7, "joint_max_epochs": 9,
        "weights": "lite0=random", "unseen": "Street", "mirrored": True, "refit": True, "gold_standard": "adaptive",
        "dropout": 0.3, "categories": "auto",
    }  # fmt: skip
    others = {derive(recipe, {name: value}).fingerprint for name, value in changes.items()}
    bicubic = {"upsampling": "bicubic"}
    others |= {derive(recipe, bicubic | more).fingerprint for more in ({}, {"upsampling_steps": "16x30"})}
    changes["upsampling_steps"] = "16x30"
    assert len(others | {recipe.fingerprint}) == len(changes) + 2
    identity = {f.name for f in dataclasses.fields(Recipe) if f.metadata.get("identity", True)}
    assert identity - {"name"} == set(changes)
