"""The named recipes: functions that return one complete `Recipe`.

A new recipe is another one with fields changed: write a function below, decorate it with `@recipe`, and every job
takes its name. Its docstring states its command, its cost and the score to expect.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from acw.features.zoo import BACKBONE_SETS
from acw.recipes.recipe import Recipe, check
from acw.storage.errors import UserError

RECIPES: dict[str, Callable[[], Recipe]] = {}


def recipe(function: Callable[[], Recipe]) -> Callable[[], Recipe]:
    RECIPES[function.__name__] = function
    return function


@recipe
def acw() -> Recipe:
    """Ours: heads trained one by one, mixed by category weights fitted on out-of-fold predictions.

    acw run acw --dataset FOLDER --backbones lite

    What `gaze_small` and `cat2000` are; of the recipes that `acw reproduce` compares, the best: 1.519 bit on `gaze`.
    """
    return Recipe("acw", backbones=BACKBONE_SETS["paper"])


@recipe
def gaze() -> Recipe:
    """Any data set, with networks whose weights the package registry carries, several of them read by one head.

    acw run gaze --dataset FOLDER [--pixels-per-degree PX]

    Half of what a head reads is left out at random in each step. Cost: 959 photographs of 800x600 px in 19 minutes and
    5.5 GiB on 2 cores that multiply in bfloat16 (elsewhere DINOv2's features alone take 7). There it reached 1.574 bit
    per fixation over the centre bias on the 192 held-out images, where other people's fixations reach 1.580.
    """
    return dataclasses.replace(
        acw(), name="gaze", backbones=BACKBONE_SETS["registry"], dropout=0.5, seeds=2, max_epochs=14, refit=True
    )


@recipe
def gaze_small() -> Recipe:
    """Any data set, with the small backbones whose weights the package registry carries, one a head: half the time.

    acw run gaze_small --dataset FOLDER [--pixels-per-degree PX]

    Cost: 959 photographs of 800x600 px in some 12 minutes and 4 GiB on 2 cores. There it reached 1.52 bit per
    fixation over the centre bias on the 192 held-out images, where other people's fixations reach 1.58.
    """
    return dataclasses.replace(acw(), name="gaze_small", backbones=BACKBONE_SETS["lite"])


@recipe
def demo() -> Recipe:
    """The `gaze_small` recipe cut short: every step of a real run on any data set, soon.

    acw run demo [--dataset FOLDER]

    Cost: some minutes on 2 cores for the built-in displays or a few hundred images. Scores are below `gaze_small`'s.
    """
    return dataclasses.replace(gaze_small(), name="demo", max_epochs=6)


@recipe
def cat2000() -> Recipe:
    """The four backbones of both papers at DeepGaze IIE's resolution, on GPUs.

    acw run cat2000 --dataset CAT2000 --weights shapenet_c=deepgaze2e:deepgaze2e.pth

    Cost: about 46 GB of features (23 MB an image). Hours and scores are not measured yet: it has never run on GPUs.
    """
    return dataclasses.replace(acw(), name="cat2000", accelerator="gpu")


@recipe
def modern() -> Recipe:
    """Large networks of today, read together as DeepGaze MSDB (ICCV 2025) reads them, from a model hub, on GPUs.

    acw run modern --dataset FOLDER

    DINOv2 and CLIP's ResNet-50x64 at two sizes, DINOv3 and a CLIP ConvNeXt beside them. Hours and scores are not
    measured yet: it has never run on GPUs, and without a hub only with random weights.
    """
    return dataclasses.replace(
        acw(), name="modern", backbones=BACKBONE_SETS["modern"], mirrored=True, accelerator="gpu"
    )


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
def cat2000_iie() -> Recipe:
    """DeepGaze IIE as its authors trained it, adapted to the categories of a data set: no head is trained.

    acw import-deepgaze --download
    acw run cat2000_iie --dataset CAT2000 [--heads FOLDER]

    For each category weights, temperature, blur and centre bias, fitted by cross-validation. Cost: features, 23 MB and
    some seconds a full-HD image on a CPU, then minutes. What it reaches on CAT2000 is not known: it has run on made-up
    weights only.
    """
    return dataclasses.replace(deepgaze_iie(), name="cat2000_iie", heads="deepgaze2e", category_weights=True)


@recipe
def displays() -> Recipe:
    """Heads that learn from four categories of the built-in displays, adapted to the other four.

    make demo, or: acw run displays

    For the built-in displays only, whose categories it names; networks see them at their own size. Two thirds are
    held out: 20 a category are left to learn from.

    Cost: 5 to 6 minutes on 2 cores. Expect 2.00 bit on the held-out displays, where 2.33 is possible.
    """
    return dataclasses.replace(
        acw(),
        name="displays",
        backbones=("lite2_fine", "text", "face"),
        long_side=320,
        holdout=2 / 3,
        unseen=("Closeups", "Crowds", "Posters", "Print"),
        max_epochs=12,
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


def named_recipe(name: str) -> Recipe:
    """The recipe of that name; raises UserError for a name that there is not."""
    if name not in RECIPES:
        raise UserError(f"no recipe '{name}'; recipes are {', '.join(RECIPES)}")
    result = RECIPES[name]()
    check(result)
    return result
