"""The plan: its figures are those of the real thing, and it writes nothing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from job_runs import displays

from acw import cli
from acw.cluster import costs
from acw.features.batch_size import Pace
from acw.features.extraction import write_shards
from acw.features.store import SHARD_IMAGES, shard_path
from acw.features.zoo import BACKBONE_SETS
from acw.pipeline import plan, plan_command, plan_hardware
from acw.pipeline.job import job_of, read_options
from acw.storage.errors import UserError
from acw.storage.files import write_json
from acw.training.bank import BankState, checkpoint_path, plan_banks


def options(folder: Path, *more: str) -> list[str]:
    tiny = ("demo", "--backbones", "lite0,lite1", "--weights", "lite0=random,lite1=random", "--seeds", "1")
    return [*tiny, "--folds", "2", "--root", str(folder / "root"), *displays(folder, ("Contour", "Text"), 10), *more]


def test_a_plan_counts_what_a_run_would_make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "SECONDS_A_BACKBONE", 0.3)
    job = job_of(read_options(options(tmp_path), "", plan_command.add_options), writes=False)
    made = plan.make(job)
    assert not (tmp_path / "root").exists()
    assert (made.images, made.held_out, made.sizes) == (20, len(job.split.held_out), 2)
    assert made.epochs.keys() == set(job.recipe.backbones)
    assert all(seconds > 0 for seconds in made.epochs.values())
    from acw.features.backbone import load_backbone

    for backbone, planned in zip(job.recipe.backbone_values, made.backbones, strict=True):
        network = load_backbone(backbone)
        folder = tmp_path / backbone.name
        write_shards(network, backbone, job.dataset.stimuli, [0], folder, Pace(network.device))
        real = shard_path(folder, 0).stat().st_size / SHARD_IMAGES
        assert planned.image_bytes == pytest.approx(real, rel=0.05)
        assert planned.extraction > 0
        assert not planned.stored
    # Two banks: more cores than that would have nothing to do, and together they cannot be twice as fast.
    one, two = (made.seconds(cores) for cores in (1, 2))
    assert one["heads"] > two["heads"] > one["heads"] / 2
    assert [row[0] for row in made.table(1.5)] == [1, 2]
    for cores, expected, most, cost in made.table(1.5):
        assert most >= expected
        assert cost == pytest.approx(expected / 3600 * cores * 1.5)
    shown = plan.text(made, 1.5)
    assert "20 images" in shown
    assert "to be computed" in shown
    assert "no run with lite0, lite1 under" in shown


def test_a_plan_goes_by_what_earlier_runs_have_measured(tmp_path: Path) -> None:
    job = job_of(read_options(options(tmp_path), "", plan_command.add_options), writes=False)

    def leave(name: str, seconds: float, device: str = "cpu", dataset: str = "another", **fields: object) -> None:
        recipe = dataclasses.replace(job.recipe, **fields)  # type: ignore[arg-type]
        folder = job.root / name
        for bank in plan_banks(recipe):
            state = BankState.new(recipe, bank, 4)
            entry = {"seconds": seconds, "peak_rss": 2**30, "device": device, "ig": [1.0, None]}
            state.history = [entry | {"head_images_per_second": 20 / seconds}]  # one head, 20 images
            state.save(checkpoint_path(folder, bank))
        facts = job.dataset.summary() | {"fingerprint": dataset}
        write_json(folder / "recipe.json", {"recipe": dataclasses.asdict(recipe), "dataset": facts})
        cost = dataclasses.asdict(costs.Cost(10.0, 40, 2**30)) | {"cores": 4}
        write_json(folder / costs.FILE, {"features": cost, "scores": cost | {"images": 8}})

    def measured() -> plan.Measured:
        return plan.measured(job.root, job.recipe, job.dataset)

    head = 20 * (plan.OTHER_HEADS + 1)
    assert measured() == plan.Measured(0.0, {}, 0.0, 0.0, 0)
    leave("on GPUs", 1.0, "cuda:0", backbones=("lite1",))
    leave("of another grid", 1.0, density_cell=4.0)
    leave("with another input", 1.0, long_side=64)
    assert measured() == plan.Measured(0.0, {}, 0.0, 0.0, 0)
    leave("of one backbone", 30.0, backbones=("lite1",))
    assert measured() == plan.Measured(0.0, {"lite1": pytest.approx(30 / head)}, 0.0, 0.0, 2**30)
    leave("of both", 10.0)
    assert measured().heads == {"lite0": pytest.approx(10 / head), "lite1": pytest.approx(20 / head)}, "means"
    assert measured().features == pytest.approx(10 * 4 / 20), "of both backbones together"
    assert measured().scoring == 0.0, "other images"
    leave("of this data set", 50.0, dataset=job.dataset.fingerprint, workers=2)
    assert measured().heads == {"lite0": pytest.approx(50 / head), "lite1": pytest.approx(50 / head)}
    assert measured().scoring == pytest.approx(10 * 2 / 8), "two cores, as there were no more workers"


def test_the_command_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no command 'plam'; commands are run, search"):
        cli._command(["plam"])
    with pytest.raises(UserError, match="no recipe 'gase'"):
        cli._command(["plan", "gase"])
    with pytest.raises(UserError, match="'price_per_hour' must be 0 or more, not -1"):
        cli._command(["plan", *options(tmp_path), "--price-per-hour", "-1"])


def hardware(folder: Path, **changes: object) -> Path:
    """A results file of benchmarks/gpu.py with round figures; changes: of its figures, None to leave one out."""
    figures: dict[str, object] = {
        "tiny": False,
        "image, px": "1920x1080",
        "copies from the host, GB/s": 10.0,
        "scores, all eight of 25 mixtures, one core, s an image": 1.6,
        "heads at 34x60, peak memory, GiB": 3.0,
    }
    for name in BACKBONE_SETS["paper"]:
        figures |= {f"bank of 15 heads, {name}, {readout}, ms an image": ms for readout, ms in
                    (("8x15", 1.0), ("34x60", 2.0))}  # fmt: skip
        extraction = {"images/s": 100.0, "channels": 2000, "MB an image": 6.0, "peak memory, GiB": 2.0}
        figures |= {f"extraction, {name}, {what}": value for what, value in extraction.items()}
    figures = {name: value for name, value in (figures | changes).items() if value is not None}
    file = folder / "results.json"
    write_json(file, {"machine": {"gpu": "A Card", "cores": 32, "gpus": 4}, "figures": figures})
    return file


def test_a_plan_by_a_gpus_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, figures = hardware(tmp_path), tmp_path / "plan.json"
    command = ["plan", "cat2000", "--hardware", str(file), "--price-per-hour", "1.5", "--root", str(tmp_path / "root")]
    cli._command([*command, "--json", str(figures)])
    shown = capsys.readouterr().out
    made = json.loads(figures.read_text(encoding="utf-8"))
    one, four = made["seconds"]["1"], made["seconds"]["4"]
    assert one["features"] == pytest.approx(2000 * 4 / 100 + plan.START_UP / 2)
    # 15 heads for 1,600 images and at most 20 epochs, of which heads need a part.
    bank = 1600 * 20 * 2.0e-3 * plan_hardware.BESIDES_STEPS
    bank *= (plan.OTHER_HEADS + plan.EXPECTED_SHARE * 15) / (plan.OTHER_HEADS + 15)
    assert one["heads"] == pytest.approx(4 * bank + plan.START_UP / 2)
    assert four["heads"] == pytest.approx(bank + plan.START_UP / 2)
    assert one["scores"] == pytest.approx(400 * 1.6 / 8 + plan.FINISHING)
    assert made["worker_bytes"] == 3 * 2**30
    # GPUs; features, heads, scores, in all, at most, each with its unit; cost.
    row = next(line for line in shown.splitlines() if line.split()[:1] == ["1"]).split()
    hours, most, dollars = float(row[7]), float(row[9]), float(row[11])
    assert hours == pytest.approx(sum(one.values()) / 3600, abs=0.006)
    assert most > hours
    assert dollars == pytest.approx(sum(one.values()) / 3600 * 1.5, abs=0.006)
    assert "cat2000: 2000 images of 1 sizes, 400 held out" in shown
    assert "time on so many GPUs, by what was measured on A Card; nothing was run there" in shown


def test_a_gpus_figures_are_scaled_to_the_images(tmp_path: Path) -> None:
    results = plan_hardware.Results.read(hardware(tmp_path))
    small = ["cat2000", "--root", str(tmp_path / "root"), *displays(tmp_path, ("Contour", "Text"), 10)]
    job = job_of(read_options(small, "", plan_command.add_options), writes=False)
    made = plan_hardware.make(job, results, dataset_given=True)
    assert made.images == 20
    pixels = np.mean([np.prod(stimulus.size) for stimulus in job.dataset.stimuli])
    share = pixels / (1080 * 1920)
    assert made.backbones[0].extraction == pytest.approx(share / 100, rel=0.02)
    assert made.backbones[0].image_bytes == pytest.approx(share * 6e6, rel=0.02)
    assert made.scoring == pytest.approx(share * 1.6 / 8)
    assert 1.0e-3 <= made.epochs["densenet201"] / plan_hardware.BESIDES_STEPS <= 2.0e-3
    slow = plan_hardware.Results.read(hardware(tmp_path, **{"copies from the host, GB/s": 1e-3}))
    read = plan_hardware.make(job, slow, dataset_given=True).epochs["densenet201"]
    assert read == pytest.approx(made.backbones[0].image_bytes / 1e6), "the features' way there takes longer"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        ("{", "is damaged"),
        ("[1]", "holds no results of benchmarks/gpu.py"),
        ('{"machine": {"gpu": null}, "figures": {"60 heads, ms an image": 13}}', "holds no results"),
        ({"tiny": True}, "was measured at tiny sizes"),
        ({"extraction, densenet201, images/s": None}, "says nothing of 'extraction, densenet201, images/s'"),
        ({"extraction, densenet201, images/s": "many"}, "says nothing of 'extraction, densenet201"),
        ({"extraction, densenet201, images/s": 0}, "says nothing of 'extraction, densenet201"),
    ],
)
def test_a_wrong_results_file_is_one_line(tmp_path: Path, content: object, said: str) -> None:
    file = hardware(tmp_path, **content) if isinstance(content, dict) else tmp_path / "other.json"
    if isinstance(content, str):
        file.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=said) as error:
        cli._command(["plan", "cat2000", "--hardware", str(file), "--root", str(tmp_path / "root")])
    assert "\n" not in str(error.value)
    assert "python benchmarks/gpu.py --json FILE" in str(error.value)


def test_a_plan_for_what_was_not_measured_on_a_gpu(tmp_path: Path) -> None:
    command = ["--hardware", str(hardware(tmp_path)), "--root", str(tmp_path / "root")]
    with pytest.raises(UserError, match=r"has no heads on lite0, lite1, .*only on the networks of the papers"):
        cli._command(["plan", "gaze_small", *command])
    with pytest.raises(UserError, match="trains jointly, of which nothing was measured"):
        cli._command(["plan", "acw_v1", "--backbones", "paper", *command])
