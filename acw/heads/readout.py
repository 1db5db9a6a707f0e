"""Readouts of DeepGaze IIE, as a bank of K heads on one backbone; finalizer.py makes densities of it.

The K heads are stacked parameters `[K, ...]` in a plain dict, so that one pass over a batch's features serves all of
them, and a head's numbers do not depend on who shares its bank. Shape suffixes: K heads, B images, N readout cells,
C channels, h x w a readout grid.

Architecture: Linardos, Kuemmerer, Press, Bethge, "DeepGaze IIE", ICCV 2021, and its published PyTorch code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from acw.features.tensors import Features
from acw.heads.finalizer import resizing

# Output channels of the readout's 1x1 convolutions. All but the last have a bias and a softplus.
WIDTHS = (8, 16, 1, 128, 16, 1)
LAYER_NORM_EPS = 1e-12
# Layers whose input is normalised first: all but the last.
NORMALISED = range(len(WIDTHS) - 1)
# The convolution from one channel to many: its output is most of what a readout computes.
WIDE = 3
# Of the knots at which it is tabulated: change of a channel's argument from one to the next.
KNOT_STEP = 1 / 12
SMALLEST_SLOPE = 1e-2

# Width in image px at which a Gaussian on any grid is the identity.
NO_SMOOTHING = 1e-2

Parameters = dict[str, Tensor]


def new_head(channels: int, sigma: float, initial_scale: float, seed: int) -> Parameters:
    """A freshly initialised head; sigma is in image px, 0 for none. A function of its arguments alone.

    Convolutions start as PyTorch's do (uniform in +-1/sqrt(fan-in)), layer norms as identity, the centre bias's weight
    as 1. `initial_scale` is a factor on the last convolution: the smaller, the nearer to the centre bias it starts.
    """
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
    parameters[f"conv{len(WIDTHS) - 1}.weight"] *= initial_scale
    # The logarithm keeps the width positive and makes a step of Adam a relative one.
    parameters["log_sigma"] = torch.tensor(math.log(sigma or NO_SMOOTHING))
    parameters["center_bias_weight"] = torch.tensor(1.0)
    return parameters


def new_heads(channels: int, sigma: float, seeds: Sequence[int]) -> Parameters:
    """Freshly initialised parameters of one head per seed, stacked."""
    return stack([new_head(channels, sigma, 1.0, seed) for seed in seeds])


def stack(heads: Sequence[Mapping[str, Tensor]]) -> Parameters:
    """K heads' parameters as one bank's."""
    return {name: torch.stack([head[name] for head in heads]) for name in heads[0]}


def concatenate(banks: Sequence[Mapping[str, Tensor]]) -> Parameters:
    """The heads of several banks as one bank's."""
    return {name: torch.cat([bank[name] for bank in banks]) for name in banks[0]}


def select(parameters: Mapping[str, Tensor], heads: Sequence[int] | Tensor) -> Parameters:
    """The bank that holds only the given heads; gradients flow to the original."""
    index = torch.as_tensor(heads, device=parameters["log_sigma"].device)
    return {name: value.index_select(0, index) for name, value in parameters.items()}


def flatten(parameters: Mapping[str, Tensor]) -> Tensor:
    """(K, P): each head's parameters one after the other, in the order of their names."""
    return torch.cat([parameters[name].reshape(len(parameters[name]), -1) for name in sorted(parameters)], 1)


def unflatten(flat_KP: Tensor, like: Mapping[str, Tensor]) -> Parameters:
    """Views of `flatten`'s result as named parameters, of the shapes in `like` (whose heads may be others)."""
    names = sorted(like)
    parts = flat_KP.split([like[name][0].numel() for name in names], 1)
    return {name: part.view(-1, *like[name].shape[1:]) for name, part in zip(names, parts, strict=True)}


def readout(parameters: Mapping[str, Tensor], features: Features) -> Tensor:
    """(K, B, h, w) float32: each head's priority map before smoothing.

    The layer norm over (C, h, w) has an affine per channel and statistics that no head can change, so it folds into the
    first convolution, which is then one matrix product for all K heads on each tap at the tap's own resolution;
    resizing (nearest) afterwards is the same as before, as both are linear. So does what standardises each channel.
    """
    heads, images = len(parameters["log_sigma"]), len(features.mean)
    weight_KOC, bias_KO = _folded(parameters, 0)
    subtracted_BR1 = features.mean[:, None, None] * weight_KOC.sum(2).view(-1, 1)
    if features.standard is not None:
        # (x - m) / s is what is normed: 1 / s goes into the weights, what m adds to the products is taken off again.
        weight_KOC = weight_KOC / features.standard.scale
        subtracted_BR1 = subtracted_BR1 + (weight_KOC @ features.standard.mean).view(-1, 1)
    # R: the channels of all heads. Cells come last, as no later layer mixes heads or images.
    at_sizes: dict[tuple[int, int], Tensor] = {}
    parts = weight_KOC.flatten(0, 1).split([tap.shape[-1] for tap in features.taps], dim=1)
    for tap_BhwC, part_RC in zip(features.taps, parts, strict=True):
        size = (tap_BhwC.shape[1], tap_BhwC.shape[2])
        product_BRN = _Product.apply(part_RC, tap_BhwC.flatten(1, 2))
        at_sizes[size] = at_sizes[size] + product_BRN if size in at_sizes else product_BRN
    sum_BRN = sum(_resize_nearest(each.unflatten(2, size), features.readout) for size, each in at_sizes.items())
    assert isinstance(sum_BRN, Tensor)
    # (x - mean) * scale, moved behind the convolution.
    scale_B11 = torch.rsqrt(features.variance + LAYER_NORM_EPS)[:, None, None]
    x_BRN = _Softplus.apply(sum_BRN * scale_B11 + (bias_KO.view(-1, 1) - scale_B11 * subtracted_BR1))
    x_UCN = x_BRN.view(images * heads, WIDTHS[0], -1)
    for layer in NORMALISED[1:WIDE]:
        x_UCN = _Layer.apply(x_UCN, *_folded(parameters, layer))
    x_KBN = x_UCN.view(images, heads, -1).transpose(0, 1).contiguous()
    return _outer_layers(parameters, _normalise(x_KBN)).view(heads, images, *features.readout)


class _Product(torch.autograd.Function):
    """(B, R, N): weight (R, C) times each image's frozen features (B, N, C).

    One product an image leaves the cells last; the weight's gradient is one product over the cells of all images, which
    is faster than their sum where an image has few.
    """

    @staticmethod
    def forward(ctx, weight_RC, x_BNC):
        ctx.save_for_backward(x_BNC)
        return torch.bmm(weight_RC.expand(len(x_BNC), -1, -1), x_BNC.mT)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient_BRN):
        (x_BNC,) = ctx.saved_tensors
        return gradient_BRN.transpose(0, 1).flatten(1) @ x_BNC.flatten(0, 1), None


class _Layer(torch.autograd.Function):
    """Softplus of a convolution of the layer norm of x (U, C, N), U units of an image and a head, images first.

    weight (K, O, C) and bias (K, O) are `_folded`. The norm folds into the convolution here, too: its own passes over
    all numbers, forward and backward, took longer than the convolution.
    """

    @staticmethod
    def forward(ctx, x_UCN, weight_KOC, bias_KO):
        images, (channels, cells) = len(x_UCN) // len(weight_KOC), x_UCN.shape[1:]
        x_UCN = x_UCN - x_UCN.mean((1, 2), keepdim=True)
        variance_U = torch.linalg.vector_norm(x_UCN, dim=(1, 2)).square() / (channels * cells)
        scale_U11 = torch.rsqrt(variance_U + LAYER_NORM_EPS)[:, None, None]
        weight_UOC = weight_KOC.repeat(images, 1, 1) * scale_U11
        z_UON = torch.baddbmm(bias_KO.repeat(images, 1)[..., None], weight_UOC, x_UCN)
        result, slope = _softplus_and_slope(z_UON)
        ctx.save_for_backward(x_UCN, weight_UOC, scale_U11, slope)
        ctx.heads = len(weight_KOC)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x_UCN, weight_UOC, scale_U11, slope = ctx.saved_tensors
        gradient = gradient * slope
        product_UOC, sum_UO = torch.bmm(gradient, x_UCN.mT), gradient.sum(2)
        to_weight, to_bias = (each.unflatten(0, (-1, ctx.heads)).sum(0) for each in (product_UOC * scale_U11, sum_UO))
        # Through the layer norm: without its mean, and without its part along x.
        mean_U = (weight_UOC.sum(2) * sum_UO).sum(1) / x_UCN[0].numel()
        along_U11 = (product_UOC * weight_UOC).sum((1, 2), keepdim=True) / x_UCN[0].numel() * scale_U11.square()
        to_x = torch.baddbmm(-mean_U[:, None, None], weight_UOC.mT, gradient)
        return to_x.addcmul_(x_UCN, along_U11, value=-1), to_weight, to_bias


def _folded(parameters: Mapping[str, Tensor], layer: int) -> tuple[Tensor, Tensor]:
    """A convolution's weight (K, out, in) and bias (K, out) that include the layer norm's affine before it."""
    weight_KOC = parameters[f"conv{layer}.weight"]
    bias_KO = parameters[f"conv{layer}.bias"] + (weight_KOC @ parameters[f"norm{layer}.bias"][:, :, None])[:, :, 0]
    return weight_KOC * parameters[f"norm{layer}.weight"][:, None, :], bias_KO


def _outer_layers(parameters: Mapping[str, Tensor], x_KBN: Tensor) -> Tensor:
    """(K, B, N): the last three layers, 1 -> 128 -> 16 -> 1, with the layer norm between the first two.

    They hold nine tenths of a readout's numbers, and yet for a head and an image they are a function of one number, x.
    So the 128 channels are computed at knots and not at every cell, and the cells interpolate (polynomials of degree
    5 through six knots; a test bounds the error). Where that would be more work, every cell is computed.
    """
    inner_KC, inner_bias_KC = _folded(parameters, WIDE)
    outer_KOC, outer_bias_KO = _folded(parameters, WIDE + 1)
    inner_KC, last_KO = inner_KC[..., 0], parameters[f"conv{WIDE + 2}.weight"][:, 0]
    cells = x_KBN[0].numel()
    with torch.no_grad():
        low_K, high_K = x_KBN.amin((1, 2)), x_KBN.amax((1, 2))
        # Each head's own knots, whatever the others of its bank need; those beyond its cells are not read.
        step_K = KNOT_STEP / inner_KC.abs().amax(1).clamp_min(SMALLEST_SLOPE)
        # A head that has diverged must not ask for all the memory.
        wanted_K = ((high_K - low_K) / step_K).nan_to_num()
        intervals = min(max(math.ceil(float(wanted_K.amax())), 1), cells)
        knots_KM = low_K[:, None] + step_K[:, None] * torch.arange(-2, intervals + 3, device=low_K.device)
    if knots_KM.shape[1] * (WIDTHS[WIDE] + x_KBN.shape[1] * WIDTHS[WIDE + 1]) >= cells * WIDTHS[WIDE]:
        wide_KBNC = _Softplus.apply(x_KBN[..., None] * inner_KC[:, None, None] + inner_bias_KC[:, None, None])
        y_KBNO = _Softplus.apply(_normalise(wide_KBNC) @ outer_KOC.mT[:, None] + outer_bias_KO[:, None, None])
        return (y_KBNO * last_KO[:, None, None]).sum(3)
    wide_KMC = _Softplus.apply(torch.addcmul(inner_bias_KC[:, None], knots_KM[..., None], inner_KC[:, None]))
    # The layer norm does not see a shift, and moments about a value in the middle are exact in float32.
    middle_K = (wanted_K / 2).long().clamp_max(intervals)
    wide_KMC = wide_KMC - wide_KMC.detach().mean(2).gather(1, middle_K[:, None] + 2)[:, :, None]
    at_cells = _Interpolation(x_KBN, low_K, step_K, intervals)
    moments_K2M = torch.stack([wide_KMC.mean(2), wide_KMC.square().mean(2)], 1)
    mean_KB, square_KB = at_cells(moments_K2M).mean(3).unbind(1)
    scale_KB = torch.rsqrt((square_KB - mean_KB.square()).clamp_min(0) + LAYER_NORM_EPS)
    product_KMO = torch.bmm(wide_KMC, outer_KOC.mT)
    centred_KBMO = product_KMO[:, None] - mean_KB[..., None, None] * outer_KOC.sum(2)[:, None, None]
    y_KBMO = _Softplus.apply(centred_KBMO * scale_KB[..., None, None] + outer_bias_KO[:, None, None])
    return at_cells.of_images(torch.matmul(y_KBMO, last_KO[:, None, :, None])[..., 0])


class _Interpolation:
    """Functions of one number per head, tabulated at knots, at the numbers x (K, B, N) of the cells."""

    def __init__(self, x_KBN: Tensor, low_K: Tensor, step_K: Tensor, intervals: int) -> None:
        self.intervals = intervals
        position = (x_KBN - low_K[:, None, None]) / step_K[:, None, None]
        self.interval = position.detach().nan_to_num().long().clamp_(0, intervals - 1)
        # About the middle of the interval, where powers are smallest.
        self.offset = position - self.interval - 0.5

    def __call__(self, tables_KTM: Tensor) -> Tensor:
        """(K, T, B, N) of T tables a head (K, T, intervals + 5)."""
        heads, tables = tables_KTM.shape[:2]
        first = torch.arange(heads * tables, device=tables_KTM.device).view(heads, tables, 1, 1) * self.intervals
        return self._of(tables_KTM, first + self.interval[:, None], self.offset[:, None])

    def of_images(self, tables_KBM: Tensor) -> Tensor:
        """(K, B, N) of a table an image and head (K, B, intervals + 5)."""
        heads, images = tables_KBM.shape[:2]
        first = torch.arange(heads * images, device=tables_KBM.device).view(heads, images, 1) * self.intervals
        return self._of(tables_KBM, first + self.interval, self.offset)

    @staticmethod
    def _of(tables: Tensor, row: Tensor, offset: Tensor) -> Tensor:
        basis = _lagrange_basis(tables.dtype, tables.device)
        # One product for all tables: of windows that overlap, bmm makes one a table, with a copy of each.
        windows_R6 = tables.unfold(-1, 6, 1).flatten(0, -2)
        return _Polynomials.apply(basis.T @ windows_R6.T, row, offset)


class _Polynomials(torch.autograd.Function):
    """At each place x, the polynomial number `row` of a table (6, R), whose coefficients rise by power.

    PyTorch's own way, an embedding and powers, takes five times as long on a CPU, most of it in the table's gradient.
    """

    @staticmethod
    def forward(ctx, table_6R, row, x):
        at = [one.index_select(0, row.flatten()).view(row.shape) for one in table_6R]
        value, slope = at[5], 5 * at[5]
        for power in range(4, -1, -1):
            value = torch.addcmul(at[power], value, x)
            if power:
                slope = slope.mul_(x).add_(at[power], alpha=power)
        ctx.save_for_backward(row, x, slope)
        ctx.rows = table_6R.shape[1]
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        row, x, slope = ctx.saved_tensors
        powers = [gradient.contiguous()]
        for _ in range(5):
            powers.append(powers[-1] * x)
        if gradient.is_cuda:  # where a sum in no fixed order would give other heads each time
            by_row = torch.ops.aten.embedding_dense_backward(torch.stack(powers, -1), row, ctx.rows, -1, False).T
        else:
            rows = row.flatten().expand(6, -1)
            by_row = gradient.new_zeros(6, ctx.rows).scatter_add_(1, rows, torch.stack(powers).flatten(1))
        return by_row, None, (gradient * slope).sum_to_size(x.shape)


@lru_cache(maxsize=8)
def _lagrange_basis(dtype: torch.dtype, device: torch.device) -> Tensor:
    """(6, 6): from values at -2.5, -1.5, ..., 2.5 to the coefficients of the polynomial through them."""
    nodes = torch.arange(6, dtype=torch.float64) - 2.5
    return torch.linalg.inv(torch.linalg.vander(nodes)).T.to(device, dtype)


def _softplus_and_slope(x: Tensor) -> tuple[Tensor, Tensor]:
    """PyTorch's own takes 6.5 ns a number on a CPU, as log1p is not vectorised, and 10 backward; this takes 3 and 1."""
    if x.is_cuda:
        return F.softplus(x), x.sigmoid()
    # Where exp would overflow, the result is x itself.
    exponential = x.clamp_max(80).exp_()
    above_one = exponential + 1
    slope = exponential.div_(above_one)
    return torch.maximum(above_one.log_(), x, out=above_one), slope


class _Softplus(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        result, slope = _softplus_and_slope(x)
        ctx.save_for_backward(slope)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0]


def _normalise(x_KBNx: Tensor) -> Tensor:
    """The layer norm over cells and, where there are any, channels (K, B, N, C)."""
    return F.layer_norm(x_KBNx, x_KBNx.shape[2:], eps=LAYER_NORM_EPS)


def _resize_nearest(x_BRhw: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, R, cells): as matrix products, whose gradient has a fixed order on every device."""
    if x_BRhw.shape[2:] != size:
        rows, columns = (
            resizing(x_BRhw.shape[2 + axis], size[axis], "nearest", x_BRhw.device).to(x_BRhw.dtype) for axis in (0, 1)
        )
        x_BRhw = rows @ (x_BRhw @ columns.T)
    return x_BRhw.flatten(2)
