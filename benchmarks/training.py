"""Training's step: a bank of heads against one head at a time, a population, and the original's way of doing it.

    python benchmarks/training.py                              # the paper's readout, 8x15 cells of a full-HD image
    python benchmarks/training.py --readout 34x60              # DeepGaze IIE's
    python benchmarks/training.py --json training.json --naive 0

Features are random numbers of the four backbones' shapes, as they come from the store (float16); a step is what
trainer.py does with a batch: features to float32, readout, loss, backward pass, Adam. `--naive 1` (a minute) adds
the plain way: a network's forward pass in every step, each head by itself, its density at the image's full resolution.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Callable

import harness
import torch
import torch.nn.functional as F
from torch import Tensor

from acw.cluster.process import compute_with
from acw.features.tensors import Features
from acw.features.zoo import BACKBONES
from acw.heads import readout
from acw.heads.finalizer import Finalizer
from acw.heads.readout import Parameters
from acw.recipes import named_recipe
from acw.training.bank import Bank, BankState, Head
from acw.training.loss import COARSE_CELLS, image_loss, per_cell_log_likelihood
from acw.training.trainer import BankAdam

IMAGE, CELL, BATCH, FIXATIONS = (1080, 1920), 8.0, 8, 300
GRID = (135, 240)
# Channels of each backbone's taps, and by how much the tap is coarser than the readout.
TAPS = {
    "shapenet_c": ((256, 1), (256, 1), (256, 1), (256, 1), (512, 2), (512, 2)),
    "efficientnet_b5": ((1056, 1), (1056, 1), (304, 2)),
    "densenet201": ((1888, 2), (128, 2), (32, 2)),
    "resnext50_32x4d": ((512, 1), (512, 1), (512, 1), (1024, 2)),
}
FOLDS, SEEDS = 5, 3


class Step:
    """Training steps of K heads on one backbone's features; `on` of them see the batch. The features are on the device.

    A call makes one step and returns the heads' losses (on,), nats, and their gradient (on, P).
    """

    def __init__(
        self,
        backbone: str,
        readout: tuple[int, int],
        count: int,
        on: int,
        stride: int,
        device: torch.device | str = "cpu",
    ) -> None:
        recipe = named_recipe("cat2000")
        bank = Bank(backbone, tuple(Head.of(recipe, 0, seed) for seed in range(count)))
        generator = torch.Generator().manual_seed(0)
        taps = [
            torch.rand(BATCH, math.ceil(readout[0] / by), math.ceil(readout[1] / by), channels, generator=generator)
            for channels, by in TAPS[backbone]
        ]
        self.stored = [tap.half().to(device) for tap in taps]
        self.readout, self.on, self.on_device = readout, torch.arange(on), torch.arange(on, device=device)
        self.mean, self.variance = (torch.full((BATCH,), value, device=device) for value in (0.5, 1 / 12))
        state = BankState.new(recipe, bank, sum(channels for channels, _ in TAPS[backbone]))
        self.adam = BankAdam(state, torch.arange(count), bank.members, torch.device(device))
        target = torch.rand(BATCH, *GRID, generator=generator)
        self.target = (target / target.sum((1, 2), keepdim=True)).to(device)
        # A uniform centre bias.
        log_density = -math.log(math.prod(GRID))
        self.bias = torch.full((on, BATCH), log_density, device=device)
        coarse = torch.full((on, *(math.ceil(length / stride) for length in GRID)), log_density, device=device)
        self.coarse = [(self.on_device, coarse)]

    def __call__(self) -> tuple[Tensor, Tensor]:
        flat = self.adam.flat.index_select(0, self.on_device).requires_grad_(True)
        parameters = readout.unflatten(flat, self.adam.like)
        features = Features([tap.float() for tap in self.stored], self.mean, self.variance, self.readout)
        priority = readout.readout(parameters, features)
        how = Finalizer(cell=CELL)
        log_p = per_cell_log_likelihood(parameters, priority, self.bias, self.coarse, self.target, how)
        loss = image_loss(log_p).mean(1)
        loss.sum().backward()
        self.adam.step(self.on, flat)
        assert flat.grad is not None
        return loss.detach(), flat.grad


def values_an_image(backbone: str, grid: tuple[int, int]) -> int:
    """How many numbers a backbone's stored features of an image are, at a readout's grid."""
    return sum(channels * math.prod(math.ceil(length / by) for length in grid) for channels, by in TAPS[backbone])


def operations_an_image(backbone: str, grid: tuple[int, int]) -> int:
    """Multiplications and additions an image of a full bank's first layers, which no way of computing avoids: forward
    and weight gradients, 12 of 15 heads on, taps at their own resolution."""
    return values_an_image(backbone, grid) * readout.WIDTHS[0] * SEEDS * (FOLDS - 1) * 2 * 2


def roofline(grid: tuple[int, int]) -> tuple[float, float]:
    """`operations_an_image` of all 60 heads, and this machine's matrix products a second."""
    operations = sum(operations_an_image(backbone, grid) for backbone in TAPS)
    x, w = torch.rand(2048, 2048), torch.rand(128, 2048)
    seconds = harness.alternate({"product": lambda: F.linear(x, w)}, 15)["product"]
    return operations, 2 * x.numel() * len(w) / seconds


def naive_head(parameters: Parameters, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """One head's loss on one image's concatenated features (1, C, h, w), as the original computes it: not smoothed."""

    def norm(x: Tensor, layer: int) -> Tensor:
        x = F.layer_norm(x, x.shape[1:], eps=readout.LAYER_NORM_EPS)
        affine = parameters[f"norm{layer}.weight"], parameters[f"norm{layer}.bias"]
        return x * affine[0][0, :, None, None] + affine[1][0, :, None, None]

    for layer in range(len(readout.WIDTHS)):
        last = layer == len(readout.WIDTHS) - 1
        x = x if last else norm(x, layer)
        bias = None if last else parameters[f"conv{layer}.bias"][0]
        x = F.conv2d(x, parameters[f"conv{layer}.weight"][0, :, :, None, None], bias)
        x = x if last else F.softplus(x)
    full = F.interpolate(x, IMAGE, mode="bilinear", align_corners=False)
    log_density = full - full.logsumexp((2, 3), keepdim=True)
    return -log_density[0, 0, rows, columns].mean()


def naive_seconds(readout: tuple[int, int]) -> tuple[float, float]:
    """Seconds an image of ResNeXt-50 and its 15 heads, one after the other, forward and backward; the network's part.

    The other backbones' steps cost about the same; all four have 60 heads.
    """
    import timm

    network = timm.create_model("resnext50_32x4d", pretrained=False).eval().requires_grad_(False)
    found: dict[str, Tensor] = {}
    for tap in BACKBONES["resnext50_32x4d"].taps:
        module = network.get_submodule(tap)
        module.register_forward_hook(lambda module, args, output, tap=tap: found.update({tap: output.clone()}))
    bank = [readout.new_heads(2560, 16.0, [seed]) for seed in range(FOLDS * SEEDS)]
    for parameters in bank:
        for value in parameters.values():
            value.requires_grad_(True)
    pixels = torch.rand(1, 3, readout[0] * 16, readout[1] * 16)
    rows, columns = (torch.randint(length, (FIXATIONS,)) for length in IMAGE)
    start = time.perf_counter()
    network(pixels)
    x = torch.cat([F.interpolate(found[tap], readout) for tap in BACKBONES["resnext50_32x4d"].taps], 1)
    after_network = time.perf_counter()
    for parameters in bank:
        naive_head(parameters, x, rows, columns).backward()
    return time.perf_counter() - start, after_network - start


def benchmark(arguments: argparse.Namespace) -> harness.Figures:
    compute_with(arguments.threads)  # as a worker does
    height, _, width = arguments.readout.partition("x")
    readout = int(height), int(width)
    on = SEEDS * (FOLDS - 1)
    make: Callable[..., Step] = functools.partial(Step, readout=readout, stride=arguments.stride)
    cases: dict[str, Step] = {name: make(name, count=FOLDS * SEEDS, on=on) for name in TAPS}
    one = "efficientnet_b5"
    cases |= {f"{k} heads": make(one, count=k, on=k) for k in (1, 5, 30, 60)}
    cases["population of 32"] = make(one, count=32, on=32)
    seconds = {name: value / BATCH for name, value in harness.alternate(dict(cases), arguments.rounds).items()}
    operations, rate = roofline(readout)
    sixty = sum(seconds[name] for name in TAPS)
    figures: harness.Figures = {
        "readout": arguments.readout,
        "normaliser's cells, px": CELL * arguments.stride,
        "60 heads, ms an image": sixty * 1e3,
        "60 heads, heads x images a second": 4 * on / sixty,
        "first layers' arithmetic, ms an image": operations / rate * 1e3,
        "share of the roofline": operations / rate / sixty,
        "matrix products, GFLOP/s": rate / 1e9,
        f"bank of 15 ({one}), ms an image": seconds[one] * 1e3,
        "1 head, ms an image": seconds["1 heads"] * 1e3,
        # A single head skips the images of its own fold, as the bank does for each of its heads.
        "15 single runs / bank of 15": on * seconds["1 heads"] / seconds[one],
        "32 single runs / population of 32": 32 * seconds["1 heads"] / seconds["population of 32"],
    }
    for k in (1, 5, 30, 60):
        figures[f"{k} heads, ms a head and image"] = seconds[f"{k} heads"] / k * 1e3
    if arguments.naive:
        whole, network = naive_seconds(readout)
        figures["naive step, 4 x 15 heads, s an image"] = 4 * whole
        figures["of it networks, s"] = 4 * network
        figures["naive / 60 heads"] = 4 * whole / sixty
    return figures


if __name__ == "__main__":
    harness.run(__doc__, benchmark, readout="8x15", stride=COARSE_CELLS[0] / CELL, rounds=5, naive=1)
