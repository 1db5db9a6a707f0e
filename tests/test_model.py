"""The finished model: what was saved is what predicts, and every prediction is a density."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from acw import ensemble as ensembles
from acw import finalizer, heads, load
from acw import model as prediction
from acw.backbones import BACKBONES, Backbone, load_backbone
from acw.categories import CategoryClassifier
from acw.center_bias import fixed_gaussian, kde
from acw.ensemble import ensemble, mixture
from acw.features import compute
from acw.finalizer import Finalizer
from acw.model import Model
from acw.storage import UserError

HEADS = 7
NAMES = ("lite0", "smaller")
CATEGORIES = ["Art", "Street", "Zoo"]
WEIGHTS = np.array([[0.9, 0.1], [0.25, 0.75], [0.0, 1.0]])


def backbone(name: str, long_side: int) -> Backbone:
    return dataclasses.replace(BACKBONES["lite0"], name=name, weights="random", long_side=long_side)


def image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model() -> Model:
    """Two views by one random network; heads that are moved from where they start."""
    backbones = [backbone(NAMES[0], 96), backbone(NAMES[1], 64)]
    channels = load_backbone(backbones[0]).channels
    generator = torch.Generator().manual_seed(0)
    banks = {}
    for number, name in enumerate(NAMES):
        bank = heads.new_heads(sum(channels), 10.0, [100 * number + seed for seed in range(HEADS)])
        bank["conv5.weight"] *= 30
        bank["center_bias_weight"] += 0.1 * torch.randn(HEADS, generator=generator)
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
        finalizer=Finalizer(),
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
    coarse, _ = model.component_log_densities(pixels)
    densities = finalizer.upsample(coarse, (90, 130)).exp().double().numpy()
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


@pytest.mark.parametrize("maps_at_once", [0.5, 3, 18, 1000])
def test_an_ensemble_is_the_mean_density_of_all_its_heads(
    model: Model, maps_at_once: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many heads and images are worked on at a time, as the finalizer and float64 have it."""
    grid = (10, 12)
    monkeypatch.setitem(ensembles.CELLS_AT_ONCE, "cpu", int(maps_at_once * grid[0] * grid[1]))
    pixels = np.stack([image(80, 96), image(80, 96)[::-1], image(80, 96)[:, ::-1]])
    features, _ = compute(load_backbone(model.backbones[0]), model.backbones[0], pixels)
    bank, bias = model.heads["lite0"], torch.from_numpy(model.finalizer_bias.of_size(grid))
    scores = finalizer.finalize(bank, heads.readout(bank, features), bias.expand(HEADS, -1, -1), Finalizer())
    expected = finalizer.log_mean_exp(finalizer.normalise(scores.double()))
    actual = ensemble(bank, features, bias, Finalizer())
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("depth", [1.0, 20.0, 60.0, 300.0, 3000.0])
def test_a_mixture_is_right_also_where_float32_cannot_hold_the_densities(depth: float) -> None:
    """Wells in which no density is within e^-depth of its maximum; beside them only some are so low."""
    generator = torch.Generator().manual_seed(0)
    log_p = torch.randn(5, 2, 9, 11, generator=generator)
    log_p[:, 0, 2:5] -= depth
    log_p[1:3, 1, 6:] -= depth
    weights = torch.tensor([0.1, 0.0, 0.4, 0.3, 0.2])
    log_p[1, :, 0] = -torch.inf  # where the density that is left out has no mass at all
    constants = 1e3 * torch.randn(5, 2, 1, 1, generator=generator).round()
    expected = torch.logsumexp(finalizer.normalise(log_p.double()) + weights.double().log()[:, None, None, None], 0)
    unnormalised = (log_p + constants).double() - constants.double()  # rounded as what the mixture is given

    def parts() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return zip((log_p + constants).split(2), weights.split(2), strict=True)

    rounding = float((unnormalised - log_p).nan_to_num().abs().max())
    actual = mixture(parts)
    assert expected[0, 2:5].max() < -depth
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=2e-6 + 2 * rounding)


def test_a_batch_is_what_its_images_are_alone(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes mixed, in order, whatever shares a window or a pass through the backbones."""
    sizes = [(90, 130), (64, 64), (90, 130), (40, 200), (90, 130), (64, 64), (90, 130)]
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    categories = [None, "Zoo", "Art", None, "Street", None, None]
    expected = [model.predict(*pair) for pair in zip(images, categories, strict=True)]
    own = model._pixels((90, 130))
    for room, one_at_a_time in ((10 * own, False), (3 * own, False), (2 * own, True), (1, False)):
        monkeypatch.setitem(prediction.PIXELS_AT_ONCE, "cpu", room)
        batched = dataclasses.replace(model, one_backbone_at_a_time=one_at_a_time)
        actual = list(batched.predict_batch(iter(images), iter(categories)))
        for one, other in zip(actual, expected, strict=True):
            np.testing.assert_allclose(one.log_density, other.log_density, rtol=0, atol=2e-5)
            assert one.weights == pytest.approx(other.weights, abs=1e-6)
    unlabelled = list(model.predict_batch(images))
    np.testing.assert_allclose(unlabelled[3].log_density, expected[3].log_density, rtol=0, atol=2e-5)


def test_a_batch_reads_images_only_as_it_predicts(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = image(64, 64)
    monkeypatch.setitem(prediction.PIXELS_AT_ONCE, "cpu", 3 * model._pixels((64, 64)))
    read = []
    stream = (read.append(number) or pixels for number in range(10**9))  # type: ignore[func-returns-value]
    batch = model.predict_batch(stream)
    ahead = [len(read) - done for done, _ in zip(range(8), batch, strict=False)]
    assert max(ahead) <= 4, "a window of three, and the one that did not fit into it"


def test_one_backbone_at_a_time_keeps_no_other(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    networks: list[weakref.ref] = []

    def load_and_look(*arguments: object) -> object:
        assert not any(network() for network in networks), "the one before is still in memory"
        network = load_backbone(*arguments)  # type: ignore[arg-type]
        networks.append(weakref.ref(network))
        return network

    monkeypatch.setattr(prediction, "load_backbone", load_and_look)
    one = dataclasses.replace(model, one_backbone_at_a_time=True, _loaded={})
    monkeypatch.setitem(prediction.PIXELS_AT_ONCE, "cpu", 2 * model._pixels((64, 64)))
    in_a_window = 2 * prediction.PASSES_PER_LOAD
    assert len(list(one.predict_batch([image(64, 64)] * 2 * in_a_window))) == 2 * in_a_window
    assert len(networks) == 4, "two windows, two backbones"


def test_a_batch_stops_at_what_it_cannot_predict(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(prediction.PIXELS_AT_ONCE, "cpu", 1)
    images = [image(64, 64)] * 3
    for categories, error, message in (
        (["Zoo", "Art", "street"], UserError, "unknown category 'street'"),
        (["Zoo", "Art"], ValueError, "shorter"),
    ):
        done = []
        with pytest.raises(error, match=message):
            done.extend(model.predict_batch(images, categories))
        assert len(done) >= 1, "windows before the wrong one are predicted"


def test_an_unknown_category_is_named_with_the_known_ones(model: Model) -> None:
    with pytest.raises(UserError, match=r"unknown category 'street'; the model knows Art, Street, Zoo"):
        model.predict(image(64, 64), "street")


def test_what_is_no_model_says_so(tmp_path: Path, folder: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"no model here \(model\.json is missing\)"):
            load(place)
    description = (folder / "model.json").read_text(encoding="utf-8")
    (tmp_path / "model.json").write_text(description.replace('"format": 2', '"format": 99'), encoding="utf-8")
    with pytest.raises(UserError, match="format 99"):
        load(tmp_path)


@pytest.mark.parametrize(
    "pixels",
    [image(4, 4) / np.float32(255), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), image(0, 4)],
    ids=["divided by 255 before", "grey", "alpha", "empty"],
)
def test_what_is_no_image_is_refused(model: Model, pixels: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"an image is uint8 \(H, W, 3\) RGB, not"):
        model.predict(pixels)
