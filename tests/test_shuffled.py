"""sAUC, `--exact` and SIM_opt against pysaliency's own models, on maps made by hand and on real fixations."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from test_evaluation import AMONG, Blobs, means_of
from test_evaluation import dataset as dataset
from test_evaluation import model as model
from test_evaluation import scoring as scoring
from test_metrics import log_density, random_fixations, targets

from acw.data import pysaliency_compat
from acw.evaluation import sim_opt
from acw.evaluation.metrics import Components, ShuffledFixations, Target, score, score_saliency
from acw.evaluation.sauc import SIDE, MeanPrediction, reduced, shuffled_aucs
from acw.evaluation.scoring import Scoring, log_mixture

GAZE = Path(__file__).parents[2] / "shared" / "gaze"
SIZES = np.array([(48, 64), (60, 41), (33, 90), (48, 64)])
ONE = torch.ones((1, 1), dtype=torch.float64)


@pytest.fixture(scope="module")
def pysaliency() -> ModuleType:
    return pysaliency_compat.load()


def benchmark_sauc(pysaliency: ModuleType, stimuli: Any, fixations: Any, maps: list[torch.Tensor]) -> np.ndarray:
    """As the benchmark computes it of a model with these maps, its averages in float64."""

    class Given(pysaliency.Model):
        def _log_density(self, stimulus: np.ndarray) -> np.ndarray:
            return by_id[pysaliency.datasets.get_image_hash(stimulus)].double().numpy()

    by_id = dict(zip(stimuli.stimulus_ids, maps, strict=True))
    given = Given(caching=False)
    mean = pysaliency.models.ShuffledBaselineModel(given, stimuli, library="numpy", compute_size=(SIDE, SIDE))
    shuffled = pysaliency.models.ShuffledAUCSaliencyMapModel(given, mean)
    return shuffled.AUC_per_image(stimuli, fixations, nonfixations="shuffled")


def our_sauc(maps: list[torch.Tensor], of_images: list[Target]) -> list[float]:
    components = [Components.of(one[None], target.blur_sigma) for one, target in zip(maps, of_images, strict=True)]
    small = [reduced(one[None], ONE)[0] for one in maps]
    mean = MeanPrediction(torch.stack(small).sum(0), len(small))
    return [
        shuffled_aucs(one, ONE, target, mean.others(own))[0]
        for one, target, own in zip(components, of_images, small, strict=True)
    ]


@pytest.mark.parametrize("kind", ["smooth", "nearly flat"])
def test_sauc_is_the_benchmarks(pysaliency: ModuleType, kind: str) -> None:
    image, x, y = random_fixations(SIZES)
    maps = [log_density(kind, size, seed=i) for i, size in enumerate(SIZES)]
    stimuli = pysaliency.Stimuli([np.full((*size, 3), i, np.uint8) for i, size in enumerate(SIZES)])
    fixations = pysaliency.Fixations.create_without_history(x, y, image)
    expected = benchmark_sauc(pysaliency, stimuli, fixations, maps)
    found = our_sauc(maps, targets(SIZES, image, x, y, maps, 4.0))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_a_map_without_mass_anywhere_has_a_finite_sauc() -> None:
    image, x, y = random_fixations(SIZES)
    maps = [log_density("zero density", size, seed=i) for i, size in enumerate(SIZES)]
    assert all(0 <= value <= 1 for value in our_sauc(maps, targets(SIZES, image, x, y, maps, 4.0)))


@pytest.mark.skipif(not GAZE.is_dir(), reason="needs shared/gaze")
def test_all_scores_equal_pysaliencys_on_twenty_real_images(scoring: Scoring, pysaliency: ModuleType) -> None:
    """Densities by our scoring, its fast way and `--exact`; sAUC, last, by pysaliency's whole models."""
    from acw.data import load_dataset

    everything = load_dataset(str(GAZE))
    chosen = np.linspace(0, len(everything.stimuli) - 1, 20).astype(int)
    mine = [np.flatnonzero(everything.image == index) for index in chosen]
    image = np.repeat(np.arange(20, dtype=np.int32), [len(one) for one in mine])
    kept = np.concatenate(mine)
    columns = {name: getattr(everything, name)[kept] for name in ("x", "y", "subject")}
    stimuli = tuple(
        dataclasses.replace(everything.stimuli[index], category=scoring.model.categories[k % 3])
        for k, index in enumerate(chosen)
    )
    # A narrower blur than the data set's 30 px: scipy's takes most of this test's time.
    dataset = dataclasses.replace(everything, stimuli=stimuli, image=image, blur_sigma=12.0, **columns)
    sizes = [stimulus.size for stimulus in stimuli]
    real = dataclasses.replace(
        scoring,
        dataset=dataset,
        among=np.arange(20),
        densities=RealSizes(sizes),
        by_image={},
        gold_standard=None,
    )
    means = {name: MeanPrediction(total, 20) for name, total in real.sums(range(20)).items()}
    exact = dataclasses.replace(real, exact=True)
    sauc = {}
    for index in range(20):
        fast, slow = real.image(index, means), exact.image(index, means)
        sauc[index] = fast["category_weights"]["sAUC"]
        for name in set(fast) - {"wrong_category"}:
            for metric, value in slow[name].items():
                tolerance = 1e-6 if metric in ("IG", "LL") else 1e-4
                assert fast[name][metric] == pytest.approx(value, abs=tolerance), (index, name, metric)
    maps = [dict(exact._every_density(exact._maps(index, None)))["category_weights"] for index in range(20)]
    pictures = pysaliency.Stimuli([np.full((*size, 3), i, np.uint8) for i, size in enumerate(sizes)])
    fixations = pysaliency.Fixations.create_without_history(dataset.x, dataset.y, dataset.image)
    expected = benchmark_sauc(pysaliency, pictures, fixations, [torch.from_numpy(one) for one in maps])
    np.testing.assert_allclose(list(sauc.values()), expected, rtol=0, atol=1e-4)


@dataclasses.dataclass
class RealSizes(Blobs):
    sizes: list[tuple[int, int]]

    def of(self, index: int) -> tuple[torch.Tensor, np.ndarray]:
        generator = torch.Generator().manual_seed(index)
        coarse = torch.randn((3, 1, 3, 4), generator=generator)
        grid = (-(-self.sizes[index][0] // 8), -(-self.sizes[index][1] // 8))
        smooth = torch.nn.functional.interpolate(coarse, grid, mode="bicubic")[:, 0]
        one = 3 * smooth
        return one - one.logsumexp((1, 2), keepdim=True), np.random.default_rng(index).normal(size=4)


def test_exact_scores_are_those_of_this_module_too(scoring: Scoring) -> None:
    """Images among the negatives' and not, with all references."""
    exact = dataclasses.replace(scoring, exact=True, log_mixture=True)
    fast = dataclasses.replace(scoring, log_mixture=True)
    means = means_of(fast)
    for index in (0, 8):
        assert (index in AMONG) == (index == 0)
        slow, ours = exact.image(index, means), fast.image(index, means)
        for name in ("uniform", "category_weights", "oracle_weights", "log_mixture", "gold_standard_upper"):
            assert ours[name] == pytest.approx(slow[name], abs=1e-4), (index, name)


@pytest.mark.parametrize("size", [(60, 80), (48, 100)])
def test_the_map_for_sim_is_pysaliencys(
    pysaliency: ModuleType, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    """That of its model with the benchmark's settings, where the grid is the image."""
    monkeypatch.setattr(sim_opt, "MOST_EPOCHS", 4)
    monkeypatch.setattr(sim_opt, "FEWEST_EPOCHS", 4)
    monkeypatch.setattr(sim_opt, "SAMPLES", 100)
    logs = log_density("smooth", size, seed=3).double()
    logs = (logs - logs.flatten().logsumexp(0)).numpy()

    class Given(pysaliency.Model):
        def _log_density(self, stimulus: np.ndarray) -> np.ndarray:
            return logs

    area = 800 * 600 / logs.size
    settings: dict[str, Any] = {"train_samples_per_epoch": 100, "val_samples": 100, "min_iter": 4, "max_iter": 4}
    settings |= {"initial_learning_rate": 1e-7 * area, "minimum_learning_rate": 1e-11 * area, "fixation_count": 60}
    settings |= {"learning_rate_decay_scheme": "validation_loss", "verbose": False}
    model = pysaliency.SIMSaliencyMapModel(Given(), kernel_size=5.0, **settings)
    expected = model.saliency_map(np.zeros((*size, 3), np.uint8))
    with torch.inference_mode():
        best = sim_opt.best_map(logs, 5.0, 60)
    np.testing.assert_allclose(best, expected, atol=1e-9)
    assert best.sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("blur", [4.0, 10.0])
def test_the_map_for_sim_of_a_density_with_zeros(blur: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sim_opt, "MOST_EPOCHS", 2)
    monkeypatch.setattr(sim_opt, "FEWEST_EPOCHS", 2)
    one = log_density("smooth", (72, 96), seed=3).double().numpy().copy()
    one[:9] = one[:, :9] = -np.inf
    best = sim_opt.best_map(one - np.logaddexp.reduce(one, None), blur, 20)
    assert np.isfinite(best).all()
    assert best.sum() > 0


def test_the_papers_mixture_is_of_each_systems_log_densities() -> None:
    """Two backbones, of each two systems: mixed within a system by their logs, systems by their densities."""
    maps = torch.stack([log_density("smooth", (6, 9), seed=seed) for seed in range(4)])  # b0s0, b0s1, b1s0, b1s1
    weights = torch.tensor([0.1, 0.3, 0.4, 0.2])
    systems = []
    for system, (a, b) in enumerate(((0.2, 0.8), (0.6, 0.4))):
        mixed = (a * maps[system] + b * maps[2 + system]).exp()
        systems.append(mixed / mixed.sum())
    expected = (systems[0] + systems[1]) / 2
    torch.testing.assert_close(log_mixture(maps, weights, 2).exp(), expected)


def test_the_map_for_sim_has_a_better_one_than_the_density(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sim_opt, "SAMPLES", 100)
    size, blur, fixations = (72, 96), 10.0, 20
    one = log_density("smooth", size, seed=3)
    density = one.double().exp().numpy().ravel()
    found = sim_opt.best_map(one.double().numpy(), blur, fixations)
    assert found.shape == size
    assert found.min() >= 0
    rng = np.random.default_rng(0)
    bias, gains = Components.of(one[None], blur), []
    for _ in range(40):
        rows, columns = np.divmod(rng.choice(len(density), fixations, p=density / density.sum()), size[1])
        target = Target.of(columns, rows, ShuffledFixations(size, np.array([0]), np.array([1])), bias)
        gains.append(score_saliency(torch.from_numpy(found), target)["SIM"] - score(one, target)["SIM"])
    assert np.mean(gains) > 0
