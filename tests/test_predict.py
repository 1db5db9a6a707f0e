"""`acw predict` and what a prediction gives: pictures, contours, places, files, each against another way to have it."""

from __future__ import annotations

import dataclasses
import io
import os
import subprocess
import sys
import threading
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.path import Path as Polygon
from PIL import Image, ImageOps
from scipy.ndimage import gaussian_filter
from seaweed import BUCKET, SeaweedFS, node
from test_model import NAMES, WEIGHTS, image
from test_model import folder as folder
from test_model import model as model

from acw.data import pysaliency_compat
from acw.data.images import orientation
from acw.evaluation.map_files import read_grey
from acw.model import drawing
from acw.model.model import Model
from acw.model.prediction import FORMATS, Prediction
from acw.pipeline import predict as command
from acw.pipeline import sources as naming
from acw.storage import http
from acw.storage.addresses import local
from acw.storage.errors import UserError
from acw.storage.files import csv_rows, write_atomic

SIZE = (301, 423)
PEAKS = ((60, 50, 12.0), (200, 380, 20.0), (150, 210, 30.0), (290, 120, 16.0))  # row, column and width of bumps, in px


def bumps(size: tuple[int, int] = SIZE) -> np.ndarray:
    """A log-density of which one bump reaches over the image's edge."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    density = np.full(size, 0.02 / np.prod(size))
    for row, column, width in PEAKS:
        bump = np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / (2 * width**2))
        density += bump / bump.sum() * (0.3 if width == 20.0 else 0.2)
    return np.log(density / density.sum()).astype(np.float32)


def prediction_of(log_density: np.ndarray) -> Prediction:
    pixels = np.random.default_rng(0).integers(0, 256, (*log_density.shape, 3), dtype=np.uint8)
    return Prediction(log_density, {"all": 1.0}, {"lite0": 1.0}, {"lite0": log_density}, pixels)


def inside(lines: Sequence[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Whether each pixel's centre lies within an odd number of lines."""
    odd = np.zeros(size, bool)
    for line in lines:
        left, top = line.min(0).astype(int)
        right, bottom = np.ceil(line.max(0)).astype(int)
        centres = np.stack(np.mgrid[top:bottom, left:right][::-1], -1).reshape(-1, 2) + 0.5
        odd[top:bottom, left:right] ^= Polygon(line).contains_points(centres).reshape(bottom - top, right - left)
    return odd


@pytest.mark.parametrize("size", [SIZE, (1100, 500), (40, 700)])
def test_a_contour_encloses_its_share_of_the_mass(size: tuple[int, int]) -> None:
    """Where the grid of lines is coarser than the pixels too; a ring's hole is not in it."""
    log_density = bumps() if size == SIZE else None
    if log_density is None:
        smooth = gaussian_filter(np.random.default_rng(0).normal(size=size), 90)
        log_density = (2 * smooth / smooth.std()).astype(np.float32)
        log_density -= np.log(np.exp(log_density.astype(np.float64)).sum())
    shares = (0.1, 0.25, 0.5, 0.75, 0.95)
    for share, lines in drawing.contours(log_density, shares).items():
        assert lines
        assert all(np.array_equal(line[0], line[-1]) for line in lines), "closed, at the edges too"
        corners = np.concatenate(lines)
        assert corners.min() >= 0
        assert (corners <= size[::-1]).all()
        assert np.exp(log_density[inside(lines, size)]).sum() == pytest.approx(share, abs=0.005)
    with pytest.raises(ValueError, match="between 0 and 1, not 50"):
        drawing.contours(log_density, (50,))


def test_places_are_the_peaks_with_their_mass() -> None:
    log_density = bumps()
    places = drawing.places(log_density)
    assert {(place.y, place.x) for place in places} == {(row, column) for row, column, _ in PEAKS}
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    covered = np.zeros(SIZE, bool)
    for place in places:
        disc = np.hypot(rows - place.y, columns - place.x) <= place.radius
        assert place.share == pytest.approx(np.exp(log_density[disc].astype(float)).sum())
        assert not covered[disc].any(), "shares may be added"
        covered |= disc
    shares = [place.share for place in places]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(np.exp(log_density[covered].astype(float)).sum())
    assert drawing.places(log_density, 2) == places[:2]
    (small, *_) = drawing.places(log_density, radius=3)
    assert (small.y, small.x, small.radius) == (60, 50, 3), "the narrowest is the highest"


def test_places_of_a_large_image_are_exact_to_the_pixel() -> None:
    log_density = bumps((1500, 2000))
    assert {(place.y, place.x) for place in drawing.places(log_density, 9, 20)} == {(r, c) for r, c, _ in PEAKS}


def test_a_flat_density_has_one_place_and_can_be_drawn() -> None:
    for size in ((1, 1), (3, 200), (64, 48)):
        flat = np.full(size, -np.log(np.prod(size)), np.float32)
        prediction = prediction_of(flat)
        (place,) = prediction.places()
        assert (place.y, place.x) == pytest.approx(((size[0] - 1) // 2, (size[1] - 1) // 2))
        assert prediction.overlay().size == size[::-1]
        ET.fromstring(prediction.encoded("svg"))


def test_the_colours_are_infernos() -> None:
    """An established map, whose lightness rises evenly."""
    expected = matplotlib.colormaps["inferno"](np.arange(256), bytes=True)[:, :3]
    np.testing.assert_allclose(drawing.palette().astype(int), expected.astype(int), atol=8)


def test_an_overlay_shows_the_image_where_nobody_looks_and_the_density_where_all_do() -> None:
    prediction = prediction_of(bumps())
    drawn = np.asarray(drawing.overlay(prediction.image, prediction.log_density, {}, [])).astype(float)
    height = np.exp((prediction.log_density - prediction.log_density.max()) / 2)
    foot, top = height < 0.05, height > 0.99
    assert foot.any()
    # Muted, but its details are all there.
    assert np.corrcoef(drawn[foot].mean(1), prediction.image[foot].mean(1))[0, 1] > 0.95
    assert np.abs(drawn[top] - drawing.palette()[-1]).max() <= 255 * (1 - drawing.OPACITY) + 4
    with_lines = np.asarray(prediction.overlay()).astype(float)
    changed = np.abs(with_lines - drawn).max(2) > 30
    assert 0.005 < changed.mean() < 0.1
    for place in prediction.places():
        assert changed[place.y - 5 : place.y + 6, place.x - 5 : place.x + 6].mean() > 0.5


def test_an_svg_has_the_contours_and_places() -> None:
    prediction = prediction_of(bumps())
    tree = ET.fromstring(prediction.encoded("svg"))
    assert tree.get("viewBox") == f"0 0 {SIZE[1]} {SIZE[0]}"
    paths = {float(path.get("data-mass", 0)): path.get("d", "") for path in tree.iter() if path.get("data-mass")}
    assert set(paths) == set(drawing.ENCLOSED_MASS)
    for share, path in paths.items():
        lines = [
            np.array([[float(number) for number in point.split()] for point in line.removesuffix("Z").split("L")])
            for line in path.split("M")[1:]
        ]
        mass = np.exp(prediction.log_density[inside([np.vstack([line, line[:1]]) for line in lines], SIZE)]).sum()
        assert mass == pytest.approx(share, abs=0.015)
    shares = [float(share) for element in tree.iter() if (share := element.get("data-share"))]
    assert shares == [pytest.approx(place.share, abs=1e-4) for place in prediction.places()]


def test_files_hold_what_their_names_say(tmp_path: Path) -> None:
    prediction = prediction_of(bumps())
    for name in ("a.png", "a.overlay.png", "a.npy", "a.density.png", "a.svg", "a.csv"):
        prediction.save(tmp_path / "new" / name)
    written = tmp_path / "new"
    np.testing.assert_array_equal(np.load(written / "a.npy"), prediction.log_density)
    for name in ("a.png", "a.overlay.png"):
        np.testing.assert_array_equal(np.asarray(Image.open(written / name)), np.asarray(prediction.overlay()))
    density, grey = np.exp(prediction.log_density.astype(float)), read_grey(written / "a.density.png")
    scale = float(Image.open(written / "a.density.png").info["density per grey value"])  # type: ignore[attr-defined]
    assert grey.min() >= 1
    assert np.abs(grey * scale - density)[density > scale / 2].max() <= 0.501 * scale
    assert (grey[density <= scale / 2] == 1).all()
    np.testing.assert_allclose(grey / grey.sum(), density, rtol=1e-3, atol=scale)
    rows = csv_rows(written / "a.csv")
    assert [int(row["place"]) for row in rows] == list(range(1, len(rows) + 1))
    for row, place in zip(rows, prediction.places(), strict=True):
        assert (int(row["x"]), int(row["y"])) == (place.x, place.y)
        assert float(row["share"]) == pytest.approx(place.share, abs=1e-6)
    assert list(command.FORMATS) == list(FORMATS)
    assert all(form.suffix in command.FORMATS[name] for name, form in FORMATS.items())
    with pytest.raises(UserError, match=r"a\.jpg: a prediction is saved as .*\.npy.*; end its name so"):
        prediction.save(tmp_path / "a.jpg")


def test_each_view_has_its_own_density(model: Model) -> None:
    pixels = image(75, 101)
    prediction = model.predict(pixels, "Street")
    assert list(prediction.by_backbone) == list(NAMES)
    mixed = 0.0
    for number, (name, weight) in enumerate(prediction.weights.items()):
        alone = dataclasses.replace(model, weights=np.eye(2)[[number] * 3]).predict(pixels, "Street")
        np.testing.assert_allclose(prediction.by_backbone[name], alone.log_density, atol=2e-6)
        assert prediction.by_backbone[name].dtype == np.float32
        mixed = mixed + weight * np.exp(prediction.by_backbone[name].astype(float))
    np.testing.assert_allclose(np.log(mixed), prediction.log_density, atol=2e-5)
    with pytest.raises(KeyError):
        prediction.by_backbone["lite9"]


def test_a_view_in_several_systems_is_their_mean(model: Model) -> None:
    heads = {f"lite0/{system}": model.heads[name] for system, name in enumerate(NAMES)}
    dimensions = len(model.classifier.mean) // 2
    parts = {name: getattr(model.classifier, name)[..., :dimensions] for name in ("mean", "scale", "weight")}
    both = dataclasses.replace(
        model,
        views=model.views[:1],
        heads=heads,
        systems=2,
        weights=WEIGHTS,
        classifier=dataclasses.replace(model.classifier, **parts),
    )
    even = dataclasses.replace(both, weights=np.full((3, 2), 0.5)).predict(image(75, 101), "Art")
    prediction = both.predict(image(75, 101), "Art")
    assert np.abs(prediction.log_density - even.log_density).max() > 0.01
    np.testing.assert_allclose(prediction.by_backbone["lite0"], even.log_density, atol=2e-5)


def test_a_model_is_one_of_pysaliencys(model: Model) -> None:
    pysaliency = pysaliency_compat.load()
    numbers = np.random.default_rng(0)
    pixels = [image(75, 101), image(64, 48)]
    x, y = numbers.random((2, 60)) * [[48], [64]]
    n = np.arange(60) % 2
    fixations = pysaliency.Fixations.create_without_history(x, y, n)
    theirs = model.as_pysaliency("Zoo")
    assert isinstance(theirs, pysaliency.Model)
    ours = [model.predict(one, "Zoo").log_density for one in pixels]
    for one, expected in zip(pixels, ours, strict=True):
        np.testing.assert_array_equal(theirs.log_density(one), expected)
    gain = theirs.information_gain(pysaliency.Stimuli(pixels), fixations, pysaliency.UniformModel(), average="image")
    means = [
        (ours[i][y[n == i].astype(int), x[n == i].astype(int)] + np.log(ours[i].size)).mean() / np.log(2)
        for i in (0, 1)
    ]
    assert gain == pytest.approx(np.mean(means), abs=1e-5)
    with pytest.raises(UserError, match="unknown category 'street'"):
        model.as_pysaliency("street")


# --- The command -------------------------------------------------------------------------------------------------


def save(path: Path, size: tuple[int, int] = (75, 101)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    smooth = gaussian_filter(image(*size).astype(float), (6, 6, 0))
    Image.fromarray((255 * (smooth - smooth.min()) / np.ptp(smooth)).astype(np.uint8)).save(path)
    return path


def predict(*words: str | Path) -> int:
    """The command's exit status but for errors of the user's, which are raised."""
    try:
        command.main([str(word) for word in words])
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def test_a_folder_with_a_broken_image(
    model: Model, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    good = [save(photos / name) for name in ("a.png", "deep/b.jpg", "deep/c.PNG")]
    broken = save(photos / "broken.jpg")
    broken.write_bytes(broken.read_bytes()[:400])
    (photos / "notes.txt").write_text("no image", encoding="utf-8")
    save(photos / "old.overlay.png")
    out = tmp_path / "out"
    status = predict(photos, "--model", folder, "--out", out, "--write", "npy, csv", "--category", "Zoo")
    output = capsys.readouterr()
    assert status == 1
    names = [f"{name}{suffix}" for name in ("a", "deep/b", "deep/c") for suffix in (".npy", ".csv")]
    assert sorted(output.out.splitlines()) == sorted(str(out / name) for name in names)
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()) == sorted(names)
    lines = output.err.splitlines()
    assert [line for line in lines if str(broken) in line] == [line for line in lines if line.startswith("error: /")]
    assert lines[-1] == "error: 1 of 4 images could not be predicted"
    assert any("predict: 3 of 4 images" in line and "images/s" in line for line in lines)
    for path, name in zip(good, ("a", "deep/b", "deep/c"), strict=True):
        np.testing.assert_allclose(np.load(out / f"{name}.npy"), model.predict(path, "Zoo").log_density, atol=1e-4)


def test_a_wrong_command_line_predicts_nothing(folder: Path, tmp_path: Path) -> None:
    photo = save(tmp_path / "photo.png")
    (tmp_path / "empty").mkdir()
    cases: list[tuple[tuple[str | Path, ...], str]] = [
        ((photo, "--model", folder, "--write", "overlay,jpg"), "there is no 'jpg'; give some of overlay,npy"),
        ((photo, "--model", folder, "--category", "street"), "unknown category 'street'; the model knows Art"),
        ((tmp_path / "empty", "--model", folder), "empty: there is no image in it"),
        ((tmp_path / "*.webp", "--model", folder), r"\*\.webp: there is no image in it"),
        (("ftp://host/a.png", "--model", folder), "ftp://host/a.png: images are files, or at http"),
        ((photo, "--model", folder, "--center-bias", photo), "photo.png: no NPY file that can be read whole"),
    ]
    for words, line in cases:
        with pytest.raises(UserError, match=line):
            predict(*words, "--out", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_images_are_named_by_a_list_and_a_pattern(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a/x.png", "b/x.png", "b/x.jpg", "b/[1].png"):
        save(tmp_path / name, (40, 50))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("a/x.png\r\n\nb/[1].png\nb/nowhere.png\n"))
    assert predict("-", "b/*.png", tmp_path / "b" / "x.jpg", "--model", folder) == 1
    output = capsys.readouterr()
    written = {str(path.relative_to("predictions")) for path in Path("predictions").rglob("*.png")}
    assert written == {"a/x.overlay.png", "b/x.png.overlay.png", "b/x.jpg.overlay.png", "b/[1].overlay.png"}
    assert "nowhere.png: the image cannot be read" in output.err
    assert not list(Path("predictions").rglob("*.partial"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    with pytest.raises(UserError, match="no image is named on standard input"):
        predict("-", "--model", folder)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["/p/a/x.jpg", "/p/b/x.jpg"], ["a/x", "b/x"]),
        (["/p/x.jpg", "/p/x.png", "/p/X.webp", "/p/y.jpg"], ["x.jpg", "x.png", "X.webp", "y"]),
        (["/p/x.jpg", "/p/x.png", "/p/x.jpg.png"], ["x.jpg", "x.png", "x.jpg.png"]),
        (["/p/x", "/p/x.jpg"], ["x", "x.jpg"]),
        (["http://h/a/x.jpg?n=1", "http://h/a/x.jpg?n=2"], ["x.jpg", "x.jpg-2"]),
        (["http://h/%2e%2e/../../x.jpg", "https://g/y.jpg"], ["h/x", "g/y"]),
        (["http://h/a%2fb.png"], ["a_b"]),
        (["http://h", "/p/x.jpg"], ["http/h", "file/p/x"]),
        (["s3://bucket/k/x.jpg", "s3://bucket/k/l/x.jpg"], ["x", "l/x"]),
        (["/p/x.jpg", "/p/x.jpg"], ["x"]),
    ],
)
def test_no_two_images_share_a_name(given: list[str], names: list[str]) -> None:
    assert [source.name for source in naming.sources(given)] == names


class Server(BaseHTTPRequestHandler):
    content = b""

    def do_GET(self) -> None:
        status, kind, body = {
            "/photo.jpg": (200, "image/png", self.content),  # servers send another format under an old name
            "/photo": (200, "image/png; charset=binary", self.content),
            "/page": (200, "text/html", b"<html>"),
            "/large.png": (200, "image/png", b"\0" * 5000),
            "/endless.png": (200, "image/png", b"\0" * 5000),
            "/cut.png": (200, "image/png", self.content[:-20]),
        }.get(self.path.partition("?")[0], (404, "text/html", b"<html>no</html>"))
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if "endless" not in self.path:
            self.send_header("Content-Length", str(len(body) + 20 * ("cut" in self.path)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    Server.content = save(tmp_path / "served.png", (40, 50)).read_bytes()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_images_at_addresses(
    address: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(naming, "MOST_DOWNLOADED", len(Server.content))
    names = ("photo.jpg", "photo?token=x", "page", "large.png", "endless.png", "cut.png", "none.png")
    words = [f"{address}/{name}" for name in names]
    assert predict(*words, "http://127.0.0.1:1/x.png", "--model", folder, "--out", tmp_path / "out") == 1
    output = capsys.readouterr()
    assert len(output.out.splitlines()) == 2
    errors = output.err
    assert f"{address}/page: is no image but text/html; give the address of the image itself" in errors
    assert errors.count("has more than 0 MiB; download and scale it down first") == 2
    assert f"{address}/cut.png: the connection ended after" in errors
    assert f"{address}/none.png: the server answers 404 Not Found; correct the address" in errors
    assert "http://127.0.0.1:1/x.png: cannot be downloaded" in errors
    assert "6 of 8 images could not be predicted" in errors
    assert "token" not in errors + output.out


def test_a_server_that_says_little_is_given_up(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "SECONDS", -1.0)
    with pytest.raises(UserError, match=r"photo\.jpg: takes longer than -1 s"):
        http.download(f"{address}/photo.jpg", tmp_path / "file", 10**6)


def test_images_and_results_in_s3(
    server: SeaweedFS, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.used_by(monkeypatch, tmp_path / "node")
    root = f"s3://{BUCKET}/predict"
    for name in ("photos/a.png", "photos/deep/b.jpg", "more/c.png"):
        write_atomic(local(f"{root}/{name}"), save(tmp_path / name, (40, 50)).read_bytes())
    words = [f"{root}/photos", f"{root}/more/c.png", f"{root}/more/none.png"]
    assert predict(*words, "--model", folder, "--out", f"{root}/results", "--write", "csv") == 1
    output = capsys.readouterr()
    assert output.out.splitlines() == [f"{root}/results/{name}.csv" for name in ("photos/a", "photos/deep/b", "more/c")]
    assert f"error: {root}/more/none.png: the image cannot be read" in output.err
    node(monkeypatch, tmp_path / "other")
    assert csv_rows(local(f"{root}/results/more/c.csv"))


def test_centre_biases(model: Model, folder: Path, tmp_path: Path) -> None:
    photo = save(tmp_path / "photo.png", (120, 160))
    rows, columns = np.mgrid[:300, :400]
    bias = -(((rows - 60) / 180) ** 2) - ((columns - 300) / 240) ** 2

    def log_density(given: str | Path) -> np.ndarray:
        assert predict(photo, "--model", folder, "--out", tmp_path, "--write", "npy", "--center-bias", given) == 0
        return np.load(tmp_path / "photo.npy")

    own = log_density("model")
    np.testing.assert_allclose(own, model.predict(photo).log_density, atol=1e-5)
    flat = model.predict(photo, center_bias=np.zeros((120, 160))).log_density
    np.testing.assert_allclose(log_density("none"), flat, atol=1e-4)
    small = np.asarray(Image.fromarray(bias.astype(np.float32)).resize((160, 120), Image.Resampling.BOX), float)
    expected = model.predict(photo, center_bias=small).log_density
    assert np.abs(expected - own).max() > 0.5
    for name, values in (("log.npy", bias - 3), ("density.npy", np.exp(bias)), ("float.npy", np.float32(bias))):
        np.save(tmp_path / name, values)
        np.testing.assert_allclose(log_density(tmp_path / name), expected, atol=0.1)
    np.save(tmp_path / "hole.npy", np.where(rows < 9, 0, np.exp(bias)))
    with pytest.raises(UserError, match=r"--center-bias .*hole\.npy: .*not -inf as at 3600 of its 120000 pixels"):
        log_density(tmp_path / "hole.npy")


@pytest.mark.parametrize("turned", range(1, 9))
def test_photographs_are_predicted_as_they_are_shown(turned: int, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    exif = Image.Exif()
    exif[0x0112] = turned
    Image.fromarray(image(24, 32)).save(path, exif=exif)
    with Image.open(path) as stored:
        assert orientation(stored) == turned
        expected = np.asarray(ImageOps.exif_transpose(stored))
    ((_, pixels),) = naming.read(naming.sources([str(path)]))
    assert isinstance(pixels, np.ndarray)
    np.testing.assert_array_equal(pixels, expected)


FORBIDDEN = ("ray", "mlflow", "pysaliency", "pandas", "sklearn", "matplotlib", "h5py", "boto3", "torch._dynamo")
SCRIPT = f"""
import sys
class Forbidding:
    def find_spec(self, name, path=None, target=None):
        # No ImportError, after which some go on without it.
        if name.startswith({FORBIDDEN!r}):
            raise RuntimeError(f"import of {{name}}")
sys.meta_path.insert(0, Forbidding())
from acw.cli import main
main()
"""


def test_a_prediction_imports_nothing_that_is_slow(folder: Path, tmp_path: Path) -> None:
    save(tmp_path / "photo.jpg")
    words = ["predict", "photo.jpg", "--model", str(folder), "--write", "overlay,npy,png16,svg,csv"]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 5
    assert done.stderr.splitlines()[-1].startswith("predict: 1 of 1 images")
