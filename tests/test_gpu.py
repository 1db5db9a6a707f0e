"""GPUs, real or pretended: benchmarks/gpu.py at tiny sizes, on the CPU where there is none, and workers on a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import BANK, RECIPE, make_store, make_training_set

from acw import cli
from acw.storage.errors import UserError
from acw.training import trainer
from acw.training.bank import BankState
from acw.training.loss import image_loss
from acw.training.trainer import train_epochs

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
# As if these were not installed, also for a library that asks whether they are: a machine with a GPU may lack them.
WITHOUT = """
import runpy, sys
from importlib.machinery import PathFinder

ABSENT = "ray mlflow boto3 botocore pysaliency h5py pandas pyarrow matplotlib sklearn onnx onnxruntime".split()

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in ABSENT else super().find_spec(name, path, target)

sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
for name in ABSENT:
    try:
        __import__(name)
    except ImportError:
        continue
    sys.exit(f"{name} is there")
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("gpu") / "results.json"
    command = [sys.executable, "-c", WITHOUT, str(BENCHMARKS / "gpu.py"), "--tiny", "1", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(file.read_text(encoding="utf-8"))


def test_device_and_cpu_compute_the_same(results: dict[str, Any]) -> None:
    figures = results["figures"]
    assert figures["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    differences = {name: value for name, value in figures.items() if name.endswith("device against CPU, float32")}
    bits = {name: value for name, value in figures.items() if name.endswith("two runs equal to the last bit")}
    sections = ("training, 15 heads", "extraction, resnext50_32x4d", "extraction, dinov2_s", "prediction", "scores")
    for what in sections:
        assert any(name.startswith(what) for name in differences), what
        assert any(name.startswith(what) for name in bits), what
    assert max(differences.values()) <= 1e-4
    assert set(bits.values()) == {True}
    assert figures["failures"] == figures["left out"] == []


def test_every_figure_is_there(results: dict[str, Any]) -> None:
    rates = [f"matrix products, {dtype}, TFLOP/s" for dtype in ("float32", "bfloat16")]
    rates += [f"copies {what}, GB/s" for what in ("on the device", "from the host", "from page-locked memory")]
    networks = [
        f"extraction, {name}, {what}"
        for name in ("resnext50_32x4d", "dinov2_s")
        for what in ("images/s", "the bare network, images/s", "share of the bare network", "MB an image", "channels")
    ]
    heads = [
        f"15 heads, {readout}, {what}"
        for readout in ("8x15", "34x60")
        for what in ("ms an image", "heads x images a second", "share of what binds")
    ]
    predictions = [f"prediction, 2 heads, {size}, images/s" for size in ("80x64", "128x96")]
    scores = [f"scores, {what} of 25 mixtures, {where}, s an image" for what, where in
              (("all eight", "one core"), ("seven", "the device"))]  # fmt: skip
    memory = [f"{section}, peak memory, GiB" for section in ("heads at 34x60", "extraction, dinov2_s", "prediction")]
    for name in (*rates, *networks, *heads, *predictions, *scores, *memory):
        assert results["figures"][name] > 0, name
    for readout in ("8x15", "34x60"):
        assert results["figures"][f"15 heads, {readout}, what binds"] in ("matrix products", "copies")
    assert "extraction, dinov2_s: bfloat16 against float32" in results["figures"]


def test_a_plan_is_made_of_them(results: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.json"
    command = ["plan", "cat2000", "--backbones", "resnext50_32x4d", "--hardware", str(file), "--root", str(tmp_path)]
    file.write_text(json.dumps(results), encoding="utf-8")
    with pytest.raises(UserError, match="was measured at tiny sizes"):
        cli._command(command)
    as_on_a_gpu = {"machine": results["machine"] | {"gpu": "A Card"}, "figures": results["figures"] | {"tiny": False}}
    file.write_text(json.dumps(as_on_a_gpu), encoding="utf-8")
    cli._command(command)
    assert "what was measured on A Card" in capsys.readouterr().out


def test_what_does_not_hold_is_kept_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import device

    bench = device.Bench(torch.device("cpu"), device.TINY, [])
    one = torch.ones(3)
    assert bench.equal("fine", 1e-5) == {"fine: device against CPU, float32": 1e-5}
    assert bench.same("fine", [one], [one.clone()]) == {"fine: two runs equal to the last bit": True}
    assert bench.failures == []
    bench.equal("far", 2e-4)
    bench.equal("nothing", float("nan"))
    bench.same("by a bit", [one], [torch.nextafter(one, one + 1)])

    def no_memory() -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 1 GiB")

    assert bench.section("large", no_memory).keys() == {"large, peak memory, GiB", "large, benchmark's seconds"}
    assert bench.failures == [
        "far: device and CPU differ by 0.0002, more than 0.0001",
        "nothing: device and CPU differ by nan, more than 0.0001",
        "by a bit: two runs on the device differ",
        "large: OutOfMemoryError: CUDA out of memory. Tried to allocate 1 GiB",
    ]


# --- Workers -----------------------------------------------------------------------------------------------------

# Ray takes a GPU's word for it: with no CUDA device behind it, tasks compute on the CPU.
EXTRACTION = """
import dataclasses, sys
from pathlib import Path
import ray
from acw.cluster.allocation import allocate
from acw.data import load_dataset
from acw.features.batch_size import Pace
from acw.features.extraction import extract, write_shards
from acw.features.backbone import load_backbone
from acw.features.zoo import BACKBONES

root = Path(sys.argv[1])
stimuli = load_dataset("synthetic").stimuli[:20]
backbone = dataclasses.replace(BACKBONES["lite0"].of_long_side(64), weights="random")
ray.init("local", num_cpus=2, num_gpus=1, include_dashboard=False, object_store_memory=200 * 2**20)
print(allocate(2, 0, "auto", 0.5))
stores, cost = extract(root, [backbone], stimuli, "fingerprint", 0, "gpu", 0.5)
ray.shutdown()
assert cost.images == 20, cost
network = load_backbone(backbone)
(root / "alone").mkdir()
write_shards(network, backbone, stimuli, [0, 1], root / "alone", Pace(network.device))
for shard in ("shard-00000.safetensors", "shard-00001.safetensors"):
    assert (stores["lite0"].folder / shard).read_bytes() == (root / "alone" / shard).read_bytes(), shard
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU rounds otherwise")
def test_extraction_on_halves_of_a_gpu(tmp_path: Path) -> None:
    command = [sys.executable, "-c", EXTRACTION, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 workers of 1 CPU and 0.5 GPU" in done.stdout


def test_a_bank_too_large_for_the_gpu_takes_fewer_images_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = make_store(tmp_path / "features")

    def trained(name: str) -> BankState:
        states = train_epochs(RECIPE, BANK, make_training_set(), store, tmp_path / name, torch.device("cpu"))
        *_, last = states
        return last

    def room_for(images: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def loss(log_likelihood: torch.Tensor) -> torch.Tensor:
            if log_likelihood.shape[1] > images:
                raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 1 GiB")
            return image_loss(log_likelihood)

        return loss

    plain = trained("plain")
    monkeypatch.setattr(trainer, "image_loss", room_for(1))
    in_parts = trained("in_parts")
    told = [line for line in capsys.readouterr().out.splitlines() if "do not fit" in line]
    assert [line.partition("with up to ")[2] for line in told] == [
        f"{before} images at once; the epoch begins again with {after}"
        for before, after in ((16, 8), (8, 4), (4, 2), (2, 1))
    ]
    assert (in_parts.best_ig - plain.best_ig).abs().max() < 1e-4
    for name, value in plain.parameters.items():
        assert torch.allclose(in_parts.parameters[name], value, atol=1e-4), name
    monkeypatch.setattr(trainer, "image_loss", room_for(0))
    with pytest.raises(UserError, match=r"15 heads on stub do not fit .* memory of cpu; .*gpus-per-worker") as error:
        trained("nowhere")
    assert "\n" not in str(error.value)
