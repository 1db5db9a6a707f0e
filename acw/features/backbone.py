"""Frozen networks: which layers DeepGaze IIE and the small variants read, at which input, with which weights.

A `Backbone` is a value and costs nothing; torch and timm are imported only where one is loaded.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from acw.features.compiler import compiler_put_off
from acw.features.network import fill_constants, fold, pad_same, tap_outputs, truncate
from acw.features.onnx_network import GRAPH, OnnxNetwork
from acw.features.weights import is_counter, load_graph, load_weights

if TYPE_CHECKING:
    import torch

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LITE_LONG_SIDE = 400  # px, of the small backbones' input; one sees it finer
# Which layers are read: a backbone's own, with one of the stage before too, or only those of its last stage.
TAPS = ("own", "earlier", "deepest")


@dataclass(frozen=True)
class Backbone:
    """A frozen network: a timm model, the layers that are read from it (taps), its input and its weights.

    `timm_name` carries timm's tag only if the hub has these very weights; it is empty for a network that comes as an
    ONNX graph. `taps` are module paths, or names in that graph, in the order in which their outputs are concatenated; a
    tap is the module's own output, before any norm or activation after it; of a vision transformer, its patches' tokens
    as a grid. `weights` is a source for `weights.load_weights`, or empty where there is no default. `mean` and `std`
    are of RGB scaled to 0..1. Exactly one of `downscale` (image px per input px) and `long_side` (of the input, px) is
    set. `earlier` is a tap of an earlier stage, which a recipe may ask for too; empty where there is none to be had.
    `stride` is input px per readout cell. `static_padding` is the image side (px) for which strided "same" convolutions
    are padded, whatever the input; None pads for the input at hand. `multiple`: the input's sides are multiples of so
    many px, as of a transformer's patch. `pooled`: taps finer than the readout's grid are brought to it as they are
    computed, by their mean and their maximum over a cell, side by side. `bgr`: the network wants the channels reversed.
    `half`: compute in bfloat16 where the device is quick at it, which the features must bear: a cosine of .9999 to
    float32's. `licence`: of the weights, where they come out of a package.
    """

    name: str
    timm_name: str
    taps: tuple[str, ...]
    weights: str
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    earlier: str = ""
    downscale: float | None = None
    long_side: int | None = None
    stride: float = 16.0
    static_padding: int | None = None
    multiple: int = 1
    pooled: bool = False
    bgr: bool = False
    half: bool = False
    licence: str = ""

    def __post_init__(self) -> None:
        assert (self.downscale is None) != (self.long_side is None), self.name

    def input_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Height and width in px at which the network sees an image of (height, width) px."""
        if self.downscale is not None:
            return _scaled(image_size, 1 / self.downscale, math.floor)
        assert self.long_side is not None
        scale = self.long_side / max(image_size) / self.multiple
        height, width = _scaled(image_size, scale, round)
        return height * self.multiple, width * self.multiple

    def readout_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Height and width in cells of the readout's grid for an image of (height, width) px.

        With `downscale` it is ceil(size / downscale / stride) of the *unrounded* input, as in DeepGaze IIE.
        """
        if self.downscale is not None:
            return _scaled(image_size, 1 / self.downscale / self.stride, _ceil)
        return _scaled(self.input_size(image_size), 1 / self.stride, _ceil)

    def of_long_side(self, long_side: int) -> Backbone:
        """The same view through an input of that long side in px, or of a longer one if its own is finer."""
        finer = 1.0 if self.long_side is None else self.long_side / LITE_LONG_SIDE
        return dataclasses.replace(self, downscale=None, long_side=round(long_side * finer))

    def reading(self, taps: str) -> Backbone:
        """The same view, of which those layers are read that one of TAPS names."""
        assert taps in TAPS, taps
        assert self.earlier or taps != "earlier", self.name
        last = max(map(_stage, self.taps))
        layers = {
            "own": self.taps,
            "earlier": (self.earlier, *self.taps),
            "deepest": tuple(tap for tap in self.taps if _stage(tap) == last),
        }
        return dataclasses.replace(self, taps=layers[taps])

    def fingerprint_fields(self) -> dict[str, Any]:
        """All that changes the features except the weights, whose hash is `FrozenBackbone.weights_sha256`; for JSON."""
        # What was added later, where it is used, so that features of the others stay known.
        added = {"multiple": 1, "pooled": False, "bgr": False, "half": False}
        return {
            "architecture": self.timm_name.partition(".")[0],
            "taps": list(self.taps),
            "mean": list(self.mean),
            "std": list(self.std),
            "downscale": self.downscale,
            "long_side": self.long_side,
            "stride": self.stride,
            "static_padding": self.static_padding,
            **{name: getattr(self, name) for name, off in added.items() if getattr(self, name) != off},
        }


def _stage(tap: str) -> int:
    """The network's stage that a layer is in: the first number of its path."""
    number = re.search("[0-9]+", tap)
    assert number is not None, tap
    return int(number[0])


def _scaled(size: tuple[int, int], factor: float, rounding: Callable[[float], int]) -> tuple[int, int]:
    return max(1, rounding(size[0] * factor)), max(1, rounding(size[1] * factor))


def _ceil(value: float) -> int:
    # A quotient that is whole must stay so, also where its last bit says otherwise.
    return math.ceil(value - 1e-6)


def _hash(state: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(f"{key} {list(state[key].shape)}\n".encode())
        digest.update(state[key].numpy().tobytes())
    return digest.hexdigest()


class FrozenBackbone:
    """A loaded backbone on a device, cut off after its last tap, in eval mode and without gradients, for good.

    It is no `torch.nn.Module` on purpose: placed in one, it stays out of that one's `train()`, `parameters()` and
    `state_dict()`, so nothing can move its batch statistics or put its weights into an optimizer.
    `channels` has the channels of each tap's features, in order; `weights_sha256` covers names, shapes and values of
    the used weights. `state` has the weights as they came; in `network`, batch norms may be folded into convolutions.
    """

    def __init__(
        self,
        backbone: Backbone,
        network: torch.nn.Module | OnnxNetwork,
        state: dict[str, torch.Tensor],
        channels: Sequence[int],
        device: torch.device,
    ) -> None:
        import torch

        self.backbone = backbone
        self.device = device
        self._network = network if isinstance(network, OnnxNetwork) else network.to(device)
        strides = network.strides if isinstance(network, OnnxNetwork) else [backbone.stride] * len(channels)
        self._finer = [backbone.pooled and stride < backbone.stride for stride in strides]
        self.channels = [count * (1 + finer) for count, finer in zip(channels, self._finer, strict=True)]
        self._layout: torch.memory_format | None = None
        self._state = state
        # Held in float64: in float32, activations of DeepGaze IIE's ResNet-50 near 1800 move by up to 5e-3.
        self._mean, self._std = (
            torch.tensor(values, dtype=torch.float64, device=device).reshape(3, 1, 1)
            for values in (backbone.mean, backbone.std)
        )
        self.weights_sha256 = _hash(state)

    @property
    def half(self) -> bool:
        """Whether it computes in bfloat16, here: a copy on another machine may not."""
        return self.backbone.half and _quick_at_bfloat16(self.device)

    @property
    def precision(self) -> str:
        """In which it computes, here."""
        return "bfloat16" if self.half else "float32"

    def state(self) -> dict[str, torch.Tensor]:
        """The used weights, float32 on the CPU, contiguous; a .safetensors file of them is a weights source."""
        return dict(self._state)

    def features(self, images: torch.Tensor, channels_last: bool = True) -> list[torch.Tensor]:
        """The taps' outputs for images, uint8 RGB (B, H, W, 3) on any device.

        One float32 tensor (B, h_t, w_t, C_t) a tap, contiguous, on the backbone's device, each at the tap's own
        resolution. The tensors are ordinary ones, on which heads can be trained. `channels_last` is the memory layout
        inside the network: it decides on speed, and on results by rounding at most.
        """
        import torch

        assert images.dtype == torch.uint8, images.dtype
        assert images.shape[3:] == (3,), images.shape
        layout = torch.channels_last if channels_last else torch.contiguous_format
        if layout != self._layout and isinstance(self._network, torch.nn.Module):
            self._network.to(memory_format=layout)
            self._layout = layout
        # TF32 convolutions, cuDNN's default, would make a GPU's features others than a CPU's.
        half = torch.autocast(self.device.type, torch.bfloat16, enabled=self.half)
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False), half:
            # From page-locked memory, a GPU fetches them while it is still busy with what it was given before.
            source = images.pin_memory() if self.device.type == "cuda" and not images.is_cuda else images
            inputs = self._input(source.to(self.device, non_blocking=True).permute(0, 3, 1, 2))
            if isinstance(self._network, torch.nn.Module):
                taps = tap_outputs(self._network, self.backbone.taps, inputs.contiguous(memory_format=layout))
                taps = [tap.float() for tap in taps]
        if isinstance(self._network, OnnxNetwork):
            taps = [tap.to(self.device) for tap in self._network(inputs)]
        grid = self.backbone.readout_size((images.shape[1], images.shape[2]))
        return [_pooled(tap, grid) if finer else tap for tap, finer in zip(taps, self._finer, strict=True)]

    def _input(self, images: torch.Tensor) -> torch.Tensor:
        """The network's input (B, 3, h, w) for uint8 images (B, 3, H, W)."""
        from torch.nn.functional import interpolate

        size = self.backbone.input_size((images.shape[2], images.shape[3]))
        if self.backbone.downscale is not None:
            factor = 1 / self.backbone.downscale
            pixels = interpolate(images, scale_factor=factor, recompute_scale_factor=False, mode="nearest").float()
        else:
            # Plane by plane is faster.
            pixels = interpolate(images.contiguous().float(), size, mode="bilinear", antialias=True)
        assert pixels.shape[2:] == size, (pixels.shape, size)
        # In place, so that each step is computed in float64 and rounded to float32 once.
        pixels.div_(255).sub_(self._mean).div_(self._std)
        return pixels.flip(1) if self.backbone.bgr else pixels


@functools.lru_cache
def _quick_at_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 itself; a CPU that does not takes six to ten times as long as in float32.

    PyTorch before 2.10 does not say so of a CPU.
    """
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _pooled(tap: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """(B, h, w, 2 C): the mean and the maximum of a finer map (B, h_t, w_t, C) over each cell of a grid."""
    import torch
    from torch.nn.functional import adaptive_avg_pool2d, adaptive_max_pool2d

    planes = tap.permute(0, 3, 1, 2)
    both = torch.cat([adaptive_avg_pool2d(planes, grid), adaptive_max_pool2d(planes, grid)], 1)
    return both.permute(0, 2, 3, 1).contiguous()


def load_backbone(backbone: Backbone, device: torch.device | str = "cpu") -> FrozenBackbone:
    """Builds a backbone's network, fills it from its weights source and freezes it on a device.

    Raises UserError if the weights cannot be had or do not fit; no tensor is ever left at a random value.
    """
    import torch

    device = torch.device(device)
    if not backbone.timm_name:
        graph = load_graph(backbone.weights, backbone.name, backbone.taps)
        onnx = OnnxNetwork(graph, backbone.taps)
        state = {GRAPH: torch.frombuffer(bytearray(graph), dtype=torch.uint8)}
        return FrozenBackbone(backbone, onnx, state, onnx.channels, device)
    with compiler_put_off():
        import timm

        # On "meta" tensors have no values: what the source does not fill cannot compute anything.
        with torch.device("meta"):
            how: dict[str, Any] = {"dynamic_img_size": True} if "_patch" in backbone.timm_name else {}
            create = functools.partial(timm.create_model, backbone.timm_name, pretrained=False, **how)
            network = create().eval().requires_grad_(False)
        pad_same(network, backbone.static_padding)
        expected = {key: value.shape for key, value in network.state_dict().items() if not is_counter(key)}
        size = backbone.input_size((64, 64)) if backbone.multiple > 1 else (64, 64)
        channels, normed = truncate(network, backbone.taps, size)
    # `state` carries the layers' versions, without which load_state_dict would want the counters back.
    state = network.state_dict()
    weights = load_weights(backbone.weights, backbone.name, backbone.timm_name, expected, list(state))
    weights = {key: value.to("cpu", torch.float32, copy=True).contiguous() for key, value in weights.items()}
    state.update(weights)
    network.load_state_dict(state, strict=True, assign=True)
    fill_constants(network, create)
    assert not any(value.is_meta for value in network.state_dict().values()), backbone.name
    for conv, norm in normed:
        fold(network, conv, norm)
    return FrozenBackbone(backbone, network, weights, channels, device)
