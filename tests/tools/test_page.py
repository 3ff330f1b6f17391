"""The page in a real Chromium, against a real server process, whose model answers a photo with its shade.

Needs playwright, axe-playwright-python and a `chromium` on the path.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath

playwright = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")
CHROMIUM = shutil.which("chromium")
if not CHROMIUM:
    pytest.skip("there is no chromium", allow_module_level=True)

from geotoken_jax.export import pictures  # noqa: E402
from tests.test_page import taken  # noqa: E402
from tests.test_serve import photo, wait  # noqa: E402

ROOT = Path(__file__).parents[2]
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]  # fmt: skip
DESK, PHONE = {"width": 1280, "height": 800}, {"width": 360, "height": 740}
SERVED = """
import dataclasses, sys
from geotoken_jax.predict.prediction import Candidate, Neighbor
from geotoken_jax.serve import app, limits
from tests.test_serve import Shade

class Many(Shade):
    def predict_prepared(self, photos):
        def more(p):
            near = [(p.latitude + k / 10, 20.0 + k) for k in range(1, 5)]
            return dataclasses.replace(
                p,
                candidates=(*p.candidates, *(Candidate(*at, 0.1 / k) for k, at in enumerate(near, 1))),
                neighbors=tuple(Neighbor(str(k), *at, 2.5 - k / 10, k) for k, at in enumerate(near)),
            )
        return [more(prediction) for prediction in super().predict_prepared(photos)]

settings = limits.ServeSettings(port=0, rate=0, batch_size=2, token_variable=sys.argv[2])
sys.exit(app.run(Many(), settings, settings.bind(), sys.argv[1]))
"""


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    photos = [taken(n, photo(40 * n, 96)) for n in range(4)]
    pictures.write_thumbnails(photos, np.array([p["id"].encode() for p in photos]), 64, epath.Path(folder))
    (folder / "examples").mkdir()
    (folder / "examples/00.jpg").write_bytes(photo(100))
    words = {"name": "A model", "data": "x", "photos": 4, "knows": "It knows shades.", "credit": "Photos: ours.",
             "examples": [{"latitude": 51.0, "longitude": 20.0, "place": "Radom, Poland"}]}  # fmt: skip
    (folder / "page.json").write_text(json.dumps(words))
    (folder / "SHA256SUMS").write_text("")
    return folder


@contextlib.contextmanager
def serving(export: Path, token: str = "") -> Iterator[str]:
    """Serves in a process of its own; yields the address."""
    log, variable = export / f"log{len(token)}", "PAGE_TOKEN" if token else ""
    command = [sys.executable, "-c", SERVED, str(export), variable]
    with log.open("w") as errors:
        process = subprocess.Popen(command, cwd=ROOT, stderr=errors, env={**os.environ, "PAGE_TOKEN": token})
    try:
        wait(lambda: "running on" in log.read_text() or process.poll() is not None)
        address = re.search(r"http://[\d.:]+", log.read_text())
        assert address, log.read_text()
        yield address[0]
    finally:
        process.terminate()
        assert process.wait(60) == 0


@pytest.fixture(scope="module")
def address(export: Path) -> Iterator[str]:
    with serving(export) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Callable[..., Any]]:
    """Opens the page; in the end nothing may have gone wrong in it, and nothing have been asked for elsewhere."""
    said, asked, opened = [], [], []

    def visit(to: str = address, viewport: Any = DESK, **options: Any) -> Any:
        context = browser.new_context(viewport=viewport, **{"reduced_motion": "reduce", **options})
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(to)
        page.set_default_timeout(30_000)
        opened.append((context, to))
        return page

    yield visit
    for context, _ in opened:
        context.close()
    hosts = {to.split("//")[1] for _, to in opened}
    assert not [url for url in asked if not url.startswith("blob:") and url.split("/")[2] not in hosts]
    # Chromium's own note of a status that a test asked for is no error of the page.
    assert not [text for text in said if "Failed to load resource" not in text]


def upload(page: Any, data: bytes = photo(100), name: str = "x.jpg") -> None:
    page.locator("#file").set_input_files({"name": name, "mimeType": "image/jpeg", "buffer": data})


def answered(page: Any) -> None:
    playwright.expect(page.locator("#answer")).to_be_visible()


def test_an_uploaded_photo_is_narrowed_down_level_by_level(visit: Any):
    page = visit(reduced_motion="no-preference")
    upload(page)
    answered(page)
    seen: list[str] = []
    while page.locator("#play").inner_text() != "Replay":
        seen += [text] if (text := page.locator("#caption").inner_text()) not in seen else []
        time.sleep(0.05)
    assert [text.split(":")[0] for text in seen[:7]] == ["Face", *(f"Level {k}" for k in range(1, 7))]
    assert all(re.search(r" km wide, \d+ %\.$", text) for text in seen[:7]) and "50 % probability within" in seen[7]
    assert page.locator("#levels li").count() == 7
    assert page.locator("#coordinates").inner_text() == "50.000000, 20.000000"
    assert "10 km" in page.locator("#sure").inner_text() and "90 km" in page.locator("#sure").inner_text()
    link = page.locator("#osm")
    assert "mlat=50&mlon=20" in link.get_attribute("href") and link.get_attribute("rel") == "noopener noreferrer"
    page.locator("#play").click()  # again, and stopped on the way
    playwright.expect(page.locator("#caption")).to_contain_text("Level 2")
    page.locator("#play").click()
    stopped = page.locator("#caption").inner_text()
    time.sleep(2)
    assert page.locator("#caption").inner_text() == stopped


def painted(page: Any) -> bytes:
    time.sleep(0.3)
    return page.locator("#globe").screenshot()


def test_candidates_and_neighbors_are_listed_and_on_the_map(visit: Any):
    page = visit()
    upload(page)
    answered(page)
    assert page.locator("#candidates li").count() == 5 and page.locator("#neighbors li").count() == 4
    images = page.locator("#neighbors img")
    for k in range(4):
        playwright.expect(images.nth(k)).to_have_js_property("naturalWidth", 64)
    assert "similarity 2.50" in page.locator("#neighbors button").first.inner_text()
    before = painted(page)
    page.locator("#candidates button").nth(2).click()
    assert page.locator("#caption").inner_text().startswith("Candidate 3: 50.2000° N, 22.0000° E, 144 km")
    candidate = painted(page)
    page.locator("#neighbors button").nth(3).click()
    assert "A similar photo: 50.4000° N, 24.0000° E" in page.locator("#caption").inner_text()
    assert len({before, candidate, painted(page)}) == 3
    assert page.locator("[aria-current]").count() == 1


def test_an_example_says_how_far_off_the_answer_is(visit: Any):
    page = visit()
    page.locator("#examples button").click()
    answered(page)
    assert page.locator("#off").inner_text() == "It was taken 111 km from there, near Radom, Poland."
    upload(page)
    answered(page)
    playwright.expect(page.locator("#off")).to_be_hidden()


def test_everything_works_by_keyboard(visit: Any):
    page = visit()
    page.on("filechooser", lambda _: None)  # asked for now, choosers are caught by the time that one opens
    playwright.expect(page.locator("#examples img")).to_be_visible()

    def tab_to(wanted: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.locator(f"{wanted}:focus").count():
                return
        raise AssertionError(f"{wanted} is not reached by Tab")

    tab_to("#theme")
    page.keyboard.press("Enter")
    assert page.locator("html").get_attribute("data-theme") == "dark"
    tab_to("#file")
    with page.expect_file_chooser() as selector_loader:
        page.keyboard.press("Enter")
    selector_loader.value.set_files({"name": "x.jpg", "mimeType": "image/jpeg", "buffer": photo(100)})
    answered(page)
    tab_to("#globe")
    before = painted(page)
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("+")
    assert painted(page) != before
    tab_to("#level")
    page.keyboard.press("Home")
    assert page.locator("#caption").inner_text().startswith("Face: ")
    for level in range(1, 7):
        page.keyboard.press("ArrowRight")
        words = page.locator("#caption").inner_text()
        assert words.startswith(f"Level {level}: ") and page.locator("#level").get_attribute("aria-valuetext") == words
        assert page.locator("#levels [aria-current]").inner_text().startswith(f"Level {level}")
    tab_to("#levels button")
    page.keyboard.press("Enter")
    assert page.locator("#caption").inner_text().startswith("Face: ")
    tab_to("#candidates button")
    page.keyboard.press("Enter")
    assert page.locator("#caption").inner_text().startswith("Candidate 1: ")
    tab_to("#neighbors button")
    page.keyboard.press(" ")
    assert page.locator("#caption").inner_text().startswith("A similar photo: ")


def test_what_goes_wrong_is_one_sentence(visit: Any):
    page = visit()
    problem = page.locator("#problem")
    upload(page, b"this is not a photo", "notes.txt")
    playwright.expect(problem).to_contain_text("photo")
    assert re.fullmatch(r"[A-Z][^<>]{10,150}\.", problem.inner_text())
    playwright.expect(page.locator("#answer")).to_be_hidden()
    cases = {
        413: "This photo is too large for the service: send a smaller one.",
        429: "Too many photos came from your address: try again in 12 seconds.",
        503: "The service is busy or still starting: try again in 12 seconds.",
        500: "The service failed: try again, and report it to the operator if it fails again.",
    }
    for status, sentence in cases.items():
        body = {"status": status, "json": {"error": "something else"}, "headers": {"Retry-After": "12"}}
        page.route("**/v1/predict*", lambda route, request, body=body: route.fulfill(**body))
        upload(page)
        playwright.expect(problem).to_have_text(sentence)
        page.unroute("**/v1/predict*")
    page.context.set_offline(True)
    upload(page)
    playwright.expect(problem).to_contain_text("cannot be reached")
    page.context.set_offline(False)
    upload(page)
    answered(page)
    assert problem.inner_text() == ""


def test_a_token_is_asked_for_and_kept_in_memory_alone(visit: Any, export: Path):
    with serving(export, "right") as address:
        page = visit(address)
        for sent, sentence in (("wrong", "does not accept this token"), ("right", "")):
            playwright.expect(page.locator("#token-form")).to_be_visible()
            page.locator("#token").fill(sent)
            page.locator("#token-form button").click()
            playwright.expect(page.locator("#problem")).to_contain_text(sentence)
        playwright.expect(page.locator("#token-form")).to_be_hidden()
        page.locator("#examples button").click()
        answered(page)
        playwright.expect(page.locator("#neighbors img").first).to_have_js_property("naturalWidth", 64)
        state = page.context.storage_state()
        assert state == {"cookies": [], "origins": []} and "right" not in page.url
        page.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESK, PHONE], ids=["desk", "phone"])
def test_axe_finds_nothing_serious(visit: Any, theme: str, viewport: Any):
    page = visit(viewport=viewport, color_scheme=theme, bypass_csp=True)  # axe is a script of its own
    found = axe.Axe().run(page).response["violations"]
    page.locator("#examples button").click()
    answered(page)
    found += axe.Axe().run(page).response["violations"]
    assert [f"{violation['id']}: {violation['nodes'][0]['html']}" for violation in found] == []


@pytest.mark.parametrize("viewport", [PHONE, {"width": 320, "height": 480}, {"width": 640, "height": 400}])
def test_it_fits_a_phone_and_a_page_at_twice_the_size(visit: Any, viewport: Any):
    page = visit(viewport=viewport)
    upload(page)
    answered(page)
    body = page.locator("body").bounding_box()
    assert body["width"] <= viewport["width"]
    for element in page.locator("button:visible, a:visible, canvas, #answer *:visible").all():
        box = element.bounding_box()
        inside = box["x"] >= -1 and box["x"] + box["width"] <= viewport["width"] + 1
        scrolls = element.locator("xpath=ancestor::*[@id='examples']").count() > 0
        assert inside or scrolls, element.evaluate("e => e.outerHTML.slice(0, 100)")
