"""The final model: once the heads are scored, all of them are trained on, on every image, the held-out ones too.

What was chosen stays as it was chosen: the weights, their priors, the classifier of categories, the constants that
standardise features, and the KDE over which IG is measured. A model is only as good as its images are many, and the
held-out ones have done their work; how good it is, they can no longer say. Heads go on from where they were scored:
six epochs more bring what fourteen from the start would (docs/log.md). Each keeps its fold, whose images decide when it
stops; held-out images are dealt into the folds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from acw.cluster.costs import note
from acw.cluster.process import give_back_when_idle
from acw.cluster.tasks import end_idle_workers
from acw.features.joined import Store
from acw.heads.readout import concatenate
from acw.model.model import Model
from acw.pipeline.job import Job
from acw.training import checkpoints, distributed
from acw.training.bank import Bank, BankState, checkpoint_path, further, plan_banks, stored
from acw.training.training_set import finalizer_bias, kde_of, training_set

FOLDER = "refit"  # in the run's folder, with checkpoints as the run's own


def refit(job: Job, scored: Model, banks: Mapping[Bank, BankState], stores: dict[str, Store]) -> Model:
    """The scored model with heads, and a centre bias that they add, of all images; goes on where it was interrupted."""
    recipe, dataset, folder = further(job.recipe), job.dataset, job.folder / FOLDER
    everything = np.arange(len(dataset.stimuli))
    print(f"refit: the heads are trained on, on all {len(everything)} images", flush=True)
    give_back_when_idle()  # what drawing, scoring and fitting have left in this process
    end_idle_workers()  # and in those that did it
    training = training_set(dataset, job.split.with_held_out(), recipe)
    for bank, state in zip(plan_banks(recipe), banks.values(), strict=True):
        path = checkpoint_path(folder, bank)
        if not stored(path):
            state.further(bank).save(path)
    note(job.folder, "refit", distributed.train(recipe, training, stores, folder))
    of_folds = checkpoints.best_heads(recipe, checkpoints.trained_heads(recipe, folder))
    return dataclasses.replace(
        scored,
        heads={name: concatenate([heads[name] for heads in of_folds]) for name in recipe.backbones},
        finalizer_bias=finalizer_bias(recipe, dataset, everything, kde_of(dataset, everything)),
        provenance=scored.provenance | {"refitted_on": len(everything)},
    )
