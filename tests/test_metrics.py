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

from acw import pysaliency_compat
from acw.metrics import METRICS, Target, auc, gaussian_blur, score, shuffled_fixations

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


def targets(
    sizes: np.ndarray, image: np.ndarray, x: np.ndarray, y: np.ndarray, baselines: list[Tensor], sigma: float
) -> list[Target]:
    return [
        Target.of(
            tuple(sizes[i]),
            x[image == i],
            y[image == i],
            shuffled_fixations(sizes, image, x, y, i),
            baselines[i],
            sigma,
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
            "sAUC": density.AUC_per_image(stimuli, fixations, nonfixations="shuffled"),
            "NSS": per_image(density.NSSs(stimuli, fixations)),
            "CC": smooth.CCs(stimuli, empirical),
            "KLDiv": smooth.KLDivs(stimuli, empirical, minimum_value=0, **regularisers),
            "SIM": smooth.SIMs(stimuli, empirical),
        }


def assert_equal_scores(found: list[dict[str, float]], expected: dict[str, np.ndarray]) -> None:
    for name in METRICS:
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
        np.testing.assert_allclose(
            [(row["AUC"], row["sAUC"], row["LL"]) for row in rows], [(0.5, 0.5, 0)] * 3, atol=1e-6
        )
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


def test_shuffled_fixations_equal_pysaliencys_to_the_pixel(pysaliency: ModuleType) -> None:
    image, x, y = random_fixations(SIZES)
    stimuli = pysaliency.Stimuli([np.zeros(size, np.uint8) for size in SIZES])
    fixations = pysaliency.Fixations.create_without_history(x, y, image)
    provider = pysaliency.saliency_map_models.FullShuffledNonfixationProvider(stimuli, fixations)
    for i in range(len(SIZES)):
        expected_cols, expected_rows = provider(stimuli, fixations, int(np.argmax(image == i)))
        rows, cols = shuffled_fixations(SIZES, image, x, y, i)
        np.testing.assert_array_equal(rows, expected_rows)
        np.testing.assert_array_equal(cols, expected_cols)


def test_shuffled_fixations_at_the_very_edge_stay_inside() -> None:
    sizes = np.array([(10, width) for width in range(1, 200)])
    x, y = np.nextafter(sizes[:, 1], 0.0), np.nextafter(sizes[:, 0], 0.0)
    for i, (height, width) in enumerate(sizes):
        rows, cols = shuffled_fixations(sizes, np.arange(len(sizes)), x, y, i)
        assert (rows == height - 1).all()
        assert (cols == width - 1).all()


@hypothesis.settings(deadline=None, max_examples=200)
@hypothesis.given(
    *[st.lists(st.sampled_from([-math.inf, -3.0, -1.0, -1e-45, 0.0, 1.0, 2.5]), min_size=1, max_size=30)] * 2
)
def test_auc_is_the_chance_that_a_positive_exceeds_a_negative(positives: list[float], negatives: list[float]) -> None:
    wins = [(p > n) + 0.5 * (p == n) for p in positives for n in negatives]
    assert auc(torch.tensor(positives), torch.tensor(negatives)) == pytest.approx(np.mean(wins), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["constant", "reflect"])
@pytest.mark.parametrize("sigma", [0.7, 9.0, 60.0])
def test_blur_equals_scipys(dtype: torch.dtype, mode: Any, sigma: float) -> None:
    maps = torch.rand((2, 3, 70, 129), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = gaussian_filter(maps.numpy(), sigma, mode=mode, axes=(-2, -1))
    blurred = gaussian_blur(maps.to(dtype), sigma, mode)
    assert blurred.dtype == dtype
    np.testing.assert_allclose(blurred, expected, rtol=1e-5 if dtype == torch.float32 else 1e-12)


def one_target(repeats: int = 1, sigma: float = 4.0) -> Target:
    size = (48, 64)
    rng = np.random.default_rng(0)
    x, y = (np.tile(rng.uniform(0, n, 30), repeats) for n in (64, 48))
    negatives = rng.integers(0, 48, 100), rng.integers(0, 64, 100)
    return Target.of(size, x, y, negatives, log_density("smooth", size, seed=5), sigma)


def test_every_score_is_an_average_over_fixations_not_a_sum() -> None:
    model = log_density("smooth", (48, 64))
    assert score(model, one_target(repeats=3)) == pytest.approx(score(model, one_target()), abs=1e-5)


def test_map_scores_compare_with_the_blurred_fixations() -> None:
    target = one_target()
    perfect = score(log_density("smooth", (48, 64)), target, blurred=target.empirical)
    assert [perfect[name] for name in ("CC", "KLDiv", "SIM")] == pytest.approx([1, 0, 1], abs=1e-5)


def test_a_given_blurred_density_changes_nothing() -> None:
    target, components = one_target(), [log_density("smooth", (48, 64), seed=i).exp() for i in range(2)]
    mixture = 0.3 * components[0] + 0.7 * components[1]
    blurred = gaussian_blur(torch.stack(components), target.blur_sigma, "constant")
    assert score(mixture.log(), target, 0.3 * blurred[0] + 0.7 * blurred[1]) == pytest.approx(
        score(mixture.log(), target), abs=1e-5
    )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (torch.exp, "the log-density is not normalised"),
        (lambda m: m + 0.02, "the log-density is not normalised"),
        (lambda m: m.masked_fill(m == m.max(), torch.nan), "the log-density holds NaN"),
        (lambda m: m.T, r"the log-density is torch.float32 \(64, 48\)"),
        (lambda m: m.double(), "the log-density is torch.float64"),
    ],
    ids=["density", "unnormalised", "NaN", "transposed", "float64"],
)
def test_what_is_no_log_density_is_refused(spoil: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(spoil(log_density("smooth", (48, 64))), one_target())


@pytest.mark.parametrize("kind", KINDS[:4])
def test_a_blurred_log_density_is_refused(kind: str) -> None:
    model = log_density(kind, (48, 64))
    with pytest.raises(ValueError, match="blurred"):
        score(model, one_target(), blurred=gaussian_blur(model, 4.0, "constant"))


@pytest.mark.parametrize(
    ("x", "message"), [([64.0], "outside"), ([-1.5], "outside"), ([math.nan], "outside"), ([], "no")]
)
def test_bad_fixations_are_refused(x: list[float], message: str) -> None:
    negatives = np.array([0]), np.array([0])
    with pytest.raises(ValueError, match=message):
        Target.of((48, 64), np.array(x), np.ones(len(x)), negatives, log_density("smooth", (48, 64)), 4.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_scores_on_cuda_equal_those_on_the_cpu() -> None:
    size, model = (300, 400), log_density("smooth", (300, 400))
    x, y, rows, cols = np.random.default_rng(0).integers(0, 300, (4, 50))
    arguments = (size, x, y, (rows, cols), log_density("smooth", size, seed=5), 15.0)
    on_cuda = score(model.cuda(), Target.of(*arguments, device="cuda"))
    assert on_cuda == pytest.approx(score(model, Target.of(*arguments)), abs=1e-5)
