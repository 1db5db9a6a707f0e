"""Inputs modelled on what people's real files, clusters and servers did: each is read, or refused in one line.

The small inputs are in tests/cases/, a folder a case. S: was a wrong result without a word. C: was a traceback or a hang.
U: was refused, but the line misled.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from acw.data import Dataset, load_dataset
from acw.storage import UserError

CASES = Path(__file__).parent / "cases"
SHARED = Path(__file__).parents[2] / "shared" / "cases"


def read(folder: Path, **options: Any) -> Dataset:
    """The data set of a case: its images and table."""
    return load_dataset(str(folder / "images"), fixations=str(folder / "f.csv"), **options)


def line(action: Callable[[], object], error: type[ValueError] = UserError) -> str:
    """The one line with which something is refused."""
    with pytest.raises(error) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def normalised(case: Path, tmp_path: Path) -> None:
    assert "shares of the width and height; say --units share" in line(lambda: read(case))
    assert 20 < read(case, units="share").x.mean() < 380


def decimal_comma(case: Path, tmp_path: Path) -> None:
    assert "line 2: has 5 fields where the header has 3; are there decimal commas" in line(lambda: read(case))


def duplicate_columns(case: Path, tmp_path: Path) -> None:
    assert "has the column 'x' 2 times (two eyes?)" in line(lambda: read(case))


def drop_outside(case: Path, tmp_path: Path) -> None:
    for drop in (False, True):
        text = line(lambda drop=drop: read(case, drop_outside=drop))
        assert " of 60 (" in text
        assert "px from the images' centre; say --origin centre" in text
    assert len(read(case, origin="centre").x) == 60


def missing_subject(case: Path, tmp_path: Path) -> None:
    assert read(case).summary()["subjects"] == 1


def blurred_marks(case: Path, tmp_path: Path) -> None:
    assert "fixLocs is no map of fixations" in line(lambda: load_dataset(str(case)))


def other_delimiter(case: Path, tmp_path: Path) -> None:
    dataset = read(case)
    assert (len(dataset.x), dataset.summary()["subjects"]) == (60, 4)


def nul(case: Path, tmp_path: Path) -> None:
    assert "line 2: holds a NUL byte" in line(lambda: read(case))


def unicode_form(case: Path, tmp_path: Path) -> None:
    assert len(read(case).x) == 1


def few_bits(case: Path, tmp_path: Path) -> None:
    from acw.data.images import decode_image

    for name in ("a.png", "b.tif"):
        assert decode_image(case / name).mean() == pytest.approx(127.5, abs=1)


def folder_called_gaze(case: Path, tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "gaze").mkdir()
    Image.new("1", (3840, 2160)).save(tmp_path / "gaze" / "a.png")
    (tmp_path / "f.csv").write_text("image,x,y\na.png,1000,900\n", encoding="utf-8")
    assert load_dataset(str(tmp_path / "gaze"), fixations=str(tmp_path / "f.csv")).summary()["blur_sigma"] == 80


DOES: dict[str, Callable[[Path, Path], None]] = {
    "C10-nul": nul,
    "S01-normalised": normalised,
    "S02-decimal-comma": decimal_comma,
    "S03-duplicate-columns": duplicate_columns,
    "S04-drop-outside": drop_outside,
    "S05-subject-NA": missing_subject,
    "S06-fixlocs-blurred": blurred_marks,
    "S11-12-bit": few_bits,
    "S13-folder-gaze": folder_called_gaze,
    "U01-semicolon": other_delimiter,
    "U01-tab": other_delimiter,
    "U02-empty-rows": other_delimiter,
    "U03-nfd": unicode_form,
}


@pytest.mark.parametrize("name", DOES)
def test_case(name: str, tmp_path: Path) -> None:
    DOES[name](CASES / name, tmp_path)
