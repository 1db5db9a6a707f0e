"""report.html: made from a run's files, and used in a browser as a reader does, by clicks and keys."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from acw.cluster.costs import Cost, note
from acw.data import Dataset, Stimulus
from acw.evaluation.metrics import METRICS, Components, ShuffledFixations, Target, score
from acw.evaluation.summary import per_image_csv, summarise
from acw.report import comparison, document, gallery, page
from acw.report.pictures import CENTRE_BIAS, GOLD_STANDARD, OURS, Example, Pictures
from acw.storage.files import write_json

# A name that is markup if it is not escaped, and an end of a script.
ODD = "<b>$x & </script>\"'"
CATEGORIES = ("Action", ODD)
BACKBONES = ("lite0", "lite1")
IMAGES = 4  # a category
SIZE = (60, 80)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up run with its report: `evaluation.json` and `per_image.csv` as the pipeline writes them."""
    folder = tmp_path_factory.mktemp("run")
    _write_run(folder)
    page.write(folder, _example, {"lite0": [np.array([0.1, 0.3, np.nan]), np.array([0.2, 0.25, 0.4])]})
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium at a laptop's size; one for all tests, as it takes seconds to start."""
    pytest.importorskip("selenium", reason="selenium is not installed: pip install selenium")
    from selenium import webdriver

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no Chromium: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for switch in ("no-sandbox", "headless", "disable-gpu", "disable-quic", "no-first-run", "disable-sync"):
        options.add_argument(f"--{switch}")
    for switch in ("disable-background-networking", "disable-component-update", "window-size=1280,800"):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # It makes itself a profile in a new folder, and removes it.
    one = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield one
    one.quit()


def _stimuli() -> Dataset:
    stimuli = tuple(
        Stimulus(f"{number}/{index:03d}.png", "", SIZE, category, None, "")
        for number, category in enumerate(CATEGORIES)
        for index in range(IMAGES)
    )
    image = np.arange(len(stimuli), dtype=np.int32)
    x = np.full(len(image), 40.0)
    subject = np.full(len(image), -1, np.int32)
    return Dataset("made up", "csv", "", stimuli, image, x, x, subject, 10.0, ("dropped 2 of 9",))


def _write_run(folder: Path, steps: int = 3, *, joint: bool = False, learned: bool = True) -> None:
    dataset, rng = _stimuli(), np.random.default_rng(0)
    models = ["center_bias", *(f"backbone:{name}" for name in BACKBONES), "uniform", "global_weights"]
    models += ["category_weights", "gold_standard"]
    scores: dict[int, dict[str, dict[str, float]]] = {}
    for index in range(len(dataset.stimuli)):
        scores[index] = {name: dict(zip(METRICS, rng.normal(size=len(METRICS)), strict=True)) for name in models}
        # A saliency map has no likelihood.
        scores[index]["outside"] = {m: v for m, v in scores[index]["uniform"].items() if m not in ("IG", "LL")}
    (folder / "per_image.csv").write_text(per_image_csv(dataset, scores), encoding="utf-8")
    record = {
        "recipe": {"name": "demo", "backbones": list(BACKBONES), "joint": joint, "price_per_hour": 3.0},
        "seed": 0,
        "commit": "unknown",
        "versions": {"torch": "2"},
    }
    evaluation = {
        "dataset": dataset.summary() | {"scored": "held-out images", "images_scored": len(scores)},
        **summarise(dataset, scores, 0),
        "doubts": {"category_weights": "too good to be true"},
        "weights": {"prior_strength": "inf", "crossvalidation_nats": {"inf": -1.0}, "global": {}},
        "provenance": record,
    }
    write_json(folder / "evaluation.json", evaluation)
    write_json(folder / "recipe.json", record)
    note(folder, "heads", Cost(1800.0, 100, 2**30))
    weights, history = ["category,backbone,weight,low,high"], ["category,step,backbone,weight"]
    for category in CATEGORIES:
        quoted = '"' + category.replace('"', '""') + '"'
        weights += [f"{quoted},{backbone},0.5,0.4,0.6" for backbone in BACKBONES]
        for step in range(steps):
            first = 0.5 + 0.1 * step * learned
            history += [f"{quoted},{step},lite0,{first}", f"{quoted},{step},lite1,{1 - first}"]
    (folder / "category_weights.csv").write_text("\n".join(weights) + "\n", encoding="utf-8")
    (folder / "category_weights_history.csv").write_text("\n".join(history) + "\n", encoding="utf-8")


def _example(name: str) -> Example:
    rng = np.random.default_rng(int(name[-7:-4]))
    names = (OURS, *BACKBONES, "uniform", CENTRE_BIAS, GOLD_STANDARD)
    maps = {one: _log_density(rng) for one in names}
    x, y = (rng.uniform(-0.5, side - 0.5, 30) for side in SIZE[::-1])
    wrong = CATEGORIES[1] if name.startswith("0") else CATEGORIES[0]
    pixels = rng.integers(0, 256, (*SIZE, 3), np.uint8)
    return Example(name, pixels, x, y, maps, (wrong, _log_density(rng)))


def _log_density(rng: np.random.Generator) -> np.ndarray:
    return torch.from_numpy(rng.normal(size=SIZE[0] * SIZE[1])).log_softmax(0).float().reshape(SIZE).numpy()


def _opened(browser: Any, path: Path) -> Any:
    browser.get(path.as_uri())
    return browser


def _column(table: Any, name: str) -> tuple[Any, list[str]]:
    """A column's head, and its cells in the table's first group, top down."""
    from selenium.webdriver.common.by import By

    heads = table.find_elements(By.CSS_SELECTOR, "thead th")
    place = [head.text.rstrip("↕↑↓ ") for head in heads].index(name)
    rows = table.find_elements(By.CSS_SELECTOR, "tbody:nth-of-type(1) tr:not(.group)")
    return heads[place], [row.find_elements(By.TAG_NAME, "td")[place].text for row in rows]


def test_what_was_done_to_the_data_is_said_before_the_scores(run: Path) -> None:
    text = (run / document.FILE).read_text(encoding="utf-8")
    scores = text.index("bits per fixation of information gain")
    assert text.index("<b>Note:</b> dropped 2 of 9.") < scores
    assert text.index("<b>Warning:</b> category_weights: too good to be true.") < scores


def test_a_table_is_sorted_by_clicks_and_by_keys(run: Path, browser: Any) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    table = _opened(browser, run / document.FILE).find_element(By.TAG_NAME, "table")
    models = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))["models"]
    gains = {name: entry["overall"]["IG"]["mean"] for name, entry in models.items() if "IG" in entry["overall"]}
    best_first = sorted(gains, key=lambda name: -gains[name])
    for order, expected in (("descending", best_first), ("ascending", best_first[::-1])):
        head, _ = _column(table, "IG")
        head.find_element(By.TAG_NAME, "button").click()
        assert head.get_attribute("aria-sort") == order
        # What has no value stays last.
        assert [name.splitlines()[0] for name in _column(table, "name")[1]] == [*expected, "outside"]
    head, _ = _column(table, "KLDiv")
    head.find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
    values = [float(text.splitlines()[0].replace("\N{MINUS SIGN}", "-")) for text in _column(table, "KLDiv")[1]]
    assert values == sorted(values), "less is better, so the smallest comes first"
    assert _column(table, "IG")[0].get_attribute("aria-sort") is None
    assert len(table.find_elements(By.CSS_SELECTOR, "tbody:nth-of-type(2) tr.group + tr")) == 1, "groups stay apart"
    assert not browser.get_log("browser")


def test_a_category_of_any_name_is_chosen_everywhere_at_once(run: Path, browser: Any) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    opened = _opened(browser, run / document.FILE)
    switches = [Select(one) for one in opened.find_elements(By.CSS_SELECTOR, "select[name=category]")]
    assert len(switches) == 3  # scores, weights, examples
    assert {one.first_selected_option.text for one in switches} == {ODD}
    for category in CATEGORIES:
        switches[-1].select_by_visible_text(category)
        assert [one.first_selected_option.text for one in switches] == [category] * 3
        shown = [e for e in opened.find_elements(By.CSS_SELECTOR, "[data-choice]") if e.is_displayed()]
        assert [e.get_attribute("data-choice") for e in shown].count(category) == 3
        charts = [e for e in opened.find_elements(By.CSS_SELECTOR, "svg.chart") if e.is_displayed()]
        assert [e.get_attribute("aria-label") for e in charts[1:]] == [
            f"Weights of {category}",
            "Validation IG after each epoch",
        ]
        assert category in charts[1].text
    Select(opened.find_element(By.NAME, "map")).select_by_visible_text("log-density")
    legend = [e.text for e in opened.find_elements(By.CSS_SELECTOR, ".legend span") if e.is_displayed()]
    assert any("bits over uniform" in text for text in legend)
    assert not opened.find_elements(By.CSS_SELECTOR, "td > b > *, option > *, h3 b"), "names are text, not markup"
    assert not opened.get_log("browser")


def test_the_page_needs_nothing_else_and_fits_a_laptop(run: Path, browser: Any) -> None:
    opened = _opened(browser, run / document.FILE)
    assert opened.execute_script("return performance.getEntriesByType('resource').map(e => e.name)") == []
    assert opened.execute_script("return document.documentElement.scrollWidth - innerWidth") <= 0
    broken = "return [...document.querySelectorAll('image, img')].filter(i => !/^data:/.test(i.href?.baseVal ?? i.src))"
    assert opened.execute_script(broken) == []
    assert "30.0 minutes in all, 1.50 at 3 an hour" in (run / document.FILE).read_text(encoding="utf-8")
    assert not opened.get_log("browser")


def test_a_comparison_has_the_tables_and_the_weights_of_all_runs(tmp_path: Path, browser: Any) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    runs = {}
    for name, steps in (("acw_v1", 4), ("acw_v2", 4), ("acw_v3", 6)):
        (tmp_path / name).mkdir()
        _write_run(tmp_path / name, steps, joint=True, learned=name != "acw_v1")
        runs[name] = str(tmp_path / name)
    row = {"NSS": 2.0, "epochs": "3", "IG low": 0.1, "IG high": 0.3, "what changed": "nothing"}
    rows: Sequence[dict[str, Any]] = [
        {"system": "acw_v2", "measured": "here", "IG": 0.2, **row},
        {"system": "acw_v3", "measured": "here", "IG": 0.25, **row},
        {"system": "elsewhere", "measured": "published", "IG": 9.0, **row, "IG low": None, "IG high": None},
    ]
    pair = {"a": "acw_v3", "b": "acw_v2", "metric": "IG", "mean": 0.05, "ci95": [0.01, 0.09]}
    found = {"table1": rows, "table2": rows, "comparisons": [pair], "runs": runs, "dataset": _stimuli().summary()}
    write_json(tmp_path / "reproduction.json", found | {"fields": ["--joint_max_epochs", "6"]})
    opened = _opened(browser, comparison.write(tmp_path))
    Select(opened.find_element(By.NAME, "category")).select_by_visible_text("Action")
    charts = [one for one in opened.find_elements(By.CSS_SELECTOR, "svg.chart") if one.is_displayed()]
    labels = [one.get_attribute("aria-label") for one in charts]
    assert labels == ["Weights of acw_v2: Action", "Weights of acw_v3: Action"]
    assert all("epoch" in one.text for one in charts)
    bold = [one.text for one in opened.find_elements(By.CSS_SELECTOR, "#s0 td b")]
    assert "0.250" in bold, "the best of what was measured here"
    assert "9.000" not in bold
    assert opened.find_element(By.LINK_TEXT, "acw_v2").get_attribute("href").endswith("/acw_v2/report.html")
    assert not opened.get_log("browser")


def test_which_images_are_shown() -> None:
    gains = {f"{k}": {"category_weights": k / 10, "gold_standard": 1.0 - (k == 3)} for k in range(12)}
    category = {image: "even" if int(image) % 2 == 0 else "odd" for image in gains}
    assert gallery.typical(category, gains, "category_weights") == {"even": "4", "odd": "5"}
    assert gallery.worst(gains, "category_weights") == ["0", "1", "2", "4", "5", "6", "7", "8", "9", "10"]
    for image in gains.values():
        del image["gold_standard"]
    assert gallery.worst(gains, "category_weights")[:4] == ["0", "1", "2", "3"]


def test_pictures_end_where_the_page_would_grow_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    images = {CATEGORIES[0]: "0/000.png", CATEGORIES[1]: "1/000.png"}
    weights: Any = {category: {} for category in CATEGORIES}
    every = gallery.examples(images, weights, _example)
    shown = [one for part in every["categories"].values() for one in part["every"]]
    size = sum(picture.bytes for one in shown for picture in one.pictures.values())
    monkeypatch.setattr(gallery, "BYTES", int(0.7 * size))
    some = gallery.examples(images, weights, _example)
    assert (list(some["categories"]), some["missing"]) == ([CATEGORIES[0]], 1)


def test_the_gain_below_a_picture_is_the_metric() -> None:
    example = _example("0/007.png")
    bias = Components.of(torch.from_numpy(example.log_densities[CENTRE_BIAS])[None], 5.0)
    others = ShuffledFixations(SIZE, np.arange(50), np.ones(50, np.int64))
    target = Target.of(example.x, example.y, others, bias)
    for log_density in example.log_densities.values():
        expected = score(torch.from_numpy(log_density), target)["IG"]
        assert Pictures(example).information_gain(log_density) == pytest.approx(expected, abs=1e-5)
