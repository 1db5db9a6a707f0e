"""`jobs/predict.py`: every image exactly once, whatever is killed, and each density the model's own."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from job_runs import command
from test_model import folder as folder
from test_model import image
from test_model import model as model
from test_predict import save
from three_nodes import finish, running, wait_for

from acw.model.model import Model
from acw.pipeline import image_list, predict_many
from acw.pipeline.prediction_shards import reduced
from acw.storage.errors import UserError
from acw.storage.files import csv_rows

IMAGES, A_SHARD = 60, 6


def rows(out: Path) -> list[dict]:
    return [row for path in sorted(out.glob("shard-*.parquet")) for row in pq.read_table(path).to_pylist()]


def status(*words: object) -> int:
    try:
        predict_many.main([str(word) for word in words])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@pytest.mark.faults
def test_a_killed_driver_leaves_no_image_out_and_none_twice(model: Model, folder: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    for number in range(IMAGES):
        save(photos / f"{number % 3}" / f"{number:03d}.png", (64, 96) if number % 4 else (60, 48))
    broken = [photos / "0" / "003.png", photos / "2" / "059.png"]
    for path in broken:
        path.write_bytes(path.read_bytes()[:200])
    out = tmp_path / "out"
    line = command("predict", photos, out, "--model", folder, "--shard-images", A_SHARD, "--workers", 1)
    with running(line, tmp_path / "log") as driver:
        wait_for(lambda: len(list(out.glob("shard-*.parquet"))) >= 2, "for two shards")
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    before = {path: path.stat().st_mtime_ns for path in out.glob("shard-*.parquet")}
    assert len(before) < IMAGES // A_SHARD, "else it was killed too late"
    save(photos / "0" / "new.png")  # of which the shards, which are as they were, know nothing

    told = finish(line, tmp_path / "log", status=1)
    assert "images are there" in told
    assert "2 of 60 images could not be predicted" in told
    assert "images/s" in told
    assert before.items() <= {path: path.stat().st_mtime_ns for path in out.glob("shard-*.parquet")}.items()
    table = rows(out)
    expected = sorted(str(path) for path in photos.rglob("*.png") if path.name != "new.png")
    assert sorted(row["image"] for row in table) == expected
    failed = {row["image"]: row["error"] for row in table if row["error"]}
    assert sorted(failed) == sorted(map(str, broken))
    assert {row["image"]: row["error"] for row in csv_rows(out / "failures.csv")} == failed
    for row in [row for row in table if not row["error"]][::7]:
        prediction = model.predict(row["image"])
        assert (row["height"], row["width"]) == prediction.log_density.shape
        grid = (row["grid_height"], row["grid_width"])
        assert grid == model.finalizer.grid(prediction.log_density.shape)
        expected_density = reduced(prediction.log_density, grid).ravel().astype(float)
        np.testing.assert_allclose(np.array(row["log_density"], float), expected_density, atol=0.01)
        assert row["categories"] == pytest.approx(prediction.categories, abs=1e-4)
        assert row["category"] == max(prediction.categories, key=prediction.categories.__getitem__)
        assert row["places"][0]["share"] == pytest.approx(prediction.places()[0].share, abs=1e-3)


def test_a_list_gives_maps_and_failed_ones_are_tried_again(
    model: Model, folder: Path, tmp_path: Path, ray_local: None, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = [save(tmp_path / name, (40, 50)) for name in ("a.png", "b.png", "sub/a.png")]
    late = tmp_path / "late.png"
    (tmp_path / "list.txt").write_text("\n".join([*map(str, photos), "", f"{late}\r"]), encoding="utf-8")
    words = (tmp_path / "list.txt", tmp_path / "out", "--model", folder, "--format", "npy", "--shard-images", 2)
    words += ("--category", "Zoo")
    assert status(*words) == 1
    assert (
        f"error: 1 of 4 images could not be predicted: {tmp_path / 'out' / 'failures.csv'}" in capsys.readouterr().err
    )
    assert [row["error"] is None for row in rows(tmp_path / "out")] == [True, True, True, False]
    save(late, (40, 50))
    assert status(*words) == 1, "what is there is not done again unasked"
    assert status(*words, "--retry-failed") == 0
    table = rows(tmp_path / "out")
    assert [row["image"] for row in table] == [*map(str, photos), str(late)]
    for row in table:
        expected = model.predict(row["image"], "Zoo").log_density
        np.testing.assert_allclose(np.load(tmp_path / "out" / row["file"]), expected, atol=1e-4)
    assert len({row["file"] for row in table}) == 4
    assert (tmp_path / "out" / "failures.csv").read_text(encoding="utf-8") == "image,error\n"
    with pytest.raises(UserError, match=r"has predictions with another category \(Zoo, not Art\)"):
        status(*words, "--category", "Art")
    with pytest.raises(UserError, match="unknown category 'street'"):
        status(tmp_path / "list.txt", tmp_path / "other", "--model", folder, "--category", "street")


def test_what_cannot_be_meant_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for words, line in (
        ((tmp_path / "empty", tmp_path / "out", "--model", folder), "empty: there is no image in it"),
        ((tmp_path / "nowhere", tmp_path / "out", "--model", folder), "nowhere: cannot be read"),
        ((save(tmp_path / "a.png"), tmp_path / "out", "--model", folder), "is no list in UTF-8"),
        ((tmp_path / "empty", tmp_path / "out", "--model", tmp_path), "no model here"),
        ((tmp_path / "empty", tmp_path / "out", "--model", folder, "--shard-images", 0), "give at least 1"),
    ):
        with pytest.raises(UserError, match=line):
            status(*words)
    assert not list(tmp_path.glob("out/shard-*"))


NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\0/"), min_size=1, max_size=9)


@settings(max_examples=30, deadline=None)
@given(names=st.lists(NAMES, min_size=1, max_size=20), size=st.integers(1, 7))
def test_shards_are_the_list(names: Sequence[str], size: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("list")
    images = [f"/p/{name}.jpg" for name in names]
    (folder / "given").write_bytes("\r\n".join(images).encode())
    image_list.write(str(folder / "given"), folder / "list")
    shards = image_list.shards(folder / "list", size)
    assert [shard.number for shard in shards] == list(range(-(-len(images) // size)))
    assert [one for shard in shards for one in image_list.images_of(folder / "list", shard)] == images


def test_a_reduced_density_keeps_the_mass_of_each_cell() -> None:
    log_density = image(48, 64)[..., 0] / 20.0
    log_density = (log_density - np.log(np.exp(log_density).sum())).astype(np.float32)
    values = reduced(log_density, (6, 8)).astype(float)
    assert values.max() == 0
    mass = np.exp(values) / np.exp(values).sum()
    expected = np.exp(log_density.astype(float)).reshape(6, 8, 8, 8).sum((1, 3))
    np.testing.assert_allclose(mass, expected, rtol=3e-3)
