"""Readout and finalizer of DeepGaze IIE, as a bank of K heads on one backbone.

The K heads are stacked parameters `[K, ...]` in a plain dict, so that one pass over a batch's features serves all of
them, and a head's numbers do not depend on who shares its bank. Shape suffixes: K heads, B images, N readout cells,
C channels, h x w a readout grid, H x W the density's grid.

Architecture: Linardos, Kuemmerer, Press, Bethge, "DeepGaze IIE", ICCV 2021, and its published PyTorch code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Output channels of the readout's 1x1 convolutions. All but the last have a bias and a softplus.
WIDTHS = (8, 16, 1, 128, 16, 1)
LAYER_NORM_EPS = 1e-12
# Layers whose input is normalised first: all but the last.
NORMALISED = range(len(WIDTHS) - 1)
# Of the smoothing, in cells: flat on any grid, and a diverging width must not ask for all the memory.
LONGEST_RADIUS = 4096
# The convolution from one channel to many: its output is most of what a readout computes.
WIDE = 3

Parameters = dict[str, Tensor]


@dataclass
class Features:
    """One backbone's features of B images of one shape.

    taps: a tensor (B, h_t, w_t, C_t) float32 per tap, each at its own resolution.
    mean, variance: (B,) float32, over channels and cells of the taps resized to `readout` and concatenated.
    readout: (h, w), the grid that the taps are resized to.
    """

    taps: list[Tensor]
    mean: Tensor
    variance: Tensor
    readout: tuple[int, int]


def new_heads(channels: int, sigma: float, seeds: Sequence[int]) -> Parameters:
    """Freshly initialised parameters of one head per seed, stacked; sigma is in image px.

    Convolutions start as PyTorch's do (uniform in +-1/sqrt(fan-in)), layer norms as identity, the centre bias's weight
    as 1. A head's parameters are a function of its own seed alone.
    """
    return stack([_new_head(channels, sigma, seed) for seed in seeds])


def _new_head(channels: int, sigma: float, seed: int) -> Parameters:
    generator = torch.Generator().manual_seed(seed)
    parameters = {}
    fan_in = channels
    for layer, width in enumerate(WIDTHS):
        if layer in NORMALISED:
            parameters[f"norm{layer}.weight"] = torch.ones(fan_in)
            parameters[f"norm{layer}.bias"] = torch.zeros(fan_in)
            parameters[f"conv{layer}.bias"] = torch.zeros(width)
        bound = 1 / math.sqrt(fan_in)
        parameters[f"conv{layer}.weight"] = (torch.rand(width, fan_in, generator=generator) * 2 - 1) * bound
        fan_in = width
    # The logarithm keeps the width positive and makes a step of Adam a relative one.
    parameters["log_sigma"] = torch.tensor(math.log(sigma))
    parameters["center_bias_weight"] = torch.tensor(1.0)
    return parameters


def stack(heads: Sequence[Mapping[str, Tensor]]) -> Parameters:
    """K heads' parameters as one bank's."""
    return {name: torch.stack([head[name] for head in heads]) for name in heads[0]}


def select(parameters: Mapping[str, Tensor], heads: Sequence[int] | Tensor) -> Parameters:
    """The bank that holds only the given heads; gradients flow to the original."""
    index = torch.as_tensor(heads, device=parameters["log_sigma"].device)
    return {name: value.index_select(0, index) for name, value in parameters.items()}


def readout(parameters: Mapping[str, Tensor], features: Features) -> Tensor:
    """(K, B, h, w) float32: each head's priority map before smoothing.

    The layer norm over (C, h, w) has an affine per channel and statistics that no head can change, so it folds into the
    first convolution, which is then one matrix product for all K heads on each tap at the tap's own resolution;
    resizing (nearest) afterwards is the same as before, as both are linear.
    """
    heads, images = len(parameters["log_sigma"]), len(features.mean)
    weight_KOC, bias_KO = _folded(parameters, 0)
    scale_B = torch.rsqrt(features.variance + LAYER_NORM_EPS)
    sum_BhwO: Tensor | float = 0.0
    parts = weight_KOC.split([tap.shape[-1] for tap in features.taps], dim=2)
    for tap, part_KOC in zip(features.taps, parts, strict=True):
        sum_BhwO = sum_BhwO + _resize_nearest(F.linear(tap, part_KOC.flatten(0, 1)), features.readout)
    assert isinstance(sum_BhwO, Tensor)
    # (x - mean) * scale, moved behind the convolution.
    centred = sum_BhwO - features.mean[:, None, None, None] * weight_KOC.sum(2).flatten()
    first_BNKO = (centred * scale_B[:, None, None, None]).view(images, -1, heads, WIDTHS[0])
    x_KBNO = F.softplus(first_BNKO.permute(2, 0, 1, 3) + bias_KO[:, None, None, :])
    for layer in NORMALISED[1:WIDE]:
        weight_KOC, bias_KO = _folded(parameters, layer)
        x_KBNO = F.softplus(_convolve(_normalise(x_KBNO), weight_KOC) + bias_KO[:, None, None, :])
    inner_KOC, inner_bias_KO = _folded(parameters, WIDE)
    outer_KOC, outer_bias_KO = _folded(parameters, WIDE + 1)
    wide = _Wide.apply(_normalise(x_KBNO)[..., 0], inner_KOC[..., 0], inner_bias_KO, outer_KOC)
    x_KBNO = F.softplus(wide + outer_bias_KO[:, None, None, :])
    x_KBNO = _convolve(x_KBNO, parameters[f"conv{len(WIDTHS) - 1}.weight"])
    return x_KBNO.view(heads, images, *features.readout)


def _folded(parameters: Mapping[str, Tensor], layer: int) -> tuple[Tensor, Tensor]:
    """A convolution's weight (K, out, in) and bias (K, out) that include the layer norm's affine before it."""
    weight_KOC = parameters[f"conv{layer}.weight"]
    bias_KO = parameters[f"conv{layer}.bias"] + (weight_KOC @ parameters[f"norm{layer}.bias"][:, :, None])[:, :, 0]
    return weight_KOC * parameters[f"norm{layer}.weight"][:, None, :], bias_KO


class _Wide(torch.autograd.Function):
    """layer_norm(softplus(x * a + b)) @ w^T over 1 -> 128 -> 16 channels, where nine tenths of a readout's numbers are.

    x (K, B, N), a and b (K, C), w (K, O, C) -> (K, B, N, O). It works image by image, so that the C channels of one
    stay in the cache, and knows the layer norm's backward pass through the matrix product: the normalised values are
    never written. Equal to the plain composition, which a test holds it against.
    """

    @staticmethod
    def forward(ctx, x_KBN, a_KC, b_KC, w_KOC):
        result, kept = [], []
        for x_KN in x_KBN.unbind(1):
            u_KNC = F.softplus(torch.addcmul(b_KC[:, None], x_KN[:, :, None], a_KC[:, None]))
            mean = u_KNC.mean((1, 2))[:, None, None]
            u_KNC -= mean
            # With the mean gone, a norm is as exact as torch.var and several times faster.
            variance = torch.linalg.vector_norm(u_KNC, dim=(1, 2)).square() / u_KNC[0].numel()
            scale = torch.rsqrt(variance + LAYER_NORM_EPS)[:, None, None]
            result.append(torch.bmm(u_KNC, w_KOC.mT) * scale)
            kept.append((u_KNC, mean, scale))
        output = torch.stack(result, 1)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x_KBN, a_KC, w_KOC, output)
            ctx.kept = kept
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_KBNO):
        x_KBN, a_KC, w_KOC, output_KBNO = ctx.saved_tensors
        sums_KO = w_KOC.sum(2)
        grad_a, grad_b, grad_w = torch.zeros_like(a_KC), torch.zeros_like(a_KC), torch.zeros_like(w_KOC)
        grad_x = []
        for image, (u_KNC, mean, scale) in enumerate(ctx.kept):
            g_KNO = grad_KBNO[:, image].contiguous()
            count = u_KNC[0].numel()
            # Means of the gradient by the normalised values, and of its product with them.
            first = ((g_KNO.sum(1) * sums_KO).sum(1) / count)[:, None, None]
            second = ((g_KNO * output_KBNO[:, image]).sum((1, 2)) / count)[:, None, None]
            grad_w += scale * torch.bmm(g_KNO.mT, u_KNC)
            # Layer norm's backward, then softplus's, whose derivative at its own value u is 1 - exp(-u).
            g_KNC = torch.baddbmm(-scale * first, g_KNO, w_KOC * scale).sub_(u_KNC * (scale * scale * second))
            g_KNC.mul_(1 - torch.exp(-u_KNC - mean))
            grad_a += torch.bmm(x_KBN[:, image, None], g_KNC)[:, 0]
            grad_b += g_KNC.sum(1)
            grad_x.append(torch.bmm(g_KNC, a_KC[:, :, None])[:, :, 0])
        return torch.stack(grad_x, 1), grad_a, grad_b, grad_w


def _normalise(x_KBNC: Tensor) -> Tensor:
    return F.layer_norm(x_KBNC, x_KBNC.shape[2:], eps=LAYER_NORM_EPS)


def _convolve(x_KBNC: Tensor, weight_KOC: Tensor) -> Tensor:
    heads, images, cells, channels = x_KBNC.shape
    if channels == 1:  # an outer product: a matrix product with an inner dimension of one is slower
        return x_KBNC * weight_KOC[:, None, None, :, 0]
    return torch.bmm(x_KBNC.reshape(heads, images * cells, channels), weight_KOC.mT).view(heads, images, cells, -1)


def _resize_nearest(x_BhwC: Tensor, size: tuple[int, int]) -> Tensor:
    if x_BhwC.shape[1:3] == size:
        return x_BhwC
    rows = nearest_index(x_BhwC.shape[1], size[0], x_BhwC.device)
    columns = nearest_index(x_BhwC.shape[2], size[1], x_BhwC.device)
    return x_BhwC.index_select(1, rows).index_select(2, columns)


def nearest_index(source: int, target: int, device: torch.device | str = "cpu") -> Tensor:
    """(target,) int64: which of `source` cells PyTorch's `interpolate(mode="nearest")` takes for each target cell."""
    # Its own float32 arithmetic, which takes the cell before where the quotient is a whole number but for rounding.
    scale = torch.tensor(source, dtype=torch.float32, device=device) / target
    return (torch.arange(target, dtype=torch.float32, device=device) * scale).long().clamp_max(source - 1)


def finalize(parameters: Mapping[str, Tensor], priority_KBhw: Tensor, center_bias_KHW: Tensor, cell: float) -> Tensor:
    """(K, B, H, W) float32: unnormalised log-densities on the density grid.

    The priority map is upsampled (bilinear) and smoothed by the head's Gaussian, both linear and separable, so each is
    `A_y R A_x^T`; the centre bias's log-density is added with the head's weight. `cell` is the grid's cell in image px,
    the unit of sigma.
    """
    sigma_K = parameters["log_sigma"].exp() / cell
    height, width = center_bias_KHW.shape[1:]
    vertical_KHh = _smoothing(sigma_K, height, priority_KBhw.shape[2])
    horizontal_KWw = _smoothing(sigma_K, width, priority_KBhw.shape[3])
    smooth_KBHW = vertical_KHh[:, None] @ (priority_KBhw @ horizontal_KWw.mT[:, None])
    return smooth_KBHW + (parameters["center_bias_weight"][:, None, None] * center_bias_KHW)[:, None]


def _smoothing(sigma_K: Tensor, target: int, source: int) -> Tensor:
    """(K, target, source): bilinear upsampling, a Gaussian cut at ceil(3 sigma), edges replicated (the original)."""
    radius_K = torch.ceil(3 * sigma_K.detach().nan_to_num()).clamp_max(LONGEST_RADIUS)
    radius = int(radius_K.max())
    offset = torch.arange(-radius, radius + 1, device=sigma_K.device)
    kernel_KR = torch.exp(-0.5 * (offset / sigma_K[:, None]) ** 2)
    # A head's kernel ends at its own radius, whatever the widest of its bank is.
    kernel_KR = kernel_KR * (offset.abs() <= radius_K[:, None])
    kernel_KR = kernel_KR / kernel_KR.sum(1, keepdim=True)
    padded = torch.arange(-radius, target + radius, device=sigma_K.device).clamp(0, target - 1)
    windows = bilinear_matrix(source, target, sigma_K.device)[padded].unfold(0, 2 * radius + 1, 1)
    return torch.einsum("kr,tsr->kts", kernel_KR, windows)


def bilinear_matrix(source: int, target: int, device: torch.device | str = "cpu") -> Tensor:
    """(target, source) float32: `interpolate(mode="bilinear", align_corners=False)` along one axis."""
    identity = torch.eye(source, device=device)[:, None]
    return F.interpolate(identity, target, mode="linear", align_corners=False)[:, 0].T.contiguous()


def normalise(log_density: Tensor) -> Tensor:
    """Log-densities (..., H, W) whose logsumexp over the last two axes is 0."""
    return log_density - torch.logsumexp(log_density, (-2, -1), keepdim=True)


def log_mean_exp(log_densities: Tensor, dim: int = 0) -> Tensor:
    """The uniform mixture of log-densities along one axis, in the log domain."""
    return torch.logsumexp(log_densities, dim) - math.log(log_densities.shape[dim])


def upsample(log_density: Tensor, size: tuple[int, int]) -> Tensor:
    """Log-densities (..., H, W) of an image of `size` px, from those on a coarser grid: bilinear, then normalised."""
    shape = log_density.shape
    full = F.interpolate(log_density.reshape(-1, 1, *shape[-2:]), size, mode="bilinear", align_corners=False)
    return normalise(full.view(*shape[:-2], *size))
