"""Predicting an image by DeepGaze IIE's four backbones and 120 heads, against the plain way to do it.

    python benchmarks/predict.py               # 800 x 600 px, one thread, 2 minutes
    python benchmarks/predict.py --threads 2 --rounds 9 --json predict.json

The plain way has the structure of the authors' code: whole networks with hooks, taps resized and concatenated, heads
one after another, each with its own layer norms, convolutions, smoothing and normalised map, mixtures by logsumexp.
Both sides have the same random weights and the same density grid of half the image's size, interpolated by a cubic
spline; both are held against the plain way in float64.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
from collections.abc import Sequence

import harness
import numpy as np
import timm
import torch
import torch.nn.functional as F
from harness import Figures
from scipy.interpolate import make_interp_spline
from timm.layers import Conv2dSame
from torch import Tensor, nn

from acw.features.backbone import Backbone, FrozenBackbone, load_backbone
from acw.features.store import compute
from acw.features.tensors import Features
from acw.features.view import View
from acw.features.zoo import BACKBONES
from acw.fusion.classifier import CategoryClassifier
from acw.heads import readout
from acw.heads.center_bias import fixed_gaussian
from acw.heads.ensemble import ensemble
from acw.heads.finalizer import Finalizer
from acw.heads.readout import Parameters
from acw.model.model import Model

NAMES = ("shapenet_c", "efficientnet_b5", "densenet201", "resnext50_32x4d")
HEADS = 30  # a backbone
SIZE = (600, 800)
CELL = 2.0
WEIGHTS = np.array([[0.1, 0.2, 0.3, 0.4]])
TOLERANCE = 1e-5


class LayerNorm(nn.Module):
    """Statistics over channels, rows and columns together; affine per channel."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight[:, None, None]), nn.Parameter(bias[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[1:], eps=readout.LAYER_NORM_EPS) * self.weight + self.bias


class Head(nn.Module):
    """Readout and finalizer of the head with the given parameters."""

    def __init__(self, one: Parameters) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for layer in range(len(readout.WIDTHS)):
            last = layer == len(readout.WIDTHS) - 1
            weight = one[f"conv{layer}.weight"]
            conv = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=not last)
            conv.weight.data = weight[:, :, None, None].clone()
            if last:
                layers.append(conv)
            else:
                conv.bias.data = one[f"conv{layer}.bias"].clone()
                layers += [LayerNorm(one[f"norm{layer}.weight"], one[f"norm{layer}.bias"]), conv, nn.Softplus()]
        self.readout = nn.Sequential(*layers)
        self.sigma = nn.Parameter(one["log_sigma"].exp() / CELL)
        self.center_bias_weight = nn.Parameter(one["center_bias_weight"])

    def finalize(self, priority: Tensor, bias: Tensor) -> Tensor:
        """(1, H, W): the log-density from a priority map (1, 1, h, w) and the centre bias (H, W)."""
        radius = math.ceil(3 * self.sigma.item())
        kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / self.sigma) ** 2)
        kernel = kernel / kernel.sum()
        smooth = F.interpolate(priority, bias.shape, mode="bilinear", align_corners=False)[0]
        for _ in range(2):
            rows = F.pad(smooth.mT, (radius, radius), "replicate")
            smooth = F.conv1d(rows.transpose(0, 1), kernel[None, None]).transpose(0, 1)
        score = smooth + self.center_bias_weight * bias
        return score - score.logsumexp((1, 2), keepdim=True)


class PlainBackbone:
    """The whole network, from which hooks take the taps."""

    def __init__(self, backbone: Backbone, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
        self.backbone = backbone
        self.network = timm.create_model(backbone.timm_name).eval().requires_grad_(False)
        # They end at the last tap; what follows is at random and costs the same.
        assert not self.network.load_state_dict(weights, strict=False).unexpected_keys
        self.network.to(dtype)
        self.found: dict[str, Tensor] = {}
        for tap in backbone.taps:
            self.network.get_submodule(tap).register_forward_hook(functools.partial(self.keep, tap))
        if backbone.static_padding is not None:
            for module in self.network.modules():
                if isinstance(module, Conv2dSame):
                    module.forward = functools.partial(statically_padded, module, backbone.static_padding)

    def keep(self, tap: str, module: nn.Module, inputs: object, output: Tensor) -> None:
        self.found[tap] = output.clone()

    def features(self, image: Tensor) -> Tensor:
        """(1, C, h, w) of an image (1, 3, H, W)."""
        mean, std = (image.new_tensor(values)[:, None, None] for values in (self.backbone.mean, self.backbone.std))
        self.network((F.interpolate(image, scale_factor=0.5) / 255 - mean) / std)
        return concatenated([self.found[tap] for tap in self.backbone.taps], self.backbone)


def concatenated(taps: list[Tensor], backbone: Backbone) -> Tensor:
    """(1, C, h, w) of taps (1, C_t, h_t, w_t)."""
    return torch.cat([F.interpolate(tap, backbone.readout_size(SIZE)) for tap in taps], 1)


def statically_padded(conv: nn.Conv2d, side: int, x: Tensor) -> Tensor:
    """The convolution with the padding that an image of side x side px would need."""
    (kernel, _), (stride, _) = conv.kernel_size, conv.stride
    total = max((math.ceil(side / stride) - 1) * stride + kernel - side, 0)
    padded = F.pad(x, (total // 2, total - total // 2) * 2)
    return F.conv2d(padded, conv.weight, conv.bias, conv.stride, groups=conv.groups)


class PlainModel:
    """Everything in one precision, which must be torch's default while it works."""

    def __init__(self, model: Model, pixels: np.ndarray, dtype: torch.dtype) -> None:
        self.image = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(dtype)
        self.backbones = [PlainBackbone(one, model._loaded[one.name].state(), dtype) for one in model.backbones]
        self.heads = [plain_heads(model.heads[name], dtype) for name in model.names]
        self.bias = torch.from_numpy(model.finalizer_bias.of_size(Finalizer(cell=CELL).grid(SIZE))).to(dtype)
        self.weights = torch.from_numpy(model.weights[0]).to(dtype)

    def features(self) -> list[Tensor]:
        return [backbone.features(self.image) for backbone in self.backbones]

    def priorities(self, features: list[Tensor]) -> list[list[Tensor]]:
        return [[head.readout(x) for head in bank] for x, bank in zip(features, self.heads, strict=True)]

    def densities(self, priorities: list[list[Tensor]]) -> list[Tensor]:
        return [self.density(maps, bank) for maps, bank in zip(priorities, self.heads, strict=True)]

    def density(self, priorities: list[Tensor], bank: list[Head]) -> Tensor:
        """(H, W): the mean density of one backbone's heads."""
        single = [head.finalize(one, self.bias) for one, head in zip(priorities, bank, strict=True)]
        return torch.cat(single).logsumexp(0) - math.log(len(bank))

    def mixture(self, densities: list[Tensor]) -> Tensor:
        full = [upsample(density) for density in densities]
        full = torch.stack([density - density.logsumexp((0, 1)) for density in full])
        return torch.logsumexp(full + self.weights.log()[:, None, None], 0)

    def predict(self) -> Tensor:
        return self.mixture(self.densities(self.priorities(self.features())))


def upsample(density: Tensor) -> Tensor:
    """(H, W) of the image, by the cubic spline through the centres of the grid's cells."""
    values = density.numpy()
    for axis, pixels in enumerate(SIZE):
        cells = (np.arange(values.shape[axis]) + 0.5) / values.shape[axis]
        values = make_interp_spline(cells, values, axis=axis)((np.arange(pixels) + 0.5) / pixels)
    return torch.from_numpy(values).to(density.dtype)


def plain_heads(bank: Parameters, dtype: torch.dtype) -> list[Head]:
    return [Head({name: value[k].to(dtype) for name, value in bank.items()}) for k in range(HEADS)]


def random_model(names: Sequence[str] = NAMES, heads: int = HEADS, device: torch.device | str = "cpu") -> Model:
    """Random networks, and heads all of whose parameters are moved: those that training starts from are nearly flat.

    heads: of each network. The same numbers on every device.
    """
    backbones = [dataclasses.replace(BACKBONES[name], weights="random") for name in names]
    networks = {backbone.name: load_backbone(backbone, device) for backbone in backbones}
    generator = torch.Generator().manual_seed(0)
    banks = {}
    for number, (name, network) in enumerate(networks.items()):
        bank = readout.new_heads(sum(network.channels), 16.0, range(heads * number, heads * (number + 1)))
        for value in bank.values():
            value += 0.3 * torch.randn(value.shape, generator=generator)
        banks[name] = {key: value.to(device) for key, value in bank.items()}
    pooled = sum(sum(network.channels) for network in networks.values())
    classifier = CategoryClassifier(np.zeros(pooled), np.ones(pooled), np.zeros((1, pooled)), np.zeros(1), 1.0)
    bias = fixed_gaussian()
    weights = WEIGHTS[:, : len(names)] / WEIGHTS[:, : len(names)].sum()
    return Model(
        [View((backbone,)) for backbone in backbones],
        banks,
        Finalizer(cell=CELL),
        ["all"],
        weights,
        weights[0],
        bias,
        bias,
        classifier,
        {},
        device=torch.device(device),
        _loaded=networks,
    )


class KnownTaps(FrozenBackbone):
    """A backbone that costs nothing: its taps of the benchmark's image were computed before."""

    def __init__(self, taps: list[Tensor]) -> None:
        self.taps = taps

    def features(self, images: Tensor) -> list[Tensor]:
        return self.taps


@torch.no_grad()
def benchmark(arguments: argparse.Namespace) -> Figures:
    coarse = torch.rand(1, 3, 9, 12, generator=torch.Generator().manual_seed(0))
    pixels = (F.interpolate(coarse, SIZE, mode="bicubic")[0].clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    pixels = np.ascontiguousarray(pixels)
    model = random_model()
    plain = PlainModel(model, pixels, torch.float32)
    figures = differences(model, plain, pixels)

    images, networks = torch.from_numpy(pixels)[None], model._loaded
    known = {name: KnownTaps(network.features(images)) for name, network in networks.items()}
    without = dataclasses.replace(model, _loaded=known)
    features = [compute(known[backbone.name], backbone, pixels[None])[0] for backbone in model.backbones]
    banks = list(model.heads.values())
    plain_features = plain.features()
    plain_priorities = plain.priorities(plain_features)
    plain_densities = plain.densities(plain_priorities)
    mixed, pooled = model.component_log_densities(pixels)
    seconds = harness.alternate(
        {
            "plain backbones": plain.features,
            "plain readouts": lambda: plain.priorities(plain_features),
            "plain finalizers, mixtures": lambda: plain.densities(plain_priorities),
            "plain upsampling, mixing": lambda: plain.mixture(plain_densities),
            "plain, whole": plain.predict,
            "backbones": lambda: [network.features(images) for network in networks.values()],
            "readouts": lambda: [readout.readout(*both) for both in zip(banks, features, strict=True)],
            "readouts, finalizers, mixtures": lambda: [
                ensemble(bank, one, plain.bias, Finalizer(cell=CELL)) for bank, one in zip(banks, features, strict=True)
            ],
            "upsampling, mixing": lambda: model._mixed(mixed, pooled, pixels, "all"),
            "all but backbones": lambda: without.predict(pixels, "all"),
            "whole": lambda: model.predict(pixels, "all"),
        },
        arguments.rounds,
    )
    figures |= {f"{name}, s": value for name, value in seconds.items()}
    figures["plain / whole"] = seconds["plain, whole"] / seconds["whole"]
    figures["plain / whole, without backbones"] = (seconds["plain, whole"] - seconds["plain backbones"]) / seconds[
        "all but backbones"
    ]
    return figures


def differences(model: Model, plain: PlainModel, pixels: np.ndarray) -> Figures:
    """Largest differences in log-density.

    On the same float32 taps both ways are the same function: compared in float64. From the pixels on, both round to
    float32, which such rough heads magnify (their priority maps span up to 80 nats): each is held against float64.
    """
    torch.set_default_dtype(torch.float64)
    exact = PlainModel(model, pixels, torch.float64)
    formula = 0.0
    for number, backbone in enumerate(model.backbones):
        taps = [tap.double() for tap in compute(model._loaded[backbone.name], backbone, pixels[None])[0].taps]
        x = concatenated([tap.permute(0, 3, 1, 2) for tap in taps], backbone)
        features = Features(taps, x.mean().view(1), x.var(unbiased=False).view(1), backbone.readout_size(SIZE))
        bank = {name: value.double() for name, value in model.heads[backbone.name].items()}
        expected = exact.density([head.readout(x) for head in exact.heads[number]], exact.heads[number])
        formula = max(formula, largest(ensemble(bank, features, exact.bias, Finalizer(cell=CELL))[0], expected))
    expected = exact.predict()
    torch.set_default_dtype(torch.float32)
    result = {
        "difference on the same taps, float64": formula,
        "difference, float32": largest(torch.from_numpy(model.predict(pixels, "all").log_density), plain.predict()),
        "distance from float64": largest(torch.from_numpy(model.predict(pixels, "all").log_density), expected),
        "plain distance from float64": largest(plain.predict(), expected),
    }
    assert formula < TOLERANCE, result
    assert result["distance from float64"] < max(TOLERANCE, 2 * result["plain distance from float64"]), result
    return result


def largest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


if __name__ == "__main__":
    harness.run(__doc__, benchmark, rounds=3)
