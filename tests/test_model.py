"""The finished model: what was saved is what predicts, and every prediction is a density."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from acw import heads, load
from acw.backbones import BACKBONES, Backbone, load_backbone
from acw.categories import CategoryClassifier
from acw.center_bias import fixed_gaussian, kde
from acw.model import HEADS_AT_ONCE, Model
from acw.storage import UserError

NAMES = ("lite0", "smaller")
CATEGORIES = ["Art", "Street", "Zoo"]
WEIGHTS = np.array([[0.9, 0.1], [0.25, 0.75], [0.0, 1.0]])


def backbone(name: str, long_side: int) -> Backbone:
    return dataclasses.replace(BACKBONES["lite0"], name=name, weights="random", long_side=long_side)


def image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model() -> Model:
    """Two views by one random network; more heads than predict at once, all of them moved from where they start."""
    backbones = [backbone(NAMES[0], 96), backbone(NAMES[1], 64)]
    channels = load_backbone(backbones[0]).channels
    generator = torch.Generator().manual_seed(0)
    banks = {}
    for number, name in enumerate(NAMES):
        bank = heads.new_heads(sum(channels), 10.0, [100 * number + seed for seed in range(HEADS_AT_ONCE + 2)])
        bank["conv5.weight"] *= 30
        bank["center_bias_weight"] += 0.1 * torch.randn(HEADS_AT_ONCE + 2, generator=generator)
        banks[name] = bank
    numbers = np.random.default_rng(0)
    dimensions = 2 * sum(channels)
    classifier = CategoryClassifier(
        numbers.normal(size=dimensions) * 0.1,
        np.ones(dimensions),
        numbers.normal(size=(3, dimensions)) * 0.02,
        np.array([0.5, 0.0, -0.5]),
        accuracy=0.5,
    )
    x, y = numbers.normal(0.5, 0.1, (2, 200)).clip(0, 0.99)
    return Model(
        backbones,
        banks,
        density_cell=8.0,
        categories=CATEGORIES,
        weights=WEIGHTS,
        global_weights=np.array([0.5, 0.5]),
        center_bias=kde(x, y, np.arange(200) // 10),
        finalizer_bias=fixed_gaussian(),
        classifier=classifier,
        provenance={"recipe": {"name": "made up"}, "seed": 3},
    )


@pytest.fixture(scope="module")
def folder(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    result = tmp_path_factory.mktemp("run") / "model"
    model.save(result, [load_backbone(one) for one in model.backbones])
    return result


def test_a_saved_model_predicts_the_same(model: Model, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(folder.parent)  # a run's folder; the model's own does too
    assert load(folder).names == loaded.names == list(NAMES)
    # It carries its own weights: the sources that it was made from may be gone.
    assert all(Path(one.weights).parent == folder for one in loaded.backbones)
    for category in (None, "Street"):
        for pixels in (image(75, 101), image(64, 48)):
            expected, actual = (one.predict(pixels, category) for one in (model, loaded))
            np.testing.assert_allclose(actual.log_density, expected.log_density, rtol=0, atol=1e-6)
            assert actual.weights == pytest.approx(expected.weights, abs=1e-9)
            assert actual.categories == pytest.approx(expected.categories, abs=1e-9)
    assert loaded.provenance == model.provenance
    assert loaded.center_bias.bandwidth == model.center_bias.bandwidth
    assert loaded.finalizer_bias.bandwidth is None
    np.testing.assert_array_equal(loaded.center_bias.log_density, model.center_bias.log_density)
    np.testing.assert_array_equal(loaded.global_weights, model.global_weights)


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (37, 211), (301, 7), (120, 160)])
def test_a_prediction_is_a_density_over_the_pixels(model: Model, size: tuple[int, int]) -> None:
    prediction = model.predict(image(*size))
    assert prediction.log_density.shape == size
    assert prediction.log_density.dtype == np.float32
    assert np.isfinite(prediction.log_density).all()
    assert logsumexp(prediction.log_density.astype(np.float64)) == pytest.approx(0, abs=1e-4)
    assert sum(prediction.weights.values()) == pytest.approx(1)
    assert sum(prediction.categories.values()) == pytest.approx(1)


def test_the_weights_are_those_of_the_category_and_mix_densities(model: Model) -> None:
    pixels = image(90, 130)
    coarse, _ = model.backbone_log_densities(pixels)
    densities = heads.upsample(coarse, (90, 130)).exp().double().numpy()
    assert np.abs(np.log(densities[0] / densities[1])).max() > 0.1, "the backbones must differ"
    for category, row in zip(CATEGORIES, WEIGHTS, strict=True):
        prediction = model.predict(pixels, category)
        assert prediction.weights == pytest.approx(dict(zip(NAMES, row, strict=True)))
        np.testing.assert_allclose(prediction.log_density, np.log(np.tensordot(row, densities, 1)), atol=2e-5)


def test_without_a_category_the_weights_are_those_expected(model: Model) -> None:
    prediction = model.predict(image(90, 130))
    probabilities = np.array([prediction.categories[category] for category in CATEGORIES])
    assert probabilities.min() > 0.01, "an uncertain category is what this is about"
    assert list(prediction.weights.values()) == pytest.approx(list(probabilities @ WEIGHTS))


def test_an_ensemble_is_the_mean_density_of_all_its_heads(model: Model) -> None:
    """More than predict at once, each as if it were the only one."""
    pixels = image(80, 96)
    bank = model.heads["lite0"]
    alone = []
    for k in range(HEADS_AT_ONCE + 2):
        one = dataclasses.replace(model, heads=model.heads | {"lite0": heads.select(bank, [k])})
        alone.append(one.backbone_log_densities(pixels)[0][0])
    expected = torch.stack(alone).double().exp().mean(0).log()
    actual = model.backbone_log_densities(pixels)[0][0]
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-4)
    assert actual.logsumexp((0, 1)).item() == pytest.approx(0, abs=1e-5)


def test_an_unknown_category_is_named_with_the_known_ones(model: Model) -> None:
    with pytest.raises(UserError, match=r"unknown category 'street'; the model knows Art, Street, Zoo"):
        model.predict(image(64, 64), "street")


def test_what_is_no_model_says_so(tmp_path: Path, folder: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"no model here \(model\.json is missing\)"):
            load(place)
    description = (folder / "model.json").read_text()
    (tmp_path / "model.json").write_text(description.replace('"format": 1', '"format": 99'))
    with pytest.raises(UserError, match="format 99"):
        load(tmp_path)


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), image(0, 4)],
    ids=["float", "grey", "alpha", "empty"],
)
def test_what_is_no_image_is_refused(model: Model, pixels: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"an image is uint8 \(H, W, 3\) RGB, not"):
        model.predict(pixels)
