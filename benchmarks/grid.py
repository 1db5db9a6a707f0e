"""The grid on which the loss is normalised: its cost and its error against the density at full resolution.

    python benchmarks/grid.py                   # trains 15 heads on the built-in displays first; a minute
    python benchmarks/grid.py --json grid.json

Each row sums over cells `stride` times as long as the density grid's 8 px; the error is that of the loss, averaged over
images as training does, for the worst of the trained heads. `loss.coarsest` takes the first within 1e-4 nat.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import harness
import torch

from acw.data import load_dataset, split
from acw.features.batch_size import Pace
from acw.features.extraction import write_shards
from acw.features.store import SHARD_IMAGES, FeatureStore
from acw.heads import finalizer, readout
from acw.recipes import derive, named_recipe
from acw.training.bank import plan_banks
from acw.training.batches import Batches
from acw.training.loss import COARSE_CELLS, REFERENCE_CELL, coarsest, log_likelihood
from acw.training.trainer import train_epochs
from acw.training.training_set import training_set

BACKBONE = "lite0"


def benchmark(arguments: argparse.Namespace) -> harness.Figures:
    from acw.features.backbone import load_backbone

    recipe = derive(named_recipe("demo"), {"backbones": BACKBONE, "max_epochs": arguments.epochs})
    dataset = load_dataset("synthetic", reader=None, fixations=None, drop_outside=False)
    training = training_set(dataset, split(dataset, recipe.seed, recipe.folds, recipe.holdout), recipe)
    (backbone,), (bank,) = recipe.backbone_values, plan_banks(recipe)
    cpu = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        model = load_backbone(backbone)
        shards = range(-(-len(dataset.stimuli) // SHARD_IMAGES))
        write_shards(model, backbone, dataset.stimuli, shards, Path(folder), Pace(cpu))
        sizes = [stimulus.size for stimulus in dataset.stimuli]
        with torch.inference_mode():
            taps = {size: [tuple(tap.shape[1:3]) for tap in _taps(model, size)] for size in set(sizes)}
        readouts = tuple(backbone.readout_size(size) for size in sizes)
        store = FeatureStore(
            Path(folder), len(sizes), tuple(model.channels), tuple(tuple(taps[size]) for size in sizes), readouts
        )
        *_, state = train_epochs(recipe, bank, training, store, Path(folder), cpu)
        batches = Batches(training, store, recipe.finalizer, cpu)
        images = batches.groups([i for i in range(len(sizes)) if training.fold[i] >= 0][: arguments.images])[0]
        batch = batches.load(images)
    folds = torch.tensor([head.fold for head in bank.members])

    def loss(stride: float, gradient: bool = False) -> torch.Tensor:
        parameters = {name: value.clone().requires_grad_(gradient) for name, value in state.parameters.items()}
        value = -log_likelihood(parameters, folds, batch, batches, stride)
        if gradient:
            value.sum().backward()
        return value.detach()

    with torch.no_grad():
        bias = batches.bias("finalizer_bias", batch.grid)[folds]
        priority = readout.readout(state.parameters, batch.features)
        coarse = finalizer.finalize(state.parameters, priority, bias, recipe.finalizer)
        exact = torch.stack([_at_pixels(coarse[:, k], training, index) for k, index in enumerate(images)], 1)
    cells = (REFERENCE_CELL, *COARSE_CELLS[::-1])
    cases = {str(cell): (lambda cell=cell: loss(cell / recipe.density_cell, gradient=True)) for cell in cells}
    seconds = harness.alternate(cases, arguments.rounds)
    figures: harness.Figures = {
        "heads": len(folds),
        "images": len(images),
        "validation IG": float(state.best_ig.mean()),
    }
    for cell in cells:
        error = float((loss(cell / recipe.density_cell) - exact).mean(1).abs().max())
        figures[f"{cell:g} px: ms an image"] = seconds[str(cell)] / len(images) * 1e3
        figures[f"{cell:g} px: error of the loss, nat"] = error
    strides, errors = coarsest(state.parameters, bank.members, batches, fresh=False)
    figures["chosen, px"] = ", ".join(f"{recipe.density_cell * s:g}" for s in sorted(set(strides.tolist())))
    figures["its measured error, worst head, nat"] = float(errors.max())
    return figures


def _taps(model, size: tuple[int, int]) -> list[torch.Tensor]:
    return model.features(torch.zeros(1, *size, 3, dtype=torch.uint8))


def _at_pixels(coarse: torch.Tensor, training, index: int) -> torch.Tensor:
    """(K,) the loss of one image, from its density at full resolution."""
    mine = training.image == index
    full = finalizer.upsample(coarse, training.sizes[index])
    return -full[:, training.y[mine].astype(int), training.x[mine].astype(int)].mean(1)


if __name__ == "__main__":
    harness.run(__doc__, benchmark, epochs=6, images=16, rounds=5)
