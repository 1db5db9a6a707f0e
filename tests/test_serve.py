"""`acw serve`: one real server, asked by programs, by uploads that are none, and by a person in a browser."""

from __future__ import annotations

import contextlib
import io
import os
import random
import re
import socket
import threading
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import yaml
from PIL import Image
from scipy.ndimage import gaussian_filter
from servers import acw_serve, processes_of
from test_model import CATEGORIES, NAMES, image
from test_model import folder as folder
from test_model import model as model
from test_page import browser as browser
from three_nodes import PATIENCE, wait_for
from uploads import KINDS, encoded, malformed

from acw.model.model import Model
from acw.pipeline import serve as command
from acw.serving import answers, limits
from acw.storage.errors import UserError

TOKEN = "0123456789abcdef"
PHONE, LAPTOP = (390, 844), (1280, 900)
PHONE, LAPTOP = (390, 844), (1280, 900)
JSON = {"Accept": "application/json"}


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    """Its address, ending in a slash."""
    with acw_serve(folder) as (address, process):
        yield address
    assert process.returncode == 0


def photo(height: int = 75, width: int = 101) -> np.ndarray:
    smooth = gaussian_filter(image(height, width).astype(float), (6, 6, 0))
    return (255 * (smooth - smooth.min()) / np.ptp(smooth)).astype(np.uint8)


def post(server: str, content: bytes, accept: str = "application/json", **more: Any) -> requests.Response:
    return requests.post(f"{server}predict", data=content, headers={"Accept": accept}, timeout=60, **more)


# --- Programs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("category", [None, "Street"])
def test_what_is_served_is_what_the_model_predicts(server: str, model: Model, category: str | None) -> None:
    pixels = photo()
    expected = model.predict(pixels, category)
    content, query = encoded(pixels, "PNG"), {"category": category} if category else {}
    answer = post(server, content, "application/x-npy", params=query)
    np.testing.assert_allclose(np.load(io.BytesIO(answer.content)), expected.log_density, rtol=0, atol=1e-4)
    assert answer.headers["content-type"] == "application/x-npy"
    drawn = np.asarray(Image.open(io.BytesIO(post(server, content, "image/png", params=query).content))).astype(int)
    assert np.abs(drawn - np.asarray(expected.overlay())).mean() < 0.5
    svg = ET.fromstring(post(server, content, "image/svg+xml", params=query).content)
    assert svg.get("viewBox") == "0 0 101 75"

    upload = {"image": ("photo.png", content, "application/octet-stream")}
    found = requests.post(f"{server}predict", files=upload, params=query, headers=JSON, timeout=60).json()
    assert (found["width"], found["height"], found["category"]) == (101, 75, category)
    assert found["categories"] == pytest.approx(expected.categories, abs=1e-4)
    assert {view["name"]: view["weight"] for view in found["views"]} == pytest.approx(expected.weights, abs=1e-4)
    places = [(place["x"], place["y"], place["share"]) for place in found["places"]]
    assert places == [(p.x, p.y, pytest.approx(p.share, abs=1e-3)) for p in expected.places()]
    assert set(found["contours"]) == {"0.25", "0.5", "0.75"}
    maps = [(found["density"], expected.log_density)]
    maps += [(view["density"], expected.by_backbone[view["name"]]) for view in found["views"]]
    for coarse, log_density in maps:
        grid = np.array(coarse["shares"]).reshape(coarse["height"], coarse["width"])
        assert grid.sum() == pytest.approx(1, abs=1e-2)
        # The cells' masses, where the image's px are dealt out to cells by their area.
        rows, columns = ((np.arange(n) * m) // n for n, m in zip(log_density.shape, grid.shape, strict=True))
        ours = np.zeros(grid.shape)
        np.add.at(ours, (rows[:, None], columns[None]), np.exp(log_density))
        assert np.corrcoef(ours.ravel(), grid.ravel())[0, 1] > 0.5


def test_a_photograph_is_predicted_as_it_is_shown(server: str, model: Model) -> None:
    pixels = photo()
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = post(server, encoded(pixels, "PNG", exif=exif), "application/x-npy")
    expected = model.predict(np.ascontiguousarray(np.rot90(pixels, -1)))
    np.testing.assert_allclose(np.load(io.BytesIO(turned.content)), expected.log_density, rtol=0, atol=1e-4)


def test_images_that_wait_are_predicted_together_and_none_is_mixed_up(server: str, model: Model) -> None:
    from concurrent.futures import ThreadPoolExecutor

    sizes = [(40 + 3 * number, 64) for number in range(6)] * 2
    with ThreadPoolExecutor(len(sizes)) as pool:
        found = pool.map(lambda size: post(server, encoded(photo(*size), "PNG"), "application/x-npy").content, sizes)
    for size, content in zip(sizes, found, strict=True):
        expected = model.predict(photo(*size)).log_density
        # In float32, by other numbers of threads and images at a time; another image's is off by far more.
        np.testing.assert_allclose(np.load(io.BytesIO(content)), expected, rtol=0, atol=1e-3)


def test_the_service_says_what_it_is(server: str) -> None:
    assert requests.get(f"{server}healthz").json() == {"status": "ok", "requests": 0}
    found = requests.get(f"{server}models").json()
    assert found["models"] == [{"recipe": "made up", "dataset": "", "categories": CATEGORIES, "views": list(NAMES)}]
    assert found["limits"]["pixels"] == limits.MOST_PIXELS
    described = requests.get(f"{server}openapi.json").json()
    assert set(described["paths"]) == {"/predict", "/models", "/healthz"}
    predicted = described["paths"]["/predict"]["post"]["responses"]
    assert set(answers.MEDIA_TYPES) == set(predicted["200"]["content"])
    assert {"400", "408", "413", "415", "503"} < set(predicted)
    rebound = requests.get(f"{server}models", headers={"Host": "a.page.elsewhere"})
    assert (rebound.status_code, "--token" in rebound.json()["detail"]) == (403, True)


def test_nothing_listens_where_others_could_reach_it(server: str) -> None:
    """Of this server's own Ray: its processes come from this test's."""
    listening = [c for one in processes_of(os.getpid()) for c in one.net_connections("inet") if c.status == "LISTEN"]
    assert f"127.0.0.1:{server.split(':')[2].strip('/')}" in [f"{c.laddr.ip}:{c.laddr.port}" for c in listening]
    assert {connection.laddr.ip for connection in listening} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


# --- Uploads that are none ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_malformed_upload_is_refused_in_one_sentence(server: str, kind: str) -> None:
    numbers = random.Random(kind)
    for _ in range(4):
        content, statuses = malformed(kind, numbers)
        answer = post(server, content)
        assert answer.status_code in statuses, (kind, answer.text)
        if answer.status_code != 200:
            detail = answer.json()["detail"]
            assert 10 < len(detail) < 300
            assert "\n" not in detail
            assert "Traceback" not in detail


def test_requests_that_cannot_be_meant(server: str) -> None:
    content = encoded(photo(), "JPEG")
    cases: list[tuple[dict[str, Any], int, str]] = [
        (
            {"data": content, "params": {"category": "cars"}},
            400,
            "unknown category 'cars'; the model knows Art",
        ),
        ({"data": content, "headers": {"Accept": "text/html"}}, 406, "answers are application/json, image/png"),
        ({"files": {"note": (None, "no file")}}, 400, "the form has no file"),
        ({"files": {"image": content}, "data": {"category": "cars"}}, 400, "unknown category 'cars'"),
        ({"data": b"--x", "headers": {"Content-Type": "multipart/form-data; boundary=y"}}, 400, "the form"),
        ({"data": content, "headers": {"Content-Type": "multipart/form-data"}}, 400, "the form cannot be read"),
        ({"data": bytes(limits.MOST_BYTES + 1)}, 413, "more than 32 MiB"),
        ({"data": iter([b"a" * 2**20] * 33)}, 413, "more than 32 MiB"),
    ]
    for request, status, line in cases:
        answer = requests.post(f"{server}predict", timeout=60, **request)
        assert (answer.status_code, line in answer.json()["detail"]) == (status, True), answer.text
    assert requests.get(f"{server}predict").status_code == 405
    assert requests.get(f"{server}nothing").json() == {"detail": "Not Found"}
    assert requests.get(f"{server}healthz").json() == {"status": "ok", "requests": 0}, "none of them is left"


def test_a_queue_that_is_full_and_an_upload_that_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    """The application without a server: what it does with more requests than it may have, and with slow ones."""
    import asyncio

    from fastapi import HTTPException, Request

    async def run() -> None:
        queue = limits.Queue()
        with contextlib.ExitStack() as stack:
            for _ in range(limits.MOST_REQUESTS):
                stack.enter_context(queue.admitted())
            with pytest.raises(HTTPException) as caught, queue.admitted():
                pass
        assert (caught.value.status_code, caught.value.headers) == (503, {"Retry-After": "2"})
        assert queue.requests == 0
        done = []

        async def take(number: int) -> None:
            async with queue.room(limits.MOST_PIXELS_AT_ONCE // 2):
                await asyncio.sleep(0)
                done.append(number)

        async with queue.room(limits.MOST_PIXELS_AT_ONCE):
            waiting = [asyncio.create_task(take(number)) for number in range(5)]
            await asyncio.sleep(0.01)
            assert not done
        await asyncio.gather(*waiting)
        assert sorted(done) == list(range(5))

        async def silent() -> dict[str, Any]:
            await asyncio.sleep(60)
            return {}

        monkeypatch.setattr(limits, "SECONDS_TO_SEND", 0.01)
        with pytest.raises(HTTPException) as caught:
            await limits.body(Request({"type": "http", "method": "POST", "headers": []}, silent))
        assert caught.value.status_code == 408

    asyncio.run(run())


def test_which_answer_is_wanted() -> None:
    for accept, expected in {
        "*/*": "application/json",
        "text/html,image/avif,image/*;q=0.8,*/*;q=0.5": "image/png",
        "image/svg+xml, */*;q=0.1": "image/svg+xml",
        "application/x-npy;q=0.4, application/json;q=0.3": "application/x-npy",
        "text/html": None,
        "application/json;q=0": None,
        ";q=many": None,
    }.items():
        assert answers.wanted(accept) == expected


# --- With a token ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(model: Model) -> Iterator[str]:
    """The address of the application alone, in a thread, that asks for a token."""
    import uvicorn

    from acw.serving import routes

    async def predicted(pixels: np.ndarray, category: str | None) -> Any:
        return model.predict(pixels, category)

    app = routes.application(model, predicted, routes.digest(TOKEN), 1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=one.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        one.should_exit = True
        thread.join()


def test_only_who_knows_the_token_is_answered(guarded: str) -> None:
    content = encoded(photo(), "PNG")
    for given in ("", "Bearer ", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", f"Basic {TOKEN}", "Bearer \u00e4"):
        headers = {"Authorization": given.encode()} if given else {}
        for answer in (
            requests.get(f"{guarded}models", headers=headers),
            requests.post(f"{guarded}predict", data=content, headers=headers),
        ):
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert "Authorization: Bearer TOKEN" in answer.json()["detail"]
    right = {"Authorization": f"Bearer {TOKEN}"}
    assert requests.post(f"{guarded}predict", data=content, headers=right).status_code == 200
    assert requests.get(f"{guarded}models", headers=right | {"Host": "a.name.elsewhere"}).status_code == 200
    assert requests.get(f"{guarded}healthz").status_code == 200, "whoever watches it"


# --- The page ----------------------------------------------------------------------------------------------------


def shot(browser: Any, name: str) -> None:
    """A picture of the whole page, where a folder for them is named."""
    if folder := os.environ.get("SHOTS"):
        height = browser.execute_script("return document.documentElement.scrollHeight")
        width = browser.execute_script("return innerWidth")
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )
        browser.save_screenshot(str(Path(folder) / f"{name}.png"))
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def resize(browser: Any, size: tuple[int, int]) -> None:
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def scheme(browser: Any, value: str) -> None:
    media = {"features": [{"name": "prefers-color-scheme", "value": value}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)


def wait(browser: Any, condition: str) -> Any:
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, PATIENCE, 0.1).until(lambda one: one.execute_script(f"return {condition}"), condition)


DONE = "!document.body.classList.contains('stale') && !document.getElementById('result').hidden"


def test_a_person_sees_where_people_look(server: str, model: Model, browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select

    downloads = tmp_path / "downloads"
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(downloads)})
    path = Path(os.environ.get("SHOT_OF", tmp_path / "My photo.png"))
    if not path.exists():
        path.write_bytes(encoded(photo(300, 404), "PNG"))
    pixels = np.asarray(Image.open(path).convert("RGB"))
    expected = model.predict(pixels)
    resize(browser, LAPTOP)
    scheme(browser, "light")
    browser.get(server)
    assert not browser.find_element(By.ID, "result").is_displayed()
    shot(browser, "empty")
    # By keys alone: the first stop is the button, and Enter opens the browser's own dialogue, which is given a file.
    browser.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    assert browser.switch_to.active_element.get_attribute("id") == "choose"
    browser.execute_script("document.getElementById('file').click = function () { this.dataset.clicked = 1; }")
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    assert browser.execute_script("return document.getElementById('file').dataset.clicked") == "1"
    browser.find_element(By.ID, "file").send_keys(str(path))
    wait(browser, DONE)
    assert f"{pixels.shape[1]} \u00d7 {pixels.shape[0]} px" in browser.find_element(By.ID, "status").text

    marks = browser.find_elements(By.CSS_SELECTOR, "#marks b")
    assert [mark.text for mark in marks] == [str(number) for number, _ in enumerate(expected.places(), 1)]
    stage = browser.find_element(By.ID, "stage").rect
    for mark, place in zip(marks, expected.places(), strict=True):
        centre = mark.rect["x"] + mark.rect["width"] / 2 - stage["x"]
        assert centre == pytest.approx(stage["width"] * (place.x + 0.5) / pixels.shape[1], abs=13)
    rows = browser.find_elements(By.CSS_SELECTOR, "#places tr")
    assert [row.text.split()[1] for row in rows] == [f"{100 * place.share:.1f}" for place in expected.places()]
    captions = [caption.text for caption in browser.find_elements(By.CSS_SELECTOR, "#views figcaption")]
    assert [caption.split()[0] for caption in captions] == list(NAMES)
    assert len(browser.find_elements(By.CSS_SELECTOR, "#lines path")) == 6
    # The map's brightest pixel is where the density is highest.
    brightest = browser.execute_script(
        "const c = document.getElementById('heat'), d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "let best = 0; for (let i = 0; i < d.length; i += 4) if (d[i + 3] > d[best + 3]) best = i;"
        "return [(best / 4 % c.width) / c.width, Math.floor(best / 4 / c.width) / c.height]"
    )
    row, column = np.unravel_index(expected.log_density.argmax(), expected.log_density.shape)
    assert brightest == pytest.approx([column / pixels.shape[1], row / pixels.shape[0]], abs=0.03)

    opacity = browser.find_element(By.ID, "opacity")
    before = float(opacity.get_attribute("value"))
    opacity.send_keys(Keys.ARROW_LEFT * 5)
    assert float(browser.find_element(By.ID, "heat").value_of_css_property("opacity")) == pytest.approx(
        (before - 5) / 100
    )
    for name, layer in (("show-lines", "lines"), ("show-marks", "marks")):
        browser.find_element(By.ID, name).send_keys(Keys.SPACE)
        assert not browser.find_element(By.ID, layer).is_displayed()
        browser.find_element(By.ID, name).send_keys(Keys.SPACE)
    shot(browser, "light")
    for name in ("overlay.png", "svg", "npy"):
        accept = {"overlay.png": "image/png", "svg": "image/svg+xml", "npy": "application/x-npy"}[name]
        browser.find_element(By.CSS_SELECTOR, f"[data-accept='{accept}']").click()
        made = downloads / f"{path.stem}.{name}"
        wait_for(made.exists, f"for {made}")
    np.testing.assert_allclose(np.load(downloads / f"{path.stem}.npy"), expected.log_density, rtol=0, atol=1e-4)

    choice = Select(browser.find_element(By.ID, "category"))
    likeliest = max(expected.categories, key=lambda name: expected.categories[name])
    assert choice.first_selected_option.text.startswith(f"inferred: {likeliest}")
    heat = "document.getElementById('heat').toDataURL()"
    drawn = browser.execute_script(f"return {heat}")
    weights = "[...document.querySelectorAll('#views figcaption span')].map(e => e.textContent).join()"
    choice.select_by_visible_text("Street")
    wait(browser, f"{DONE} && {weights} === '25.0 %,75.0 %'")
    assert browser.execute_script(f"return {heat}") != drawn

    for name, size, colours in (("dark", LAPTOP, "dark"), ("phone", PHONE, "light"), ("phone-dark", PHONE, "dark")):
        resize(browser, size)
        scheme(browser, colours)
        assert browser.execute_script("return document.documentElement.scrollWidth - innerWidth") <= 0, name
        paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert paper == ("rgb(20, 24, 29)" if colours == "dark" else "rgb(255, 255, 255)")
        shot(browser, name)
        resize(browser, size)
    resize(browser, LAPTOP)
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert loaded
    assert all(name.startswith((server, f"blob:{server}", "data:")) for name in loaded), loaded
    assert not browser.get_log("browser")


def test_recent_images_stay_in_the_browser_until_they_are_forgotten(server: str, browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By

    browser.get(server)
    wait(browser, "document.querySelectorAll('#thumbs button').length === 1")
    for number in range(2):
        path = tmp_path / f"{number}.png"
        path.write_bytes(encoded(photo(60 + number, 80), "PNG"))
        browser.find_element(By.ID, "file").send_keys(str(path))
        wait(browser, f"{DONE} && document.querySelectorAll('#thumbs button').length === {2 + number}")
    browser.refresh()
    wait(browser, "document.querySelectorAll('#thumbs button').length === 3")
    browser.find_element(By.CSS_SELECTOR, "#thumbs button").click()
    wait(browser, DONE)
    assert "1.png, 80 \u00d7 61 px" in browser.find_element(By.ID, "status").text
    browser.find_element(By.ID, "forget").click()
    wait(browser, "document.getElementById('recent').hidden")
    browser.refresh()
    assert browser.find_elements(By.CSS_SELECTOR, "#thumbs button") == []


def test_what_is_dropped_or_pasted_is_predicted_and_what_is_wrong_is_said(server: str, browser: Any) -> None:
    from selenium.webdriver.common.by import By

    browser.get(server)
    give = """const data = new DataTransfer();
        data.items.add(new File([Uint8Array.from(arguments[0])], arguments[1], {type: 'image/png'}));
        dispatchEvent(arguments[2] === 'drop' ? new DragEvent('drop', {dataTransfer: data, cancelable: true})
            : new ClipboardEvent('paste', {clipboardData: data}))"""
    for event, size in (("drop", (50, 70)), ("paste", (52, 70))):
        browser.execute_script(give, list(encoded(photo(*size), "PNG")), "a.png", event)
        wait(browser, f"document.getElementById('status').textContent.startsWith('a.png, 70 \u00d7 {size[0]} px')")
    browser.execute_script(give, list(b"no image"), "b.png", "drop")
    wait(browser, "document.getElementById('status').className === 'error'")
    assert browser.find_element(By.ID, "status").text.startswith("This is none of the image formats")
    # An image that this browser cannot show is predicted all the same.
    browser.execute_script(give, list(encoded(photo(54, 70), "TIFF")), "c.tif", "drop")
    wait(browser, "document.getElementById('status').textContent.startsWith('c.tif, 70 \u00d7 54 px')")
    wait(browser, DONE)
    browser.get_log("browser")  # of the refused one


def test_the_page_asks_for_the_token(guarded: str, browser: Any) -> None:
    from selenium.webdriver.common.by import By

    browser.get(guarded)
    wait(browser, "!document.getElementById('access').hidden")
    field = browser.find_element(By.ID, "token")
    field.send_keys("a wrong token 123\n")
    wait(browser, "document.getElementById('access-error').textContent === 'That is not it.'")
    shot(browser, "token")
    field.clear()
    field.send_keys(f"{TOKEN}\n")
    wait(browser, "document.getElementById('access').hidden")


# --- The command -------------------------------------------------------------------------------------------------


def test_a_wrong_command_line_serves_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cases: list[tuple[list[str | Path], str]] = [
            ([folder, "--host", "0.0.0.0"], "--host 0.0.0.0: others may reach it there; give a token"),
            ([folder, "--host", "127.0.0.2"], "or listen on 127.0.0.1"),
            ([folder, "--host", "0.0.0.0", "--token", "short"], "--token: give 16 printable characters or more"),
            ([folder, "--replicas", "0"], "--replicas 0: give 1 or more"),
            ([folder, "--port", str(port)], f"--port {port}: cannot be listened on"),
            ([folder, "--port", "70000"], "--port 70000: cannot be listened on"),
        ]
        for words, line in cases:
            with pytest.raises(UserError, match=re.escape(line)):
                command.main([str(word) for word in words])
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(UserError, match="RAY_ADDRESS: acw serve starts a Ray of its own"):
        command.main([str(folder)])


def test_a_written_configuration_is_what_ray_serve_deploys(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ray.serve import Application
    from ray.serve.schema import ServeDeploySchema

    from acw.serving import routes, service

    path = tmp_path / "serve.yaml"
    words = [folder, "--host", "0.0.0.0", "--token", TOKEN, "--replicas", "2", "--write-config", path]
    command.main([str(word) for word in words])
    assert capsys.readouterr().out == f"{path}\n"
    text = path.read_text(encoding="utf-8")
    assert TOKEN not in text
    config = ServeDeploySchema.model_validate(yaml.safe_load(text))
    (application,) = config.applications
    assert (config.http_options.host, config.http_options.port) == ("0.0.0.0", 8000)
    assert application.import_path == "acw.serving.service:app"
    own = {"model": str(folder), "device": "cpu", "token_sha256": routes.digest(TOKEN), "own_ray": False}
    assert application.args == own
    (deployment,) = application.deployments
    assert (deployment.name, deployment.num_replicas) == (service.Predictor.name, 2)  # type: ignore[attr-defined]
    assert isinstance(service.app(application.args), Application)
