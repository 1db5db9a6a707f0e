"""Says what is wrong, or odd, with a data set, all of it at once, and by which option or change it is mended.

Exit status 0: it can be used as it is; 1: something has to be done before. Images with their fixations are drawn into a
PNG, the worst first: yellow inside, red outside; rings are where fixations are if they are meant otherwise.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from acw.data.checks import Examined, Finding, examine
from acw.data.loading import Reading, assembled, read_files
from acw.pipeline.options import Parser, add_reader_options, local_path, reader_options, root_folder
from acw.recipes import RECIPES, Recipe, named_recipe
from acw.storage.addresses import in_cache
from acw.storage.errors import UserError
from acw.storage.files import plain_name

if TYPE_CHECKING:
    from acw.data import Stimulus
    from acw.report.placement import Shown

DRAWN = 12  # images
MOST_ROWS = 20  # of a table
NO_RECIPE = "none"


def add_options(parser: Parser) -> None:
    about = "the data set, as for --dataset: a folder, or s3://BUCKET/PREFIX"
    parser.add_argument("dataset", metavar="PATH", help=about)
    add_reader_options(parser)
    about = "what a run of this recipe would take is told, and its folds and held-out images are provided for (gaze)"
    parser.add_argument("--recipe", choices=(*RECIPES, NO_RECIPE), default="gaze", help=about)
    about = "under which runs are or will be: what they took is what the next will take (default: runs)"
    parser.add_argument("--root", default="runs", metavar="PATH", help=about)
    parser.add_argument("--out", metavar="FILE", help="the picture, a PNG (default: check-NAME.png here)")


def main(argv: Sequence[str]) -> None:
    parser = Parser(__doc__)
    add_options(parser)
    options = parser.read(argv)
    folder = local_path(options["dataset"], "PATH")
    out = local_path(options["out"] or f"check-{plain_name(folder.name)}.png", "--out")
    if options["fixations"]:
        options["fixations"] = str(local_path(options["fixations"], "--fixations"))
    for path, what in ((folder, "PATH"), (Path(options["fixations"] or folder), "--fixations")):
        if not in_cache(path) and not path.exists():
            raise UserError(f"{what} {path}: there is no such file or folder; correct the path")
    sys.exit(0 if check(folder, options, out) else 1)


def check(folder: Path, options: dict[str, Any], out: Path) -> bool:
    """Prints what there is to say, and writes the picture; whether the data set can be used as it is.

    Raises UserError for options that cannot be meant. Files that cannot be read are a finding.
    """
    recipe = named_recipe("acw" if options["recipe"] == NO_RECIPE else options["recipe"])
    try:
        reading = read_files(str(folder), fixations=options["fixations"], **reader_options(options))
    except UserError as error:
        if str(error).startswith("--"):
            raise
        _print_findings([Finding(str(error), "")])
        return False
    examined = examine(reading, recipe.folds, recipe.holdout)
    print("\n".join(tables(reading)), flush=True)
    findings = list(examined.findings)
    if examined.usable:
        try:
            findings += _planned(reading, recipe, options)
        except UserError as error:
            findings.append(Finding(str(error), ""))
    _print_findings(findings)
    if examined.places is not None:
        from acw.report.figures import save
        from acw.report.placement import placement

        save(placement(shown(examined)), out)
        print(f"\npicture: {out}", flush=True)
    return not any(finding.needed for finding in findings)


def _print_findings(findings: Sequence[Finding]) -> None:
    """Those that need something first, each a line with its remedy."""
    needed, odd = ([finding for finding in findings if finding.needed is kind] for kind in (True, False))
    print(f"\nto be mended: {len(needed) or 'nothing'}", flush=True)
    for finding in needed:
        print(f"  ! {finding}")
    if odd:
        print("to be known:")
    for finding in odd:
        print(f"  - {finding}", flush=True)


def _planned(reading: Reading, recipe: Recipe, options: dict[str, Any]) -> list[Finding]:
    """Prints what a run of the recipe would take, if one is asked for; what is to be known about that.

    Raises UserError for what would stop a run and is nothing of the files'.
    """
    from acw.data import split
    from acw.pipeline.job import Job

    dataset = assembled(reading)
    folds = split(dataset, recipe.seed, recipe.folds, recipe.holdout)
    folds.refuse_unscorable()
    if options["recipe"] == NO_RECIPE:
        return []
    from acw.pipeline import plan

    try:
        made = plan.make(Job(recipe, dataset, folds, root_folder(options["root"]), None))
    except UserError as error:
        return [Finding(f"what a run of {recipe.name} would take is not known: {error}", "", needed=False)]
    print("\n" + plan.text(made, None), flush=True)
    return []


# --- Tables ------------------------------------------------------------------------------------------------------


def tables(reading: Reading) -> Iterator[str]:
    """Counts by category, subject and size, line by line."""
    recording = reading.recording
    stimuli, image = recording.stimuli, recording.image
    people = len(np.unique(recording.subject[recording.subject >= 0]))
    categories = np.array([stimulus.category for stimulus in stimuli])
    yield (
        f"{reading.folder} ({reading.reader}): {len(stimuli)} images with fixations in {len(set(categories))} "
        f"categories, {len(image)} fixations of {people or 'unknown'} subjects"
    )
    per_image = np.bincount(image, minlength=len(stimuli))
    yield f"\n{'category':24}{'images':>8}{'fixations':>11}{'an image':>12}"
    rows = []
    for name in sorted(set(categories)):
        counts = per_image[categories == name]
        rows.append(f"{name:24}{len(counts):>8}{counts.sum():>11}{counts.min():>7}-{counts.max()}")
    yield from _first(rows)
    if people:
        yield f"\n{'subject':24}{'images':>8}{'fixations':>11}"
        seen = {number: image[recording.subject == number] for number in np.unique(recording.subject).tolist()}
        names = {number: str(number) if number >= 0 else "unknown" for number in seen}
        yield from _first([f"{names[n]:24}{len(np.unique(its)):>8}{len(its):>11}" for n, its in seen.items()])
    yield f"\n{'size, px':24}{'images':>8}"
    sizes = Counter(f"{stimulus.size[1]}x{stimulus.size[0]}" for stimulus in stimuli)
    yield from _first([f"{size:24}{count:>8}" for size, count in sizes.most_common()])


def _first(rows: Sequence[str]) -> Iterator[str]:
    """The first rows of a table, and how many more there are."""
    yield from rows[:MOST_ROWS]
    if len(rows) > MOST_ROWS:
        yield f"(and {len(rows) - MOST_ROWS} more)"


# --- The picture -------------------------------------------------------------------------------------------------


def shown(examined: Examined) -> list[Shown]:
    """Some images, the worst first: by the share of their fixations outside, then spread over the data set."""
    from acw.report.placement import Shown

    recording, places = examined.reading.recording, examined.places
    assert places is not None
    number = len(recording.stimuli)
    total, lost = (np.bincount(recording.image[m], minlength=number) for m in (places.x == places.x, ~places.inside))
    share = lost / np.maximum(total, 1)
    spread = np.empty(number)
    spread[np.argsort(np.arange(number) * 0.6180339887 % 1)] = np.arange(number)
    chosen: list[Shown] = []
    for index in np.lexsort((spread, -share)):
        stimulus: Stimulus = recording.stimuli[index]
        mine = recording.image == index
        if len(chosen) == DRAWN:
            break
        try:
            pixels = stimulus.pixels()
        except UserError:  # a damaged one is a finding
            continue
        x, y = places.x[mine], places.y[mine]
        rather = examined.other.apply(x, y, stimulus.size) if examined.other else None
        outside = f": {lost[index]} of {total[index]} outside" if lost[index] else ""
        chosen.append(Shown(f"{stimulus.name}{outside}", pixels, x, y, rather))
    return chosen
