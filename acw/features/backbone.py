"""Frozen ImageNet backbones: which layers DeepGaze IIE and the small variants read, at which input, with which weights.

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

from acw.features.weights import is_counter, load_weights

if TYPE_CHECKING:
    import torch

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
LITE_LONG_SIDE = 400  # px, of the small backbones' input; one sees it finer
# Which layers are read: a backbone's own, with one of the stage before too, or only those of its last stage.
TAPS = ("own", "earlier", "deepest")


@dataclass(frozen=True)
class Backbone:
    """One view of the images: a timm model, the layers that are read from it (taps), its input and its weights.

    `timm_name` carries timm's tag only if the hub has these very weights. `taps` are module paths, in the order in
    which their outputs are concatenated; a tap is the module's own output, before any norm or activation after it.
    `weights` is a source for `weights.load_weights`, or empty where there is no default. `mean` and `std` are of RGB
    scaled to 0..1. Exactly one of `downscale` (image px per input px) and `long_side` (of the input, px) is set.
    `earlier` is a tap of an earlier stage, which a recipe may ask for too; empty where there is none to be had.
    `stride` is input px per readout cell. `static_padding` is the image side (px) for which strided "same" convolutions
    are padded, whatever the input; None pads for the input at hand.
    """

    name: str
    timm_name: str
    taps: tuple[str, ...]
    weights: str
    mean: tuple[float, float, float] = _IMAGENET_MEAN
    std: tuple[float, float, float] = _IMAGENET_STD
    earlier: str = ""
    downscale: float | None = None
    long_side: int | None = None
    stride: float = 16.0
    static_padding: int | None = None

    def __post_init__(self) -> None:
        assert (self.downscale is None) != (self.long_side is None), self.name

    def input_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Height and width in px at which the network sees an image of (height, width) px."""
        if self.downscale is not None:
            return _scaled(image_size, 1 / self.downscale, math.floor)
        assert self.long_side is not None
        return _scaled(image_size, self.long_side / max(image_size), round)

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
        return {
            "architecture": self.timm_name.partition(".")[0],
            "taps": list(self.taps),
            "mean": list(self.mean),
            "std": list(self.std),
            "downscale": self.downscale,
            "long_side": self.long_side,
            "stride": self.stride,
            "static_padding": self.static_padding,
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
    `channels` has a tap's channels, in order; `weights_sha256` covers names, shapes and values of the used weights.
    `state` has the weights as they came; in `network`, batch norms may be folded into convolutions.
    """

    def __init__(
        self,
        backbone: Backbone,
        network: torch.nn.Module,
        state: dict[str, torch.Tensor],
        channels: Sequence[int],
        device: torch.device,
    ) -> None:
        import torch

        self.backbone = backbone
        self.channels = list(channels)
        self.device = device
        self._network = network.to(device)
        self._layout: torch.memory_format | None = None
        self._state = state
        # Held in float64: in float32, activations of DeepGaze IIE's ResNet-50 near 1800 move by up to 5e-3.
        self._mean, self._std = (
            torch.tensor(values, dtype=torch.float64, device=device).reshape(3, 1, 1)
            for values in (backbone.mean, backbone.std)
        )
        self.weights_sha256 = _hash(state)

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
        if layout != self._layout:
            self._network.to(memory_format=layout)
            self._layout = layout
        # TF32 convolutions, cuDNN's default, would make a GPU's features others than a CPU's.
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            # From page-locked memory, a GPU fetches them while it is still busy with what it was given before.
            source = images.pin_memory() if self.device.type == "cuda" and not images.is_cuda else images
            inputs = self._input(source.to(self.device, non_blocking=True).permute(0, 3, 1, 2))
            return tap_outputs(self._network, self.backbone.taps, inputs.contiguous(memory_format=layout))

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
        return pixels.div_(255).sub_(self._mean).div_(self._std)


def load_backbone(backbone: Backbone, device: torch.device | str = "cpu") -> FrozenBackbone:
    """Builds a backbone's network, fills it from its weights source and freezes it on a device.

    Raises UserError if the weights cannot be had or do not fit; no tensor is ever left at a random value.
    """
    import timm
    import torch

    device = torch.device(device)
    # On "meta" tensors have no values: what the source does not fill cannot compute anything.
    with torch.device("meta"):
        network = timm.create_model(backbone.timm_name, pretrained=False).eval().requires_grad_(False)
    _pad_same(network, backbone.static_padding)
    expected = {key: value.shape for key, value in network.state_dict().items() if not is_counter(key)}
    channels, normed = _truncate(network, backbone.taps)
    # `state` carries the layers' versions, without which load_state_dict would want the counters back.
    state = network.state_dict()
    weights = load_weights(backbone.weights, backbone.name, backbone.timm_name, expected, list(state))
    weights = {key: value.to("cpu", torch.float32, copy=True).contiguous() for key, value in weights.items()}
    state.update(weights)
    network.load_state_dict(state, strict=True, assign=True)
    assert not any(value.is_meta for value in network.state_dict().values()), backbone.name
    for conv, norm in normed:
        _fold(network, conv, norm)
    return FrozenBackbone(backbone, network, weights, channels, device)


class _LastTap(Exception):
    """Ends a forward pass: everything wanted is there."""


def tap_outputs(network: torch.nn.Module, taps: Sequence[str], inputs: torch.Tensor) -> list[torch.Tensor]:
    """Outputs (B, h_t, w_t, C_t) of the modules `taps` for inputs (B, 3, h, w); what follows the last is not run."""
    import torch

    found: dict[str, torch.Tensor] = {}

    def hook(tap: str) -> Any:
        def keep(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
            # A copy, as an in-place ReLU may follow; made outside inference mode, as autograd refuses its tensors.
            with torch.inference_mode(False), torch.no_grad():
                found[tap] = output.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)
            if len(found) == len(taps):
                raise _LastTap

        return keep

    handles = [network.get_submodule(tap).register_forward_hook(hook(tap)) for tap in taps]
    try:
        network(inputs)
    except _LastTap:
        return [found[tap] for tap in taps]
    finally:
        for handle in handles:
            handle.remove()
    raise AssertionError(f"taps that no forward pass reaches: {set(taps) - set(found)}")


def _truncate(network: torch.nn.Module, taps: Sequence[str]) -> tuple[list[int], list[tuple[str, str]]]:
    """Drops the weights of all layers that no tap needs, and batch counters.

    Returns the taps' channels, and the convolutions, unless they are taps, each with the norm that reads its output.
    """
    import torch

    normed: list[tuple[str, str]] = []
    convolved: dict[int, tuple[str, torch.Tensor]] = {}  # by identity; kept, so that no other tensor gets the same

    def pair(name: str) -> Any:
        def note(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
            if isinstance(module, torch.nn.BatchNorm2d) and id(args[0]) in convolved:
                normed.append((convolved[id(args[0])][0], name))
            elif isinstance(module, torch.nn.Conv2d) and name not in taps:
                convolved[id(output)] = (name, output)

        return note

    unused = {
        name: module
        for name, module in network.named_modules()
        if [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    }

    def hook(name: str) -> Any:
        def mark(module: torch.nn.Module, args: Any) -> None:
            unused.pop(name, None)

        return mark

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in unused.items()]
    handles += [module.register_forward_hook(pair(name)) for name, module in unused.items()]
    channels = [output.shape[3] for output in tap_outputs(network, taps, torch.zeros(1, 3, 64, 64, device="meta"))]
    for handle in handles:
        handle.remove()
    for name in unused:
        network.set_submodule(name, torch.nn.Identity())
    for module in network.modules():
        if "num_batches_tracked" in module._buffers:
            module._buffers["num_batches_tracked"] = None
    return channels, normed


def _fold(network: torch.nn.Module, conv_name: str, norm_name: str) -> None:
    """Makes a frozen batch norm part of the convolution before it: one pass over the activations less."""
    import torch

    conv, norm = network.get_submodule(conv_name), network.get_submodule(norm_name)
    assert isinstance(conv, torch.nn.Conv2d), conv_name
    assert isinstance(norm, torch.nn.BatchNorm2d), norm_name
    assert norm.running_mean is not None, norm_name
    assert norm.running_var is not None, norm_name
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    before = 0.0 if conv.bias is None else conv.bias.double()
    bias = norm.bias.double() + scale * (before - norm.running_mean.double())
    weight = conv.weight.double() * scale[:, None, None, None]
    conv.weight, conv.bias = (torch.nn.Parameter(value.float(), requires_grad=False) for value in (weight, bias))
    # timm's batch norms hold the activation that follows them.
    rest = [getattr(norm, name) for name in ("drop", "act") if hasattr(norm, name)]
    network.set_submodule(norm_name, torch.nn.Sequential(*rest))


def _pad_same(network: torch.nn.Module, image_side: int | None) -> None:
    """Has "same" convolutions, timm's `Conv2dSame`, pad as they convolve, instead of making a padded copy first.

    With an image_side, they pad whatever the input as for a square image of that side, as efficientnet_pytorch does.
    """
    from timm.layers import Conv2dSame

    for conv in network.modules():
        if isinstance(conv, Conv2dSame):
            conv.forward = functools.partial(_convolve_same, conv, image_side=image_side)  # type: ignore[method-assign]


def _convolve_same(conv: torch.nn.Conv2d, x: torch.Tensor, image_side: int | None) -> torch.Tensor:
    from torch.nn.functional import conv2d

    kernel, stride = conv.kernel_size[0], conv.stride[0]
    pads, first, cells = [], [], []
    for length in x.shape[2:]:
        # Each layer is padded as if it saw the whole image, not what the layers before have left of it.
        seen = image_side or length
        total = max((math.ceil(seen / stride) - 1) * stride + kernel - seen, 0)
        # One more at the end than at the beginning is a stride more on both sides, without the first result.
        first.append(total % 2)
        pads.append(total // 2 + total % 2 * stride)
        cells.append((length + total - kernel) // stride + 1)
    y = conv2d(x, conv.weight, conv.bias, conv.stride, (pads[0], pads[1]), conv.dilation, conv.groups)
    return y[:, :, first[0] : first[0] + cells[0], first[1] : first[1] + cells[1]]
