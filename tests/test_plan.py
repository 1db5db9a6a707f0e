"""The plan: its figures are those of the real thing, and it writes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from job_runs import displays

from acw import cli
from acw.features.batch_size import Pace
from acw.features.extraction import write_shards
from acw.features.store import SHARD_IMAGES, shard_path
from acw.pipeline import plan, plan_command
from acw.pipeline.job import job_of, read_options
from acw.storage.errors import UserError


def options(folder: Path, *more: str) -> list[str]:
    tiny = ("demo", "--backbones", "lite0,lite1", "--weights", "lite0=random,lite1=random", "--seeds", "1")
    return [*tiny, "--folds", "2", "--root", str(folder / "root"), *displays(folder, ("Size", "Text"), 10), *more]


def test_a_plan_counts_what_a_run_would_make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "SECONDS_A_BACKBONE", 0.3)
    job = job_of(read_options(options(tmp_path), "", plan_command.add_options), writes=False)
    made = plan.make(job)
    assert not (tmp_path / "root").exists()
    assert (made.images, made.held_out, made.sizes) == (20, len(job.split.held_out), 2)
    from acw.features.backbone import load_backbone

    for backbone, planned in zip(job.recipe.backbone_values, made.backbones, strict=True):
        network = load_backbone(backbone)
        folder = tmp_path / backbone.name
        write_shards(network, backbone, job.dataset.stimuli, [0], folder, Pace(network.device))
        real = shard_path(folder, 0).stat().st_size / SHARD_IMAGES
        assert planned.image_bytes == pytest.approx(real, rel=0.05)
        assert planned.extraction > 0
        assert planned.epoch > 0
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


def test_the_command_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no command 'plam'; commands are run, search"):
        cli._command(["plam"])
    with pytest.raises(UserError, match="no recipe 'gase'"):
        cli._command(["plan", "gase"])
    with pytest.raises(UserError, match="'price_per_hour' must be 0 or more, not -1"):
        cli._command(["plan", *options(tmp_path), "--price-per-hour", "-1"])
