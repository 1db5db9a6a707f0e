"""Text is UTF-8 on every machine, whatever its locale is; what a terminal cannot show ends no job."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from acw.pipeline.job import parse
from acw.storage.errors import UserError
from acw.storage.files import csv_text, write_atomic, write_json

ROOT = Path(__file__).parents[1]
FOLDERS = ("acw", "jobs", "tests", "benchmarks", "tune_spaces")
# Whose `open` has no encoding.
OTHERS = ("Image", "opener", "wheel", "urllib.request.build_opener(urllib.request.ProxyHandler({}))")


def _without_encoding(source: str) -> Iterator[ast.Call]:
    """Calls that read or write text in the locale's encoding. Ruff's PLW1514 knows only paths whose type it sees."""
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call) or {None, "encoding"} & {keyword.arg for keyword in call.keywords}:
            continue
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        method = isinstance(call.func, ast.Attribute)
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        mode = [*call.args[not method :][:1], *[given[key] for key in given if key == "mode"]]
        text = "b" not in (str(mode[0].value) if mode and isinstance(mode[0], ast.Constant) else "")
        other = isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) in OTHERS
        if (
            (name == "read_text" and not call.args)
            or (name == "write_text" and len(call.args) == 1)
            or (name in ("open", "fdopen") and text and not other)
            or (name in ("NamedTemporaryFile", "TemporaryFile") and mode and text)
            or any(ast.unparse(given.get(key, call)) == "True" for key in ("text", "universal_newlines"))
        ):
            yield call


def test_every_text_has_its_encoding() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        for call in _without_encoding(path.read_text(encoding="utf-8"))
    ]
    assert not found
    assert len(list(_without_encoding("open(x); p.open('w'); p.read_text(); run(x, text=True); open(x, 'rb')"))) == 4


# Only of our own modules; Python itself says where an encoding is left to the locale.
READS = """
import sys, warnings
warnings.filterwarnings("error", category=EncodingWarning, module=r"acw\\.")
from pathlib import Path
from acw.model import description
from acw.pipeline import job
from acw.report import page
folder = Path(sys.argv[1])
assert job._read_overlay(str(folder / "overlay.json"))["fields"] == {"lr": "Straße"}
assert description.describe(folder)["categories"] == ["Straße"]
assert list(page.Run(folder, {}, None, {}).weights) == ["Straße"]
print("Straße")
"""


def test_what_is_written_is_read_in_any_locale(tmp_path: Path) -> None:
    from acw.model.description import FORMAT

    write_json(tmp_path / "overlay.json", {"lr": "Straße"})
    write_json(tmp_path / "model.json", {"format": FORMAT, "categories": ["Straße"], "backbones": []})
    header = ["category", "backbone", "weight", "low", "high"]
    write_atomic(tmp_path / "category_weights.csv", csv_text(header, [["Straße", "lite0", 1, 0, 1]]))
    # Not UTF-8 by force, nor as the system's default.
    environment = os.environ | {
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONWARNDEFAULTENCODING": "1",
        "PYTHONIOENCODING": "utf-8",
        "PYTHONPATH": str(ROOT),
    }
    (tmp_path / "reads.py").write_text(READS, encoding="utf-8")
    command = [sys.executable, str(tmp_path / "reads.py"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "Straße\n"


def test_a_terminal_without_the_letters_ends_no_job(tmp_path: Path) -> None:
    code = "from acw.cli import run; run(lambda argv: print('Straße', flush=True))"
    environment = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, cwd=ROOT)
    assert (result.returncode, result.stdout) == (0, b"Stra\\xdfe\n")


def test_names_that_are_no_utf8_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--root .*stra\\udcdfe: its name is not UTF-8; rename it"):
        parse(["demo", "--root", os.fsdecode(os.fsencode(tmp_path) + b"/stra\xdfe")], "")
    folder = os.fsencode(tmp_path) + b"/trainSet/Stimuli/stra\xdfe"
    os.makedirs(folder)
    from PIL import Image

    with open(folder + b"/001.jpg", "wb") as file:
        Image.new("RGB", (40, 30)).save(file, "JPEG")
    locations = os.fsencode(tmp_path) + b"/trainSet/FIXATIONLOCS/stra\xdfe"
    os.makedirs(locations)
    import numpy as np
    from scipy.io import savemat

    fixations = np.zeros((30, 40), np.uint8)
    fixations[3, [4, 9]] = 1
    with open(locations + b"/001.mat", "wb") as file:
        savemat(file, {"fixLocs": fixations})
    with pytest.raises(
        UserError, match=r"the name of an image: 'Stimuli/stra\\udcdfe/001.jpg' holds a character that cannot"
    ):
        parse(["demo", "--dataset", str(tmp_path), "--root", str(tmp_path / "runs")], "")
