"""The finished model: what was saved is what predicts, and every prediction is a density."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import logsumexp

from acw import load
from acw.features.backbone import Backbone, load_backbone
from acw.features.store import compute
from acw.features.view import View
from acw.features.zoo import BACKBONES
from acw.fusion.classifier import CategoryClassifier
from acw.heads import ensemble as ensembles
from acw.heads import finalizer, readout
from acw.heads.center_bias import fixed_gaussian, kde
from acw.heads.ensemble import ensemble, mixture
from acw.heads.finalizer import Finalizer
from acw.model import files
from acw.model import model as prediction
from acw.model.arguments import as_image
from acw.model.model import Model
from acw.storage.errors import UserError

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
        bank = readout.new_heads(sum(channels), 10.0, [100 * number + seed for seed in range(HEADS)])
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
        [View((backbone,)) for backbone in backbones],
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
    files.save(model, result, [load_backbone(one) for one in model.backbones])
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
    features, *_ = compute(load_backbone(model.backbones[0]), model.backbones[0], pixels)
    bank, bias = model.heads["lite0"], torch.from_numpy(model.finalizer_bias.of_size(grid))
    scores = finalizer.finalize(bank, readout.readout(bank, features), bias.expand(HEADS, -1, -1), Finalizer())
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
            # Convolutions round otherwise with another batch, by how much is the CPU's affair: up to 4e-5 was seen.
            np.testing.assert_allclose(one.log_density, other.log_density, rtol=0, atol=1e-4)
            assert one.weights == pytest.approx(other.weights, abs=1e-5)
    unlabelled = list(model.predict_batch(images))
    np.testing.assert_allclose(unlabelled[3].log_density, expected[3].log_density, rtol=0, atol=1e-4)


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
        (["Zoo", "Art"], ValueError, "the categories end after 2, there are more images"),
        (["Zoo", "Art", None, None], ValueError, "the images end after 3, there are more categories"),
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
    (tmp_path / "model.json").write_text(description.replace('"format": 4', '"format": 99'), encoding="utf-8")
    with pytest.raises(UserError, match="format 99"):
        load(tmp_path)
    with pytest.raises(UserError, match=r"heads\.safetensors: is a file, not a model's folder; give the folder"):
        load(folder / "heads.safetensors")


def test_a_prediction_is_in_float32_whatever_its_caller_computes_in(folder: Path) -> None:
    """What is loaded and kept meanwhile too."""
    pixels = image(75, 101)
    bias = np.random.default_rng(1).normal(size=(75, 101))
    expected = [load(folder).predict(pixels, center_bias=given).log_density for given in (None, bias)]
    finalizer.spline_matrix.cache_clear()
    for dtype in (torch.float64, torch.bfloat16):
        other = load(folder)
        torch.set_default_dtype(dtype)
        try:
            actual = [other.predict(pixels, center_bias=given).log_density for given in (None, bias)]
        finally:
            torch.set_default_dtype(torch.float32)
        np.testing.assert_array_equal(actual, expected)
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_array_equal(load(folder).predict(pixels, center_bias=bias).log_density, expected[1])
        (batched,) = load(folder).predict_batch([pixels])
        np.testing.assert_array_equal(batched.log_density, expected[0])
        assert torch.is_autocast_enabled("cpu")


PIXELS = image(24, 32)
GREY = np.repeat(PIXELS[:, :, :1], 3, axis=2)
# What people have in hand -> the uint8 RGB that it is.
IMAGES: dict[str, tuple[object, np.ndarray]] = {
    "PIL image": (Image.fromarray(PIXELS), PIXELS),
    "PIL image with transparency": (Image.fromarray(np.dstack([PIXELS, PIXELS[:, :, 0]])), PIXELS),
    "grey PIL image": (Image.fromarray(GREY[:, :, 0]), GREY),
    "PIL image of 16 bits": (Image.fromarray(GREY[:, :, 0].astype(np.uint16) * 257), GREY),
    "grey": (GREY[:, :, 0], GREY),
    "grey with an axis": (GREY[:, :, :1], GREY),
    "transparency": (np.dstack([PIXELS, PIXELS[:, :, 0]]), PIXELS),
    "int64, as of JSON": (PIXELS.astype(np.int64), PIXELS),
    "uint16": (PIXELS.astype(np.uint16) * 257, PIXELS),
    "12 of 16 bits": (PIXELS.astype(np.uint16) * 16, PIXELS),
    "mirrored view": (PIXELS[:, ::-1], PIXELS[:, ::-1]),
    "tensor": (torch.from_numpy(PIXELS), PIXELS),
    "tensor, channels first": (torch.from_numpy(PIXELS).permute(2, 0, 1), PIXELS),
    "black": (np.zeros_like(PIXELS), np.zeros_like(PIXELS)),
}


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_in_hand_is_the_array_that_it_is(name: str) -> None:
    given, expected = IMAGES[name]
    actual = as_image(given)
    assert actual.dtype == np.uint8
    np.testing.assert_array_equal(actual, expected)


def test_a_model_takes_files_and_pil_images(model: Model, tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    expected = model.predict(PIXELS).log_density
    for given in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.open(tmp_path / "a.png")):
        np.testing.assert_array_equal(model.predict(given).log_density, expected)
        (of_batch,) = model.predict_batch([given])
        np.testing.assert_array_equal(of_batch.log_density, expected)
    with pytest.raises(UserError, match=r"b\.png: the image cannot be read"):
        model.predict(tmp_path / "b.png")
    with Image.open(tmp_path / "a.png") as closed:
        pass
    with pytest.raises(ValueError, match=r"a PIL image whose file was closed before it was read; call its load"):
        model.predict(closed)
    Image.fromarray(PIXELS // 128).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png: its values are all 0 or 1"):
        model.predict(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (PIXELS / np.float32(255), r"not float32 \(24, 32, 3\) of values .*; multiply by 255 first"),
        (torch.rand(3, 24, 32, requires_grad=True), "multiply by 255 first"),
        ((PIXELS - 100.0) / 50, "undo what was done to its pixels"),
        (PIXELS * np.nan, "no number"),
        (PIXELS // 128, "values that are all 0 or 1; were they 0..1"),
        (PIXELS[:, :, 0] > 128, "turn a mask to grey"),
        (np.dstack([0 * PIXELS, PIXELS[:, :, 0]]), "of one colour with shapes in its transparency"),
        (PIXELS.astype(int) * 257, "of values .* to 65535; scale it"),
        (PIXELS.transpose(2, 0, 1), "channels come last"),
        (PIXELS[None], "predict_batch takes several"),
        (PIXELS[:, :, :2], r"not uint8 \(24, 32, 2\)"),
        (PIXELS[:0], "not of 0 x 32 px"),
        (PIXELS.tolist(), "not list"),
        (None, "not NoneType"),
        (b"\x89PNG", "not bytes"),
    ],
)
def test_what_is_no_image_is_refused_in_a_line(model: Model, given: object, line: str) -> None:
    with pytest.raises(ValueError, match=rf"^an image is uint8 \(H, W, 3\) RGB, .*{line}"):
        model.predict(given)
    with pytest.raises(ValueError, match=rf"^images\[1\]: an image is .*{line}"):
        list(model.predict_batch([PIXELS, given]))


@pytest.mark.parametrize("given", [PIXELS, torch.from_numpy(PIXELS), "a.png", Image.fromarray(PIXELS), None])
def test_one_image_is_no_batch(model: Model, given: object) -> None:
    """Its rows would be taken for grey images, a path's letters for files."""
    with pytest.raises(ValueError, match="predict_batch takes several images, not"):
        model.predict_batch(given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="categories are one an image, not 'Zoo' for all"):
        model.predict_batch([PIXELS] * 3, "Zoo")


BIAS = np.random.default_rng(0).normal(size=(24, 32))
CORNER = np.zeros((24, 32), bool)
CORNER[:2, :3] = True


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (np.where(CORNER, -np.inf, BIAS), "not -inf as at 6 of its 768 pixels"),
        (np.where(CORNER, np.nan, BIAS), r"not NaN or \+inf as at 6 of its 768 pixels"),
        (np.exp(BIAS) / np.exp(BIAS).sum(), "not a density or a map"),
        (BIAS - BIAS.min(), "not a density or a map, which is nowhere negative; .* or subtract its maximum"),
        (BIAS.T, r"finite floats \(24, 32\) as the image, not float64 \(32, 24\)"),
        (BIAS.astype(int), "not int64"),
        (BIAS.tolist(), "not list"),
    ],
)
def test_what_is_no_centre_bias_is_refused_in_a_line(model: Model, given: object, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        model.predict(PIXELS, center_bias=given)


def test_a_centre_bias_may_be_a_tensor(model: Model) -> None:
    expected = model.predict(PIXELS, center_bias=BIAS).log_density
    assert np.abs(expected - model.predict(PIXELS).log_density).max() > 0.1
    for given in (torch.from_numpy(BIAS), torch.from_numpy(BIAS).float().requires_grad_()):
        np.testing.assert_allclose(model.predict(PIXELS, center_bias=given).log_density, expected, atol=1e-5)


def test_a_uniform_centre_bias_may_be_any_constant(model: Model) -> None:
    flat, other = (model.predict(PIXELS, center_bias=np.full((24, 32), value)).log_density for value in (-3.0, 0.5))
    np.testing.assert_allclose(other, flat, atol=1e-5)


@pytest.mark.parametrize(
    ("device", "line"),
    [
        ("mps", "device 'mps': acw computes on 'cpu' and 'cuda'"),
        ("gpu", "device 'gpu': there is no such thing"),
        (None, "device None: there is no such thing"),
        pytest.param("cuda", "this machine has no GPU", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="")),
        ("cuda:99", "device 'cuda:99': "),
    ],
)
def test_a_device_that_is_not_there_is_refused_in_a_line(folder: Path, device: str, line: str) -> None:
    with pytest.raises(UserError, match=line):
        load(folder, device)


def test_a_device_is_looked_at_when_it_is_set_later_too(model: Model) -> None:
    with pytest.raises(UserError, match="device 'mps': acw computes on"):
        dataclasses.replace(model, device=torch.device("mps")).predict(PIXELS)


def test_a_category_is_known_in_either_unicode_form(model: Model) -> None:
    cafe = dataclasses.replace(model, categories=["Art", "Caf\N{LATIN SMALL LETTER E WITH ACUTE}", "Zoo"])
    weights = cafe.predict(PIXELS, "Cafe\N{COMBINING ACUTE ACCENT}").weights
    assert list(weights.values()) == pytest.approx(list(WEIGHTS[1]))
    with pytest.raises(UserError, match="unknown category '3'"):
        model.predict(PIXELS, 3)  # type: ignore[arg-type]
