"""The authors' checkpoint of DeepGaze IIE, against what their own code returned for one of its layout, and its download
from a server that breaks off."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

import acw
from acw import cli
from acw.data.images import decode_image
from acw.heads.readout import WIDTHS
from acw.model import deepgaze_release
from acw.model.deepgaze import import_checkpoint
from acw.model.model import Model
from acw.pipeline import import_deepgaze
from acw.storage import http
from acw.storage.errors import UserError
from acw.tracking import mlflow_store, registry

SHARED = Path(__file__).parents[2] / "shared"
GOLDEN = SHARED / "deepgaze_iie"


def bias_of(height: int, width: int) -> np.ndarray:
    v, u = (np.arange(height) + 0.5) / height - 0.5, (np.arange(width) + 0.5) / width - 0.5
    log_density = -(v[:, None] ** 2 / (2 * 0.2**2) + u**2 / (2 * 0.25**2))
    return log_density - logsumexp(log_density)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if not (GOLDEN / "make_state.py").exists() or not (SHARED / "gaze").is_dir():
        pytest.skip(f"{GOLDEN} or its images are not there")
    path = tmp_path_factory.mktemp("deepgaze") / "deepgaze2e.pth"
    subprocess.run([sys.executable, GOLDEN / "make_state.py", "1", path], check=True)
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def imported(checkpoint: Path) -> Model:
    return import_checkpoint(str(checkpoint))


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


# --- The download ------------------------------------------------------------------------------------------------


class Release(ThreadingHTTPServer):
    """A folder's files, in parts where they are asked for; breaks off in the midst of as many answers as `breaks`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder, self.breaks, self.version, self.kind = folder, 0, '"1"', "application/octet-stream"
        self.asked: list[tuple[str, str]] = []  # name and range


class Answer(BaseHTTPRequestHandler):
    server: Release

    def do_GET(self) -> None:
        content = memoryview((self.server.folder / Path(self.path).name).read_bytes())
        part = self.headers["Range"] if self.headers["If-Range"] == self.server.version else None
        start = int(re.findall(r"\d+", part)[0]) if part else 0
        self.server.asked.append((Path(self.path).name, part or ""))
        if start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.end_headers()
            return
        self.send_response(206 if part else 200)
        if part:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Type", self.server.kind)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", self.server.version)
        self.end_headers()
        end = len(content)
        if self.server.breaks:
            self.server.breaks -= 1
            end = start + (len(content) - start) // 2
        self.wfile.write(content[start:end])

    def log_message(self, *arguments: object) -> None:
        pass


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[tuple[Release, str]]:
    server = Release(folder)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def silent(*_: int) -> None:
    pass


def test_a_large_download_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "PAUSE_SECONDS", 0.0)
    content = np.random.default_rng(0).bytes(300_000)
    (tmp_path / "file").write_bytes(content)
    path = tmp_path / "here"
    with serving(tmp_path) as (server, address):
        server.breaks = 3
        http.download_large(f"{address}/file", path, 10**6, silent)
        assert [part for _, part in server.asked] == ["", "bytes=150000-", "bytes=225000-", "bytes=262500-"]
        assert path.read_bytes() == content
        path.unlink()

        # Killed, as by the user; another version is at the address when the command is given again.
        def killed(size: int, _: int) -> None:
            if size > 100_000:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            http.download_large(f"{address}/file", path, 10**6, killed)
        assert not path.exists()
        server.version, newer = '"2"', content[::-1]
        (tmp_path / "file").write_bytes(newer)
        http.download_large(f"{address}/file", path, 10**6, silent)
        assert path.read_bytes() == newer, "no mixture of two versions"

        # Whole, but killed before it got its name.
        path.rename(tmp_path / "here.partial")
        (tmp_path / "here.etag").write_text('"2"', encoding="utf-8")
        http.download_large(f"{address}/file", path, 10**6, silent)
        assert path.read_bytes() == newer
        assert {name.name for name in tmp_path.iterdir()} == {"file", "here"}

        server.breaks = 100
        monkeypatch.setattr(http, "INTERRUPTIONS", 1)
        path.unlink()
        (tmp_path / "file").write_bytes(b"x")  # of which the half is nothing
        with pytest.raises(UserError, match=r"ended after 0 of 1 bytes.*; the same command goes on from there; or "):
            http.download_large(f"{address}/file", path, 10**6, silent)


def test_what_is_not_the_checkpoint_is_neither_used_nor_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACW_CACHE", str(tmp_path / "cache"))
    served = tmp_path / deepgaze_release.CHECKPOINT
    with serving(tmp_path) as (server, address):
        torch.save({f"x{k}": torch.zeros(1000) for k in range(9)}, served)
        whole = served.read_bytes()
        for content, line in (
            (whole, r"/deepgaze2e\.pth: no checkpoint of DeepGaze IIE \(models\.0\.features.* is missing\)"),
            (whole[: len(whole) // 2], r"/deepgaze2e\.pth: is cut short: a zip archive without its end"),
            (b"<html>Log in</html>", r"/deepgaze2e\.pth: is an HTML page"),
        ):
            served.write_bytes(content)
            with pytest.raises(UserError, match=address + line):
                deepgaze_release.fetch(address)
        server.kind = "text/html; charset=utf-8"
        with pytest.raises(UserError, match="is a page, not the file, as where a proxy asks to log in; without a net"):
            deepgaze_release.fetch(address)
    assert {path.suffix for path in (tmp_path / "cache").rglob("*") if path.is_file()} <= {".lock"}
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        with pytest.raises(UserError, match=r"cannot be downloaded \(.*refused\); without a network, bring deepgaze2e"):
            deepgaze_release.fetch(f"http://127.0.0.1:{listener.getsockname()[1]}")
    with pytest.raises(UserError, match="give either"):
        import_deepgaze.main(["--out", str(tmp_path / "out")])


def test_the_download_becomes_a_registered_model(
    checkpoint: Path,
    imported: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ACW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(http, "PAUSE_SECONDS", 0.0)
    release = tmp_path / "release"
    release.mkdir()
    os.link(checkpoint, release / deepgaze_release.CHECKPOINT)
    bias = bias_of(1024, 1024)
    np.save(release / deepgaze_release.CENTER_BIAS, bias)
    root = tmp_path / "runs"
    with serving(release) as (server, address):
        server.breaks = 1
        import_deepgaze.main(["--download", "--from", address, "--root", str(root), "--out", str(tmp_path / "out")])
        names = [name for name, _ in server.asked]
        assert names == [deepgaze_release.CHECKPOINT] * 2 + [deepgaze_release.CENTER_BIAS]
        assert server.asked[1][1] == f"bytes={checkpoint.stat().st_size // 2}-"
    told = capsys.readouterr().out
    assert "registered: acw version 1; acw promote 1 --dataset FOLDER" in told
    assert re.search(r"deepgaze2e\.pth: \d+ of \d+ MB", told)
    store = mlflow_store.tracking_uri(root, None)
    model = acw.load(registry.download_model("models:/acw/1", store))
    pixels = decode_image(SHARED / "gaze/trainSet/Stimuli/Desk/001.jpg")[:201, :300]
    # The centre bias is kept on a grid, so a little of it is lost: Kullback and Leibler's divergence, in bits.
    expected = imported.predict(pixels, center_bias=bias_of(201, 300)).log_density.astype(np.float64)
    lost = (np.exp(expected) * (expected - model.predict(pixels).log_density)).sum() / np.log(2)
    assert 0 <= lost < 1e-3, lost
    assert model.provenance["dataset"]["name"] == "MIT1003"
