"""What strangers can send: data sets, weights, checkpoints, maps and models. None of it may run code, fill the memory
or read other files, each ends in one line; and nothing that a run leaves holds a password."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import struct
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from job_runs import SECRETS, Run, finished
from PIL import Image

import acw
from acw import cli
from acw.data import Dataset, load_dataset
from acw.evaluation import external_models, submission
from acw.features.backbone import load_backbone
from acw.features.store import open_shard
from acw.features.weights import read_weights
from acw.features.zoo import BACKBONES
from acw.pipeline import import_deepgaze, job
from acw.storage import secrets
from acw.storage.errors import UserError
from acw.tracking import mlflow_store
from acw.training.bank import BankState
from acw.training.joint import SystemState


@pytest.fixture
def line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs a job's main, which has to end with status 2 and one line on stderr: that line."""

    def end(main: Callable[[], Any], *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["job", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.run(lambda argv: main())
        assert ended.value.code == 2
        (text,) = capsys.readouterr().err.splitlines()
        assert text.startswith("error: ")
        return text

    return end


# --- Pickles ------------------------------------------------------------------------------------------------------


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def one_image(folder: Path) -> Callable[[], Dataset]:
    """Reads a data set of one picture, `a.png`."""
    (folder / "data").mkdir()
    Image.new("RGB", (60, 40)).save(folder / "data" / "a.png")
    (folder / "f.csv").write_text("image,x,y\na.png,1,1\n", encoding="utf-8")
    return lambda: load_dataset(str(folder / "data"), fixations=str(folder / "f.csv"))


def as_weights(folder: Path, payload: Payload) -> None:
    path = folder / "weights.pth"
    torch.save({"conv_stem.weight": payload}, path)
    load_backbone(dataclasses.replace(BACKBONES["lite0"], weights=str(path)))


def as_old_weights(folder: Path, payload: Payload) -> None:
    path = folder / "weights.pth.tar"
    torch.save({"state_dict": payload}, path, _use_new_zipfile_serialization=False)
    read_weights(str(path))


def as_safetensors(folder: Path, payload: Payload) -> None:
    path = folder / "weights.safetensors"
    path.write_bytes(pickle.dumps(payload))
    read_weights(str(path))


def as_deepgaze(folder: Path, payload: Payload) -> None:
    path = folder / "deepgaze2e.pth"
    torch.save(payload, path)
    import_deepgaze.main([str(path), "--out", str(folder / "model")])


def as_checkpoint(folder: Path, payload: Payload) -> None:
    path = folder / "bank.safetensors"
    path.write_bytes(pickle.dumps(payload))
    BankState.load(path)


def as_joint_checkpoint(folder: Path, payload: Payload) -> None:
    path = folder / "system.safetensors"
    torch.save(payload, path)
    SystemState.load(path)


def as_features(folder: Path, payload: Payload) -> None:
    path = folder / "shard-00000.safetensors"
    path.write_bytes(pickle.dumps(payload))
    open_shard(path)


def as_map(folder: Path, payload: Payload) -> None:
    data = one_image(folder)()
    np.save(folder / "a.npy", np.array([[payload]], dtype=object), allow_pickle=True)
    external_models.open_maps(str(folder), "density", data).of(0)


def as_predictions(folder: Path, payload: Payload) -> None:
    data = one_image(folder)()
    path = folder / "predictions.hdf5"
    path.write_bytes(pickle.dumps(payload))
    external_models.open_predictions(str(path), data)


def as_image(folder: Path, payload: Payload) -> None:
    read = one_image(folder)
    (folder / "data" / "a.png").write_bytes(pickle.dumps(payload))
    read()


def as_fixations(folder: Path, payload: Payload) -> None:
    for name in ("stimuli.hdf5", "fixations.hdf5"):
        (folder / name).write_bytes(pickle.dumps(payload))
    load_dataset(str(folder))


def as_matlab(folder: Path, payload: Payload) -> None:
    image, marks = folder / "Stimuli" / "Art" / "001.jpg", folder / "FIXATIONLOCS" / "Art" / "001.mat"
    for path in (image, marks):
        path.parent.mkdir(parents=True)
    Image.new("RGB", (8, 6)).save(image)
    marks.write_bytes(pickle.dumps(payload))
    load_dataset(str(folder))


def as_model(folder: Path, payload: Payload) -> None:
    (folder / "model.json").write_text(json.dumps({"format": 2, "backbones": []}), encoding="utf-8")
    torch.save(payload, folder / "heads.safetensors")
    acw.load(folder)


def as_description(folder: Path, payload: Payload) -> None:
    (folder / "model.json").write_bytes(pickle.dumps(payload))
    acw.load(folder)


def as_backbone_of_model(folder: Path, payload: Payload) -> None:
    torch.save(payload, folder / "backbone.pth")
    backbone = {"name": "lite0", "timm_name": "tf_efficientnet_lite0", "weights": "backbone.pth"}
    (folder / "model.json").write_text(json.dumps({"format": 2, "backbones": [backbone]}), encoding="utf-8")
    acw.load(folder)


def as_overlay(folder: Path, payload: Payload) -> None:
    (folder / "overlay.json").write_bytes(pickle.dumps(payload, protocol=0))
    job.parse(["demo", "--root", str(folder), "--overlay", str(folder / "overlay.json")], "")


ENTRANCES = [value for name, value in list(globals().items()) if name.startswith("as_")]


@pytest.mark.parametrize("entrance", ENTRANCES, ids=lambda entrance: entrance.__name__)
def test_a_pickle_is_refused_wherever_it_is_put(
    entrance: Callable[[Path, Payload], None], tmp_path: Path, line: Callable[..., str]
) -> None:
    marker = tmp_path / "it-ran"
    pickle.loads(pickle.dumps(Payload(marker)))
    marker.rmdir()  # it would have worked

    text = line(lambda: entrance(tmp_path, Payload(marker)))

    assert not marker.exists()
    assert str(tmp_path) in text


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"<!doctype html><title>Sign in</title>", "is an HTML page, not the file; download"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a pointer of Git LFS"),
    ],
)
@pytest.mark.parametrize(
    "entrance", [as_image, as_fixations, as_matlab, as_map], ids=lambda entrance: entrance.__name__
)
def test_a_page_or_a_pointer_instead_of_data_is_called_that(
    entrance: Callable[[Path, Any], None],
    content: bytes,
    expected: str,
    tmp_path: Path,
    line: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pickle, "dumps", lambda payload: content)  # what the entrances write
    monkeypatch.setattr(np, "save", lambda path, *_, **__: path.write_bytes(content))
    assert expected in line(lambda: entrance(tmp_path, None))


# --- Images -------------------------------------------------------------------------------------------------------


def png_of(width: int, height: int) -> bytes:
    """A PNG file of zeros, of a few kilobytes whatever its size: its rows are made as they are compressed."""
    packed = zlib.compressobj(9)
    rows = b"".join(packed.compress(bytes(1 + width)) for _ in range(min(height, 200))) + packed.flush()
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b"")]
    packed_chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed_chunks)


def tiff() -> bytes:
    from io import BytesIO

    content = BytesIO()
    Image.new("RGB", (8, 6)).save(content, "TIFF")
    return content.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("bomb.png", png_of(100_000, 100_000), "decompression bomb"),
        ("large.png", png_of(9000, 9000), "more than the"),
        ("tiff.jpg", tiff(), "not an image in JPEG"),
        ("svg.jpg", b'<svg xmlns="http://www.w3.org/2000/svg"><image href="/etc/passwd"/></svg>', "not an image"),
        ("postscript.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n", "not an image"),
    ],
)
def test_images_that_are_too_much_or_something_else(
    name: str, content: bytes, expected: str, tmp_path: Path, line: Callable[..., str]
) -> None:
    (tmp_path / name).write_bytes(content)
    (tmp_path / "f.csv").write_text(f"image,x,y\n{name},1,1\n", encoding="utf-8")
    text = line(lambda: load_dataset(str(tmp_path), fixations=str(tmp_path / "f.csv")))
    assert name in text
    assert expected in text.lower() or expected in text


def test_a_huge_file_and_a_pipe_are_not_read(tmp_path: Path, line: Callable[..., str]) -> None:
    with (tmp_path / "huge.jpg").open("wb") as file:
        file.write(b"\xff\xd8\xff")
        file.truncate(2**30)
    os.mkfifo(tmp_path / "pipe.jpg")
    start = time.monotonic()
    for name, expected in (("huge.jpg", "has 1024 MiB"), ("pipe.jpg", "is not in")):
        (tmp_path / "f.csv").write_text(f"image,x,y\n{name},1,1\n", encoding="utf-8")
        assert expected in line(lambda: load_dataset(str(tmp_path), fixations=str(tmp_path / "f.csv")))
    assert time.monotonic() - start < 5


# --- Paths --------------------------------------------------------------------------------------------------------


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A picture outside of every data set."""
    path = tmp_path / "private" / "photo.png"
    path.parent.mkdir()
    Image.new("RGB", (160, 120)).save(path)
    return path


def test_a_table_names_no_file_outside(tmp_path: Path, secret: Path, line: Callable[..., str]) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "link.png").symlink_to(secret)
    for name in ("../private/photo.png", str(secret), "link.png", "../../../../etc/passwd"):
        (tmp_path / "f.csv").write_text(f"image,x,y\n{name},1,1\n", encoding="utf-8")
        text = line(lambda: load_dataset(str(folder), fixations=str(tmp_path / "f.csv")))
        assert "lies outside the folder" in text


def test_cat2000_and_test_images_link_to_no_file_outside(
    tmp_path: Path, secret: Path, line: Callable[..., str]
) -> None:
    folder = tmp_path / "data"
    for kind in ("Stimuli", "FIXATIONLOCS"):
        (folder / kind / "Art").mkdir(parents=True)
    (folder / "FIXATIONLOCS" / "Art" / "001.mat").write_bytes(b"")
    (folder / "Stimuli" / "Art" / "001.jpg").symlink_to(secret)
    assert "lies outside the folder" in line(lambda: load_dataset(str(folder)))
    assert "lies outside the folder" in line(lambda: submission.stimuli_of(folder))
    (folder / "Stimuli" / "Art" / "001.jpg").unlink()
    Image.new("RGB", (8, 6)).save(folder / "Stimuli" / "Art" / "001.jpg")
    (folder / "FIXATIONLOCS" / "Art" / "001.mat").unlink()
    (folder / "FIXATIONLOCS" / "Art" / "001.mat").symlink_to(secret)
    assert "lies outside the folder" in line(lambda: load_dataset(str(folder)))


def test_maps_link_to_no_file_outside(tmp_path: Path, secret: Path, line: Callable[..., str]) -> None:
    data = one_image(tmp_path)()
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / "a.png").symlink_to(secret)
    assert "lies outside the folder" in line(
        lambda: external_models.open_maps(str(tmp_path / "maps"), "saliency", data)
    )


@pytest.mark.parametrize("trick", ["external", "virtual", "link", "file name"])
def test_hdf5_reads_no_other_file(trick: str, tmp_path: Path, secret: Path, line: Callable[..., str]) -> None:
    """HDF5 can present any file's bytes as an array, and parts of other HDF5 files."""
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file["x"] = np.zeros(1)
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (60, 40)).save(folder / "a.png")
    with h5py.File(folder / "stimuli.hdf5", "w") as file:
        file.attrs.update({"type": "FileStimuli", "version": "2.0", "__attributes__": "[]"})
        file["filenames"] = [str(secret) if trick == "file name" else "a.png"]
        file["shapes"] = np.array([[40, 60, 3]])
    with h5py.File(folder / "fixations.hdf5", "w") as file:
        file.attrs.update({"type": "Fixations", "version": "1.0", "__attributes__": "[]"})
        for name in ("y", "t", "n", "subjects"):
            file[name] = np.zeros(1, int if name in ("n", "subjects") else float)
        for name in ("x_hist", "y_hist", "t_hist"):
            file[name] = np.zeros((1, 1))
        if trick == "external":
            file.create_dataset("x", (1,), "f8", external=[("/etc/passwd", 0, 8)])
        elif trick == "virtual":
            layout = h5py.VirtualLayout((1,), "f8")
            layout[:] = h5py.VirtualSource(tmp_path / "other.hdf5", "x", (1,))
            file.create_virtual_dataset("x", layout)
        elif trick == "link":
            file["x"] = h5py.ExternalLink(str(tmp_path / "other.hdf5"), "x")
        else:
            file["x"] = np.zeros(1)
    text = line(lambda: load_dataset(str(folder)))
    assert ("lies outside" if trick == "file name" else "another file") in text


def test_a_model_names_no_file_outside_of_its_folder(tmp_path: Path, line: Callable[..., str]) -> None:
    for weights, timm_name in (
        ("../other.safetensors", "lite"),
        ("/etc/a.safetensors", "lite"),
        ("a.safetensors", "hf-hub:x/y"),
    ):
        backbone = {"name": "lite0", "timm_name": timm_name, "weights": weights}
        (tmp_path / "model.json").write_text(json.dumps({"format": 2, "backbones": [backbone]}), encoding="utf-8")
        assert "not in its folder" in line(lambda: acw.load(tmp_path))
        assert "not in its folder" in line(
            lambda: job.parse(["deepgaze_iie", "--heads", str(tmp_path), "--root", str(tmp_path)], "")
        )


# --- Secrets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["--tracking-uri", "http://user:hunter2@host:5000"],
        ["--tracking-uri=https://hunter2@host"],
        ["--weights", "lite0=s3://bucket/w.pth?X-Amz-Credential=a&X-Amz-Signature=hunter2"],
        ["--dataset", "s3://key:hunter2@bucket/data"],
    ],
)
def test_a_command_line_with_a_password_is_refused_and_not_repeated(
    arguments: list[str], line: Callable[..., str]
) -> None:
    text = line(lambda: pytest.fail("it went on"), "demo", *arguments)
    assert arguments[0].partition("=")[0] in text
    assert "hunter2" not in text
    secrets.refuse(["demo", "--root", "s3://bucket/a@b", "--tracking-uri", "http://host:5000", "--sigma", "2"])


def test_a_servers_password_goes_to_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("USERNAME", "PASSWORD"):
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", "")
    assert mlflow_store.tracking_uri(tmp_path, "https://me:p%40ss@host:5000/x") == "https://host:5000/x"
    assert (os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]) == ("me", "p@ss")
    with pytest.raises(UserError) as caught:
        mlflow_store.tracking_uri(tmp_path, "postgresql://me:hunter2@host/db")
    assert "hunter2" not in str(caught.value)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finished(tmp_path_factory.getbasetemp() / "jobs")


def test_nothing_that_a_run_leaves_holds_a_secret(done: Run) -> None:
    """Files, MLflow's store and artifacts, Ray's logs and what was printed, of a run with these in its environment."""
    folders = [done.job.root, Path(os.environ["RAY_TMPDIR"])]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert done.job.root / "mlflow.db" in files
    assert any(path.suffix == ".out" for path in files), "Ray's logs"
    for name, value in SECRETS.items():
        assert value not in done.output, name
        holders = [path for path in files if value.encode() in path.read_bytes()]
        assert holders == [], name


def test_a_registrys_pickled_model_is_not_loaded(
    done: Run, tmp_path: Path, line: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`mlflow.pyfunc.load_model` would unpickle it; here the files of a model are all that is asked for."""
    store = mlflow_store.tracking_uri(done.job.root, None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    client, _ = mlflow_store.connect(store)
    flavour = {"loader_module": "mlflow.pyfunc.model", "python_model": "python_model.pkl", "python_version": "3.11"}
    (tmp_path / "MLmodel").write_text(json.dumps({"flavors": {"python_function": flavour}}), encoding="utf-8")
    (tmp_path / "python_model.pkl").write_bytes(pickle.dumps(Payload(tmp_path / "it-ran")))
    client.create_registered_model("pickled")
    client.create_model_version("pickled", str(tmp_path))
    assert "models:/pickled/1: no such model" in line(lambda: acw.load("models:/pickled/1"))
    assert not (tmp_path / "it-ran").exists()
