"""Data at the edge of what is data: everything that is fitted or scored on them is finite, and as pysaliency has it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from scipy.special import logsumexp
from test_evaluation import model as model

from acw.data import Dataset, Stimulus, pysaliency_compat
from acw.data.folds import split
from acw.evaluation import gold_standard, sim_opt, summary
from acw.evaluation.external_models import ExternalModel
from acw.evaluation.metrics import METRICS, Components, ShuffledFixations, Target, score, score_saliency
from acw.evaluation.sauc import SIDE, MeanPrediction, reduced
from acw.evaluation.scoring import Scoring
from acw.fusion import category_weights, classifier
from acw.fusion.category_weights import Likelihoods
from acw.heads import center_bias
from acw.heads.finalizer import Finalizer, normalise, upsample
from acw.model.model import Model
from acw.storage.errors import UserError
from acw.storage.files import write_json
from acw.tracking import registry

SOMETIMES = hypothesis.settings(deadline=None, max_examples=25)
SIZES = [(1, 1), (1, 9), (7, 2), (24, 31), (61, 90), (600, 800)]
CATEGORIES = ("Art", "Street", "Zoo")


@pytest.fixture(scope="module")
def pysaliency() -> ModuleType:
    return pysaliency_compat.load()


def dataset_of(sizes: list[tuple[int, int]], image: np.ndarray, x: Any, y: Any, subject: np.ndarray) -> Dataset:
    stimuli = [
        Stimulus(f"{i:02d}.png", f"{i:02d}.png", size, CATEGORIES[i % 3], None, "") for i, size in enumerate(sizes)
    ]
    columns = image.astype(np.int32), np.asarray(x, float), np.asarray(y, float), subject.astype(np.int32)
    return Dataset("edge", "csv", "nowhere", tuple(stimuli), *columns, blur_sigma=3.0, notes=())


def relative_bias(dataset: Dataset) -> center_bias.CenterBias:
    size = np.array([stimulus.size for stimulus in dataset.stimuli])[dataset.image]
    return center_bias.kde(dataset.x / size[:, 1], dataset.y / size[:, 0], dataset.image)


@st.composite
def odd_datasets(draw: st.DrawFn, among: Sequence[tuple[int, int]] = SIZES) -> Dataset:
    """Two to four images, some of them tiny; everybody looks at one pixel, at the border, at one place or anywhere."""
    sizes = [draw(st.sampled_from(among)) for _ in range(draw(st.integers(2, 4)))]
    people = draw(st.integers(1, 4))
    image, person = np.divmod(np.arange(len(sizes) * people), people)
    counts = [draw(st.sampled_from([1, 1, 2, 7, 3000])) for _ in image]
    image, person = np.repeat(image, counts), np.repeat(person, counts)
    generator = np.random.default_rng(draw(st.integers(0, 99)))
    height, width = np.array(sizes)[image].T
    where = draw(st.sampled_from(["one pixel", "border", "one place", "anywhere"]))
    share = {
        "one pixel": np.full((2, len(image)), draw(st.sampled_from([0.0, 0.5, 0.9999]))),
        "border": generator.integers(0, 2, (2, len(image))).astype(float),
        "one place": np.clip(0.3 + generator.normal(0, 0.002, (2, len(image))), 0, 1),
        "anywhere": generator.random((2, len(image))),
    }[where]
    x, y = (np.minimum(share[axis] * edge, np.nextafter(edge, 0)) for axis, edge in ((0, width), (1, height)))
    unknown = draw(st.booleans()) and people == 1
    return dataset_of(sizes, image, x, y, np.full(len(image), -1) if unknown else person)


@SOMETIMES
@hypothesis.given(dataset=odd_datasets())
def test_people_and_centre_bias_are_densities_wherever_people_look(dataset: Dataset) -> None:
    bias, everything = relative_bias(dataset), range(len(dataset.stimuli))
    assert np.isfinite(bias.log_density).all()
    assert logsumexp(bias.log_density) == pytest.approx(0, abs=1e-3)
    if not gold_standard.has_subjects(dataset, everything):
        assert len(np.unique(dataset.subject)) == 1
        return
    gold = gold_standard.fit(dataset, everything, bias)
    assert gold.weights.sum() == pytest.approx(1)
    for index in everything:
        x = dataset.fixations_of(index)[0]
        densities = gold.leave_one_out(dataset, index)
        assert np.sum([mine for mine, _ in densities], 0).tolist() == [1] * len(x)
        for log_density in (gold.everybody(dataset, index), *(one for _, one in densities)):
            full = upsample(log_density, dataset.stimuli[index].size)
            assert bool(full.isfinite().all())
            assert float(full.double().logsumexp((0, 1))) == pytest.approx(0, abs=1e-3)


def search(images: int = 8, people: int = 4) -> Dataset:
    """Everybody finds the target of an image within a few px, as in visual search."""
    generator = np.random.default_rng(0)
    target = generator.uniform((100, 100), (500, 700), (images, 2))
    image, person = np.divmod(np.arange(8 * images * people) // 8, people)
    y, x = (target[image] + generator.normal(0, 5, (len(image), 2))).T
    return dataset_of([(600, 800)] * images, image, x, y, person)


@pytest.mark.parametrize("bandwidth", gold_standard.BANDWIDTHS[:2])
def test_where_all_agree_the_gold_standard_is_the_kde(bandwidth: float) -> None:
    """Its log-density, also far from where anybody looked, is that of Gaussians on each pixel of the image."""
    dataset = search()
    gold = gold_standard.GoldStandard(bandwidth, np.array([1 - 1e-6, 0, 1e-6]), center_bias.flat())
    fitted = gold_standard.fit(dataset, range(8), relative_bias(dataset))
    assert fitted.bandwidth == gold_standard.BANDWIDTHS[0]
    x, y, subject = dataset.fixations_of(3)
    for person, (mine, log_density) in enumerate(gold.leave_one_out(dataset, 3)):
        assert (mine == (subject == person)).all()
        rows, columns = (
            np.exp(-0.5 * ((np.arange(edge) - np.floor(places[~mine])[:, None]) / bandwidth) ** 2)
            for edge, places in ((600, y), (800, x))
        )
        density = rows.T @ columns
        expected = np.log((1 - 1e-6) * density / density.sum() + 1e-6 / density.size)
        found = upsample(log_density, (600, 800)).numpy()
        np.testing.assert_allclose(found[np.exp(expected) > 1e-8], expected[np.exp(expected) > 1e-8], atol=0.1)
        assert found.min() > expected.min() - 2
    everybody = upsample(gold.everybody(dataset, 3), (600, 800)).numpy()
    assert np.isfinite(everybody).all()
    at_fixations = everybody[y.astype(int), x.astype(int)].mean() + math.log(600 * 800)
    assert at_fixations / math.log(2) > 7.5


class Said:
    """Log-densities (C, H, W) of three components on the density grid, which may be equal or flat."""

    def __init__(self, kind: str, dataset: Dataset) -> None:
        self.kind, self.dataset = kind, dataset

    def of(self, index: int) -> tuple[torch.Tensor, np.ndarray]:
        grid = Finalizer(cell=8.0).grid(self.dataset.stimuli[index].size)
        noise = torch.randn((3, *grid), generator=torch.Generator().manual_seed(index))
        maps = {"flat": 0 * noise, "equal": noise[:1].expand(3, *grid), "steep": 5 * noise}[self.kind]
        return normalise(maps), np.zeros(4)


class Stored:
    """Saliency maps of one value, of one pixel, or of any size of numbers."""

    def __init__(self, kind: str, dataset: Dataset) -> None:
        self.kind, self.dataset = kind, dataset

    def read(self, index: int) -> tuple[str, np.ndarray]:
        values = np.full(self.dataset.stimuli[index].size, {"constant": 0.1, "zero": 0.0}.get(self.kind, -3e200))
        if self.kind in ("one pixel", "huge"):
            values[-1, -1] = 4e200
        return self.kind, values * (1e-100 if self.kind == "one pixel" else 1)


@SOMETIMES
@hypothesis.given(dataset=odd_datasets(SIZES[:5]), kind=st.sampled_from(["flat", "equal", "steep"]))
def test_every_score_of_every_model_is_finite(model: Model, dataset: Dataset, kind: str) -> None:
    bias, images = relative_bias(dataset), np.arange(len(dataset.stimuli))
    gold = None
    if gold_standard.has_subjects(dataset, images):
        gold = gold_standard.fit(dataset, images, bias)
    kinds = ("constant", "zero", "one pixel", "huge")
    outside = tuple(ExternalModel(one, "saliency", dataset.stimuli, Stored(one, dataset)) for one in kinds)
    scoring = Scoring(dataset, images, Said(kind, dataset), model, {}, True, gold, outside)
    means = {name: MeanPrediction(total, len(images)) for name, total in scoring.sums(images.tolist()).items()}
    scores = {int(index): scoring.image(int(index), means) for index in images}
    for by_name in scores.values():
        for name, one in by_name.items():
            assert np.isfinite(list(one.values())).all(), (name, one)
            if name == "split_half_weights":
                continue
            assert set(METRICS) - set(one) == ({"IG", "LL"} if name in kinds else set()), name
            assert all(0 <= one[metric] <= 1 for metric in ("AUC", "sAUC"))
            assert -1e-4 <= one["SIM"] <= 1 + 1e-4
            assert abs(one["CC"]) <= 1 + 1e-4
        flat = {metric: by_name["constant"][metric] for metric in ("AUC", "sAUC", "NSS", "CC")}
        assert flat == {"AUC": 0.5, "sAUC": 0.5, "NSS": 0.0, "CC": 0.0}
    found = summary.summarise(dataset, scores, seed=0)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@SOMETIMES
@hypothesis.given(
    size=st.sampled_from(SIZES[:5]),
    sigma=st.sampled_from([0.3, 2.0, 15.0]),
    fixations=st.sampled_from(["one pixel", "one", "border", "anywhere"]),
    kind=st.sampled_from(["one pixel", "constant", "negative", "any"]),
)
def test_scores_of_odd_maps_are_pysaliencys(
    pysaliency: ModuleType, size: tuple[int, int], sigma: float, fixations: str, kind: str
) -> None:
    from pysaliency.metrics import CC, NSS, SIM, MIT_KLDiv
    from pysaliency.roc import general_roc
    from scipy.ndimage import gaussian_filter

    generator = np.random.default_rng(3)
    share = {
        "one pixel": np.full((2, 50), 0.7),
        "one": np.full((2, 1), 0.2),
        "border": generator.integers(0, 2, (2, 20)),
        "anywhere": generator.random((2, 20)),
    }[fixations]
    y, x = (np.minimum(part * edge, np.nextafter(edge, 0)) for part, edge in zip(share, size, strict=True))
    values = {
        "one pixel": np.zeros(size),
        "constant": np.full(size, 0.1),
        "negative": generator.normal(-5, 1, size),
        "any": generator.random(size),
    }[kind]
    if kind == "one pixel":
        values[int(y[0]), int(x[0])] = 1e-3
    rows, columns = y.astype(int), x.astype(int)
    bias = torch.full((1, *size), -math.log(size[0] * size[1]))
    target = Target.of(x, y, ShuffledFixations(size, np.array([0]), np.array([1])), Components.of(bias, sigma))
    counts = np.zeros(size)
    np.add.at(counts, (rows, columns), 1)
    empirical = gaussian_filter(counts, sigma, mode="reflect")
    expected = {
        "AUC": general_roc(values[rows, columns], values.ravel())[0],
        "NSS": NSS(values, columns, rows).mean() if np.ptp(values) else 0.0,
        "KLDiv": MIT_KLDiv(values, empirical),
        "SIM": SIM(values, empirical),
    }
    # Where one of the two is flat up to rounding pysaliency divides nothing by nothing.
    certain = np.ptp(values) > 0 and empirical.std() > 1e-3 * empirical.mean()
    found = score_saliency(torch.from_numpy(values), target)
    if certain:
        expected["CC"] = CC(values, empirical)
    else:
        assert abs(found["CC"]) <= 1 + 1e-4
    assert {metric: found[metric] for metric in expected} == pytest.approx(expected, abs=2e-4)


def test_a_density_of_one_pixel_has_finite_scores_where_that_is_looked_at() -> None:
    """Also for the mean of sAUC, whose coarser grid misses the pixel."""
    size = (SIDE + 41, SIDE + 73)
    log_density = torch.full((1, *size), -torch.inf)
    log_density[0, 250, 3] = 0
    x, y = np.full(5, 3.5), np.full(5, 250.5)
    flat = torch.full((1, *size), -math.log(size[0] * size[1]))
    target = Target.of(x, y, ShuffledFixations(size, np.array([7]), np.array([1])), Components.of(flat, 8.0))
    assert np.isfinite(list(score(log_density[0], target).values())).all()
    assert bool(reduced(log_density, torch.ones((1, 1), dtype=torch.float64)).isfinite().all())


@pytest.mark.parametrize("size", [(1, 1), (2, 30)])
def test_the_map_for_sim_of_an_image_narrower_than_its_blur(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sim_opt, "FEWEST_EPOCHS", 2)
    monkeypatch.setattr(sim_opt, "MOST_EPOCHS", 2)
    found = sim_opt.best_map(np.full(size, -math.log(size[0] * size[1])), blur_sigma=40.0, fixations=3)
    assert found.shape == size
    assert np.isfinite(found).all()


@SOMETIMES
@hypothesis.given(
    images=st.lists(st.integers(1, 4), min_size=2, max_size=9),
    kind=st.sampled_from(["equal", "constant", "far apart", "any"]),
    groups=st.integers(1, 9),
)
def test_category_weights_exist_for_any_densities(images: list[int], kind: str, groups: int) -> None:
    """One image a category or none, one fixation an image, twins, and densities that differ by e^900."""
    generator = np.random.default_rng(len(images))
    image = np.repeat(np.arange(len(images)), images)
    log_p = generator.normal(-13, 2, (len(image), 3))
    if kind == "equal":
        log_p = np.repeat(log_p[:, :1], 3, 1)
    elif kind == "constant":
        log_p[:] = -13
    elif kind == "far apart":
        log_p[np.arange(len(log_p)), generator.integers(0, 3, len(log_p))] -= 900
    likelihoods = Likelihoods(log_p, image, len(images))
    group = np.arange(len(images)) % groups
    fitted = category_weights.fit(likelihoods, group, groups, seed=0)
    for weights in (fitted.weights, fitted.low, fitted.high, fitted.global_weights, fitted.left_out):
        assert np.isfinite(weights).all()
    assert np.isfinite(list(fitted.crossvalidation.values())).all()
    np.testing.assert_allclose(fitted.weights.sum(1), 1)
    np.testing.assert_allclose(category_weights.oracle(likelihoods).sum(1), 1)


@pytest.mark.parametrize("kind", ["equal images", "one image a fold", "one feature"])
def test_categories_are_inferred_from_features_that_say_little(kind: str) -> None:
    generator = np.random.default_rng(0)
    category, fold = np.arange(6) % 3, np.arange(6) // 3
    pooled = generator.normal(size=(6, 1 if kind == "one feature" else 40))
    if kind == "equal images":
        pooled = np.repeat(pooled[:1], 6, 0)
    found = classifier.fit(pooled, category, 3, fold)
    probabilities = found.probabilities(pooled)
    np.testing.assert_allclose(probabilities.sum(1), 1)
    if kind == "equal images":
        np.testing.assert_allclose(probabilities, 1 / 3, atol=1e-6)
    assert 0 <= found.accuracy <= 1


def test_a_fixation_stays_in_the_pixel_that_pysaliency_takes(pysaliency: ModuleType) -> None:
    """float32 rounds 327.99999999999994 to 328."""
    x, y, size = np.array([327.99999999999994]), np.array([57.99999999999999]), (120, 400)
    assert np.float32(x[0]) == 328
    fixations = pysaliency.Fixations.create_without_history(x, y, np.array([0]))
    assert (fixations.x_int[0], fixations.y_int[0]) == (327, 57)
    dataset = dataset_of([size, size], np.array([0, 1]), np.tile(x, 2), np.tile(y, 2), np.zeros(2))
    x, y, _ = dataset.fixations_of(0)
    negatives = ShuffledFixations.of(
        size, np.array([size, size]), np.full(2, True), dataset.image, dataset.x, dataset.y
    )
    assert negatives.pixels.tolist() == [57 * 400 + 327]
    assert negatives.without(x, y).counts.tolist() == [1]
    bias = Components.of(torch.full((1, *size), -math.log(size[0] * size[1])), 3.0)
    target = Target.of(x, y, negatives, bias)
    assert target.pixels.tolist() == [57 * 400 + 327]
    stimuli = pysaliency.Stimuli([np.zeros((*size, 3), np.uint8)])
    expected = pysaliency.FixationMap(stimuli, fixations, kernel_size=3.0).saliency_map(stimuli[0])
    np.testing.assert_allclose(
        target.empirical.view(size) / target.empirical.sum(), expected / expected.sum(), atol=1e-7
    )
    log_density = normalise(torch.randn(size, generator=torch.Generator().manual_seed(0)))
    for how in (Finalizer(cell=1.0), Finalizer("nearest", cell=1.0)):
        read = how.at_pixels(log_density, x, y, size)
        assert read == pytest.approx(float(log_density[57, 327]), abs=1e-5)
        assert int(how.target_map(x, y, size, size).argmax()) == 57 * 400 + 327
    gold = gold_standard._Seen.of(dataset, 0, center_bias.flat())
    assert (gold.x[0], gold.y[0]) == (327.5, 57.5)


# --- Before hours of work ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "folds", "problem"),
    [
        (6, 5, "only one of 6 images is held out, and sAUC needs fixations of a second"),
        (4, 2, "only one of 4 images is held out"),
        (2, 2, "too few to hold out 1"),
    ],
)
def test_a_split_that_cannot_be_scored_is_refused(images: int, folds: int, problem: str) -> None:
    image = np.arange(images)
    everything = dataset_of([(10, 20)] * images, image, image, image, image)
    alike = [Stimulus(s.name, s.path, s.size, "all", None, "") for s in everything.stimuli]
    dataset = Dataset(**{**vars(everything), "stimuli": tuple(alike)})
    with pytest.raises(UserError, match=problem):
        split(dataset, seed=0, folds=folds).refuse_unscorable()


# --- Too good to be true -----------------------------------------------------------------------------------------


def scored(**auc: float) -> dict[str, Any]:
    return {name: {"overall": {"AUC": {"mean": value}}} for name, value in auc.items()}


@pytest.mark.parametrize(
    ("bias", "ours", "people", "doubted"),
    [
        # gaze; the built-in displays' optimum; visual search; two people who know little of each other; CAT2000.
        (0.80, 0.902, 0.903, {}),
        (0.62, 0.891, 0.866, {}),
        (0.956, 0.9985, 0.9988, {}),
        (0.75, 0.88, 0.78, {}),
        (0.84, 0.88, None, {}),
        # All in one corner: people know it of each other too.
        (0.9999, 1.0, 0.9993, {"center_bias": "shares"}),
        (0.9999, 1.0, None, {"center_bias": "unit", "category_weights": "too good"}),
        (0.80, 0.96, 0.903, {"category_weights": "as people predict each other with 0.9030"}),
        (0.80, 0.995, None, {"category_weights": "whether the images show the fixations"}),
        (0.80, 0.15, 0.903, {"category_weights": "below chance"}),
    ],
)
def test_what_is_too_good_to_be_true_never_becomes_champion(
    bias: float, ours: float, people: float | None, doubted: dict[str, str], tmp_path: Path
) -> None:
    references = scored() if people is None else scored(gold_standard=people)
    doubts = summary.doubts(scored(center_bias=bias, category_weights=ours), references)
    assert set(doubts) == set(doubted)
    if not doubted:
        return
    write_json(tmp_path / "evaluation.json", {"doubts": doubts})
    nobody = cast(Any, SimpleNamespace())  # the registry is not even asked
    alias, reason = registry._decide(nobody, nobody, tmp_path)
    assert alias == "challenger"
    assert reason.startswith("never champion: ")
    assert any(line in reason for line in doubts.values())
