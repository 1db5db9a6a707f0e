"""The house: imports run one way, and each of the usual changes is made in one place (docs/development.md)."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_evaluation import dataset as dataset
from test_evaluation import means_of
from test_evaluation import model as model
from test_evaluation import scoring as scoring

from acw.data import load_dataset
from acw.data.readers import READERS
from acw.data.recording import Reader, Recording, stimulus
from acw.evaluation.metrics import METRICS, Metric, Target
from acw.evaluation.scoring import Scoring
from acw.evaluation.summary import per_image_csv, summarise, table
from acw.features.backbone import Backbone
from acw.features.zoo import BACKBONES
from acw.pipeline.job import parse
from acw.report import page, tables
from acw.storage.errors import UserError

ROOT = Path(__file__).parents[1]
# From the bottom: a wing imports from those before it, and from itself.
WINGS = (
    *("storage", "cluster", "data", "features", "heads", "recipes", "provenance", "training", "search", "fusion"),
    *("model", "evaluation", "starter", "report", "tracking", "serving", "pipeline", "cli"),
)


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (ROOT / "acw").rglob("*.py")
    }


def imported(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of acw that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "acw":
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in known else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "acw")


def test_imports_run_down_the_list_of_wings() -> None:
    known = modules()
    height = {wing: number for number, wing in enumerate(WINGS)}
    wings = {name: name.split(".")[1] for name in known if "." in name}
    assert set(wings.values()) == set(WINGS)
    upwards = [
        f"{name} imports {other}"
        for name, path in known.items()
        for other in imported(path, known)
        if name in wings and (other not in wings or height[wings[other]] > height[wings[name]])
    ]
    assert not upwards, upwards


def test_no_imports_go_in_circles() -> None:
    known = modules()
    waiting = {name: set(imported(path, known)) - {name} for name, path in known.items()}
    while free := {name for name, others in waiting.items() if not others & waiting.keys()}:
        waiting = {name: others for name, others in waiting.items() if name not in free}
    assert not waiting, "these, or some of them, import each other"


def test_nothing_is_imported_that_a_dependency_keeps_to_itself() -> None:
    """It may be gone in the dependency's next version.

    But for one: nothing public keeps Ray Serve's replicas to the loopback interface (test_serve.py looks whether they
    are), and where this is gone they do not start.
    """
    private = [
        f"{name} imports {node.module}"
        for name, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and any(part.startswith("_") for part in (node.module or "").split("."))
        if node.module != "__future__"
    ]
    assert private == ["acw.serving.service imports ray.serve._private"], private


# --- Changes, each in one place: what these tests do is what docs/development.md says -----------------------------


def test_a_backbone_is_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    row = Backbone("made_up", "resnet18.a1_in1k", ("layer3.1.conv2", "layer4.1.conv2"), "random", long_side=256)
    monkeypatch.setitem(BACKBONES, row.name, row)
    arguments = ["demo", "--backbones", "made_up,lite0", "--root", str(tmp_path)]
    assert [one.name for one in parse(arguments, "").recipe.backbone_values] == ["made_up", "lite0"]
    assert parse([*arguments, "--taps", "deepest"], "").recipe.backbone_values[0].taps == ("layer4.1.conv2",)
    with pytest.raises(UserError, match="own or deepest, as made_up names no earlier layer"):
        parse([*arguments, "--taps", "earlier"], "")


def brightest(density: torch.Tensor, target: Target) -> float:
    """The share of fixations in the quarter of the image's area that is likeliest."""
    edge = density.flatten().quantile(0.75)
    return float((density.flatten()[target.pixels] > edge).double().mean())


def test_a_metric_is_a_row(monkeypatch: pytest.MonkeyPatch, scoring: Scoring) -> None:
    """It is in the score table, by pysaliency's side of `--exact` too, in the files and in the report."""
    monkeypatch.setitem(METRICS, "Q", Metric("Q", "", -1, brightest))
    scores: dict[int, Any] = {}
    for index in (1, 4):
        fast = scoring.image(index, means_of(scoring))
        exact = dataclasses.replace(scoring, exact=True).image(index, means_of(scoring))
        for name in ("uniform", "category_weights", "center_bias"):
            assert list(fast[name]) == list(METRICS)
            assert fast[name]["Q"] == pytest.approx(exact[name]["Q"], abs=0.01)
            assert 0 <= fast[name]["Q"] <= 1
        scores[index] = fast
    summary = summarise(scoring.dataset, scores, seed=0)
    assert table(summary).splitlines()[0].split()[:9] == [*METRICS]
    assert per_image_csv(scoring.dataset, scores).splitlines()[0].endswith(",SIM,Q")
    assert any(row["metric"] == "Q" for row in summary["comparisons"])
    rows = {name: {"IG": one["overall"]["IG"]["mean"]} for name, one in summary["models"].items()}
    assert rows
    shown = page.scores(page.Run(Path(), summary, None, {}))["table"]
    assert tables.Head("Q", numeric=True, descending=False) in shown.heads


def test_a_reader_is_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One that reads `NAME.txt` with a fixation a line beside each image."""

    def read(folder: Path, fixations: str | None) -> Recording:
        files = sorted(folder.glob("*.png"))
        places = [np.loadtxt(file.with_suffix(".txt"), ndmin=2) for file in files]
        image = np.repeat(np.arange(len(files)), [len(one) for one in places])
        x, y = np.concatenate(places).T
        stimuli = [stimulus(folder, file.name, file.stem[0]) for file in files]
        return Recording(stimuli, image, x, y, np.full(len(image), -1))

    row = Reader("notes", lambda has, _: has("a0.txt"), lambda name: name.endswith((".png", ".txt")), read)
    monkeypatch.setitem(READERS, row.name, row)
    data = tmp_path / "data"
    data.mkdir()
    for name in [f"{letter}{number}" for letter in "ab" for number in range(6)]:
        Image.new("1", (80, 60), 1).save(data / f"{name}.png")
        (data / f"{name}.txt").write_text("30.5 20\n41 33\n", encoding="utf-8")
    assert load_dataset(str(data)).reader == "notes"
    job = parse(["demo", "--dataset", str(data), "--reader", "notes", "--root", str(tmp_path / "root")], "")
    assert (job.dataset.categories, len(job.dataset.x)) == (("a", "b"), 24)
    (data / "a0.txt").write_text("99 20\n", encoding="utf-8")
    with pytest.raises(UserError, match="fixations outside their image"):
        load_dataset(str(data))
