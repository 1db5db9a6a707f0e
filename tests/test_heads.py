"""The head bank against a plain head of DeepGaze IIE, written in torch.nn from its description, one head at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acw.features import resize
from acw.features.tensors import Features
from acw.heads import finalizer, readout
from acw.heads.finalizer import Finalizer
from acw.heads.readout import Parameters
from acw.training.bank import Head
from acw.training.dropout import dropped

CHANNELS = (5, 3, 4)
READOUT = (6, 9)
GRID = (23, 31)
CELL = 8.0
# From 2 to 300 image px: the widest kernel is far larger than the grid, the narrowest is one cell.
SIGMAS = (12.0, 300.0, 2.0, 40.0)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def precision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[float]:
    """Runs a test in both precisions, the second, without any table, to tell a wrong formula from rounding.

    Gives the tolerance of each.
    """
    torch.set_default_dtype(request.param)
    if request.param == torch.float64:
        monkeypatch.setattr(readout, "KNOT_STEP", 1e-3)
    yield 2e-4 if request.param == torch.float32 else 1e-9
    torch.set_default_dtype(torch.float32)


def random_bank(seed: int = 0) -> Parameters:
    """Freshly initialised heads, every parameter of which is then moved, each head with its own sigma."""
    bank = readout.new_heads(sum(CHANNELS), 1.0, range(len(SIGMAS)))
    generator = torch.Generator().manual_seed(seed)
    for value in bank.values():
        value += 0.3 * torch.randn(value.shape, generator=generator)
    bank["log_sigma"] = torch.tensor(SIGMAS).log()
    return bank


def random_taps(images: int = 3, seed: int = 1) -> list[Tensor]:
    """Sparse positive features, some finer and some coarser than the readout, as different backbones have them."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((6, 9), (11, 18), (4, 5))
    return [
        (torch.randn(images, *size, channels, generator=generator) + 0.5).relu()
        for size, channels in zip(sizes, CHANNELS, strict=True)
    ]


def features_of(taps: list[Tensor]) -> Features:
    """With statistics by the definition: resize, concatenate, mean and biased variance."""
    resized = concatenated(taps)
    return Features(taps, resized.mean((1, 2, 3)), resized.var((1, 2, 3), unbiased=False), READOUT)


def concatenated(taps: list[Tensor]) -> Tensor:
    return torch.cat([F.interpolate(tap.permute(0, 3, 1, 2), READOUT, mode="nearest") for tap in taps], 1)


def center_bias() -> Tensor:
    v = (torch.arange(GRID[0]) + 0.5) / GRID[0] - 0.5
    u = (torch.arange(GRID[1]) + 0.5) / GRID[1] - 0.5
    return finalizer.normalise(-(v[:, None] ** 2 / 0.08 + u[None] ** 2 / 0.125))


class LayerNorm(nn.Module):
    """Statistics over channels, rows and columns together; affine per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((1, 2, 3), keepdim=True)
        variance = (x - mean).square().mean((1, 2, 3), keepdim=True)
        return (x - mean) / (variance + 1e-12).sqrt() * self.weight[:, None, None] + self.bias[:, None, None]


class PlainHead(nn.Module):
    """Readout and finalizer of one head, in the order of the published description."""

    def __init__(self, one: Parameters) -> None:
        super().__init__()
        widths = (sum(CHANNELS), 8, 16, 1, 128, 16, 1)
        self.norm = nn.ModuleList(LayerNorm(width) for width in widths[:5])
        self.conv = nn.ModuleList(nn.Conv2d(widths[k], widths[k + 1], 1, bias=k < 5) for k in range(6))
        self.log_sigma, self.center_bias_weight = nn.Parameter(torch.tensor(0.0)), nn.Parameter(torch.tensor(0.0))
        own = self.by_name()
        assert own.keys() == one.keys()
        for name, parameter in own.items():
            parameter.data = one[name].detach().clone().view(parameter.shape)

    def by_name(self) -> dict[str, nn.Parameter]:
        """Parameters under the bank's names."""
        return {name.replace("norm.", "norm").replace("conv.", "conv"): p for name, p in self.named_parameters()}

    def forward(self, taps: list[Tensor]) -> tuple[Tensor, Tensor]:
        x = concatenated(taps)
        for norm, conv in zip(self.norm, self.conv[:5], strict=True):
            x = F.softplus(conv(norm(x)))
        priority = self.conv[5](x)
        sigma = self.log_sigma.exp() / CELL
        radius = math.ceil(3 * sigma.item())
        kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
        kernel = kernel / kernel.sum()
        smooth = F.interpolate(priority, GRID, mode="bilinear", align_corners=False)
        smooth = F.conv2d(F.pad(smooth, (0, 0, radius, radius), "replicate"), kernel[None, None, :, None])
        smooth = F.conv2d(F.pad(smooth, (radius, radius, 0, 0), "replicate"), kernel[None, None, None, :])
        score = smooth[:, 0] + self.center_bias_weight * center_bias()
        return priority[:, 0], score - score.logsumexp((1, 2), keepdim=True)


def predict(bank: Parameters, taps: list[Tensor]) -> tuple[Tensor, Tensor]:
    priority = readout.readout(bank, features_of(taps))
    bias = center_bias().expand(len(bank["log_sigma"]), -1, -1)
    return priority, finalizer.normalise(finalizer.finalize(bank, priority, bias, Finalizer(cell=CELL)))


def loss_weights(shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def test_dropout_leaves_out_normalised_channels_and_enlarges_the_rest() -> None:
    bank, taps = random_bank(), random_taps()
    plain_head = Head(fold=1, seed=0, sigma=16, learn_sigma=True, learning_rate=1, weight_decay=0, initial_scale=1)
    members = [dataclasses.replace(plain_head, seed=k, dropout=0.4 * (k > 0)) for k in range(len(SIGMAS))]
    once = dropped(bank, members, 0, 3, 5)
    assert dropped(bank, members[:1], 0, 3, 5) is bank
    assert once["conv0.weight"][0].equal(bank["conv0.weight"][0]), "the first has none"
    kept = (once["conv0.weight"][:, 0] != 0).float()
    assert 0.4 < kept[1:].mean() < 0.8
    assert not kept[1].equal(kept[2]), "each head leaves out others"
    # The same in another bank, and others in the next step.
    assert dropped(readout.select(bank, [2]), members[2:3], 0, 3, 5)["conv0.weight"][0].equal(once["conv0.weight"][2])
    assert not dropped(bank, members, 0, 3, 6)["conv0.weight"].equal(once["conv0.weight"])
    priority = readout.readout(once, features_of(taps))
    for k in range(1, len(SIGMAS)):
        plain = PlainHead(readout.select(bank, [k]))
        first = plain.conv[0]
        plain.conv[0] = nn.Sequential(Channels(kept[k] / 0.6), first)
        torch.testing.assert_close(priority[k], plain(taps)[0], rtol=1e-4, atol=1e-4)


class Channels(nn.Module):
    """Each channel of a map times its factor."""

    def __init__(self, factor_C: Tensor) -> None:
        super().__init__()
        self.factor_C = factor_C

    def forward(self, x_BChw: Tensor) -> Tensor:
        return x_BChw * self.factor_C[:, None, None]


def test_a_bank_equals_plain_heads_in_values_and_gradients(precision: float) -> None:
    bank, taps = random_bank(), random_taps()
    for value in bank.values():
        value.requires_grad_(True)
    priority, log_density = predict(bank, taps)
    weights = loss_weights(log_density.shape)
    (log_density * weights).sum().backward()
    for k in range(len(SIGMAS)):
        plain = PlainHead(readout.select(bank, [k]))
        expected_priority, expected = plain(taps)
        torch.testing.assert_close(priority[k], expected_priority, rtol=precision, atol=precision)
        torch.testing.assert_close(log_density[k], expected, rtol=precision, atol=precision)
        (expected * weights[k]).sum().backward()
        for name, parameter in plain.by_name().items():
            assert parameter.grad is not None
            scale = float(parameter.grad.abs().max())
            actual = bank[name].grad[k].view(parameter.shape)  # type: ignore[index]
            assert scale > 0, name
            torch.testing.assert_close(actual / scale, parameter.grad / scale, rtol=0, atol=10 * precision, msg=name)


def test_a_head_does_not_depend_on_who_shares_its_bank(precision: float) -> None:
    bank, taps = random_bank(), random_taps()
    shared = {name: value.clone().requires_grad_(True) for name, value in bank.items()}
    _, together = predict(shared, taps)
    weights = loss_weights(together.shape)
    (together * weights).sum().backward()
    for k in range(len(SIGMAS)):
        one = {name: value.requires_grad_(True) for name, value in readout.select(bank, [k]).items()}
        _, alone = predict(one, taps)
        (alone[0] * weights[k]).sum().backward()
        torch.testing.assert_close(alone[0], together[k], rtol=precision, atol=precision)
        for name, value in one.items():
            scale = float(value.grad.abs().max())  # type: ignore[union-attr]
            difference = float((value.grad[0] - shared[name].grad[k]).abs().max())  # type: ignore[index]
            assert difference <= 10 * precision * scale, name


def test_a_bank_without_one_of_its_heads_leaves_that_head_without_gradient() -> None:
    bank = {name: value.requires_grad_(True) for name, value in random_bank().items()}
    _, log_density = predict(readout.select(bank, [2, 0]), random_taps())
    (log_density * loss_weights(log_density.shape)).sum().backward()
    for name, value in bank.items():
        assert value.grad is not None
        moved = [bool(gradient.any()) for gradient in value.grad]
        assert moved == [True, False, True, False], name


@pytest.mark.parametrize("spread", [1.0, 6.0])
def test_tabulated_outer_layers_are_the_plain_ones(spread: float) -> None:
    """Values and gradients, for more cells than knots; a head with large weights has more knots, not more error."""
    bank = {name: value * (spread if name.startswith("conv") else 1) for name, value in random_bank().items()}
    generator = torch.Generator().manual_seed(3)
    # A few cells far out, as a readout has them: the layer norm before it takes every map to variance one.
    x_KBN = torch.randn(len(SIGMAS), 3, 4000, generator=generator).mul(0.7).exp()
    x_KBN = F.layer_norm(x_KBN, (4000,))

    def plain(bank: Parameters, x_KBN: Tensor) -> Tensor:
        inner, bias = readout._folded(bank, readout.WIDE)
        outer, outer_bias = readout._folded(bank, readout.WIDE + 1)
        wide = F.softplus(x_KBN[..., None] * inner[:, None, None, :, 0] + bias[:, None, None])
        product = torch.einsum("kbnc,koc->kbno", F.layer_norm(wide, wide.shape[2:], eps=1e-12), outer)
        return torch.einsum("kbno,klo->kbn", F.softplus(product + outer_bias[:, None, None]), bank["conv5.weight"])

    def run(function: Callable[[Parameters, Tensor], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        leaves = {name: value.clone().requires_grad_(True) for name, value in (bank | {"x": x_KBN}).items()}
        result = function(leaves, leaves["x"])
        (result * loss_weights(result.shape)).sum().backward()
        return result.detach(), {name: value.grad for name, value in leaves.items() if value.grad is not None}

    (actual, gradients), (expected, expected_gradients) = run(readout._outer_layers), run(plain)
    assert gradients.keys() == expected_gradients.keys()
    scale = float(expected.std())
    assert float((actual - expected).abs().max()) < 2e-4 * scale
    assert float((actual - expected).abs().mean()) < 1e-5 * scale
    for name, expected_gradient in expected_gradients.items():
        difference = float((gradients[name] - expected_gradient).norm() / expected_gradient.norm())
        assert difference < 1e-3, name


def test_few_cells_are_computed_one_by_one() -> None:
    """Also by a head that has diverged, whose knots would be more than the cells."""
    bank = {name: value * 1e4 if name == "conv3.weight" else value for name, value in random_bank().items()}
    assert readout._outer_layers(bank, torch.randn(len(SIGMAS), 2, 500)).isfinite().all()


def test_float32_is_enough_for_features_of_the_size_that_backbones_have() -> None:
    """The mean is taken off after the first matrix product; with activations near 2000 that must not cost digits."""
    taps = [tap**2 * 200 for tap in random_taps()]
    bank = random_bank()
    single = readout.readout(bank, features_of(taps))
    double = readout.readout({n: v.double() for n, v in bank.items()}, features_of([tap.double() for tap in taps]))
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-4)


def test_fresh_heads_are_functions_of_their_own_seed() -> None:
    together, alone = readout.new_heads(11, 16.0, [5, 6, 7]), readout.new_heads(11, 16.0, [6])
    for name, value in readout.select(together, [1]).items():
        assert value.equal(alone[name]), name
    assert not together["conv0.weight"][0].equal(together["conv0.weight"][1])
    assert together["log_sigma"].exp().tolist() == pytest.approx([16.0] * 3)


def test_nearest_index_is_pytorchs() -> None:
    for source in range(1, 45):
        for target in range(1, 100):
            values = torch.arange(float(source))[None, None]
            expected = F.interpolate(values, target, mode="nearest")[0, 0].long()
            assert resize.nearest_index(source, target).equal(expected), (source, target)


def test_upsample_is_exact_for_cubics_and_normalises() -> None:
    """Up to and including the edges, where the outermost half cell has no neighbour."""

    def cubic(size: tuple[int, int]) -> Tensor:
        y, x = ((torch.arange(length, dtype=torch.float64) + 0.5) / length for length in size)
        values = 8 * y[:, None] ** 3 - 5 * y[:, None] + 3 * x**2 * y[:, None] - 7 * x**3 + 2 * x
        return torch.stack([values, -values]).float()

    full = finalizer.upsample(cubic((9, 12)), (67, 101))
    torch.testing.assert_close(full.logsumexp((-2, -1)), torch.zeros(2), rtol=0, atol=1e-5)
    difference = full - cubic((67, 101))
    torch.testing.assert_close(difference, difference[..., :1, :1].expand_as(full), rtol=0, atol=1e-4)
    flat = finalizer.upsample(torch.zeros(1, 2), (5, 6))
    torch.testing.assert_close(flat, torch.full((5, 6), -math.log(30.0)))


def test_log_mean_exp_averages_densities() -> None:
    log_densities = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0)) - 800  # where exp underflows
    expected = (log_densities.double() + 800).exp().mean(0).log() - 800
    torch.testing.assert_close(finalizer.log_mean_exp(log_densities).double(), expected, rtol=1e-6, atol=1e-6)
