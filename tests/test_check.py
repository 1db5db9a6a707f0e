"""`acw check`: each fault is named with the option that mends it, and clean data are accused of nothing."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from acw.data.checks import Examined, examine
from acw.data.loading import read_files
from acw.pipeline import check
from acw.storage.errors import UserError

KINDS = Path(__file__).parents[2] / "shared" / "kinds"
EACH = 12  # images a category


@pytest.fixture(scope="module")
def displays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 24 images of 256x192 px with some coloured discs on noise, and f.csv beside it with fixations, 50 of
    which are on the discs and 30 about the middle."""
    folder = tmp_path_factory.mktemp("displays") / "images"
    folder.mkdir()
    rows, rng = ["image,x,y,subject,category"], np.random.default_rng(0)
    down, across = np.mgrid[:192, :256]
    for category, number in itertools.product(("discs", "more"), range(EACH)):
        pixels = gaussian_filter(rng.normal(size=(192, 256, 3)), (3, 3, 0)) * 200 + 120
        discs = rng.uniform((20, 20), (236, 172), (5, 2))
        for x, y in discs:
            pixels[(across - x) ** 2 + (down - y) ** 2 < 90] = rng.uniform(0, 255, 3)
        name = f"{category}-{number:02d}.png"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name)
        places = [*np.repeat(discs, 10, axis=0), *np.tile((128.0, 90.0), (30, 1))]
        places += rng.normal(size=(80, 2)) * np.repeat([[6.0], [30.0]], (50, 30), axis=0)
        for subject, (x, y) in enumerate(np.clip(places, 0, (255.9, 191.9)).tolist()):
            rows.append(f"{name},{x!r},{y!r},{subject % 8},{category}")
    (folder.parent / "f.csv").write_text("\n".join(rows), encoding="utf-8")
    return folder


def moved(
    displays: Path, tmp_path: Path, move: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
) -> Path:
    """The table with every x and y as `move` has them."""
    header, *rows = [line.split(",") for line in (displays.parent / "f.csv").read_text(encoding="utf-8").splitlines()]
    x, y = move(*np.array([[float(row[1]), float(row[2])] for row in rows]).T)
    lines = [[row[0], repr(a), repr(b), *row[3:]] for row, a, b in zip(rows, x.tolist(), y.tolist(), strict=True)]
    table = tmp_path / "moved.csv"
    table.write_text("\n".join(map(",".join, [header, *lines])), encoding="utf-8")
    return table


def needed(examined: Examined) -> list[str]:
    return [str(finding) for finding in examined.findings if finding.needed]


def test_clean_data_are_accused_of_nothing(displays: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(displays), "--fixations", str(displays.parent / "f.csv"), "--recipe", "none"]
    with pytest.raises(SystemExit) as ended:
        check.main([*arguments, "--out", str(tmp_path / "p.png")])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "24 images with fixations in 2 categories" in printed
    assert "256x192                       24" in printed
    assert "to be mended: nothing" in printed
    assert "to be known:" not in printed
    assert f"picture: {tmp_path / 'p.png'}" in printed
    picture = np.asarray(Image.open(tmp_path / "p.png").convert("RGB")).astype(int)
    yellow = (picture[..., 0] > 200) & (picture[..., 1] > 160) & (picture[..., 2] < 120)
    assert yellow.sum() > 500  # fixations are drawn


@pytest.mark.parametrize(
    ("move", "text", "options"),
    [
        (lambda x, y: (y, x), "swapped", {"columns": "x=y,y=x"}),
        (lambda x, y: (x * 1.25, y * 1.25), "look like those of images 1.2", {"scale": "1.25"}),
        (lambda x, y: (x / 2, y / 2), "look like those of images 0.5", {"scale": "0.5"}),
        (lambda x, y: (x / 256, y / 192), "shares of the width and height; say --units share", {"units": "share"}),
        (lambda x, y: (np.floor(x) + 1, np.floor(y) + 1), "counted from 1", {"first_px": 1}),
        (lambda x, y: (x + 512, y + 416), "px of a screen of 1280x1024", {"screen": "1280x1024"}),
        (lambda x, y: (x, 192 - y), "y looks as if it went up", {"y_axis": "up"}),
    ],
)  # fmt: skip
def test_each_fault_is_named_and_its_option_mends_it(
    displays: Path,
    tmp_path: Path,
    move: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]],
    text: str,
    options: dict[str, str],
) -> None:
    table = str(moved(displays, tmp_path, move))
    spoilt = needed(examine(read_files(str(displays), fixations=table)))
    assert any(text in line for line in spoilt), spoilt
    ((name, value),) = options.items()
    option = f"--{name.replace('_', '-')} "
    assert any(option in line and (name == "scale" or f"{option}{value}" in line) for line in spoilt), spoilt
    assert not needed(examine(read_files(str(displays), fixations=table, **options)))


def test_an_offset_is_measured(displays: Path, tmp_path: Path) -> None:
    table = str(moved(displays, tmp_path, lambda x, y: (x + 20, y - 12)))
    reading = read_files(str(displays), fixations=table, drop_outside=0.2)
    examined = examine(reading)
    assert examined.other is not None
    assert examined.other.kind == "moved"
    np.testing.assert_allclose(examined.other.numbers, (20, -12), atol=5)
    (line,) = needed(examined)
    assert "all fixations look moved by about +" in line
    assert re.search(r"; say --screen \d+x\d+\+[12]\d-\d+ if", line)


def test_all_is_said_at_once(displays: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "set"
    shutil.copytree(displays, folder)
    first, second, third, fourth, *_ = sorted(path.name for path in folder.iterdir())
    Image.new("L", (64, 48), 9).save(folder / "unseen.png")
    Image.open(folder / first).save(folder / "again.bmp")  # other bytes, the same pixels
    Image.open(folder / second).resize((150, 112)).save(folder / "small.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(folder / third).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "turned.jpg", exif=exif)
    content = (folder / fourth).read_bytes()
    (folder / fourth).write_bytes(content[:2000] + bytes(3000) + content[5000:])
    rows = (displays.parent / "f.csv").read_text(encoding="utf-8")
    extra = [f"{name},{10 + k},{20 + k},1,rare" for name in ("again.bmp", "small.png", "turned.jpg") for k in range(6)]
    table = tmp_path / "f.csv"
    table.write_text("\n".join([rows, *extra, f"{first},-5,3,1,{first.rpartition('-')[0]}"]), encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        check.main([str(folder), "--fixations", str(table), "--out", str(tmp_path / "p.png")])
    assert ended.value.code == 1
    printed = capsys.readouterr().out
    for line in (
        "! images without a fixation: 1 (unseen.png); add their fixations, or remove them",
        f"! fixations outside their image: 1 of {len(rows.splitlines()) + len(extra)} (0.1%; most: {first} 1 of ",
        "leave them out by --drop-outside 0.01",
        f"{fourth}: the image is damaged",
        "! categories too small to hold images out and put one in each of 5 folds: rare 3; add images up to 6",
        f"- pictures under several names: 1 ({first} = again.bmp)",
        " = small.png" if second < "small.png" else "small.png = ",
        "- images that EXIF says to turn: 1 (turned.jpg); pixels are read as stored",
    ):
        assert line in printed, (line, printed)
    assert "heads in" not in printed  # nothing is planned before


def test_what_cannot_be_read_is_a_finding_and_a_wrong_command_line_an_error(
    displays: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "f.csv"
    table.write_text("image,x\n", encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        check.main([str(displays), "--fixations", str(table)])
    assert ended.value.code == 1
    assert "! " in (printed := capsys.readouterr().out)
    assert "has no column 'y'" in printed
    for arguments, message in (
        ([str(tmp_path / "gone")], "there is no such file or folder"),
        ([str(displays), "--fixations", str(tmp_path / "gone.csv")], "there is no such file or folder"),
        ([str(displays), "--fixations", str(table), "--columns", "eyelink"], "eyelink is unknown"),
        ([str(displays), "--fixations", str(table), "--screen", "big"], "--screen big: give"),
        ([str(displays), "--fixation", str(table)], "unrecognized arguments"),
    ):
        with pytest.raises(UserError, match=message):
            check.main(arguments)


@pytest.mark.skipif(not KINDS.is_dir(), reason="the two kinds of images are not beside the repository")
@pytest.mark.parametrize("kind", ["crowd", "interiors"])
def test_people_are_accused_of_nothing(kind: str) -> None:
    assert not needed(examine(read_files(str(KINDS / kind), fixations=str(KINDS / kind / "fixations.csv"))))
