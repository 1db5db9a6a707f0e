"""The authors' checkpoint of DeepGaze IIE, against what their own code returned for one of its layout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from acw import cli
from acw.data.images import decode_image
from acw.heads.readout import WIDTHS
from acw.model.deepgaze import import_checkpoint
from acw.model.model import Model
from acw.storage.errors import UserError

SHARED = Path(__file__).parents[2] / "shared"
GOLDEN = SHARED / "deepgaze_iie"


def bias_of(height: int, width: int) -> np.ndarray:
    v, u = (np.arange(height) + 0.5) / height - 0.5, (np.arange(width) + 0.5) / width - 0.5
    log_density = -(v[:, None] ** 2 / (2 * 0.2**2) + u**2 / (2 * 0.25**2))
    return log_density - logsumexp(log_density)


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Model:
    if not (GOLDEN / "make_state.py").exists() or not (SHARED / "gaze").is_dir():
        pytest.skip(f"{GOLDEN} or its images are not there")
    path = tmp_path_factory.mktemp("deepgaze") / "deepgaze2e.pth"
    subprocess.run([sys.executable, GOLDEN / "make_state.py", "1", path], check=True)
    model = import_checkpoint(str(path))
    path.unlink()
    return model


@pytest.mark.parametrize("image", ["OutdoorAction_001", "Desk_001_odd"])
def test_golden_outputs_of_the_authors_code(imported: Model, image: str) -> None:
    """Each backbone's mixture of 30 heads and the whole, at an even and at an odd size."""
    name, number = image.split("_")[:2]
    pixels = decode_image(SHARED / f"gaze/trainSet/Stimuli/{name}/{number}.jpg")
    if image.endswith("odd"):
        pixels = np.ascontiguousarray(pixels[:535, :701])
    expected = np.load(GOLDEN / "expected.npz")
    bias = bias_of(*pixels.shape[:2])

    prediction = imported.predict(pixels, center_bias=bias)

    assert prediction.log_density.dtype == np.float32
    np.testing.assert_allclose(prediction.log_density, expected[f"{image}/log_density"], rtol=0, atol=1e-4)
    ((of_backbones, _),) = imported._densities([pixels], torch.from_numpy(bias).float())
    full = imported.finalizer.upsample(of_backbones, (pixels.shape[0], pixels.shape[1])).numpy()
    for k in range(4):
        np.testing.assert_allclose(full[k, ::4, ::4], expected[f"{image}/backbone{k}"], rtol=0, atol=1e-4)


def test_a_file_that_is_no_checkpoint_of_it_is_named(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save({f"models.0.x{k}": torch.zeros(2) for k in range(len(WIDTHS))}, path)
    with pytest.raises(UserError, match=r"other.pth.*shapenet_c"):
        import_checkpoint(str(path))


def test_a_page_saved_as_the_checkpoint_is_called_that(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deepgaze2e.pth"
    path.write_bytes(b"<!DOCTYPE html><html><title>Google Drive - Quota exceeded</title></html>")
    monkeypatch.setattr(sys, "argv", ["acw", "import-deepgaze", str(path), "--out", str(tmp_path / "model")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {path}: is an HTML page, not the file; download the file itself anew")
    assert not (tmp_path / "model" / "model.json").exists()
