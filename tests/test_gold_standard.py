"""People as predictors of people: adaptive kernels against plain loops, and what they are for."""

from __future__ import annotations

import numpy as np
import pytest
from test_evaluation import dataset_of

from acw.data import Dataset
from acw.evaluation import gold_standard
from acw.evaluation.gold_standard import FINALIZER, GoldStandard
from acw.heads import center_bias

SIZE = (160, 240)
IMAGES, PEOPLE = 8, 6


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """Everybody looks at one spot of an image, within some pixels, and now and then anywhere."""
    generator = np.random.default_rng(0)
    image, subject = (
        a.ravel() for a in np.meshgrid(np.arange(IMAGES), np.repeat(np.arange(PEOPLE), 10), indexing="ij")
    )
    spot = generator.uniform(0.2, 0.8, (IMAGES, 2))[image] * SIZE
    anywhere = generator.random((len(image), 2)) * SIZE
    strays = generator.random(len(image)) < 0.4
    y, x = np.where(strays[:, None], anywhere, spot + generator.normal(0, 6, (len(image), 2))).T
    y, x = y.clip(0, SIZE[0] - 1), x.clip(0, SIZE[1] - 1)
    return dataset_of([SIZE] * IMAGES, image, x, y, subject)


def test_adaptive_kernels_are_abramsons(dataset: Dataset) -> None:
    """One by one: the others' pilot density at each of their fixations decides its kernel's width."""
    bandwidth = 20.0
    gold = GoldStandard(bandwidth, np.array([1.0, 0.0, 0.0]), center_bias.flat(), adaptive=True)
    x, y, subject = dataset.fixations_of(3)
    x, y = x.astype(int) + 0.5, y.astype(int) + 0.5
    height, width = FINALIZER.grid(SIZE)
    v, u = ((np.arange(n) + 0.5) * length / n for n, length in ((height, SIZE[0]), (width, SIZE[1])))

    def kernel(index: int, scale: float) -> np.ndarray:
        distance = (v[:, None] - y[index]) ** 2 + (u[None] - x[index]) ** 2
        return np.exp(-0.5 * distance / scale**2) / scale**2

    for mine, log_density in gold.leave_one_out(dataset, 3):
        others = np.flatnonzero(~mine)
        pilot = sum(kernel(k, bandwidth) for k in others)
        at = np.array([pilot[int(y[k] / SIZE[0] * height), int(x[k] / SIZE[1] * width)] for k in others])
        widths = np.maximum(bandwidth / np.sqrt(at / np.exp(np.log(at).mean())), FINALIZER.cell)
        assert widths.max() > 1.5 * widths.min()
        expected = sum(kernel(k, scale) for k, scale in zip(others, widths, strict=True))
        np.testing.assert_allclose(np.exp(log_density.numpy()), expected / expected.sum(), rtol=1e-4)
        assert set(subject[mine]) != set(subject[~mine])


def test_adaptive_kernels_predict_people_better_where_they_agree_on_some_spots(dataset: Dataset) -> None:
    bias = center_bias.flat()

    def information(adaptive: bool) -> float:
        gold = gold_standard.fit(dataset, range(IMAGES), bias, adaptive)
        assert gold.described()["kernels"] == ("adaptive" if adaptive else "fixed")
        found = []
        for index in range(IMAGES):
            x, y, _ = dataset.fixations_of(index)
            for mine, density in gold.leave_one_out(dataset, index):
                height, width = density.shape
                rows, columns = (y[mine] / SIZE[0] * height).astype(int), (x[mine] / SIZE[1] * width).astype(int)
                found.append(float(density[rows, columns].mean()))
        return float(np.mean(found))

    assert information(True) > information(False) + 0.01
