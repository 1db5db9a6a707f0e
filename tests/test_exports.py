"""What eye trackers and published data sets write is read to exactly known fixations, by every command alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from acw.cli import COMMANDS
from acw.data import Dataset, load_dataset
from acw.pipeline.job import parse
from acw.storage.errors import UserError


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """beach.jpg and sub/Street 1.png of 400x300 px."""
    (tmp_path / "images" / "sub").mkdir(parents=True)
    for name, grey in (("beach.jpg", 90), ("sub/Street 1.png", 160)):
        Image.new("L", (400, 300), grey).save(tmp_path / "images" / name)
    return tmp_path / "images"


def fixations(dataset: Dataset) -> list[tuple[str, float, float, int]]:
    """Name of the image, x, y and subject of each, in order."""
    columns = (dataset.x.round(6).tolist(), dataset.y.round(6).tolist(), dataset.subject.tolist())
    return [(dataset.stimuli[i].name, *rest) for i, *rest in zip(dataset.image.tolist(), *columns, strict=True)]


BEACH, STREET = "beach.jpg", "sub/Street 1.png"

DATAVIEWER = """\
RECORDING_SESSION_LABEL\tTRIAL_INDEX\timage\tCURRENT_FIX_INDEX\tCURRENT_FIX_X\tCURRENT_FIX_Y\tCURRENT_FIX_PUPIL
s01\t1\tbeach.jpg\t1\t512.00\t384.00\t900
s01\t1\tbeach.jpg\t2\t413,50\t239,00\t910
s01\t1\tbeach.jpg\t3\t.\t.\t.
s02\t1\timages\\street 1.png\t1\t711.00\t533.00\t870
s02\t2\tpractice.jpg\t1\t500.00\t300.00\t870
s02\t3\t.\t1\t500.00\t300.00\t870
"""


def test_data_viewer(images: Path, tmp_path: Path) -> None:
    """px of the screen, whose middle is the image's; what is missing is a point; decimal commas; practice images."""
    table = tmp_path / "report.txt"
    table.write_text(DATAVIEWER, encoding="utf-8")
    dataset = load_dataset(str(images), fixations=str(table), columns="dataviewer", screen="1024x768")
    assert fixations(dataset) == [(BEACH, 200, 150, 0), (BEACH, 101.5, 5, 0), (STREET, 399, 299, 1)]
    assert "left out 1 lines without x and y" in dataset.notes
    assert "left out 1 fixations on what is not in the folder (practice.jpg 1)" in dataset.notes
    at_corner = load_dataset(str(images), fixations=str(table), columns="dataviewer", screen="1024x768+312+234")
    assert fixations(at_corner) == fixations(dataset)
    with pytest.raises(UserError, match=r"reach .* times as far as the images.* say --screen WxH"):
        load_dataset(str(images), fixations=str(table), columns="dataviewer")
    table.write_text(DATAVIEWER.replace("\timage\t", "\tphoto\t"), encoding="utf-8")
    with pytest.raises(UserError, match=r"has no column 'image' .*--columns \.\.\.,image=NAME"):
        load_dataset(str(images), fixations=str(table), columns="dataviewer", screen="1024x768")
    dataset = load_dataset(str(images), fixations=str(table), columns="dataviewer,image=photo", screen="1024x768")
    assert len(dataset.x) == 3


TOBII = """\
Recording timestamp [ms]\tSensor\tParticipant name\tRecording name\tPresented Stimulus name\tEvent\tEye movement type\t\
Eye movement type index\tFixation point X [DACS px]\tFixation point Y [DACS px]\tFixation point X [MCS px]\t\
Fixation point Y [MCS px]
1\tEye Tracker\tP1\tR1\tbeach\tsaid "x\tFixation\t1\t900\t500\t100,5\t50,25
2\tEye Tracker\tP1\tR1\tbeach\t\tFixation\t1\t900\t500\t100,5\t50,25
3\tGyroscope\tP1\tR1\tbeach\t\tFixation\t1\t900\t500\t100,5\t50,25
4\tEye Tracker\tP1\tR1\tbeach\t\tSaccade\t1\t\t\t\t
5\tEye Tracker\tP1\tR1\tbeach\t\tFixation\t2\t910\t500\t110\t50
6\tEye Tracker\tP1\tR1\tStreet 1\t\tFixation\t2\t910\t500\t7\t8
7\tEye Tracker\tP1\tR2\tStreet 1\t\tFixation\t2\t910\t500\t9\t8
8\tEye Tracker\tP2\tR3\tStreet 1\t\tFixation\t2\t910\t500\t9\t8
9\tEye Tracker\tP2\tR3\t\t\tFixation\t3\t910\t500\t9\t8
"""


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_tobii(images: Path, tmp_path: Path, encoding: str) -> None:
    """A line a sample becomes one a fixation: of a participant, recording, stimulus and index; MCS goes before DACS."""
    table = tmp_path / "export.tsv"
    table.write_bytes(TOBII.replace("\n", "\r\n").encode(encoding))
    dataset = load_dataset(str(images), fixations=str(table), columns="tobii")
    assert fixations(dataset) == [
        (BEACH, 100.5, 50.25, 0), (BEACH, 110, 50, 0), (STREET, 7, 8, 0), (STREET, 9, 8, 0), (STREET, 9, 8, 1)
    ]  # fmt: skip
    norm = TOBII.replace("[MCS px]", "[MCS norm]").replace("100,5\t50,25", "0,25\t0,5").replace("110\t50", "0,5\t0,5")
    table.write_bytes(norm.replace("\t7\t8", "\t0\t1").replace("\t9\t8", "\t0,5\t0").encode(encoding))
    first, *_, last = fixations(load_dataset(str(images), fixations=str(table), columns="tobii"))
    assert (first, last) == ((BEACH, 100, 150, 0), (STREET, 200, 0, 1))


def test_gazepoint(images: Path, tmp_path: Path) -> None:
    """A file a person, shares of the screen; of a fixation's valid lines the last counts."""
    header = "MEDIA_ID,MEDIA_NAME,CNT,TIME(2020),FPOGX,FPOGY,FPOGS,FPOGD,FPOGID,FPOGV,BPOGX,BPOGY,\n"
    first = [
        "0,beach.jpg,1,0.1,0.4,0.5,0,.1,1,1,,,",
        "0,beach.jpg,2,0.2,0.5,0.5,0,.2,1,1,,,",
        "0,beach.jpg,3,0,9,9,0,0,1,0,,,",
    ]
    second = ["1,Street 1.png,1,0.1,0.4,0.25,0,.1,7,1,,,", "1,Street 1.png,1,0.1,0.6,0.75,0,.1,8,1,,,"]
    (tmp_path / "result").mkdir()
    for name, rows in (("User 0", first), ("User 1", second)):
        (tmp_path / "result" / f"{name}_all_gaze.csv").write_text(header + "\n".join(rows) + "\n", encoding="utf-8")
    options = {"fixations": str(tmp_path / "result"), "columns": "gazepoint"}
    dataset = load_dataset(str(images), **options, screen="1000x500")
    assert fixations(dataset) == [(BEACH, 200, 150, 0), (STREET, 100, 25, 1), (STREET, 300, 275, 1)]
    filled = load_dataset(str(images), **options, screen="1000x500", scale="fit")  # shown at 667x500 px
    assert fixations(filled)[1] == (STREET, 140, 75, 1)
    assert any("say --screen WxH" in note for note in load_dataset(str(images), **options).notes)


def test_pupil(images: Path, tmp_path: Path) -> None:
    """A file a surface, whose name is the image's; y goes up; a fixation has a line a frame of the camera."""
    header = "world_timestamp,world_index,fixation_id,start_timestamp,duration,dispersion,"
    header += "norm_pos_x,norm_pos_y,x_scaled,y_scaled,on_surf\n"
    for person, surface, rows in (
        (
            "P1",
            "beach",
            ["1,1,4,1,90,1,0.25,0.9,0,0,True", "1,2,4,1,90,1,0.26,0.9,0,0,True", "1,3,5,1,9,1,1.4,0,0,0,False"],
        ),
        ("P2", "Street 1", ["1,1,4,1,90,1,0.5,0.1,0,0,True"]),
    ):
        folder = tmp_path / "recordings" / person / "000" / "exports" / "000" / "surfaces"
        folder.mkdir(parents=True)
        table = folder / f"fixations_on_surface_{surface}.csv"
        table.write_text(header + "\n".join(rows) + "\n", encoding="utf-8")
    dataset = load_dataset(str(images), fixations=str(tmp_path / "recordings"), columns="pupil")
    assert fixations(dataset) == [(BEACH, 100, 30, 0), (STREET, 200, 270, 1)]
    table.write_text(header.replace(",on_surf", "") + "1,1,4,1,90,1,0.5,0.1,0,0\n", encoding="utf-8")
    with pytest.raises(
        UserError, match=r"has no column 'on_surf' .* so it is not of a surface but of the camera's frame"
    ):
        load_dataset(str(images), fixations=str(table), columns="pupil")


def test_salicon(images: Path, tmp_path: Path) -> None:
    """Row and column from 1."""
    annotations = [
        {"image_id": 7, "id": 1, "worker_id": 40, "fixations": [[1, 1], [300, 400]]},
        {"image_id": 9, "id": 2, "worker_id": 41, "fixations": [[11, 21]]},
    ]
    files = [{"id": 7, "file_name": "beach.jpg"}, {"id": 9, "file_name": "Street 1.png"}]
    file = tmp_path / "fixations_val2014.json"
    file.write_text(json.dumps({"type": "fixations", "images": files, "annotations": annotations}), encoding="utf-8")
    dataset = load_dataset(str(images), fixations=str(file), columns="salicon")
    assert fixations(dataset) == [(BEACH, 0, 0, 40), (BEACH, 399, 299, 40), (STREET, 20, 10, 41)]
    file.write_text('{"images": [], "annotations": [{"image_id": 7}]}', encoding="utf-8")
    with pytest.raises(UserError, match=r"is not SALICON's JSON, .*KeyError 7"):
        load_dataset(str(images), fixations=str(file), columns="salicon")


def test_coco(images: Path, tmp_path: Path) -> None:
    """Without the fixation on the cross; an image in two tasks' folders is told by its task."""
    (images / "potted plant").mkdir()
    (images / "sub" / "Street 1.png").rename(images / "potted plant" / "1.png")
    (images / "beach.jpg").unlink()
    Image.new("L", (400, 300), 30).save(images / "sub" / "1.png")
    trials = [
        {
            "name": "1.png",
            "subject": 2,
            "task": "potted plant",
            "X": [200, 30.5],
            "Y": [150, 40],
            "T": [9, 9],
            "length": 2,
        },
        {"name": "1.png", "subject": 3, "task": "sub", "X": [200, 1, 2], "Y": [150, 3, 4], "T": [9, 9, 9], "length": 3},
    ]
    file = tmp_path / "trials.json"
    file.write_text(json.dumps(trials), encoding="utf-8")
    dataset = load_dataset(str(images), fixations=str(file), columns="coco")
    assert fixations(dataset) == [("potted plant/1.png", 30.5, 40, 2), ("sub/1.png", 1, 3, 3), ("sub/1.png", 2, 4, 3)]
    trials[0]["task"] = "kitchen"
    file.write_text(json.dumps(trials), encoding="utf-8")
    with pytest.raises(UserError, match=r"has 1\.png in several folders"):
        load_dataset(str(images), fixations=str(file), columns="coco")
    trials[1]["Y"] = [150, 3]
    file.write_text(json.dumps(trials[1:]), encoding="utf-8")
    with pytest.raises(UserError, match=r"x and y of '1\.png' are not as many numbers"):
        load_dataset(str(images), fixations=str(file), columns="coco")


def test_osie_and_samples_of_mit1003(images: Path, tmp_path: Path) -> None:
    def cells(values: list[object]) -> np.ndarray:
        array = np.empty((1, len(values)), dtype=object)
        array[0, :] = values
        return array

    seen = [
        {"fix_x": np.array([1.5, 20.0]), "fix_y": np.array([3.0, 4.0])},
        {"fix_x": np.array([]), "fix_y": np.array([])},
    ]
    one = [{"fix_x": 9.0, "fix_y": 8.0}]
    content = [{"img": BEACH, "subjects": cells(list(seen))}, {"img": "Street 1.png", "subjects": cells(list(one))}]
    savemat(tmp_path / "fixations.mat", {"fixations": cells(list(content))})
    dataset = load_dataset(str(images), fixations=str(tmp_path / "fixations.mat"), columns="osie")
    assert fixations(dataset) == [(BEACH, 1.5, 3, 0), (BEACH, 20, 4, 0), (STREET, 9, 8, 0)]
    samples = {"imgName": "beach.jpg", "DATA": {"eyeData": np.ones((9, 2))}}
    savemat(tmp_path / "beach.mat", {"beach": samples})
    with pytest.raises(UserError, match=r"holds MIT1003's samples, not fixations; have pysaliency\.get_mit1003"):
        load_dataset(str(images), fixations=str(tmp_path / "beach.mat"), columns="osie")


# --- Columns and screens -----------------------------------------------------------------------------------------


def named(tmp_path: Path, header: str = "Bild;VP;RX;RY;Art") -> Path:
    rows = ["beach.jpg;anna;10,5;20;See", "Street 1.png;bert;30;40;Stadt", "Street 1.png;bert;31;41;Stadt"]
    (tmp_path / "t.csv").write_text("\n".join([header, *rows]), encoding="utf-8")
    return tmp_path / "t.csv"


EXPECTED = [(BEACH, 10.5, 20, 0), (STREET, 30, 40, 1), (STREET, 31, 41, 1)]


def test_columns_by_name_and_by_file_mean_the_same_to_every_command(images: Path, tmp_path: Path) -> None:
    table, spec = named(tmp_path), "image=Bild,x=RX,y=RY,subject=VP,category=Art"
    file = tmp_path / "columns.json"
    file.write_text(json.dumps(dict(pair.split("=") for pair in spec.split(","))), encoding="utf-8")
    for columns in (spec, str(file)):
        dataset = load_dataset(str(images), fixations=str(table), columns=columns)
        assert fixations(dataset) == EXPECTED
        assert dataset.categories == ("See", "Stadt")
    swapped = load_dataset(str(images), fixations=str(table), columns="image=Bild,x=RY,y=RX")
    assert fixations(swapped)[0] == (BEACH, 20, 10.5, -1)
    for number in range(12):  # as many as a split needs
        Image.new("L", (400, 300), 10 * number).save(images / f"{number}.png")
    lines = [f"{number}.png;anna;{100 + number},5;200;See" for number in range(12)]
    (images / "beach.jpg").unlink()
    (images / "sub" / "Street 1.png").unlink()
    table.write_text("\n".join(["Bild;VP;RX;RY;Art", *lines]), encoding="utf-8")
    options = ["--dataset", str(images), "--fixations", str(table), "--columns", spec, "--screen", "500x400"]
    job = parse(["gaze_small", *options, "--root", str(tmp_path / "root")], "")
    assert job.dataset.x.tolist() == [50.5, 51.5, 60.5, 61.5, *(52.5 + np.arange(8)).tolist()]
    assert "coordinates on a screen of 500x400, images in its middle" in job.dataset.notes


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("eyelink", "eyelink is unknown; choose one of dataviewer, tobii, gazepoint, pupil, salicon, coco, osie"),
        ("image=Bild,x", "'x' is not FIELD=COLUMN"),
        ("image=Bild,image=VP", "each field once"),
        ("image=Bild,time=T", "no field time; fields are image, x, y, subject, category"),
        ("salicon,x=RX", "salicon is no table"),
        ("image=Bild,x=RX", r"has no column 'y' \(it has Bild, VP, RX, RY, Art\)"),
        ("x=RX,y=RY", r"has no column 'image' .*; or say which has the image: --columns \.\.\.,image=NAME"),
        ("tobii", "has no column 'Presented Stimulus name'"),
        ("gone.json", "cannot be read as JSON"),
        ("salicon", "cannot be read as JSON"),
        ("osie", "cannot be read as a MATLAB file"),
    ],
)
def test_columns_that_cannot_be_meant(images: Path, tmp_path: Path, columns: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_dataset(str(images), fixations=str(named(tmp_path)), columns=columns)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="is about a file of fixations; give it by --fixations"):
        load_dataset(str(images), columns="tobii")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"screen": "1920*1080"}, r"--screen 1920\*1080: give its width and height in px, such as 1920x1080"),
        ({"screen": "0x1080"}, "--screen 0x1080"),
        ({"scale": "-2"}, "--scale -2: give how many px"),
        ({"scale": "fit"}, "--scale fit: say on which screen"),
        ({"first_px": 2}, "--first-px 2: choose 0, or 1"),
        ({"first_px": 1, "units": "share"}, "--first-px 1: px are counted from a corner"),
    ],
)
def test_screens_that_cannot_be_meant(images: Path, tmp_path: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_dataset(str(images), fixations=str(named(tmp_path)), columns="image=Bild,x=RX,y=RY", **options)


PX = np.array([[0.0, 0.0], [100.25, 50.5], [399.0, 299.0]])


@pytest.mark.parametrize(
    ("written", "options"),
    [
        (lambda x, y: (x + 760, y + 390), {"screen": "1920x1080"}),
        (lambda x, y: (x + 5, y - 7), {"screen": "1920x1080+5-7"}),
        (lambda x, y: (x * 2.5, y * 2.5), {"scale": "2.5"}),
        (lambda x, y: (x * 2.5 + 460, y * 2.5 + 165), {"scale": "2.5", "screen": "1920x1080"}),
        (lambda x, y: (x * 3.6 + 240, y * 3.6), {"scale": "fit", "screen": "1920x1080"}),
        (
            lambda x, y: ((x * 3.6 + 240) / 1920, y * 3.6 / 1080),
            {"scale": "fit", "screen": "1920x1080", "units": "share"},
        ),
        (lambda x, y: (x - 200, 150 - y), {"screen": "1920x1080", "origin": "centre", "y_axis": "up"}),
        (
            lambda x, y: ((x - 200) / 1080, (150 - y) / 1080),
            {"screen": "1920x1080", "origin": "centre", "y_axis": "up", "units": "height"},
        ),
        (lambda x, y: (x + 1, y + 1), {"first_px": 1}),
    ],
)  # fmt: skip
def test_px_of_every_screen_become_the_images(
    images: Path,
    tmp_path: Path,
    written: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]],
    options: dict[str, str],
) -> None:
    (images / "sub" / "Street 1.png").unlink()
    rows = [f"beach.jpg,{x!r},{y!r}" for x, y in np.transpose(written(*PX.T)).tolist()]
    (tmp_path / "f.csv").write_text("\n".join(["image,x,y", *rows]), encoding="utf-8")
    dataset = load_dataset(str(images), fixations=str(tmp_path / "f.csv"), **options)
    np.testing.assert_allclose(np.column_stack([dataset.x, dataset.y]), PX, atol=1e-9)


def test_every_command_that_reads_a_data_set_takes_the_same_options() -> None:
    import importlib

    from acw.pipeline.options import READER_OPTIONS, Parser

    for module, _ in COMMANDS.values():
        parser = Parser()
        importlib.import_module(f"acw.pipeline.{module}").add_options(parser)
        options = {action.dest for action in parser._actions}
        assert "fixations" not in options or options.issuperset(READER_OPTIONS), module
