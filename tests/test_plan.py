"""The plan: its figures are those of the real thing, and it writes nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from job_runs import displays

from acw import cli
from acw.cluster import costs
from acw.features.batch_size import Pace
from acw.features.extraction import write_shards
from acw.features.store import SHARD_IMAGES, shard_path
from acw.pipeline import plan, plan_command
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
