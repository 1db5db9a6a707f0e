"""A category's own readouts: they learn from its images alone, are taken only where they pay, and change no other's."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_adapt import pictures, truth, write
from test_model import CATEGORIES, NAMES
from test_model import folder as folder
from test_model import model as model

import acw
from acw.data import load_dataset
from acw.features.backbone import load_backbone
from acw.fusion import classifier
from acw.heads.finalizer import upsample
from acw.model import files, new_category, own_readouts
from acw.model.model import Model
from acw.model.own_readouts import OwnReadouts
from acw.model.study import Study
from acw.pipeline import adapt
from acw.storage.errors import UserError
from acw.storage.files import csv_rows
from acw.tracking import mlflow_store
from acw.training.trainer import Diverged

IMAGES = np.arange(12)


@pytest.fixture(scope="module")
def study(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Study:
    base = tmp_path_factory.mktemp("study")
    path, _, fixations = write(model, base / "odd", len(IMAGES), True)
    return adapt.look(model, load_dataset(path, fixations=fixations), base / "runs")


@pytest.fixture(scope="module")
def fold() -> np.ndarray:
    return new_category.fold_of(len(IMAGES), 0)


def trained_by(study: Study, fold: np.ndarray) -> OwnReadouts:
    """All of the way."""
    *_, last = own_readouts.train(study, "odd", IMAGES, fold, seed=0)
    assert last.share == 1
    return last


@pytest.fixture(scope="module")
def trained(study: Study, fold: np.ndarray) -> OwnReadouts:
    return trained_by(study, fold)


def test_a_training_that_diverges_is_said(study: Study, fold: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_readouts, "RATE", 1e30)
    with pytest.raises(Diverged, match="own readouts: lite0's loss is not finite"):
        trained_by(study, fold)


def likelihood(study: Study, log_densities: list[torch.Tensor]) -> float:
    """Mean over images and views of the log-density at the fixations."""
    at = study.model.finalizer.at_pixels
    seen = study.seen
    return float(
        np.mean(
            [
                [at(one, x, y, size).mean() for one in of_image]
                for of_image, (x, y), size in zip(log_densities, seen.fixations, seen.sizes, strict=True)
            ]
        )
    )


def test_features_that_are_kept_say_what_the_image_does(study: Study, model: Model) -> None:
    for index, pixels in enumerate(pictures(3)):
        log_densities, pooled = model.component_log_densities(pixels)
        np.testing.assert_allclose(study.seen.log_densities[index], log_densities, atol=0.02, err_msg="of float16")
        np.testing.assert_allclose(study.seen.pooled[index], pooled, atol=1e-4)


def test_readouts_know_nothing_of_an_image_that_they_leave_out(
    study: Study, fold: np.ndarray, trained: OwnReadouts
) -> None:
    dataset = study.dataset
    x = np.where(dataset.image == 0, 0.5, dataset.x)
    other = dataclasses.replace(study, dataset=dataclasses.replace(dataset, x=x))
    again = trained_by(other, fold)
    pairs = zip(again.left_out, trained.left_out, strict=True)
    moved = np.array([float((now - old).abs().max()) for now, old in pairs])
    assert moved[fold == fold[0]].max() < 1e-3 < 1e-2 < moved[fold != fold[0]].min(), "but for rounding in the bank"


def test_they_learn(study: Study, trained: OwnReadouts, fold: np.ndarray) -> None:
    before = likelihood(study, list(study.seen.log_densities))
    assert likelihood(study, [study.said_by(trained.heads, index) for index in IMAGES]) > before + 0.05
    assert likelihood(study, trained.left_out) > before, "and what they learn holds for other images"
    again = trained_by(study, fold)
    assert all(value.equal(again.heads[name][key]) for name in NAMES for key, value in trained.heads[name].items())


@pytest.fixture(scope="module")
def foretold(model: Model, study: Study) -> list[torch.Tensor]:
    """Of each image twice, on the grid, where people look in truth."""
    grids = [tuple(of_image.shape[1:]) for of_image in study.seen.log_densities]
    right = [torch.from_numpy(truth(model, pixels, True)).exp()[None, None] for pixels in pictures(len(IMAGES))]
    pairs = zip(right, grids, strict=True)
    return [F.interpolate(one, grid, mode="area")[0].log().expand(2, -1, -1) for one, grid in pairs]


def test_they_are_taken_only_where_they_pay(study: Study, model: Model, foretold: list[torch.Tensor]) -> None:
    noise = torch.Generator().manual_seed(0)
    bad = [one + torch.randn(one.shape, generator=noise) for one in study.seen.log_densities]
    by_numbers = new_category.fit(model, study.seen, 0)
    for left_out, taken in ((foretold, True), (bad, False), (list(study.seen.log_densities), False)):
        fitted = new_category.fit(model, study.seen, 0, [OwnReadouts(1.0, {}, left_out)])
        assert (fitted.readouts is not None) == taken
        assert (fitted.gain.mean() > by_numbers.gain.mean()) == taken


@pytest.fixture(scope="module")
def taken(trained: OwnReadouts, foretold: list[torch.Tensor]) -> OwnReadouts:
    """As they are, and as if they foretold images left out so well that they are taken."""
    return dataclasses.replace(trained, left_out=foretold)


def known_too(model: Model, study: Study, **names: OwnReadouts | None) -> Model:
    """With a category of each name, which has readouts of its own or none."""
    fitted = [new_category.fit(model, study.seen, 0, [own] if own else []) for own in names.values()]
    assert [one.readouts for one in fitted] == list(names.values())
    number = np.arange(len(IMAGES)) % len(names)
    wider, _ = classifier.extended(model.classifier, study.seen.pooled, number, new_category.fold_of(len(IMAGES), 0))
    return new_category.extended(model, list(names), fitted, wider, {})


def test_no_other_category_notices(study: Study, model: Model, taken: OwnReadouts, tmp_path: Path) -> None:
    """Nor through a file, and with a third and a fourth category behind it."""
    adapted = known_too(model, study, odd=taken)
    files.save(adapted, tmp_path / "model", [load_backbone(one) for one in model.backbones])
    loaded = files.load(tmp_path / "model")
    assert loaded.components == ["lite0", "lite0@odd", "smaller", "smaller@odd"]
    (pixels,) = pictures(1, first=70)
    seen = dataclasses.replace(study.seen, log_densities=[loaded_of(loaded, one) for one in pictures(len(IMAGES))])
    more = dataclasses.replace(study, model=loaded, seen=seen)
    further = known_too(known_too(loaded, more, plain=None), more, third=taken)
    assert len(further.components) == 6
    for category in CATEGORIES:
        before = model.predict(pixels, category)
        for after in (model_.predict(pixels, category) for model_ in (adapted, loaded, further)):
            np.testing.assert_array_equal(after.log_density, before.log_density)
            assert after.weights == pytest.approx(before.weights, abs=1e-12)
            np.testing.assert_allclose(after.by_backbone["lite0"], before.by_backbone["lite0"], atol=1e-6)
    odd = adapted.predict(pixels, "odd")
    assert sum(odd.weights.values()) == pytest.approx(1)
    for later in (loaded, further):
        np.testing.assert_array_equal(later.predict(pixels, "odd").log_density, odd.log_density)
    # What a view says by itself is then what its own readouts say.
    own = dataclasses.replace(model, heads=taken.heads)
    alone = upsample(own.component_log_densities(pixels)[0], pixels.shape[:2])
    for name, expected in zip(NAMES, alone, strict=True):
        np.testing.assert_allclose(odd.by_backbone[name], expected, atol=1e-5)


def test_several_at_once_are_as_each_by_itself(study: Study, model: Model, taken: OwnReadouts) -> None:
    kinds = {"first": taken, "second": None, "third": dataclasses.replace(taken, heads=model.heads)}
    together = known_too(model, study, **kinds)
    assert together.components == [f"{view}{own}" for view in NAMES for own in ("", "@first", "@third")]
    (pixels,) = pictures(1, first=73)
    for name, own in kinds.items():
        alone = known_too(model, study, **{name: own}).predict(pixels, name)
        np.testing.assert_array_equal(together.predict(pixels, name).log_density, alone.log_density)


def test_weights_that_add_up_to_a_little_more_than_1_are_none_less_than_0(
    study: Study, model: Model, taken: OwnReadouts
) -> None:
    """As those that are kept in float32 do, of which a logarithm is taken."""
    adapted = known_too(model, study, odd=taken)
    assert adapted.adaptation is not None
    adapted.adaptation = dataclasses.replace(adapted.adaptation, weights=adapted.adaptation.weights * (1 + 1e-7))
    (pixels,) = pictures(1, first=72)
    assert all(np.isfinite(of_view).all() for of_view in adapted.predict(pixels, "odd").by_backbone.values())


def loaded_of(model: Model, pixels: np.ndarray) -> torch.Tensor:
    return model.component_log_densities(pixels)[0]


def test_an_image_of_an_uncertain_category_has_some_of_each(study: Study, model: Model, taken: OwnReadouts) -> None:
    adapted = known_too(model, study, odd=taken)
    (pixels,) = pictures(1, first=71)
    prediction = adapted.predict(pixels)
    assert 0.001 < prediction.categories["odd"] < 0.999, "uncertain is what this is about"
    log_densities, pooled = adapted.component_log_densities(pixels)
    numbers = adapted.adaptation.of(adapted.classifier.shares(pooled[None])[0])
    np.testing.assert_allclose(
        prediction.log_density, adapted.adapted(log_densities, numbers, pixels.shape[:2]), atol=1e-6
    )
    own = numbers.weights.reshape(2, 2)[:, 1].sum()
    assert own == pytest.approx(prediction.categories["odd"], abs=1e-9)


def test_the_command_writes_them(
    study: Study, model: Model, taken: OwnReadouts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd, out = new_category.fit(model, study.seen, 0, [taken]), tmp_path / "out"
    adapt.write(study, {"odd": IMAGES}, {"odd": odd}, "a model", out, mlflow_store.ready(tmp_path, None))
    assert re.search(r"odd: \+.*; readouts of its own, 100% of the way to the trained ones", capsys.readouterr().out)
    recorded = json.loads((out / "adaptation.json").read_text(encoding="utf-8"))["categories"]["odd"]
    assert recorded["readouts_share"] == 1
    *_, row, for_all = csv_rows(out / "category_adaptation.csv")
    assert sum(float(row[f"weight:{name}"]) for name in NAMES) == pytest.approx(1, abs=1e-5)
    assert (row["category"], for_all["category"]) == ("odd", "all images")
    (pixels,) = pictures(1, first=74)
    expected = known_too(model, study, odd=taken).predict(pixels, "odd").log_density
    np.testing.assert_array_equal(acw.load(out).predict(pixels, "odd").log_density, expected)


def test_such_a_models_heads_are_not_taken_for_a_run(
    study: Study, model: Model, taken: OwnReadouts, tmp_path: Path
) -> None:
    from acw.pipeline.job import parse

    adapted = known_too(model, study, odd=taken)
    files.save(adapted, tmp_path / "model", [load_backbone(one) for one in model.backbones])
    with pytest.raises(UserError, match="odd have readouts of their own; give the model from before"):
        parse(["cat2000_iie", "--heads", str(tmp_path), "--dataset", "synthetic", "--root", str(tmp_path / "runs")], "")
