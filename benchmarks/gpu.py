"""All that costs time, on one GPU: equal to the CPU, how fast, and how near to what the card can do.

    python benchmarks/gpu.py --json results.json    # under 6 minutes; then: acw plan cat2000 --hardware results.json
    python benchmarks/gpu.py --tiny 1               # the same code at tiny sizes, on a CPU too: a quarter of a minute

It needs torch, timm, numpy, scipy and safetensors, and no data: networks have random weights, images and fixations are
random. First what the device can do: matrix products and copies a second. Then, with figures: training steps of 60
heads, extraction by the networks of both papers and by modern ones, prediction with 120 heads, the eight scores. In
each of these the device must compute what the CPU computes, within 1e-4 in float32, and twice the same to the last bit.
What fails is named at the end, with exit status 1, once all figures are printed and written; what would begin after
LIMIT_SECONDS is left out, and named.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import harness
import numpy as np
import predict
import timm
import torch
import torch.nn.functional as F
import training
from device import FULL, TINY, Bench
from harness import Figures
from torch import Tensor

from acw.cluster.process import compute_with
from acw.data import Stimulus
from acw.evaluation.metrics import Components, ShuffledFixations, Target, score_mixtures
from acw.evaluation.sauc import MeanPrediction, reduced, shuffled_aucs
from acw.features.backbone import Backbone, FrozenBackbone, load_backbone
from acw.features.batch_size import Pace
from acw.features.extraction import _computed
from acw.features.network import pad_same, tap_outputs
from acw.features.store import compute
from acw.features.zoo import BACKBONES
from acw.heads import finalizer
from acw.heads.center_bias import fixed_gaussian

# ACW's and DeepGaze IIE's of a full-HD image, each with the length of the loss's cells, in cells of the density grid.
READOUTS = {"8x15": 4, "34x60": 2}
STEPS = 3  # of a training that is compared
LIMIT_SECONDS = 310.0
# Of an image that is scored: the weights of CAT2000's 20 categories and some more, its fixations, the images beside it.
MIXTURES, COMPONENTS, FIXATIONS, SCORED_IMAGES = 25, 4, 325, 400


def rates(bench: Bench) -> Figures:
    """What the device does at best: matrix products, copies on it, copies to it."""
    side, device = bench.sizes.matrix, bench.device
    figures: Figures = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a, b = (torch.rand(side, side, device=device, dtype=dtype) for _ in range(2))
        figures[f"matrix products, {name}, TFLOP/s"] = (
            2 * side**3 / bench.seconds(functools.partial(torch.mm, a, b)) / 1e12
        )
    source = torch.zeros(bench.sizes.copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    # A copy reads and writes.
    figures["copies on the device, GB/s"] = 2 * len(source) / bench.seconds(lambda: target.copy_(source)) / 1e9
    for name, host in (("the host", torch.zeros(len(source) // 4, dtype=torch.uint8)), ("page-locked memory", None)):
        if host is None:
            host = torch.zeros(len(source) // 4, dtype=torch.uint8, pin_memory=device.type == "cuda")
        copy = functools.partial(target[: len(host)].copy_, host, non_blocking=True)
        figures[f"copies from {name}, GB/s"] = len(host) / bench.seconds(copy) / 1e9
    return figures


def training_equal(bench: Bench, backbone: str) -> Figures:
    """Training steps of a full bank at 8x15. Parameters after steps of Adam are no measure: where a gradient is nearly
    zero, its sign alone decides."""

    def trained(device: torch.device) -> tuple[list[Tensor], Tensor]:
        step = step_of(backbone, "8x15", device)
        seen = [value for _ in range(STEPS) for value in step()]
        return seen, step.adam.flat

    (seen, flat), (again, flat_again), (on_cpu, _) = map(trained, (bench.device, bench.device, torch.device("cpu")))
    what = f"training, 15 heads, {backbone}"
    differences = [(ours.cpu() - theirs).abs().max() for ours, theirs in zip(seen, on_cpu, strict=True)]
    losses, gradients = differences[::2], [d / g.abs().max() for d, g in zip(differences, on_cpu, strict=True)][1::2]
    return (
        bench.equal(f"{what}, loss", float(max(losses)))
        | bench.equal(f"{what}, gradient", float(max(gradients)))
        | bench.same(what, [*seen, flat], [*again, flat_again])
    )


def step_of(backbone: str, readout: str, device: torch.device) -> training.Step:
    rows, _, columns = readout.partition("x")
    heads, on = training.FOLDS * training.SEEDS, training.SEEDS * (training.FOLDS - 1)
    return training.Step(backbone, (int(rows), int(columns)), heads, on, READOUTS[readout], device)


def sixty_heads(bench: Bench, readout: str, found: Figures) -> Figures:
    """Steps of all banks at a readout, against the rate that binds them. found: of `rates`.

    No way of computing does without the first layers' products, without reading the stored features forward and
    backward, and without Adam's reading and writing of parameters and both moments once a step.
    """
    rows, _, columns = readout.partition("x")
    grid, figures, bounds = (int(rows), int(columns)), {}, {"matrix products": 0.0, "copies": 0.0}
    for backbone in bench.sizes.paper:
        step = step_of(backbone, readout, bench.device)

        def several(step: training.Step = step) -> None:
            for _ in range(bench.sizes.steps):
                step()

        images = bench.sizes.steps * training.BATCH
        figures[f"bank of 15 heads, {backbone}, {readout}, ms an image"] = bench.seconds(several) / images * 1e3
        operations = training.operations_an_image(backbone, grid)
        moved = 2 * 2 * training.values_an_image(backbone, grid) + 6 * 4 * step.adam.flat.numel() / training.BATCH
        bounds["matrix products"] += operations / found["matrix products, float32, TFLOP/s"] / 1e12
        bounds["copies"] += moved / found["copies on the device, GB/s"] / 1e9
    banks = len(figures)
    seconds = sum(figures.values()) / 1e3
    binds = max(bounds, key=lambda name: bounds[name])
    heads = training.FOLDS * training.SEEDS * banks
    return figures | {
        f"{heads} heads, {readout}, ms an image": seconds * 1e3,
        f"{heads} heads, {readout}, heads x images a second": heads * (training.FOLDS - 1) / training.FOLDS / seconds,
        f"{heads} heads, {readout}, what binds": binds,
        f"{heads} heads, {readout}, share of what binds": bounds[binds] / seconds,
    }


@functools.cache
def pictures(size: tuple[int, int], count: int) -> list[np.ndarray]:
    """Smooth random images, uint8 (H, W, 3)."""
    coarse = torch.rand(count, 3, 9, 16, generator=torch.Generator().manual_seed(0))
    each = (F.interpolate(coarse[k : k + 1], size, mode="bicubic")[0] for k in range(count))
    return [np.ascontiguousarray((one.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()) for one in each]


def backbone_of(bench: Bench, name: str) -> Backbone:
    backbone = dataclasses.replace(BACKBONES[name], weights="random")
    # Of a fixed input, tiny images would make none.
    return backbone.of_long_side(96) if bench.sizes is TINY and backbone.long_side else backbone


def extraction(bench: Bench, name: str, compared: bool) -> Figures:
    """Images a second of a network: `acw`'s way from images to what is stored, in memory, and the network alone.

    compared: whether the CPU computes an image, too.
    """
    backbone = backbone_of(bench, name)
    network = load_backbone(backbone, bench.device)
    figures = extraction_equal(bench, network, backbone) if compared else {}
    images = pictures(bench.sizes.image, bench.sizes.images[0])
    stimuli = [Stimulus(str(k), "", bench.sizes.image, "all", None, "") for k in range(len(images))]
    pace = Pace(bench.device)
    stored: list[dict[str, Tensor]] = []

    def extracted() -> None:
        stored.clear()
        stored.extend(_computed(network, backbone, stimuli, [range(len(images))], iter(images), pace))

    for _ in range(math.ceil(pace.TRIES * sum(pace.sizes) * len(pace.layouts) / len(images))):  # until all are tried
        extracted()
    seconds = bench.seconds(extracted) / len(images)
    batch = pace.choose(len(images)).images
    alone = bare_seconds(bench, network, batch)
    taps = [value for key, value in stored[0].items() if ".tap" in key]
    return figures | {
        f"extraction, {name}, images/s": 1 / seconds,
        f"extraction, {name}, the bare network, images/s": 1 / alone,
        f"extraction, {name}, share of the bare network": alone / seconds,
        f"extraction, {name}, images at once": batch,
        f"extraction, {name}, MB an image": sum(value.nbytes for value in taps) / 1e6,
        f"extraction, {name}, channels": sum(network.channels),
    }


def extraction_equal(bench: Bench, network: FrozenBackbone, backbone: Backbone) -> Figures:
    """Features of an image by device and CPU in float32; of those that compute in bfloat16, what that changes."""
    pixels = np.stack(pictures(tuple(side // 2 // 32 * 32 or 32 for side in bench.sizes.image), 1))
    exact = dataclasses.replace(backbone, half=False)
    on_cpu = _taps(load_backbone(exact), exact, pixels)
    now, again = _taps(network, backbone, pixels), _taps(network, backbone, pixels)
    in_float32 = _taps(load_backbone(exact, bench.device), exact, pixels) if network.half else now
    what = f"extraction, {backbone.name}"
    figures = bench.equal(what, _largest(in_float32, on_cpu)) | bench.same(what, now, again)
    if backbone.half:
        figures[f"{what}: bfloat16 against float32"] = _largest(now, in_float32) if network.half else None
    return figures


def _taps(network: FrozenBackbone, backbone: Backbone, pixels: np.ndarray) -> list[Tensor]:
    return compute(network, backbone, pixels)[0].taps


def _largest(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest difference, in units of a layer's largest value."""
    pairs = [(a.cpu(), b.cpu()) for a, b in zip(ours, theirs, strict=True)]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def bare_seconds(bench: Bench, network: FrozenBackbone, batch: int) -> float:
    """Seconds an image of timm's own network as far as its last tap, on inputs that are there already, in the same
    precision and as many at once."""
    backbone, device = network.backbone, bench.device
    how = {"dynamic_img_size": True} if "_patch" in backbone.timm_name else {}
    with torch.device(device):
        bare = timm.create_model(backbone.timm_name, pretrained=False, **how).eval().requires_grad_(False)
    pad_same(bare, backbone.static_padding)
    bare = bare.to(memory_format=torch.channels_last)
    inputs = torch.rand(batch, 3, *backbone.input_size(bench.sizes.image), device=device)
    inputs = inputs.contiguous(memory_format=torch.channels_last)
    count = math.ceil(bench.sizes.images[0] / batch)

    def passes() -> None:
        half = torch.autocast(device.type, torch.bfloat16, enabled=network.half)
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False), half:
            for _ in range(count):
                tap_outputs(bare, backbone.taps, inputs)

    return bench.seconds(passes) / count / batch


def prediction(bench: Bench) -> Figures:
    """Images a second by all networks of both papers and all their heads, from pixels to log-densities on the host."""
    model = predict.random_model(bench.sizes.paper, bench.sizes.heads, bench.device)
    heads = bench.sizes.heads * len(bench.sizes.paper)
    (pixels,) = pictures(bench.sizes.predicted[0], 1)
    now, again = (torch.from_numpy(model.predict(pixels, "all").log_density) for _ in range(2))
    on_cpu = predict.random_model(bench.sizes.paper, bench.sizes.heads).predict(pixels, "all").log_density
    what = f"prediction, {heads} heads"
    figures = bench.equal(what, predict.largest(now, torch.from_numpy(on_cpu))) | bench.same(what, [now], [again])
    for height, width in bench.sizes.predicted:
        images = pictures((height, width), bench.sizes.images[1])
        several = bench.seconds(lambda images=images: list(model.predict_batch(images))) / len(images)
        single = bench.seconds(lambda images=images: model.predict(images[0], "all"))
        figures |= {f"{what}, {width}x{height}, images/s": 1 / several, f"{what}, {width}x{height}, one, s": single}
    return figures


class Scores:
    """An image's scores, of many mixtures of a few densities, as each held-out image of CAT2000 has them."""

    def __init__(self, size: tuple[int, int], device: torch.device) -> None:
        draw = torch.Generator().manual_seed(0)
        coarse = 1.2 * torch.randn(COMPONENTS, 1, 9, 16, generator=draw)
        bias = torch.from_numpy(fixed_gaussian().of_size(size))
        logs = F.interpolate(coarse, size, mode="bicubic")[:, 0] + bias
        self.log_densities = finalizer.normalise(logs).to(device)
        self.blur_sigma = size[1] / 48
        weights = torch.rand(MIXTURES, COMPONENTS, generator=draw, dtype=torch.float64)
        self.weights = weights / weights.sum(1, keepdim=True)
        random = np.random.default_rng(0)
        image = np.repeat(np.arange(SCORED_IMAGES), FIXATIONS)
        self.y, self.x = (random.normal(0.5, 0.18, (len(image), 2)).clip(0, 0.999) * size).T
        among = np.full(SCORED_IMAGES, True)
        self.negatives = ShuffledFixations.of(size, np.array([size] * SCORED_IMAGES), among, image, self.x, self.y)
        self.baseline = Components.of(bias[None].to(device), self.blur_sigma)

    def but_sauc(self) -> tuple[list[dict[str, float]], Components, Target]:
        x, y = self.x[:FIXATIONS], self.y[:FIXATIONS]
        target = Target.of(x, y, self.negatives.without(x, y), self.baseline)
        components = Components.of(self.log_densities, self.blur_sigma)
        return score_mixtures(components, self.weights, target), components, target

    def all(self) -> list[dict[str, float]]:
        """With sAUC, which the product computes on CPUs alone."""
        scores, components, target = self.but_sauc()
        small = reduced(self.log_densities, self.weights)
        for scored, row, own in zip(scores, self.weights, small, strict=True):
            log_mean = MeanPrediction(own * 2, 2).others(own)
            (scored["sAUC"],) = shuffled_aucs(components, row[None], target, log_mean)
        return scores


@torch.inference_mode()
def scores(bench: Bench) -> Figures:
    """Seconds of an image's scores: all on one core, as the product has it, and those but sAUC on the device."""
    height, width = size = bench.sizes.image
    on_cpu, on_device = Scores(size, torch.device("cpu")), Scores(size, bench.device)
    now, again, expected = on_device.but_sauc()[0], on_device.but_sauc()[0], on_cpu.but_sauc()[0]
    ours, twice, theirs = (torch.tensor([list(row.values()) for row in rows]) for rows in (now, again, expected))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one_core = bench.seconds(on_cpu.all)
    torch.set_num_threads(threads)
    return (
        bench.equal("scores", predict.largest(ours, theirs))
        | bench.same("scores", [ours], [twice])
        | {
            "scores, image, px": f"{width}x{height}",
            f"scores, all eight of {MIXTURES} mixtures, one core, s an image": one_core,
            f"scores, seven of {MIXTURES} mixtures, the device, s an image": bench.seconds(on_device.but_sauc),
        }
    )


Section = tuple[str, Callable[[], Figures]]


def sections(bench: Bench, found: Figures) -> Iterator[Section]:
    """What is measured, in turn: what the plan needs comes first. found: of `rates`."""
    for backbone in bench.sizes.paper:
        yield f"training, {backbone}", functools.partial(training_equal, bench, backbone)
    for readout in READOUTS:
        yield f"heads at {readout}", functools.partial(sixty_heads, bench, readout, found)
    for name in bench.sizes.paper:
        yield f"extraction, {name}", functools.partial(extraction, bench, name, compared=True)
    yield "prediction", functools.partial(prediction, bench)
    yield "scores", functools.partial(scores, bench)
    known: set[str] = set()
    for name in bench.sizes.modern:
        compared = BACKBONES[name].timm_name not in known  # a network at a second size is the same network
        yield f"extraction, {name}", functools.partial(extraction, bench, name, compared)
        known.add(BACKBONES[name].timm_name)


def benchmark(arguments: argparse.Namespace, failures: list[str]) -> Figures:
    compute_with(arguments.threads)  # as a worker does
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not arguments.tiny:
        sys.exit("no GPU that torch can use; --tiny 1 runs the same code at tiny sizes on the CPU")
    start = time.perf_counter()
    bench = Bench(device, TINY if arguments.tiny else FULL, failures)
    height, width = bench.sizes.image
    figures: Figures = {"device": device.type, "tiny": bool(arguments.tiny), "image, px": f"{width}x{height}"}
    found = bench.section("rates", functools.partial(rates, bench))
    figures |= found
    left_out = []
    for name, section in sections(bench, found):
        if time.perf_counter() - start < LIMIT_SECONDS:
            figures |= bench.section(name, section)
        else:
            left_out.append(name)
    return figures | {"left out": left_out, "failures": failures, "seconds in all": time.perf_counter() - start}


def main() -> None:
    failures: list[str] = []
    harness.run(__doc__ or "", functools.partial(benchmark, failures=failures), tiny=0)
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
