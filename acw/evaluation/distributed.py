"""Scores of images by all cores of the Ray cluster: first the mean predictions, then image by image."""

from __future__ import annotations

import functools
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from acw.cluster.costs import Cost, peak_rss
from acw.cluster.process import compute_with, give_back_when_idle
from acw.evaluation.sauc import MeanPrediction
from acw.evaluation.scoring import ComponentPrediction, Scores, Scoring

# Images that Ray knows of at a time: enough for a cluster to see that it should grow.
TASKS_AT_ONCE = 500
# Images whose predictions one task adds up. Sums come in this order, so that workers change no digit.
IMAGES_PER_SUM = 16


def score_images(scoring: Scoring, indices: Sequence[int] | np.ndarray) -> tuple[dict[int, Scores], Cost]:
    """Scores of all the images, index -> name -> metric -> score, computed by all cores of the Ray cluster.

    Those of them that are `among` the negatives' images make the mean predictions of sAUC. The cost's peak is the
    workers': the model, and some 400 MB at full HD, whatever the size of the data set, whose columns they share.
    """
    import ray

    start, peak = time.monotonic(), 0
    # In a list it comes as a reference, so that a worker unpickles it once and not for every image.
    shared: list[Any] = [ray.put(scoring)]
    images = sorted(map(int, indices), key=lambda index: scoring.dataset.stimuli[index].size)
    chunks = [images[k : k + IMAGES_PER_SUM] for k in range(0, len(images), IMAGES_PER_SUM)]
    survey = ray.remote(num_cpus=1, max_retries=3, num_returns=2)(_survey)
    totals: dict[str, Tensor] = {}
    predictions: dict[int, Any] = {}
    asked = _in_order([functools.partial(survey.remote, shared, chunk) for chunk in chunks])
    for chunk, ((sums, memory), [kept]) in zip(chunks, asked, strict=True):
        totals |= {name: totals[name] + part if name in totals else part for name, part in sums.items()}
        predictions |= dict.fromkeys(chunk, kept)
        peak = max(peak, memory)
        print(f"averaging: {len(predictions)}/{len(images)} images", flush=True)
    assert totals, "none of the images has a say in the means"
    averaged = int(np.isin(images, scoring.among).sum())
    shared.append(ray.put({name: MeanPrediction(total, averaged) for name, total in totals.items()}))
    score = ray.remote(num_cpus=1, max_retries=3, num_returns=1)(_score)
    asked = _in_order([functools.partial(score.remote, shared, predictions[index], index) for index in images])
    result = {}
    for index, ((scores, memory), _) in zip(images, asked, strict=True):
        result[index] = scores
        peak = max(peak, memory)
        if len(result) * 10 // len(images) > (len(result) - 1) * 10 // len(images):
            print(f"scoring: {len(result)}/{len(images)} images", flush=True)
    return {int(index): result[int(index)] for index in indices}, Cost(time.monotonic() - start, len(images), peak)


def _in_order(tasks: Sequence[Callable[[], Any]]) -> Iterator[tuple[Any, list[Any]]]:
    """Starts tasks, some at a time, and gives in their order the first of their results, and references to others."""
    import ray

    waiting = iter(tasks)
    out = deque(start() for start in itertools.islice(waiting, TASKS_AT_ONCE))
    while out:
        first, *others = out.popleft() if isinstance(out[0], list) else [out.popleft()]
        yield ray.get(first), others
        out.extend(start() for start in itertools.islice(waiting, 1))


def _survey(
    shared: list[Any], indices: Sequence[int]
) -> tuple[tuple[dict[str, Tensor], int], dict[int, ComponentPrediction]]:
    """The sums of the reduced densities of those images that are `among` the negatives', peak memory, and what the
    components predict for all of them."""
    compute_with(1)
    scoring = _received(*shared)
    with torch.inference_mode():
        predictions = {index: scoring.component_prediction(index) for index in indices}
        sums = scoring.sums([index for index in indices if index in scoring.among], predictions)
    give_back_when_idle()
    return (sums, peak_rss()), predictions


def _score(shared: list[Any], predictions: Mapping[int, ComponentPrediction], index: int) -> tuple[Scores, int]:
    compute_with(1)
    scoring, means = map(_received, shared)
    with torch.inference_mode():
        scores = scoring.image(index, means, predictions)
    give_back_when_idle()
    return scores, peak_rss()


@functools.lru_cache(maxsize=2)
def _received(reference: Any) -> Any:
    import ray

    return ray.get(reference)
