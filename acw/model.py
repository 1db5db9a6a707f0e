"""A finished model: frozen backbones, trained heads, category weights. One line loads it, one line predicts.

model = acw.load("runs/gaze-.../")                        # or an MLflow URI: models:/acw@champion
prediction = model.predict(image, category="Street")      # uint8 (H, W, 3); the category may be left out
prediction.log_density                                     # (H, W) float32, natural log, logsumexp 0
for prediction in model.predict_batch(images): ...         # many images, in order, in bounded memory
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from torch import Tensor

from acw import heads as bank_of_heads
from acw.backbones import Backbone, FrozenBackbone, load_backbone
from acw.batches import density_grid
from acw.categories import CategoryClassifier
from acw.center_bias import CenterBias
from acw.features import compute
from acw.heads import Features, Parameters
from acw.storage import UserError, write_atomic, write_json

FORMAT = 1
LOG2_E = math.log2(math.e)
# What is worked on at a time; bounds memory, does not change a number beyond rounding. Cells of heads' scores: as many
# as a CPU's cache holds, and enough to keep a GPU busy. Pixels of the images that pass the backbones together.
CELLS_AT_ONCE = {"cpu": 2**19, "cuda": 2**26}
PIXELS_AT_ONCE = {"cpu": 2**21, "cuda": 2**23}
# A backbone's input of one pixel counts as so many of the image: as in DeepGaze IIE, which halves width and height.
PIXELS_PER_INPUT_PIXEL = 4
# Times PIXELS_AT_ONCE for which a backbone is loaded, where one is in memory at a time.
PASSES_PER_LOAD = 4
# A mixture's density below which float32's underflow, at 1e-38 a term, may cost more than rounding.
UNDERFLOW = 1e-28


@dataclass(frozen=True)
class Prediction:
    """log_density: (H, W) float32, natural logs, logsumexp 0. categories: name -> p(category | image).

    weights: backbone -> share in the mixture.
    """

    log_density: np.ndarray
    categories: dict[str, float]
    weights: dict[str, float]


@dataclass
class Model:
    """All that prediction needs, and where it comes from.

    heads: per backbone the stacked parameters of its K heads. weights: (G, B) float64, rows of `categories`, columns of
    `backbones`. center_bias: the stored KDE, baseline of IG; finalizer_bias: what the heads add, it or the paper's.
    provenance: recipe, seeds, versions, commit, data set, split.

    one_backbone_at_a_time: set it to keep only the backbone in use in memory: of DeepGaze IIE's four, 90 MB instead of
    320 MB. The price is that each is loaded anew (a third of a second) for every window of a batch: predict many images
    by one `predict_batch`, not one by one.
    """

    backbones: list[Backbone]
    heads: dict[str, Parameters]
    density_cell: float
    categories: list[str]
    weights: np.ndarray
    global_weights: np.ndarray
    center_bias: CenterBias
    finalizer_bias: CenterBias
    classifier: CategoryClassifier
    provenance: dict[str, Any]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    one_backbone_at_a_time: bool = False
    _loaded: dict[str, FrozenBackbone] = field(default_factory=dict, repr=False)

    def predict(self, image: np.ndarray, category: str | None = None) -> Prediction:
        """The density of one image, uint8 (H, W, 3) RGB of any size.

        Without a category, the weights are `sum_c p(c | image) w[c]`. Raises UserError for a category that the model
        does not know, ValueError for an array that is no such image.
        """
        return next(self.predict_batch([image], [category]))

    def predict_batch(
        self, images: Iterable[np.ndarray], categories: Iterable[str | None] | None = None
    ) -> Iterator[Prediction]:
        """The densities of many images, each uint8 (H, W, 3) RGB of any size, in order; categories: one an image.

        They are worked on in windows of a few megapixels, so memory does not grow with the number of images, which may
        come from a generator; images of one size in a window pass the backbones together. Raises as `predict` does,
        before the window with the wrong image.
        """
        if categories is None:
            pairs: Iterable[tuple[np.ndarray, str | None]] = ((image, None) for image in images)
        else:
            pairs = zip(images, categories, strict=True)
        for window in self._windows(pairs):
            densities = self._densities([image for image, _ in window])
            for (image, category), (log_densities, pooled) in zip(window, densities, strict=True):
                yield self._mixed(log_densities, pooled, (image.shape[0], image.shape[1]), category)

    def _windows(self, pairs: Iterable[tuple[np.ndarray, str | None]]) -> Iterator[list[tuple[np.ndarray, str | None]]]:
        """The images with their categories, checked, as many at a time as memory is meant for."""
        window: list[tuple[np.ndarray, str | None]] = []
        pixels = 0
        for image, category in pairs:
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
                raise ValueError(f"an image is uint8 (H, W, 3) RGB, not {image.dtype} {image.shape}")
            if category is not None:
                self._row(category)
            own = self._pixels((image.shape[0], image.shape[1]))
            passes = PASSES_PER_LOAD if self.one_backbone_at_a_time else 1
            if window and pixels + own > passes * PIXELS_AT_ONCE[self.device.type]:
                yield window
                window, pixels = [], 0
            window.append((image, category))
            pixels += own
        if window:
            yield window

    def _pixels(self, size: tuple[int, int]) -> int:
        """What an image of (H, W) px needs memory for, in px: itself, or the largest of the backbones' inputs."""
        inputs = [math.prod(backbone.input_size(size)) for backbone in self.backbones]
        return max(math.prod(size), PIXELS_PER_INPUT_PIXEL * max(inputs))

    def _densities(self, images: Sequence[np.ndarray]) -> list[tuple[Tensor, np.ndarray]]:
        """Of each image (B, H, W) the backbones' densities on its grid, and (D,) pooled features."""
        by_size = defaultdict(list)
        for index, image in enumerate(images):
            by_size[image.shape[0], image.shape[1]].append(index)
        biases = {size: self._bias(density_grid(size, self.density_cell)) for size in by_size}
        passes = []
        for size, members in by_size.items():
            at_once = max(1, PIXELS_AT_ONCE[self.device.type] // self._pixels(size))
            passes += [(size, members[start : start + at_once]) for start in range(0, len(members), at_once)]
        densities: list[list[Tensor]] = [[] for _ in images]
        pooled: list[list[np.ndarray]] = [[] for _ in images]
        for backbone in self.backbones:
            for size, members in passes:
                pixels = np.stack([images[index] for index in members])
                features, means = compute(self._network(backbone), backbone, pixels)
                mixed = ensemble(self.heads[backbone.name], features, biases[size], self.density_cell)
                for index, density, mean in zip(members, mixed, means.double().cpu().numpy(), strict=True):
                    densities[index].append(density)
                    pooled[index].append(mean)
        return [(torch.stack(d), np.concatenate(p)) for d, p in zip(densities, pooled, strict=True)]

    @torch.no_grad()
    def _mixed(
        self, log_densities_BHW: Tensor, pooled: np.ndarray, size: tuple[int, int], category: str | None
    ) -> Prediction:
        """The prediction for an image of a size; at that size, one backbone's map is in memory at a time."""
        probabilities = self.classifier.probabilities(pooled[None])[0]
        weights = self.mixing_weights(category, probabilities)
        weight_B = torch.from_numpy(weights).float().to(log_densities_BHW.device)

        def upsampled() -> Iterator[tuple[Tensor, Tensor]]:
            for log_density, weight in zip(log_densities_BHW.split(1), weight_B.split(1), strict=True):
                yield bank_of_heads.upsample(log_density, size)[None], weight

        mixed = mixture(upsampled)
        return Prediction(
            mixed[0].cpu().numpy(),
            dict(zip(self.categories, probabilities.tolist(), strict=True)),
            dict(zip(self.names, weights.tolist(), strict=True)),
        )

    @property
    def names(self) -> list[str]:
        return [backbone.name for backbone in self.backbones]

    def mixing_weights(self, category: str | None, probabilities: np.ndarray) -> np.ndarray:
        """(B,) weights for a category, or for p(category | image) (G,) where it is not known."""
        if category is None:
            return probabilities @ self.weights
        return self.weights[self._row(category)]

    def _row(self, category: str) -> int:
        if category not in self.categories:
            raise UserError(f"unknown category '{category}'; the model knows {', '.join(self.categories)}, or none")
        return self.categories.index(category)

    def backbone_log_densities(self, image: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """(B, H, W) each backbone's density on the grid, and (D,) pooled features, of one uint8 image (H, W, 3)."""
        return self._densities([image])[0]

    def ensemble(self, backbone: str, features: Features, grid: tuple[int, int]) -> Tensor:
        """(B, H, W): the mean density of all heads on a backbone, on the grid."""
        return ensemble(self.heads[backbone], features, self._bias(grid), self.density_cell)

    def _bias(self, grid: tuple[int, int]) -> Tensor:
        return torch.from_numpy(self.finalizer_bias.of_size(grid)).to(self.device)

    def load_backbones(self) -> None:
        """Loads all networks now, so that a copy of the model on another machine needs no file."""
        for backbone in self.backbones:
            self._network(backbone)

    def _network(self, backbone: Backbone) -> FrozenBackbone:
        if backbone.name not in self._loaded:
            if self.one_backbone_at_a_time:
                self._loaded.clear()
            self._loaded[backbone.name] = load_backbone(backbone, self.device)
        return self._loaded[backbone.name]

    def save(self, folder: Path, networks: Sequence[FrozenBackbone]) -> None:
        """Writes the model with its backbones' weights, so that it needs no other file; model.json comes last."""
        backbones = []
        for backbone, network in zip(self.backbones, networks, strict=True):
            file = f"backbone-{network.weights_sha256[:16]}.safetensors"
            state = network.state()
            write_atomic(folder / file, functools.partial(save_file, state))
            backbones.append(dataclasses.asdict(backbone) | {"weights": file, "source": backbone.weights})
        heads = {f"{name}/{key}": value for name, bank in self.heads.items() for key, value in bank.items()}
        write_atomic(folder / "heads.safetensors", lambda temporary: save_file(heads, temporary))
        arrays = {
            "weights": self.weights,
            "global_weights": self.global_weights,
            "center_bias": self.center_bias.log_density,
            "finalizer_bias": self.finalizer_bias.log_density,
            "classifier.mean": self.classifier.mean,
            "classifier.scale": self.classifier.scale,
            "classifier.weight": self.classifier.weight,
            "classifier.bias": self.classifier.bias,
        }
        arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        write_atomic(folder / "fusion.safetensors", lambda temporary: save_arrays(arrays, temporary))
        description = {
            "format": FORMAT,
            "backbones": backbones,
            "density_cell": self.density_cell,
            "categories": self.categories,
            "center_bias": [self.center_bias.bandwidth, self.center_bias.uniform_weight],
            "finalizer_bias": [self.finalizer_bias.bandwidth, self.finalizer_bias.uniform_weight],
            "classifier_accuracy": self.classifier.accuracy,
            "provenance": self.provenance,
        }
        write_json(folder / "model.json", description)

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> Model:
        """The model of a folder that `save` wrote; raises UserError where there is none."""
        path = folder / "model.json"
        if not path.exists():
            raise UserError(
                f"{folder}: no model here (model.json is missing); give a finished run's folder or a model URI"
            )
        description = json.loads(path.read_text())
        if description["format"] != FORMAT:
            raise UserError(
                f"{path}: format {description['format']}, this acw reads {FORMAT}; use the acw that wrote it"
            )
        backbones = []
        for fields in description["backbones"]:
            fields = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items() if name != "source"}
            backbones.append(Backbone(**fields | {"weights": str(folder / fields["weights"])}))
        stacked = load_file(folder / "heads.safetensors", device=str(device))
        arrays = load_arrays(folder / "fusion.safetensors")
        classifier = {name.partition(".")[2]: array for name, array in arrays.items() if name.startswith("classifier.")}
        return cls(
            backbones,
            {
                b.name: {k.partition("/")[2]: v for k, v in stacked.items() if k.startswith(f"{b.name}/")}
                for b in backbones
            },
            description["density_cell"],
            description["categories"],
            arrays["weights"],
            arrays["global_weights"],
            CenterBias(arrays["center_bias"], *description["center_bias"]),
            CenterBias(arrays["finalizer_bias"], *description["finalizer_bias"]),
            CategoryClassifier(**classifier, accuracy=description["classifier_accuracy"]),
            description["provenance"],
            torch.device(device),
        )


@torch.no_grad()
def ensemble(parameters: Parameters, features: Features, bias_HW: Tensor, cell: float) -> Tensor:
    """(B, H, W): the uniform mixture of K heads' densities, normalised on the grid of the centre bias given."""
    priority_KBhw = bank_of_heads.readout(parameters, features)
    heads, (height, width) = len(priority_KBhw), bias_HW.shape
    # As `heads.finalize`, but what all images share is computed once, and the maps of few heads and images at a time.
    vertical_KHh = bank_of_heads.smoothing(parameters, height, priority_KBhw.shape[2], cell)
    horizontal_KWw = bank_of_heads.smoothing(parameters, width, priority_KBhw.shape[3], cell)
    bias_weight_K = parameters["center_bias_weight"][:, None, None, None]
    uniform_K = bias_HW.new_full((heads,), 1 / heads)
    maps_at_once = CELLS_AT_ONCE[bias_HW.device.type] // bias_HW.numel()
    heads_at_once = min(max(maps_at_once, 1), heads)

    def scores(some_KBhw: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, heads, heads_at_once):
            some = slice(start, start + heads_at_once)
            smooth_KBHW = vertical_KHh[some, None] @ (some_KBhw[some] @ horizontal_KWw[some, None].mT)
            yield smooth_KBHW.addcmul_(bias_weight_K[some], bias_HW), uniform_K[some]

    images = priority_KBhw.split(max(maps_at_once // heads_at_once, 1), dim=1)
    return torch.cat([mixture(functools.partial(scores, some)) for some in images])


def mixture(parts: Callable[[], Iterable[tuple[Tensor, Tensor]]]) -> Tensor:
    """(B, H, W): log sum_k w_k p_k, of K densities that are each normalised over (H, W) first.

    parts() gives, for some of the K at a time, their log-densities up to a constant each (k, B, H, W), which are
    overwritten, and their weights (k,). It is called again where float32 cannot add densities so small.
    """
    total_B1N = None
    for log_p_KBHW, weight_K in parts():
        p_KBN = log_p_KBHW.flatten(2)
        # PyTorch's exp takes three times as long as its exp2 on some CPUs.
        p_KBN.sub_(p_KBN.amax(2, keepdim=True)).mul_(LOG2_E).exp2_()
        share_BK = (weight_K[:, None] / p_KBN.sum(2)).T
        if total_B1N is None:
            total_B1N = torch.zeros_like(p_KBN[0])[:, None]
        total_B1N.baddbmm_(share_BK[:, None], p_KBN.transpose(0, 1))
    assert total_B1N is not None
    if total_B1N.amin() < UNDERFLOW:
        return _mixture_of_logs(parts)
    return total_B1N.log_().view(log_p_KBHW.shape[1:])


def _mixture_of_logs(parts: Callable[[], Iterable[tuple[Tensor, Tensor]]]) -> Tensor:
    """`mixture` without leaving the logarithms: slower, and right for densities of any size."""
    total_BHW = None
    for log_p_KBHW, weight_K in parts():
        weighted = bank_of_heads.normalise(log_p_KBHW) + weight_K.log()[:, None, None, None]
        part_BHW = weighted.logsumexp(0)
        total_BHW = part_BHW if total_BHW is None else torch.logaddexp(total_BHW, part_BHW)
    assert total_BHW is not None
    return total_BHW
