"""`acw adapt`: a kind of images that people look at in another way becomes a category more, and the others stay."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from test_model import CATEGORIES, image
from test_model import folder as folder
from test_model import model as model

import acw
from acw.fusion import classifier
from acw.fusion.adaptation import GRID, Adaptation
from acw.model.model import Model
from acw.pipeline import adapt
from acw.storage.errors import UserError

SIZES = ((75, 101), (64, 96), (90, 90))
FIXATIONS = 60


def pictures(count: int, first: int = 0) -> list[np.ndarray]:
    """Noise in patches of a brightness and a place of their own."""
    result = []
    for number in range(first, first + count):
        generator = np.random.default_rng(number)
        height, width = SIZES[number % len(SIZES)]
        pixels = image(height, width) // 4
        for _ in range(3):
            top, left = int(generator.integers(height - 20)), int(generator.integers(width - 20))
            pixels[top : top + 20, left : left + 20] += generator.integers(60, 190, 3, dtype=np.uint8)
        result.append(pixels)
    return result


def numbers(model: Model) -> Adaptation:
    """How people look at another kind of images: less at what heads expect, and in the lower half."""
    own = np.repeat(np.linspace(-1.5, 1.5, GRID[0])[:, None], GRID[1], 1).astype(np.float32)
    plain = Adaptation.none(np.tile(model.global_weights, (2, 1)))
    return Adaptation(
        np.array([[0.9, 0.1], [0.5, 0.5]]), plain.kernels, np.array([0.6, 1]), np.array([0.2, 0]), np.array([1.0, 0]),
        own[None],
    )  # fmt: skip


def truth(model: Model, pixels: np.ndarray, differs: bool) -> np.ndarray:
    """(H, W) log-density of where people look: as the model says, or otherwise."""
    if not differs:
        return model.predict(pixels).log_density
    log_densities, _ = model.component_log_densities(pixels)
    return model.adapted(log_densities, numbers(model).row(0), pixels.shape[:2]).numpy()


def write(model: Model, folder: Path, count: int, differs: bool, categories: int = 1) -> list[str]:
    """A folder of images with fixations drawn from `truth`; what the command takes for it."""
    folder.mkdir()
    generator, lines = np.random.default_rng(1), ["image,x,y,category"]
    for number, pixels in enumerate(pictures(count)):
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
        p = np.exp(truth(model, pixels, differs).astype(np.float64)).ravel()
        places = generator.choice(len(p), FIXATIONS, p=p / p.sum())
        width = pixels.shape[1]
        lines += [f"{number:02d}.png,{at % width},{at // width},kind {number % categories}" for at in places]
    (folder / "fixations.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [str(folder), "--fixations", str(folder / "fixations.csv")]


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "acw.cli", "adapt", *map(str, words)]


class Run(NamedTuple):
    root: Path
    out: Path
    result: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def run(model: Model, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The command on images that differ, killed as it writes and given again."""
    base = tmp_path_factory.mktemp("study")
    root, out = base / "runs", base / "my study"
    words = [folder.parent, *write(model, base / "odd", 12, True), "--root", root, "--out", out]
    with subprocess.Popen(command(*words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not list(base.glob(".my study.*.partial/*")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    return Run(root, out, subprocess.run(command(*words), capture_output=True, encoding="utf-8"))


def test_a_kind_that_differs_becomes_a_category(run: Run, model: Model) -> None:
    assert run.result.returncode == 0, run.result.stderr
    *_, last = run.result.stdout.splitlines()
    assert last == str(run.out)
    assert re.search(r"odd: \+.*own centre bias 0\.", run.result.stdout)
    adapted = acw.load(run.out)
    assert adapted.categories == [*CATEGORIES, "odd"]
    recorded = json.loads((run.out / "adaptation.json").read_text(encoding="utf-8"))["categories"]["odd"]
    gained, possible = [], []
    for pixels in pictures(12, first=40):
        best, before = truth(model, pixels, True), model.predict(pixels).log_density
        now = adapted.predict(pixels, "odd").log_density
        p = np.exp(best.astype(np.float64))
        gained.append((p * (now - before)).sum() / np.log(2))
        possible.append((p * (best - before)).sum() / np.log(2))
    # Of 12 images with 60 fixations each, the numbers find .88 of what is to be had; told is 6 % more than they find.
    assert np.mean(gained) > 0.75 * np.mean(possible), (gained, possible)
    assert recorded["gain_bits"] == pytest.approx(np.mean(gained), rel=0.25)


def test_what_was_known_stays_to_the_bit(run: Run, folder: Path) -> None:
    before, after = acw.load(folder), acw.load(run.out)
    for pixels in pictures(2, first=60):
        for category in CATEGORIES:
            old, new = before.predict(pixels, category), after.predict(pixels, category)
            np.testing.assert_array_equal(new.log_density, old.log_density)
            assert new.weights == old.weights
        odds = [np.divide(*(p.categories[name] for name in CATEGORIES[:2])) for p in (old, new)]
        assert odds[1] == pytest.approx(odds[0]), "between old categories nothing changes"


def test_it_is_a_registered_version(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    load = "import acw, sys; print(acw.load('models:/acw@challenger').categories)"
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{run.root / 'mlflow.db'}"}
    told = subprocess.run([sys.executable, "-c", load], capture_output=True, encoding="utf-8", env=environment)
    assert told.stdout.splitlines()[-1:] == [str([*CATEGORIES, "odd"])], told.stderr


def test_what_does_not_gain_is_refused(
    run: Run, model: Model, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*write(model, tmp_path / "same", 12, False), "--root", str(run.root), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        adapt.main([str(folder), *words])
    assert ended.value.code == 1
    assert "same: not adopted: " in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_store_that_fails_leaves_nothing(run: Run, model: Model, folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    root.mkdir()
    (root / "mlflow.db").write_bytes((run.root / "mlflow.db").read_bytes())
    with_artifacts_elsewhere = [*write(model, tmp_path / "odd", 12, True), "--root", str(root)]
    (run.root / "mlartifacts").rename(run.root / "gone")
    (run.root / "mlartifacts").write_text("no folder", encoding="utf-8")
    try:
        with pytest.raises((UserError, OSError)):
            adapt.main([str(folder), *with_artifacts_elsewhere])
    finally:
        (run.root / "mlartifacts").unlink()
        (run.root / "gone").rename(run.root / "mlartifacts")
    assert [path.name for path in root.iterdir() if "adapted" in path.name] == []


def test_what_cannot_be_adapted_to_is_one_line(model: Model, folder: Path, tmp_path: Path, run: Run) -> None:
    few = write(model, tmp_path / "few", 9, True)
    with pytest.raises(UserError, match="'few' has 9 images, and 10 are the fewest"):
        adapt.main([str(folder), *few])
    halves = write(model, tmp_path / "halves", 12, True, categories=2)
    with pytest.raises(UserError, match=r"'kind 0' has 6 images.* leave out --by-category"):
        adapt.main([str(folder), *halves, "--by-category"])
    with pytest.raises(UserError, match="the model knows a category 'Zoo' already; give --name"):
        adapt.main([str(folder), *halves, "--name", "Zoo", "--root", str(tmp_path)])
    with pytest.raises(UserError, match="is there already; name another folder"):
        adapt.main([str(folder), *halves, "--out", str(run.out), "--root", str(tmp_path)])


def test_a_new_category_is_inferred_and_old_ones_still_are() -> None:
    """Of images that are scattered alike about their categories' middles."""
    generator = np.random.default_rng(0)
    middles = generator.normal(size=(4, 60)) * 0.8

    def drawn(category: np.ndarray) -> np.ndarray:
        return 3 + 2 * (middles[category] + generator.normal(size=(len(category), 60)))

    known, fresh = np.repeat([0, 1, 2], 60), np.repeat([0, 1, 2, 3], 100)
    before = classifier.fit(drawn(known), known, 3, np.arange(180) % 5)
    new = drawn(np.full(15, 3))
    after, left_out = classifier.extended(before, new, np.zeros(15, np.int64), np.arange(15) % 5)
    images = drawn(fresh)
    inferred, old = after.probabilities(images), before.probabilities(images)
    np.testing.assert_allclose(
        inferred[:, :3] / inferred[:, :3].sum(1, keepdims=True), old, atol=1e-9, err_msg="between old ones"
    )
    assert (inferred.argmax(1) == fresh)[fresh == 3].mean() > 0.85
    assert (inferred.argmax(1) == 3)[fresh < 3].mean() < 0.05
    assert left_out[:, 1].mean() == pytest.approx(inferred[fresh == 3, 3].mean(), abs=0.15)
