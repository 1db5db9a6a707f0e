"""Other models' maps: what is right is read as pysaliency reads it, what is wrong is named."""

from __future__ import annotations

import dataclasses
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from job_runs import displays
from PIL import Image
from scipy.special import logsumexp

from acw.data import Dataset, pysaliency_compat
from acw.evaluation.external_models import of_pysaliency, open_maps, open_object, open_predictions
from acw.pipeline.options import Parser, add_dataset_options, read_dataset
from acw.storage.errors import UserError


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Four pictures of two categories and two sizes: Contour/000.png ..., Text/000.png ..."""
    arguments = displays(tmp_path_factory.mktemp("displays"), ("Contour", "Text"), 2)
    parser = Parser()
    add_dataset_options(parser)
    return read_dataset(vars(parser.parse_args(arguments)))


def log_density(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=size)
    return values - logsumexp(values)


def folder_of(dataset: Dataset, folder: Path, save: Callable[[Path, tuple[int, int], int], object]) -> Path:
    """A folder with what `save` writes at each stimulus's name without its suffix."""
    for index, stimulus in enumerate(dataset.stimuli):
        path = folder / Path(stimulus.name).with_suffix("")
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path, stimulus.size, index)
    return folder


def save_densities(path: Path, size: tuple[int, int], index: int) -> None:
    np.save(path.with_suffix(".npy"), log_density(size, index))


def pysaliency_stimuli(dataset: Dataset) -> Any:
    return pysaliency_compat.load().FileStimuli([stimulus.path for stimulus in dataset.stimuli])


def test_densities_are_told_from_log_densities_and_normalised(dataset: Dataset, tmp_path: Path) -> None:
    def save(path: Path, size: tuple[int, int], index: int) -> None:
        stored = log_density(size, index)
        if index % 2:
            stored = np.exp(stored)
            stored[0, :3] = 0
        else:
            stored += 0.009
            stored[0, :3] = -np.inf
        np.save(path.with_suffix(".npy"), stored.astype([np.float64, np.float32][index // 2]))

    folder = folder_of(dataset, tmp_path / "rival", save)
    rival = open_maps(f"{folder}", "density", dataset)
    assert (rival.name, rival.kind) == ("rival", "density")
    assert open_maps(f"Rival 2={folder}", "density", dataset).name == "Rival 2"
    copied = pickle.loads(pickle.dumps(rival))
    for index, stimulus in enumerate(dataset.stimuli):
        actual = rival.of(index)
        expected = log_density(stimulus.size, index)
        expected[0, :3] = -np.inf
        assert actual.dtype == np.float64
        np.testing.assert_allclose(actual, expected - logsumexp(expected), atol=1e-6)
        np.testing.assert_array_equal(copied.of(index), actual)


def test_grey_values_are_read_whole_and_taken_for_densities(dataset: Dataset, tmp_path: Path) -> None:
    """16 bits, 8 bits, a palette that is half transparent all over, and grey that is stored as colour."""
    rng = np.random.default_rng(0)
    greys = [rng.integers(0, [65536, 256, 256, 256][i], stimulus.size) for i, stimulus in enumerate(dataset.stimuli)]

    def save(path: Path, size: tuple[int, int], index: int) -> None:
        image = Image.fromarray(greys[index].astype([np.uint16, np.uint8, np.uint8, np.uint8][index]))
        if index == 2:
            image = image.convert("P")
        if index == 3:
            image = image.convert("RGB")
        image.save(path.with_suffix(".png"), **({"transparency": bytes([128] * 256)} if index == 2 else {}))

    folder = folder_of(dataset, tmp_path, save)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for index, grey in enumerate(greys):
            np.testing.assert_array_equal(open_maps(str(folder), "saliency", dataset).of(index), grey)
            density = np.exp(open_maps(str(folder), "density", dataset).of(index))
            np.testing.assert_allclose(density, grey / grey.sum(), atol=1e-12)


def test_saliency_maps_are_resized_as_pysaliency_does_it(dataset: Dataset, tmp_path: Path) -> None:
    pysaliency = pysaliency_compat.load()
    shapes = [(15, 20), (240, 101), (1, 7), dataset.stimuli[3].size]
    maps = [np.random.default_rng(i).normal(size=shape) for i, shape in enumerate(shapes)]
    folder = folder_of(dataset, tmp_path / "npy", lambda path, _, index: np.save(path.with_suffix(".npy"), maps[index]))
    rival = open_maps(str(folder), "saliency", dataset)
    stimuli = pysaliency_stimuli(dataset)
    with h5py.File(tmp_path / "maps.hdf5", "w") as file:
        for index, stimulus in enumerate(dataset.stimuli):
            file[stimulus.name] = maps[index]
    model = pysaliency.HDF5SaliencyMapModel(stimuli, str(tmp_path / "maps.hdf5"), check_shape=False)
    resized = pysaliency.ResizingSaliencyMapModel(model, verbose=False)
    stored = open_predictions(str(tmp_path / "maps.hdf5"), dataset)
    assert (stored.name, stored.kind) == ("maps", "saliency")
    for index in range(len(maps)):
        expected = resized.saliency_map(stimuli[index])
        assert expected.shape == dataset.stimuli[index].size
        np.testing.assert_allclose(rival.of(index), expected, rtol=0, atol=1e-12)
        np.testing.assert_array_equal(stored.of(index), rival.of(index))


def test_pysaliencys_models_and_their_exports_are_the_same(dataset: Dataset, tmp_path: Path) -> None:
    pysaliency = pysaliency_compat.load()

    class Density(pysaliency.Model):
        def _log_density(self, stimulus: np.ndarray) -> np.ndarray:
            return log_density(stimulus.shape[:2], int(stimulus.sum()) % 1000)

    class Saliency(pysaliency.SaliencyMapModel):
        def _saliency_map(self, stimulus: np.ndarray) -> np.ndarray:
            return np.asarray(stimulus, dtype=float).sum(-1)

    stimuli = pysaliency_stimuli(dataset)
    for model, kind in ((Density(), "density"), (Saliency(), "saliency")):
        path = tmp_path / f"{kind}.hdf5"
        pysaliency.precomputed_models.export_model_to_hdf5(model, stimuli, str(path))
        live, stored = of_pysaliency(model, dataset, "live"), open_predictions(f"stored={path}", dataset)
        assert (live.kind, stored.kind, stored.name) == (kind, kind, "stored")
        assert open_predictions(str(path), dataset, "saliency").kind == "saliency"
        model._cache.clear()
        for index in range(len(stimuli)):
            np.testing.assert_allclose(stored.of(index), live.of(index), rtol=0, atol=1e-12)
        assert not model._cache, "a data set of maps does not fit into memory"
    with pytest.raises(ValueError, match="is a dict, but has to be"):
        of_pysaliency({}, dataset, "nothing")


def test_a_model_in_a_module_of_the_users(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rivals.py").write_text(
        "import pysaliency\nmodel = pysaliency.UniformModel()\nnone = {}\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for spec, name in (("rivals:model", "model"), ("Rival 3=rivals:model", "Rival 3")):
        rival = open_object(spec, dataset)
        assert (rival.name, rival.kind, rival.location) == (name, "density", "rivals:model")
        height, width = dataset.stimuli[1].size
        np.testing.assert_allclose(rival.of(1), -np.log(height * width))
    for spec, problem in (
        ("rivals:other", "no attribute 'other'"),
        ("no_such:model", "No module named 'no_such'"),
        ("rivals:none", "has to be a pysaliency Model"),
        ("rivals", "give MODULE:OBJECT"),
    ):
        with pytest.raises(UserError, match=problem):
            open_object(spec, dataset)


def test_keys_may_lack_only_folders_that_all_share(dataset: Dataset, tmp_path: Path) -> None:
    """As for an export of one category alone, whose keys are file names: those of another category are other images."""

    def write(name: str, keys: list[str]) -> str:
        with h5py.File(tmp_path / name, "w") as file:
            for key in keys:
                file[key] = np.ones((4, 4))
        return str(tmp_path / name)

    size = dataclasses.replace(dataset, stimuli=dataset.stimuli[:2])
    names = [stimulus.name for stimulus in dataset.stimuli]
    longer = Path(dataset.stimuli[0].path).parents[1].name
    alone = write("alone", ["000.png", "001.png"])
    assert open_predictions(alone, size).of(1).shape == dataset.stimuli[1].size
    assert open_predictions(write("longer", [f"{longer}/{name}" for name in names]), dataset).of(3).all()
    with pytest.raises(UserError, match=r"no prediction for the stimulus Contour/000\.png \(key Contour/000\.png\)"):
        open_predictions(alone, dataset)
    with pytest.raises(UserError, match=r"no prediction for the stimulus Text/001\.png"):
        open_predictions(write("short", names[:3]), dataset)


def test_log_densities_that_do_not_sum_to_one_are_no_saliency_maps(dataset: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "log2.hdf5"
    with h5py.File(path, "w") as file:
        for index, stimulus in enumerate(dataset.stimuli):
            file[stimulus.name] = log_density(stimulus.size, index) / np.log(2)
    with pytest.raises(UserError, match=r"log2\.hdf5.*no natural logs that sum to 1"):
        open_predictions(str(path), dataset)
    assert open_predictions(str(path), dataset, "saliency").kind == "saliency"


def test_every_stimulus_has_one_map_of_its_own(dataset: Dataset, tmp_path: Path) -> None:
    folder = folder_of(dataset, tmp_path, save_densities)
    for spec, message in ((f"{folder}/nowhere", "is no folder"), (f"={folder}", "before = is empty")):
        with pytest.raises(UserError, match=message):
            open_maps(spec, "density", dataset)
    with pytest.raises(ValueError, match="kind 'log': predictions are of the kind density or saliency"):
        open_maps(str(folder), "log", dataset)  # type: ignore[arg-type]
    twin = dataclasses.replace(dataset.stimuli[0], name="Contour/000.jpg")
    with pytest.raises(UserError, match=r"would be the map of Contour/000\.png and Contour/000\.jpg"):
        open_maps(str(folder), "density", dataclasses.replace(dataset, stimuli=(*dataset.stimuli, twin)))
    Image.new("L", (3, 3)).save(folder / "Text/000.png")
    with pytest.raises(UserError, match=r"Text/000\.npy: there is 000\.png too"):
        open_maps(str(folder), "density", dataset)
    for name in ("Text/000.png", "Text/000.npy", "Text/001.npy"):
        (folder / name).unlink()
    with pytest.raises(
        UserError, match=r"no map for the stimulus Text/000\.png \(2 of 4 have none\); add Text/000\.npy"
    ):
        open_maps(str(folder), "density", dataset)


SIZE = (120, 160)  # of the stimulus Contour/000.png
DENSITY = np.exp(log_density(SIZE))


def changed(values: np.ndarray, place: tuple[int, int], value: float) -> np.ndarray:
    values = values.copy()
    values[place] = value
    return values


@pytest.mark.parametrize(
    ("stored", "density", "saliency"),
    [
        (log_density((60, 80)), "is 80x60 px, its image 160x120", None),
        (log_density(SIZE).T, "is 120x160 px, its image 160x120, so it seems to be transposed", "transposed"),
        (log_density((20, 15)), "transposed", "transposed"),
        (changed(log_density(SIZE), (3, 4), np.nan), "NaN or infinite", "NaN or infinite"),
        (changed(log_density(SIZE), (3, 4), np.inf), "NaN or infinite", "NaN or infinite"),
        (changed(log_density(SIZE), (3, 4), -np.inf), None, "NaN or infinite"),
        (changed(DENSITY, (3, 4), -1e-4), "negative values, down to -0.0001", None),
        (log_density(SIZE) / np.log(2), "neither a natural log-density", None),
        (DENSITY * 255, r"nor a density \(sum 255, not 1\)", None),
        (np.zeros(SIZE), r"nor a density \(sum 0, not 1\)", None),
        (np.ones((*SIZE, 3)), "holds float64 of shape", "holds float64 of shape"),
        (np.ones((0, 5)), "real numbers", "real numbers"),
        (np.full(SIZE, "a"), "real numbers", "real numbers"),
        (np.full(SIZE, None), "read whole", "read whole"),  # would be pickled
    ],
)  # fmt: skip
def test_what_an_array_is_not_is_said(
    dataset: Dataset, tmp_path: Path, stored: np.ndarray, density: str | None, saliency: str | None
) -> None:
    folder = folder_of(dataset, tmp_path, save_densities)
    np.save(folder / "Contour/000.npy", stored)
    refused = {"density": density, "saliency": saliency}
    for kind, message in refused.items():
        opened = open_maps(str(folder), kind, dataset)  # type: ignore[arg-type]
        assert opened.of(1).shape == dataset.stimuli[1].size
        if message is None:
            assert opened.of(0).shape == SIZE
            continue
        with pytest.raises(UserError, match=message) as error:
            opened.of(0)
        assert "Contour/000.npy" in str(error.value)


def test_damaged_files_are_named(dataset: Dataset, tmp_path: Path) -> None:
    folder = folder_of(dataset, tmp_path, save_densities)
    whole = (folder / "Contour/000.npy").read_bytes()
    grey = Image.fromarray(np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8))
    grey.save(tmp_path / "grey.png")
    np.savez(tmp_path / "several.npz", a=DENSITY, b=DENSITY)
    Image.new("L", SIZE[::-1]).save(tmp_path / "black.png")
    grey.save(tmp_path / "grey.gif")
    huge = whole.replace(b"(120, 160), }    ", b"(99999, 99999), }")
    png, gif, black = ((tmp_path / name).read_bytes() for name in ("grey.png", "grey.gif", "black.png"))
    cases = {
        ".npy": [whole[:-1], whole[:50], b"", b"not an array", huge, (tmp_path / "several.npz").read_bytes()],
        ".png": [png[:-2000], gif, black],
    }
    for suffix, contents in cases.items():
        (folder / "Contour/000.npy").unlink(missing_ok=True)
        path = folder / f"Contour/000{suffix}"
        for content in contents:
            path.write_bytes(content)
            with pytest.raises(UserError, match=r"Contour/000\.(npy|png): "):
                open_maps(str(folder), "density", dataset).of(0)
    hdf5 = tmp_path / "stored.hdf5"
    with h5py.File(hdf5, "w") as file:
        for stimulus in dataset.stimuli:
            file.create_dataset(stimulus.name, data=DENSITY, compression="gzip")
        file.attrs["kind"] = "log"
    with pytest.raises(UserError, match=r"its attribute kind is log"):
        open_predictions(str(hdf5), dataset)
    hdf5.write_bytes(hdf5.read_bytes()[:-5000])
    for path in (hdf5, tmp_path / "grey.png", tmp_path / "nowhere.hdf5"):
        with pytest.raises(UserError, match=f"{path.name}: "):
            open_predictions(str(path), dataset)


def _gradient() -> np.ndarray:
    """uint8, of the size of Contour/000.png: every grey."""
    return np.linspace(0, 255, SIZE[0] * SIZE[1]).reshape(SIZE).astype(np.uint8)


def _jet(values: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) from 0 to 1, in matplotlib's colours."""
    import matplotlib

    return np.uint8(255 * matplotlib.colormaps["jet"](values)[..., :3])


def _with_alpha(alpha: np.ndarray) -> Image.Image:
    image = Image.fromarray(_gradient()).convert("RGB")
    image.putalpha(Image.fromarray(alpha))
    return image


def _keyed(folder: Path) -> Image.Image:
    """Grey, of which one value is transparent."""
    Image.fromarray(_gradient()).save(folder / "keyed.png", transparency=0)
    return Image.open(folder / "keyed.png")


NOISE = np.random.default_rng(5).normal(0, 3, (*SIZE, 3))
SPOT = np.exp(-((np.mgrid[: SIZE[0], : SIZE[1]] - 40) ** 2).sum(0) / 50)[..., None]
GREY_OR_NOT: dict[str, tuple[Callable[[Path], Image.Image], str, str | None]] = {
    "jet": (lambda _: Image.fromarray(_jet(_gradient() / 255)), ".png", "is coloured"),
    "jet as JPEG": (lambda _: Image.fromarray(_jet(_gradient() / 255)), ".jpg", "is coloured"),
    "jet in a palette": (lambda _: Image.fromarray(_jet(_gradient() / 255)).quantize(64), ".png", "is coloured"),
    "a spot drawn over a grey photograph": (
        lambda _: Image.fromarray(
            np.uint8((1 - SPOT / 2) * _gradient()[..., None] + 127 * SPOT * np.array([1.0, 0, 0]))
        ),
        ".png",
        r"is coloured \(\d\.\d% of its pixels\)",
    ),
    "saliency in the alpha channel": (lambda _: _with_alpha(_gradient()), ".png", "more transparent than others"),
    "a transparent grey": (_keyed, ".png", "more transparent than others"),
    "opaque": (lambda _: _with_alpha(np.full(SIZE, 255, np.uint8)), ".png", None),
    "equally transparent": (lambda _: _with_alpha(np.full(SIZE, 100, np.uint8)), ".png", None),
    "grey with the chroma of noise": (
        lambda _: Image.fromarray(np.uint8(np.clip(_gradient()[..., None] + NOISE, 0, 255))),
        ".jpg",
        None,
    ),
    "grey in CMYK": (lambda _: Image.fromarray(_gradient()).convert("RGB").convert("CMYK"), ".jpg", None),
    "12 bits in 16": (lambda _: Image.fromarray(_gradient().astype(np.uint16) * 16), ".png", None),
    "8 bits in 16": (lambda _: Image.fromarray(_gradient().astype(np.uint16)), ".png", None),
    "one value all over": (lambda _: Image.new("L", SIZE[::-1], 77), ".png", None),
}


@pytest.mark.parametrize("name", GREY_OR_NOT)
def test_a_map_that_is_not_grey_is_refused(dataset: Dataset, tmp_path: Path, name: str) -> None:
    make, suffix, problem = GREY_OR_NOT[name]
    one = dataclasses.replace(dataset, stimuli=dataset.stimuli[:1])
    path = tmp_path / "maps" / f"Contour/000{suffix}"
    path.parent.mkdir(parents=True)
    make(tmp_path).save(path)
    for kind in ("saliency", "density"):
        opened = open_maps(str(tmp_path / "maps"), kind, one)  # type: ignore[arg-type]
        if problem:
            with pytest.raises(UserError, match=rf"Contour/000\{suffix}: .*{problem}") as caught:
                opened.check(one)
            assert "save the saliency map itself" in str(caught.value)
        elif kind == "saliency":
            values, expected = opened.of(0), np.asarray(_gradient(), float)
            if name == "one value all over":
                assert (values == 77).all()
            else:
                assert np.corrcoef(values.ravel(), expected.ravel())[0, 1] > 0.999
        else:
            assert logsumexp(opened.of(0)) == pytest.approx(0, abs=1e-9)


def test_maps_are_looked_at_before_the_scoring(dataset: Dataset, tmp_path: Path) -> None:
    """The last of them too, and whether somebody looked where there is no density."""
    folder = folder_of(dataset, tmp_path, save_densities)
    last, path = dataset.stimuli[-1], folder / Path(dataset.stimuli[-1].name).with_suffix(".npy")
    open_maps(str(folder), "density", dataset).check(dataset)
    x, y, _ = dataset.fixations_of(len(dataset.stimuli) - 1)
    for place, refused in (((int(y[0]), int(x[0])), True), (_elsewhere(last.size, x, y), False)):
        np.save(path, changed(log_density(last.size), place, -np.inf))
        opened = open_maps(f"rival={folder}", "density", dataset)
        if refused:
            with pytest.raises(UserError, match=rf"rival: its density for {last.name} is 0 where somebody looked"):
                opened.check(dataset)
        else:
            opened.check(dataset)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="read whole"):
        open_maps(str(folder), "density", dataset).check(dataset)


def test_maps_that_say_nothing_are_refused(dataset: Dataset, tmp_path: Path) -> None:
    """Where most are the same all over; one may be."""
    rng = np.random.default_rng(0)

    def save(flat: int) -> Path:
        def one(path: Path, size: tuple[int, int], index: int) -> None:
            values = np.full((60, 80), 0.1) if index < flat else rng.random(size)
            np.save(path.with_suffix(".npy"), values)

        return folder_of(dataset, tmp_path / str(flat), one)

    open_maps(str(save(1)), "saliency", dataset).check(dataset)
    with pytest.raises(UserError, match=r"3 of its 4 maps have one value all over \(as that of Contour/000\.png\)"):
        open_maps(f"dull={save(3)}", "saliency", dataset).check(dataset)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_turned_or_animated_map_is_refused(dataset: Dataset, tmp_path: Path, suffix: str) -> None:
    one = dataclasses.replace(dataset, stimuli=dataset.stimuli[:1])
    grey = Image.fromarray(_gradient())
    path = tmp_path / f"Contour/000{suffix}"
    path.parent.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 3
    grey.save(path, exif=exif)
    with pytest.raises(UserError, match=rf"Contour/000\{suffix}: is turned by EXIF"):
        open_maps(str(tmp_path), "saliency", one).of(0)
    if suffix == ".png":
        grey.save(path, save_all=True, append_images=[grey.rotate(180)])
        with pytest.raises(UserError, match="holds several pictures"):
            open_maps(str(tmp_path), "saliency", one).of(0)


def _elsewhere(size: tuple[int, int], x: np.ndarray, y: np.ndarray) -> tuple[int, int]:
    """A pixel that nobody looked at."""
    seen = np.zeros(size, bool)
    seen[y.astype(int), x.astype(int)] = True
    row, column = np.argwhere(~seen)[0]
    return int(row), int(column)
