"""A finished model: frozen backbones, trained heads, category weights. One line loads it, one line predicts.

model = acw.load("runs/gaze-.../")                        # or an MLflow URI: models:/acw@champion
prediction = model.predict(image, category="Street")      # a path, a PIL image, uint8 (H, W, 3), ...; category or none
prediction.log_density                                     # (H, W) float32, natural log, logsumexp 0
for prediction in model.predict_batch(images): ...         # many images, in order, in bounded memory
"""

from __future__ import annotations

import functools
import math
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from acw.features import joined
from acw.features.backbone import Backbone, FrozenBackbone, load_backbone
from acw.features.store import compute
from acw.features.tensors import Features, Standard
from acw.features.view import View, parts_of
from acw.fusion.adaptation import Adaptation, Numbers, adapt
from acw.fusion.classifier import CategoryClassifier
from acw.heads.center_bias import CenterBias
from acw.heads.ensemble import ensemble, mixture
from acw.heads.finalizer import Finalizer, normalise
from acw.heads.readout import Parameters
from acw.model.arguments import as_center_bias, as_device, as_image, paired
from acw.model.prediction import Prediction, ViewDensities
from acw.storage.errors import UserError

# Pixels of the images that pass the backbones together; bounds memory, does not change a number beyond rounding.
PIXELS_AT_ONCE = {"cpu": 2**21, "cuda": 2**23}
# A backbone's input of one pixel counts as so many of the image: as in DeepGaze IIE, which halves width and height.
PIXELS_PER_INPUT_PIXEL = 4
# Times PIXELS_AT_ONCE for which a backbone is loaded, where one is in memory at a time.
PASSES_PER_LOAD = 4

P = ParamSpec("P")
T = TypeVar("T")


def _in_float32(method: Callable[Concatenate[Model, P], T]) -> Callable[Concatenate[Model, P], T]:
    """A model's method that computes in float32 where its caller has set another type, such as by `torch.autocast`."""

    @functools.wraps(method)
    def wrapped(model: Model, *arguments: P.args, **named: P.kwargs) -> T:
        with torch.autocast(model.device.type, enabled=False):
            return method(model, *arguments, **named)

    return wrapped


def _mean(log_density_CHW: Tensor, mirrored_CHW: Tensor) -> Tensor:
    """The mean of two densities, as logarithms, of which one is of the mirror image."""
    return torch.logaddexp(log_density_CHW, mirrored_CHW.flip(2)) - math.log(2)


@dataclass
class Model:
    """All that prediction needs, and where it comes from.

    heads: per component the stacked parameters of its K heads. A component is a view with all of its heads or, in a
    model of several `systems` that were trained jointly, each with weights of its own, with those of one system; or a
    view with the readouts of one of the categories that have their own (`readouts`, their names), which alone weigh it.
    weights: (G, C) float64, rows of `categories`, columns of `components`. center_bias: the stored KDE, baseline of IG;
    finalizer_bias: what the heads add, it or Galván's. standards: by view, of those of several networks, what
    standardises their channels. mirrored: whether a prediction is the mean of the image's and its mirror image's.
    adaptation: what a category has besides weights, where that was found to pay. weights_sha256: of the backbones whose
    weights are not kept with the model, nor pinned by their source. provenance: recipe, seeds, versions, commit, data
    set, split.

    one_backbone_at_a_time: set it to keep only the backbone in use in memory: of DeepGaze IIE's four, 90 MB instead of
    320 MB. The price is that each is loaded anew (a third of a second) for every window of a batch: predict many images
    by one `predict_batch`, not one by one.
    """

    views: list[View]
    heads: dict[str, Parameters]
    finalizer: Finalizer
    categories: list[str]
    weights: np.ndarray
    global_weights: np.ndarray
    center_bias: CenterBias
    finalizer_bias: CenterBias
    classifier: CategoryClassifier
    provenance: dict[str, Any]
    systems: int = 1
    readouts: list[str] = field(default_factory=list)
    standards: dict[str, Standard] = field(default_factory=dict)
    mirrored: bool = False
    adaptation: Adaptation | None = None
    weights_sha256: dict[str, str] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    one_backbone_at_a_time: bool = False
    _loaded: dict[str, FrozenBackbone] = field(default_factory=dict, repr=False)

    def predict(self, image: Any, category: str | None = None, center_bias: Any = None) -> Prediction:
        """The density of one image of any size: a path, a PIL image, uint8 (H, W, 3) RGB or what else `as_image` takes.

        Without a category, the weights are `sum_c p(c | image) w[c]`. center_bias: float (H, W) natural log-density of
        the image's size that the heads add instead of their own, as an array or a tensor; a constant in it changes
        nothing. Raises UserError for a category that the model does not know or a file that is no image, ValueError for
        what is no image or centre bias.
        """
        pixels = as_image(image)
        if center_bias is None:
            return next(self.predict_batch([pixels], [category]))
        (((pixels, category),),) = self._windows([(pixels, category)])
        size = (pixels.shape[0], pixels.shape[1])
        given = as_center_bias(center_bias, size)
        # A step towards 0 first: what float32 keeps of a log-density are its differences.
        bias = torch.from_numpy((given - given.max()).astype(np.float32))
        ((log_densities, pooled),) = self._densities([pixels], bias)
        return self._mixed(log_densities, pooled, pixels, category, bias)

    def predict_batch(
        self, images: Iterable[Any], categories: Iterable[str | None] | None = None
    ) -> Iterator[Prediction]:
        """The densities of many images, each as `predict` takes it, in order; categories: one an image.

        They are worked on in windows of a few megapixels, so memory does not grow with the number of images, which may
        come from a generator; images of one size in a window pass the backbones together. Raises as `predict` does,
        before the window with the wrong image.
        """
        return self._predicted(paired(images, categories))

    def _predicted(self, pairs: Iterable[tuple[Any, str | None]]) -> Iterator[Prediction]:
        for window in self._windows(pairs):
            densities = self._densities([image for image, _ in window])
            for (image, category), (log_densities, pooled) in zip(window, densities, strict=True):
                yield self._mixed(log_densities, pooled, image, category)

    def _windows(self, pairs: Iterable[tuple[Any, str | None]]) -> Iterator[list[tuple[np.ndarray, str | None]]]:
        """The images with their categories, checked, as many at a time as memory is meant for."""
        room = PIXELS_AT_ONCE[as_device(self.device).type] * (PASSES_PER_LOAD if self.one_backbone_at_a_time else 1)
        window: list[tuple[np.ndarray, str | None]] = []
        pixels = 0
        for number, (given, category) in enumerate(pairs):
            image = as_image(given, f"images[{number}]")
            if category is not None:
                self._row(category)
            own = self._pixels((image.shape[0], image.shape[1]))
            if window and pixels + own > room:
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

    @_in_float32
    def _densities(
        self, images: Sequence[np.ndarray], given_HW: Tensor | None = None
    ) -> list[tuple[Tensor, np.ndarray]]:
        """Of each image (C, H, W) the components' densities on its grid, and (D,) pooled features.

        given_HW: a centre bias of the image's size instead of the heads' own, for images of one size.
        """
        upright = self._seen(images, given_HW)
        if not self.mirrored:
            return upright
        given_HW = None if given_HW is None else given_HW.flip(1)
        mirrored = self._seen([image[:, ::-1] for image in images], given_HW, mirrored=True)
        return [(_mean(own, other), pooled) for (own, pooled), (other, _) in zip(upright, mirrored, strict=True)]

    def _seen(
        self, images: Sequence[np.ndarray], given_HW: Tensor | None, mirrored: bool = False
    ) -> list[tuple[Tensor, np.ndarray]]:
        """`_densities` of the images as they are; mirrored: whether these are mirror images, for which the heads'
        centre bias is mirrored, too."""
        by_size = defaultdict(list)
        for index, image in enumerate(images):
            by_size[image.shape[0], image.shape[1]].append(index)
        given = None if given_HW is None else self.finalizer.on_grid(given_HW).to(self.device)
        biases = {size: self._bias(size, mirrored) if given is None else given for size in by_size}
        passes = []
        for size, members in by_size.items():
            at_once = max(1, PIXELS_AT_ONCE[self.device.type] // self._pixels(size))
            passes += [(size, members[start : start + at_once]) for start in range(0, len(members), at_once)]
        densities: list[list[Tensor]] = [[] for _ in images]
        pooled: list[list[np.ndarray]] = [[] for _ in images]
        known: dict[tuple[str, int], tuple[Features, Tensor]] = {}  # of parts, by pass, that a later view reads too
        for number, view in enumerate(self.views):
            # Network by network, as of those that are not to be kept in memory each is loaded once.
            for part in [part for part in view.parts if (part.name, 0) not in known]:
                for at, (_, members) in enumerate(passes):
                    pixels = np.stack([images[index] for index in members])
                    features, moments, means = compute(self.loaded(part), part, pixels)
                    known[part.name, at] = features, moments
                    for index, mean in zip(members, means.double().cpu().numpy(), strict=True):
                        pooled[index].append(mean)
            later = {part.name for other in self.views[number + 1 :] for part in other.parts}
            for at, (size, members) in enumerate(passes):
                of_view = self._joined(view, [known[part.name, at] for part in view.parts], size)
                mixed_BCHW = self._ensembles(view.name, of_view, biases[size], size)
                for index, density in zip(members, mixed_BCHW, strict=True):
                    densities[index].append(density)
                known = {key: value for key, value in known.items() if key[1] != at or key[0] in later}
        return [(torch.cat(d), np.concatenate(p)) for d, p in zip(densities, pooled, strict=True)]

    def _joined(self, view: View, parts: Sequence[tuple[Features, Tensor]], size: tuple[int, int]) -> Features:
        """A view's features from those of its parts and their channels' moments, for images of `size` px."""
        features, moments = zip(*parts, strict=True)
        if len(parts) == 1:
            return features[0]
        return joined.join(features, moments, self.standards[view.name], view.readout_size(size))

    def _ensembles(self, view: str, features: Features, bias_HW: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, components of a view, H, W): their densities for images of `size` px."""
        area = self.finalizer.area(size)
        area = None if area is None else area.to(self.device)
        banks = [self.heads[component] for component in self._components(view)]
        return torch.stack([ensemble(bank, features, bias_HW, self.finalizer, area) for bank in banks], 1)

    @torch.no_grad()
    @_in_float32
    def _mixed(
        self,
        log_densities_CHW: Tensor,
        pooled: np.ndarray,
        image: np.ndarray,
        category: str | None,
        given_HW: Tensor | None = None,
    ) -> Prediction:
        """The prediction for an image (H, W, 3); given_HW: a centre bias of its size instead of the model's own."""
        size = (image.shape[0], image.shape[1])
        probabilities = self.classifier.probabilities(pooled[None])[0]
        numbers = None if self.adaptation is None else self.adaptation.of(self.shares(category, pooled))
        weights = self.mixing_weights(category, probabilities) if numbers is None else numbers.weights
        if numbers is None or numbers.only_mix:
            log_density = self._mixture(log_densities_CHW, weights, size)
        else:
            log_density = self.adapted(log_densities_CHW, numbers, size, given_HW)
        return Prediction(
            log_density.cpu().numpy(),
            dict(zip(self.categories, probabilities.tolist(), strict=True)),
            dict(zip(self.names, self.by_backbone(weights).tolist(), strict=True)),
            ViewDensities(self._within_views(weights), log_densities_CHW.cpu().numpy(), self.finalizer, size),
            image,
        )

    def _mixture(self, log_densities_CHW: Tensor, weights: np.ndarray, size: tuple[int, int]) -> Tensor:
        """(H, W) of an image of `size` px, at which one component's map is in memory at a time."""
        weight_C = torch.from_numpy(weights).float().to(log_densities_CHW.device)

        def upsampled() -> Iterator[tuple[Tensor, Tensor]]:
            for place in np.flatnonzero(weights).tolist():
                part = slice(place, place + 1)
                yield self.finalizer.upsample(log_densities_CHW[part], size)[None], weight_C[part]

        return mixture(upsampled)[0]

    def adapted(
        self, log_densities_CHW: Tensor, numbers: Numbers, size: tuple[int, int], given_HW: Tensor | None = None
    ) -> Tensor:
        """(H, W) log-density of an image of `size` px by a category's numbers, from the components' on its grid."""
        return self.finalizer.upsample(self.adapted_on_grid(log_densities_CHW, numbers, size, given_HW)[None], size)[0]

    def adapted_on_grid(
        self, log_densities_CHW: Tensor, numbers: Numbers, size: tuple[int, int], given_HW: Tensor | None = None
    ) -> Tensor:
        """The same on the grid; given_HW: a centre bias of the image's size instead of the model's own."""
        if given_HW is None:
            bias_HW = torch.from_numpy(self.center_bias.of_size(self.finalizer.grid(size)))
        else:
            bias_HW = normalise(self.finalizer.on_grid(given_HW))
        return adapt(log_densities_CHW, numbers, bias_HW.to(log_densities_CHW.device), size)

    def as_pysaliency(self, category: str | None = None) -> Any:
        """The model as a `pysaliency.Model`, whose log-densities are those of `predict` with this category.

        It keeps none of them unless its `caching` is set; pysaliency hands it the stimuli's pixels alone.
        """
        from acw.data import pysaliency_compat

        if category is not None:
            self._row(category)
        predict = self.predict

        class PysaliencyModel(pysaliency_compat.load().Model):  # type: ignore[misc]  # known when it is imported
            def _log_density(self, stimulus: np.ndarray) -> np.ndarray:
                return predict(stimulus, category).log_density

        return PysaliencyModel(caching=False)

    @property
    def backbones(self) -> list[Backbone]:
        """The networks of all views, each once."""
        return parts_of(self.views)

    @property
    def names(self) -> list[str]:
        """Of the views."""
        return [view.name for view in self.views]

    @property
    def components(self) -> list[str]:
        """What the weights mix: of each view what all categories share, a system each, and categories' own readouts."""
        return [component for name in self.names for component in self._components(name)]

    def _components(self, view: str) -> list[str]:
        return [*self.shared_components(view), *(f"{view}@{category}" for category in self.readouts)]

    def shared_components(self, view: str) -> list[str]:
        """Those of a view that are no category's own."""
        return [view] if self.systems == 1 else [f"{view}/{system}" for system in range(self.systems)]

    @property
    def shared(self) -> np.ndarray:
        """(V, systems) int64: where, of each view, those are among the components that are no category's own."""
        return np.arange(len(self.components)).reshape(len(self.names), -1)[:, : self.systems]

    @property
    def backbone_rows(self) -> dict[str, np.ndarray]:
        """View -> (C,) weights of the mixture that is the mean of its components, those of all categories."""
        each = np.repeat([1 / self.systems, 0], [self.systems, len(self.readouts)])
        return dict(zip(self.names, np.kron(np.eye(len(self.names)), each), strict=True))

    @property
    def uniform_row(self) -> np.ndarray:
        """(C,) weights of the views' even mixture."""
        return np.mean(list(self.backbone_rows.values()), 0)

    def by_backbone(self, weights: np.ndarray) -> np.ndarray:
        """(..., B) weights of the views from those of the components (..., C)."""
        return weights.reshape(*weights.shape[:-1], len(self.names), -1).sum(-1)

    def _within_views(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """View -> (C,) weights of what it says of an image that these weights mix: of the readouts that are used, those
        of all categories evenly."""
        own = weights.reshape(len(self.names), -1)[:, self.systems :].sum(0)
        rows = {}
        for place, (name, shared) in enumerate(self.backbone_rows.items()):
            row = (shared * max(0.0, 1 - own.sum())).reshape(len(self.names), -1)  # a sum of 1 may be rounded up
            row[place, self.systems :] = own
            rows[name] = row.ravel()
        return rows

    def mixing_weights(self, category: str | None, probabilities: np.ndarray) -> np.ndarray:
        """(C,) weights for a category, or for p(category | image) (G,) where it is not known."""
        if category is None:
            return probabilities @ self.weights
        return self.weights[self._row(category)]

    def shares(self, category: str | None, pooled: np.ndarray) -> np.ndarray:
        """(G + 1,) how much an image has of each category's numbers, and of those for all, by its category or, where
        that is not known, its pooled features (D,)."""
        if category is None:
            return self.classifier.shares(pooled[None])[0]
        return np.eye(len(self.categories) + 1)[self._row(category)]

    def _row(self, category: str) -> int:
        # One name has several forms in Unicode: those of macOS's folders are others than those of a keyboard.
        names = [unicodedata.normalize("NFC", name) for name in self.categories]
        wanted = unicodedata.normalize("NFC", category) if isinstance(category, str) else category
        if wanted not in names:
            raise UserError(f"unknown category '{category}'; the model knows {', '.join(self.categories)}, or none")
        return names.index(wanted)

    def component_log_densities(self, image: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """(C, H, W) each component's density on the grid, and (D,) pooled features, of one uint8 image (H, W, 3)."""
        return self._densities([image])[0]

    def stored_log_densities(
        self, features: Sequence[Features], size: tuple[int, int], mirrored: Sequence[Features] = ()
    ) -> Tensor:
        """(C, H, W) the same for an image of `size` px from the views' features of it and, if there are any, of its
        mirror image."""
        densities = []
        for of_views, is_mirrored in [(features, False), *([(mirrored, True)] if mirrored else [])]:
            bias = self._bias(size, is_mirrored)
            each = [self._ensembles(name, of, bias, size)[0] for name, of in zip(self.names, of_views, strict=True)]
            densities.append(torch.cat(each))
        return _mean(*densities) if mirrored else densities[0]

    def _bias(self, size: tuple[int, int], mirrored: bool = False) -> Tensor:
        bias = torch.from_numpy(self.finalizer_bias.of_size(self.finalizer.grid(size))).to(self.device)
        return bias.flip(1) if mirrored else bias

    def load_backbones(self) -> None:
        """Loads all networks now, so that a copy of the model on another machine needs no file."""
        for backbone in self.backbones:
            self.loaded(backbone)

    def loaded(self, backbone: Backbone) -> FrozenBackbone:
        """A backbone's network, loaded the first time that it is asked for."""
        if backbone.name not in self._loaded:
            if self.one_backbone_at_a_time:
                self._loaded.clear()
            network = load_backbone(backbone, self.device)
            if self.weights_sha256.get(backbone.name, network.weights_sha256) != network.weights_sha256:
                raise UserError(
                    f"{backbone.name}: {backbone.weights} has other weights than the model was trained with; install "
                    "the version of the package that it was"
                )
            self._loaded[backbone.name] = network
        return self._loaded[backbone.name]
