"""`acw models` and `acw promote`: what is compared on a data set, and which version the alias is on afterwards."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from job_runs import displays
from test_tracking import BASE_IG, EVALUATION, RECIPE, _leave_no_trace, banks, write_run
from test_tracking import model as model

from acw.data import load_dataset
from acw.evaluation.bootstrap import interval
from acw.heads.center_bias import GRID, CenterBias
from acw.model.model import Model
from acw.pipeline import evaluate, models, promote
from acw.storage.errors import UserError
from acw.storage.files import write_json
from acw.tracking import mlflow_store, registry
from acw.tracking.mlflow_store import tracking_uri
from acw.tracking.runs import log_run

leave_no_trace = _leave_no_trace
SCORES = {"IG": {"mean": 1.25, "ci95": [1.0, 1.5]}, "LL": {"mean": 2.0, "ci95": [1.5, 2.5]}}


@pytest.fixture(scope="module")
def misplaced(model: Model) -> Model:
    """The same model on a centre bias that suits the displays less, as it is to the left."""
    off = np.tile(np.linspace(2, -2, GRID, dtype=np.float32), (GRID, 1))
    bias = CenterBias(off - np.log(np.exp(off).sum()), None, None)
    heads = {
        name: bank | {"center_bias_weight": bank["center_bias_weight"] * 0 + 1} for name, bank in model.heads.items()
    }
    return dataclasses.replace(model, heads=heads, center_bias=bias, finalizer_bias=bias)


@pytest.fixture(scope="module")
def root(model: Model, misplaced: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three versions on one data set, the second and third worse out of fold, the first with the worse centre bias."""
    folder = tmp_path_factory.mktemp("a root")
    store = tracking_uri(folder, None)
    for name, of, ig in (
        ("first", misplaced, BASE_IG),
        ("second", model, BASE_IG - 0.1),
        ("third", model, BASE_IG - 0.2),
    ):
        provenance = {"seed": 0, "dataset": {"fingerprint": "data"}, "recipe": {"heads": ""}}
        of = dataclasses.replace(of, provenance=provenance, _loaded=model._loaded)
        evaluation = {"models": {"category_weights": {"overall": SCORES}}, "dataset": {"name": "pictures"}}
        run = write_run(folder / name, of, ig)
        write_json(run / "evaluation.json", evaluation)
        log_run(store, run, RECIPE, banks(), EVALUATION)
    return folder


def aliases(root: Path) -> dict[str, int]:
    client, _ = mlflow_store.connect(tracking_uri(root, None))
    return {alias: int(version) for alias, version in client.get_registered_model("acw").aliases.items()}


def status(arguments: Sequence[object]) -> int:
    try:
        promote.main([str(argument) for argument in arguments])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_versions_are_listed_with_scores_and_aliases(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models.main(["--root", str(root)])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if re.match(r"\s+\d", line)]
    assert [row[0] for row in rows] == ["3", "2", "1"]
    assert [row[1] for row in rows if row[1] in ("champion", "challenger")] == ["challenger", "champion"]
    assert all("1.250 [1.000, 1.500]" in line and "pictures" in line for line in lines if re.match(r"\s+\d", line))
    assert any("out-of-fold IG -0.2000 bit/fixation against champion version 1" in line for line in lines)


def test_out_of_fold_scores_decide_and_force_is_marked(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = ["--root", root]
    before = aliases(root)
    assert before["champion"] == 1
    assert status([2, *at]) == 1
    assert "version 2 does not become the champion: out-of-fold IG -0.1000" in capsys.readouterr().out
    assert aliases(root) == before

    assert status([2, *at, "--force"]) == 0
    client, _ = mlflow_store.connect(tracking_uri(root, None))
    forced = registry.version_of(client, 2)
    assert forced.aliases == ["champion"]
    assert forced.tags["forced"] == "true"
    assert "out-of-fold IG -0.1000 bit/fixation against champion version 1" in forced.tags["reason"]
    assert client.get_run(forced.run_id).data.tags["acw.reason"] == forced.tags["reason"]
    capsys.readouterr()
    models.main([str(argument) for argument in at])
    assert "forced: out-of-fold IG -0.1000" in capsys.readouterr().out

    assert status([1, *at]) == 0
    assert "version 1 is the champion now: out-of-fold IG +0.1000" in capsys.readouterr().out
    assert aliases(root)["champion"] == 1
    assert registry.version_of(client, 1).tags["forced"] == "false"
    assert status([1, *at]) == 0, "it is the champion"


def test_other_images_decide_by_likelihood(
    root: Path,
    model: Model,
    misplaced: Model,
    ray_local: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Unlike IG, it is over the same baseline for both."""
    at = ["--root", root]
    data = displays(tmp_path / "displays", ("Colour", "Faces"), 6)
    assert status([2, *at, *data]) == 0
    told = capsys.readouterr().out
    dataset = load_dataset(data[1], fixations=data[3])
    gain, categories = [], []
    for index, stimulus in enumerate(dataset.stimuli):
        x, y, _ = dataset.fixations_of(index)
        ours, theirs = (
            of.predict(stimulus.pixels()).log_density[y.astype(int), x.astype(int)] for of in (model, misplaced)
        )
        gain.append((ours - theirs).mean() / math.log(2))
        categories.append(stimulus.category)
    mean, low, high = interval(np.array(gain), np.array(categories))
    assert low > 0, "else this test tests nothing"
    found = re.search(
        r"version 2 is the champion now: LL on displays \(\w+\) (\S+) bit.* version 1, .* (\S+) to (\S+)", told
    )
    assert found, told
    assert [float(number) for number in found.groups()] == pytest.approx([mean, low, high], abs=1e-3)
    assert aliases(root)["champion"] == 2
    assert status([1, *at, *data]) == 1
    assert aliases(root)["champion"] == 2


def test_images_that_a_version_has_learned_from_decide_nothing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = displays(tmp_path / "displays", ("Colour", "Faces"), 2)
    dataset = load_dataset(data[1], fixations=data[3])
    monkeypatch.setattr(evaluate, "learned_from", lambda of: iter([dataset.fingerprint]))
    before = aliases(root)
    assert status([3, "--root", root, *data]) == 1
    assert "not comparable: version 3 has learned from images of displays" in capsys.readouterr().out
    assert aliases(root) == before


@pytest.mark.parametrize("description", [None, "{", '{"format": 99}'])
def test_heads_that_nothing_is_known_of_any_more_end_the_list(
    model: Model, description: str | None, tmp_path: Path
) -> None:
    if description is not None:
        (tmp_path / "model.json").write_text(description, encoding="utf-8")
    provenance = {"dataset": {"fingerprint": "own"}, "recipe": {"heads": str(tmp_path)}}
    assert list(evaluate.learned_from(dataclasses.replace(model, provenance=provenance))) == ["own"]


def test_what_is_not_there_is_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no version 99; `acw models` lists"):
        promote.main(["99", "--root", str(root)])
    with pytest.raises(UserError, match=r"mlflow\.db: there is no such store; give --root"):
        models.main(["--root", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []
