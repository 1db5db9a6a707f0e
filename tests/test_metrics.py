"""The eight scores against pysaliency on the same maps, and against the mistakes that they must not make."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from torch import Tensor

from acw.data import pysaliency_compat
from acw.evaluation import metrics
from acw.evaluation.blur import gaussian_blur
from acw.evaluation.metrics import Components, ShuffledFixations, Target, score, score_mixtures
from acw.evaluation.ranks import Ranking
from acw.storage.errors import UserError

GAZE = Path(__file__).parents[2] / "shared" / "gaze"
SIZES = np.array([(48, 64), (60, 41), (33, 90)])
KINDS = ("smooth", "quantised", "nearly flat", "flat", "peaked", "zero density")


@pytest.fixture(scope="module")
def pysaliency() -> ModuleType:
    return pysaliency_compat.load()


def smooth_noise(size: tuple[int, int], seed: int) -> Tensor:
    coarse = torch.randn((1, 1, 6, 8), generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, tuple(int(n) for n in size), mode="bicubic")[0, 0]


def log_density(kind: str, size: tuple[int, int], seed: int = 0) -> Tensor:
    noise = smooth_noise(size, seed)
    logits = {
        "smooth": 2 * noise,
        "quantised": noise.round(),
        "nearly flat": 1e-3 * noise,
        "flat": 0 * noise,
        "peaked": 60 * noise,
        "zero density": torch.where(noise > 0, noise, -torch.inf),
    }[kind]
    return (logits.double() - logits.double().flatten().logsumexp(0)).float()


def random_fixations(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image index, x and y: no two images with the same number, non-integer, some repeated."""
    rng = np.random.default_rng(1)
    image = np.repeat(np.arange(len(sizes)), 20 + 7 * np.arange(len(sizes)))
    x, y = rng.uniform(0, sizes[image][:, ::-1]).T
    x[1], y[1], x[2], y[2] = x[0], y[0], int(x[0]), int(y[0])
    return image, x, y


def shuffled(sizes: np.ndarray, image: np.ndarray, x: np.ndarray, y: np.ndarray, i: int) -> ShuffledFixations:
    """The negatives of image i: all others' fixations."""
    everything = ShuffledFixations.of(tuple(sizes[i]), sizes, np.full(len(sizes), True), image, x, y)
    return everything.without(x[image == i], y[image == i])


def targets(
    sizes: np.ndarray, image: np.ndarray, x: np.ndarray, y: np.ndarray, baselines: list[Tensor], sigma: float
) -> list[Target]:
    return [
        Target.of(
            x[image == i], y[image == i], shuffled(sizes, image, x, y, i), Components.of(baselines[i][None], sigma)
        )
        for i in range(len(sizes))
    ]


def reference(
    pysaliency: ModuleType, stimuli: Any, fixations: Any, maps: list[Tensor], baselines: list[Tensor], sigma: float
) -> dict[str, np.ndarray]:
    """pysaliency's score of each image by the calls that `score` names, on the maps in float64."""

    class Given(pysaliency.Model):
        def __init__(self, log_densities: list[Tensor]) -> None:
            super().__init__(caching=False)
            self.by_id = dict(zip(stimuli.stimulus_ids, log_densities, strict=True))

        def _log_density(self, stimulus: np.ndarray) -> np.ndarray:
            return self.by_id[pysaliency.datasets.get_image_hash(stimulus)].double().numpy()

    model = Given(maps)
    density = pysaliency.DensitySaliencyMapModel(model)
    smooth = pysaliency.BluringSaliencyMapModel(density, sigma, mode="constant")
    empirical = pysaliency.FixationMap(stimuli, fixations, kernel_size=sigma)

    def per_image(values: np.ndarray) -> np.ndarray:
        return np.array([values[fixations.n == i].mean() for i in range(len(stimuli))])

    regularisers = {"log_regularization": 2.2204e-16, "quotient_regularization": 2.2204e-16}
    with np.errstate(divide="ignore"):
        return {
            "IG": per_image(model.information_gains(stimuli, fixations, Given(baselines))),
            "LL": per_image(model.information_gains(stimuli, fixations, pysaliency.UniformModel())),
            "AUC": density.AUC_per_image(stimuli, fixations, nonfixations="uniform"),
            "NSS": per_image(density.NSSs(stimuli, fixations)),
            "CC": smooth.CCs(stimuli, empirical),
            "KLDiv": smooth.KLDivs(stimuli, empirical, minimum_value=0, **regularisers),
            "SIM": smooth.SIMs(stimuli, empirical),
        }


def assert_equal_scores(found: list[dict[str, float]], expected: dict[str, np.ndarray]) -> None:
    assert [set(row) for row in found] == [set(expected)] * len(found)
    for name in expected:
        tolerance = 1e-6 if name in ("IG", "LL") else 1e-4
        np.testing.assert_allclose([row[name] for row in found], expected[name], rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("sigma", [3.0, 25.0], ids=["narrow blur", "blur wider than the image"])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_equal_pysaliency(pysaliency: ModuleType, kind: str, sigma: float) -> None:
    image, x, y = random_fixations(SIZES)
    maps = [log_density(kind, size, seed=i) for i, size in enumerate(SIZES)]
    baselines = [log_density("smooth", size, seed=10 + i) for i, size in enumerate(SIZES)]
    stimuli = pysaliency.Stimuli([np.full((*size, 3), i, np.uint8) for i, size in enumerate(SIZES)])
    fixations = pysaliency.Fixations.create_without_history(x, y, image)

    rows = [score(m, t) for m, t in zip(maps, targets(SIZES, image, x, y, baselines, sigma), strict=True)]

    expected = reference(pysaliency, stimuli, fixations, maps, baselines, sigma)
    if kind == "flat":
        expected["NSS"] = np.zeros(len(SIZES))  # pysaliency divides rounding noise by rounding noise
        np.testing.assert_allclose([(row["AUC"], row["LL"]) for row in rows], [(0.5, 0)] * 3, atol=1e-6)
    assert_equal_scores(rows, expected)


@pytest.mark.skipif(not GAZE.is_dir(), reason="needs shared/gaze")
def test_scores_equal_pysaliency_on_real_fixations(pysaliency: ModuleType) -> None:
    stimuli, fixations = (pysaliency.read_hdf5(str(GAZE / f"{name}.hdf5")) for name in ("stimuli", "fixations"))
    _, some = np.unique([tuple(size) for size in stimuli.sizes], axis=0, return_index=True)
    stimuli, fixations = pysaliency.create_subset(stimuli, fixations, sorted(some)[:4])
    sizes = np.array([tuple(size) for size in stimuli.sizes])
    maps = [log_density("smooth", size, seed=i) for i, size in enumerate(sizes)]
    baselines = [log_density("smooth", size, seed=10 + i) for i, size in enumerate(sizes)]

    of_images = targets(sizes, fixations.n, fixations.x, fixations.y, baselines, 30.0)

    expected = reference(pysaliency, stimuli, fixations, maps, baselines, 30.0)
    assert_equal_scores([score(m, t) for m, t in zip(maps, of_images, strict=True)], expected)


def test_shuffled_fixations_equal_pysaliencys_to_the_pixel(
    pysaliency: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "_FIXATIONS", 50)  # so that they come in parts
    image, x, y = random_fixations(SIZES)
    stimuli = pysaliency.Stimuli([np.zeros(size, np.uint8) for size in SIZES])
    fixations = pysaliency.Fixations.create_without_history(x, y, image)
    provider = pysaliency.saliency_map_models.FullShuffledNonfixationProvider(stimuli, fixations)
    for i in range(len(SIZES)):
        columns, rows = provider(stimuli, fixations, int(np.argmax(image == i)))
        found = shuffled(SIZES, image, x, y, i)
        expected = np.bincount(rows * SIZES[i, 1] + columns, minlength=SIZES[i].prod())
        actual = np.zeros_like(expected)
        actual[found.pixels] = found.counts
        np.testing.assert_array_equal(actual, expected)


def test_only_the_chosen_images_give_shuffled_fixations() -> None:
    image, x, y = random_fixations(SIZES)
    chosen = ShuffledFixations.of(tuple(SIZES[0]), SIZES, np.array([True, False, True]), image, x, y)
    without = shuffled(SIZES, image[image != 1], x[image != 1], y[image != 1], 0)
    np.testing.assert_array_equal(chosen.without(x[image == 0], y[image == 0]).counts, without.counts)
    assert chosen.counts.sum() == np.count_nonzero(image != 1)


def test_shuffled_fixations_at_the_very_edge_stay_inside() -> None:
    sizes = np.array([(10, width) for width in range(1, 200)])
    x, y = np.nextafter(sizes[:, 1], 0.0), np.nextafter(sizes[:, 0], 0.0)
    everywhere = np.full(len(sizes), True)
    for height, width in sizes:
        found = ShuffledFixations.of((height, width), sizes, everywhere, np.arange(len(sizes)), x, y)
        assert found.pixels.tolist() == [height * width - 1]
        assert found.counts.tolist() == [len(sizes)]


DENSITIES = [0.0, 5e-324, 1e-300, 1.0, 1.00001, 2.5, 1e9]


@hypothesis.settings(deadline=None, max_examples=200)
@hypothesis.given(
    *[st.lists(st.sampled_from(DENSITIES), min_size=1, max_size=30)] * 2, st.sampled_from([8, 1000, 1 << 16])
)
def test_a_value_is_ranked_by_the_positives_above_it(positives: list[float], values: list[float], bins: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ranking, "BINS", bins)
        doubled = Ranking(torch.tensor(positives, dtype=torch.float64)).doubled(
            torch.tensor(values, dtype=torch.float64)
        )
    # The smallest denormal number differs from 0 in its trailing bits alone, and ties.
    order = [DENSITIES.index(value) if value > 1e-320 else 0 for value in DENSITIES]
    place = dict(zip(DENSITIES, order, strict=True))
    expected = [sum(2 * (place[p] > place[v]) + (place[p] == place[v]) for p in positives) for v in values]
    assert doubled.tolist() == expected


def test_rounding_in_a_mixture_parts_no_ties() -> None:
    """Of plateaus at the same heights in all components, and of a flat map, whose relative density is just 1."""
    generator = torch.Generator().manual_seed(0)
    height = torch.randint(1, 5, (64 * 48,), generator=generator).double()
    noise = 1 + 1e-15 * torch.randn(len(height), generator=generator, dtype=torch.float64)
    for values in (height, torch.ones_like(height)):
        clean, noisy = (Ranking(some[:40]).doubled(some) for some in (values, values * noise))
        torch.testing.assert_close(noisy, clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["constant", "reflect"])
@pytest.mark.parametrize("sigma", [0.7, 9.0, 60.0])
def test_blur_equals_scipys(dtype: torch.dtype, mode: Any, sigma: float) -> None:
    maps = torch.rand((2, 3, 70, 129), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = gaussian_filter(maps.numpy(), sigma, mode=mode, axes=(-2, -1))
    blurred = gaussian_blur(maps.to(dtype), sigma, mode)
    assert blurred.dtype == dtype
    np.testing.assert_allclose(blurred, expected, rtol=1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("kind", ["smooth", "quantised", "flat", "negative"])
def test_saliency_maps_are_scored_as_pysaliency_scores_them(pysaliency: ModuleType, kind: str) -> None:
    image, x, y = random_fixations(SIZES)
    noise = [smooth_noise(size, i).double() for i, size in enumerate(SIZES)]
    maps = {
        "smooth": [one.exp() for one in noise],
        "quantised": [one.round().abs() for one in noise],
        "flat": [torch.full_like(one, 3.0) for one in noise],
        "negative": [100 * one for one in noise],
    }[kind]
    baselines = [log_density("smooth", size, seed=10 + i) for i, size in enumerate(SIZES)]
    stimuli = pysaliency.Stimuli([np.full((*size, 3), i, np.uint8) for i, size in enumerate(SIZES)])
    fixations = pysaliency.Fixations.create_without_history(x, y, image)

    class Given(pysaliency.SaliencyMapModel):
        def _saliency_map(self, stimulus: np.ndarray) -> np.ndarray:
            return maps[stimulus[0, 0, 0]].numpy().copy()

    model = Given(caching=False)
    empirical = pysaliency.FixationMap(stimuli, fixations, kernel_size=4.0)
    regularisers = {"log_regularization": 2.2204e-16, "quotient_regularization": 2.2204e-16}
    nss = model.NSSs(stimuli, fixations)

    rows = [
        metrics.score_saliency(m, t) for m, t in zip(maps, targets(SIZES, image, x, y, baselines, 4.0), strict=True)
    ]

    expected = {
        "AUC": model.AUC_per_image(stimuli, fixations, nonfixations="uniform"),
        "NSS": np.array([nss[image == i].mean() if kind != "flat" else 0 for i in range(len(SIZES))]),
        "CC": model.CCs(stimuli, empirical),
        "KLDiv": model.KLDivs(stimuli, empirical, minimum_value=0, **regularisers),
        "SIM": model.SIMs(stimuli, empirical),
    }
    assert_equal_scores(rows, expected)


def one_target(repeats: int = 1, sigma: float = 4.0, device: str = "cpu") -> Target:
    size = (48, 64)
    rng = np.random.default_rng(0)
    x, y = (np.tile(rng.uniform(12, n - 12, 30), repeats) for n in (64, 48))
    pixels, counts = np.unique(rng.integers(0, 48 * 64, 100), return_counts=True)
    baseline = Components.of(log_density("smooth", size, seed=5)[None].to(device), sigma)
    return Target.of(x, y, ShuffledFixations(size, pixels, counts), baseline)


def test_every_score_is_an_average_over_fixations_not_a_sum() -> None:
    model = log_density("smooth", (48, 64))
    assert score(model, one_target(repeats=3)) == pytest.approx(score(model, one_target()), abs=1e-5)


def test_map_scores_compare_with_the_blurred_fixations() -> None:
    """A density on the fixations alone, once blurred, is the empirical map, but for what blurs over the border."""
    target = one_target(sigma=2.0)
    counts = torch.bincount(target.pixels, minlength=48 * 64).view(48, 64).double()
    perfect = score((counts / counts.sum()).log().float(), target)
    assert [perfect[name] for name in ("CC", "KLDiv", "SIM")] == pytest.approx([1, 0, 1], abs=1e-5)


@pytest.mark.parametrize("block", [1 << 17, 1000], ids=["one block", "blocks"])
def test_a_mixture_is_scored_as_its_density_is(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(metrics, "_BLOCK", block)
    target, logs = one_target(), torch.stack([log_density("smooth", (48, 64), seed=i) for i in range(3)])
    weights = torch.tensor([[0.3, 0.7, 0.0], [0.2, 0.3, 0.5], [0.0, 0.0, 1.0]], dtype=torch.float64)
    found = score_mixtures(Components.of(logs, target.blur_sigma), weights, target)
    for row, scores in zip(weights, found, strict=True):
        mixture = torch.tensordot(row, logs.double().exp(), 1).log().float()
        assert scores == pytest.approx(score(mixture, target), abs=1e-5)


def test_densities_of_another_size_or_blur_are_refused() -> None:
    target, weight = one_target(), torch.ones(1, 1, dtype=torch.float64)
    for size, sigma in (((64, 48), 4.0), ((48, 64), 5.0)):
        with pytest.raises(ValueError, match="their image's are"):
            score_mixtures(Components.of(log_density("smooth", size)[None], sigma), weight, target)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (torch.exp, "not normalised"),
        (lambda m: m + 0.02, "not normalised"),
        (lambda m: 0.6 * m + 0.4 * log_density("smooth", (48, 64), seed=1), "not normalised"),
        (lambda m: m.masked_fill(m == m.max(), torch.nan), "holds NaN"),
        (lambda m: m.T.contiguous(), r"\(64, 48\)"),
        (lambda m: m.double(), "torch.float64"),
    ],
    ids=["density", "unnormalised", "weighted sum of log-densities", "NaN", "transposed", "float64"],
)
def test_what_is_no_log_density_is_refused(spoil: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(spoil(log_density("smooth", (48, 64))), one_target())


@pytest.mark.parametrize(
    ("x", "message"), [([64.0], "outside"), ([-1.5], "outside"), ([math.nan], "outside"), ([], "no")]
)
def test_bad_fixations_are_refused(x: list[float], message: str) -> None:
    baseline = Components.of(log_density("smooth", (48, 64))[None], 4.0)
    negatives = ShuffledFixations((48, 64), np.array([0]), np.array([1]))
    with pytest.raises(UserError, match=message):
        Target.of(np.array(x), np.ones(len(x)), negatives, baseline)
    with pytest.raises(UserError, match="second image"):
        Target.of(np.ones(1), np.ones(1), ShuffledFixations((48, 64), np.array([0]), np.array([0])), baseline)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_scores_on_cuda_equal_those_on_the_cpu() -> None:
    model = log_density("smooth", (48, 64))
    on_cuda = score(model.cuda(), one_target(device="cuda"))
    assert on_cuda == pytest.approx(score(model, one_target()), abs=1e-5)
