"""Scores of an image: each mixture against its density scored by itself, and references that are honest."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import logsumexp

from acw.data import Dataset, Stimulus
from acw.evaluation import gold_standard
from acw.evaluation.distributed import score_images
from acw.evaluation.gold_standard import BANDWIDTHS, GoldStandard, has_subjects
from acw.evaluation.metrics import METRICS, Components, ShuffledFixations, Target, score
from acw.evaluation.sauc import MeanPrediction
from acw.evaluation.scoring import CONTROLS, REFERENCES, Scores, Scoring
from acw.evaluation.summary import per_image_csv, summarise, table
from acw.features.view import View
from acw.features.zoo import BACKBONES
from acw.fusion.classifier import CategoryClassifier
from acw.heads import finalizer
from acw.heads.center_bias import fixed_gaussian
from acw.heads.finalizer import Finalizer
from acw.model.model import Model

BACKBONE_NAMES = ("one", "two", "three")
CATEGORIES = ("Art", "Street", "Zoo")
WEIGHTS = np.array([[0.7, 0.2, 0.1], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]])
GLOBAL_WEIGHTS = np.array([0.5, 0.3, 0.2])
# None of them a multiple of the density's cell.
SIZES = [(61, 90), (75, 52), (47, 99)]
IMAGES = 9
CELL = 8.0
AMONG = np.array([0, 1, 2, 5, 7])
BY_IMAGE = np.random.default_rng(0).dirichlet(np.ones(3), IMAGES)
# Scores in float32 against scores of a mixture made in float64.
CLOSE = 1e-4


class Known(Dataset):
    """Of the first image it is known which density its fixations were drawn from."""

    def optimum_log_density(self, i: int) -> np.ndarray | None:
        return fixed_gaussian().of_size(self.stimuli[i].size) if i == 0 else None


@dataclass
class Blobs:
    """Smooth random densities of three backbones, the same for an image each time."""

    def of(self, index: int) -> tuple[torch.Tensor, np.ndarray]:
        coarse = torch.randn((3, 1, 3, 4), generator=torch.Generator().manual_seed(index))
        smooth = F.interpolate(coarse, Finalizer(cell=CELL).grid(SIZES[index % 3]), mode="bicubic")[:, 0]
        return finalizer.normalise(3 * smooth), np.random.default_rng(index).normal(size=4)


def dataset_of(sizes: list[tuple[int, int]], image: np.ndarray, x: Any, y: Any, subject: np.ndarray) -> Dataset:
    """Images in three categories in turn; image, x, y, subject: (F,)."""
    stimuli = tuple(
        Stimulus(f"{i:02d}.png", f"{i:02d}.png", size, CATEGORIES[i % 3], None, "") for i, size in enumerate(sizes)
    )
    columns = image.astype(np.int32), x.astype(np.float64), y.astype(np.float64), subject.astype(np.int32)
    return Known("made up", "csv", "nowhere", stimuli, *columns, blur_sigma=4.0, notes=())


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """Three subjects with 4 to 9 fixations each on nine images, some of them in the last row and column."""
    generator = np.random.default_rng(1)
    sizes = [SIZES[i % 3] for i in range(IMAGES)]
    counts = generator.integers(4, 10, 3 * IMAGES)
    image = np.repeat(np.arange(3 * IMAGES) // 3, counts)
    subject = np.repeat(np.arange(3 * IMAGES) % 3, counts)
    height, width = np.array(sizes)[image].T
    x, y = generator.random((2, len(image))) * [width, height]
    x[::17], y[::17] = width[::17] - 0.01, height[::17] - 0.01
    return dataset_of(sizes, image, x, y, subject)


@pytest.fixture(scope="module")
def model() -> Model:
    generator = np.random.default_rng(2)
    return Model(
        views=[View((dataclasses.replace(BACKBONES["lite0"], name=name),)) for name in BACKBONE_NAMES],
        heads={},
        finalizer=Finalizer(cell=CELL),
        categories=list(CATEGORIES),
        weights=WEIGHTS,
        global_weights=GLOBAL_WEIGHTS,
        center_bias=fixed_gaussian(),
        finalizer_bias=fixed_gaussian(),
        classifier=CategoryClassifier(np.zeros(4), np.ones(4), generator.normal(size=(3, 4)), np.zeros(3), 0.5),
        provenance={},
    )


@pytest.fixture(scope="module")
def scoring(dataset: Dataset, model: Model) -> Scoring:
    gold = GoldStandard(12.0, np.array([0.6, 0.3, 0.1]), model.center_bias)
    return Scoring(dataset, AMONG, Blobs(), model, {"by_image": BY_IMAGE}, labelled=True, gold_standard=gold)


@pytest.fixture(scope="module")
def means(scoring: Scoring) -> dict[str, MeanPrediction]:
    return means_of(scoring)


def means_of(scoring: Scoring) -> dict[str, MeanPrediction]:
    return {name: MeanPrediction(total, len(AMONG)) for name, total in scoring.sums(AMONG.tolist()).items()}


@pytest.fixture(scope="module")
def scores(scoring: Scoring, means: dict[str, MeanPrediction]) -> dict[int, Scores]:
    """Of one image of each size and category, the last not among sAUC's negatives itself."""
    return {index: scoring.image(index, means) for index in (0, 1, 8)}


def target_of(dataset: Dataset, index: int) -> Target:
    """What an image is scored against, its negatives collected image by image."""
    height, width = size = dataset.stimuli[index].size
    pixels = []
    for other in AMONG[index != AMONG]:
        x, y, _ = dataset.fixations_of(other)
        rows = (y.astype(np.float64) / dataset.stimuli[other].size[0] * height).astype(int)
        columns = (x.astype(np.float64) / dataset.stimuli[other].size[1] * width).astype(int)
        pixels.append(rows * width + columns)
    negatives = ShuffledFixations(size, *np.unique(np.concatenate(pixels), return_counts=True))
    bias = torch.from_numpy(fixed_gaussian().of_size(size))
    return Target.of(*dataset.fixations_of(index)[:2], negatives, Components.of(bias[None], dataset.blur_sigma))


def plain_scores(dataset: Dataset, index: int, weights: np.ndarray) -> dict[str, float]:
    """The scores of the log of the weighted mean density, in float64."""
    full = finalizer.upsample(Blobs().of(index)[0], dataset.stimuli[index].size).double().exp().numpy()
    mixed = np.log(np.tensordot(weights, full, 1))
    assert logsumexp(mixed) == pytest.approx(0, abs=1e-4)
    return score(torch.from_numpy(mixed.astype(np.float32)), target_of(dataset, index))


def without_sauc(scores: dict[str, float]) -> dict[str, float]:
    """Which needs other images, and has a test of its own."""
    return {metric: value for metric, value in scores.items() if metric != "sAUC"}


def test_every_mixture_is_scored_as_the_log_of_its_mean_density(
    dataset: Dataset, model: Model, scores: dict[int, Scores]
) -> None:
    for index, by_name in scores.items():
        probabilities = model.classifier.probabilities(Blobs().of(index)[1][None])[0]
        assert probabilities.max() < 0.95, "an uncertain category is what this is about"
        expected = {f"backbone:{name}": row for name, row in zip(BACKBONE_NAMES, np.eye(3), strict=True)} | {
            "uniform": np.full(3, 1 / 3),
            "global_weights": GLOBAL_WEIGHTS,
            "category_weights": WEIGHTS[index % 3],
            "inferred_category": probabilities @ WEIGHTS,
            "by_image": BY_IMAGE[index],
        }
        for name, weights in expected.items():
            plain = plain_scores(dataset, index, weights)
            assert without_sauc(by_name[name]) == pytest.approx(plain, abs=CLOSE), (index, name)
        others = set(by_name) - set(expected) - {"center_bias", "wrong_category", *REFERENCES, *CONTROLS}
        assert not others


def test_wrong_category_is_the_mean_over_all_wrong_ones(dataset: Dataset, scores: dict[int, Scores]) -> None:
    for index, by_name in scores.items():
        wrong = [plain_scores(dataset, index, WEIGHTS[c]) for c in range(3) if c != index % 3]
        expected = {metric: np.mean([one[metric] for one in wrong]) for metric in wrong[0]}
        assert without_sauc(by_name["wrong_category"]) == pytest.approx(expected, abs=CLOSE)


def test_the_centre_bias_is_the_baseline_of_every_score(scores: dict[int, Scores]) -> None:
    for by_name in scores.values():
        baseline = by_name["center_bias"]
        assert baseline["IG"] == pytest.approx(0, abs=1e-6)
        for name, one in by_name.items():
            assert set(one) == ({"IG", "LL"} if name in CONTROLS else set(METRICS)), name
            assert one["IG"] == pytest.approx(one["LL"] - baseline["LL"], abs=1e-5), name


def test_no_mixture_is_above_the_oracle(scores: dict[int, Scores]) -> None:
    for by_name in scores.values():
        best = by_name["oracle_weights"]["LL"]
        mixtures = set(by_name) - {"center_bias", *REFERENCES, *CONTROLS}
        assert all(by_name[name]["LL"] <= best + 1e-5 for name in mixtures)
        assert by_name["uniform"]["LL"] < best - 0.01


def test_the_optimum_is_scored_where_it_is_known(scores: dict[int, Scores]) -> None:
    expected = without_sauc(scores[0]["center_bias"])
    assert without_sauc(scores[0]["optimum"]) == pytest.approx(expected, abs=1e-6)
    assert "optimum" not in scores[1]


def test_the_gold_standard_counts_every_fixation_once(scoring: Scoring, scores: dict[int, Scores]) -> None:
    """Under the density of everyone else but the one who made it."""
    dataset, gold = scoring.dataset, scoring.gold_standard
    assert gold is not None
    for index, by_name in scores.items():
        size = dataset.stimuli[index].size
        x, y, _ = dataset.fixations_of(index)
        log_p = np.full(len(x), np.nan)
        for mine, others in gold.leave_one_out(dataset, index):
            assert np.isnan(log_p[mine]).all()
            log_p[mine] = finalizer.upsample(others, size)[y[mine].astype(int), x[mine].astype(int)]
        expected = (log_p.mean() + math.log(size[0] * size[1])) / math.log(2)
        assert by_name["gold_standard"]["LL"] == pytest.approx(expected, abs=1e-5)


def test_unknown_categories_have_no_right_and_wrong_weights(scoring: Scoring, scores: dict[int, Scores]) -> None:
    stimuli = [dataclasses.replace(stimulus, category="elsewhere") for stimulus in scoring.dataset.stimuli]
    unknown = dataclasses.replace(scoring.dataset, stimuli=tuple(stimuli))
    other = dataclasses.replace(scoring, dataset=unknown, labelled=False, gold_standard=None)
    actual = other.image(0, means_of(other))
    missing = {"category_weights", "wrong_category", "gold_standard", "gold_standard_upper"}
    assert actual == {name: values for name, values in scores[0].items() if name not in missing}


@dataclass
class Counted(Blobs):
    """Leaves a file for each time that it is unpickled."""

    folder: Path

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        (self.folder / f"{os.getpid()}-{uuid.uuid4()}").touch()


def test_workers_load_once_and_score_as_this_process_does(scoring: Scoring, ray_local: None, tmp_path: Path) -> None:
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import it
    shared = dataclasses.replace(scoring, densities=Counted(tmp_path))
    for indices in (np.array([8, 0, 5, 1, 2]), [4, 0]):
        found, cost = score_images(shared, indices)
        averaged = [int(index) for index in indices if index in AMONG]
        ordered = sorted(averaged, key=lambda index: scoring.dataset.stimuli[index].size)
        means = {name: MeanPrediction(one, len(averaged)) for name, one in scoring.sums(ordered).items()}
        assert list(found) == list(indices), "in the order that was asked for"
        for index, scores in found.items():
            expected = scoring.image(index, means)
            assert list(scores) == list(expected)
            assert all(scores[name] == pytest.approx(expected[name], abs=1e-6) for name in expected)
        assert cost.images == len(indices)
        assert cost.seconds > 0
        assert 2**26 < cost.peak_rss < 2**33
        processes = [file.name.partition("-")[0] for file in tmp_path.iterdir()]
        assert 0 < len(processes) == len(set(processes))
        for file in tmp_path.iterdir():
            file.unlink()


def test_sampled_on_the_grid_as_on_the_full_map(dataset: Dataset) -> None:
    for index in range(3):
        size = dataset.stimuli[index].size
        log_density = finalizer.normalise(Blobs().of(index)[0][0] / 5)
        x, y = (np.floor(axis) + 0.5 for axis in dataset.fixations_of(index)[:2])
        full = finalizer.upsample(log_density, size)
        actual = Finalizer(cell=CELL).at_pixels(log_density, x, y, size)
        # All that may differ is the normaliser of the full map, which is one number.
        difference = actual - full[y.astype(int), x.astype(int)].numpy()
        assert np.ptp(difference) < 1e-5
        assert abs(difference.mean()) < 0.01
        flat = finalizer.normalise(torch.zeros_like(log_density))
        assert Finalizer(cell=CELL).at_pixels(flat, x, y, size) == pytest.approx(-math.log(size[0] * size[1]), abs=5e-6)


def made_up_scores(names: list[str], seed: int = 0) -> dict[int, Scores]:
    """Of all images in no order; the categories' means are far apart."""
    generator = np.random.default_rng(seed)
    order = generator.permutation(IMAGES).tolist()
    return {
        index: {name: dict(zip(METRICS, generator.normal(10 * (index % 3), 1, 8), strict=True)) for name in names}
        for index in order
    }


def test_a_summary_has_the_means_of_what_was_scored(dataset: Dataset) -> None:
    names = ["center_bias", "uniform", "category_weights", "wrong_category", "gold_standard", "oracle_weights"]
    scores = made_up_scores(names)
    for by_name in scores.values():
        by_name["category_weights"] = {metric: value + 0.25 for metric, value in by_name["uniform"].items()}
    sources = ["here", "there", None]
    stimuli = [dataclasses.replace(one, source=sources[i // 3]) for i, one in enumerate(dataset.stimuli)]
    summary = summarise(dataclasses.replace(dataset, stimuli=tuple(stimuli)), scores, seed=3)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert set(summary["models"]) == set(names[:4])
    assert set(summary["references"]) == set(names[4:])
    for name, entry in (summary["models"] | summary["references"]).items():
        for metric in METRICS:
            value = {index: by_name[name][metric] for index, by_name in scores.items()}
            overall = entry["overall"][metric]
            low, high = overall["ci95"]
            assert overall["mean"] == pytest.approx(np.mean(list(value.values())))
            # Resampled within category: the categories' distance of 10 is not in it.
            assert low < overall["mean"] < high < low + 3
            for c, category in enumerate(CATEGORIES):
                mean = np.mean([value[index] for index in value if index % 3 == c])
                assert entry["by_category"][category][metric] == pytest.approx(mean)
            assert set(entry["by_source"]) == {"here", "there"}
            assert entry["by_source"]["there"][metric] == pytest.approx(np.mean([value[index] for index in (3, 4, 5)]))
    compared = {(one["a"], one["b"]) for one in summary["comparisons"]}
    assert {("category_weights", "uniform"), ("category_weights", "wrong_category")} <= compared
    assert len(summary["comparisons"]) == len(compared) * len(METRICS)
    for one in summary["comparisons"]:
        pairs = [(s[one["a"]][one["metric"]], s[one["b"]][one["metric"]]) for s in scores.values()]
        assert one["mean"] == pytest.approx(np.mean([a - b for a, b in pairs]))
        low, high = one["ci95"]
        if (one["a"], one["b"]) == ("category_weights", "uniform"):
            assert (low, high) == pytest.approx((0.25, 0.25)), "the same difference on each image leaves no doubt"
        else:
            assert low < one["mean"] < high


def test_a_model_explains_a_share_of_what_people_know(dataset: Dataset) -> None:
    scores = made_up_scores(["center_bias", "uniform", "gold_standard", "gold_standard_upper"])
    for by_name in scores.values():
        by_name["uniform"]["IG"] = 0.5 * by_name["gold_standard"]["IG"]
    explained = summarise(dataset, scores, seed=0)["explained"]
    assert set(explained) == {"center_bias", "uniform"}
    half = explained["uniform"]["gold_standard"]
    assert [half["mean"], *half["ci95"]] == pytest.approx([0.5] * 3)
    low, high = explained["uniform"]["gold_standard_upper"]["ci95"]
    assert low < explained["uniform"]["gold_standard_upper"]["mean"] < high


def test_a_saliency_map_has_no_likelihood(dataset: Dataset) -> None:
    scores = made_up_scores(["category_weights", "map"])
    for by_name in scores.values():
        by_name["map"] = {metric: value for metric, value in by_name["map"].items() if metric not in ("IG", "LL")}
    summary = summarise(dataset, scores, seed=0)
    assert set(summary["models"]["map"]["overall"]) == set(METRICS) - {"IG", "LL"}
    compared = {one["metric"] for one in summary["comparisons"] if one["b"] == "map"}
    assert compared == set(METRICS) - {"IG", "LL"}
    (line,) = (line for line in table(summary).splitlines() if line.startswith("map"))
    assert line.split()[1:3] == ["-", "-"]
    rows = list(csv.DictReader(io.StringIO(per_image_csv(dataset, scores))))
    assert {row["IG"] for row in rows if row["model"] == "map"} == {""}


def test_the_table_ends_each_part_with_its_best(dataset: Dataset) -> None:
    scores = made_up_scores(["center_bias", "uniform", "category_weights", "gold_standard"])
    summary = summarise(dataset, scores, seed=0)
    lines = table(summary | {"doubts": {}}).splitlines()[1:]
    assert lines.pop() == "explained: the share of the IG by which people predict people (fixed kernels)"
    printed = [line.split()[0] for line in lines if not line.startswith("-")]
    ranked = sorted(printed[:3], key=lambda name: summary["models"][name]["overall"]["IG"]["mean"])
    assert printed == [*ranked, "gold_standard"]


def test_per_image_scores_survive_the_file(dataset: Dataset) -> None:
    awkward = dataclasses.replace(dataset.stimuli[0], name='Art/a, "b"é.png', source="x,y")
    stimuli = (awkward, *dataset.stimuli[1:])
    scores = made_up_scores(["center_bias", "backbone:one", "oracle_weights"])
    text = per_image_csv(dataclasses.replace(dataset, stimuli=stimuli), scores)
    rows = list(csv.DictReader(io.StringIO(text)))
    expected = [
        (stimuli[index].name, stimuli[index].category, stimuli[index].source or "", name, values)
        for index, by_name in scores.items()
        for name, values in by_name.items()
    ]
    assert len(rows) == len(expected)
    for row, (image, category, source, name, values) in zip(rows, expected, strict=True):
        assert (row["image"], row["category"], row["source"], row["model"]) == (image, category, source, name)
        assert {metric: float(row[metric]) for metric in METRICS} == pytest.approx(values, rel=1e-5)


def test_nobody_predicts_himself(dataset: Dataset, model: Model) -> None:
    gold = GoldStandard(16.0, np.array([0.9, 0.0, 0.1]), model.center_bias)
    for index in range(3):
        before = gold.leave_one_out(dataset, index)
        assert len(before) == 3
        assert (np.sum([mine for mine, _ in before], axis=0) == 1).all()
        for person in range(3):
            moving = (dataset.image == index) & (dataset.subject == person)
            x, y = dataset.x.copy(), dataset.y.copy()
            x[moving], y[moving] = 3.0, 5.0
            after = gold.leave_one_out(dataclasses.replace(dataset, x=x, y=y), index)
            for other, ((mine, old), (same, new)) in enumerate(zip(before, after, strict=True)):
                np.testing.assert_array_equal(mine, same)
                assert logsumexp(new.double().numpy()) == pytest.approx(0, abs=1e-5)
                moved = float((new - old).abs().max())
                assert moved < 1e-6 if other == person else moved > 0.1


def pairs_of_people(spread: float, images: int = 15) -> Dataset:
    """Two people look at the same spots of an image, the second `spread` px beside the first."""
    generator = np.random.default_rng(4)
    size, spots = (600, 800), 8
    first = generator.uniform((150, 150), (450, 650), (images * spots, 2))
    second = np.clip(first + generator.normal(0, spread, first.shape), 0, np.array(size) - 1)
    y, x = np.stack([first, second], 1).reshape(-1, 2).T
    image = np.repeat(np.arange(images), 2 * spots)
    return dataset_of([size] * images, image, x, y, np.tile([4, 2], images * spots))


@pytest.mark.parametrize("spread", [16.0, 32.0, 50.0])
def test_the_kernel_is_as_wide_as_people_differ(model: Model, spread: float) -> None:
    dataset = pairs_of_people(spread)
    gold = gold_standard.fit(dataset, range(len(dataset.stimuli)), model.center_bias)
    assert abs(BANDWIDTHS.index(gold.bandwidth) - BANDWIDTHS.index(spread)) <= 1
    assert gold.weights[0] > 0.8
    assert gold.weights.sum() == pytest.approx(1)


def test_people_who_look_anywhere_say_nothing_of_each_other(dataset: Dataset, model: Model) -> None:
    """A person's own fixations in the density would make it the best of all."""
    gold = gold_standard.fit(dataset, range(IMAGES), model.center_bias)
    assert gold.weights[0] < 0.3
    assert gold.weights[2] > 0.5


def test_two_known_people_an_image_are_needed(dataset: Dataset, model: Model) -> None:
    everything = range(IMAGES)
    assert has_subjects(dataset, everything)

    def with_subjects(chosen: np.ndarray, value: int) -> Dataset:
        return dataclasses.replace(dataset, subject=np.where(chosen, value, dataset.subject).astype(np.int32))

    last = dataset.image == IMAGES - 1
    one_unknown = np.arange(len(last)) == len(last) - 1
    for broken in (with_subjects(last, 0), with_subjects(last, -1), with_subjects(one_unknown, -1)):
        assert not has_subjects(broken, everything)
        assert has_subjects(broken, everything[:-1])
        with pytest.raises(AssertionError, match="two known subjects"):
            gold_standard.fit(broken, everything, model.center_bias)
    kept = {name: getattr(dataset, name)[~last] for name in ("image", "x", "y", "subject")}
    assert not has_subjects(dataclasses.replace(dataset, **kept), everything)
