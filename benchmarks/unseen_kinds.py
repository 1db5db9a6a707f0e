"""Heads that have not seen some kind of images, and what they say of these: what `adaptation.py` adapts.

All heads of a view, each with images of its own to leave out, are trained side by side in one bank.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from acw.features import joined
from acw.features.joined import JoinedStore, Store
from acw.fusion.adaptation_fit import on_grid
from acw.heads import readout
from acw.heads.ensemble import ensemble
from acw.pipeline.job import Job
from acw.training.bank import Bank, BankState, Head
from acw.training.batches import Batches, TrainingSet
from acw.training.dropout import dropped
from acw.training.loss import coarsest, image_loss
from acw.training.loss import log_likelihood as heads_log_likelihood
from acw.training.trainer import EVALUATION_BATCH, BankAdam, epoch_batches
from acw.training.training_set import kde_of

EPOCHS = 8  # the last at a tenth of the rate
SCORED = 10  # images, at least
COMMAND_IMAGES = 20
DRAWS = 4  # of a kind of which there is one
CATEGORY_DRAWS = 3  # of a category, each with the heads of another pair, as the command takes half a minute apiece
CPU = torch.device("cpu")
LeftOut = dict[str, np.ndarray]  # what heads leave out -> (N,) bool


def left_out(job: Job) -> tuple[LeftOut, LeftOut]:
    """Kinds of images that some heads are not to see, and the folds of all images."""
    dataset, split = job.dataset, job.split
    development = split.fold >= 0
    category, names = dataset.category_index, dataset.categories
    kinds = {
        f"{names[a]}+{names[b]}": np.isin(category, (a, b)) & development
        for a, b in itertools.combinations(range(len(names)), 2)
    }
    source = np.array([stimulus.source for stimulus in dataset.stimuli])
    kinds |= {f"source {name}": (source == name) & development for name in sorted(set(source) - {None})}
    return kinds, {f"fold {f}": split.fold == f for f in range(job.recipe.folds)}


@dataclasses.dataclass(frozen=True)
class Draw:
    """Images of a kind that something learns from, and the others, on which it is scored.

    kind: what the heads that are adapted have left out, both among it.
    """

    label: str
    kind: str
    some: np.ndarray
    rest: np.ndarray

    @classmethod
    def of(cls, label: str, kind: str, images: np.ndarray, seed: int) -> Draw:
        drawn = np.random.default_rng(seed).permutation(images)
        return cls(label, kind, np.sort(drawn[:COMMAND_IMAGES]), np.sort(drawn[COMMAND_IMAGES:]))


def label_of(kind: str) -> str:
    return kind if kind.startswith("source ") else "unseen categories, two at a time"


def draws_of(job: Job, kinds: LeftOut) -> Iterator[Draw]:
    """Of each source, and of each category by some of the pairs that it is in."""
    tried = Counter[int]()
    for kind, out in kinds.items():
        images = np.flatnonzero(out)
        if kind.startswith("source "):
            yield from (Draw.of(label_of(kind), kind, images, seed) for seed in range(DRAWS))
            continue
        category = job.dataset.category_index[images]
        for c in np.unique(category).tolist():
            if tried[c] < CATEGORY_DRAWS and (category == c).sum() >= COMMAND_IMAGES + SCORED:
                yield Draw.of(label_of(kind), kind, images[category == c], tried[c])
                tried[c] += 1


def heads_without(job: Job, view: str, store: Store, excluded: LeftOut) -> tuple[readout.Parameters, TrainingSet]:
    """A head for each entry, trained on the development images that are not in it; K heads in that order."""
    dataset, development = job.dataset, job.split.fold >= 0
    # Images that the same heads see are one group, from which batches are dealt.
    _, group = np.unique(np.stack(list(excluded.values())), axis=1, return_inverse=True)
    group = np.unique(np.where(development, group.ravel() + 1, 0), return_inverse=True)[1] - 1
    recipe = dataclasses.replace(job.recipe, folds=int(group.max()) + 1)
    biases = [kde_of(dataset, np.flatnonzero(development & ~out)) for out in excluded.values()]
    sizes = [stimulus.size for stimulus in dataset.stimuli]
    training = TrainingSet(sizes, group, dataset.image, dataset.x, dataset.y, biases, biases)
    members = tuple(Head.of(recipe, number, 0) for number in range(len(excluded)))
    state = BankState.new(recipe, Bank(view, members), sum(store.channels))
    batches, every = Batches(training, store, recipe.finalizer, CPU), torch.arange(len(members))
    out_KN = torch.from_numpy(np.stack(list(excluded.values())))
    for epoch in range(EPOCHS):
        adam = BankAdam(state, every, members, CPU)
        if epoch == EPOCHS - 1:
            adam.rate *= 0.1
        strides, _ = coarsest(adam.parameters(), members, batches, fresh=not epoch)
        steps = epoch_batches(recipe, batches, epoch)
        parts = [batches.groups(images) for images in steps]
        reader = batches.ahead(part for of_step in parts for part in of_step)
        for step, (images, of_step) in enumerate(zip(steps, parts, strict=True)):
            on = torch.nonzero(~out_KN[:, images[0]])[:, 0]
            flat = adam.flat.index_select(0, on).requires_grad_(True)
            parameters, loss = readout.unflatten(flat, adam.like), torch.zeros(len(on))
            parameters = dropped(parameters, [members[head] for head in on.tolist()], recipe.seed, epoch, step)
            for _ in of_step:
                values = heads_log_likelihood(parameters, on, next(reader), batches, strides[on])
                loss = loss + image_loss(values).sum(1) / len(images)
            loss.sum().backward()
            adam.step(on, flat)
        adam.write_back(state)
        print(f"{view}: epoch {epoch + 1} of {EPOCHS}, {len(members)} heads", flush=True)
    return state.parameters, training


def stores_as_read_by(job: Job, other: Job) -> dict[str, Store]:
    """The features of another job's images, standardised as those are that this job's heads were trained on."""
    standards = joined.read_standards(job.folder / joined.FILE)
    return {
        name: JoinedStore(store.parts, standards[name]) if isinstance(store, JoinedStore) else store
        for name, store in other.stores().items()
    }


@torch.no_grad()
def said(job: Job, view: str, excluded: LeftOut, others: Sequence[Job]) -> dict[str, np.ndarray]:
    """`OUT/INDEX` -> the density of an image by the head that left it out, on the coarse grid; and, as `OUT/INDEX/at`,
    its log-density per px at the fixations. Of other data sets, by all heads together: `NAME/INDEX`. `heads/NAME`: the
    heads' parameters."""
    store = job.stores()[view]
    with torch.enable_grad():
        parameters, training = heads_without(job, view, store, excluded)
    dataset, finalizer = job.dataset, job.recipe.finalizer
    result = {f"heads/{name}": value.numpy() for name, value in parameters.items()}
    batches = Batches(training, store, finalizer, CPU)
    for number, (name, out) in enumerate(excluded.items()):
        for some in batches.passes(np.flatnonzero(out), EVALUATION_BATCH):
            bias = torch.from_numpy(training.finalizer_bias[number].of_size(finalizer.grid(training.sizes[some[0]])))
            densities = ensemble(readout.select(parameters, [number]), store.load(some), bias, finalizer)
            for index, log_density in zip(some.tolist(), densities, strict=True):
                x, y, _ = dataset.fixations_of(index)
                result[f"{name}/{index}"] = on_grid(log_density[None])[0]
                result[f"{name}/{index}/at"] = finalizer.at_pixels(log_density, x, y, dataset.stimuli[index].size)
    everywhere = kde_of(dataset, job.split.development)
    for other in others:
        features = stores_as_read_by(job, other)[view]
        for index, stimulus in enumerate(other.dataset.stimuli):
            of_size = torch.from_numpy(everywhere.of_size(finalizer.grid(stimulus.size)))
            log_density = ensemble(parameters, features.load([index]), of_size, finalizer)[0]
            x, y, _ = other.dataset.fixations_of(index)
            result[f"{other.dataset.name}/{index}"] = on_grid(log_density[None])[0]
            result[f"{other.dataset.name}/{index}/at"] = finalizer.at_pixels(log_density, x, y, stimulus.size)
    return result


def heads_of(view: dict[str, np.ndarray]) -> readout.Parameters:
    """What `said` has of them."""
    return {key.partition("/")[2]: torch.from_numpy(a) for key, a in view.items() if key.startswith("heads/")}


def kept(
    job: Job, view: str, excluded: LeftOut, others: Sequence[Job], folder: Path, name: str
) -> dict[str, np.ndarray]:
    path = folder / f"{job.recipe.name}.{view}.{name}-{EPOCHS}.npz"
    if not path.exists():
        arrays: dict[str, Any] = said(job, view, excluded, others)
        np.savez(path, **arrays)
    return dict(np.load(path))
