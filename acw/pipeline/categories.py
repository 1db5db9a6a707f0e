"""Names the categories that a run has found by itself (`--categories auto`); without --name, lists them.

acw categories RUN --name 1=street --name 2="shop windows"

The run's report shows what each looks like. Scores, report and model in the run's folder have the names from then on,
and so has a new version of the registered model, which takes the aliases of the version before. Names can be given
again; `unnamed` in the run's folder keeps the files as they were. Pictures (PNG) keep the numbers.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from acw.pipeline.options import Parser, local_path
from acw.storage.errors import UserError
from acw.storage.files import fetch, present, remove, write_atomic, write_json
from acw.tracking import model_card

FOUND = "categories.json"
NAMES = "category_names.json"
ORIGINALS = "unnamed"  # folder in the run's
LAST = "model/model.json"
# What holds categories by name. All of it is text, and so are unnamed categories' names: no other word is like them.
TEXTS = (
    *("evaluation.json", "per_image.csv", "out_of_fold.csv", "report.html", FOUND),
    *("category_weights.csv", "category_weights_history.csv", "category_adaptation.csv"),
    *(f"model/{model_card.FILE}", LAST),
)
NAME = re.compile(r"\w[\w .()+-]{0,59}")


def add_options(parser: Parser) -> None:
    about = "folder of a run, which `acw run` prints as `run: FOLDER`; or s3://BUCKET/KEY of it"
    parser.add_argument("run", metavar="RUN", help=about)
    about = "the name of the category of that number; can be repeated"
    parser.add_argument("--name", action="append", default=[], metavar="NUMBER=NAME", help=about)


def main(argv: Sequence[str]) -> None:
    parser = Parser(__doc__)
    add_options(parser)
    options = parser.read(argv)
    run = local_path(options["run"], "RUN")
    found, names = _found(run)
    if options["name"]:
        names = _named(names, options["name"])
        rename(run, names)
        from acw.tracking import renamed

        print(f"registered: acw version {renamed.log(run)}, with these names", flush=True)
    images = Counter(found["images"].values())
    for number, (category, name) in enumerate(names.items(), 1):
        print(f"{number}: {name}, {images[category]} images", flush=True)


def _found(run: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """What the run has found, as it found it, and what each category is called by now."""
    path = next(filter(present, (run / ORIGINALS / FOUND, run / FOUND)), None)
    if path is None:
        raise UserError(f"{run / FOUND}: is missing; this names what a run with --categories auto has found")
    if not present(run / "registration.json"):
        raise UserError(f"{run}: this run is not finished; give its own command again first")
    found: dict[str, Any] = json.loads(fetch(path).read_text(encoding="utf-8"))
    names = {category: category for category in found["montages"]}
    if present(run / NAMES):
        names |= json.loads(fetch(run / NAMES).read_text(encoding="utf-8"))
    return found, names


def _named(names: Mapping[str, str], given: Sequence[str]) -> dict[str, str]:
    """With those that are given; raises UserError for what cannot be one."""
    result = dict(names)
    for entry in given:
        number, separator, name = (part.strip() for part in entry.partition("="))
        if not separator or not number.isdecimal() or not 1 <= int(number) <= len(names):
            raise UserError(f"--name {entry}: write NUMBER=NAME, with a number from 1 to {len(names)}")
        if not NAME.fullmatch(name):
            raise UserError(f"--name {entry}: a name has letters, digits, spaces and . ( ) + - _ only, 60 at most")
        result[list(names)[int(number) - 1]] = name
    if twice := [name for name, count in Counter(result.values()).items() if count > 1]:
        raise UserError(f"--name: two categories would be called '{twice[0]}'; give each a name of its own")
    return result


def forget(run: Path) -> None:
    """Of categories that are found anew, which names and copies of the ones before do not fit."""
    # First what says that the copies are whole.
    for text in (f"{ORIGINALS}/{LAST}", NAMES, *(f"{ORIGINALS}/{text}" for text in TEXTS)):
        remove(run / text)


def rename(run: Path, names: Mapping[str, str]) -> None:
    """Gives the files of a run other names of categories: from their originals, of which it keeps a copy."""
    if not present(run / ORIGINALS / LAST):
        for text in filter(lambda text: present(run / text), TEXTS):
            write_atomic(run / ORIGINALS / text, fetch(run / text).read_bytes())
    write_json(run / NAMES, dict(names))
    # Whole words only: `unnamed-1.png` and `photos/unnamed-1` would be files.
    word = re.compile("|".join(rf"(?<![\w./-]){re.escape(category)}(?![\w/-]|\.\w)" for category in names))
    for text in filter(lambda text: present(run / ORIGINALS / text), TEXTS):
        original = fetch(run / ORIGINALS / text).read_text(encoding="utf-8")
        write_atomic(run / text, word.sub(lambda match: names[match[0]], original))
