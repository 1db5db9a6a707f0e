"""The systems of ACW and both its tables, from one command, on a data set that is small enough for tests."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from job_runs import Run, displays, finished, succeed

import acw
from acw.evaluation.metrics import METRICS

OURS = ("acw_v1", "acw_v2", "acw_v3", "deepgaze_iie", "acw")
THEIRS = ("deepgaze2e_even", "deepgaze2e_acw")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished model that stands for the authors': it was trained on other images."""
    return finished(tmp_path_factory.getbasetemp() / "jobs")


@pytest.fixture(scope="module")
def result(other: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reproduction")
    data = displays(folder / "images", ("Faces", "Text"), 8, first=10)
    fields = [
        *("--workers", "1", "--backbones", "lite0,lite1", "--folds", "2"),
        *("--max-epochs", "1", "--joint-max-epochs", "2"),
    ]
    lines = succeed("reproduce", *data, *fields, "--root", folder / "runs", "--deepgaze", other.job.folder)
    return Path(lines[-1])


def table(result: Path, number: int) -> list[dict[str, str]]:
    with result.with_name(f"table{number}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_tables_have_every_system_beside_what_was_published(result: Path) -> None:
    first, second = table(result, 1), table(result, 2)
    here = [row for row in first if row["measured"] == "here"]
    assert [row["system"] for row in here] == [*OURS, *THEIRS]
    assert [row["system"] for row in first if row["measured"] == "published"] == list(OURS[:3])
    assert [row["epochs"] for row in here] == ["1 + 2"] * 3 + ["1", "1", "", ""]
    assert all("trained elsewhere" in row["what changed"] for row in here[-2:])
    published = {row["system"]: row for row in second if row["measured"].startswith("published")}
    assert len(published) == 8
    assert published["DeepGaze IIE"]["IG"] == "0.1893"
    assert published["ACW (original)"]["KLDiv"] == "8.3372"
    content = json.loads(result.read_text(encoding="utf-8"))
    for row in second[: -len(published)]:
        if row["system"] in content["runs"]:
            evaluation = json.loads(
                (Path(content["runs"][row["system"]]) / "evaluation.json").read_text(encoding="utf-8")
            )
            overall = evaluation["models"]["category_weights"]["overall"]
            assert {m: float(row[m]) for m in METRICS} == {m: overall[m]["mean"] for m in METRICS}


def test_every_two_systems_are_compared_on_the_same_images(result: Path) -> None:
    content = json.loads(result.read_text(encoding="utf-8"))
    ig = {(row["a"], row["b"]): row for row in content["comparisons"] if row["metric"] == "IG"}
    assert len(ig) == 7 * 6 // 2
    second = {row["system"]: row for row in table(result, 2)}
    for (a, b), row in ig.items():
        assert row["mean"] == pytest.approx(float(second[a]["IG"]) - float(second[b]["IG"]), abs=1e-5)
        assert row["ci95"][0] <= row["mean"] <= row["ci95"][1]


def test_validation_images_are_scored_by_heads_that_did_not_train_on_them(result: Path) -> None:
    """Their IG is the one by which a joint training chose its epoch, up to the grid on which that is measured."""
    from acw.training.joint import SystemState, system_path

    folder = Path(json.loads(result.read_text(encoding="utf-8"))["runs"]["acw_v3"])
    validation = json.loads((folder / "validation.json").read_text(encoding="utf-8"))
    best = [SystemState.load(system_path(folder, fold)) for fold in range(2)]
    expected = np.mean([state.best_ig for state in best])
    assert np.mean([scores["IG"] for scores in validation.values()]) == pytest.approx(expected, abs=0.02)


def test_weights_are_even_where_none_are_learned_and_kept_epoch_by_epoch_where_they_are(result: Path) -> None:
    runs = json.loads(result.read_text(encoding="utf-8"))["runs"]
    for name, learned in (("acw_v1", False), ("acw_v3", True), ("deepgaze2e_even", False)):
        history = np.load(Path(runs[name]) / "category_weights_history.npy")
        assert bool((history == 0.5).all()) is not learned, name
    model = acw.load(runs["acw_v3"])
    history = np.load(Path(runs["acw_v3"]) / "category_weights_history.npy")
    assert history.shape == (3, 2, 2)  # the start and two epochs, categories, backbones
    assert (model.systems, model.weights.shape) == (2, (2, 4))
    state = torch.load(Path(runs["acw_v3"]) / "model.pth", weights_only=True)
    assert state["heads/lite1/1/conv0.weight"].equal(model.heads["lite1/1"]["conv0.weight"])
    assert torch.from_numpy(model.weights).equal(state["weights"])


def test_a_finished_models_heads_are_taken_as_they_are(result: Path, other: Run) -> None:
    runs = json.loads(result.read_text(encoding="utf-8"))["runs"]
    theirs, ours = acw.load(other.job.folder), acw.load(runs["deepgaze2e_acw"])
    assert ours.heads.keys() == theirs.heads.keys()
    for name, bank in theirs.heads.items():
        assert all(value.equal(bank[key]) for key, value in ours.heads[name].items())
    assert ours.categories == ["Faces", "Text"]
    assert not np.allclose(ours.center_bias.log_density, theirs.center_bias.log_density)
