"""Inputs modelled on what people's real files, clusters and servers did: each is read, or refused in one line.

The small inputs are in tests/cases/, a folder a case. S: was a wrong result without a word. C: was a traceback or a
hang. U: was refused, but the line misled.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_environment
import test_s3_servers
import test_text
from PIL import Image
from test_model import model as model
from test_s3_servers import secure as secure

from acw.cluster import joining
from acw.data import Dataset, load_dataset
from acw.data.images import decode_image
from acw.evaluation import gold_standard
from acw.evaluation.external_models import open_maps
from acw.pipeline.job import parse
from acw.storage.errors import UserError
from acw.tracking import mlflow_store
from acw.training.training_set import kde_of

CASES = Path(__file__).parent / "cases"
SHARED = Path(__file__).parents[2] / "shared" / "cases"


@dataclass(frozen=True)
class Given:
    """An empty folder, the environment, and pytest's fixtures by their names."""

    folder: Path
    environment: pytest.MonkeyPatch
    fixture: Callable[[str], Any]


def read(folder: Path, **options: Any) -> Dataset:
    """The data set of a case: its images and table."""
    return load_dataset(str(folder / "images"), fixations=str(folder / "f.csv"), **options)


def line(action: Callable[[], object], error: type[ValueError] = UserError) -> str:
    """The one line with which something is refused."""
    with pytest.raises(error) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def normalised(case: Path, given: Given) -> None:
    assert "shares of the width and height; say --units share" in line(lambda: read(case))
    assert 20 < read(case, units="share").x.mean() < 380


def decimal_comma(case: Path, given: Given) -> None:
    assert "line 2: has 5 fields where the header has 3; are there decimal commas" in line(lambda: read(case))


def duplicate_columns(case: Path, given: Given) -> None:
    assert "has the column 'x' 2 times (two eyes?)" in line(lambda: read(case))


def drop_outside(case: Path, given: Given) -> None:
    for drop in (False, True):
        text = line(lambda drop=drop: read(case, drop_outside=drop))
        assert " of 60 (" in text
        assert "px from the images' centre; say --origin centre" in text
    assert len(read(case, origin="centre").x) == 60


def missing_subject(case: Path, given: Given) -> None:
    assert read(case).summary()["subjects"] == 1


def blurred_marks(case: Path, given: Given) -> None:
    assert "fixLocs is no map of fixations" in line(lambda: load_dataset(str(case)))


def other_delimiter(case: Path, given: Given) -> None:
    dataset = read(case)
    assert (len(dataset.x), dataset.summary()["subjects"]) == (60, 4)


def nul(case: Path, given: Given) -> None:
    assert "line 2: holds a NUL byte" in line(lambda: read(case))


def unicode_form(case: Path, given: Given) -> None:
    assert len(read(case).x) == 1


def few_bits(case: Path, given: Given) -> None:
    for name in ("a.png", "b.tif"):
        assert decode_image(case / name).mean() == pytest.approx(127.5, abs=1)


def folder_called_gaze(case: Path, given: Given) -> None:
    (given.folder / "gaze").mkdir()
    Image.new("1", (3840, 2160)).save(given.folder / "gaze" / "a.png")
    (given.folder / "f.csv").write_text("image,x,y\na.png,1000,900\n", encoding="utf-8")
    assert load_dataset(str(given.folder / "gaze"), fixations=str(given.folder / "f.csv")).summary()["blur_sigma"] == 80


def agreeing_people(case: Path, given: Given) -> None:
    dataset = read(case)
    people = gold_standard.fit(dataset, range(8), kde_of(dataset, np.arange(8)))
    for index in range(8):
        densities = [people.everybody(dataset, index), *(one for _, one in people.leave_one_out(dataset, index))]
        assert all(bool(one.isfinite().all()) for one in densities)


def data_in_the_checkout(case: Path, given: Given) -> None:
    test_environment.test_data_and_weights_in_the_checkout_are_not_sent_with_a_job(given.folder)


def stale_ray(case: Path, given: Given) -> None:
    (given.folder / "ray").mkdir()
    (given.folder / "ray" / "ray_current_cluster").write_text("127.0.0.1:9", encoding="utf-8")
    given.environment.setenv("RAY_TMPDIR", str(given.folder))
    given.environment.delenv("RAY_ADDRESS", raising=False)
    assert joining.address() == "local"


def ray_addresses(case: Path, given: Given) -> None:
    for address in ("http://127.0.0.1:8265", "ray://127.0.0.1:1", "localhost", "nonsense", "127.0.0.1:9"):
        given.environment.setenv("RAY_ADDRESS", address)
        assert f"RAY_ADDRESS {address}: " in line(joining.address)


def ray_is_ours(case: Path, given: Given) -> None:
    for address in ("", "local"):
        given.environment.setenv("RAY_ADDRESS", address)
        assert joining.address() == "local"
        assert not joining.on_cluster()


def own_authority(case: Path, given: Given) -> None:
    test_s3_servers.test_an_authority_of_ones_own_holds_for_all_clients(
        "AWS_CA_BUNDLE", given.fixture("secure"), given.folder, given.environment
    )


def old_mlflow(case: Path, given: Given) -> None:
    with test_environment.Servant(test_environment.OLD) as port:
        text = line(lambda: mlflow_store.ready(given.folder, f"http://127.0.0.1:{port}"))
    assert "no logged models, as servers before MLflow 3.0" in text


def registry_elsewhere(case: Path, given: Given) -> None:
    given.environment.setenv("MLFLOW_REGISTRY_URI", "http://127.0.0.1:9")
    assert "MLFLOW_REGISTRY_URI http://127.0.0.1:9: " in line(lambda: mlflow_store.ready(given.folder, None))


def quotes_in_a_folder(case: Path, given: Given) -> None:
    folder = given.folder / 'Anna\'s "5 inch" images?#%2F é'
    (folder / "b").mkdir(parents=True)
    rows = ["image,x,y,subject,category"]
    for number in range(12):
        Image.new("1", (80, 60), 1).save(folder / "b" / f"{number}%20.png")
        rows += [f'b/{number}%20.png,{x},30,s{x},"Straße, ""A"" & <b>"' for x in (30, 40)]
    (folder / "f.csv").write_text("\n".join(rows), encoding="utf-8")
    arguments = ["--dataset", str(folder), "--fixations", str(folder / "f.csv"), "--root", str(given.folder / "root")]
    job = parse(["demo", *arguments], "")
    assert job.dataset.categories == ('Straße, "A" & <b>',)
    assert job.dataset.name == folder.name
    assert not set(job.folder.name) & set("'\"?#%/")
    client, experiment = mlflow_store.connect(mlflow_store.ready(job.root, None))
    run = client.create_run(experiment, tags={"acw.folder": folder.name})
    assert [one.info.run_id for one in mlflow_store.runs_of(client, experiment, "acw.folder", folder.name)] == [
        run.info.run_id
    ]


def images_in_hand(case: Path, given: Given) -> None:
    model = given.fixture("model")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    expected = model.predict(pixels).log_density
    assert model.predict(Image.fromarray(pixels)).log_density == pytest.approx(expected)
    for wrong in ([1, 2], None):
        assert "an image is uint8 (H, W, 3) RGB, not" in line(lambda wrong=wrong: model.predict(wrong), ValueError)


def apples_gpu(case: Path, given: Given) -> None:
    model = given.fixture("model")
    before = model.device
    try:
        model.device = "mps"
        assert "device 'mps': " in line(lambda: model.predict(np.zeros((40, 60, 3), np.uint8)))
    finally:
        model.device = before


def no_home(case: Path, given: Given) -> None:
    test_environment.test_only_s3_needs_a_home(given.environment)


def coloured_map(case: Path, given: Given) -> None:
    text = line(lambda: open_maps(str(case / "jet"), "saliency", read(case)).check(range(1)))
    assert "is coloured" in text


def served_floats(case: Path, given: Given) -> None:
    from acw.tracking.served_model import DensityModel

    served = DensityModel()
    served.model = given.fixture("model")
    floats = np.random.default_rng(0).random((1, 30, 40, 3))
    with pytest.raises(ValueError, match="multiply by 255 first"):
        served.predict(None, floats)


def other_locale(case: Path, given: Given) -> None:
    test_text.test_what_is_written_is_read_in_any_locale(given.folder)


DOES: dict[str, Callable[[Path, Given], None]] = {
    "C01-gold-nan": agreeing_people,
    "C02-working-dir": data_in_the_checkout,
    "C03-stale-ray": stale_ray,
    "C04-ray-address": ray_addresses,
    "C05-own-ca": own_authority,
    "C06-mlflow-old-server": old_mlflow,
    "C07-registry-uri": registry_elsewhere,
    "C08-quote-in-folder": quotes_in_a_folder,
    "C10-nul": nul,
    "C11-predict-pil": images_in_hand,
    "C12-mps": apples_gpu,
    "C14-no-home": no_home,
    "S01-normalised": normalised,
    "S02-decimal-comma": decimal_comma,
    "S03-duplicate-columns": duplicate_columns,
    "S04-drop-outside": drop_outside,
    "S05-subject-NA": missing_subject,
    "S06-fixlocs-blurred": blurred_marks,
    "S08-map-jet": coloured_map,
    "S10-serve-floats": served_floats,
    "S11-12-bit": few_bits,
    "S13-folder-gaze": folder_called_gaze,
    "S14-locale": other_locale,
    "S15-ray-address-empty": ray_is_ours,
    "U01-semicolon": other_delimiter,
    "U01-tab": other_delimiter,
    "U02-empty-rows": other_delimiter,
    "U03-nfd": unicode_form,
}


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a case or MLflow sets in the environment goes with the test."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "HOME"):
        monkeypatch.setenv(name, os.environ.get(name, "")) if name in os.environ else monkeypatch.delenv(name, False)


@pytest.mark.parametrize("name", DOES)
def test_case(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    DOES[name](CASES / name, Given(tmp_path, monkeypatch, request.getfixturevalue))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the cases that these are made after are not beside the repository")
def test_no_case_is_left_out() -> None:
    assert {folder.name for folder in SHARED.iterdir() if folder.is_dir()} == set(DOES)
