"""`acw categories`: categories that a run has found get names, in its folder and in the registered model."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_tracking import BASE_IG, CATEGORIES, EVALUATION, RECIPE, _leave_no_trace, banks, write_run
from test_tracking import model as model

import acw
from acw.model.model import Model
from acw.pipeline import categories
from acw.storage.addresses import local, shown
from acw.storage.errors import UserError
from acw.storage.files import csv_rows, write_json
from acw.tracking import mlflow_store
from acw.tracking.mlflow_store import tracking_uri
from acw.tracking.runs import log_run

leave_no_trace = _leave_no_trace
FOUND = ("unnamed-1", "unnamed-2")


@pytest.fixture(scope="module")
def run(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that has found two categories; one image is called like the first of them."""
    root = tmp_path_factory.mktemp("a root")
    of = dataclasses.replace(model, categories=list(FOUND), _loaded=model._loaded)
    folder = write_run(root / "unnamed-1 run", of, BASE_IG)
    for file in folder.glob("*.csv"):
        text = file.read_text(encoding="utf-8").replace("0.jpg", "unnamed-1.jpg")
        for category, name in zip(CATEGORIES, FOUND, strict=True):
            text = text.replace(category, name)
        file.write_text(text, encoding="utf-8")
    images = {f"{number}.jpg": FOUND[number % 2] for number in range(5)}
    pictures = dict.fromkeys(FOUND, "data:image/jpeg;base64,AA==")
    write_json(folder / "categories.json", {"gain_bits": {}, "images": images, "montages": pictures})
    write_json(folder / "evaluation.json", EVALUATION | {"dataset": {"categories": dict.fromkeys(FOUND, 2)}})
    (folder / "report.html").write_text("<td>unnamed-1</td><p>unnamed-2.</p>photos/unnamed-1", encoding="utf-8")
    registration = log_run(tracking_uri(root, None), folder, RECIPE, banks(), EVALUATION)
    write_json(folder / "registration.json", dataclasses.asdict(registration) | {"store": tracking_uri(root, None)})
    return folder


def names_in(run: Path) -> list[str]:
    return sorted({row["category"] for row in csv_rows(run / "category_weights.csv")})


def test_what_has_no_name_is_listed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    categories.main([str(run)])
    assert capsys.readouterr().out.splitlines() == ["1: unnamed-1, 3 images", "2: unnamed-2, 2 images"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("3=street", "with a number from 1 to 2"),
        ("street", "write NUMBER=NAME"),
        ("1=<b>", "letters, digits"),
        ("1=unnamed-2", "two categories would be called 'unnamed-2'"),
    ],
)
def test_what_can_be_no_name_changes_nothing(run: Path, given: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        categories.main([str(run), "--name", given])
    assert names_in(run) == [*FOUND]


def test_another_run_is_one_line(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="names what a run with --categories auto has found"):
        categories.main([str(tmp_path), "--name", "1=street"])


@pytest.mark.parametrize("root", ["/somewhere/runs", "s3://bucket/runs"])
def test_a_store_is_known_by_its_record(root: str) -> None:
    uri = tracking_uri(local(root), None)
    assert mlflow_store.recorded(shown(uri)) == uri


def test_a_servers_account_is_found_by_its_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@here:5000")
    assert mlflow_store.recorded("http://there:5000") == "http://there:5000"
    assert not os.environ["MLFLOW_TRACKING_PASSWORD"]
    assert mlflow_store.recorded("http://here:5000") == "http://here:5000"
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "secret"


def test_names_are_given_and_given_again(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri(run.parent, None))
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    before = acw.load(run).predict(pixels, "unnamed-1").log_density
    for version, name in ((2, "street"), (3, "Straße 1")):
        categories.main([str(run), "--name", f"1={name}"])
        assert f"acw version {version}" in capsys.readouterr().out
        assert names_in(run) == sorted([name, "unnamed-2"])
        rows = csv_rows(run / "out_of_fold.csv")
        assert rows[0]["image"] == "unnamed-1.jpg", "a file is no category"
        assert {row["category"] for row in rows} == {name, "unnamed-2"}
        report = (run / "report.html").read_text(encoding="utf-8")
        assert report == f"<td>{name}</td><p>unnamed-2.</p>photos/unnamed-1"
        assert json.loads((run / "evaluation.json").read_text(encoding="utf-8"))["dataset"]["categories"][name] == 2
        np.testing.assert_array_equal(acw.load(run).predict(pixels, name).log_density, before)
        client, _ = mlflow_store.connect(tracking_uri(run.parent, None))
        assert dict(client.get_registered_model("acw").aliases) == {"champion": version}
        assert acw.load("models:/acw@champion").categories == [name, "unnamed-2"]
    again = run.parent / "again"
    shutil.copytree(run, again)
    categories.forget(again)
    (again / "categories.json").unlink()
    with pytest.raises(UserError, match="names what a run"):
        categories.main([str(again)])
