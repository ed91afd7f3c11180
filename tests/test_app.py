"""The operator in the real App, in a real browser: its form, its progress, its result on the screen.

``ECIF_SCREENSHOT=docs/app.png pytest tests/test_app.py`` renews the README's picture.
"""

import os
import shutil
import socket
import subprocess
import sys
import time

import fiftyone as fo
import pytest

from fiftyone_ecif.demo import demo_model, load_demo
from fiftyone_ecif.training import MODEL

sync_api = pytest.importorskip("playwright.sync_api")

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SCREENSHOT = os.environ.get("ECIF_SCREENSHOT")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# rank and caption of the thumbnails on screen, in reading order
READ_GRID = """() => {
    const at = name => [...document.querySelectorAll(`[data-cy=tag-${name}]`)]
        .map(e => ({text: e.textContent, tile: e.parentElement.getBoundingClientRect()}))
        .filter(e => e.tile.width && e.tile.top > 0 && e.tile.top < innerHeight)
        .sort((a, b) => Math.round((a.tile.bottom - b.tile.bottom) / 20) || a.tile.left - b.tile.left)
    const ranks = at("ecif_rank"), captions = at("caption")
    return ranks.length == captions.length ? ranks.map((rank, i) => [rank.text, captions[i].text]) : []
}"""
SERVE = """
import sys, time, fiftyone as fo
dataset = fo.load_dataset(sys.argv[1])
fo.launch_app(dataset.match_tags("train"), port=int(sys.argv[2]), address="127.0.0.1", remote=True)
time.sleep(600)
"""


@pytest.fixture
def scenes(dataset, made):
    """The small demo set and its checkpoint; the whole one for the README's picture."""
    checkpoint = made[1]
    if SCREENSHOT:
        dataset = load_demo(name="digit-scenes")
        checkpoint = demo_model(dataset)
    dataset.app_config.active_fields = fo.core.odm.ActiveFields(paths=["caption", "spoiled"])
    dataset.save()
    return dataset, checkpoint


@pytest.fixture
def page(scenes):
    """The App on the training pairs."""
    dataset, _ = scenes
    if BROWSER is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    app = subprocess.Popen([sys.executable, "-c", SERVE, dataset.name, str(port)], stdout=subprocess.DEVNULL)
    try:
        _wait_for(port)
        with sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
            page = browser.new_page(viewport={"width": 1280, "height": 800})
            page.set_default_timeout(60_000)
            page.goto(f"http://127.0.0.1:{port}")
            yield page
            browser.close()
    finally:
        app.terminate()
        app.wait()


def _wait_for(port):
    for _ in range(240):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    raise TimeoutError(f"the App did not open port {port}")


def test_scoring_through_the_form(page, scenes):
    dataset, checkpoint = scenes
    train, val = (len(dataset.match_tags(tag)) for tag in ("train", "val"))
    page.get_by_text(f"{train:,} samples").wait_for()
    page.keyboard.press("Escape")  # an offer can lie over the App
    page.keyboard.press("`")
    page.get_by_placeholder("Search operations").fill("Compute ECIF")
    page.get_by_text("Compute ECIF influence").last.click()

    form = page.get_by_role("dialog")
    form.get_by_text(f"{train:,} pairs will be scored towards {val:,} validation pairs").wait_for()
    execute = form.get_by_role("button", name="Execute").first
    sync_api.expect(execute).to_be_disabled()  # no weights are given yet
    texts = form.locator("input[type=text], input[type=string]")
    texts.nth(1).fill("no/such/model.pt")
    form.get_by_text("There is no file no/such/model.pt").wait_for()
    texts.nth(0).fill(MODEL)
    texts.nth(1).fill(checkpoint)
    form.get_by_role("checkbox").first.check()  # Fit the heads first
    sync_api.expect(execute).to_be_enabled()
    execute.click()

    page.get_by_text(f"Scored {train:,} pairs, skipped 0. The most harmful come first").wait_for()
    page.get_by_role("button", name="Done").click()
    page.locator("[data-cy=sidebar-field-container-ecif_influence]").wait_for()

    dataset.reload()
    captions = dataset.exists("ecif_influence").sort_by("ecif_influence").values("caption")
    for _ in range(60):  # the grid is drawn anew while its samples arrive
        shown = page.evaluate(READ_GRID)
        if len(shown) >= 6:
            break
        page.wait_for_timeout(500)
    assert len(shown) >= 6
    assert [rank for rank, _ in shown] == [str(place) for place in range(1, len(shown) + 1)]
    assert [caption for _, caption in shown] == captions[: len(shown)]
    if SCREENSHOT:
        page.wait_for_timeout(8_000)  # the thumbnails, and the end of the toast
        page.screenshot(path=SCREENSHOT)
