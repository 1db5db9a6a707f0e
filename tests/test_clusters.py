"""Categories that are found: as many as people look at differently, whatever else images differ by."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from test_adaptation import EVEN, looked_at

from acw.fusion import clusters
from acw.fusion.adaptation_fit import Maps, unadapted

EACH = 40


def features(generator: np.random.Generator, kind: np.ndarray) -> np.ndarray:
    """(N, 30): two kinds apart from each other, among features that say nothing."""
    middles = generator.normal(size=(int(kind.max()) + 1, 30))
    return middles[kind] + 0.3 * generator.normal(size=(len(kind), 30))


@pytest.mark.usefixtures("ray_local")
def test_kinds_that_people_look_at_differently_are_found() -> None:
    generator = np.random.default_rng(0)
    usual, other = unadapted(EVEN), unadapted(np.array([0.9, 0.05, 0.05]))
    other[0] = math.log(0.5)
    of_kinds = [looked_at(generator, EACH, usual), looked_at(generator, EACH, other)]
    maps = Maps(*(torch.cat([getattr(m, f.name) for m in of_kinds]) for f in dataclasses.fields(Maps)))
    # Every third image has no fixations that anybody saw, and is put where its features belong.
    kind = np.arange(3 * EACH) // (3 * EACH // 2)
    seen = np.flatnonzero(np.arange(3 * EACH) % 3)
    found = clusters.find(features(generator, kind), seen, maps, EVEN, seed=0)
    assert found.number.max() == 1
    assert len(np.unique(found.number + 2 * kind)) == 2, "the clusters are the kinds"
    mean, error = found.gain[2]
    assert mean > 5 * error


@pytest.mark.usefixtures("ray_local")
def test_kinds_that_people_look_at_alike_are_one_category() -> None:
    generator = np.random.default_rng(1)
    kind = np.arange(3 * EACH) % 3
    maps = looked_at(generator, len(kind), unadapted(EVEN))
    found = clusters.find(features(generator, kind), np.arange(len(kind)), maps, EVEN, seed=0)
    assert not found.number.any()
    assert set(found.gain) >= {2, 3}, "more were tried"


@pytest.mark.usefixtures("ray_local")
def test_few_images_are_one_category() -> None:
    generator = np.random.default_rng(3)
    kind = np.arange(15) % 2
    maps = looked_at(generator, len(kind), unadapted(EVEN))
    found = clusters.find(features(generator, kind), np.arange(len(kind)), maps, EVEN, seed=0)
    assert not found.number.any()
    assert found.gain == {}


def test_typical_images_are_near_the_middle_of_their_cluster() -> None:
    generator = np.random.default_rng(2)
    kind = np.repeat([0, 0, 1], 30)
    values = features(generator, kind)
    number, typical = clusters.clustered(values, np.arange(90), 2, seed=0)
    assert (number == kind).all(), "the larger one comes first"
    away = np.linalg.norm(values - np.stack([values[kind == k].mean(0) for k in kind]), axis=1)
    assert np.corrcoef(away[kind == 0], typical[kind == 0])[0, 1] < -0.5
