"""Readers and the split: what is read is what is there, and each bad input is one clear line."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import shutil
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from scipy.ndimage import binary_dilation, gaussian_filter
from scipy.sparse import csc_array

from acw.data import Dataset, load_dataset, pysaliency_compat, split
from acw.data.images import decode_image, inspect_image
from acw.data.recording import subjects
from acw.storage.errors import UserError

GAZE = Path(__file__).parents[2] / "shared" / "gaze"
needs_gaze = pytest.mark.skipif(not GAZE.is_dir(), reason="the data set gaze is not beside the repository")

SIZES = {"Action/001": (40, 60), "Action/002": (48, 64), "Satelite/001": (40, 60)}


def cat2000(folder: Path, names: dict[str, tuple[int, int]] | None = None) -> Path:
    """A folder in CAT2000's layout; image number n of it has n + 1 fixations, at row r and column 2 r + n."""
    for number, (name, (height, width)) in enumerate((names or SIZES).items()):
        image = folder / "trainSet" / "Stimuli" / f"{name}.jpg"
        mat = folder / "trainSet" / "FIXATIONLOCS" / f"{name}.mat"
        for path in (image, mat):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (width, height), (number * 9, 80, 160)).save(image)
        marks = np.zeros((height, width), dtype=np.uint8)
        rows = np.arange(number + 1)
        marks[rows, 2 * rows + number] = 1
        savemat(mat, {"fixLocs": marks})
    output = folder / "trainSet" / "Stimuli" / "Action" / "Output"
    output.mkdir(exist_ok=True, parents=True)
    Image.new("RGB", (9, 9)).save(output / "001_SaliencyMap.jpg")
    Image.new("RGB", (9, 9)).save(output.parent / "001_SaliencyMap.jpg")
    return folder


def hdf5(
    folder: Path,
    *,
    category: np.ndarray | None = None,
    x: Sequence[float] = (1.5, 2.0, 59.9),
    n: Sequence[int] = (2, 0, 1),
) -> Path:
    """CAT2000's folder with pysaliency's HDF5 pair beside it, written by pysaliency."""
    pysaliency = pysaliency_compat.load()
    cat2000(folder)
    files = [str(folder / "trainSet" / "Stimuli" / f"{name}.jpg") for name in SIZES]
    attributes = {"source": np.array(["osie-10", "sun-a-7", "toy"])}
    if category is not None:
        attributes["category"] = category
    pysaliency.FileStimuli(files, attributes=attributes).to_hdf5(str(folder / "stimuli.hdf5"))
    y, subjects = np.array([0.5, 1.5, 2.5]), np.array([4, 5, 6])
    fixations = pysaliency.Fixations.create_without_history(np.array(x), y, np.array(n), subjects)
    fixations.to_hdf5(str(folder / "fixations.hdf5"))
    return folder


def images_and_csv(folder: Path, text: str) -> tuple[str, str]:
    (folder / "images" / "sub").mkdir(parents=True)
    Image.new("RGB", (30, 20)).save(folder / "images" / "a.png")
    Image.new("RGB", (10, 10)).save(folder / "images" / "sub" / "b.jpg")
    table = folder / "fixations.csv"
    table.write_text(text, encoding="utf-8")
    return str(folder / "images"), str(table)


def fixations_by_name(dataset: Dataset) -> dict[str, list[tuple[float, float]]]:
    return {
        stimulus.name: list(zip(*(axis.tolist() for axis in dataset.fixations_of(index)[:2]), strict=True))
        for index, stimulus in enumerate(dataset.stimuli)
    }


# --- What is read ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["", "trainSet"])
def test_cat2000_folder(tmp_path: Path, inner: str) -> None:
    dataset = load_dataset(str(cat2000(tmp_path) / inner))
    assert dataset.reader == "cat2000"
    assert dataset.name == tmp_path.name
    assert [(s.name, s.size, s.category) for s in dataset.stimuli] == [
        ("Action/001.jpg", (40, 60), "Action"),
        ("Action/002.jpg", (48, 64), "Action"),
        ("Satelite/001.jpg", (40, 60), "Satelite"),
    ]
    assert fixations_by_name(dataset)["Satelite/001.jpg"] == [(2.0, 0.0), (4.0, 1.0), (6.0, 2.0)]
    assert (dataset.subject == -1).all()
    assert dataset.category_index.tolist() == [0, 0, 1]
    assert dataset.stimuli[1].pixels().shape == (48, 64, 3)
    assert dataset.blur_sigma == pytest.approx((60 + 64 + 60) / 3 / 48)
    json.dumps(dataset.summary(), allow_nan=False)


def test_blur_of_full_hd_cat2000_is_40_px(tmp_path: Path) -> None:
    assert load_dataset(str(cat2000(tmp_path, {"Action/001": (1080, 1920)}))).blur_sigma == 40


def test_hdf5_pair_wins_and_keeps_subjects_sources_and_fractions(tmp_path: Path) -> None:
    folder = hdf5(tmp_path, category=np.array([0, 0, 1]))
    dataset = load_dataset(str(folder))
    assert dataset.reader == "hdf5"
    assert [s.name for s in dataset.stimuli] == ["Action/001.jpg", "Action/002.jpg", "Satelite/001.jpg"]
    assert [s.category for s in dataset.stimuli] == ["Action", "Action", "Satelite"]  # numbers that go with the folders
    assert [s.source for s in dataset.stimuli] == ["osie", "sun-a", "toy"]
    assert dataset.image.tolist() == [0, 1, 2]
    assert dataset.x.tolist() == [2.0, 59.9, 1.5]
    assert dataset.subject.tolist() == [5, 6, 4]
    (folder / "categories.json").write_text('{"category_names": ["Zoo", "Ant"]}', encoding="utf-8")
    assert load_dataset(str(folder)).categories == ("Ant", "Zoo")
    assert load_dataset(str(folder), reader="cat2000").stimuli_fingerprint == dataset.stimuli_fingerprint


def test_hdf5_categories_as_names_and_none(tmp_path: Path) -> None:
    named = load_dataset(str(hdf5(tmp_path / "named", category=np.array(["b", "a", "b"]))))
    assert [s.category for s in named.stimuli] == ["b", "a", "b"]
    assert load_dataset(str(hdf5(tmp_path / "none"))).categories == ("all",)


def test_csv_with_and_without_optional_columns(tmp_path: Path) -> None:
    text = "subject, image ,y,x,category\nanna,a.png,19.5,0,u\n,sub/b.jpg,1,2,v\nbert,./a.png,3,29.999999999999996,u\n"
    folder, table = images_and_csv(tmp_path / "all", text)
    dataset = load_dataset(folder, fixations=table)
    assert [(s.name, s.category) for s in dataset.stimuli] == [("a.png", "u"), ("sub/b.jpg", "v")]
    assert dataset.subject.tolist() == [0, 1, -1]
    assert dataset.x.max() == 29.999999999999996  # float32 would round it out of the image
    plain, table = images_and_csv(tmp_path / "plain", "image,x,y\na.png,1,2\nsub/b.jpg,3,4\n")
    assert load_dataset(plain, fixations=table).categories == ("all",)


def test_fixations_outside_are_dropped_only_if_asked(tmp_path: Path) -> None:
    text = "image,x,y\na.png,30,2\na.png,1,2\na.png,-0.1,2\nsub/b.jpg,3,4\n"
    folder, table = images_and_csv(tmp_path, text)
    with pytest.raises(
        UserError, match=r"fixations outside their image: 2 of 4 \(a\.png x=30 y=2 in 30x20, a\.png x=-0\.1"
    ):
        load_dataset(folder, fixations=table)
    with pytest.raises(UserError, match=r"2 of 4 .*more than 0\.1 of all.*--drop-outside SHARE"):
        load_dataset(folder, fixations=table, drop_outside=True)
    dataset = load_dataset(folder, fixations=table, drop_outside=0.5)
    assert dataset.x.tolist() == [1, 3]
    note = "dropped 2 of 4 fixations outside their image (at the user's request); most of a.png 2 of 3"
    assert dataset.notes == (note,)
    with pytest.raises(UserError, match="fixations outside their image: 1 of 3"):
        load_dataset(str(hdf5(tmp_path / "hdf5", x=(1.5, 60.0, 3.0))))


def test_fingerprints_tell_fixations_categories_and_images_apart(tmp_path: Path) -> None:
    dataset = load_dataset(str(cat2000(tmp_path)))
    moved = replace(dataset, x=dataset.x + np.float32(0.5))
    regrouped = replace(dataset, stimuli=(replace(dataset.stimuli[0], category="Art"), *dataset.stimuli[1:]))
    repainted = replace(dataset, stimuli=(replace(dataset.stimuli[0], digest="0"), *dataset.stimuli[1:]))
    renamed = replace(dataset, name="other", location="elsewhere")
    assert len({d.fingerprint for d in (dataset, moved, regrouped, repainted)}) == 4
    assert renamed.fingerprint == dataset.fingerprint
    assert moved.stimuli_fingerprint == regrouped.stimuli_fingerprint == dataset.stimuli_fingerprint
    assert repainted.stimuli_fingerprint != dataset.stimuli_fingerprint


def test_every_kind_of_image_becomes_8_bit_rgb_as_stored(tmp_path: Path) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)
    image = Image.fromarray(rgb)
    for mode in ("RGBA", "CMYK", "RGB"):
        image.convert(mode).save(tmp_path / f"{mode}.tif")
        assert np.abs(decode_image(tmp_path / f"{mode}.tif").astype(int) - rgb).max() <= 1, mode
    for mode in ("L", "LA", "P", "1"):
        image.convert(mode).save(tmp_path / f"{mode}.png")
        np.testing.assert_array_equal(
            decode_image(tmp_path / f"{mode}.png"), np.asarray(image.convert(mode).convert("RGB"))
        )
    Image.fromarray(np.full((6, 10), 0x7F01, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert (decode_image(tmp_path / "deep.png") == 0x7F).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees"
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert decode_image(tmp_path / "turned.jpg").shape == (6, 10, 3)


# --- Bad input ---------------------------------------------------------------------------------------------------


def _no_locations(folder: Path) -> None:
    shutil.rmtree(folder / "trainSet" / "FIXATIONLOCS")


def _misspelt_locations(folder: Path) -> None:
    (folder / "trainSet" / "FIXATIONLOCS").rename(folder / "trainSet" / "fixationlocs")


def _no_mat(folder: Path) -> None:
    (folder / "trainSet/FIXATIONLOCS/Action/002.mat").unlink()


def _no_image(folder: Path) -> None:
    (folder / "trainSet/Stimuli/Action/002.jpg").unlink()


def _truncated(folder: Path) -> None:
    path = folder / "trainSet/Stimuli/Action/002.jpg"
    path.write_bytes(path.read_bytes()[:-20])


def _not_an_image(folder: Path) -> None:
    (folder / "trainSet/Stimuli/Action/002.jpg").write_text("<html>not found</html>", encoding="utf-8")


def _no_variable(folder: Path) -> None:
    savemat(folder / "trainSet/FIXATIONLOCS/Action/002.mat", {"fixations": np.ones((48, 64))})


def _other_shape(folder: Path) -> None:
    savemat(folder / "trainSet/FIXATIONLOCS/Action/002.mat", {"fixLocs": np.ones((64, 48))})


def _nan_marks(folder: Path) -> None:
    savemat(folder / "trainSet/FIXATIONLOCS/Action/002.mat", {"fixLocs": np.full((48, 64), np.nan)})


def _broken_mat(folder: Path) -> None:
    path = folder / "trainSet/FIXATIONLOCS/Action/002.mat"
    path.write_bytes(path.read_bytes()[:150])


def _no_fixation(folder: Path) -> None:
    savemat(folder / "trainSet/FIXATIONLOCS/Action/002.mat", {"fixLocs": np.zeros((48, 64), dtype=np.uint8)})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "there is no such folder"),
        (_no_locations, "no folder FIXATIONLOCS"),
        (_misspelt_locations, "no folder FIXATIONLOCS"),
        (_no_mat, r"images without a file in FIXATIONLOCS: 1 \(Stimuli/Action/002.jpg\)"),
        (_no_image, r"files of fixations without an image in Stimuli: 1 \(FIXATIONLOCS/Action/002.mat\)"),
        (_truncated, r"Action/002.jpg: the image is damaged or cut short"),
        (_not_an_image, r"Action/002.jpg: not an image"),
        (_no_variable, r"Action/002.mat: has no variable fixLocs"),
        (_other_shape, r"Action/002.mat: fixLocs has shape \(64, 48\) .* 48 rows and 64 columns"),
        (_nan_marks, r"Action/002.mat: fixLocs has values that are not finite"),
        (_broken_mat, r"Action/002.mat: cannot be read as a MATLAB file"),
        (_no_fixation, r"images without a fixation: 1 \(Action/002.jpg\)"),
    ],
)
def test_spoilt_cat2000_folder(tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    folder = cat2000(tmp_path / "set")
    spoil(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_dataset(str(folder))
    assert "\n" not in str(caught.value)


def test_folder_of_no_known_layout_and_wrong_choices(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither stimuli.hdf5 .* nor CAT2000's .* CSV of fixations"):
        load_dataset(str(tmp_path))
    folder = str(cat2000(tmp_path))
    with pytest.raises(UserError, match="reader matlab: unknown"):
        load_dataset(folder, reader="matlab")
    with pytest.raises(UserError, match="takes no fixations file"):
        load_dataset(folder, fixations="f.csv")
    with pytest.raises(UserError, match=r"has no stimuli\.hdf5"):
        load_dataset(folder, reader="hdf5")
    with pytest.raises(UserError, match="needs a CSV file"):
        load_dataset(folder, reader="csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,x\na.png,1\n", r"has no column 'y' \(it has image, x\)"),
        ("", "has no column 'image'"),
        ("image,x,y\na.png,1,2\nsub/b.jpg,1,two\n", "line 3: y is 'two', not a number"),
        ("image,x,y\na.png,nan,2\n", "line 2: x is 'nan'"),
        ("image,x,y\na.png,1\n", "line 2: has 2 fields where the header has 3"),
        ("image,x,y\na.png,1,\n", "line 2: y is '', missing"),
        ("image,x,y\nc.png,1,2\n", "line 2: the image c.png is not in"),
        ("image,x,y\na.png,1,2\n", r"images without a fixation in fixations.csv: 1 \(sub/b.jpg\)"),
        ("image,x,y\n../fixations.csv,1,2\n", "lies outside the folder"),
        ("image,x,y,category\na.png,1,2,u\na.png,1,2,v\n", "line 3: a.png has the category 'v' and 'u'"),
        ("image,x,y,category\na.png,1,2,\n", "line 2: a.png has the category ''"),
        ("image,x,y,category\na.png,1,2,u\na.png,1,2,N/A\n", "line 3: a.png has the category 'N/A' and 'u'"),
        ("image,x,y\na.png,137,2,46,2\n", "line 2: has 5 fields where the header has 3; are there decimal commas"),
        ("image,x,y\na.png,1,2\na.png,13,5,2\n", "line 3: has 4 fields"),
        ("image;x;y\na.png;13,5;2\n", "line 2: x is '13,5', with a decimal comma"),
        ("image;x;y\na.png;1;2;3\n", "line 2: has 4 fields where the header has 3; quote names that hold semicolons"),
        ("image,x,y,x,y\na.png,1,2,3,4\n", r"has the column 'x' 2 times \(two eyes\?\)"),
        ("image,x,y, image\na.png,1,2,3\n", "has the column 'image' 2 times"),
        ('image,x,y\n"a.png,1,2\na.png,1,2\nsub/b.jpg",1,2\n', r'line 2: a quote \("\) goes on until line 4'),
        ('image,x,y\na.png,1,2\n"sub/b.jpg,1,2\n', "cannot be read as a CSV file"),
        ('image,x,y\n"a".png,1,2\n', "cannot be read as a CSV file"),
        ("image,x,y\na.png,NA,2\n", "line 2: x is 'NA', missing; remove the line"),
        ("image,x,y\na.png,.,2\n", "line 2: x is '.', missing"),
        ("image,x,y\na.png,1_0,2\n", "line 2: x is '1_0', not a number"),
        ("image,x,y\na.png,1e999,2\n", "line 2: x is '1e999', not a number"),
        ("image,x,y\na.png\0,1,2\n", "line 2: holds a NUL byte"),
        ("image,x,y\na\x07.png,1,2\n", "holds a character that cannot be printed"),
        ("image,x,y\n" + "a" * 300 + ".png,1,2\n", "cannot be a file's name"),
        ("sep=;\nimage;x\na.png;1\n", r"has no column 'y' \(it has image, x\)"),
        ("image x y\na.png 1 2\n", "its columns are separated by blanks"),
        ('"image" "x" "y"\n"1" "a.png" 1 2\n', "its columns are separated by blanks"),
        ("image,x,y\n1,a.png,1,2\n", "is the first of them a row's name, as R writes it"),
        ('image,x,y\na.png,"1,290",2\n', "x is '1,290', with a decimal comma, or one between thousands"),
        ("image;x;y\na.png;1.290;2\na.png;12;2\n", "x is '1.290' in one line and has no point in others"),
        ("image,x,y\nA.PNG,1,2\n", r"A.PNG is not in .* \(it has a.png, which differs in its capitals\)"),
        ("image,x,y\nsub\\b.jpg,1,2\n", r"is not in .* \(it has sub/b.jpg\)"),
        ("image,x,y\na,1,2\n", r"a is not in .* \(it has a.png: names are with their endings\)"),
    ],
)
def test_spoilt_csv(tmp_path: Path, text: str, message: str) -> None:
    folder, table = images_and_csv(tmp_path, text)
    with pytest.raises(UserError, match=message) as caught:
        load_dataset(folder, fixations=table)
    assert "\n" not in str(caught.value)
    assert "\0" not in str(caught.value)


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_what_programs_write_is_read(tmp_path: Path, delimiter: str) -> None:
    """Other delimiters, empty rows, trailing delimiters, Windows' line ends, a byte order mark, quoted names."""
    rows = [
        '"image";"x";"y";subject',
        '"a.png";1.5;2;NA',
        ";;;",
        "",
        "a.png;+3e0;.5;p1;",
        "sub/b.jpg;3;4;",
        "a.png;1;1;p2",
    ]
    folder, table = images_and_csv(tmp_path, "")
    text = "\r\n".join(rows).replace(";", delimiter)
    Path(table).write_bytes(b"\xef\xbb\xbf" + text.encode())
    dataset = load_dataset(folder, fixations=table)
    assert fixations_by_name(dataset) == {"a.png": [(1.5, 2.0), (3.0, 0.5), (1.0, 1.0)], "sub/b.jpg": [(3.0, 4.0)]}
    assert dataset.subject.tolist() == [-1, 0, 1, -1]


@pytest.mark.parametrize(
    "missing", ["", "NA", "N/A", "n/a", "NaN", "nan", "null", "NULL", "None", ".", "-", "-1", "<NA>"]
)
def test_a_missing_subject_is_no_person(missing: str) -> None:
    assert subjects([missing, "p05", missing, "p06"]).tolist() == [-1, 0, -1, 1]
    assert subjects([3, "3", 3.0, missing]).tolist() == [3, 3, 3, -1]


def test_names_are_found_in_whatever_unicode_form(tmp_path: Path) -> None:
    composed, decomposed = "Caf\u00e9", "Cafe\u0301"
    (tmp_path / decomposed).mkdir()
    Image.new("RGB", (30, 20)).save(tmp_path / decomposed / f"{decomposed}.png")
    Image.new("RGB", (30, 20)).save(tmp_path / decomposed / "b.png")
    table = tmp_path / "f.csv"
    rows = [f"{composed}/{composed}.png,1,2,{composed}", f"{decomposed}/b.png,1,2,{decomposed}"]
    table.write_text("image,x,y,category\n" + "\n".join(rows) + "\n", encoding="utf-8")
    dataset = load_dataset(str(tmp_path), fixations=str(table))
    assert dataset.categories == (composed,)
    assert dataset.stimuli[0].pixels().shape == (20, 30, 3)
    folder = cat2000(tmp_path / "cat", {f"Action/{composed}": (40, 60)})
    mat = folder / "trainSet/FIXATIONLOCS/Action" / f"{composed}.mat"
    mat.rename(mat.with_name(f"{decomposed}.mat"))
    assert len(load_dataset(str(folder)).x) == 1


# --- Coordinates -------------------------------------------------------------------------------------------------

SCREEN = (300, 400)


def recorded(folder: Path, x: np.ndarray, y: np.ndarray, *, orientation: int = 1) -> Callable[..., Dataset]:
    """What reads a folder of two images of 400x300 px with these fixations, (2, F) px."""
    folder.mkdir(exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", SCREEN[::-1]).save(folder / name, exif=exif)
    rows = [f"{'ab'[i]}.jpg,{across!r},{down!r}" for i in range(2) for across, down in zip(x[i], y[i], strict=True)]
    table = folder / "f.csv"
    table.write_text("\n".join(["image,x,y", *rows]).replace("np.float64(", "").replace(")", ""), encoding="utf-8")
    return functools.partial(load_dataset, str(folder), fixations=str(table))


@pytest.fixture
def px() -> tuple[np.ndarray, np.ndarray]:
    """Fixations in px of two images of 400x300, (2, 60) each, all over them."""
    rng = np.random.default_rng(0)
    return np.round(rng.uniform(5, 395, (2, 60)), 2), np.round(rng.uniform(5, 295, (2, 60)), 2)


def test_shares_and_centres_are_refused_and_converted_when_asked(
    tmp_path: Path, px: tuple[np.ndarray, np.ndarray]
) -> None:
    x, y = px
    expected = recorded(tmp_path / "px", x, y)()
    cases: list[tuple[np.ndarray, np.ndarray, str, dict[str, str]]] = [
        (x / 400, y / 300, "shares of the width and height; say --units share,", {"units": "share"}),
        (x - 200, y - 150, "px from the images' centre; say --origin centre", {"origin": "centre"}),
        (
            x / 400 - 0.5,
            y / 300 - 0.5,
            "shares from the centre; say --units share --origin centre",
            {"units": "share", "origin": "centre"},
        ),
    ]
    for number, (across, down, reason, options) in enumerate(cases):
        load = recorded(tmp_path / str(number), across, down)
        for drop in (False, True):
            with pytest.raises(UserError, match=reason):
                load(drop_outside=drop)
        dataset = load(**options)
        np.testing.assert_allclose(dataset.x, expected.x, atol=1e-9)
        np.testing.assert_allclose(dataset.y, expected.y, atol=1e-9)
        assert dataset.notes
    # A few fixations off the screen do not make shares px; 1 is the edge and in the image.
    x, y = x / 400, y / 300
    x[0, :2] = -0.02, 1.01
    with pytest.raises(UserError, match="say --units share"):
        recorded(tmp_path / "stray", x, y)(drop_outside=True)
    x[0, :2] = 1.0
    assert recorded(tmp_path / "edge", x, y)(units="share").x.max() == np.nextafter(400, 0)


@pytest.mark.parametrize(
    ("x", "y", "reason"),
    [
        (lambda x, y: x / 200 - 1, lambda x, y: y / 150 - 1, r"half the width and height from the centre \(-1 to 1\)"),
        (lambda x, y: x / 4, lambda x, y: y / 3, "look like percent; divide by 100 and say --units share"),
        (lambda x, y: np.ceil(x / x.max() * 400), lambda x, y: y.clip(1), "counted from 1; subtract 1"),
        (lambda x, y: y, lambda x, y: x, "fit when x and y are swapped"),
        (lambda x, y: x * 4.8, lambda x, y: y * 3.6, "4.7 times as far as the images: are they px of a screen"),
        (lambda x, y: np.where(x < 80, -9999, x), lambda x, y: np.where(x < 80, -9999, y), "as a lost eye is written"),
        (lambda x, y: np.where(x < 80, 0, x), lambda x, y: np.where(x < 80, 0, y), "exactly at x=0 y=0"),
        (lambda x, y: np.where(x < 20, 0, x), lambda x, y: np.where(x < 20, 0, y), "exactly at x=0 y=0"),
        (lambda x, y: np.where(x < 20, -32768, x / 400), lambda x, y: y / 300, "shares of the width and height"),
        (lambda x, y: (x - 200) / 35, lambda x, y: (y - 150) / 35, "degrees of visual angle from the centre"),
        (lambda x, y: x / 35, lambda x, y: y / 35, "degrees of visual angle or another unit than px"),
        (
            lambda x, y: (x - 200) / 300,
            lambda x, y: (150 - y) / 300,
            "shares of the height from the centre; .* --y-axis",
        ),
        (lambda x, y: x / 400, lambda x, y: y, "a share of the width in x alone"),
        (
            lambda x, y: np.repeat(x[:, :20], 3, 1),
            lambda x, y: np.repeat(y[:, :20], 3, 1),
            "80 of 120 fixations repeat",
        ),
    ],
)
def test_the_likely_reason_is_named(
    tmp_path: Path,
    px: tuple[np.ndarray, np.ndarray],
    x: Callable[[np.ndarray, np.ndarray], np.ndarray],
    y: Callable[[np.ndarray, np.ndarray], np.ndarray],
    reason: str,
) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        recorded(tmp_path, x(*px), y(*px))()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("convention", "x", "y"),
    [
        ({"units": "height", "origin": "centre", "y_axis": "up"}, lambda x: (x - 200) / 300, lambda y: (150 - y) / 300),
        ({"units": "share", "y_axis": "up"}, lambda x: x / 400, lambda y: 1 - y / 300),
        ({"y_axis": "up"}, lambda x: x, lambda y: 300 - y),
    ],
)
def test_every_convention_gives_the_same_px(
    tmp_path: Path,
    px: tuple[np.ndarray, np.ndarray],
    convention: dict[str, str],
    x: Callable[[np.ndarray], np.ndarray],
    y: Callable[[np.ndarray], np.ndarray],
) -> None:
    expected = recorded(tmp_path / "px", *px)()
    dataset = recorded(tmp_path / "other", x(px[0]), y(px[1]))(**convention)
    np.testing.assert_allclose(dataset.x, expected.x, atol=1e-9)
    np.testing.assert_allclose(dataset.y, expected.y, atol=1e-9)
    assert any("y going" in note for note in dataset.notes)


def test_px_that_are_called_something_else_are_told(tmp_path: Path, px: tuple[np.ndarray, np.ndarray]) -> None:
    for units in ("share", "height"):
        with pytest.raises(UserError, match=f"look like px; leave out --units {units}"):
            recorded(tmp_path / units, *px)(units=units)
    with pytest.raises(UserError, match="--drop-outside 1: give the share"):
        recorded(tmp_path / "share", *px)(drop_outside=1)


def test_what_is_odd_becomes_a_note(tmp_path: Path, px: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = px
    (first, _) = recorded(tmp_path, x, y, orientation=3)().notes
    assert first.startswith("pixels are read as stored, whatever EXIF says of 2 images (a.jpg, b.jpg)")
    rows = ["image,x,y,category", *(f"{name}.jpg,{100 + k}.5,90,{c}" for k, (name, c) in enumerate(("aA", "ba")))]
    (tmp_path / "f.csv").write_text("\n".join(rows), encoding="utf-8")
    notes = load_dataset(str(tmp_path), fixations=str(tmp_path / "f.csv")).notes
    assert any("categories differ in their capitals alone (A, a)" in note for note in notes)


def test_an_exif_orientation_is_named_where_it_explains(tmp_path: Path, px: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = px
    with pytest.raises(UserError, match=r"a\.jpg has an EXIF orientation that turns it"):
        recorded(tmp_path, x * 0.75, y / 0.75, orientation=6)()


def test_fixations_of_a_smaller_image_are_noted(tmp_path: Path, px: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = px
    twins, corner = recorded(tmp_path, x * 0.4, y * 0.4)().notes
    assert "2 images are there twice, under other names (a.jpg, b.jpg)" in twins
    assert "upper left 39% by 39%" in corner


def test_units_are_not_for_marked_pixels(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="marks pixels of the images, so leave out --units, --origin and --y-axis"):
        load_dataset(str(cat2000(tmp_path)), units="share")


def test_a_fixation_stays_in_the_pixel_that_pysaliency_takes(tmp_path: Path) -> None:
    x, y = np.full((2, 1), 327.99999999999994), np.full((2, 1), 10.5)
    assert recorded(tmp_path, x, y)().x.astype(int).tolist() == [327, 327]


def test_a_folder_states_its_pixels_per_degree(tmp_path: Path, px: tuple[np.ndarray, np.ndarray]) -> None:
    """And its name alone changes nothing: a folder called gaze is like any other."""
    load = recorded(tmp_path / "gaze", *px)
    assert load().blur_sigma == pytest.approx(400 / 48)
    statement = tmp_path / "gaze" / "acw.json"
    statement.write_text('{"pixels_per_degree": 30, "name": "ours", "licence": "MIT"}', encoding="utf-8")
    dataset = load()
    assert (dataset.name, dataset.blur_sigma, dataset.summary()["licence"]) == ("ours", 30, "MIT")
    for text, message in (
        ("{", "cannot be read as JSON"),
        ('{"pixels": 3}', "no JSON object with keys of licence, name, pixels_per_degree"),
        ('{"pixels_per_degree": 0}', "pixels_per_degree is 0"),
        ('{"pixels_per_degree": true}', "pixels_per_degree is True"),
        ('{"pixels_per_degree": 0.028}', "0.028 px a degree of visual angle cannot be in images 400 px wide"),
        ('{"pixels_per_degree": 1e7}', r"1e\+07 px a degree"),
        ('{"name": 3}', "name is 3"),
        ('{"name": " "}', "name is ' '"),
        ('{"name": "a\\u0000b"}', "holds a character that cannot be printed"),
        ('{"licence": "\\ud800"}', "holds a character that cannot be printed"),
    ):
        statement.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            load()


# --- Maps of fixations -------------------------------------------------------------------------------------------


def marked(folder: Path, marks: np.ndarray) -> Callable[[], Dataset]:
    """What reads a CAT2000 folder of one image with these marks."""
    cat2000(folder, {"Action/001": marks.shape})  # type: ignore[dict-item]
    savemat(folder / "trainSet/FIXATIONLOCS/Action/001.mat", {"fixLocs": marks})
    return lambda: load_dataset(str(folder))


def test_counts_are_counted_and_equal_marks_are_one_fixation_each(tmp_path: Path) -> None:
    marks = np.zeros((120, 160))
    marks[[3, 50, 90], [4, 60, 100]] = 1, 3, 2
    dataset = marked(tmp_path / "counts", marks)()
    assert list(zip(dataset.x.tolist(), dataset.y.tolist(), strict=True)) == [(4, 3), *[(60, 50)] * 3, *[(100, 90)] * 2]
    for number, equal in enumerate((np.uint8(255), np.float64(1), True)):
        assert (
            len(marked(tmp_path / str(number), np.where(marks > 0, equal, 0).astype(np.asarray(equal).dtype))().x) == 3
        )
    assert len(marked(tmp_path / "sparse", csc_array(marks.astype(np.float64)))().x) == 6


def test_a_map_that_is_none_of_fixations_is_refused(tmp_path: Path) -> None:
    marks = np.zeros((240, 320))
    marks[np.random.default_rng(0).integers(20, 200, (2, 40))[0], np.random.default_rng(1).integers(20, 300, 40)] = 1
    blurred = gaussian_filter(marks, 8)
    cases = {
        "blurred map": blurred,
        "a blurred map?": np.round(blurred / blurred.max() * 255).astype(np.uint8),
        "areas and not pixels": np.round(blurred / blurred.max() * 12) * (blurred > 0.3 * blurred.max()),
        "(a blurred map, or an inverted one?)": 1 - marks,
        "a blurred map, discs, or an enlarged map?": (gaussian_filter(marks, 3) > 0.004).astype(np.uint8),
        "discs, or an enlarged map?)": np.kron(marks[::2, ::2], np.ones((2, 2))),
        "areas and not pixels (": binary_dilation(marks[:, ::-1], np.ones((5, 5))).astype(float),
        "numbers of subjects, or in order?": np.cumsum(marks).reshape(marks.shape) * marks,
        "values below 0": marks - 2 * np.roll(marks, 5),
        "transposed": marks.T,
    }
    for number, (reason, wrong) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        load = marked(folder, marks)
        savemat(folder / "trainSet/FIXATIONLOCS/Action/001.mat", {"fixLocs": wrong})
        with pytest.raises(UserError, match=re.escape(reason)):
            load()


# --- Images of 16 bits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("depth", [8, 10, 12, 14, 16])
def test_grey_is_scaled_by_the_bits_that_it_uses(tmp_path: Path, suffix: str, depth: int) -> None:
    ramp = np.linspace(0, 255, 120 * 90).reshape(90, 120)
    grey = np.floor(ramp / 256 * 2**depth).astype(np.uint16)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(grey).save(path)
    np.testing.assert_allclose(decode_image(path)[:, :, 0], ramp, atol=1.01)
    inspected = inspect_image(path)
    assert inspected.depth == depth
    # Features of what an earlier version read otherwise are not taken for this image's.
    assert (inspected.digest == hashlib.sha256(path.read_bytes()).hexdigest()) == (depth == 16)


def test_colours_of_16_bits_that_use_fewer_are_refused(tmp_path: Path) -> None:
    def tiff(bits: int) -> Path:
        """A minimal uncompressed TIFF of 8x8 px with 16 bits a channel, whose values use so many."""
        pixels = np.full((8, 8, 3), 2**bits - 1, "<u2").tobytes()
        tags = [(256, 3, 8), (257, 3, 8), (259, 3, 1), (262, 3, 2), (277, 3, 3), (278, 3, 8), (279, 4, len(pixels))]
        end = 8 + 2 + 12 * (len(tags) + 2) + 4
        entries = [struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags]
        entries += [struct.pack("<HHII", 258, 3, 3, end), struct.pack("<HHII", 273, 4, 1, end + 6)]
        entries.sort(key=lambda entry: struct.unpack("<H", entry[:2]))
        body = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4) + struct.pack("<3H", 16, 16, 16)
        path = tmp_path / f"{bits}.tif"
        path.write_bytes(b"II*\0" + struct.pack("<I", 8) + body + pixels)
        return path

    assert decode_image(tiff(16)).tolist() == np.full((8, 8, 3), 255).tolist()
    for bits in (8, 12):
        for function in (decode_image, inspect_image):
            with pytest.raises(UserError, match=r"has 16 bits a channel and uses .* save it with 8 bits"):
                function(tiff(bits))


def test_a_hot_pixel_does_not_decide_on_the_bits(tmp_path: Path) -> None:
    grey = np.linspace(0, 4095, 120 * 90).reshape(90, 120).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    expected = decode_image(tmp_path / "a.png")
    grey[40, 50] = 65535
    Image.fromarray(grey).save(tmp_path / "a.png")
    expected[40, 50] = 255
    np.testing.assert_array_equal(decode_image(tmp_path / "a.png"), expected)
    assert inspect_image(tmp_path / "a.png").depth == 12


def test_what_would_be_read_as_another_picture_is_refused(tmp_path: Path) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    image, black = Image.fromarray(rgb), np.zeros_like(rgb)
    dark = {"dark.png": rgb // 128, "dark.bmp": rgb // 128, "dark16.png": (rgb[:, :, 0] // 128).astype(np.uint16)}
    for name, pixels in dark.items():
        Image.fromarray(pixels).save(tmp_path / name)
        with pytest.raises(UserError, match=rf"{name}: its values are all 0 or 1, nearly black"):
            decode_image(tmp_path / name)
    Image.fromarray(rgb[:, :, 0] > 128).save(tmp_path / "drawing.png")
    assert set(np.unique(decode_image(tmp_path / "drawing.png"))) == {0, 255}
    for name in ("moves.gif", "moves.webp", "moves.png", "pages.tif"):
        image.save(tmp_path / name, save_all=True, append_images=[image.rotate(180)])
        with pytest.raises(UserError, match=f"{name}: holds several pictures"):
            inspect_image(tmp_path / name)
        image.save(tmp_path / name)
        assert inspect_image(tmp_path / name).size == (48, 64)
    image.save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=[image.resize((32, 24))])
    assert decode_image(tmp_path / "phone.jpg").shape == rgb.shape
    logo = Image.fromarray(np.dstack([black, rgb[:, :, 0]]))
    for name, mode in (("logo.png", "RGBA"), ("grey.png", "LA")):
        logo.convert(mode).save(tmp_path / name)
        with pytest.raises(UserError, match=f"{name}: is of one colour, and its shapes are in its transparency"):
            decode_image(tmp_path / name)
    Image.fromarray(black).save(tmp_path / "black.png")
    assert not decode_image(tmp_path / "black.png").any()
    deep = Image.fromarray(rgb[:, :, 0].astype(np.uint16) * 257)
    deep.save(tmp_path / "negative.tif", tiffinfo={262: 0})
    for function in (decode_image, inspect_image):
        with pytest.raises(UserError, match=r"in which white is 0 \(WhiteIsZero\); save it with black as 0"):
            function(tmp_path / "negative.tif")


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"optimize": True}, {"restart_marker_rows": 1}])
def test_a_jpeg_whose_rest_is_missing_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    """Cut short and given an end; or, unless it can resume there, zeroed in between. Grey bars are whole."""
    noise = gaussian_filter(np.random.default_rng(0).normal(size=(96, 128, 3)), (3, 3, 0))
    pixels = (128 + 600 * noise).clip(0, 255).astype(np.uint8)
    path = tmp_path / "a.jpg"
    for bar in (0, 40):
        pixels[96 - bar :] = 128
        Image.fromarray(pixels).save(path, **options)
        decode_image(path)
        whole = path.read_bytes()
        third = len(whole) // 3
        cut = [whole[:third] + b"\xff\xd9", whole[: -third // 2] + b"\xff\xd9"]
        if not bar and "restart_marker_rows" not in options:
            cut.append(whole[:third] + bytes(third) + whole[2 * third :])
        for content in cut:
            path.write_bytes(content)
            with pytest.raises(UserError, match=r"a\.jpg: the image is damaged"):
                decode_image(path)


def test_csv_that_is_missing_or_no_text(tmp_path: Path) -> None:
    folder, table = images_and_csv(tmp_path, "")
    Path(table).write_bytes(b"image,x,y\n\xff\xfe\n")
    for path in (table, table + ".gone"):
        with pytest.raises(UserError, match="cannot be read as a CSV file"):
            load_dataset(folder, fixations=path)


def test_spoilt_hdf5(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fixations with NaN coordinates: 1"):
        load_dataset(str(hdf5(tmp_path / "nan", x=(1.0, np.nan, 2.0))))
    with pytest.raises(UserError, match="names images beyond the 3"):
        load_dataset(str(hdf5(tmp_path / "beyond", n=(0, 1, 3))))
    with pytest.raises(UserError, match="images without a fixation: 1"):
        load_dataset(str(hdf5(tmp_path / "unseen", n=(0, 1, 1))))
    with pytest.raises(UserError, match=r"categories\.json: is missing"):
        load_dataset(str(hdf5(tmp_path / "numbers", category=np.array([0, 1, 2]))))

    folder = hdf5(tmp_path / "set", category=np.array([0, 0, 2]))
    (folder / "categories.json").write_text('{"category_names": ["a", "b"]}', encoding="utf-8")
    with pytest.raises(UserError, match="has 2 names, too few"):
        load_dataset(str(folder))
    (folder / "categories.json").write_text("[]", encoding="utf-8")
    with pytest.raises(UserError, match="is not like"):
        load_dataset(str(folder))
    (folder / "categories.json").unlink()

    image = folder / "trainSet/Stimuli/Action/001.jpg"
    Image.new("RGB", (30, 20)).save(image)
    with pytest.raises(UserError, match=r"is 30x20 px, but stimuli\.hdf5 says 60x40"):
        load_dataset(str(folder))
    image.unlink()
    with pytest.raises(UserError, match=r"stimuli\.hdf5: the image .*Action/001.jpg is not in"):
        load_dataset(str(folder))
    Image.new("RGB", (60, 40)).save(tmp_path / "elsewhere.jpg")
    image.symlink_to(tmp_path / "elsewhere.jpg")
    with pytest.raises(UserError, match="lies outside the folder"):
        load_dataset(str(folder))
    (folder / "fixations.hdf5").write_bytes(b"not HDF5")
    with pytest.raises(UserError, match="pysaliency cannot read it"):
        load_dataset(str(folder))


def test_nan_inside_a_scanpath_is_counted_and_padding_is_not(tmp_path: Path) -> None:
    import h5py

    folder = hdf5(tmp_path)
    pysaliency = pysaliency_compat.load()
    paths = pysaliency.FixationTrains.from_fixation_trains(
        [[1, 2, 3], [4], [5, 6]], [[1, 2, 3], [4], [5, 6]], [[1, 2, 3], [1], [1, 2]], [0, 1, 2], [7, 8, 9]
    )
    paths.to_hdf5(str(folder / "fixations.hdf5"))
    dataset = load_dataset(str(folder))
    assert dataset.x.tolist() == [1, 2, 3, 4, 5, 6]
    assert dataset.subject.tolist() == [7, 7, 7, 8, 9, 9]
    with h5py.File(folder / "fixations.hdf5", "r+") as file:
        file["train_xs"][0, 1] = np.nan
        file["train_ys"][1, 0] = np.nan
    with pytest.raises(UserError, match="fixations with NaN coordinates: 2"):
        load_dataset(str(folder))


def test_an_image_that_changes_after_loading_is_noticed(tmp_path: Path) -> None:
    stimulus = load_dataset(str(cat2000(tmp_path))).stimuli[0]
    Image.new("RGB", (30, 20)).save(stimulus.path)
    with pytest.raises(UserError, match="is 30x20 px, but was 60x40"):
        stimulus.pixels()
    Path(stimulus.path).unlink()
    with pytest.raises(UserError, match="cannot be read"):
        stimulus.pixels()


# --- The split ---------------------------------------------------------------------------------------------------


cached_load = functools.cache(load_dataset)


def many(counts: dict[str, int]) -> Dataset:
    """A data set of that many images per category; the files are never opened."""
    template = cached_load("synthetic")
    stimuli = tuple(
        replace(template.stimuli[0], name=f"{category}/{index:03d}.jpg", category=category)
        for category, count in counts.items()
        for index in range(count)
    )
    return replace(template, stimuli=stimuli)


def places(dataset: Dataset, seed: int = 0) -> dict[str, int]:
    return {s.name: int(f) for s, f in zip(dataset.stimuli, split(dataset, seed).fold, strict=True)}


def test_split_of_cat2000_is_the_papers() -> None:
    dataset = many({f"c{index}": 100 for index in range(20)})
    cut = split(dataset, seed=7)
    for category in range(20):
        folds = cut.fold[dataset.category_index == category]
        assert np.bincount(folds + 1).tolist() == [20, 16, 16, 16, 16, 16]
    assert sorted([*cut.held_out, *cut.development]) == list(range(2000))
    for fold in range(5):
        assert sorted([*cut.training(fold), *cut.validation(fold)]) == cut.development.tolist()


def test_left_over_images_do_not_pile_up_in_the_first_folds() -> None:
    dataset = many({f"c{index}": 7 + index % 3 for index in range(60)})
    sizes = np.bincount(split(dataset, seed=1).fold + 1)[1:]
    assert sizes.sum() == sum(7 + index % 3 - (1 if index % 3 == 0 else 2) for index in range(60))
    assert sizes.max() - sizes.min() < 30  # all dealt from fold 0 on: 60 apart


def test_a_place_depends_on_seed_and_the_categorys_names_only() -> None:
    small, large = many({"a": 30, "b": 11}), many({"c": 9, "a": 30, "b": 11})
    shuffled = replace(small, stimuli=small.stimuli[::-1])
    assert places(small).items() <= places(large).items()
    assert places(shuffled) == places(small)
    assert split(shuffled, 0).hash == split(small, 0).hash
    assert split(small, 1).hash != split(small, 0).hash != split(large, 0).hash
    assert places(small, 1) != places(small)


def test_a_category_too_small_is_refused() -> None:
    assert np.bincount(split(many({"a": 6}), 0).fold + 1).tolist() == [1, 1, 1, 1, 1, 1]
    with pytest.raises(UserError, match="category b: has 5 images, too few"):
        split(many({"a": 30, "b": 5}), 0)
    with pytest.raises(UserError, match="holdout"):
        split(many({"a": 30}), 0, holdout=1.0)


# --- Real fixations ----------------------------------------------------------------------------------------------


@needs_gaze
def test_gaze_by_both_readers() -> None:
    pair, folder = load_dataset(str(GAZE)), load_dataset(str(GAZE), reader="cat2000")
    assert (len(pair.stimuli), len(pair.x), len(pair.categories)) == (959, 113_726, 8)
    assert {s.source for s in pair.stimuli} == {"osie", "sun"}
    assert len(np.unique(pair.subject)) == 27
    assert pair.blur_sigma == folder.blur_sigma == pytest.approx(15.16, abs=0.01)  # a 48th of the mean width
    assert pair.stimuli_fingerprint == folder.stimuli_fingerprint
    assert [s.category for s in pair.stimuli] == [s.category for s in folder.stimuli]
    assert split(pair, 0).hash == split(folder, 0).hash
    for index in range(0, 959, 50):  # the folder marks the pixels of the pair's fixations, each once
        x, y, _ = pair.fixations_of(index)
        columns, rows, _ = folder.fixations_of(index)
        assert set(zip(x.astype(int), y.astype(int), strict=True)) == set(zip(columns, rows, strict=True))
