"""Surgery on a backbone's PyTorch network: its taps' outputs, the layers that none needs, folded norms, padding."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class _LastTap(Exception):
    """Ends a forward pass: everything wanted is there."""


def tap_outputs(network: torch.nn.Module, taps: Sequence[str], inputs: torch.Tensor) -> list[torch.Tensor]:
    """Outputs (B, h_t, w_t, C_t) of the modules `taps` for inputs (B, 3, h, w); what follows the last is not run."""
    import torch

    outputs: dict[str, torch.Tensor] = {}

    def hook(tap: str) -> Any:
        def keep(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
            # A copy, as an in-place ReLU may follow; made outside inference mode, as autograd refuses its tensors.
            with torch.inference_mode(False), torch.no_grad():
                cells = tokens_on_grid(network, output, inputs) if output.ndim == 3 else output.permute(0, 2, 3, 1)
                outputs[tap] = cells.clone(memory_format=torch.contiguous_format)
            if len(outputs) == len(taps):
                raise _LastTap

        return keep

    handles = [network.get_submodule(tap).register_forward_hook(hook(tap)) for tap in taps]
    try:
        network(inputs)
    except _LastTap:
        return [outputs[tap] for tap in taps]
    finally:
        for handle in handles:
            handle.remove()
    raise AssertionError(f"taps that no forward pass reaches: {set(taps) - set(outputs)}")


def tokens_on_grid(network: Any, tokens: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """(B, h, w, C): a vision transformer's tokens (B, N, C) for inputs (B, 3, h, w), those of patches alone."""
    rows, columns = network.patch_embed.dynamic_feat_size((inputs.shape[2], inputs.shape[3]))
    return tokens[:, network.num_prefix_tokens :].unflatten(1, (rows, columns))


def truncate(
    network: torch.nn.Module, taps: Sequence[str], size: tuple[int, int]
) -> tuple[list[int], list[tuple[str, str]]]:
    """Drops the weights of all layers that no tap needs, and batch counters; found out by an input of that size.

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

    holders = {key.rpartition(".")[0] for key in network.state_dict()}
    unused = {name: module for name, module in network.named_modules() if name in holders}

    def hook(name: str) -> Any:
        def mark(module: torch.nn.Module, args: Any) -> None:
            unused.pop(name, None)

        return mark

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in unused.items()]
    handles += [module.register_forward_hook(pair(name)) for name, module in unused.items()]
    channels = [output.shape[3] for output in tap_outputs(network, taps, torch.zeros(1, 3, *size, device="meta"))]
    for handle in handles:
        handle.remove()
    for name in unused:
        if not any(name.startswith(f"{other}.") for other in unused):
            network.set_submodule(name, torch.nn.Identity())
    for module in network.modules():
        if "num_batches_tracked" in module._buffers:
            module._buffers["num_batches_tracked"] = None
    return channels, normed


def fold(network: torch.nn.Module, conv_name: str, norm_name: str) -> None:
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


def fill_constants(network: torch.nn.Module, create: Callable[[], torch.nn.Module]) -> None:
    """Gives a network on "meta" the values that it computes itself, such as the frequencies of rotary embeddings.

    No file of weights has them; create: makes the network off "meta", which is done only where there are any.
    """
    import torch

    stored = network.state_dict().keys()
    names = [name for name, buffer in network.named_buffers() if name not in stored and buffer.is_meta]
    if names:
        with torch.random.fork_rng(devices=[]):
            values = dict(create().named_buffers())
        for name in names:
            module, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(module), leaf, values[name])


def pad_same(network: torch.nn.Module, image_side: int | None) -> None:
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
